"""The figures of every chain that the metrics show: a few numbers from its status.

Whenever a chain is read or watched, all of its figures are replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial

from modelchain.api.artifact import claim_of
from modelchain.api.spec import RunnerSpec
from modelchain.api.status import State
from modelchain.api.uses import Uses
from modelchain.decide.ledger import seconds
from modelchain.gate.budget import SECONDS_PER_HOUR
from modelchain_operator.api.kube import Object
from modelchain_operator.reconcile.outlook_figures import OutlookFigures, outlook_figures

# The uses of GPU time that do not change their use any more.
SETTLED = tuple(use for use in Uses.model_fields if use != "unsaved")
# The kind of runner of a spec that names none.
DEFAULT_RUNNER = str(RunnerSpec.model_fields["kind"].default)


@dataclass(frozen=True, slots=True)
class StageSpec:
    """What the spec says of one stage."""

    model: str
    predecessor: str
    nodes: int
    # Ranks on each node; None for one on each of its GPUs.
    processes: int | None


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Moments of one stage, in seconds since the epoch. None of them is known of a stage that was
    found.
    """

    # When the first attempt at its present inputs has left its queue, of those that are listed.
    started: float | None
    completed: float | None
    # When the open attempt last took a step, and when it will have taken all of them.
    stepped: float | None
    ends: float | None


@dataclass(frozen=True, slots=True)
class Spending:
    """What was spent on one stage."""

    macs: float
    lost_macs: float
    queue_seconds: float
    # GPU time in seconds, by use. Time that is not settled yet is left out.
    uses: Mapping[str, float]
    cost: float | None


@dataclass(frozen=True, slots=True)
class StageFigures:
    """The figures of one stage."""

    name: str
    state: str
    planned_macs: float
    # What attempts of this chain have spent; None if there are none.
    trained: Spending | None
    # What the StageArtifacts that it has found say an earlier chain of its name has spent.
    reused: Spending | None
    # The GPUs that its pods hold now.
    held: int
    times: StageTimes
    progress: float | None
    transition_seconds: float | None
    retried: Mapping[str, int]
    # Every metric of its record, in percent, and a loss in its own unit.
    results: Mapping[str, float]
    # The gate's metric of the model trained alone, by its name; empty without one.
    baseline: Mapping[str, float]
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
    runner: str
    # By stage of the spec.
    specs: Mapping[str, StageSpec]
    # The limits of `spec.budget`; None without one.
    budget_cost: float | None
    budget_gpu_seconds: float | None
    # None if the spec or the status cannot be read.
    outlook: OutlookFigures | None
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
    meta, spec = chain["metadata"], chain.get("spec") or {}
    status = chain.get("status") or {}
    runner, budget = spec.get("runner") or {}, spec.get("budget") or {}
    stages, baselines = status.get("stages") or [], _baselines(status)
    known = _known(before) if before and before.uid == meta.get("uid", "") else {}
    stage_of = partial(_no_less, known)
    return Figures(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta.get("uid", ""),
        version=int(meta["resourceVersion"]),
        node_pool=runner.get("nodePool") or "",
        queue=runner.get("queueName") or "",
        runner=runner.get("kind") or DEFAULT_RUNNER,
        specs=_specs(spec.get("stages") or []),
        budget_cost=_number(budget.get("cost")),
        budget_gpu_seconds=_number(budget.get("gpuHours"), SECONDS_PER_HOUR),
        outlook=outlook_figures(chain),
        true=frozenset(c["type"] for c in status.get("conditions") or [] if c["status"] == "True"),
        stages=tuple(map(stage_of, stages)),
        baselines=tuple(map(stage_of, baselines)),
        removed=tuple(map(stage_of, status.get("removed") or [])),
        digests=frozenset(s["inputDigest"] for s in (*stages, *baselines) if s.get("inputDigest")),
        currency=status.get("currency") or "",
        claim=_claim(chain),
    )


def _baselines(status: Object) -> list[Object]:
    rows = status.get("baselines") or []
    return [{**row, "name": f"{row.get('name', '')} alone"} for row in rows]


def _known(before: Figures) -> dict[str, StageFigures]:
    """By name, the figures of all that has spent."""
    return {stage.name: stage for stage in (*before.stages, *before.baselines, *before.removed)}


def _claim(chain: Object) -> str:
    return claim_of(chain) if (chain.get("spec") or {}).get("storage") else ""


def _specs(stages: Sequence[Object]) -> dict[str, StageSpec]:
    """What the spec says of each stage, with what the API server fills in."""
    found, before = {}, ""
    for stage in stages:
        resources, name = stage.get("resources") or {}, stage.get("name", "")
        found[name] = StageSpec(
            model=stage.get("model") or "inline",
            predecessor=before,
            nodes=resources.get("nodes") or 1,
            processes=resources.get("processesPerNode"),
        )
        before = name
    return found


