"""What is kept of every chain between two scrapes: a few numbers of its status, replaced whole
whenever it is seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from modelchain.api.artifact import stage_artifact_name
from modelchain.api.status import State
from modelchain_operator.api.kube import Object


@dataclass(frozen=True, slots=True)
class StageFigures:
    """`own`: spent by attempts of this chain; else the figures are those of the StageArtifact it
    found.
    """

    name: str
    state: str
    own: bool
    planned_macs: float
    macs: float
    gpu_seconds: float
    cost: float | None
    progress: float | None
    transition_seconds: float | None
    retried: Mapping[str, int]
    reason: str  # its code; empty where another version wrote the status


@dataclass(frozen=True, slots=True)
class Figures:
    """One chain. `version`: its resourceVersion, which grows over all objects; `true`: the
    conditions that hold.
    """

    namespace: str
    name: str
    uid: str
    version: int
    node_pool: str
    queue: str
    true: frozenset[str]
    stages: tuple[StageFigures, ...]
    artifacts: frozenset[str]  # names of the StageArtifacts its status speaks of


def figures(chain: Object, before: Figures | None = None) -> Figures:
    """Of a chain as the API server gives it.

    Args:
        before: its figures so far. An attempt's GPU time is an estimate while it runs, and the end
            may correct it downwards by a little: a counter that falls looks like a new one to
            Prometheus, which then adds all of it.
    """
    meta, status = chain["metadata"], chain.get("status") or {}
    runner = (chain.get("spec") or {}).get("runner") or {}
    stages = status.get("stages") or []
    same = (
        {stage.name: stage for stage in before.stages}
        if before and before.uid == meta.get("uid", "")
        else {}
    )
    return Figures(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta.get("uid", ""),
        version=int(meta["resourceVersion"]),
        node_pool=runner.get("nodePool") or "",
        queue=runner.get("queueName") or "",
        true=frozenset(c["type"] for c in status.get("conditions") or [] if c["status"] == "True"),
        stages=tuple(_no_less(_stage(stage), same.get(stage.get("name", ""))) for stage in stages),
        artifacts=frozenset(
            stage_artifact_name(s["inputDigest"]) for s in stages if s.get("inputDigest")
        ),
    )


def _stage(stage: Object) -> StageFigures:
    cost, transition = stage.get("cost"), stage.get("transitionSeconds")
    return StageFigures(
        name=stage.get("name", ""),
        state=stage.get("state", ""),
        own=bool(stage.get("attempts")),
        planned_macs=float(stage.get("plannedMacs") or 0),
        macs=float(stage.get("macs") or 0),
        gpu_seconds=float(stage.get("gpuSeconds") or 0),
        cost=None if cost is None else float(cost),
        progress=_progress(stage),
        transition_seconds=None if transition is None else float(transition),
        retried=stage.get("retried") or {},
        reason=stage.get("reasonCode") or "",
    )


def _no_less(stage: StageFigures, before: StageFigures | None) -> StageFigures:
    """What was told stays told, unless it was wrong altogether."""
    if (
        before is None
        or not stage.own
        or not before.gpu_seconds / 2 < stage.gpu_seconds < before.gpu_seconds
    ):
        return stage
    cost = stage.cost if before.cost is None else max(before.cost, stage.cost or 0.0)
    return replace(stage, gpu_seconds=before.gpu_seconds, cost=cost)


def _progress(stage: Object) -> float | None:
    if stage.get("state") == State.SUCCEEDED:
        return 1.0
    progress = stage.get("progress")
    return progress["step"] / progress["steps"] if progress and progress["steps"] else None
