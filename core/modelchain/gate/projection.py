"""What a training will still take: by what was measured of it, or of the stage before it. Pure.

The plan knows the MACs of a training, and of some GPUs the hours. How long a MAC really takes is
measured by the work that was kept: its GPU time and its MACs, without start-up, stalls and losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from modelchain.api.status import Expenses, Planned, StageStatus
from modelchain.gate.budget import SECONDS_PER_HOUR, UNKNOWN, Bill


@dataclass(frozen=True)
class Rate:
    """GPU seconds for one MAC: as measured, and as planned, if the plan knows the hours."""

    measured: Decimal
    planned: Decimal | None


def rate(stage: StageStatus) -> Rate | None:
    """The rate of the stage's work at its present inputs; None before any of it was told."""
    parts = _at_its_inputs(stage)
    uses = [part.gpu_milliseconds for part in parts]
    worked = sum(use.productive + use.evaluating + use.unsaved for use in uses)
    macs = kept_macs(stage)
    if worked <= 0 or macs <= 0:
        return None
    return Rate(Decimal(worked) / 1000 / macs, planned_rate(stage.plan))


def kept_macs(stage: StageStatus) -> int:
    """The MACs at the stage's present inputs that are not lost."""
    return sum(part.macs - part.lost_macs for part in _at_its_inputs(stage))


def _at_its_inputs(stage: StageStatus) -> list[Expenses]:
    """What was spent at the stage's inputs, also by an earlier chain whose record was found."""
    if not stage.trained_here and not stage.reused:
        return [stage]  # of an older version, which showed the record's cost without a ledger
    digest = stage.last_digest
    going = (a for a in stage.attempts if a.finished_at is None and a.input_digest == digest)
    reused = (at.spent for at in stage.reused if at.input_digest == digest)
    return [stage.trained, *reused, *going]


def planned_rate(plan: Planned | None) -> Decimal | None:
    """GPU seconds for one MAC by the plan; None if it does not know the hours."""
    if plan is None or plan.gpu_seconds is None or not plan.macs:
        return None
    return Decimal(plan.gpu_seconds) / plan.macs


def expected_rate(plan: Planned, own: Rate | None, before: Rate | None) -> Decimal | None:
    """GPU seconds for one MAC of what is left of a training; None if nothing tells.

    Args:
        plan: that of the training.
        own: what was measured of it.
        before: what was measured of the last stage before it.
    """
    planned = planned_rate(plan)
    if own is not None:
        return own.measured
    if before is None:
        return planned
    if planned is None or not before.planned:
        return before.measured
    return planned * before.measured / before.planned


def remaining(plan: Planned, done: Fraction, rate: Decimal | None, hour: Decimal | None) -> Bill:
    """What is still to be spent on a training.

    Args:
        plan: that of the whole training.
        done: the part of its steps that a checkpoint has kept, from 0 to 1.
        rate: GPU seconds for one MAC; None if that is not known.
        hour: the price of a GPU hour; None if there is none.
    """
    if rate is None:
        return UNKNOWN
    macs = plan.macs * (1 - done)
    seconds = rate * macs.numerator / macs.denominator
    return Bill(seconds, None if hour is None else seconds * hour / SECONDS_PER_HOUR)
