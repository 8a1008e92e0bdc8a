"""`modelchain plan --budget`: whether a plan fits into the spec's budget."""

from __future__ import annotations

from decimal import Decimal

from modelchain.api.spec import ChainSpec
from modelchain.errors import InputError, WorkError
from modelchain.gate.budget import SECONDS_PER_HOUR, UNKNOWN, Bill, Excess, excess
from modelchain.plan.plan import IndividualPlan, Plan, StagePlan, summed


def check_budget(spec: ChainSpec, plan: Plan) -> None:
    """Check that all stages, and the models that the gate trains alone, fit into the budget.

    Raises:
        WorkError: they do not.
        InputError: there is no budget, or the plan does not know what it limits.
    """
    limits = spec.budget
    if limits is None:
        raise InputError("is not given, so there is nothing to fit into", field="spec.budget")
    alone = spec.gate.train if spec.gate else []
    parts: list[StagePlan | IndividualPlan] = [
        *plan.stages,
        *(stage.individual for stage in plan.stages if stage.name in alone),
    ]
    total = summed(parts)
    if limits.gpu_hours is not None and total.gpu_hours is None:
        raise InputError(
            "the plan knows no GPU hours of this runner's node pool", field="spec.budget.gpuHours"
        )
    bill = Bill(
        None if total.gpu_hours is None else Decimal(str(total.gpu_hours)) * SECONDS_PER_HOUR,
        None if total.cost is None else Decimal(total.cost),
    )
    found = excess(limits, bill, UNKNOWN, priced=bill.cost is not None)
    if found == "NoPrice":
        raise InputError(
            "the plan knows no price; name the node pools with --pools", field="spec.budget.cost"
        )
    if found is not None and found.needed > found.limit:
        raise WorkError(_too_much(found))


def _too_much(found: Excess) -> str:
    unit = "GPU hours" if found.field == "gpuHours" else "in money"
    return (
        f"the plan needs {found.needed:,.2f} {unit}, and spec.budget.{found.field} allows"
        f" {found.limit:,f}"
    )
