"""What an attempt's GPU time has cost, at the price of each moment. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import floor

from modelchain.api.status import MOST_SOURCES, AttemptStatus, PodTime, Priced
from modelchain.decide.split import held
from modelchain.plan.prices import Charge, Held, Prices, kept, milliseconds, total_cost


@dataclass(frozen=True)
class _Money:
    """What an attempt has cost, and how many milliseconds of its GPU time had a price."""

    before: Priced
    cost: str | None
    milliseconds: int
    sources: list[str]


def with_cost(
    attempt: AttemptStatus,
    before: AttemptStatus,
    prices: Prices,
    summed_up: list[PodTime],
    now: float,
) -> AttemptStatus:
    """The attempt, whose time is accounted until `now`, with what it costs.

    Args:
        attempt: its GPU time is known already.
        before: the attempt as it was last accounted.
        prices: those that hold now.
        summed_up: pods that are no longer listed from now on.
        now: seconds since the epoch.
    """
    earlier = _spent_before(before, prices, now)
    money = _money(attempt, earlier, prices, summed_up, now)
    unpriced = max(0, attempt.gpu_milliseconds.total - money.milliseconds)
    return attempt.changed(
        cost=money.cost,
        unpriced_seconds=unpriced / 1000,
        price_sources=money.sources,
        priced=money.before,
    )


def _money(
    attempt: AttemptStatus, before: Priced, prices: Prices, summed_up: list[PodTime], now: float
) -> _Money:
    """Time that was accounted at earlier prices keeps its cost, and so does that of pods that are
    summed up now.
    """
    since = milliseconds(before.since)
    over = prices.bill(_held(summed_up, now), since)
    before = before.model_copy(
        update={
            "cost": _added(before.cost, over, prices),
            "milliseconds": before.milliseconds + over.priced,
        }
    )
    bill = prices.bill(_held(attempt.pods.values(), now), since)
    sources = dict.fromkeys([*attempt.price_sources, *over.sources, *bill.sources])
    return _Money(
        before,
        _added(before.cost, bill, prices),
        before.milliseconds + bill.priced,
        list(sources)[-MOST_SOURCES:],
    )


def _spent_before(attempt: AttemptStatus, prices: Prices, now: float) -> Priced:
    """What was spent before the present prices held. New prices hold from now on."""
    known = attempt.priced
    if known is not None and known.prices == prices.name:
        return known
    if known is None and attempt.cost is None:
        return Priced(prices=prices.name, since=0.0)
    # An older version did not write until when it had computed the cost.
    since = floor(now) if attempt.accounted_at is None else attempt.accounted_at
    return Priced(
        prices=prices.name,
        since=since,
        cost=attempt.cost,
        milliseconds=attempt.gpu_milliseconds.total - milliseconds(attempt.unpriced_seconds),
    )


def _held(pods: Iterable[PodTime], now: float) -> Iterator[Held]:
    for pod in pods:
        yield Held(*held(pod, now), pod.gpus, pod.capacity)


def _added(cost: str | None, bill: Charge, prices: Prices) -> str | None:
    """A cost with a bill added. Without any price there is none."""
    return total_cost([cost, kept(bill.cost)]) if prices.entries else cost
