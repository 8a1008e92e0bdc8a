"""What GPU time costs: the price of each moment, summed up exactly."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pricelist import SOURCE, dated, per_hour

from modelchain.api.status import Capacity
from modelchain.errors import InputError
from modelchain.io.load import parse
from modelchain.plan.pools import PoolFile
from modelchain.plan.prices import (
    NO_PRICES,
    Held,
    Prices,
    capacity_of,
    kept,
    milliseconds,
    shown,
    total_cost,
)

NOON = milliseconds(datetime(2026, 7, 1, 12, tzinfo=UTC).timestamp())
HOUR = 3_600_000


def at(hours: float) -> int:
    """So many hours after noon."""
    return NOON + round(hours * HOUR)


def test_a_price_change_at_noon() -> None:
    prices = dated(("2026-01-01", "2.00", None), ("2026-07-01T12:00:00Z", "3.00", None))
    bill = prices.bill([Held(at(-2), at(1), gpus=8)])
    assert (bill.cost, bill.priced, bill.sources) == (8 * (2 * 2 + 3), 3 * 8 * HOUR, (SOURCE,))
    assert prices.bill([Held(at(-2), at(1), gpus=8)], since=at(0)).cost == 24


def test_a_zone_is_respected_and_none_means_utc() -> None:
    for text in ("2026-07-01T14:00:00+02:00", "2026-07-01T12:00:00Z", "2026-07-01T12:00"):
        prices = dated((text, "1", None))
        assert prices.bill([Held(at(-1), at(1), gpus=1)]).priced == HOUR, text


def test_hours_before_the_first_price_have_none() -> None:
    bill = dated(("2026-07-01T12:00:00Z", "3.00", None)).bill([Held(at(-2), at(1), gpus=2)])
    assert (bill.cost, bill.priced) == (6, 2 * HOUR)
    assert NO_PRICES.bill([Held(at(0), at(9), gpus=8)]).priced == 0


@pytest.mark.parametrize(
    ("capacity", "cost"), [("Spot", 1 + 1), ("OnDemand", 4 + 5), (None, 4 + 4)]
)
def test_a_price_of_the_capacity_goes_before_one_for_any(
    capacity: Capacity | None, cost: int
) -> None:
    prices = dated(
        ("2026-01-01", "4", None),
        ("2026-01-02", "1", "Spot"),
        ("2026-07-01T12:00:00Z", "5", "OnDemand"),
    )
    assert prices.bill([Held(at(-1), at(1), gpus=1, capacity=capacity)]).cost == cost


def test_time_of_an_unknown_capacity_has_no_price() -> None:
    prices = dated(("2026-01-01", "4", "OnDemand"), ("2026-01-01", "1", "Spot"))
    assert prices.bill([Held(at(0), at(1), gpus=1)]).priced == 0


@st.composite
def lists(draw: st.DrawFn) -> Prices:
    moments = st.integers(-48, 48)
    entries = draw(
        st.dictionaries(
            st.tuples(moments, st.sampled_from(["OnDemand", "Spot", None])),
            st.decimals("0", "99.99", places=4),
            max_size=8,
        )
    )
    return dated(
        *(
            (datetime.fromtimestamp(at(hour) / 1000, UTC).isoformat(), str(price), capacity)
            for (hour, capacity), price in entries.items()
        )
    )


HELD = st.builds(
    lambda start, length, gpus, capacity: Held(
        at(0) + start, at(0) + start + length, gpus, capacity
    ),
    st.integers(-60 * HOUR, 60 * HOUR),
    st.integers(0, 60 * HOUR),
    st.integers(0, 16),
    st.sampled_from(["OnDemand", "Spot", None]),
)


@settings(deadline=None)
@given(lists(), st.lists(HELD, max_size=4), st.integers(-60 * HOUR, 120 * HOUR))
def test_the_sum_over_parts_is_the_sum_over_the_whole(
    prices: Prices, held: list[Held], cut: int
) -> None:
    """Wherever time is cut, the parts cost what the whole does; and each millisecond costs what its
    own price says.
    """
    middle = at(0) + cut
    before = [Held(h.start, min(h.end, middle), h.gpus, h.capacity) for h in held]
    whole, first = prices.bill(held), prices.bill([h for h in before if h.start < h.end])
    rest = prices.bill(held, since=middle)
    assert whole.priced == first.priced + rest.priced
    assert abs(whole.cost - first.cost - rest.cost) < Decimal("1e-20")
    truth = Fraction(0)
    edges = sorted({e.begins for e in prices.entries})
    for one in held:
        cuts = [one.start, *(e for e in edges if one.start < e < one.end), one.end]
        for start, end in pairwise(cuts):
            price = prices.at(start, one.capacity)
            truth += Fraction(price.per_gpu_hour if price else 0) * (end - start) * one.gpus / HOUR
    assert abs(Fraction(whole.cost) - truth) < Fraction(1, 10**30)


def test_money_is_kept_to_a_trillionth_and_shown_to_the_cent() -> None:
    third = per_hour("1.00").bill([Held(0, HOUR // 3, gpus=1)]).cost
    assert kept(third) == "0.333333333333" and shown("0.333333333333") == "0.33"
    assert kept(Decimal(12)) == "12.00" and kept(Decimal("0.5")) == "0.50"
    assert shown("0.005") == "0.01" and shown("1234567.891") == "1234567.89"
    assert total_cost(["0.333333333333"] * 3) == "0.999999999999"
    assert total_cost(["0.10"] * 1000) == "100.00", "the sum is exact, because no float is used"
    assert total_cost(["0.10", None, "0.20"]) == "0.30"
    assert total_cost([None]) is None and total_cost([]) is None
    large = total_cost([f"{10**25}.123456789012", "0.000000000001"])
    assert large == f"{10**25}.123456789013"


@pytest.mark.parametrize("price", ["1e50", "999999999999e99", "1.000000000001e12"])
def test_a_price_beyond_bounds_is_refused_in_one_line(price: str) -> None:
    said = {"perGpuHour": price, "currency": "USD", "source": SOURCE}
    pool = {"gpu": "A100", "gpusPerNode": 8, "price": said}
    with pytest.raises(InputError) as caught:
        parse(PoolFile, {"nodePools": {"lab": pool}}, "pools.yaml")
    assert str(caught.value) == (
        f"pools.yaml: nodePools.lab.price.perGpuHour: must lie between 0 and 1e12 (got {price})"
    )


def test_the_highest_price_of_the_longest_time_has_a_sum() -> None:
    ages = 10**15 * HOUR
    bill = per_hour("1e12").bill([Held(0, ages, gpus=256 * 64)] * 100)
    assert kept(bill.cost) == f"{10**12 * 10**15 * 256 * 64 * 100}.00"


def test_the_words_of_all_clouds() -> None:
    spot, on_demand = ("spot", "SPOT", "preemptible"), ("on-demand", "ON_DEMAND", "standard")
    assert {capacity_of(word) for word in spot} == {"Spot"}
    assert {capacity_of(word) for word in on_demand} == {"OnDemand"}
    assert capacity_of("") is capacity_of(None) is capacity_of("gold") is None


def test_hours_to_come_are_planned_by_the_price_for_any_then_on_demand() -> None:
    both = dated(("2026-01-01", "4", "OnDemand"), ("2026-01-01", "1", "Spot"))
    price, capacity = both.planned(NOON) or (None, None)
    assert price is not None and (price.per_gpu_hour, capacity) == ("4", "OnDemand")
    later: Any = dated(("2026-07-01", "2", None), ("2026-08-01", "9", None)).planned(NOON)
    assert later[0].per_gpu_hour == "2" and dated(("2026-08-01", "9", None)).planned(NOON) is None


def test_equal_lists_have_equal_names() -> None:
    name = dated(("2026-01-01", "4.0", None)).name
    assert name == dated(("2026-01-01T00:00:00Z", "4.00", None)).name != ""
    assert name != dated(("2026-01-01", "4.01", None)).name and NO_PRICES.name == ""
