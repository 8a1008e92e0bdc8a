"""Why a plan knows no GPU hours, or no price."""

from __future__ import annotations

from collections.abc import Mapping

from modelchain.api.spec import RunnerSpec
from modelchain.plan.pools import NodePool

# The law of hours is fitted to this GPU alone.
KNOWN_GPU = "A100"


def why_no_hours(runner: RunnerSpec, pools: Mapping[str, NodePool]) -> str | None:
    """Why the hours of a chain on this runner are not known; None if they are."""
    name = runner.node_pool or ""
    if (why := why_no_pool(runner, pools)) is not None:
        return why
    gpu = pools[name].gpu
    if gpu == KNOWN_GPU:
        return None
    return f"they are known only for {KNOWN_GPU}, and {name} has {gpu}"


def why_no_price(runner: RunnerSpec, pools: Mapping[str, NodePool], now: int) -> str | None:
    """Why an hour on this runner has no price; None if it has one.

    `now` is the moment that counts, in milliseconds since the epoch.
    """
    name = runner.node_pool or ""
    if (why := why_no_pool(runner, pools)) is not None:
        return why
    pool = pools[name]
    if pool.price_list.planned(now) is not None:
        return None
    if not pool.prices:
        return f"node pool {name} has none"
    first = min(pool.prices, key=lambda price: price.begins)
    return f"the first one of node pool {name} holds from {first.valid_from} on"


def why_no_pool(runner: RunnerSpec, pools: Mapping[str, NodePool]) -> str | None:
    """Why the node pool of this runner is not known; None if it is."""
    if runner.kind == "Local":
        return "spec.runner.kind is Local, which has no node pool"
    if runner.node_pool is None:
        return "spec.runner.nodePool is not given"
    if runner.node_pool not in pools:
        known = ", ".join(sorted(pools))
        return f"{runner.node_pool} is no node pool that the plan knows; it knows {known}"
    return None
