"""Chains at real sizes, as `modelchain watch` gets them: eight stages, 256 pods, 1e20 MACs."""

from __future__ import annotations

from typing import Any

import podshapes
from podshapes import T0, at
from specs import config, inline, with_changes

from modelchain.api.contracts import FailureClass, Progress
from modelchain.api.reasons import Code, Reason, filled
from modelchain.api.spec import ModelChain
from modelchain.api.status import (
    AttemptStatus,
    ChainStatus,
    Planned,
    PodTime,
    StageStatus,
    State,
)
from modelchain.api.uses import Uses
from modelchain.decide.conditions import completed
from modelchain.decide.transitions import explained
from modelchain_operator.api.kube import Object
from modelchain_operator.runners.template import CHAIN, CHAIN_UID

STAGES = 8
NODES = 256
HOUR = 3600
NOW = T0 + 100 * HOUR
IMAGE = "example.com/trainer@sha256:" + "0" * 64
MACS = 123_456_789_012_345_678_901
PLAN = Planned(macs=MACS, gpu_seconds=40_000.0 * HOUR, cost="100000")
ALONE = Planned(macs=4 * MACS, gpu_seconds=160_000.0 * HOUR, cost="400000")


def spec(**changes: Any) -> Object:
    """A chain of eight stages on 256 nodes, with a budget."""
    shapes = (config(vision={"layers": 2 + i}) for i in range(STAGES))
    cluster = {
        "metadata": {
            **{"name": "family", "namespace": "vision", "uid": "chain-uid", "generation": 3},
            "creationTimestamp": at(0),
        },
        "spec.runner": {"image": IMAGE, "nodePool": "a100-80gb", "queueName": "research"},
        "spec.storage": {"claimTemplate": {"size": "1Gi"}},
        "spec.data.volume": {"claimName": "data"},
        "spec.budget": {"cost": "2000000", "gpuHours": "900000"},
    }
    made = with_changes(inline(*shapes, **cluster))
    for stage in made["spec"]["stages"]:
        stage["resources"] = {"nodes": NODES}
    return with_changes({path.replace("__", "."): v for path, v in changes.items()}, made)


def name_of(index: int) -> str:
    return str(spec()["spec"]["stages"][index]["name"])


def _attempt(index: int, **fields: Any) -> AttemptStatus:
    stage = name_of(index)
    return AttemptStatus(
        name=f"family-{stage}-a1",
        number=1,
        input_digest=str(index) * 64,
        runner="PyTorchJob",
        pool="a100-80gb",
        uid="job-uid",
        **fields,
    )


def finished(index: int) -> StageStatus:
    spent = {
        "macs": MACS,
        "gpu_seconds": 40_000.0 * HOUR,
        "gpu_milliseconds": Uses(productive=40_000 * HOUR * 1000),
        "cost": "100000.005",
    }
    ended = _attempt(
        index, state=State.SUCCEEDED, started_at=at(0), finished_at=at(10 * HOUR), **spent
    )
    return StageStatus(
        name=name_of(index),
        state=State.SUCCEEDED,
        attempts=[ended],
        attempt_count=1,
        input_digest=str(index) * 64,
        last_digest=str(index) * 64,
        results={"imagenet1k-top1": "33.00"},
        transition_seconds=0.8,
        retried={FailureClass.PREEMPTED: 2},
        **spent,
    )


def running(index: int, nodes: int = NODES) -> StageStatus:
    held = {
        f"uid-{rank}": PodTime(scheduled=T0 + 98 * HOUR, started=T0 + 98 * HOUR, gpus=8)
        for rank in range(nodes)
    }
    going = _attempt(
        index,
        state=State.RUNNING,
        started_at=at(98 * HOUR),
        checkpoint_step=28_800,
        pods=held,
        macs=MACS // 2,
        gpu_milliseconds=Uses(productive=20_000 * HOUR * 1000),
        gpu_seconds=20_000.0 * HOUR,
        cost="50000",
    )
    stage = StageStatus(
        name=name_of(index),
        state=State.RUNNING,
        attempts=[going],
        attempt_count=1,
        input_digest=str(index) * 64,
        last_digest=str(index) * 64,
        progress=Progress(step=30_000, steps=60_000, samples_per_second=123_456, eta_seconds=7_500),
        macs=going.macs,
        gpu_seconds=going.gpu_seconds,
        gpu_milliseconds=going.gpu_milliseconds,
        cost=going.cost,
    )
    return explained(stage, Reason(Code.MISS, message="never trained", never_trained=True))


def waiting(index: int) -> StageStatus:
    before = name_of(index - 1)
    reason = Reason(Code.WAITS_FOR_STAGE, before, f"waits for stage {before}")
    return explained(StageStatus(name=name_of(index)), reason)


def told(stage: StageStatus, reason: Reason, **fields: Any) -> StageStatus:
    """The stage with a reason, whose next command is filled in as the operator does it."""
    stage = explained(stage, reason).changed(**fields)
    return stage.changed(next=filled(stage.next, "family", "vision"))


def chain(*changed: StageStatus, body: Object | None = None, at_stage: int = 2) -> Object:
    """The chain at its third stage, which runs; `changed` take the places of stages by name."""
    thing = body or spec()
    stages = {
        name_of(i): finished(i) if i < at_stage else running(i) if i == at_stage else waiting(i)
        for i in range(STAGES)
    }
    stages |= {stage.name: stage for stage in changed}
    model = ModelChain.model_validate(thing)
    known = [stages[one.name].changed(plan=PLAN, alone=ALONE) for one in model.spec.stages]
    status = completed(model, ChainStatus(), known, None, NOW, currency="USD")
    return thing | {"status": status.model_dump(mode="json", by_alias=True)}


def pods(count: int = NODES, index: int = 2, **not_running: Any) -> list[Object]:
    """The running stage's pods. `not_running` has pods by `rank_<n>`."""
    return [_pod(rank, index, not_running.get(f"rank_{rank}")) for rank in range(count)]


def _pod(rank: int, index: int, other: Object | None) -> Object:
    job = f"family-{name_of(index)}-a1"
    pod = other or podshapes.running(rank)
    meta = pod["metadata"]
    kind, number = ("master", 0) if rank == 0 else ("worker", rank - 1)
    meta["name"], meta["uid"] = f"{job}-{kind}-{number}", f"uid-{rank}"
    meta["creationTimestamp"] = at(98 * HOUR)
    meta["labels"] |= {
        CHAIN: "family",
        CHAIN_UID: "chain-uid",
        "training.kubeflow.org/replica-type": kind,
        "training.kubeflow.org/replica-index": str(number),
    }
    meta["ownerReferences"] = [podshapes.owned("PyTorchJob", job, "job-uid")]
    return pod
