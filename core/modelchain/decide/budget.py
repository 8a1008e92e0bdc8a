"""Keeps a chain within `spec.budget`: before a launch, and while a stage runs. Pure.

All that the chain has spent counts: stages, removed ones, baselines, and work that was lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction

from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import Budget
from modelchain.api.status import Planned, StageLedger, StageStatus, Total
from modelchain.decide import transitions
from modelchain.decide.ledger import account, total_of
from modelchain.decide.observed import Launch, Seen
from modelchain.decide.outcome import Outcome, Turn, settled, stalled
from modelchain.gate.budget import UNKNOWN, Bill, Excess, excess
from modelchain.gate.projection import expected_rate, rate, remaining
from modelchain.plan.plan import Amount, IndividualPlan, StagePlan
from modelchain.plan.prices import milliseconds


def for_the_budget(turn: Turn, stage: StageStatus) -> Outcome | None:
    """What is spent, with what the stage will still take, does not fit into the budget."""
    limits = _limits(turn)
    why = None if limits is None else _over(turn, stage, limits, projected(turn, stage))
    if limits is None or why is None:
        return None
    if why.code is Code.NO_PRICE or limits.on_exceed == "Suspend":
        return stalled(turn, transitions.idle(stage), why)
    return Outcome(transitions.failed(stage, why, settled(turn, stage)))


def used_up(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Reason | None:
    """Why the attempt must stop: the budget is spent. None if it may go on.

    What its pods have spent until now counts, be it in the status or not.
    """
    limits = _limits(turn)
    if limits is None:
        return None
    now = transitions.with_newest(stage, account(launch.attempt, seen, turn.now))
    return _over(turn, now, limits, UNKNOWN)


def _limits(turn: Turn) -> Budget | None:
    """The budget that holds; None on a laptop."""
    return turn.chain.spec.budget if turn.observed.records else None


def projected(turn: Turn, stage: StageStatus) -> Bill:
    """What the training will still take, from its newest checkpoint."""
    plan = planned(turn)
    known = (rate(one) for one in reversed(turn.observed.status.stages[: turn.index]))
    before = next((one for one in known if one is not None), None)
    price = _price(turn)
    return remaining(plan, _done(turn, stage), expected_rate(plan, rate(stage), before), price)


def planned(turn: Turn) -> Planned:
    """The plan of the training: as a stage of the chain, or as a baseline."""
    stage = _stage_plan(turn)
    return as_planned(stage.individual if turn.alone else stage)


def planned_alone(turn: Turn) -> Planned | None:
    """The plan of the same model trained alone; None for a baseline, which is that."""
    return None if turn.alone else as_planned(_stage_plan(turn).individual)


def as_planned(amount: Amount | StagePlan | IndividualPlan) -> Planned:
    hours = amount.gpu_hours
    seconds = None if hours is None else round(hours * 3600, 3)
    return Planned(macs=amount.macs, gpu_seconds=seconds, cost=amount.cost)


def _stage_plan(turn: Turn) -> StagePlan:
    return turn.plan.stages[turn.index]


def _done(turn: Turn, stage: StageStatus) -> Fraction:
    """The part of the training's steps that its newest checkpoint has."""
    plan = _stage_plan(turn)
    epochs = plan.individual.epochs if turn.alone else plan.epochs
    samples = plan.samples // plan.epochs * epochs
    done = stage.checkpoint_step * turn.chain.spec.recipe.global_batch_size
    return min(Fraction(1), Fraction(done, samples))


def _price(turn: Turn) -> Decimal | None:
    """The price by which hours to come are planned; None if there is none."""
    pool = turn.observed.pool
    found = pool.price_list.planned(milliseconds(turn.now)) if pool else None
    return None if found is None else Decimal(found[0].per_gpu_hour)


def _over(turn: Turn, stage: StageStatus, limits: Budget, more: Bill) -> Reason | None:
    """Why no more may be spent; None if it may.

    Args:
        stage: as it is now. Of all others, what the status says counts.
        more: what is projected of it.
    """
    spent, price = total_of([stage, *_others(turn, stage)]), _price(turn)
    priced = price is not None and not spent.unpriced_seconds
    found = excess(limits, _bill(spent), more, priced=priced)
    if found == "NoPrice":
        return _no_price(stage, spent)
    return None if found is None else _exceeded(turn, stage, found, more)


def _others(turn: Turn, stage: StageStatus) -> Iterator[StageLedger]:
    """All other ledgers of the chain. A stage that returned to the spec is no longer removed."""
    status, names = turn.observed.status, {one.name for one in turn.chain.spec.stages}
    yield from (one for one in status.removed if one.name not in names)
    yield from (one for one in status.stages if turn.alone or one.name != stage.name)
    yield from (one for one in status.baselines if not turn.alone or one.name != stage.name)


def _bill(spent: Total) -> Bill:
    time = Decimal(spent.gpu_milliseconds.total) / 1000
    return Bill(time, None if spent.cost is None else Decimal(spent.cost))


def _no_price(stage: StageStatus, spent: Total) -> Reason:
    missing = "its node pool has no price now"
    if spent.unpriced_seconds:
        missing = f"{spent.unpriced_seconds:.0f} GPU seconds had no price"
    return Reason(Code.NO_PRICE, stage.name, f"spec.budget.cost limits money, and {missing}")


def _exceeded(turn: Turn, stage: StageStatus, found: Excess, more: Bill) -> Reason:
    money = found.field == "cost"
    unit = turn.observed.status.currency or turn.observed.currency if money else "GPU hours"
    needed = found.needed.quantize(Decimal("0.01"), ROUND_CEILING)
    what = "are spent" if more == UNKNOWN else f"will be spent when {stage.name} has finished"
    limit = f"spec.budget.{found.field} allows {found.limit:f}"
    return Reason(Code.BUDGET_EXCEEDED, stage.name, f"{needed} {unit} {what}, and {limit}")
