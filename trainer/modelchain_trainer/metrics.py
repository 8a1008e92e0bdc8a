"""What Prometheus is told of one attempt: numbers that are at hand whenever a line is logged; no
device is asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from modelchain.api.contracts import LiveProgress, Task

if TYPE_CHECKING:  # this much can be imported without torch
    from modelchain_data.batches import Batch
    from modelchain_trainer.checkpoint import Checkpointer


@dataclass(eq=False)  # a collector is found by its identity
class Meter(Collector):
    """What rank 0 knows of its attempt, as last logged; `live` is what the operator is told."""

    task: Task
    environment: Mapping[str, str | int]
    live: LiveProgress = field(init=False)
    last: Mapping[str, Any] = field(default_factory=dict)  # the record of the last logged step
    replaced: int = 0
    skipped: int = 0  # batches
    data_wait: float = 0.0  # seconds
    saver: Checkpointer | None = None  # from the first step on

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; how long each was waited for is added up."""
        start = time.monotonic()
        for batch in batches:
            self.data_wait += time.monotonic() - start
            yield batch
            start = time.monotonic()

    def collect(self) -> Iterator[Metric]:
        task, live, last = self.task, self.live, self.last
        about = {
            "chain": task.chain,
            "stage": task.stage,
            "model": task.model,
            "attempt": task.attempt,
        }
        about |= {name: str(self.environment[name]) for name in ("torch", "device", "ranks")}
        samples = live.macs // task.macs_per_step * task.inputs["globalBatchSize"]
        yield _gauge("info", "1; what is trained, and on what", {tuple(about.values()): 1}, *about)
        yield _gauge("step", "Steps done of the stage, with those before a resume", live.step)
        yield _gauge("planned_steps", "Steps of the stage", live.steps)
        yield _counter("macs_total", "Multiply-accumulates spent by this attempt", live.macs)
        yield _gauge(
            "planned_macs",
            "Multiply-accumulates of all steps of the stage",
            live.steps * task.macs_per_step,
        )
        yield _counter("samples_total", "Samples this attempt was trained on", samples)
        yield _gauge(
            "samples_per_second",
            "Samples a second since the line logged before",
            live.samples_per_second,
        )
        ratio, losses = last.get("ratio"), {("task",): last.get("taskLoss")}
        if ratio is not None:
            losses["distillation",] = last.get("distillationLoss")
        about_loss = "Loss of the last logged step; the sum of its components is trained on"
        yield _gauge("loss", about_loss, losses, "component")
        yield _gauge(
            "distillation_ratio",
            "r: the distillation loss over the task loss, of a successor",
            ratio,
        )
        yield _counter(
            "data_wait_seconds_total",
            "Time the training loop has waited for batches",
            self.data_wait,
        )
        about_tokens = "Share of the text tokens of rank 0's last logged step that are no padding"
        yield _gauge("text_token_efficiency", about_tokens, last.get("tokenEfficiency"))
        yield _counter(
            "skipped_batches_total", "Batches whose loss or gradients were not finite", self.skipped
        )
        yield _gauge(
            "checkpoint_step",
            "Step of the newest checkpoint, 0 before the first",
            live.checkpoint_step,
        )
        saved, seconds = (
            (self.saver.saved_at or None, self.saver.seconds) if self.saver else (None, {})
        )
        yield _gauge(
            "last_checkpoint_timestamp_seconds", "When this attempt last saved a checkpoint", saved
        )
        about_seconds = (
            "What the last checkpoint took: of the loop (stall), and then in its thread (write)"
        )
        yield _gauge(
            "checkpoint_seconds",
            about_seconds,
            {(phase,): took for phase, took in seconds.items()},
            "phase",
        )
        yield _gauge(
            "replaced_pictures",
            "Undecodable pictures rank 0 has met, replaced by others",
            self.replaced,
        )


Values = Mapping[tuple[str, ...], float | None]


def _gauge(name: str, text: str, value: float | Values | None, *labels: str) -> Metric:
    """A number, or with labels a number for each of their values; without a sample while it is not
    known.
    """
    family = GaugeMetricFamily(f"modelchain_trainer_{name}", text, labels=labels)
    for of, number in (value if isinstance(value, Mapping) else {(): value}).items():
        if number is not None:
            family.add_metric(of, number)
    return family


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"modelchain_trainer_{name}", text, value=value)
