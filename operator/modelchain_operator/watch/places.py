"""Where a chain runs: its node pool, and the GPUs that a stage gets there."""

from __future__ import annotations

from modelchain.errors import InputError
from modelchain.plan.pools import NodePool, PoolFile
from modelchain_operator.reconcile.figures import Figures


def pool_of(chain: Figures, config: PoolFile) -> str:
    """The name of the chain's node pool, or of the default one; empty if there is none."""
    return chain.node_pool or config.defaults.node_pool or ""


def node_pool(chain: Figures, config: PoolFile) -> NodePool | None:
    """The chain's node pool; None if the configuration has none of its name."""
    return config.node_pools.get(pool_of(chain, config))


def gpus_of(chain: Figures, stage: str, config: PoolFile) -> int | None:
    """The GPUs for which a stage asks on all its nodes; None if that cannot be said."""
    pool, spec = node_pool(chain, config), chain.specs.get(stage)
    if pool is None or spec is None:
        return None
    try:
        return spec.nodes * pool.processes(spec.processes) if pool.gpus_per_node else 0
    except InputError:  # the spec asks for more processes than a node has GPUs
        return None
