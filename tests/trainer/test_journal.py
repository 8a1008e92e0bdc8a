"""Entries are appended by a thread: one write to each file for all steps of a look."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from modelchain_trainer.journal import Journal


def step(number: int) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": 1.0 / number}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were opened to append to them."""
    names, original = [], Path.open

    def counted(self: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if "a" in mode:
            names.append(self.name.partition(".")[0])
        return original(self, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", counted)
    return names


def lines(journal: Journal) -> list[int]:
    return [json.loads(line)["step"] for line in journal.lines.read_text().splitlines()]


def test_a_look_is_one_append_to_each_file(tmp_path: Path, opened: list[str]) -> None:
    journal = Journal(tmp_path)
    journal.resume(-1)
    opened.clear()
    journal.write(*map(step, range(1, 501)))
    journal.wait()
    assert opened == ["metrics", "events"] and lines(journal) == list(range(1, 501))
    journal.write({"event": "evaluation", "step": 500, "metrics": {"top1": 50.0}}, step(501))
    journal.wait()
    assert lines(journal) == [*range(1, 501), 500, 501] and len(opened) == 4


def test_a_slow_volume_does_not_hold_up_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, ready, original = Journal(tmp_path), threading.Event(), Path.open

    def slow(self: Path, *arguments: Any, **more: Any) -> Any:
        assert ready.wait(60)
        return original(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", slow)
    for number in range(1, 6):
        journal.write(step(number))
    assert not journal.lines.exists()
    ready.set()
    journal.wait()
    assert lines(journal) == [1, 2, 3, 4, 5], "in order"


def test_a_failed_write_is_raised(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gone")
    journal.write(step(1))
    with pytest.raises(FileNotFoundError):
        journal.wait()
    journal.write(step(2))
    with pytest.raises(FileNotFoundError):
        for number in range(3, 1000):  # a later write tells of an earlier one
            journal.write(step(number))
            threading.Event().wait(0.01)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, active=False)
    journal.resume(3)
    journal.write(step(4))
    journal.wait()
    assert list(tmp_path.iterdir()) == []


def test_resuming_waits_for_what_is_not_written_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going back to a checkpoint removes the entries after it, also those still under way."""
    journal, original = Journal(tmp_path), Path.open

    def slow(self: Path, *arguments: Any, **more: Any) -> Any:
        threading.Event().wait(0.2)
        return original(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", slow)
    journal.write(*map(step, range(1, 6)))
    journal.resume(3)
    journal.write(step(4))
    journal.wait()
    assert lines(journal) == [1, 2, 3, 4]
