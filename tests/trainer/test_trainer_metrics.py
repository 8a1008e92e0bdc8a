"""What a trainer tells Prometheus and TensorBoard agrees with its metrics.jsonl, also after a
resume.
"""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c
from tiny import BATCH, STEPS

from modelchain.api.contracts import LiveProgress
from modelchain.io.stop import Preempted
from modelchain_trainer.activities import ACTIVITIES, Activities
from modelchain_trainer.journal import TAGS
from modelchain_trainer.metrics import Meter
from modelchain_trainer.peaks import peak_of
from modelchain_trainer.train import Trainer

torch.set_num_threads(1)

LABELS = ("component", "phase", "activity")


def told(meter: Meter) -> dict[str, dict[str, float]]:
    """What is served: values by metric and by its label, if it has one beside `info`."""
    registry = CollectorRegistry()
    registry.register(meter)
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            name = sample.name.removeprefix("modelchain_trainer_")
            label = next((sample.labels[one] for one in LABELS if one in sample.labels), "")
            found.setdefault(name, {})[label] = sample.value
    return found


def trained(task: Any, stop_after: int = 0) -> Meter:
    trainers: list[Trainer] = []

    def after(trainer: Trainer, done: int) -> None:
        trainers.append(trainer)
        trainer.stop.asked |= done == stop_after

    try:
        tiny.train(task, after)
    except Preempted:
        assert stop_after
    torch.use_deterministic_algorithms(False)
    return trainers[0].meter


def test_a_successor_that_is_stopped_and_resumed(tmp_path: Path) -> None:
    folder, began = tiny.data(tmp_path / "digits"), time.time()
    first = tiny.task(tiny.spec(), folder, tmp_path / "artifacts")
    tiny.train(first)
    tasks = [
        tiny.task(tiny.spec(), folder, tmp_path / "artifacts", 1, attempt, first)
        for attempt in (1, 2)
    ]
    before, after = told(trained(tasks[0], stop_after=5)), told(trained(tasks[1]))
    assert (before["step"][""], before["checkpoint_step"][""]) == (5, 5)
    assert (before["macs_total"][""], before["samples_total"][""]) == (5000, 5 * BATCH)
    assert (after["step"][""], after["planned_macs"][""]) == (STEPS, STEPS * 1000)
    assert after["macs_total"][""] == (STEPS - 5) * 1000, "spent by this attempt"
    assert after["samples_total"][""] == (STEPS - 5) * BATCH
    assert before["last_checkpoint_timestamp_seconds"][""] > began
    for task, page in zip(tasks, (before, after), strict=True):
        last = tiny.entries(task)[-1]
        assert page["loss"] == {"task": last["taskLoss"], "distillation": last["distillationLoss"]}
        ratio = last["distillationLoss"] / last["taskLoss"]
        assert page["distillation_ratio"][""] == last["ratio"] == pytest.approx(ratio)
        assert page["text_token_efficiency"][""] == last["tokens"] / last["processedTokens"] <= 1
        assert page["skipped_batches_total"][""] == 0
        assert page["last_checkpoint_duration_seconds"].keys() == {"stall", "write"}
        assert page["samples_per_second"][""] >= 0 and page["data_wait_seconds_total"][""] > 0
        assert page["replaced_pictures_total"][""] == 0
        assert not {"mfu_ratio", "peak_flops_per_second"} & page.keys(), "a CPU has no known peak"
        times = page["seconds_total"]
        assert tuple(times) == ACTIVITIES
        assert all(times[one] > 0 for one in ("startup", "step", "data", "checkpoint"))
    assert before["seconds_total"]["export"] == 0 < after["seconds_total"]["export"]
    assert after["seconds_total"]["evaluation"] > 0, "after the last step"


