"""Whether what a chain has spent, and is about to spend, fits into `spec.budget`. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from modelchain.api.spec import Budget

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Bill:
    """GPU time and money. What is None is not known."""

    gpu_seconds: Decimal | None = None
    cost: Decimal | None = None


# What a stage will still take, if nothing can be said of it, or if it runs already.
UNKNOWN = Bill()


@dataclass(frozen=True)
class Excess:
    """The limit that does not hold, and what would be spent, in the unit of the limit's field."""

    field: Literal["cost", "gpuHours"]
    limit: Decimal
    needed: Decimal


def excess(
    limits: Budget, spent: Bill, projected: Bill, *, priced: bool
) -> Excess | Literal["NoPrice"] | None:
    """Why a chain must not spend more; None if it may.

    Before a launch, what is projected of the stage counts. A projection that is not known is no
    reason against a launch: then only what is spent counts, as for a stage that runs.

    Args:
        limits: the spec's budget.
        spent: what the whole chain has spent, baselines, removed stages and lost work included.
        projected: what is still to be spent on the stage; UNKNOWN if it runs.
        priced: all GPU time so far, and the time to come, has a price.
    """
    if limits.cost is not None and not priced:
        return "NoPrice"
    if limits.cost is not None:
        limit, zero = Decimal(limits.cost), Decimal(0)
        needed = _needed(limit, spent.cost or zero, projected.cost or zero)
        if needed is not None:
            return Excess("cost", limit, needed)
    if limits.gpu_hours is not None:
        limit, zero = Decimal(limits.gpu_hours), Decimal(0)
        before, more = spent.gpu_seconds or zero, projected.gpu_seconds or zero
        needed = _needed(limit * SECONDS_PER_HOUR, before, more)
        if needed is not None:
            return Excess("gpuHours", limit, needed / SECONDS_PER_HOUR)
    return None


def _needed(limit: Decimal, spent: Decimal, projected: Decimal) -> Decimal | None:
    """What would be spent, if that is too much.

    A limit that is just reached is no room for a launch either: the stage would be stopped as soon
    as it runs.
    """
    needed = spent + projected
    return needed if needed > limit or spent >= limit else None
