"""What rounds of relaxation have cost, and what is left of the acceleration, in sentences. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

from modelchain.api.status import Acceleration, ChainStatus, Total
from modelchain.gate.budget import SECONDS_PER_HOUR
from modelchain.plan.prices import shown
from modelchain.report.cost import scientific


def relaxation_lines(status: ChainStatus) -> Iterator[str]:
    """Sentences on the rounds of a chain; none before the first one."""
    relaxation = status.relaxation
    if relaxation is None:
        return
    rounds = f"{relaxation.round} round" + ("s" if relaxation.round > 1 else "")
    yield f"The gate has begun {rounds} of relaxation." + _replaced(status, relaxation.spent)
    if relaxation.acceleration is not None:
        yield f"Acceleration: {_acceleration(relaxation.acceleration)}."


def _replaced(status: ChainStatus, spent: Total | None) -> str:
    """What was spent on epochs that a round has replaced. An older version did not write it."""
    if spent is None or not spent.macs:
        return ""
    amounts = [f"{scientific(spent.macs)} MACs"]
    if spent.gpu_seconds:
        amounts.append(f"{Decimal(spent.gpu_seconds) / SECONDS_PER_HOUR:,.1f} GPU hours")
    if spent.cost:
        amounts.append(f"{Decimal(shown(spent.cost)):,f} {status.currency}")
    return f" What was spent includes {', '.join(amounts)} on models that they have replaced."


def _acceleration(of: Acceleration) -> str:
    """In the words of the status, as far as each is known."""
    requested = f"{of.requested} requested, " if of.requested else ""
    achieved = f", {of.achieved} achieved" if of.achieved else ""
    return f"{requested}{of.relaxed} planned with the epochs of all rounds{achieved}"
