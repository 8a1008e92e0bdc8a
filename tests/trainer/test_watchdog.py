"""watchdog.py: a trainer that hangs, in whatever way, is ended from inside with the right failure
class; one that works is left alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import tiny
from tiny import STEPS

from modelchain.api.contracts import FailureClass, LastWord, Task
from modelchain.io import watchdog

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
STALL = 8  # seconds; a busy machine may hold up a step for some of them

# A trainer whose code is changed after it has loaded, and so after its watchdog has started.
TRAINER = """
import ctypes, os, sys, time
from modelchain_trainer import __main__ as entry
train = entry._train

def changed(*arguments):
    from modelchain_trainer.evaluate import Evaluator
    from modelchain_trainer.step import Step
    step, unit, seen = Step.__call__, Evaluator._unit, []

    def hang():  # inside C code: no signal is handled, and the interpreter stays locked
        c, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
        c.pthread_mutex_lock(mutex), c.pthread_mutex_lock(mutex)

{change}
    return train(*arguments)

entry._train = changed
code = entry.main(sys.argv[1:])
os._exit(code)
"""
HANG_AT = """
    def slow(self, batch):
        if batch.step == {step} and os.environ.get("RANK", "0") == "{rank}":
            time.sleep(4)  # so that the steps before have been logged, on a busy machine, too
            hang()
        time.sleep(0.3)
        return step(self, batch)
    Step.__call__ = slow
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.data(tmp_path_factory.mktemp("data") / "digits")


def prepare(task: Task, work: Path, change: str = "", **limits: int) -> list[str]:
    """Write down a trainer with these limits, and its task. Returns what Python is told to run."""
    work.mkdir(exist_ok=True)
    task = task.model_copy(
        update={"last_word": str(work / "word"), "checkpoint_seconds": 0, **limits}
    )
    (work / "task.json").write_text(task.model_dump_json(by_alias=True))
    (work / "trainer.py").write_text(TRAINER.replace("{change}", change))
    return [str(work / "trainer.py"), str(work / "task.json")]


def begin(task: Task, work: Path, change: str = "", **limits: int) -> forked.Program:
    """Start a trainer with these limits. Its output goes to `work/log`."""
    program, file = prepare(task, work, change, **limits)
    return forked.Program([program], [file], work / "log", ENVIRONMENT)


def begin_two_ranks(task: Task, work: Path, change: str, **limits: int) -> subprocess.Popen[str]:
    """The same under torchrun, as in a pod."""
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    ranks = ["--max-restarts=0", "--nproc-per-node=2", *prepare(task, work, change, **limits)]
    command = [sys.executable, "-m", *torchrun, *ranks]
    with (work / "log").open("w") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | ENVIRONMENT, text=True
        )


def word_of(work: Path) -> LastWord:
    return LastWord.model_validate_json((work / "word").read_bytes())


def trained(folder: Path, root: Path, attempt: int = 1) -> Task:
    return tiny.task(tiny.spec(evaluation=False), folder, root, attempt=attempt)


def of_a_task(work: Path) -> list[int]:
    """Processes that write to this task's log: ranks, watchdogs, torchrun."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "fd" / "1").readlink() == work / "log":
                found.append(int(process.name))
        except OSError:
            continue
    return found


def gone(work: Path) -> bool:
    end = time.monotonic() + 30
    while of_a_task(work) and time.monotonic() < end:
        time.sleep(0.1)
    return not of_a_task(work)


def until_step(task: Task, step: int) -> None:
    metrics = Path(task.root) / task.input_digest / task.owner / "metrics.jsonl"
    end = time.monotonic() + 250
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_step_that_hangs_inside_c_code_is_ended_and_the_next_attempt_resumes(
    folder: Path, tmp_path: Path
) -> None:
    task = trained(folder, tmp_path / "root")
    began = time.monotonic()
    process = begin(task, tmp_path / "a", HANG_AT.format(step=6, rank=0), stall_seconds=STALL)
    assert process.wait(180) == -signal.SIGKILL
    wall = time.monotonic() - began
    word, log = word_of(tmp_path / "a"), (tmp_path / "a" / "log").read_text()
    assert (word.failure, word.node, word.fault) == (FailureClass.STALL_DEADLINE, None, "")
    assert f"no new step for {STALL} s" in word.message and word.step == 6 and word.macs == 6000
    assert 1 <= (word.checkpoint_step or 0) <= 6 and word.seconds > STALL
    told = word.milliseconds
    assert STALL * 1000 <= told.stalled < word.seconds * 1000 and told.startup > 0
    assert told.total <= 1000 * wall and told.total - told.startup <= 1000 * word.seconds + 100
    assert "most recent call first" in log and "in hang" in log and "StallDeadline" in log, (
        "stack traces"
    )
    assert gone(tmp_path / "a")
    again = trained(folder, tmp_path / "root", attempt=2)
    assert begin(again, tmp_path / "b", stall_seconds=STALL).wait(180) == 0
    assert (
        word_of(tmp_path / "b").result == "Succeeded"
        and "resumes from step" in (tmp_path / "b/log").read_text()
    )


def test_no_first_step_in_time(folder: Path, tmp_path: Path) -> None:
    task = trained(folder, tmp_path / "root")
    process = begin(
        task, tmp_path / "a", HANG_AT.format(step=0, rank=0), start_seconds=40, stall_seconds=1
    )
    assert process.wait(120) == -signal.SIGKILL
    word = word_of(tmp_path / "a")
    assert (
        word.failure is FailureClass.START_DEADLINE and "no first step within 40 s" in word.message
    )
    assert (word.step, word.checkpoint_step) == (0, None) and word.failure.disruption
    assert "in hang" in (tmp_path / "a" / "log").read_text()


def test_when_one_of_two_ranks_stops_both_are_ended_and_no_process_is_left(
    folder: Path, tmp_path: Path
) -> None:
    """As in a pod: one file for the last word, and torchrun, which ends after its ranks."""
    task = trained(folder, tmp_path / "root")
    slow = HANG_AT.format(step=-1, rank=0)
    process = begin_two_ranks(task, tmp_path / "a", slow, stall_seconds=STALL)
    until_step(task, 3)
    ranks = [
        pid
        for pid in of_a_task(tmp_path / "a")
        if "RANK=1" in environ(pid) and is_child_of(pid, process.pid)
    ]
    assert len(ranks) == 1
    os.kill(ranks[0], signal.SIGSTOP)
    assert process.wait(180) == 1
    word, log = word_of(tmp_path / "a"), (tmp_path / "a" / "log").read_text()
    assert word.failure is FailureClass.STALL_DEADLINE and 3 <= word.step < STEPS
    assert "StallDeadline:" in log and " in _loop\n" in log, (
        "the stack traces of at least one rank: torchrun may have ended the other one first"
    )
    assert gone(tmp_path / "a")


def environ(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")


def is_child_of(pid: int, parent: int) -> bool:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) == parent


def test_an_evaluation_may_take_longer_than_the_limit_but_a_hang_in_it_is_ended(
    folder: Path, tmp_path: Path
) -> None:
    """Each batch of an evaluation counts as progress, between steps and after the last one. Each
    takes less than the limit.
    """
    slow = """
    def slow(self, *arguments):
        time.sleep(3)
        seen.append(1)
        if len(seen) == {hang}:
            hang()
        return unit(self, *arguments)
    Evaluator._unit = slow
