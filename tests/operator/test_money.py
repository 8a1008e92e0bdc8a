"""What an attempt costs on a cluster: by its node's capacity, at the price of each hour."""

from __future__ import annotations

from typing import Any

import pytest
from podshapes import ended, running, word
from specs import DELETE
from stagelife import Life, launched

from modelchain.api.spec import Evaluation
from modelchain.identity.digest import short_key
from modelchain.io.load import parse
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import NODES, Forbidden

LABEL = "karpenter.sh/capacity-type"
SPOT = {"validFrom": "2026-01-01", "perGpuHour": "1", "capacity": "Spot"}
ON_DEMAND = {"validFrom": "2026-01-01", "perGpuHour": "4", "capacity": "OnDemand"}
HOUR = 3600.0


def config(*prices: dict[str, str], currency: str = "USD") -> PoolFile:
    said = [{"currency": currency, "source": "a contract", **price} for price in prices]
    pool: dict[str, Any] = {"gpu": "A100", "gpusPerNode": 8, "prices": said, "capacityLabel": LABEL}
    return parse(PoolFile, {"nodePools": {"a100-80gb": pool}}, "operator.yaml")


def with_node(life: Life, capacity: str | None) -> Life:
    labels = {LABEL: capacity} if capacity else {}
    life.kube.put(NODES, {"metadata": {"name": "node-0", "labels": labels}})
    return life


def figures(life: Life, seconds: float = 0.0) -> tuple[str | None, float]:
    """The cost and the seconds without a price, of the chain."""
    life.look(seconds)
    total = life.status.total
    assert life.status.summary.cost == (total.cost or "")[:5]
    return total.cost, total.unpriced_seconds


@pytest.mark.parametrize(("capacity", "cost"), [("spot", "8.00"), ("on-demand", "32.00")])
def test_an_hour_costs_what_its_node_costs(capacity: str, cost: str) -> None:
    life = with_node(launched(config=config(SPOT, ON_DEMAND)), capacity)
    life.pods(running(start=0))
    assert figures(life, HOUR) == (cost, 0.0)
    del life.kube.objects[NODES.plural, "node-0"]
    life.restart()
    life.pods(running(start=0))
    assert figures(life, HOUR)[1] == 0.0, "the capacity is known from the status"


