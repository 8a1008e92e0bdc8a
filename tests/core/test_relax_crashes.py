"""A chain that relaxes on a cluster, with a baseline that it trains: the operator dies at each of
its writes, and everything that may fail fails once; the same verdicts and epochs follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import exploration
import pytest
from cluster_simulation import Cluster, alone
from exploration import explore
from specs import DELETE
from sweeps import Dice, sample
from test_cluster_decide import every_fault, traced

from modelchain.api.status import ChainStatus

LONGEST_CALM = 2000
# b reaches 50 alone, and 29.5 points and one for each epoch in the chain; c has to reach 50.
EDITS = (
    ("spec.gate.metric", "top1"),
    ("spec.gate.train", ("b",)),
    ("spec.gate.baseline.c", "50"),
    ("spec.gate.onMiss", "Relax"),
    ("spec.allocation.targetAcceleration", "1.5"),
    *((f"spec.stages[{index}].epochs", DELETE) for index in range(3)),
)
TRAINED = ["a-a1", "b-a1", "b-a2", "b-b1", "c-a1", "c-a2"]


def measured(inputs: Mapping[str, Any]) -> dict[str, float]:
    layers = inputs["modelConfig"]["vision_cfg"]["layers"]
    if layers > 2 and "predecessor" not in inputs:
        return {"top1": 50.0}
    return {"top1": {2: 40.0, 3: 29.5, 4: 32.5}[layers] + inputs["epochs"]}


def relaxing() -> Cluster:
    world = alone(3)
    world.metrics_of = measured
    world.edit("family", bump=False, edits=EDITS)
    return world


def settle(world: Cluster) -> Cluster:
    with traced(world):
        return exploration.settle(world, LONGEST_CALM)


def end(world: Cluster) -> dict[str, Any]:
    """What must not depend on what happened on the way."""
    status: ChainStatus = world.chains["family"].status
    of = {"name", "epochs", "round", "first_epochs", "results", "gate", "artifact"}
    return {
        "stages": [stage.model_dump(include=of) for stage in status.stages],
        "baselines": [row.model_dump(include=of) for row in status.baselines],
        "rounds": [one.model_dump() for one in status.rounds],
    }


def models(world: Cluster) -> set[str]:
    """The input digests of all models that were recorded."""
    return {record.says.split()[0] for record in world.records.values()}


def jobs(world: Cluster) -> list[str]:
    return sorted(name.removeprefix("family-") for _, name in world.launched)


def check_end(world: Cluster) -> None:
    assert world.chains["family"].status.is_true("Complete")
    assert end(world) == end(undisturbed())
    assert models(world) == models(undisturbed())


@cache
def undisturbed() -> Cluster:
    return settle(relaxing())


@cache
def moments() -> list[Cluster]:
    """The world at each moment at which an undisturbed operator is about to write."""
    world, found = relaxing(), []
    while True:
        if world.operators[0].phase == "write":
            found.append(world.copy())
        if not world.calm_step():
            return found


def test_undisturbed_it_relaxes_and_passes() -> None:
    world = undisturbed()
    stages = world.chains["family"].status.stages
    assert [stage.epochs for stage in stages] == [32, 20, 17]
    assert [str(s.gate.verdict) for s in stages if s.gate] == ["Ungated", "Passed", "Passed"]
    assert jobs(world) == TRAINED


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("how", ["unsent", "sent", "answered"])
def test_the_operator_dies_at_any_write(how: str) -> None:
    """Nothing is trained twice, and no attempt is made more than without the crash."""
    assert len(moments()) > 40
    for moment in sample(f"writes of a relaxing chain, {how}", moments(), 3):
        world = moment.copy()
        world.die(world.operators[0], how)
        settle(world)
        check_end(world)
        assert jobs(world) == TRAINED


@pytest.mark.timeout(3600)
def test_the_status_is_wiped_at_any_write() -> None:
    for moment in sample("wiped statuses of a relaxing chain", moments()[1:], 3):
        world = moment.copy()
        world.wipe("family")
        world.touched()
        settle(world)
        check_end(world)


@pytest.mark.timeout(36_000)
def test_every_fault_at_every_request() -> None:
    """The world checks the promises at every write, whatever the end is."""
    dice = Dice("faults of a relaxing chain", 1500)
    found, rests = explore(
        relaxing(), every_fault, 1, longest_calm=LONGEST_CALM, dice=dice, told=traced
    )
    assert found > 200 and rests >= 1