class Clock:
    """It stands still but for what a test adds."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


DONE = st.lists(
    st.tuples(st.sampled_from([*ACTIVITIES, "stepped", "read"]), st.integers(0, 10**8)),
    max_size=40,
)


@given(DONE)
def test_activities_sum_up_to_all_time_and_none_falls(done: list[tuple[Any, int]]) -> None:
    clock = Clock()
    activities, known = Activities(now=clock, began=900.0), dict.fromkeys(ACTIVITIES, 0.0)
    assert activities.seconds["startup"] == 100
    for what, milliseconds in done:
        if what == "stepped":
            activities.stepped()
        elif what in ("evaluation", "export"):
            activities.begins(what)
        elif what != "read":
            with activities.during(what):
                clock.time += milliseconds / 1000
        clock.time += milliseconds / 1000
        told = activities.seconds
        assert all(told[one] >= known[one] for one in ACTIVITIES)
        assert sum(told.values()) == pytest.approx(clock.time - 900)
        known = told


def test_what_is_done_before_the_first_step_is_startup() -> None:
    clock = Clock()
    activities = Activities(now=clock, began=1000.0)
    with activities.during("data"):
        clock.time += 5
    activities.stepped()
    for activity, seconds in (("data", 2.0), ("checkpoint", 3.0)):
        with activities.during(activity):  # type: ignore[arg-type]
            clock.time += seconds
        clock.time += 1
    expected = {"startup": 5.0, "step": 2.0, "data": 2.0, "checkpoint": 3.0}
    assert {one: time for one, time in activities.seconds.items() if time} == expected


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A30", 165e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", None),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(device: str, peak: float | None) -> None:
    assert peak_of(device) == peak


def test_utilization_is_that_of_all_ranks_together(tmp_path: Path) -> None:
    """8 A100 that do 4e14 MACs a second in all are used by 8e14 of 24.96e14."""
    task = tiny.task(tiny.spec(), tiny.data(tmp_path / "digits"), tmp_path / "artifacts")
    task = task.model_copy(update={"macs_per_step": 10**14})
    meter = Meter(task, {"torch": "2", "device": "NVIDIA A100-SXM4-80GB", "ranks": 8})
    batch = task.inputs["globalBatchSize"]
    meter.live = LiveProgress(
        attempt="a", step=1, steps=9, samples_per_second=4.0 * batch, eta_seconds=1.0
    )
    page = told(meter)
    assert page["peak_flops_per_second"][""] == 8 * 312e12
    assert page["mfu_ratio"][""] == pytest.approx(8e14 / (8 * 312e12))
    meter.live = meter.live.model_copy(update={"samples_per_second": 0.0})
    assert "mfu_ratio" not in told(meter), "no step was logged yet"


def events(attempt: Path) -> dict[tuple[str, int], list[float]]:
    """What TensorBoard shows of a directory, by tag and step: the start of a session hides earlier
    events of its step and of later steps.
    """
    shown: dict[tuple[str, int], list[float]] = {}
    for file in sorted(attempt.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            record = data[12 : 12 + size]
            sums = (masked_crc32c(data[:8]), masked_crc32c(record))
            assert (data[8:12], data[12 + size : 16 + size]) == tuple(
                struct.pack("<I", s) for s in sums
            )
            event, data = Event.FromString(record), data[16 + size :]
            if event.HasField("session_log"):
                shown = {key: values for key, values in shown.items() if key[1] < event.step}
            for value in event.summary.value:
                shown.setdefault((value.tag, event.step), []).append(value.simple_value)
    return shown


def test_tensorboard_shows_every_number_once_although_the_attempt_was_killed_and_resumed(
    tmp_path: Path,
) -> None:
    task = tiny.task(tiny.spec(), tiny.data(tmp_path / "digits"), tmp_path / "artifacts")
    task = tiny.evaluated_every(task, epochs=1)

    attempt = tmp_path / "artifacts" / task.input_digest / task.owner

    class Killed(Exception):
        pass

    def kill(trainer: Trainer, done: int) -> None:
        if done == 7:
            trainer.stage.saver.wait()
            assert trainer.stage.saver.saved_step == 4
            trainer._log()
            with (attempt / "metrics.jsonl").open("a") as file:
                file.write('{"event": "st')  # the kill cuts the line off
            raise Killed

    with pytest.raises(Killed):
        tiny.train(task, kill)
    trained(task)
    steps, measured = tiny.entries(task), tiny.entries(task, "evaluation")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["step"] for line in measured] == [0, 4, 8, STEPS]
    shown = events(attempt)
    assert all(len(values) == 1 for values in shown.values())
    told = {
        tag: {step: values[0] for (t, step), values in shown.items() if t == tag}
        for tag, _ in shown
    }
    for name in TAGS.keys() - {"ratio"}:
        assert told[TAGS[name]] == {line["step"]: pytest.approx(line[name]) for line in steps}
    assert told["evaluation/top1"] == {
        line["step"]: pytest.approx(line["metrics"]["top1"]) for line in measured
    }
    assert TAGS["ratio"] not in told, "a first stage has no predecessor"
