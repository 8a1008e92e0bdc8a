"""Pieces of PromQL, of which every query of a dashboard is made.

Two replicas of the operator may report the same chain while the Lease changes hands. So a gauge is
taken once of all of them, and a counter is read from the recording rules, which do the same.
"""

from __future__ import annotations

CURRENCY = "USD"  # in the files; Helm puts the chart's currency in its place
IN_CURRENCY = f'currency="{CURRENCY}"'
CHAIN = "namespace, chain"
STAGE = "namespace, chain, stage"
RATE = "$__rate_interval"
RANGE = "$__range"

# Recording rules: what each stage has spent, whichever replica led.
COST = "namespace_chain_stage_source_currency:modelchain_stage_cost:max"
GPU_SECONDS = "namespace_chain_stage_source_use:modelchain_stage_gpu_seconds:max"
MACS_SPENT = "namespace_chain_stage_source:modelchain_stage_macs:max"
MACS_LOST = "namespace_chain_stage_source:modelchain_stage_lost_macs:max"
QUEUE_SECONDS = "namespace_chain_stage_source:modelchain_stage_queue_seconds:max"
RETRIES = "namespace_chain_stage_class:modelchain_stage_retries:max"

# What this chain's own attempts have spent. It begins at 0, so `increase` counts all of it.
TRAINED = 'source="trained"'


def series(name: str, *matchers: str) -> str:
    """The series of the chains that are selected in the dashboard."""
    chosen = ('namespace=~"$namespace"', 'chain=~"$chain"', *matchers)
    return f"{name}{{{', '.join(chosen)}}}"


def gauge(name: str, *matchers: str) -> str:
    """A gauge of the selected chains, once of all replicas and pods that report it."""
    return f"max without (instance, pod) ({series(name, *matchers)})"


def total(expression: str, by: str = "") -> str:
    return f"sum by ({by}) ({expression})" if by else f"sum({expression})"


def growth(counter: str, *matchers: str, by: str, over: str = RANGE) -> str:
    """By how much a counter of the selected chains has grown, summed by some labels."""
    return total(f"increase({series(counter, *matchers)}[{over}])", by)


def projected_cost() -> str:
    """What each stage will have cost; of baselines and removed stages, what they have cost so far.
    The budget counts both, and so does the alert ModelChainProjectedOverBudget.
    """
    stages = f"max by ({STAGE}) ({series('modelchain_stage_projected_cost', IN_CURRENCY)})"
    return f"({stages} or {total(series(COST, IN_CURRENCY), STAGE)})"


def of_trainers(expression: str) -> str:
    """Series of trainers, where those of `vit-s` that the gate trains alone get the stage `vit-s
    alone`, as the operator calls it. Their pods have the stage `vit-s` and the role `baseline`.
    """
    marked = f'label_replace({expression}, "alone", " alone", "role", "baseline")'
    return f'label_join({marked}, "stage", "", "stage", "alone")'


def rate(counter: str, *matchers: str, by: str = f"{STAGE}, role") -> str:
    """A second, of a counter of the trainers of the selected chains."""
    return total(f"rate({series(counter, *matchers)}[{RATE}])", by)


def in_pools(expression: str) -> str:
    """The expression's series with the label `node_pool`: all stages of a chain share the pool that
    the chain has at that moment. Two replicas may know different pools; then it is one of them.
    """
    known = f"max by ({CHAIN}, node_pool) ({series('modelchain_info')})"
    pools = f"topk by ({CHAIN}) (1, {known})"
    return f"{expression} * on ({CHAIN}) group_left (node_pool) {pools}"


def burn_rate(by: str = "") -> str:
    """Money an hour: the GPUs held now, at the highest price in force of their pools."""
    price = f"max by (node_pool) (modelchain_node_pool_gpu_hour_price{{{IN_CURRENCY}}})"
    held = in_pools(gauge("modelchain_stage_allocated_gpus"))
    return total(f"{held} * on (node_pool) group_left () {price}", by)


def done() -> str:
    """MACs of the steps that are done, of each stage."""
    return f"{gauge('modelchain_stage_planned_macs')} * {gauge('modelchain_stage_progress_ratio')}"


def time_left() -> str:
    """Seconds until the last of the selected chains ends; nothing if that is not known."""
    return f"clamp_min(max({series('modelchain_eta_timestamp_seconds')}) - time(), 0)"


def quantile(part: float, histogram: str, selected: str, by: str = "", over: str = RATE) -> str:
    """A quantile of a histogram of the operator."""
    labels = f"le, {by}" if by else "le"
    buckets = f"rate({histogram}_bucket{{{selected}}}[{over}])"
    return f"histogram_quantile({part:g}, {total(buckets, labels)})"
