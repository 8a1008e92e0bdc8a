"""The operator's node-pool file: which GPUs a pool has, and what an hour of one costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, StringConstraints

from modelchain.spec import ApiModel, DecimalString, Text


class Price(ApiModel):
    """Never assumed: money is shown only where somebody named a price and where it comes from."""

    per_gpu_hour: DecimalString
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
    source: Text


class NodePool(ApiModel):
    gpu: Text = Field(description="the GPU's model; GPU hours are planned for A100")
    gpus_per_node: int = Field(ge=1, le=64)
    price: Price | None = None


class PoolFile(ApiModel):
    node_pools: dict[Text, NodePool]


# What a chain may name when no file is given.
DEFAULT_POOLS: Mapping[str, NodePool] = {
    name: NodePool.model_validate({"gpu": "A100", "gpusPerNode": 8}) for name in ("a100-40gb", "a100-80gb")
}
