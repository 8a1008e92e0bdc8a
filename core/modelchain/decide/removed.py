"""Stages that are no longer in the spec: what they have spent stays in the status.

A renamed stage is a removed one, and a new one that finds the artifact of the removed one. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from modelchain.api.status import MOST_REMOVED, ChainStatus, StageLedger, StageStatus
from modelchain.api.uses import NOT_USED
from modelchain.decide import transitions
from modelchain.decide.observed import Artifact
from modelchain.decide.outcome import Turn, settled


def removed(turn: Turn) -> list[StageLedger]:
    """What is kept of removed stages, the newest at the end. Stages never launched are left out.

    An attempt that still runs is stopped, as no stage wants it, and accounted until it has ended.
    """
    old, names = turn.observed.status, {stage.name for stage in turn.chain.spec.stages}
    known = [*old.removed, *map(transitions.removed, old.stages)]
    left = [_settled(turn, stage) for stage in known if stage.name not in names]
    return _bounded([stage for stage in left if _was_launched(stage)])


def counted_once(old: ChainStatus, stage: StageStatus, found: Artifact, *, alone: bool) -> Artifact:
    """The artifact that a stage has found, without its costs if they are in the ledger already.

    They are if this chain has made it, under this or another name of the stage. They also are if
    another stage, or a removed one, shows them already.

    Args:
        alone: `stage` is a baseline. The first stage's is the same training as that stage.
    """
    others = [*old.stages, *old.removed] if alone else _others(old, stage)
    shown = [other for other in others if other.trained_here or other.macs]
    if found.own or any(found.input_digest in other.digests for other in shown):
        return replace(
            found,
            macs=0,
            lost_macs=0,
            gpu_milliseconds=NOT_USED,
            queue_seconds=0.0,
            cost=None,
            unpriced_seconds=0.0,
        )
    return found


def renamed_from(
    old: ChainStatus, stage: StageStatus, digest_at: Callable[[int], str]
) -> StageLedger | None:
    """The stage whose name this new one had before; None if it was not renamed.

    It was renamed if it has the same inputs with the epochs that the plan allocated to that stage.

    Args:
        digest_at: the new stage's input digest, if it is trained for so many epochs.
    """
    allocated = (other for other in _others(old, stage) if other.frozen and other.epochs)
    return next((o for o in allocated if o.epochs and digest_at(o.epochs) == o.last_digest), None)


def _others(old: ChainStatus, stage: StageStatus) -> list[StageLedger]:
    return [other for other in [*old.stages, *old.removed] if other.name != stage.name]


def _settled(turn: Turn, stage: StageLedger) -> StageLedger:
    # The sum of older ones has no ledger, and neither has a stage that an older version has kept.
    known = stage.trained_here or stage.reused
    return transitions.booked(stage, settled(turn, stage)) if known else stage


def _was_launched(stage: StageLedger) -> bool:
    return bool(stage.attempt_count or stage.frozen or stage.macs or stage.gpu_seconds)


def _bounded(ledgers: list[StageLedger]) -> list[StageLedger]:
    """At most MOST_REMOVED of them by name. The older ones are summed up, unless an attempt of
    theirs has not ended.
    """
    named = [stage for stage in ledgers if stage.name]
    closed = [stage for stage in named if all(a.finished_at for a in stage.attempts)]
    over = closed[: max(0, len(named) - MOST_REMOVED)]
    rest = [*(stage for stage in ledgers if not stage.name), *over]
    kept = [stage for stage in named if stage not in over]
    return [transitions.summed(rest), *kept] if rest else kept
