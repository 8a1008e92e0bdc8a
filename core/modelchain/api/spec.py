"""The API types of `ModelChain` (modelchain.dev/v1alpha1).

They are strict, every list and text has a limit, and decimals are strings. The CRD is generated
from these types. Rules between fields are in `modelchain.plan.check`, and as CEL in
`modelchain.crd`.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from modelchain.api.messages import (
    NO_LIMIT,
    ONE_CLAIM,
    ONE_MODEL,
    RETRIEVAL,
    UNKNOWN_MODEL,
    ZERO_SHOT,
)
from modelchain.api.modelconfig import ModelConfig
from modelchain.api.zoo import MODELS

API_VERSION = "modelchain.dev/v1alpha1"
KIND = "ModelChain"
BUILT_IN_CLASS_NAMES, BUILT_IN_TEMPLATES = "imagenet", "openai"

_DNS_1035 = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
ChainName = Annotated[str, StringConstraints(pattern=_DNS_1035, max_length=24)]
StageName = Annotated[str, StringConstraints(pattern=_DNS_1035, max_length=16)]
MetricName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([-._a-z0-9]*[a-z0-9])?$", max_length=63)
]
Text = Annotated[str, StringConstraints(min_length=1, max_length=253)]
LongText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
ClaimName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=253)
]
# A name that becomes the value of a label, as those of Kueue's queues and priorities do.
LabelName = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$", max_length=63)
]
DataPath = Annotated[str, StringConstraints(pattern=r"^/", min_length=2, max_length=1024)]
# A decimal has at most 24 characters and a two-digit exponent, since larger numbers could take very
# long to compute with.
DECIMAL = r"^([0-9]{1,12}(\.[0-9]{0,12})?|\.[0-9]{1,12})([eE][-+]?[0-9]{1,2})?$"
DecimalString = Annotated[str, StringConstraints(pattern=DECIMAL, max_length=24)]


class ApiModel(BaseModel):
    """Strict base: unknown keys are errors, nothing is coerced, keys are camelCase as in YAML."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, alias_generator=to_camel, allow_inf_nan=False
    )


class WrittenModel(ApiModel):
    """Base of what we write ourselves. Unlike a spec, it can also be made by Python's names."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)


class Metadata(ApiModel):
    """The metadata of a chain.

    Unknown keys are ignored. An API server adds some, and the output of `kubectl get -o yaml` must
    be a valid chain.
    """

    model_config = ConfigDict(extra="ignore")

    name: ChainName
    namespace: Text | None = None
    labels: dict[Text, str] = {}
    annotations: dict[Text, str] = {}
    uid: str | None = None
    resource_version: str | None = None
    generation: int | None = None
    creation_timestamp: Any = None
    deletion_timestamp: Any = None
    managed_fields: Any = None
    owner_references: Any = None
    finalizers: Any = None

    @model_validator(mode="before")
    @classmethod
    def _name_to_come(cls, metadata: Any) -> Any:
        """Use `generateName` as the name until the API server has made a name from it."""
        if (
            isinstance(metadata, dict)
            and "name" not in metadata
            and isinstance(metadata.get("generateName"), str)
        ):
            return {**metadata, "name": metadata["generateName"].rstrip("-.")}
        return metadata


class Resources(ApiModel):
    """What a stage runs on. A change here never causes a stage to be trained again."""

    nodes: int = Field(1, ge=1, le=256, description="nodes; each runs one pod")
    processes_per_node: int | None = Field(
        None,
        ge=1,
        le=64,
        description="ranks on each node; default: one for each of its GPUs, else 1",
    )


class Stage(ApiModel):
    """One model of the chain: either `model`, a name, or `modelConfig`, in open_clip's format."""

    name: StageName = Field(description="unique in the chain; part of the names of its jobs")
    model: str | None = Field(
        None, max_length=63, description=f"a model of Table G: {', '.join(MODELS)}"
    )
    # The keys inside are those of open_clip's JSON files, and none has a default.
    model_config_: ModelConfig | None = Field(None, alias="modelConfig")
    epochs: int | None = Field(None, ge=1, le=10_000, description="default: allocated by the plan")
    rerun: Text | None = Field(None, description="any new text trains this stage again")
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _one_model(self) -> Stage:
        if (self.model is None) == (self.model_config_ is None):
            raise PydanticCustomError("model", ONE_MODEL)
        if self.model is not None and self.model not in MODELS:
            raise PydanticCustomError(
                "model", UNKNOWN_MODEL, {"name": self.model, "known": ", ".join(MODELS)}
            )
        return self

    @property
    def config(self) -> ModelConfig:
        """The model's config, given or from Table G."""
        if self.model_config_ is not None:
            return self.model_config_
        assert self.model is not None
        return MODELS[self.model].config


