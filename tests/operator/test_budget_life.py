"""A budget on a cluster: one operator, or two, stop a stage within one look of the moment at which
the money is spent, at a checkpoint, and go on after an edit.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from podshapes import ended, running, word
from stagelife import FIRST, Life
from sums import check_sums

from modelchain.api.reasons import Code
from modelchain.api.status import State
from modelchain.api.uses import Resumed, Uses
from modelchain.io.load import parse
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import PODS

LOOK, GRACE = 30, 60
CONFIG = parse(
    PoolFile,
    {
        "progressSeconds": LOOK,
        "nodePools": {
            "h100": {
                "gpu": "H100",
                "gpusPerNode": 8,
                "price": {"perGpuHour": "10.00", "currency": "USD", "source": "contract"},
            },
            "free": {"gpu": "H100", "gpusPerNode": 8},
        },
    },
    "operator.yaml",
)
# Of the eight GPUs, in a second.
RATE = Decimal(80) / 3600


class Limited(Life):
    """A chain with a budget that several operators look at, one after the other."""

    def __init__(self, operators: int, **changes: Any) -> None:
        pool = {"spec.runner.nodePool": "h100"}
        super().__init__(config=CONFIG, **{**pool, **changes})
        self.others = []
        for _ in range(operators - 1):
            self.others.append(self.controller)
            self.restart()

    def seconds(self, more: float) -> None:
        self.look(more, passes=2)
        for other in self.others:
            mine, self.controller = self.controller, other
            self.look(0, passes=2)
            self.controller = mine
        check_sums(self.status)

    def until_stopped(self, job: str) -> float:
        """The moment at which the job is deleted, of which the pods are still there."""
        for _ in range(400):
            if job not in self.jobs:
                return self.now
            self.seconds(LOOK)
        raise AssertionError("it is never stopped")

    def ends(self) -> None:
        """The pod writes a checkpoint within its grace period and ends."""
        begun = Uses(startup=50_000, productive=int(1000 * (self.now - 150)))
        more = {"milliseconds": begun.model_dump(by_alias=True), "checkpointStep": 100}
        stop = word("Failed", "Preempted", resumed=Resumed().model_dump(by_alias=True), **more)
        self.now += GRACE
        [known] = [pod for (kind, _), pod in self.kube.objects.items() if kind == PODS.plural]
        pod = ended(code=75, start=100, end=self.now, created=100, message=stop)
        self.kube.put(PODS, {**pod, "metadata": known["metadata"]})
        self.seconds(1)


@pytest.mark.parametrize("operators", [1, 2])
@pytest.mark.parametrize("budget", [{"cost": "20"}, {"gpuHours": "2"}])
def test_it_stops_within_a_look_and_the_grace_period(operators: int, budget: Any) -> None:
    life = Limited(operators, **{"spec.budget": budget})
    life.seconds(1)
    life.pods(running(start=110, created=100))
    stopped = life.until_stopped(FIRST)
    assert 1000 <= stopped <= 1000 + LOOK, "900 seconds of 8 GPUs are 20 dollars and 2 hours"
    assert life.status.stages[0].attempts[0].state is State.SUSPENDED
    life.ends()
    stage, spent = life.status.stages[0], Decimal(life.status.total.cost or 0)
    assert 20 <= spent <= 20 + RATE * (LOOK + GRACE)
    assert stage.stalled and stage.code is Code.BUDGET_EXCEEDED
    assert (stage.retries, stage.disruptions, stage.checkpoint_step) == (0, 0, 100)
    life.seconds(600)
    assert life.jobs == [] and stage.attempt_count == 1
    raised = {key: str(10 * int(limit)) for key, limit in budget.items()}
    life.edit(2, **{"spec.budget": raised})
    life.seconds(1)
    assert life.jobs == ["vit-vit-t-a2"] and not life.status.stages[0].stalled
    assert life.kube.made["pytorchjobs", "vit-vit-t-a2"] == 1


def test_a_pool_without_a_price() -> None:
    """It waits before the first launch. Hours can be limited all the same."""
    life = Limited(1, **{"spec.budget": {"cost": "20"}, "spec.runner.nodePool": "free"})
    life.seconds(1)
    assert life.jobs == [] and life.status.stages[0].code is Code.NO_PRICE
    assert life.status.is_true("Stalled")
    life.edit(2, **{"spec.budget": {"gpuHours": "20"}})
    life.seconds(1)
    assert life.jobs == [FIRST]


def test_a_baseline_counts_and_is_limited() -> None:
    """What the first stage has spent leaves nothing for the baseline."""
    evaluation = {"name": "top1", "kind": "Retrieval", "shards": "/data/val.tar"}
    changes = {
        "spec.evaluation": [evaluation],
        "spec.gate": {"metric": "top1", "train": ["vit-s"]},
        "spec.budget": {"cost": "20"},
    }
    life = Limited(1, **changes)
    life.seconds(1)
    life.pods(running(start=110, created=100))
    told = Uses(startup=50_000, productive=850_000).model_dump(by_alias=True)
    done = word("Succeeded", steps=1, macs=5, milliseconds=told, metrics={"top1": 50.0})
    life.pods(ended(code=0, start=110, end=1010, created=100, message=done))
    life.end_job("Succeeded")
    life.seconds(1100)
    life.seconds(100)
    [row] = life.status.baselines
    assert life.status.stages[0].state is State.SUCCEEDED
    assert row.stalled and row.code is Code.BUDGET_EXCEEDED and row.attempt_count == 0
    life.edit(2, **{"spec.budget": {"cost": "40"}})
    life.seconds(1)
    assert "vit-vit-s-b1" in life.jobs
