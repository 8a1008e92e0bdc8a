"""The budget's decision: before a launch, and while a stage runs."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelchain.api.spec import Budget
from modelchain.gate.budget import UNKNOWN, Bill, Excess, excess

AMOUNTS = st.decimals(0, 10**9, places=2)


def budget(**limits: Any) -> Budget:
    return Budget.model_validate(limits)


def bill(hours: float | None, cost: str | None) -> Bill:
    seconds = None if hours is None else Decimal(str(hours)) * 3600
    return Bill(seconds, None if cost is None else Decimal(cost))


@pytest.mark.parametrize(
    ("limits", "spent", "projected", "found"),
    [
        ({"cost": "100"}, bill(9, "60"), bill(1, "40"), None),
        (
            {"cost": "100"},
            bill(9, "60"),
            bill(1, "40.01"),
            Excess("cost", Decimal(100), Decimal("100.01")),
        ),
        ({"cost": "100"}, bill(9, "100"), bill(0, "0"), Excess("cost", Decimal(100), Decimal(100))),
        ({"gpuHours": "10"}, bill(9, None), bill(1, None), None),
        (
            {"gpuHours": "10"},
            bill(9, "1e9"),
            bill(1.5, "1e9"),
            Excess("gpuHours", Decimal(10), Decimal("10.5")),
        ),
        (
            {"gpuHours": "10", "cost": "5"},
            bill(9, "1"),
            bill(2, "1"),
            Excess("gpuHours", Decimal(10), Decimal(11)),
        ),
        ({"gpuHours": "10"}, bill(9, None), UNKNOWN, None),
        ({"gpuHours": "0"}, UNKNOWN, UNKNOWN, Excess("gpuHours", Decimal(0), Decimal(0))),
    ],
)
def test_before_a_launch(
    limits: dict[str, str], spent: Bill, projected: Bill, found: Excess | None
) -> None:
    assert excess(budget(**limits), spent, projected, priced=True) == found


def test_a_limit_in_money_needs_a_price() -> None:
    nothing = bill(0, "0")
    assert excess(budget(cost="1"), nothing, nothing, priced=False) == "NoPrice"
    assert excess(budget(gpuHours="1"), nothing, nothing, priced=False) is None


@given(AMOUNTS, AMOUNTS, AMOUNTS)
def test_what_may_be_launched_may_run(limit: Decimal, spent: Decimal, projected: Decimal) -> None:
    limits = budget(cost=f"{limit:f}")
    before, more = Bill(spent, spent), Bill(projected, projected)
    launched = excess(limits, before, more, priced=True) is None
    runs = excess(limits, before, UNKNOWN, priced=True) is None
    assert launched <= runs
    assert runs == (spent < limit)
    assert launched == (runs and spent + projected <= limit)


@given(AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS)
def test_raising_a_limit_never_forbids(
    limit: Decimal, raised: Decimal, spent: Decimal, projected: Decimal
) -> None:
    before, more = Bill(spent * 3600, None), Bill(projected * 3600, None)
    if excess(budget(gpuHours=f"{limit:f}"), before, more, priced=True) is None:
        higher = budget(gpuHours=f"{limit + raised:f}")
        assert excess(higher, before, more, priced=True) is None
