"""What a chain will have taken, and what each of its models would have taken alone. Pure.

GPU time to come is computed from what was measured so far: by a stage's own rate, or by the plan,
corrected by the stage before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

from modelchain.api.status import ChainStatus, Expenses, Planned, StageStatus, State
from modelchain.gate.budget import SECONDS_PER_HOUR
from modelchain.gate.projection import Rate, expected_rate, kept_macs, rate, remaining


@dataclass(frozen=True)
class Taken:
    """MACs, GPU seconds and money. What is None is not known."""

    macs: int | None = None
    gpu_seconds: Decimal | None = None
    cost: Decimal | None = None


NOTHING = Taken(0, Decimal(0), Decimal(0))


@dataclass(frozen=True)
class Outlook:
    """What one stage was planned to take, has taken, and will have taken at its end."""

    name: str
    # None for the sum of stages that are no longer in the spec.
    state: State | None
    planned: Taken
    spent: Taken
    projected: Taken
    # The same model trained alone. It is estimated until such a training has finished here.
    alone: Taken
    estimated: bool

    @property
    def saved(self) -> Taken:
        """By how much the stage takes less than the same model alone."""
        return less(self.alone, self.projected)


def outlooks(status: ChainStatus, planned: Mapping[str, tuple[Planned, Planned]]) -> list[Outlook]:
    """The outlook of each stage of a chain.

    Args:
        planned: by stage, the plan of the stage and of the same model alone, for a stage whose
            status has none yet.
    """
    hour, before = _hour(status), None
    baselines = {row.name: row for row in status.baselines if _is_billed(row)}
    found = []
    for stage in status.stages:
        plan, plan_alone = planned[stage.name]
        plan, plan_alone = stage.plan or plan, stage.alone or plan_alone
        own = rate(stage)
        baseline = baselines.get(stage.name)
        alone = _alone(plan_alone, expected_rate(plan_alone, own, before), hour)
        found.append(
            Outlook(
                name=stage.name,
                state=stage.state,
                planned=_of_plan(plan),
                spent=_spent(stage, hour),
                projected=_projected(stage, plan, own, before, hour),
                alone=alone if baseline is None else taken(baseline),
                estimated=baseline is None,
            )
        )
        before = own or before
    return found


def gpu_seconds_to_come(
    one: Outlook, status: ChainStatus, *, trained_alone: bool
) -> Decimal | None:
    """The GPU time that a stage still takes, with that of its model alone, if the gate asks for it.
    None if it is not known.

    Args:
        status: that of the chain.
        trained_alone: the gate asks for the stage's baseline.
    """
    left = less(one.projected, one.spent).gpu_seconds
    return _plus(left, _to_come_alone(one, status)) if trained_alone else left


def _to_come_alone(one: Outlook, status: ChainStatus) -> Decimal | None:
    baseline = next((row for row in status.baselines if row.name == one.name), None)
    if baseline is not None and baseline.state is State.SUCCEEDED:
        return Decimal(0)
    spent = NOTHING if baseline is None else taken(baseline)
    left = less(one.alone, spent).gpu_seconds
    return None if left is None else max(Decimal(0), left)


def with_removed(found: Sequence[Outlook], status: ChainStatus) -> list[Outlook]:
    """The outlooks of the stages and, if stages have left the spec, one of what those have spent.

    Together they are what the chain takes. A renamed stage has spent under its old name.
    """
    hour = _hour(status)
    spent = added([_spent(stage, hour) for stage in status.removed])
    if not spent.macs:
        return list(found)
    removed = Outlook("removed", None, NOTHING, spent, spent, NOTHING, estimated=False)
    return [*found, removed]


def _is_billed(baseline: StageStatus) -> bool:
    """Whether a baseline has finished and its ledger is all that it took. One that another chain
    has trained costs this chain nothing, which is not what it took.
    """
    return baseline.state is State.SUCCEEDED and baseline.macs > 0


def added(parts: Sequence[Taken]) -> Taken:
    """The sum. What is not known of one part is not known of all."""
    total = NOTHING
    for part in parts:
        total = Taken(
            None if total.macs is None or part.macs is None else total.macs + part.macs,
            _plus(total.gpu_seconds, part.gpu_seconds),
            _plus(total.cost, part.cost),
        )
    return total


def less(one: Taken, other: Taken) -> Taken:
    """What is left of one after the other."""
    minus = Taken(
        None if other.macs is None else -other.macs,
        None if other.gpu_seconds is None else -other.gpu_seconds,
        None if other.cost is None else -other.cost,
    )
    return added([one, minus])


def _plus(one: Decimal | None, other: Decimal | None) -> Decimal | None:
    return None if one is None or other is None else one + other


def taken(ledger: Expenses) -> Taken:
    """What a ledger says was spent."""
    cost = None if ledger.cost is None else Decimal(ledger.cost)
    return Taken(ledger.macs, Decimal(ledger.gpu_milliseconds.total) / 1000, cost)


def _spent(stage: Expenses, hour: Decimal | None) -> Taken:
    """What the stage has taken. Where there is a price, one without GPU time has cost nothing."""
    spent = taken(stage)
    free = spent.cost is None and not spent.gpu_seconds and hour is not None
    return replace(spent, cost=Decimal(0)) if free else spent


def _of_plan(plan: Planned) -> Taken:
    seconds = None if plan.gpu_seconds is None else Decimal(str(plan.gpu_seconds))
    return Taken(plan.macs, seconds, None if plan.cost is None else Decimal(plan.cost))


def _hour(status: ChainStatus) -> Decimal | None:
    """What a GPU hour has cost so far, on average; None without a price."""
    ledgers = [status.total, *status.baselines]
    parts = [taken(one) for one in ledgers if one.cost is not None]
    unpriced = sum(Decimal(str(one.unpriced_seconds)) for one in ledgers)
    total = added(parts)
    if not parts or total.cost is None or total.gpu_seconds is None:
        return None
    priced = total.gpu_seconds - unpriced
    return total.cost * SECONDS_PER_HOUR / priced if priced > 0 else None


def _projected(
    stage: StageStatus, plan: Planned, own: Rate | None, before: Rate | None, hour: Decimal | None
) -> Taken:
    """What the stage will have taken at its end: what it has, and what is left of its work."""
    spent = _spent(stage, hour)
    if stage.state is State.SUCCEEDED:
        return spent
    done = min(Fraction(1), Fraction(kept_macs(stage), plan.macs)) if plan.macs else Fraction(1)
    left = remaining(plan, done, expected_rate(plan, own, before), hour)
    macs = plan.macs * (1 - done)
    return added(
        [
            Taken(spent.macs, spent.gpu_seconds, spent.cost or Decimal(0)),
            Taken(macs.numerator // macs.denominator, left.gpu_seconds, left.cost),
        ]
    )


def _alone(plan: Planned, per_mac: Decimal | None, hour: Decimal | None) -> Taken:
    """What the model takes alone, at the rate of the chain's own stage."""
    left = remaining(plan, Fraction(0), per_mac, hour)
    return Taken(plan.macs, left.gpu_seconds, left.cost)