def _number(text: str | float | None, times: int = 1) -> float | None:
    return None if text is None else float(text) * times


def _stage(stage: Object) -> StageFigures:
    gate, (trained, reused) = stage.get("gate") or {}, _by_source(stage)
    return StageFigures(
        name=stage.get("name", ""),
        state=stage.get("state", ""),
        planned_macs=float(stage.get("plannedMacs") or 0),
        trained=trained,
        reused=reused,
        held=_held(stage),
        times=_times(stage),
        progress=_progress(stage),
        transition_seconds=_number(stage.get("transitionSeconds")),
        retried=stage.get("retried") or {},
        results={name: float(value) for name, value in (stage.get("results") or {}).items()},
        baseline={gate["metric"]: float(gate["baseline"])} if gate.get("baseline") else {},
        verdict=gate.get("verdict") or "",
        difference=_number(gate.get("difference")),
        reason=stage.get("reasonCode") or "",
    )


def _open(stage: Object) -> Object:
    """The attempt that is not closed; empty if there is none."""
    attempts = stage.get("attempts") or [{}]
    return {} if attempts[-1].get("finishedAt") else attempts[-1]


def _held(stage: Object) -> int:
    pods = (_open(stage).get("pods") or {}).values()
    return sum(pod.get("gpus") or 0 for pod in pods if pod.get("finished") is None)


def _times(stage: Object) -> StageTimes:
    attempts, going = stage.get("attempts") or [], _open(stage)
    digest = stage.get("lastDigest")
    ours = [a for a in attempts if not digest or a.get("inputDigest") == digest]
    begun = [seconds(a["startedAt"]) for a in ours if a.get("startedAt")]
    done = stage.get("state") == State.SUCCEEDED and ours and ours[-1].get("finishedAt")
    stepped: float | None = going.get("steppedAt")
    left: float = (stage.get("progress") or {}).get("etaSeconds") or 0.0
    runs = stage.get("state") == State.RUNNING and left > 0
    return StageTimes(
        started=min(begun, default=None),
        completed=seconds(done) if done else None,
        stepped=stepped,
        ends=stepped + left if runs and stepped else None,
    )


def _by_source(stage: Object) -> tuple[Spending | None, Spending | None]:
    """What this chain has spent on a stage, and what an earlier chain of its name has.

    An older version did not keep the two apart: a stage without attempts shows what its record
    says. The sum of removed stages has neither.
    """
    spent, whole = stage.get("spent") or {}, _spending([stage])
    own = stage.get("attempts") or any(spent.values()) or not stage.get("name")
    if found := stage.get("reused"):
        trained = _spending([spent, _open(stage)]) if own else None
        return trained, _spending([at["spent"] for at in found])
    return (whole, None) if own else (None, whole)


def _spending(parts: Sequence[Object]) -> Spending:
    """The sum of what parts of a status say was spent."""
    costs = [Decimal(part["cost"]) for part in parts if part.get("cost") is not None]
    times = [_uses(part) for part in parts]
    return Spending(
        macs=float(sum(int(part.get("macs") or 0) for part in parts)),
        lost_macs=float(sum(int(part.get("lostMacs") or 0) for part in parts)),
        queue_seconds=float(sum(part.get("queueSeconds") or 0.0 for part in parts)),
        uses={use: sum(time[use] for time in times) / 1000 for use in SETTLED},
        cost=float(sum(costs)) if costs else None,
    )


def _uses(part: Object) -> dict[str, int]:
    """Settled GPU time in milliseconds. An older version's status has no uses: all is lost then."""
    untold = {"lost": round(1000 * (part.get("gpuSeconds") or 0.0))}
    known = part.get("gpuMilliseconds") or untold
    return {use: known.get(use) or 0 for use in SETTLED}


def _no_less(known: Mapping[str, StageFigures], row: Object) -> StageFigures:
    """The figures of one stage, with each earlier one that has fallen by less than half.

    A larger fall is no correction of an estimate, and is shown.
    """
    stage, known_stage = _stage(row), known.get(row.get("name", ""))
    now, before = stage.trained, known_stage.trained if known_stage else None
    if now is None or before is None:
        return stage
    cost = now.cost if before.cost is None else _corrected(now.cost or 0.0, before.cost)
    corrected = Spending(
        uses={use: _corrected(time, before.uses[use]) for use, time in now.uses.items()},
        cost=cost,
        macs=_corrected(now.macs, before.macs),
        lost_macs=_corrected(now.lost_macs, before.lost_macs),
        queue_seconds=_corrected(now.queue_seconds, before.queue_seconds),
    )
    return replace(stage, trained=corrected)


def _corrected(figure: float, before: float) -> float:
    return before if before / 2 < figure < before else figure


def _progress(stage: Object) -> float | None:
    if stage.get("state") == State.SUCCEEDED:
        return 1.0
    progress = stage.get("progress")
    return progress["step"] / progress["steps"] if progress and progress["steps"] else None
