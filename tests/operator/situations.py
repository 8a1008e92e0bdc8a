"""A chain that is at its second stage, and the objects around it, as `explain` reads them."""

from __future__ import annotations

import json
from typing import Any

from podshapes import T0, at

from modelchain.api.reasons import Reason, filled
from modelchain.api.status import AttemptStatus, ChainStatus, Condition, StageStatus, State
from modelchain.decide import conditions
from modelchain.decide.transitions import explained
from modelchain_operator.api.kube import Object

NOW = T0 + 3600
ATTEMPT = AttemptStatus(
    name="family-b-a2", number=2, input_digest="d" * 64, state=State.RUNNING, uid="job-uid"
)


def condition(
    kind: str, reason: str = "Because", message: str = "", status: Any = "True"
) -> Condition:
    return Condition(
        type=kind, status=status, reason=reason, message=message, last_transition_time=at(0)
    )


def chain(
    stage: StageStatus | None = None, *conditions: Condition, seen: int = 3, **spec: Any
) -> Object:
    """Chain `family`: stage a has finished, b is as given, c waits. With None for b no operator has
    reconciled the chain.
    """
    stages = (
        [StageStatus(name="a", state=State.SUCCEEDED), stage, StageStatus(name="c")]
        if stage
        else []
    )
    status = ChainStatus(
        observed_generation=seen, conditions=list(conditions), stages=[s for s in stages if s]
    )
    return {
        "apiVersion": "modelchain.dev/v1alpha1",
        "kind": "ModelChain",
        "metadata": (
            {"name": "family", "namespace": "team", "uid": "chain-uid", "generation": 3}
            | {"creationTimestamp": at(0)}
        ),
        "spec": {"stages": [{"name": name} for name in "abc"], **spec},
        "status": status.model_dump(mode="json", by_alias=True),
    }


def refused(thing: Object, message: str) -> Object:
    """The chain after an edit that the operator refuses. What is known of its stages stays."""
    old = ChainStatus.model_validate_json(json.dumps(thing["status"]))
    status = conditions.refused(old, thing["metadata"]["generation"], message, NOW)
    return thing | {"status": status.model_dump(mode="json", by_alias=True)}


def current(
    state: State = State.STARTING, reason: Reason | None = None, **more: Any
) -> StageStatus:
    """The stage that the chain is at, as the operator writes it."""
    return told(StageStatus(name="b", state=state, attempts=[ATTEMPT], **more), reason)


def told(stage: StageStatus, reason: Reason | None) -> StageStatus:
    if reason is None:
        return stage
    stage = explained(stage, reason)
    return stage.changed(next=filled(stage.next, "family", "team"))


def lease(renewed: float = 3590, holder: str = "operator-7d_0a1b2c3d") -> Object:
    spec = {"holderIdentity": holder, "renewTime": at(renewed).replace("Z", ".123456Z")}
    return {"metadata": {"namespace": "modelchain-system"}, "spec": spec}


def job(suspended: bool = False, queue: str | None = None) -> Object:
    labels = {"kueue.x-k8s.io/queue-name": queue} if queue else {}
    meta = {
        "name": "family-b-a2",
        "namespace": "team",
        "uid": "job-uid",
        "labels": labels,
        "creationTimestamp": at(0),
    }
    spec = {"runPolicy": {"suspend": suspended}}
    return {"kind": "PyTorchJob", "metadata": meta, "spec": spec, "status": {}}


def mine(pod: Object) -> Object:
    labels = {"chain": "family", "stage": "b", "attempt": "2", "role": "train"}
    pod["metadata"]["labels"] |= {f"modelchain.dev/{name}": value for name, value in labels.items()}
    return pod


def event(thing: Object, message: str, kind: str = "Pod", seconds: float = 3000) -> Object:
    involved = {"kind": kind, "name": thing["metadata"]["name"], "uid": thing["metadata"]["uid"]}
    return {
        "type": "Warning",
        "involvedObject": involved,
        "message": message,
        "lastTimestamp": at(seconds),
        "metadata": {},
    }


def claim(name: str = "family-artifacts", phase: str = "Pending") -> Object:
    return {"metadata": {"name": name, "uid": f"{name}-uid"}, "status": {"phase": phase}}


def workload(*conditions: tuple[str, str, str]) -> Object:
    found = [
        {"type": t, "status": s, "message": m, "lastTransitionTime": at(0), "reason": "R"}
        for t, s, m in conditions
    ]
    meta = {"name": "pytorchjob-family-b-a2", "ownerReferences": [{"uid": "job-uid"}]}
    return {"metadata": meta, "status": {"conditions": found}}