class TrainData(ApiModel):
    """The WebDataset shards to train on, and how many samples they hold."""

    shards: DataPath = Field(description="tars in brace notation, under mountPath")
    samples: int = Field(ge=1, le=100_000_000_000, description="number of samples in the shards")
    captions_per_sample: int = Field(
        4, ge=1, le=64, description="captions drawn for each picture, again in each epoch"
    )
    fingerprint: (
        Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$", max_length=64)] | None
    ) = Field(None, description="printed by `modelchain pack`; other data is refused")


class Volume(ApiModel):
    """The claim that holds the data, and where it is mounted."""

    claim_name: ClaimName | None = Field(
        None, description="a claim in the chain's namespace; required on a cluster"
    )
    mount_path: DataPath = Field(
        "/data", description="where the claim is mounted; all paths of the spec lie below"
    )


class Data(ApiModel):
    """The data, and the claim that holds it. All paths lie below its mountPath."""

    train: TrainData
    volume: Volume = Volume()


class Evaluation(ApiModel):
    """One measurement: after every stage, and on the grown weights before the first step."""

    name: MetricName = Field(description="name of the metric")
    kind: Literal["ZeroShot", "Retrieval"] = Field(
        description="top-1 accuracy of a classification, or mean recall at 1 of both directions"
    )
    shards: DataPath = Field(description="tars in brace notation, under mountPath")
    class_names: LongText | None = Field(None, description="`imagenet`, or the path of a JSON list")
    templates: LongText | None = Field(
        None, description="`openai`, or the path of a JSON list with {} for the class"
    )
    every_epochs: int = Field(0, ge=0, le=10_000, description="0: only at the start and at the end")

    @model_validator(mode="after")
    def _kind_needs(self) -> Evaluation:
        both = (self.class_names, self.templates)
        if self.kind == "ZeroShot" and None in both:
            raise PydanticCustomError("evaluation", ZERO_SHOT)
        if self.kind == "Retrieval" and both != (None, None):
            raise PydanticCustomError("evaluation", RETRIEVAL)
        return self

    @property
    def list_files(self) -> dict[str, str]:
        """By field, the paths of JSON lists, without the lists that are built in."""
        lists = {
            "classNames": (self.class_names, BUILT_IN_CLASS_NAMES),
            "templates": (self.templates, BUILT_IN_TEMPLATES),
        }
        return {
            field: path for field, (path, built_in) in lists.items() if path and path != built_in
        }


class WarmupSteps(ApiModel):
    """Steps over which the learning rate rises to its peak."""

    first: int = Field(8000, ge=0, le=10_000_000, description="warm-up steps of the first stage")
    successors: int = Field(
        1000, ge=0, le=10_000_000, description="warm-up steps of each other stage"
    )


class Recipe(ApiModel):
    """How each stage is trained: AdamW, a linear warm-up, then a cosine to 0."""

    baseline_epochs: int = Field(
        ge=1,
        le=10_000,
        description="epochs of a model that is trained alone; also of the first stage",
    )
    global_batch_size: int = Field(
        ge=2, le=1_048_576, description="pictures in one step, over all ranks"
    )
    learning_rate: DecimalString = Field(
        description="peak of the learning rate, a decimal in quotes"
    )
    weight_decay: DecimalString = Field("0.1", description="on matrices only, a decimal in quotes")
    warmup_steps: WarmupSteps = WarmupSteps()
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16 uses autocast")
    seed: int = Field(
        0, ge=0, le=2**31 - 1, description="seeds initialisation, order, crops and captions"
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=1_048_576,
        description="pictures computed at a time: the same loss in less memory",
    )