"""
    task = tiny.task(tiny.spec(epochs=2), folder, tmp_path / "root")
    task = tiny.evaluated_every(task, epochs=1)
    sound = begin(
        task, tmp_path / "a", slow.replace("{hang}", "-1"), stall_seconds=STALL, start_seconds=300
    )
    assert sound.wait(240) == 0, (tmp_path / "a" / "log").read_text()
    assert word_of(tmp_path / "a").result == "Succeeded" and gone(tmp_path / "a")
    # An evaluation has four batches: pictures and texts of two evaluations. The first evaluation
    # runs before step 1, so this is the second batch of the next one.
    hang = str(4 + 2)
    again = task.model_copy(update={"root": str(tmp_path / "other")})
    hung = begin(
        again, tmp_path / "b", slow.replace("{hang}", hang), stall_seconds=STALL, start_seconds=300
    )
    assert hung.wait(240) == -signal.SIGKILL
    word = word_of(tmp_path / "b")
    assert word.failure is FailureClass.STALL_DEADLINE and 1 <= word.step <= tiny.STEPS_PER_EPOCH


def test_a_failure_and_a_stop_end_the_watchdog_too(folder: Path, tmp_path: Path) -> None:
    task = trained(folder, tmp_path / "root")
    process = begin(task, tmp_path / "a", HANG_AT.format(step=-1, rank=0))
    until_step(task, 2)
    assert len(of_a_task(tmp_path / "a")) == 2, "a rank and its watchdog"
    for pid in of_a_task(tmp_path / "a"):
        os.kill(pid, signal.SIGTERM)  # torchrun sends it to a rank's whole process group
    assert process.wait(60) == 75 and word_of(tmp_path / "a").failure == "Preempted"
    assert gone(tmp_path / "a")
    process = begin(
        trained(folder, tmp_path / "root", attempt=2),
        tmp_path / "b",
        HANG_AT.format(step=-1, rank=0),
    )
    while len(of_a_task(tmp_path / "b")) < 2:
        time.sleep(0.05)
    process.kill()
    assert gone(tmp_path / "b"), "the watchdog does not outlive its rank"


# The rule itself, with a simulated clock.


class Clock:
    """Stands in for time.monotonic and time.sleep; `events` says what happens at which second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, events: dict[float, object]):
        self.now, self.events = 0.0, events
        monkeypatch.setattr(watchdog, "_shared", memoryview(bytearray(8 * 16)).cast("d"))
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(watchdog.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 10_000
        for at in [at for at in self.events if at <= self.now]:
            event = self.events.pop(at)
            if isinstance(event, float):
                self.now += event  # the machine was suspended
            else:
                watchdog.beat(event)  # type: ignore[arg-type]


STEP, DONE = watchdog.Phase.STEPPING, watchdog.Phase.STEPPED


@pytest.mark.parametrize(
    ("events", "failure", "at"),
    [
        ({}, "StartDeadline", 100),
        (
            {float(t): None for t in range(0, 300, 5)},
            "StartDeadline",
            100,
        ),  # before the first step nothing but a step counts
        ({50.0: STEP}, "StallDeadline", 70),
        ({50.0: STEP, 65.0: STEP, 80.0: None}, "StallDeadline", 100),  # an evaluation's batch
        (
            {50.0: STEP, 60.0: DONE, 150.0: None},
            "StallDeadline",
            250,
        ),  # an artifact may take longer
        ({50.0: DONE}, "StallDeadline", 150),  # it resumed after the last step
        (
            {50.0: STEP, 55.0: 3600.0},
            "StallDeadline",
            3665,
        ),  # the time of a suspended laptop does not count
    ],
)
def test_what_counts(
    monkeypatch: pytest.MonkeyPatch, events: dict[float, object], failure: str, at: float
) -> None:
    clock = Clock(monkeypatch, dict(events))
    assert watchdog._overdue(100, 20)[0] == failure and abs(clock.now - at) <= 2
