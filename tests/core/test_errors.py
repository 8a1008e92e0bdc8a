"""Error messages on a terminal."""

from __future__ import annotations

from modelchain.errors import InputError, Problem


def test_control_characters_in_file_names_are_escaped() -> None:
    error = InputError(Problem("is\x1b[2J gone", "märz\x07.tar", "a\udcff.jpg\nb"))
    assert str(error) == "märz\\x07.tar: a\\udcff.jpg b: is\\x1b[2J gone"
