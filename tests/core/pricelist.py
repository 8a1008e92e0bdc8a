"""Price lists for tests."""

from __future__ import annotations

from modelchain.api.status import Capacity
from modelchain.plan.prices import NO_PRICES, DatedPrice, Price, Prices

SOURCE = "a contract"


def per_hour(price: str | None) -> Prices:
    """One price that has always held, or none."""
    if price is None:
        return NO_PRICES
    return Prices.of(Price(**_said(price)), [])


def dated(*prices: tuple[str, str, Capacity | None]) -> Prices:
    """Prices that hold from a moment on, for one capacity or for any."""
    return Prices.of(
        None,
        [
            DatedPrice(validFrom=since, capacity=capacity, **_said(price))  # type: ignore[call-arg]
            for since, price, capacity in prices
        ],
    )


def _said(price: str) -> dict[str, str]:
    return {"perGpuHour": price, "currency": "USD", "source": SOURCE}