class Distillation(ApiModel):
    """How a stage learns the features of its predecessor."""

    alpha: DecimalString = Field(
        "500", description="weight of the feature distillation; 0 switches it off"
    )
    convention: Literal["Released", "Equation1"] = Field(
        "Released",
        description=(
            "what alpha multiplies: Released, means as in the authors' code; Equation1, squared"
            " norms as in the paper"
        ),
    )

    def released_alpha(self, dim: int) -> Decimal:
        """alpha as the authors' code uses it.

        The code multiplies alpha by the mean over `dim`, the predecessor's embed_dim, of the
        squared differences, and adds picture and text. Equations 1 and 4 of the paper have squared
        norms, and average over picture and text. We take features of unit length in both cases, as
        the code does. The paper does not say so of Equation 1.
        """
        return (
            Decimal(self.alpha) * dim / 2 if self.convention == "Equation1" else Decimal(self.alpha)
        )

    @property
    def pulls(self) -> bool:
        """Whether predecessors are teachers. Stages are grown from them in any case."""
        return bool(Decimal(self.alpha))


class Transfer(ApiModel):
    """How a stage is grown from its predecessor."""

    width: Literal[
        "Insert",
        "Duplicate",
        "Interpolate",
        "Net2Net",
        "FPI",
        "AKI",
        "LEMON",
        "NetExpand",
        "Released",
    ] = Field("Insert", description="how a tensor is widened; Insert: copied into a corner")
    depth: Literal["Duplicate", "Constant", "Interval"] = Field(
        "Duplicate",
        description="how layers are added; Duplicate: each is repeated",
    )
    distillation: Distillation = Distillation()


class Allocation(ApiModel):
    """How epochs are allocated to stages that give none."""

    target_acceleration: DecimalString | None = Field(
        None,
        description=(
            "how many times fewer MACs than training each model alone; epochs are allocated so"
            " that this is reached"
        ),
    )
    end_ratio: DecimalString = Field(
        "0.625",
        description="allocated epochs of the last stage over those of the second, in quotes",
    )


class Relaxation(ApiModel):
    """How `onMiss: Relax` lengthens the epochs of a stage that missed, and of those after it."""

    factor: DecimalString = Field("1.25", description="factor by which epochs grow in each round")
    max_rounds: int = Field(3, ge=1, le=16, description="most rounds in the whole chain")


class Gate(ApiModel):
    """Compares finished stages with the same models trained alone. A change here never causes a
    stage to be trained again, unless onMiss is Relax.
    """

    metric: MetricName = Field(description="one of evaluation[].name")
    tolerance: DecimalString = Field(
        "0.5", description="points below the baseline that still pass, a decimal in quotes"
    )
    baseline: dict[Text, DecimalString] = Field(
        {},
        max_length=31,
        description="by successor, the metric of the same model trained alone",
    )
    train: list[StageName] = Field(
        default=[],
        max_length=31,
        description="successors whose models are trained alone here, once, to compare with",
    )
    on_miss: Literal["Stop", "Continue", "Relax"] = Field(
        "Stop",
        description=(
            "what follows a miss: successors wait for a person, or go on, or epochs are added"
        ),
    )
    relaxation: Relaxation = Relaxation()


class Budget(ApiModel):
    """The most that a chain may spend. On a laptop it is ignored."""

    cost: DecimalString | None = Field(
        None,
        description="most money, in the currency of the operator's prices, a decimal in quotes",
    )
    gpu_hours: DecimalString | None = Field(
        None, description="most hours of one GPU, a decimal in quotes"
    )
    on_exceed: Literal["Suspend", "Fail"] = Field(
        "Suspend", description="Suspend: the chain waits for a person; Fail: its stage fails"
    )

    @model_validator(mode="after")
    def _has_a_limit(self) -> Budget:
        if self.cost is None and self.gpu_hours is None:
            raise PydanticCustomError("budget", NO_LIMIT)
        return self


