"""The operator's configuration file: node pools with their prices, defaults, settings.

A node pool has what Kubernetes needs to run a pod, so that a chain need not say it. `modelchain
plan --pools` reads the file, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from modelchain.api.spec import ApiModel, DecimalString, LongText, Text
from modelchain.errors import InputError

# Labels, annotations and variables whose names begin so are the operator's own.
OWN_PREFIX = "modelchain.dev/"
OWN_ENV = "MODELCHAIN_"


def _as_text(value: Any) -> Any:
    """A number as a text, since people write `cpu: 96`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


# The pattern has to be innermost. Otherwise the JSON schema, and so the chart's, would lack it.
_Quantity = Annotated[
    str, StringConstraints(pattern=r"^[0-9]{1,12}(\.[0-9]{1,3})?(m|Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?$")
]
_Cores = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,6}(\.[0-9]{1,3}|m)?$")]
Quantity = Annotated[_Quantity, BeforeValidator(_as_text)]
Cores = Annotated[_Cores, BeforeValidator(_as_text)]
Qualified = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?$", max_length=317)
]
LabelValue = Annotated[
    str, StringConstraints(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)
]
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]
ObjectName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)
]
Namespace = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)
]
Image = Annotated[str, StringConstraints(pattern=r"^[^\s@]+@sha256:[0-9a-f]{64}$", max_length=1024)]


