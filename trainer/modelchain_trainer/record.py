"""What rank 0 writes down of an attempt: a line of metrics.jsonl, and the same numbers for
TensorBoard.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from torch import Tensor

from modelchain.api.contracts import METRICS
from modelchain.io.files import write_atomic

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


class Done(NamedTuple):
    """A step that nobody has looked at yet."""

    step: int  # of the stage, this one counted
    # on the device: loss, task loss, distillation loss, whether it was skipped, logit scale
    numbers: Tensor
    tokens: tuple[int, int]  # of this rank's captions: real, and with padding
    learning_rate: float

    def record(self, numbers: list[float], successor: bool) -> dict[str, Any]:
        """Of a skipped step without losses: they are not finite, or not those of an update."""
        loss, task, pull, skipped, scale = numbers
        real, processed = self.tokens
        losses = {"loss": loss, "taskLoss": task, "distillationLoss": pull}
        losses["ratio"] = pull / task if successor and task else None
        return {
            "event": "step",
            "step": self.step,
            **(dict.fromkeys(losses) if skipped else losses),
            "skipped": bool(skipped),
            "learningRate": self.learning_rate,
            "logitScale": scale,
            "tokens": real,
            "processedTokens": processed,
            "tokenEfficiency": real / processed,
        }


class Recorder:
    """Appends to metrics.jsonl and an event file of an attempt; a record has left the process when
    it returns.

    TensorBoard's own writers queue events for a process's end, which a trainer does not wait for.
    """

    def __init__(self, attempt: Path, active: bool = True):
        self.active = active  # on rank 0
        self.lines = attempt / METRICS
        self.events = attempt / f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"

    def go_on(self, step: int) -> None:
        """From `step`, -1 for none: all else that was written goes from the file, and TensorBoard
        hides it.
        """
        if not self.active:
            return
        kept = []
        if self.lines.exists():
            kept = list(_until(self.lines, step))
            write_atomic(self.lines, b"".join(kept))
        self._event(file_version="brain.Event:2")
        self._event(step=max(step, 0), session_log=SessionLog(status=SessionLog.START))
        if kept:
            self._scalars(json.loads(kept[-1]))  # of `step`: hidden, too

    def write(self, **record: Any) -> None:
        if self.active:
            with self.lines.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self._scalars(record)

    def _scalars(self, record: Mapping[str, Any]) -> None:
        scalars = {tag: record[name] for name, tag in TAGS.items() if record.get(name) is not None}
        scalars |= {
            f"evaluation/{name}": value for name, value in record.get("metrics", {}).items()
        }
        if scalars:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            self._event(step=record["step"], summary=Summary(value=values))

    def _event(self, **fields: Any) -> None:
        data = Event(wall_time=time.time(), **fields).SerializeToString()
        size = struct.pack("<Q", len(data))
        sums = (struct.pack("<I", masked_crc32c(part)) for part in (size, data))
        with self.events.open("ab") as file:
            file.write(size + next(sums) + data + next(sums))


def _until(path: Path, step: int) -> Iterator[bytes]:
    """Lines up to the record of `step`: an evaluation after it comes again, and a line that was cut
    off is none.
    """
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if record["step"] < step or (record["step"] == step and record["event"] == "step"):
                yield line.rstrip() + b"\n"
