"""The metric of prices: what an hour of one GPU costs now, by node pool."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric

from modelchain.api.status import Capacity
from modelchain.plan.pools import PoolFile
from modelchain.plan.prices import milliseconds
from modelchain_operator.watch.families import Sample, gauge

# The label of a price that is for nodes of any capacity.
ANY = "Any"
_CAPACITIES: tuple[Capacity | None, ...] = (None, "OnDemand", "Spot")


def family(config: PoolFile, now: float) -> Metric:
    """The prices in force at a moment, in seconds since the epoch."""
    return gauge(
        "modelchain_node_pool_gpu_hour_price",
        "What an hour of one GPU costs now, by the operator's configuration; capacity: Any, or of"
        " nodes that are bought in this way",
        ["node_pool", "gpu", "capacity", "currency", "source"],
        _prices(config, milliseconds(now)),
    )


def _prices(config: PoolFile, moment: int) -> Iterator[Sample]:
    for name, pool in config.node_pools.items():
        prices = pool.price_list
        for capacity in _CAPACITIES:
            price = prices.of_capacity(moment, capacity)
            if price is not None:
                labels = (name, pool.gpu, capacity or ANY, price.currency, price.source)
                yield labels, float(price.per_gpu_hour)