_UNITS = {
    "m": 1e-3,
    **{unit: 1000.0**power for power, unit in enumerate("kMGTP", 1)},
    **{f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTP", 1)},
}


def amount(quantity: str) -> float:
    """The number that a quantity of Kubernetes stands for: 0.5 for 500m, 1024 for 1Ki."""
    digits = quantity.rstrip("kKMGTPim")
    return float(digits) * _UNITS.get(quantity.removeprefix(digits), 1.0)


class Price(ApiModel):
    """A price and its source. Without a price no money is shown, as none is assumed."""

    per_gpu_hour: DecimalString
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")]
    source: Text


class Toleration(ApiModel):
    """A toleration, as in a pod."""

    key: Qualified | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _as_the_api_asks(self) -> Toleration:
        if self.operator == "Exists" and self.value is not None:
            raise PydanticCustomError("toleration", "operator Exists takes no value")
        if self.key is None and self.operator != "Exists":
            raise PydanticCustomError(
                "toleration", "give a key, or operator Exists to tolerate every taint"
            )
        if self.toleration_seconds is not None and self.effect != "NoExecute":
            raise PydanticCustomError("toleration", "tolerationSeconds needs effect NoExecute")
        return self


class Topology(ApiModel):
    """Kueue's topology-aware scheduling: the node label that all pods must have, or should have, in
    common.
    """

    required: Qualified | None = None
    preferred: Qualified | None = None

    @model_validator(mode="after")
    def _one_level(self) -> Topology:
        if (self.required is None) == (self.preferred is None):
            raise PydanticCustomError("topology", "give exactly one of required and preferred")
        return self


# The most that the index Job asks for by itself. It has a process for each core, up to 16. They
# take 100 MB each, and 1.7 GB together.
INDEX_CPU, INDEX_MEMORY = "16", "3Gi"


class IndexLimits(ApiModel):
    """What the Job may use that indexes a chain's data before the first GPU is asked for."""

    cpu: Cores | None = Field(None, description=f"default: the pool's `cpu`, at most {INDEX_CPU}")
    memory: Quantity | None = Field(
        None, description=f"default: the pool's `memory`, at most {INDEX_MEMORY}"
    )
    deadline_seconds: int = Field(
        21600, ge=60, le=604800, description="the Job is ended after this time; a retry goes on"
    )


class EvaluationLimits(ApiModel):
    """What the Job may use that measures a metric on a finished artifact."""

    deadline_seconds: int = Field(
        86400, ge=60, le=604800, description="the Job is ended after this time, and starts anew"
    )


class NodePool(ApiModel):
    """One kind of node. Each trainer pod takes one node, and its requests equal its limits.

    A CPU pool has `gpus_per_node` 0: no GPU is requested, and a node runs one process unless the
    stage says otherwise.
    """

    gpu: Text = Field(
        description="the GPU's model, CPU for a CPU pool; GPU hours are planned for A100"
    )
    gpus_per_node: int = Field(ge=0, le=64)
    price: Price | None = None
    gpu_resource: Qualified = "nvidia.com/gpu"
    node_selector: dict[Qualified, LabelValue] = {}
    tolerations: list[Toleration] | None = Field(
        None, description="default: the taint named as the GPU resource"
    )
    cpu: Cores | None = None
    memory: Quantity | None = None
    ephemeral_storage: Quantity | None = None
    extra_resources: dict[Qualified, Quantity] = Field({}, description="such as InfiniBand devices")
    env: dict[EnvName, LongText] = Field({}, description="such as NCCL's settings")
    labels: dict[Qualified, LabelValue] = {}
    annotations: dict[Qualified, LongText] = {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }
    image_pull_secrets: list[ObjectName] = []
    service_account_name: ObjectName | None = None
    priority_class_name: ObjectName | None = None
    scheduler_name: Text | None = None
    runtime_class_name: ObjectName | None = None
    shm_size: Quantity = "8Gi"
    grace_seconds: int = Field(120, ge=30, le=3600, description="longer than a checkpoint takes")
    run_as_user: int | None = Field(
        None, ge=1, description="default: the image's, which must not be root"
    )
    fs_group: int | None = Field(None, ge=1, description="group that owns the artifacts' volume")
    topology: Topology | None = None
    indexing: IndexLimits = IndexLimits()
    evaluating: EvaluationLimits = EvaluationLimits()

    @model_validator(mode="after")
    def _nothing_of_ours(self) -> NodePool:
        for field, names, prefix in (
            ("labels", self.labels, OWN_PREFIX),
            ("annotations", self.annotations, OWN_PREFIX),
            ("env", self.env, OWN_ENV),
        ):
            if taken := [name for name in names if name.startswith(prefix)]:
                raise PydanticCustomError(
                    "taken",
                    "{field}: {name} is set by the operator; leave out what begins with {prefix}",
                    {"field": field, "name": taken[0], "prefix": prefix},
                )
        return self

    def processes(self, asked: int | None) -> int:
        """Processes on one node: as many as the stage asks for, else one for each GPU, else one.

        Raises InputError if the stage asks for more processes than a node has GPUs.
        """
        if asked and self.gpus_per_node and asked > self.gpus_per_node:
            raise InputError(
                f"{asked} is more than the {self.gpus_per_node} GPUs of a node of this pool; use"
                " more nodes instead",
                field="resources.processesPerNode",
            )
        return asked or max(self.gpus_per_node, 1)

    @property
    def cores(self) -> float | None:
        """CPU cores of one node, from `cpu`."""
        return None if self.cpu is None else amount(self.cpu)

    @property
    def pod_tolerations(self) -> list[Toleration]:
        """The pool's tolerations. By default a pod tolerates the taint of GPU nodes."""
        if self.tolerations is not None:
            return self.tolerations
        return [Toleration(key=self.gpu_resource, operator="Exists")] if self.gpus_per_node else []


# The pools if no file is given. A new volume belongs to root. So fsGroup is the group of the
# images' user, who could not write to it otherwise.
DEFAULT_POOLS: Mapping[str, NodePool] = {
    **{
        name: NodePool.model_validate({"gpu": "A100", "gpusPerNode": 8, "fsGroup": 65532})
        for name in ("a100-40gb", "a100-80gb")
    },
    # For the quickstart.
    "cpu": NodePool.model_validate({"gpu": "CPU", "gpusPerNode": 0, "fsGroup": 65532}),
}


class Defaults(ApiModel):
    """What a chain gets if it names none of its own."""

    node_pool: Text | None = None
    image: Image | None = None
    queue_name: ObjectName | None = None


class PoolFile(ApiModel):
    """The whole file."""

    node_pools: dict[Text, NodePool] = Field(default=dict(DEFAULT_POOLS), min_length=1)
    defaults: Defaults = Defaults()
    # The namespaces that the operator serves; all if empty.
    namespaces: list[Namespace] = Field([], json_schema_extra={"uniqueItems": True})
    progress_seconds: int = Field(
        30, ge=5, le=3600, description="how often a running trainer is asked for its progress"
    )

    @model_validator(mode="after")
    def _default_pool_exists(self) -> PoolFile:
        if self.defaults.node_pool is not None and self.defaults.node_pool not in self.node_pools:
            raise PydanticCustomError(
                "default",
                "defaults.nodePool: {name} is not among nodePools",
                {"name": self.defaults.node_pool},
            )
        return self

    @model_validator(mode="after")
    def _one_currency(self) -> PoolFile:
        named = sorted({pool.price.currency for pool in self.node_pools.values() if pool.price})
        if len(named) > 1:
            raise PydanticCustomError(
                "currency",
                "nodePools: prices are in {named}; give them all in one currency, since a chain's"
                " cost is one sum",
                {"named": " and ".join(named)},
            )
        return self

    def pool(self, name: str | None) -> NodePool:
        """The pool that a chain's `runner.nodePool` names, or the default. Raises InputError if
        there is none.
        """
        name = name or self.defaults.node_pool
        known = ", ".join(sorted(self.node_pools))
        if name is None:
            raise InputError(
                f"name one of the operator's node pools: {known}", field="spec.runner.nodePool"
            )
        if name not in self.node_pools:
            raise InputError(
                f"{name} is no node pool of the operator's configuration; it has {known}",
                field="spec.runner.nodePool",
            )
        return self.node_pools[name]