@pytest.mark.parametrize("why", ["no label", "no node", "no right"])
def test_an_hour_of_unknown_capacity_has_no_price(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = launched(config=config(SPOT, ON_DEMAND))
    asked = []
    if why == "no label":
        with_node(life, None)
    if why == "no right":
        get = life.kube.get

        async def refused(resource: Any, namespace: str, name: str) -> Any:
            if resource is NODES:
                asked.append(name)
                raise Forbidden("nodes is forbidden")
            return await get(resource, namespace, name)

        monkeypatch.setattr(life.kube, "get", refused)
    life.pods(running(start=0))
    assert figures(life, HOUR) == ("0.00", 8 * HOUR)
    assert len(asked) <= 1, "one question is enough for a while"


def test_without_a_price_by_capacity_no_node_is_read() -> None:
    plain = {key: value for key, value in SPOT.items() if key != "capacity"}
    life = launched(config=config(plain))
    life.pods(running(start=0))
    assert figures(life, HOUR) == ("8.00", 0.0)
    assert not [call for call in life.kube.calls if "nodes" in str(call)]


def test_a_new_price_list_holds_from_now_on_also_after_a_restart() -> None:
    plain = {"validFrom": "2026-01-01", "perGpuHour": "1"}
    life = launched(config=config(plain))
    life.pods(running(start=0))
    assert figures(life, HOUR) == ("8.00", 0.0)
    life.config = config(plain | {"perGpuHour": "3"})
    life.restart()
    assert figures(life) == ("8.00", 0.0), "what was spent is not computed again"
    assert figures(life, HOUR) == ("32.00", 0.0)
    life.config = config({"validFrom": "2030-01-01", "perGpuHour": "9"})
    life.restart()
    assert figures(life, HOUR) == ("32.00", 8 * HOUR)


def test_another_currency_is_never_added() -> None:
    plain = {"validFrom": "2026-01-01", "perGpuHour": "1"}
    life = launched(config=config(plain))
    life.pods(running(start=0))
    assert figures(life, HOUR) == ("8.00", 0.0) and life.status.currency == "USD"
    life.config = config(plain, currency="EUR")
    life.restart()
    assert figures(life, HOUR) == ("8.00", 8 * HOUR) and life.status.currency == "USD"


def test_the_record_says_what_it_cost_in_what_and_by_which_price() -> None:
    first = {"validFrom": "2026-01-01", "perGpuHour": "1", "source": "until one"}
    later = {"validFrom": "2026-09-01T01:00:00Z", "perGpuHour": "3", "source": "from one"}
    life = launched(config=config(first, later))
    life.pods(ended(code=0, start=0, end=1.5 * HOUR, message=word("Succeeded", steps=1, macs=1)))
    life.end_job("Succeeded")
    life.look(2 * HOUR)
    [record] = life.records
    spec = record["spec"]
    assert (spec["cost"], spec["currency"], spec["unpricedSeconds"]) == ("20.00", "USD", 0.0)
    assert spec["priceSources"] == ["until one", "from one"]
    [attempt] = life.status.stages[0].attempts
    assert (attempt.cost, attempt.price_sources) == ("20.00", ["until one", "from one"])


# -- what events say -------------------------------------------------------------------------------

EVALUATION = {"name": "top1", "kind": "Retrieval", "shards": "/data/val.tar"}
PRICE = {"validFrom": "2026-01-01", "perGpuHour": "2.50"}


def trains(life: Life, job: str, at: float, percent: float = 40.0) -> None:
    """An attempt of three hours on 8 GPUs."""
    key = short_key(Evaluation.model_validate(EVALUATION))
    known = {"metrics": {"top1": percent}, "evaluations": {"top1": key}}
    message = word("Succeeded", steps=1, macs=5, **known)
    life.pods(ended(code=0, start=at + 60, end=at + 3 * HOUR, created=at, message=message), job=job)
    life.end_job("Succeeded", job)
    life.look(at + 3 * HOUR + 10 - life.now)


def events_of(life: Life, *, beginning: str) -> list[str]:
    """Without those that only tell that an artifact is still to be checked."""
    told = (text for text in life.said if not text.endswith("its artifact is checked"))
    return [text for text in told if text.startswith(beginning)]


def test_a_finished_stage_says_what_it_has_cost() -> None:
    life = launched(config=config(PRICE))
    trains(life, "vit-vit-t-a1", 100)
    trains(life, "vit-vit-s-a1", 11_000)
    assert events_of(life, beginning="stage vit-t was trained")[0].endswith(
        "; it has cost 60.00 USD, all stages 60.00 USD"
    )
    assert events_of(life, beginning="stage vit-s was trained")[0].endswith(
        "; it has cost 60.00 USD, all stages 120.00 USD"
    )
    life.said.clear()
    life.edit(2, **{"spec.stages[1].rerun": "again"})
    life.look(10)
    life.edit(3, **{"spec.stages[1].rerun": DELETE})
    life.pods()
    life.look(10)
    [kept] = events_of(life, beginning="stage vit-s: unchanged")
    assert "cost" not in kept, "its artifact was there, so nothing was spent"


def test_a_missed_gate_says_what_was_spent_on_it() -> None:
    gate = {"metric": "top1", "baseline": {"vit-s": "50"}}
    changes = {"spec.evaluation": [EVALUATION], "spec.gate": gate}
    life = launched(config=config(PRICE), **changes)
    trains(life, "vit-vit-t-a1", 100)
    trains(life, "vit-vit-s-a1", 11_000, percent=48.5)
    [missed] = events_of(life, beginning="stage vit-s missed its baseline")
    assert missed.endswith("; it has cost 60.00 USD, all stages 120.00 USD")


def test_a_failed_stage_says_what_was_spent_on_it() -> None:
    life = launched(config=config(PRICE))
    message = word("Failed", "UserError", "no such shard")
    life.pods(ended(start=160, end=100 + HOUR, created=100, message=message))
    life.end_job("Failed")
    life.look(100 + HOUR + 10)
    [failed] = events_of(life, beginning="stage vit-t: UserError")
    assert failed.endswith("; it has cost 20.00 USD, all stages 20.00 USD")


def test_a_spent_budget_says_how_much() -> None:
    life = launched(config=config(PRICE), **{"spec.budget": {"cost": "50"}})
    trains(life, "vit-vit-t-a1", 100)
    [stalled] = events_of(life, beginning="stage vit-s: BudgetExceeded")
    assert "USD will be spent" in stalled and "spec.budget.cost allows 50" in stalled


def test_without_a_price_no_money_is_told() -> None:
    life = launched()
    trains(life, "vit-vit-t-a1", 100)
    [trained] = events_of(life, beginning="stage vit-t was trained")
    assert "cost" not in trained
