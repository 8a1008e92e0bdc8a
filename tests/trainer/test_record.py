"""Records are appended by a thread: one write to each file for all steps of a look."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from modelchain_trainer.record import Recorder


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


def lines(recorder: Recorder) -> list[int]:
    return [json.loads(line)["step"] for line in recorder.lines.read_text().splitlines()]


def test_a_look_is_one_append_to_each_file(tmp_path: Path, opened: list[str]) -> None:
    recorder = Recorder(tmp_path)
    recorder.resume(-1)
    opened.clear()
    recorder.write(*map(step, range(1, 501)))
    recorder.wait()
    assert opened == ["metrics", "events"] and lines(recorder) == list(range(1, 501))
    recorder.write({"event": "evaluation", "step": 500, "metrics": {"top1": 50.0}}, step(501))
    recorder.wait()
    assert lines(recorder) == [*range(1, 501), 500, 501] and len(opened) == 4


def test_a_slow_volume_does_not_hold_up_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, ready, original = Recorder(tmp_path), threading.Event(), Path.open

    def slow(self: Path, *arguments: Any, **more: Any) -> Any:
        assert ready.wait(60)
        return original(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", slow)
    for number in range(1, 6):
        recorder.write(step(number))
    assert not recorder.lines.exists()
    ready.set()
    recorder.wait()
    assert lines(recorder) == [1, 2, 3, 4, 5], "in order"


def test_a_failed_write_is_raised(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "gone")
    recorder.write(step(1))
    with pytest.raises(FileNotFoundError):
        recorder.wait()
    recorder.write(step(2))
    with pytest.raises(FileNotFoundError):
        for number in range(3, 1000):  # a later write tells of an earlier one
            recorder.write(step(number))
            threading.Event().wait(0.01)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, active=False)
    recorder.resume(3)
    recorder.write(step(4))
    recorder.wait()
    assert list(tmp_path.iterdir()) == []


def test_resuming_waits_for_what_is_not_written_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going back to a checkpoint removes the records after it, also those still under way."""
    recorder, original = Recorder(tmp_path), Path.open

    def slow(self: Path, *arguments: Any, **more: Any) -> Any:
        threading.Event().wait(0.2)
        return original(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", slow)
    recorder.write(*map(step, range(1, 6)))
    recorder.resume(3)
    recorder.write(step(4))
    recorder.wait()
    assert lines(recorder) == [1, 2, 3, 4]