class ClaimTemplate(ApiModel):
    """The claim <chain>-artifacts, ReadWriteMany, which the operator creates."""

    storage_class_name: ClaimName | None = Field(
        None, description="default: the one of the cluster"
    )
    size: Annotated[
        str, StringConstraints(pattern=r"^[0-9]{1,12}(\.[0-9]{1,3})?(Ki|Mi|Gi|Ti|Pi|k|M|G|T|P)?$")
    ] = Field(description="room for all checkpoints and models, such as 500Gi")


class Storage(ApiModel):
    """Where checkpoints and models are kept: `claimTemplate` or `claimName`. Neither can be changed
    later.
    """

    claim_template: ClaimTemplate | None = None
    claim_name: ClaimName | None = Field(
        None,
        description="an existing claim; chains that share it train equal first stages once",
    )
    retain: bool = Field(True, description="false: a created claim is deleted with the chain")

    @model_validator(mode="after")
    def _one_claim(self) -> Storage:
        if (self.claim_template is None) == (self.claim_name is None):
            raise PydanticCustomError("storage", ONE_CLAIM)
        return self


class RunnerSpec(ApiModel):
    """Where stages run, and what launches them. A change here never causes a stage to be trained
    again.
    """

    kind: Literal["PyTorchJob", "Local"] = Field(
        "PyTorchJob", description="Local: run by `modelchain run`, not on a cluster"
    )
    node_pool: Text | None = Field(None, description="a node pool of the operator's configuration")
    image: LongText | None = Field(None, description="the trainer's image, with its digest")
    queue_name: LabelName | None = Field(None, description="Kueue's LocalQueue")
    priority_class: LabelName | None = Field(None, description="Kueue's WorkloadPriorityClass")


class Retry(ApiModel):
    """The budgets of each stage. A stage fails when one of them is exceeded."""

    max_retries: int = Field(
        3, ge=0, le=100, description="failures after which a stage is tried again"
    )
    max_disruptions: int = Field(
        50, ge=0, le=10_000, description="disruptions after which a stage resumes"
    )


class Deadlines(ApiModel):
    """How long an attempt may take before it is ended. Time in a queue never counts."""

    start_seconds: int = Field(
        1800,
        ge=1,
        le=604_800,
        description="longest time from the first running pod to the first step",
    )
    stall_seconds: int = Field(1800, ge=1, le=604_800, description="longest time between steps")
    stage_seconds: int | None = Field(
        None, ge=1, le=31_536_000, description="longest running time of all attempts of a stage"
    )


class Checkpoint(ApiModel):
    """When a running stage writes a checkpoint. It also writes one at the end of each epoch and
    before it stops.
    """

    every_seconds: int = Field(60, ge=1, le=86_400, description="time between two checkpoints")


class ChainSpec(ApiModel):
    suspend: bool = Field(False, description="true: stop at a checkpoint; false again: resume")
    stages: list[Stage] = Field(
        min_length=1,
        max_length=32,
        description="the models, smallest first; each is grown from the one before",
    )
    data: Data
    evaluation: list[Evaluation] = Field(
        default=[],
        max_length=16,
        description="what is measured after every stage; the first is shown as accuracy",
    )
    recipe: Recipe
    transfer: Transfer = Transfer()
    allocation: Allocation = Allocation()
    gate: Gate | None = None
    budget: Budget | None = None
    storage: Storage | None = None
    runner: RunnerSpec = RunnerSpec()
    retry: Retry = Retry()
    deadlines: Deadlines = Deadlines()
    checkpoint: Checkpoint = Checkpoint()


class ModelChain(ApiModel):
    """The whole object.

    A `status` in a spec's file is ignored, since the operator or the local runner writes it.
    """

    api_version: Literal["modelchain.dev/v1alpha1"]
    kind: Literal["ModelChain"]
    metadata: Metadata
    spec: ChainSpec
    status: Any = None
