"""The journal of an attempt: an entry is a line of metrics.jsonl and an event of TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from torch import Tensor

from modelchain.api.contracts import METRICS
from modelchain.io.files import write_atomic

# TensorBoard's tag for each field of a step's entry.
TAGS = {
    "loss": "loss/total",
    "taskLoss": "loss/task",
    "distillationLoss": "loss/distillation",
    "ratio": "loss/ratio",
    "learningRate": "learning_rate",
    "logitScale": "logit_scale",
    "samplesPerSecond": "samples_per_second",
    "tokenEfficiency": "text_token_efficiency",
}


class Unread(NamedTuple):
    """A step that is done, or queued on the device, and whose numbers the host has not read."""

    step: int  # steps done, this one included
    numbers: Tensor  # [5] on the device, as Step returns them
    tokens: tuple[int, int]  # of this rank's captions: without and with padding
    learning_rate: float


class StepNumbers(NamedTuple):
    """The numbers of one step, on the host. Losses are means over the global batch."""

    step: int
    loss: float
    task_loss: float
    distillation_loss: float
    skipped: bool  # the losses are then not finite, or not those of an update
    logit_scale: float
    tokens: tuple[int, int]
    learning_rate: float

    def entry(self, has_teacher: bool) -> dict[str, Any]:
        """The step's entry, without losses if it was skipped."""
        real, processed = self.tokens
        losses: dict[str, float | None] = {
            "loss": self.loss,
            "taskLoss": self.task_loss,
            "distillationLoss": self.distillation_loss,
            "ratio": None,
        }
        if has_teacher and self.task_loss:
            losses["ratio"] = self.distillation_loss / self.task_loss
        return {
            "event": "step",
            "step": self.step,
            **(dict.fromkeys(losses) if self.skipped else losses),
            "skipped": self.skipped,
            "learningRate": self.learning_rate,
            "logitScale": self.logit_scale,
            "tokens": real,
            "processedTokens": processed,
            "tokenEfficiency": real / processed,
        }


def read(steps: Sequence[Unread]) -> list[StepNumbers]:
    """The numbers of these steps, in one transfer. The host waits for the device here."""
    rows = torch.stack([step.numbers for step in steps]).cpu().double().tolist()
    return [
        StepNumbers(
            step=step.step,
            loss=loss,
            task_loss=task_loss,
            distillation_loss=distillation_loss,
            skipped=bool(skipped),
            logit_scale=logit_scale,
            tokens=step.tokens,
            learning_rate=step.learning_rate,
        )
        for step, (loss, task_loss, distillation_loss, skipped, logit_scale) in zip(
            steps, rows, strict=True
        )
    ]


class Journal:
    """Appends to an attempt's metrics.jsonl and event file. A thread does it, so that a slow volume
    does not hold up the training; `wait` returns when all entries have left the process.

    TensorBoard's own writers keep events in a queue until the process ends, but a trainer may be
    killed, and does not wait for threads at its end.
    """

    def __init__(self, attempt: Path, active: bool = True):
        self.active = active  # only on rank 0
        self.lines = attempt / METRICS
        self._thread = ThreadPoolExecutor(1, "journal")
        self._pending: deque[Future[None]] = deque()
        self.events = attempt / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"

    def resume(self, step: int) -> None:
        """Continue after `step`, or from the start if it is -1. Entries after that step are removed
        from metrics.jsonl, and TensorBoard hides them.
        """
        if not self.active:
            return
        self.wait()
        kept = []
        if self.lines.exists():
            kept = list(_until(self.lines, step))
            write_atomic(self.lines, b"".join(kept))
        start = SessionLog(status=SessionLog.START)
        # The start of a session hides the events of its own step too: write them again.
        again = [_scalars(json.loads(line)) for line in kept[-1:]]
        self._append_events(
            _event(file_version="brain.Event:2"),
            _event(step=max(step, 0), session_log=start),
            *again,
        )

    def write(self, *entries: Mapping[str, Any]) -> None:
        """Have the thread append these entries, each with at least `event` and `step`, in one write
        to each file. Raises OSError if an earlier write has failed.
        """
        if self.active:
            while self._pending and self._pending[0].done():
                self._pending.popleft().result()
            self._pending.append(self._thread.submit(self._append, entries))

    def wait(self) -> None:
        """Return when all entries are written; raises OSError if that failed."""
        while self._pending:
            self._pending[0].exception()  # a signal may end this wait; then the write is still ours
            self._pending.popleft().result()

    def _append(self, entries: Sequence[Mapping[str, Any]]) -> None:
        with self.lines.open("a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        self._append_events(*map(_scalars, entries))

    def _append_events(self, *events: bytes) -> None:
        with self.events.open("ab") as file:
            file.write(b"".join(events))


def _scalars(entry: Mapping[str, Any]) -> bytes:
    """The event with an entry's numbers; nothing if it has none that TensorBoard shows."""
    scalars = {tag: entry[name] for name, tag in TAGS.items() if entry.get(name) is not None}
    scalars |= {f"evaluation/{name}": value for name, value in entry.get("metrics", {}).items()}
    if not scalars:
        return b""
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    return _event(step=entry["step"], summary=Summary(value=values))


def _event(**fields: Any) -> bytes:
    # TFRecord: the length, its checksum, the data, its checksum.
    data = Event(wall_time=time.time(), **fields).SerializeToString()
    size = struct.pack("<Q", len(data))
    size_checksum = struct.pack("<I", masked_crc32c(size))
    data_checksum = struct.pack("<I", masked_crc32c(data))
    return size + size_checksum + data + data_checksum


def _until(path: Path, step: int) -> Iterator[bytes]:
    """The lines up to the entry of training step `step`. An evaluation after that step is left
    out, because it is run again; so is a line that a kill has cut off.
    """
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if entry["step"] < step or (entry["step"] == step and entry["event"] == "step"):
                yield line.rstrip() + b"\n"
