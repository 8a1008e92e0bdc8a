"""The figures of every chain that the metrics show: a few numbers from its status.

Whenever a chain is read or watched, all of its figures are replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from modelchain.api.artifact import claim_of
from modelchain.api.status import State
from modelchain.api.uses import Uses
from modelchain_operator.api.kube import Object

# The uses of GPU time that do not change their use any more.
SETTLED = tuple(use for use in Uses.model_fields if use != "unsaved")


@dataclass(frozen=True, slots=True)
class StageFigures:
    """The figures of one stage."""

    name: str
    state: str
    # Attempts of this chain have spent them. Otherwise they are those of a StageArtifact that the
    # chain has found.
    own: bool
    planned_macs: float
    macs: float
    # GPU time in seconds, by use. Time that is not settled yet is left out.
    uses: Mapping[str, float]
    cost: float | None
    progress: float | None
    transition_seconds: float | None
    retried: Mapping[str, int]
    # The gate's verdict, and the points by which the stage is better than its baseline.
    verdict: str
    difference: float | None
    # The code of the stage's reason; empty if an operator of another version wrote the status.
    reason: str


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one chain."""

    namespace: str
    name: str
    uid: str
    # The chain's resourceVersion, which grows with every write to any object.
    version: int
    node_pool: str
    queue: str
    # The types of its conditions that are True.
    true: frozenset[str]
    stages: tuple[StageFigures, ...]
    # The models that are trained alone, with names such as `vit-s alone`.
    baselines: tuple[StageFigures, ...]
    # The stages that are no longer in its spec. One without a name is the sum of many.
    removed: tuple[StageFigures, ...]
    # The input digests in its status.
    digests: frozenset[str]
    # Of every cost; empty until there is one.
    currency: str
    # The name of its claim of artifacts; empty without `spec.storage`.
    claim: str


def figures(chain: Object, before: Figures | None = None) -> Figures:
    """The figures of a chain, as the API server returns the chain.

    Args:
        chain: the object.
        before: the chain's figures so far. While an attempt runs, its times are estimates, and its
            end may lower them a little. Prometheus takes a counter that falls for one that began
            again at 0, and would add all of it, so such a figure keeps its old value.
    """
    meta, status = chain["metadata"], chain.get("status") or {}
    runner = (chain.get("spec") or {}).get("runner") or {}
    stages, removed = status.get("stages") or [], status.get("removed") or []
    baselines = [
        {**row, "name": f"{row.get('name', '')} alone"} for row in status.get("baselines") or []
    ]
    same = (
        {stage.name: stage for stage in (*before.stages, *before.baselines, *before.removed)}
        if before and before.uid == meta.get("uid", "")
        else {}
    )

    def no_less(stage: Object) -> StageFigures:
        return _no_less(_stage(stage), same.get(stage.get("name", "")))

    return Figures(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta.get("uid", ""),
        version=int(meta["resourceVersion"]),
        node_pool=runner.get("nodePool") or "",
        queue=runner.get("queueName") or "",
        true=frozenset(c["type"] for c in status.get("conditions") or [] if c["status"] == "True"),
        stages=tuple(map(no_less, stages)),
        baselines=tuple(map(no_less, baselines)),
        removed=tuple(map(no_less, removed)),
        digests=frozenset(s["inputDigest"] for s in (*stages, *baselines) if s.get("inputDigest")),
        currency=status.get("currency") or "",
        claim=_claim(chain),
    )


def _claim(chain: Object) -> str:
    return claim_of(chain) if (chain.get("spec") or {}).get("storage") else ""


def _stage(stage: Object) -> StageFigures:
    cost, transition = stage.get("cost"), stage.get("transitionSeconds")
    gate = stage.get("gate") or {}
    return StageFigures(
        name=stage.get("name", ""),
        state=stage.get("state", ""),
        own=bool(stage.get("attempts") or any((stage.get("spent") or {}).values())),
        planned_macs=float(stage.get("plannedMacs") or 0),
        macs=float(stage.get("macs") or 0),
        uses=_uses(stage),
        cost=None if cost is None else float(cost),
        progress=_progress(stage),
        transition_seconds=None if transition is None else float(transition),
        retried=stage.get("retried") or {},
        verdict=gate.get("verdict") or "",
        difference=None if gate.get("difference") is None else float(gate["difference"]),
        reason=stage.get("reasonCode") or "",
    )


def _uses(stage: Object) -> dict[str, float]:
    """The settled GPU time of a stage. An older version's status has no uses: all is lost then."""
    untold = {"lost": 1000 * (stage.get("gpuSeconds") or 0.0)}
    known = stage.get("gpuMilliseconds") or untold
    return {use: (known.get(use) or 0) / 1000 for use in SETTLED}


def _no_less(stage: StageFigures, before: StageFigures | None) -> StageFigures:
    """The stage's figures, with each earlier one that has fallen by less than half.

    A larger fall is no correction of an estimate, and is shown.
    """
    if before is None or not stage.own:
        return stage
    uses = {use: _corrected(time, before.uses[use]) for use, time in stage.uses.items()}
    cost = stage.cost if before.cost is None else _corrected(stage.cost or 0.0, before.cost)
    return replace(stage, uses=uses, cost=cost)


def _corrected(figure: float, before: float) -> float:
    return before if before / 2 < figure < before else figure


def _progress(stage: Object) -> float | None:
    if stage.get("state") == State.SUCCEEDED:
        return 1.0
    progress = stage.get("progress")
    return progress["step"] / progress["steps"] if progress and progress["steps"] else None
