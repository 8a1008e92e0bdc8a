"""What Prometheus is told of one attempt: numbers that are at hand whenever a line is logged; no device is asked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from modelchain.contracts import LiveProgress, Task

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
        about = {"chain": task.chain, "stage": task.stage, "model": task.model, "attempt": task.attempt}
        about |= {name: str(self.environment[name]) for name in ("torch", "device", "ranks")}
        samples = live.macs // task.macs_per_step * task.inputs["globalBatchSize"]
        yield _gauge("info", "1; what is trained, and on what", 1, about)
        yield _gauge("step", "Steps done of the stage, with those before a resume", live.step)
        yield _gauge("planned_steps", "Steps of the stage", live.steps)
        yield _counter("macs_total", "Multiply-accumulates spent by this attempt", live.macs)
        yield _gauge("planned_macs", "Multiply-accumulates of all steps of the stage", live.steps * task.macs_per_step)
        yield _counter("samples_total", "Samples this attempt was trained on", samples)
        yield _gauge("samples_per_second", "Samples a second since the line logged before", live.samples_per_second)
        about_loss = "Loss of the last logged step; the sum of its components is trained on"
        loss = GaugeMetricFamily("modelchain_trainer_loss", about_loss, labels=["component"])
        pull = last.get("distillationLoss") if last.get("ratio") is not None else None
        for component, value in (("task", last.get("taskLoss")), ("distillation", pull)):
            if value is not None:
                loss.add_metric([component], value)
        yield loss
        yield _gauge(
            "distillation_ratio", "r: the distillation loss over the task loss, of a successor", last.get("ratio")
        )
        yield _counter("data_wait_seconds_total", "Time the training loop has waited for batches", self.data_wait)
        about_tokens = "Share of the text tokens of rank 0's last logged step that are no padding"
        yield _gauge("text_token_efficiency", about_tokens, last.get("tokenEfficiency"))
        yield _counter("skipped_batches_total", "Batches whose loss or gradients were not finite", self.skipped)
        yield _gauge("checkpoint_step", "Step of the newest checkpoint, 0 before the first", live.checkpoint_step)
        saved = (self.saver.saved_at if self.saver else 0.0) or None
        yield _gauge("last_checkpoint_timestamp_seconds", "When this attempt last saved a checkpoint", saved)
        about_seconds = "What the last checkpoint took: of the loop (stall), and then in its thread (write)"
        seconds = GaugeMetricFamily("modelchain_trainer_checkpoint_seconds", about_seconds, labels=["phase"])
        for phase, value in (self.saver.seconds if self.saver else {}).items():
            seconds.add_metric([phase], value)
        yield seconds
        yield _gauge("replaced_pictures", "Undecodable pictures rank 0 has met, replaced by others", self.replaced)


def _gauge(name: str, text: str, value: float | None, labels: Mapping[str, str] | None = None) -> Metric:
    """Without a sample while its value is not known."""
    labels = labels or {}
    family = GaugeMetricFamily(f"modelchain_trainer_{name}", text, labels=list(labels))
    if value is not None:
        family.add_metric(list(labels.values()), value)
    return family


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"modelchain_trainer_{name}", text, value=value)
