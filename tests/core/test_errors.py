"""Error messages on a terminal."""

from __future__ import annotations

from modelchain.errors import InputError, Problem


def test_names_of_others_do_not_steer_the_terminal() -> None:
    error = InputError(Problem("is\x1b[2J gone", "märz\x07.tar", "a\udcff.jpg\nb"))
    assert str(error) == "märz\\x07.tar: a\\udcff.jpg b: is\\x1b[2J gone"
