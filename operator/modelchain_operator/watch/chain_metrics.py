"""The metrics of whole chains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import Metric

from modelchain.api.status import State
from modelchain.plan.pools import PoolFile
from modelchain_operator.reconcile.figures import Figures
from modelchain_operator.watch.families import (
    CHAIN,
    Sample,
    currency_of,
    each_chain,
    gauge,
    of,
)
from modelchain_operator.watch.places import gpus_of, pool_of

CONDITIONS = (
    "Reconciling",
    "Stalled",
    "Ready",
    "Admitted",
    "Suspended",
    "Complete",
    "Failed",
    "Finished",
    "Measured",
)


def families(chains: Sequence[Figures], config: PoolFile) -> Iterator[Metric]:
    """All metrics that have a chain and no stage, but for those of its outlook."""
    queue = config.defaults.queue_name or ""
    yield gauge(
        "modelchain_info",
        "1 for every chain",
        [*CHAIN, "node_pool", "queue", "runner"],
        [((*of(c), pool_of(c, config), c.queue or queue, c.runner), 1) for c in chains],
    )
    yield gauge(
        "modelchain_condition",
        "1 if a condition of the chain is True, 0 if it is not or is absent",
        [*CHAIN, "condition"],
        [((*of(c), kind), kind in c.true) for c in chains for kind in CONDITIONS],
    )
    yield gauge(
        "modelchain_stages", "Stages of a chain by state", [*CHAIN, "state"], _states(chains)
    )
    yield gauge(
        "modelchain_eta_timestamp_seconds",
        "When the whole chain ends, as projected: the running stage by its trainer, later ones by"
        " their projected GPU time; absent while no stage runs, or if any part is not known",
        CHAIN,
        each_chain(chains, lambda chain: _ends(chain, config)),
    )
    yield from _budgets(chains, config.currency)


def _budgets(chains: Sequence[Figures], currency: str) -> Iterator[Metric]:
    yield gauge(
        "modelchain_budget_cost",
        "spec.budget.cost: the most money that the chain may spend",
        [*CHAIN, "currency"],
        [
            ((*of(c), currency_of(c, currency)), c.budget_cost)
            for c in chains
            if c.budget_cost is not None
        ],
    )
    yield gauge(
        "modelchain_budget_gpu_seconds",
        "spec.budget.gpuHours in seconds: the most GPU time that the chain may spend",
        CHAIN,
        each_chain(chains, lambda chain: chain.budget_gpu_seconds),
    )


def _states(chains: Iterable[Figures]) -> Iterator[Sample]:
    for chain in chains:
        counts = Counter(stage.state for stage in chain.stages)
        yield from (((*of(chain), str(state)), counts[state]) for state in State)


def _ends(chain: Figures, config: PoolFile) -> float | None:
    """When the chain ends, in seconds since the epoch; None if that is not known.

    Stages run one after another. What is left of each divided by its GPUs is its time.
    """
    running = next((stage for stage in chain.stages if stage.state == State.RUNNING), None)
    if running is None or running.times.ends is None or chain.outlook is None:
        return None
    over = {stage.name for stage in chain.stages if stage.state == State.SUCCEEDED}
    time = running.times.ends
    for name in chain.specs.keys() - over - {running.name}:
        outlook, gpus = chain.outlook.stages.get(name), gpus_of(chain, name, config)
        if outlook is None or outlook.left is None or not gpus:
            return None
        time += outlook.left / gpus
    return time
