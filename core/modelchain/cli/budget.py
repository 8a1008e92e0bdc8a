"""`modelchain plan --budget`: whether a plan fits into the spec's budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from modelchain.api.spec import ChainSpec
from modelchain.errors import InputError, WorkError
from modelchain.gate.budget import SECONDS_PER_HOUR, UNKNOWN, Bill, Excess, excess
from modelchain.plan.plan import Plan, price_of, summed
from modelchain.plan.pools import NodePool
from modelchain.plan.unknown import why_no_hours, why_no_price


@dataclass(frozen=True)
class KnownPools:
    """The node pools by which a plan was made."""

    pools: Mapping[str, NodePool]
    # Whether they are those of a file.
    given: bool
    # The moment whose prices count, in milliseconds since the epoch.
    now: int


def check_budget(spec: ChainSpec, plan: Plan, known: KnownPools) -> None:
    """Check that all stages, and the models that the gate trains alone, fit into the budget.

    Raises:
        WorkError: they do not.
        InputError: there is no budget, or the plan does not know what it limits.
    """
    limits = spec.budget
    if limits is None:
        raise InputError("is not given, so there is nothing to fit into", field="spec.budget")
    total = summed([*plan.stages, *plan.baselines])
    if limits.gpu_hours is not None and total.gpu_hours is None:
        raise InputError(_no_hours(spec, known), field="spec.budget.gpuHours")
    bill = Bill(
        None if total.gpu_hours is None else Decimal(str(total.gpu_hours)) * SECONDS_PER_HOUR,
        None if total.cost is None else Decimal(total.cost),
    )
    found = excess(limits, bill, UNKNOWN, priced=bill.cost is not None)
    if found == "NoPrice":
        raise InputError(_no_cost(spec, known), field="spec.budget.cost")
    if found is not None and found.needed > found.limit:
        price = price_of(spec, known.pools, known.now)
        raise WorkError(_too_much(found, price[0].currency if price else ""))


def _no_hours(spec: ChainSpec, known: KnownPools) -> str:
    """Why the plan knows no GPU hours, and what to do about it."""
    why = why_no_hours(spec.runner, known.pools)
    advice = _advice(spec, known) if spec.runner.node_pool not in known.pools else ""
    return f"the plan knows no GPU hours of this runner's node pool: {why}{advice}"


def _no_cost(spec: ChainSpec, known: KnownPools) -> str:
    """Why the plan knows no cost, and what to do about it."""
    why = why_no_price(spec.runner, known.pools, known.now)
    if why is None:
        return _no_hours(spec, known)
    return f"the plan knows no price: {why}{_advice(spec, known)}"


def _advice(spec: ChainSpec, known: KnownPools) -> str:
    """To name a file, if the plan has none and the chain names a pool."""
    named = spec.runner.kind != "Local" and spec.runner.node_pool is not None
    return "; name the node pools with --pools" if named and not known.given else ""


def _too_much(found: Excess, currency: str) -> str:
    unit = "GPU hours" if found.field == "gpuHours" else currency
    return (
        f"the plan needs {found.needed:,.2f} {unit}, and spec.budget.{found.field} allows"
        f" {found.limit:,f}"
    )
