"""The figures of a chain's outlook: what each stage was planned to take, what its model takes
alone, and what it will have taken at its end.

They are the numbers that `modelchain cost` prints, by the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus
from modelchain.decide.relaxation import acceleration
from modelchain.errors import InputError, WorkError
from modelchain.gate.outlook import Outlook, Taken, added, gpu_seconds_to_come, with_removed
from modelchain.io.load import spec_of, status_of
from modelchain.plan.plan import Plan, plan
from modelchain.report.cost import outlooks_of
from modelchain_operator.api.kube import Object


@dataclass(frozen=True, slots=True)
class TakenFigures:
    """MACs, GPU time in seconds, and money. None means that it is not known."""

    macs: float | None
    gpu_seconds: float | None
    cost: float | None


@dataclass(frozen=True, slots=True)
class StageOutlook:
    """What one stage takes, in four ways."""

    planned: TakenFigures
    # The same model trained alone.
    baseline: TakenFigures
    projected: TakenFigures
    # The GPU time in seconds that is still to come, for the stage and for its model alone, if the
    # gate asks for that. None if it is not known.
    left: float | None


@dataclass(frozen=True, slots=True)
class OutlookFigures:
    """The outlook of one chain."""

    stages: Mapping[str, StageOutlook]
    # Of all stages: what the models take alone, less what the stages take. It may be negative.
    saved: TakenFigures
    # How many times fewer MACs the chain takes than its models alone, by kind: `requested`,
    # `relaxed` or `achieved`.
    accelerations: Mapping[str, float]


def outlook_figures(chain: Object) -> OutlookFigures | None:
    """The outlook of a chain, as the API server returns the chain.

    None if it has no stages in its status yet, or if its spec or its status cannot be read. Its
    other figures are shown all the same.
    """
    if not (chain.get("status") or {}).get("stages"):
        return None
    try:
        status = status_of(chain)
        spec = spec_of(chain, "the chain")
        planned = plan(spec, "analytic", {}, status.epochs)
    except (InputError, WorkError):
        return None
    found = outlooks_of(planned, status)
    trained_alone = spec.spec.gate.train if spec.spec.gate else []
    return OutlookFigures(
        stages={one.name: _of_stage(one, one.name in trained_alone, status) for one in found},
        saved=_amounts(added([one.saved for one in with_removed(found, status)])),
        accelerations=_accelerations(spec, planned, status),
    )


def _of_stage(one: Outlook, trained_alone: bool, status: ChainStatus) -> StageOutlook:
    left = gpu_seconds_to_come(one, status, trained_alone=trained_alone)
    return StageOutlook(
        planned=_amounts(one.planned),
        baseline=_amounts(one.alone),
        projected=_amounts(one.projected),
        left=None if left is None else float(left),
    )


def _amounts(of: Taken) -> TakenFigures:
    return TakenFigures(
        macs=None if of.macs is None else float(of.macs),
        gpu_seconds=None if of.gpu_seconds is None else float(of.gpu_seconds),
        cost=None if of.cost is None else float(of.cost),
    )


def _accelerations(spec: ModelChain, planned: Plan, status: ChainStatus) -> dict[str, float]:
    found = acceleration(spec, planned, status.stages, status.removed)
    kinds = {
        "requested": found.requested,
        "relaxed": found.relaxed,
        "achieved": found.achieved,
    }
    return {kind: float(value) for kind, value in kinds.items() if value is not None}
