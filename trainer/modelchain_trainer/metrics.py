"""The metrics of one attempt, as Prometheus reads them. All numbers are on the host already: to
serve them asks no device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from modelchain.api.contracts import LiveProgress, Task
from modelchain_trainer.activities import Activities
from modelchain_trainer.peaks import peak_of

if TYPE_CHECKING:  # so that this module can be imported without torch
    from modelchain_data.batches import Batch
    from modelchain_trainer.checkpoint import Checkpointer


@dataclass(eq=False)  # a registry finds a collector by its identity
class Meter(Collector):
    """What rank 0 knows of its attempt since it last read the losses; `live` is what the operator
    polls.
    """

    task: Task
    environment: Mapping[str, str | int]
    live: LiveProgress = field(init=False)
    last: Mapping[str, Any] = field(default_factory=dict)  # the journal's entry of the last step
    samples: int = 0  # trained on by this attempt, over all ranks
    replaced: int = 0  # pictures
    skipped: int = 0  # batches
    data_wait: float = 0.0  # seconds
    activities: Activities = field(default_factory=Activities)
    saver: Checkpointer | None = None  # None before the stage is built

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; adds up how long the loop waits for them."""
        while True:
            start = self.activities.now()
            with self.activities.during("data"):
                batch = next(batches, None)
            if batch is None:
                return
            self.data_wait += self.activities.now() - start
            yield batch

    def collect(self) -> Iterator[Metric]:
        yield self._about()
        yield from self._progress()
        yield from self._losses()
        yield from self._batches()
        yield from self._checkpoints()
        yield from self._use_of_the_device()

    def _about(self) -> Metric:
        labels = {
            "model": self.task.model,
            "attempt": self.task.attempt,
            "torch": str(self.environment["torch"]),
            "device": str(self.environment["device"]),
            "ranks": str(self.environment["ranks"]),
        }
        always_one = {tuple(labels.values()): 1}
        return _gauge("info", "1; what is trained, and on what", always_one, *labels)

    def _progress(self) -> Iterator[Metric]:
        live = self.live
        yield _gauge("step", "Steps done of the stage, with those before a resume", live.step)
        yield _gauge("planned_steps", "Steps of the stage", live.steps)
        yield _counter("macs_total", "Multiply-accumulates spent by this attempt", live.macs)
        yield _gauge(
            "planned_macs",
            "Multiply-accumulates of all steps of the stage",
            live.steps * self.task.macs_per_step,
        )
        yield _counter("samples_total", "Samples this attempt was trained on", self.samples)
        yield _gauge(
            "samples_per_second",
            "Samples a second between the last two logged lines",
            live.samples_per_second,
        )

    def _losses(self) -> Iterator[Metric]:
        ratio = self.last.get("ratio")
        losses: dict[tuple[str, ...], float | None] = {("task",): self.last.get("taskLoss")}
        if ratio is not None:  # there is a teacher
            losses["distillation",] = self.last.get("distillationLoss")
        yield _gauge(
            "loss",
            "Loss of the last logged step; the sum of its components is trained on",
            losses,
            "component",
        )
        yield _gauge(
            "distillation_ratio",
            "r: the distillation loss over the task loss, of a successor",
            ratio,
        )

    def _batches(self) -> Iterator[Metric]:
        yield _counter(
            "data_wait_seconds_total",
            "Time the training loop has waited for batches",
            self.data_wait,
        )
        yield _gauge(
            "text_token_efficiency",
            "Fraction of the text tokens of rank 0's last logged step that are not padding",
            self.last.get("tokenEfficiency"),
        )
        yield _counter(
            "skipped_batches_total", "Batches whose loss or gradients were not finite", self.skipped
        )
        yield _counter(
            "replaced_pictures_total",
            "Undecodable pictures rank 0 has met, replaced by others",
            self.replaced,
        )

    def _checkpoints(self) -> Iterator[Metric]:
        saver = self.saver
        yield _gauge(
            "checkpoint_step",
            "Step of the newest checkpoint, 0 before the first",
            self.live.checkpoint_step,
        )
        yield _gauge(
            "last_checkpoint_timestamp_seconds",
            "When this attempt last saved a checkpoint",
            (saver.saved_at or None) if saver else None,
        )
        yield _gauge(
            "last_checkpoint_duration_seconds",
            "Time of the last checkpoint: the loop waited (stall), then a thread wrote (write)",
            {(phase,): took for phase, took in saver.seconds.items()} if saver else {},
            "phase",
        )

    def _use_of_the_device(self) -> Iterator[Metric]:
        device, ranks = str(self.environment["device"]), int(self.environment["ranks"])
        peak = peak_of(device)
        whole = None if peak is None else peak * ranks
        yield _gauge(
            "peak_flops_per_second",
            "Peak of all ranks' devices together, of dense matrices in bf16; absent if not known",
            whole,
        )
        yield _gauge(
            "mfu_ratio",
            "Model FLOPs utilization: two FLOPs for each multiply-accumulate of the last logged"
            " steps, over the peak; absent if that is not known",
            self._mfu(whole),
        )
        times = self.activities.seconds
        yield _counters(
            "seconds_total",
            "Time since the process began, by what rank 0 did; startup is all until the first step",
            {(activity,): seconds for activity, seconds in times.items()},
            "activity",
        )

    def _mfu(self, peak: float | None) -> float | None:
        rate = self.live.samples_per_second
        if peak is None or not rate:
            return None
        macs = self.task.macs_per_step / int(self.task.inputs["globalBatchSize"]) * rate
        return 2 * macs / peak


Values = Mapping[tuple[str, ...], float | None]  # by the values of the labels


def _gauge(name: str, text: str, value: float | Values | None, *labels: str) -> Metric:
    """One number, or with labels one for each of their values. None, a number that is not known
    yet, has no sample.
    """
    family = GaugeMetricFamily(f"modelchain_trainer_{name}", text, labels=labels)
    values = value if isinstance(value, Mapping) else {(): value}
    for label_values, number in values.items():
        if number is not None:
            family.add_metric(label_values, number)
    return family


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"modelchain_trainer_{name}", text, value=value)


def _counters(name: str, text: str, values: Mapping[tuple[str, ...], float], label: str) -> Metric:
    family = CounterMetricFamily(f"modelchain_trainer_{name}", text, labels=[label])
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family
