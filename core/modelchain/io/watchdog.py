"""A trainer's watchdog: a process of its own that kills a rank which makes no progress, whatever
blocks it.

A rank in a collective that never returns, or on a disk that never answers, handles no signal and
runs no thread; and the operator may not reach it. So each rank forks this before it loads anything,
and reports its steps through shared memory, which cannot block. What counts as progress:

- before the first step of an attempt nothing but that step: reading the data and the evaluation
  before it must fit in `startSeconds` from the trainer's start, as they must for the operator;
- then a step, or a batch of an evaluation, every `stallSeconds`;
- after the last step the last evaluation's batches, and the artifact, which may take `startSeconds`
if that is longer.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from modelchain.api.contracts import FailureClass, LastWord, Task
from modelchain.io.guard import die_with_parent
from modelchain.io.lastword import write_last_word

POLL_SECONDS = 0.5
HELD_UP_SECONDS = (
    5.0  # a machine that sleeps stops the watchdog, too: of a longer gap only this much counts
)
TRACE_SECONDS = 1.0  # for the stack traces
# for the watchdogs of other nodes, whose ranks wait for this one: their last words say the same
PEER_SECONDS = 2.0
WRITE_SECONDS = 10.0  # the disk that the rank hangs on may be the last word's


class Phase(IntEnum):
    STARTING, STEPPING, STEPPED = range(3)


_STEP, _CHECKPOINT_STEP, _MACS, _BEATS, _PHASE = range(5)
_shared = memoryview(bytearray(8 * 5)).cast(
    "d"
)  # nobody reads this one; `start` replaces it by shared memory


def beat(phase: Phase | None = None) -> None:
    """A step is done, or a batch of an evaluation; `phase` if another one begins."""
    if phase is not None:
        _shared[_PHASE] = phase
    _shared[_BEATS] += 1


def tell(report: Mapping[str, Any]) -> None:
    """What the last word is to say if the rank cannot write it: its step, checkpoint_step and
    macs.
    """
    _shared[_STEP], _shared[_MACS] = report["step"], report["macs"]
    _shared[_CHECKPOINT_STEP] = report["checkpoint_step"] or 0


def start(task: Task) -> None:
    """Have this process watched from now on. Only before it has threads: it forks."""
    global _shared
    _shared = memoryview(mmap.mmap(-1, _shared.nbytes)).cast("d")
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    rank = os.getpid()
    if os.fork():
        return
    try:
        for sig in (
            signal.SIGTERM,
            signal.SIGINT,
            signal.SIGHUP,
        ):  # torchrun's, to all processes of a rank
            signal.signal(sig, signal.SIG_IGN)
        die_with_parent(signal.SIGKILL, rank)
        began = time.monotonic()
        failure, message = _overdue(task.start_seconds, task.stall_seconds)
        _end(rank, task, failure, message, time.monotonic() - began)
    finally:
        os._exit(0)


def _overdue(start: float, stall: float) -> tuple[FailureClass, str]:
    """Returns when a limit has passed: the class, and a sentence."""
    limits = {Phase.STARTING: start, Phase.STEPPING: stall, Phase.STEPPED: max(start, stall)}
    beats, idle, before = 0.0, 0.0, time.monotonic()
    while True:
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        idle, before = idle + min(now - before, HELD_UP_SECONDS), now
        phase = Phase(int(_shared[_PHASE]))
        if phase is not Phase.STARTING and _shared[_BEATS] != beats:
            beats, idle = _shared[_BEATS], 0.0
        if idle < limits[phase]:
            continue
        if phase is Phase.STARTING:
            return (
                FailureClass.START_DEADLINE,
                f"no first step within {start} s of the trainer's start",
            )
        what = "no new step" if phase is Phase.STEPPING else "all steps are done, and then nothing"
        return FailureClass.STALL_DEADLINE, f"{what} for {limits[phase]} s"


def _end(rank: int, task: Task, failure: FailureClass, message: str, seconds: float) -> None:
    """Write the last word, have the rank write its stack traces, and kill it."""
    gpus = int(os.environ.get("WORLD_SIZE", "1")) if task.device == "cuda" else 0
    word = LastWord(
        result="Failed",
        failure=failure,
        message=f"{message}; the stack traces are in the log",
        step=int(_shared[_STEP]),
        checkpoint_step=int(_shared[_CHECKPOINT_STEP]) or None,
        macs=int(_shared[_MACS]),
        seconds=round(seconds, 3),
        gpu_seconds=round(seconds * gpus, 3),
    )
    writer = threading.Thread(
        target=write_last_word, args=(Path(task.last_word), word), daemon=True
    )
    writer.start()
    writer.join(WRITE_SECONDS)
    print(f"{failure}: {message}; this process is ended", file=sys.stderr, flush=True)
    os.kill(rank, signal.SIGUSR1)  # `faulthandler` answers whatever holds the interpreter
    os.kill(rank, signal.SIGCONT)  # a stopped one answers nothing
    time.sleep(TRACE_SECONDS)
    os.kill(rank, signal.SIGSTOP)  # it must not go on after all, against what has been told
    time.sleep(PEER_SECONDS)
    os.kill(rank, signal.SIGKILL)
