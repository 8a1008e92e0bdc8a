"""What an attempt costs on a cluster: by its node's capacity, at the price of each hour."""

from __future__ import annotations

from typing import Any

import pytest
from podshapes import ended, running, word
from stagelife import Life, launched

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
