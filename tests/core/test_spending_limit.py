"""A chain with a budget: what is refused, what is stopped, and how it goes on."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from life import Life, life_of

from modelchain.api.contracts import FailureClass
from modelchain.api.reasons import Code
from modelchain.api.status import StageStatus, State
from modelchain.decide.ledger import total_of
from modelchain.plan.plan import StagePlan, plan

HOUR = 3600.0


def limited(**budget: Any) -> Life:
    return life_of("vit-cc3m", **{"spec.budget": budget})


def part(of: Decimal, times: str) -> str:
    return f"{of * Decimal(times):.3f}"


def first(life: Life) -> StageStatus:
    return life.status.stages[0]


def plans(life: Life) -> list[StagePlan]:
    pools = {life.chain.spec.runner.node_pool or "": life.pool}
    return plan(life.chain, "analytic", pools).stages


def works(life: Life, hours: float) -> None:
    """The live attempt trains at the planned rate, tells of it and writes a checkpoint."""
    assert life.live is not None
    run = life.runs[life.live]
    planned = next(one for one in plans(life) if one.name == run.stage)
    steps, macs = life.planned(run.stage)
    assert planned.gpu_hours is not None
    more = int(steps * hours * 8 / planned.gpu_hours)
    run.step, run.macs, life.now = run.step + more, run.macs + more * macs, life.now + hours * HOUR
    run.told = run.told.model_copy(update={"productive": int(1000 * hours * HOUR)})
    run.saved_macs = run.macs


def stops(life: Life) -> None:
    """The attempt that was asked to stop has written its checkpoint."""
    assert life.live is not None and life.runs[life.live].stopped
    life.end(FailureClass.PREEMPTED)
    life.reconcile()


def condition(life: Life, kind: str) -> tuple[str, str]:
    found = life.status.condition(kind)
    assert found is not None and found.status == "True"
    return found.reason, found.message


@pytest.mark.parametrize("limit", ["cost", "gpuHours"])
def test_a_launch_that_does_not_fit_is_refused(limit: str) -> None:
    needed = plans(limited(gpuHours="0"))[0]
    enough = Decimal(needed.cost or 0) if limit == "cost" else Decimal(needed.gpu_hours or 0)
    life = limited(**{limit: part(enough, "0.999")})
    life.reconcile()
    assert not life.runs and first(life).stalled and first(life).state is State.PENDING
    assert first(life).code is Code.BUDGET_EXCEEDED
    reason, message = condition(life, "Stalled")
    assert reason == Code.BUDGET_EXCEEDED and f"spec.budget.{limit}" in message
    life.edit(**{f"spec.budget.{limit}": part(enough, "1.001")})
    life.reconcile()
    assert len(life.runs) == 1 and not first(life).stalled


def test_a_budget_that_is_spent_stops_the_stage_at_a_checkpoint() -> None:
    life = limited(gpuHours="1000")
    life.reconcile()
    works(life, 10)
    life.reconcile()
    life.edit(**{"spec.budget": {"gpuHours": "100"}})
    life.reconcile()
    assert life.live is not None and not life.runs[life.live].stopped
    life.now += 3 * HOUR
    life.reconcile()
    stops(life)
    [attempt] = first(life).attempts
    assert attempt.state is State.SUSPENDED and (first(life).retries, life.live) == (0, None)
    assert first(life).code is Code.BUDGET_EXCEEDED and first(life).stalled
    assert first(life).checkpoint_step == life.runs[attempt.name].step > 0
    life.reconcile()
    assert len(life.runs) == 1, "it waits"
    life.edit(**{"spec.budget": {"gpuHours": "1000"}})
    life.reconcile()
    assert life.live is not None and first(life).attempt_count == 2
    assert (first(life).retries, first(life).disruptions) == (0, 0)


def test_a_budget_that_is_removed_lets_the_stage_go_on() -> None:
    life = limited(gpuHours="0")
    life.reconcile()
    assert not life.runs
    del life.body["spec"]["budget"]
    life.edit()
    life.reconcile()
    assert len(life.runs) == 1


def test_what_is_left_is_less_after_a_checkpoint() -> None:
    """A stage of which nothing but the rest fits is not refused."""
    hours = Decimal(plans(limited(gpuHours="0"))[0].gpu_hours or 0)
    life = limited(gpuHours=part(hours, "1.1"))
    life.reconcile()
    works(life, float(hours) / 8 / 2)
    life.end(FailureClass.PREEMPTED)
    life.reconcile()
    life.now += HOUR
    life.reconcile()
    assert first(life).attempt_count == 2, "half is spent and half is left"


def test_a_stage_fails_if_the_budget_says_so() -> None:
    life = limited(gpuHours="1", onExceed="Fail")
    life.reconcile()
    assert first(life).state is State.FAILED and not life.runs
    assert "BudgetExceeded" in condition(life, "Failed")[1]
    assert first(life).code is Code.BUDGET_EXCEEDED
    life.edit(**{"spec.budget": {"gpuHours": "100000", "onExceed": "Fail"}})
    life.reconcile()
    assert len(life.runs) == 1 and first(life).state is not State.FAILED


@pytest.mark.parametrize("consequence", ["Suspend", "Fail"])
def test_money_without_a_price_waits_for_a_person(consequence: str) -> None:
    life = limited(cost="100000", onExceed=consequence)
    life.price = None
    life.reconcile()
    assert not life.runs and first(life).stalled and first(life).code is Code.NO_PRICE
    life.price = "2.21"
    life.reconcile()
    assert len(life.runs) == 1


def test_an_hour_without_a_price_stops_the_stage() -> None:
    life = limited(cost="100000")
    life.reconcile()
    life.price = None
    works(life, 1)
    life.reconcile()
    stops(life)
    assert first(life).stalled and first(life).code is Code.NO_PRICE
    life.price = "2.21"
    life.reconcile()
    assert life.live is None, "what had no price is still unknown"
    life.edit(**{"spec.budget": {"gpuHours": "100000"}})
    life.reconcile()
    assert life.live is not None


def test_removed_stages_and_lost_work_count() -> None:
    life = limited(gpuHours="100000")
    life.reconcile()
    life.now += 10 * HOUR
    life.end(FailureClass.KILLED)
    life.reconcile()
    life.edit(**{"spec.stages[0].name": "other"})
    life.reconcile()
    [gone] = life.status.removed
    assert gone.gpu_seconds == pytest.approx(80 * HOUR, abs=8)
    life.edit(**{"spec.budget": {"gpuHours": "80"}})
    life.reconcile()
    assert life.live is None or life.runs[life.live].stopped


def test_the_plan_is_frozen_at_the_first_launch() -> None:
    life = limited(gpuHours="100000")
    life.reconcile()
    known, alone = first(life).plan, first(life).alone
    planned = plans(life)[0]
    assert known is not None and alone is not None
    assert (known.macs, known.cost) == (planned.macs, planned.cost)
    assert known.gpu_seconds == pytest.approx((planned.gpu_hours or 0) * HOUR, abs=1e-3)
    assert (alone.macs, alone.cost) == (planned.individual.macs, planned.individual.cost)
    before = life.status.stages[1].plan
    assert before is not None and before.cost == plans(life)[1].cost
    life.price = "4.42"
    life.end(FailureClass.PREEMPTED)
    life.reconcile()
    life.now += HOUR
    life.reconcile()
    assert first(life).attempt_count == 2 and first(life).plan == known
    after = life.status.stages[1].plan
    assert after is not None and after.cost == plans(life)[1].cost != before.cost, (
        "it is not launched, and has the plan of now"
    )


def test_a_stage_is_stopped_within_one_look() -> None:
    """At any moment at which the budget may run out."""
    for extra in (0, 1, 7, 29):
        life = limited(gpuHours="1000")
        life.reconcile()
        life.edit(**{"spec.budget": {"gpuHours": "16"}})
        life.now += 2 * HOUR - extra
        for _ in range(2):
            if life.live is not None and not life.runs[life.live].stopped:
                life.now += life.poll_seconds
                life.reconcile()
        assert life.live is not None and life.runs[life.live].stopped
        spent = total_of([*life.status.stages]).gpu_seconds
        assert spent <= 16 * HOUR + 8 * (life.poll_seconds + 1), extra
