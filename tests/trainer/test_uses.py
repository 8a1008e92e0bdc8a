"""How a trainer says that it has used its time: each moment has one use, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from modelchain.api.uses import Resumed, Uses
from modelchain.io.stop import Preempted
from modelchain_trainer.train import Trainer
from modelchain_trainer.uses import Timekeeper


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.data(tmp_path_factory.mktemp("data") / "digits")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def started() -> tuple[Clock, Timekeeper]:
    clock = Clock()
    return clock, Timekeeper(now=clock, began=clock.now)


def test_a_training_from_start_to_end() -> None:
    clock, keeper = started()
    clock.now += 20
    with keeper.evaluation():  # before the first step: it belongs to the startup
        clock.now += 10
    assert keeper.uses == Uses(startup=30_000)
    clock.now += 1
    keeper.stepped()
    clock.now += 50
    keeper.stepped()
    assert keeper.uses == Uses(startup=31_000, unsaved=50_000)
    keeper.saves(2)
    clock.now += 5
    keeper.saved(2, 7)
    assert keeper.uses == Uses(startup=31_000, productive=50_000, unsaved=5_000)
    with keeper.evaluation():
        clock.now += 7
    keeper.ends()
    clock.now += 9
    keeper.saved(3, 3)
    assert keeper.uses == Uses(startup=31_000, productive=55_000, evaluating=16_000)


def test_work_that_is_gone_back_over_is_lost_and_its_macs_too() -> None:
    clock, keeper = started()
    for _ in range(10):
        clock.now += 1
        keeper.stepped()
    keeper.saves(10)
    for _ in range(3):
        clock.now += 2
        keeper.stepped()
    keeper.saved(10, 13)
    keeper.went_back()
    assert keeper.uses == Uses(startup=1_000, productive=9_000, lost=6_000)
    clock.now += 4
    keeper.stepped()
    written = keeper.written("family-a-a1", 100)
    assert (written.macs, written.saved_macs) == (1400, 1100)
    assert written.milliseconds == Uses(startup=1_000, productive=13_000, lost=6_000)
    assert keeper.uses.unsaved == 4_000, "asking what a checkpoint would say changes nothing"


def test_a_checkpoint_that_is_complete_only_after_going_back_keeps_nothing_twice() -> None:
    clock, keeper = started()
    keeper.stepped()
    clock.now += 5
    keeper.saves(1)
    keeper.went_back()
    keeper.saved(1, 0)
    assert keeper.uses == Uses(lost=5_000)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["step", "saves", "saved", "back", "evaluate", "keep"]),
        st.integers(0, 100_000),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(EVENTS, st.booleans())
def test_all_time_has_exactly_one_use(events: list[tuple[str, int]], ends: bool) -> None:
    clock, keeper = started()
    step, begun, complete, kept = 0, [0], 0, 0

    def evaluate(length: float) -> None:
        with keeper.evaluation():
            clock.now += length

    for what, length in [*events, *([("ends", 77)] if ends else [])]:
        if what == "evaluate":
            evaluate(length / 1000)
            continue
        clock.now += length / 1000
        step += what == "step"
        if what == "saves":
            begun.append(step)
        if what in ("saved", "keep"):
            complete = begun[-1] if what == "saved" else step
        if what == "back":
            step = complete
        do: dict[str, Callable[[], object]] = {
            "step": keeper.stepped,
            "saves": partial(keeper.saves, step),
            "saved": partial(keeper.saved, complete, step),
            "keep": partial(keeper.saved, step, step),
            "back": keeper.went_back,
            "ends": keeper.ends,
        }
        do[what]()
        assert keeper.uses.productive >= kept, "what is kept stays kept"
        kept = keeper.uses.productive
    clock.now += 1
    whole = round((clock.now - 1000) * 1000)
    assert abs(keeper.uses.total - whole) <= 4, "but for what is rounded"


def test_a_trainer_says_whose_work_it_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that an attempt leaves says what it had done, and the next trainer passes that
    on. Together they have kept exactly the steps of the stage.
    """
    monkeypatch.setenv("MODELCHAIN_POD_UID", "pod-of-the-first")
    tasks = [tiny.task(tiny.spec(), folder, tmp_path, attempt=attempt) for attempt in (1, 2)]
    trainers: list[Trainer] = []

    def stop(trainer: Trainer, done: int) -> None:
        trainers.append(trainer)
        tiny.stop_after(7)(trainer, done)

    with pytest.raises(Preempted):
        tiny.train(tasks[0], stop)
    told = trainers[0].reporter.last_word
    assert told["resumed"] == Resumed() and told["saved_macs"] == told["macs"] == 7000
    assert told["milliseconds"].unsaved == told["milliseconds"].lost == 0
    word, _ = tiny.train(tasks[1])
    assert word.resumed is not None
    assert (word.resumed.attempt, word.resumed.pod) == (tasks[0].attempt, "pod-of-the-first")
    assert (word.resumed.macs, word.resumed.saved_macs) == (7000, 7000)
    assert word.resumed.milliseconds.productive <= told["milliseconds"].productive
    assert word.resumed.milliseconds.startup == told["milliseconds"].startup
    assert word.saved_macs == word.macs == (tiny.STEPS - 7) * 1000
    assert word.milliseconds.lost == word.milliseconds.unsaved == 0
