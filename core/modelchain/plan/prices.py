"""What GPU time costs: the dated prices of a node pool, and their sum over time.

Money is a decimal. It is kept to a trillionth of the currency's unit and rounded only where it is
shown: the price of an hour, divided into milliseconds, has no exact decimal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Context, Decimal
from functools import cached_property
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from modelchain.api import messages
from modelchain.api.spec import ApiModel, DecimalString, Text
from modelchain.api.status import Capacity

# The digits of a sum of money: more than any ledger needs.
_EXACT = Context(prec=60)
_KEPT, _CENT = Decimal("1e-12"), Decimal("0.01")
_HOUR = Decimal(3_600_000)
# The most that an hour may cost, so that every sum of money fits into these digits.
_MOST = "1e12"


def _as_text(value: Any) -> Any:
    """A time as a text: YAML reads one without quotes as a date or a time of its own."""
    return value.isoformat() if isinstance(value, date) else value


def _a_time(text: str) -> str:
    try:
        datetime.fromisoformat(text)
    except ValueError as error:
        raise PydanticCustomError(
            "time", "is no time; write it as 2026-07-01T12:00:00Z, or 2026-07-01 for midnight UTC"
        ) from error
    return text


Time = Annotated[
    Annotated[str, StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}", max_length=40)],
    BeforeValidator(_as_text),
    AfterValidator(_a_time),
]


def _a_price(text: str) -> str:
    if Decimal(text) > Decimal(_MOST):
        values = {"low": "0", "high": _MOST, "text": text}
        raise PydanticCustomError("range", messages.RANGE, values)
    return text


class Price(ApiModel):
    """A price and its source. Without a price no money is shown, as none is assumed."""

    per_gpu_hour: Annotated[DecimalString, AfterValidator(_a_price)]
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
    source: Text


class DatedPrice(Price):
    """A price that holds from a moment on, until a later one of the same capacity does."""

    valid_from: Time = Field(description="such as 2026-07-01T12:00:00Z; without a zone it is UTC")
    capacity: Capacity | None = Field(
        None, description="only for nodes of this capacity, by the pool's capacityLabel"
    )

    @property
    def begins(self) -> int:
        """When it begins to hold, in milliseconds since the epoch."""
        time = datetime.fromisoformat(self.valid_from)
        return milliseconds((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp())


@dataclass(frozen=True)
class Held:
    """For how long one pod held GPUs, in milliseconds since the epoch."""

    start: int
    end: int
    gpus: int
    capacity: Capacity | None = None


@dataclass(frozen=True)
class Charge:
    """What GPU time costs."""

    cost: Decimal = Decimal(0)
    # The part of the GPU time that had a price, in milliseconds.
    priced: int = 0
    # Where its prices come from, in the order of their use.
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Entry:
    """One price of a list: since when, for what, and how much."""

    begins: int
    capacity: Capacity | None
    price: Price

    @property
    def says(self) -> tuple[Any, ...]:
        return self.begins, self.capacity, Decimal(self.price.per_gpu_hour).normalize()


# A price without a date has always held.
_ALWAYS = -(10**18)


@dataclass(frozen=True)
class Prices:
    """The prices of one node pool, sorted by their beginning."""

    entries: tuple[_Entry, ...] = ()

    @classmethod
    def of(cls, always: Price | None, dated: Iterable[DatedPrice]) -> Prices:
        entries = [_Entry(price.begins, price.capacity, price) for price in dated]
        if always is not None:
            entries.append(_Entry(_ALWAYS, None, always))
        return cls(tuple(sorted(entries, key=lambda entry: entry.begins)))

    @cached_property
    def name(self) -> str:
        """A short hash, equal for lists of the same prices; empty without a price."""
        if not self.entries:
            return ""
        said = str([(e.price.currency, *map(str, e.says)) for e in self.entries])
        return hashlib.sha256(said.encode()).hexdigest()[:12]

    def at(self, moment: int, capacity: Capacity | None) -> Price | None:
        """The price that holds at a moment: the newest for the capacity, else the newest that is
        for any. None if there is neither.
        """
        return self.of_capacity(moment, capacity) or self.of_capacity(moment, None)

    def of_capacity(self, moment: int, capacity: Capacity | None) -> Price | None:
        """The newest price that holds at a moment and was given for just this capacity; with None,
        for any. None if there is none.
        """
        begun = (e for e in self.entries if e.begins <= moment and e.capacity == capacity)
        return next((entry.price for entry in reversed(list(begun))), None)

    def planned(self, moment: int) -> tuple[Price, Capacity | None] | None:
        """The price by which hours to come are planned, and the capacity that it is for.

        It is the one for any capacity; without one that for on-demand nodes, then for spot nodes.
        """
        choices: tuple[Capacity | None, ...] = (None, "OnDemand", "Spot")
        found = ((self.at(moment, capacity), capacity) for capacity in choices)
        return next(((price, what) for price, what in found if price is not None), None)

    def bill(self, held: Iterable[Held], since: int = _ALWAYS) -> Charge:
        """What GPU time costs, of which the part before `since` is left out."""
        amount = Decimal(0)
        priced = 0
        sources: dict[str, None] = {}
        for one in held:
            for start, end in self._parts(max(one.start, since), one.end):
                price = self.at(start, one.capacity)
                if price is not None:
                    time = (end - start) * one.gpus
                    more = _EXACT.multiply(Decimal(time), Decimal(price.per_gpu_hour))
                    amount, priced = _EXACT.add(amount, more), priced + time
                    sources |= {price.source: None} if time else {}
        return Charge(_EXACT.divide(amount, _HOUR), priced, tuple(sources))

    def _parts(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The time from `start` to `end`, divided where a price begins to hold."""
        if start >= end:
            return
        ends = sorted({end, *(e.begins for e in self.entries if start < e.begins < end)})
        yield from zip([start, *ends[:-1]], ends, strict=True)


NO_PRICES = Prices()


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def kept(amount: Decimal) -> str:
    """Money as a text that is stored: to a trillionth, with at least two decimals."""
    text = f"{amount.quantize(_KEPT, ROUND_HALF_EVEN, _EXACT):f}".rstrip("0")
    whole, _, decimals = text.partition(".")
    return f"{whole}.{decimals:0<2}"


def shown(cost: str) -> str:
    """Money as it is shown: to the cent."""
    return f"{Decimal(cost).quantize(_CENT, ROUND_HALF_UP, _EXACT):f}"


def total_cost(costs: Iterable[str | None]) -> str | None:
    """The sum of the costs that are known; None if none is."""
    known = [Decimal(cost) for cost in costs if cost is not None]
    if not known:
        return None
    total = Decimal(0)
    for cost in known:
        total = _EXACT.add(total, cost)
    return kept(total)


def capacity_of(label: str | None) -> Capacity | None:
    """The capacity that the value of a node's label names, in the words of any cloud; None if it
    names none.
    """
    word = (label or "").lower().replace("-", "").replace("_", "")
    if word in ("spot", "preemptible"):
        return "Spot"
    return "OnDemand" if word in ("ondemand", "standard", "regular", "reserved") else None
