"""A trainer's watchdog: a process of its own that kills a rank which makes no progress.

A rank that waits in a collective or for a disk may handle no signal and run no thread. The operator
may not be able to reach it. So each rank forks a watchdog before it loads anything, and reports its
steps through shared memory, which cannot block. A rank is killed if it exceeds one of these limits:

- The first step must be done within `startSeconds` of the trainer's start, which is the operator's
  limit, too. Reading the data and the evaluation before the first step are included.
- After that, a step or a batch of an evaluation must follow within `stallSeconds`.
- After the last step, each batch of the last evaluation, and then the artifact, must follow within
  `stallSeconds` or `startSeconds`, whichever is longer.
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
from typing import Any, NamedTuple

from modelchain.api.contracts import FailureClass, LastWord, Task
from modelchain.api.uses import Uses
from modelchain.io.guard import die_with_parent
from modelchain.io.lastword import write_last_word

# About when this process began: a trainer imports this module before it loads anything large.
BEGAN = time.monotonic()
POLL_SECONDS = 0.5
# At most this much of the time between two polls counts. A longer time means that the machine
# slept, and the rank with it.
MOST_BETWEEN_POLLS = 5.0
# The rank gets this long to write its stack traces.
TRACE_SECONDS = 1.0
# The ranks of other nodes wait for this one, so their limits pass at the same time. Their watchdogs
# get this long to write their last words, before the end of this rank ends theirs.
PEER_SECONDS = 2.0
# Writing the last word is given up after this time, since its file may be on the disk that hangs.
WRITE_SECONDS = 10.0


class Phase(IntEnum):
    """Which limit holds: before the first step, until the last step, after it."""

    STARTING, STEPPING, STEPPED = range(3)


# The places of the numbers in `_shared`; the last ones are for the fields of `Uses`.
_STEP, _CHECKPOINT_STEP, _MACS, _SAVED_MACS, _BEATS, _PHASE, _USES = range(7)
_NUMBERS = _USES + len(Uses.model_fields)
# `start` replaces this by shared memory.
_shared = memoryview(bytearray(8 * _NUMBERS)).cast("d")


def beat(phase: Phase | None = None) -> None:
    """Report a finished step or batch of an evaluation, and the new `phase`, if one begins."""
    if phase is not None:
        _shared[_PHASE] = phase
    _shared[_BEATS] += 1


def tell(report: Mapping[str, Any]) -> None:
    """Report what the watchdog's last word would need: steps, MACs and the uses of time."""
    _shared[_STEP], _shared[_CHECKPOINT_STEP] = report["step"], report["checkpoint_step"] or 0
    _shared[_MACS], _shared[_SAVED_MACS] = report["macs"], report["saved_macs"]
    for place, (_, time_used) in enumerate(report["milliseconds"], _USES):
        _shared[place] = time_used


def start(task: Task) -> None:
    """Start a watchdog for this process. Call this before there are threads, since it forks."""
    global _shared
    _shared = memoryview(mmap.mmap(-1, _shared.nbytes)).cast("d")
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)
    rank = os.getpid()
    if os.fork():
        return
    try:
        # torchrun sends its signals to all processes of a rank. The watchdog must survive them.
        for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(sig, signal.SIG_IGN)
        die_with_parent(signal.SIGKILL, rank)
        began = time.monotonic()
        overdue = _overdue(task.start_seconds, task.stall_seconds)
        _end(rank, task, overdue, time.monotonic() - began)
    finally:
        os._exit(0)


class Overdue(NamedTuple):
    """A limit that has passed: how the attempt fails, a message, and the seconds it stood still."""

    failure: FailureClass
    message: str
    idle: float


def _overdue(start: float, stall: float) -> Overdue:
    """Wait until a limit has passed."""
    limits = {Phase.STARTING: start, Phase.STEPPING: stall, Phase.STEPPED: max(start, stall)}
    beats = 0.0
    idle = 0.0
    before = time.monotonic()
    while True:
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        idle, before = idle + min(now - before, MOST_BETWEEN_POLLS), now
        phase = Phase(int(_shared[_PHASE]))
        if phase is not Phase.STARTING and _shared[_BEATS] != beats:
            beats, idle = _shared[_BEATS], 0.0
        if idle < limits[phase]:
            continue
        if phase is Phase.STARTING:
            message = f"no first step within {start} s of the trainer's start"
            return Overdue(FailureClass.START_DEADLINE, message, idle)
        what = "no new step" if phase is Phase.STEPPING else "no progress after the last step"
        return Overdue(FailureClass.STALL_DEADLINE, f"{what} for {limits[phase]} s", idle)


def _uses(overdue: Overdue) -> Uses:
    """How the rank has used its time: as it told, and then it stood still."""
    told = Uses(**{name: int(_shared[n]) for n, name in enumerate(Uses.model_fields, _USES)})
    idle = round(1000 * overdue.idle)
    if overdue.failure is FailureClass.START_DEADLINE:
        return Uses(startup=max(told.startup, idle))
    # The other ranks tell nothing, since only rank 0 knows what is kept.
    return told.model_copy(update={"stalled": idle}) if told.total else told


def _end(rank: int, task: Task, overdue: Overdue, seconds: float) -> None:
    """Write the last word, make the rank write its stack traces, and kill it."""
    failure, message, _ = overdue
    gpus = int(os.environ.get("WORLD_SIZE", "1")) if task.device == "cuda" else 0
    word = LastWord(
        result="Failed",
        failure=failure,
        message=f"{message}; the stack traces are in the log",
        step=int(_shared[_STEP]),
        checkpoint_step=int(_shared[_CHECKPOINT_STEP]) or None,
        macs=int(_shared[_MACS]),
        saved_macs=int(_shared[_SAVED_MACS]),
        milliseconds=_uses(overdue),
        seconds=round(seconds, 3),
        gpu_seconds=round(seconds * gpus, 3),
    )
    writer = threading.Thread(
        target=write_last_word, args=(Path(task.last_word), word), daemon=True
    )
    writer.start()
    writer.join(WRITE_SECONDS)
    print(f"{failure}: {message}; killing this rank", file=sys.stderr, flush=True)
    os.kill(rank, signal.SIGUSR1)  # `faulthandler` answers even if the interpreter is blocked
    os.kill(rank, signal.SIGCONT)  # a stopped process would not answer
    time.sleep(TRACE_SECONDS)
    os.kill(rank, signal.SIGSTOP)  # the rank must not go on training after its last word
    time.sleep(PEER_SECONDS)
    os.kill(rank, signal.SIGKILL)
