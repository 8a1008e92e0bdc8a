"""The API type of `StageArtifact`: the immutable record of one finished stage."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from modelchain.api.spec import WrittenModel
from modelchain.api.status import EXACT, MOST_SOURCES, Macs, Said
from modelchain.api.uses import NOT_USED, Uses

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$", max_length=64)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$", max_length=16)]
Decimal = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Count = Annotated[int, Field(ge=1, le=EXACT)]


class ArtifactPredecessor(WrittenModel):
    """The artifact that this one was grown from."""

    input_digest: Digest
    artifact_digest: Digest


class StageArtifactSpec(WrittenModel):
    """One finished stage: what it was trained from, where its artifact lies, what it cost."""

    chain: Name = Field(description="the chain that trained it")
    stage: Name
    model: Name = Field(description="its name in Table G, or `inline`")
    input_digest: Digest = Field(
        description="SHA-256 of the resolved inputs; a stage with the same digest is a hit"
    )
    artifact_digest: Digest = Field(description="SHA-256 of the weights")
    manifest_digest: Digest = Field(description="SHA-256 of manifest.json")
    path: Name = Field(description="relative to the claim's root")
    claim_name: Name
    claim_uid: Name = Field(
        alias="claimUID", description="a claim with another UID holds other files"
    )
    image: str = Field(max_length=1024, description="the trainer's image; recorded, not hashed")
    epochs: int = Field(ge=1, le=10_000)
    round: int | None = Field(
        None, ge=1, description="the last round of relaxation that has changed the epochs"
    )
    first_epochs: int | None = Field(
        None, ge=1, le=10_000, description="the epochs before any round of relaxation"
    )
    predecessor: ArtifactPredecessor | None = None
    inputs: dict[str, Any] = Field(
        description="what was hashed, so that a later miss can name what changed"
    )
    trainer_math: int | None = Field(
        None, ge=0, description="version of the trainer's arithmetic; recorded, not hashed"
    )
    steps: int = Field(ge=0)
    macs: Macs
    lost_macs: Macs = Field(0, description="the part of macs that is of no use")
    seconds: float = Field(ge=0)
    gpu_seconds: float = Field(ge=0)
    gpu_milliseconds: Uses = Field(NOT_USED, description="the same time, by its use")
    queue_seconds: float = Field(
        0.0, ge=0, description="for which attempts waited in a queue or for the scheduler"
    )
    cost: Decimal | None = Field(None, description="absent if the pool has no price")
    unpriced_seconds: float = Field(0.0, ge=0, description="the part of gpuSeconds without a price")
    currency: str | None = Field(None, max_length=3, description="of the cost")
    price_sources: list[Said] = Field(
        [], max_length=MOST_SOURCES, description="where the prices come from"
    )
    metrics: dict[str, Decimal] = Field({}, description="in percent, by the name of the evaluation")
    evaluations: dict[str, Key] = Field(
        {}, description="by the name of an evaluation, the digest of what it measured"
    )
    pictures: dict[str, Count] = Field(
        {}, description="by the name of an evaluation, on how many pictures it was measured"
    )
    accuracy: Decimal | None = Field(None, description="the first metric, shown by `kubectl get`")
    attempt: Name = Field(description="the job that trained it")
    finished_at: Name


class LaterMetrics(WrittenModel):
    """What an evaluation measured after the stage had finished."""

    metrics: dict[str, Decimal] = Field(description="in percent, by the name of the evaluation")
    pictures: Count | None = Field(None, description="how many pictures were looked at")
    measured_at: Name
    image: str = Field(max_length=1024, description="the trainer's image that measured")


class StageArtifactStatus(WrittenModel):
    """What becomes known of a stage after it has finished."""

    metrics: dict[str, LaterMetrics] = Field(
        {},
        description="by the digest of what was measured; entries are added and never changed",
    )
    accuracy: Decimal | None = Field(
        None,
        description=(
            "the first metric of the chain that has measured it last, shown by `kubectl get` beside"
            " that of the training"
        ),
    )


class StageArtifact(WrittenModel):
    """The whole object, as an API server keeps it."""

    api_version: Literal["modelchain.dev/v1alpha1"] = "modelchain.dev/v1alpha1"
    kind: Literal["StageArtifact"] = "StageArtifact"
    metadata: dict[str, Any]
    spec: StageArtifactSpec
    status: StageArtifactStatus | None = None


def own_claim(chain: str) -> str:
    """The name of the claim that the operator makes for a chain."""
    return f"{chain}-artifacts"


def claim_of(chain: Mapping[str, Any]) -> str:
    """The name of the claim of a stored chain's artifacts: the one that it names, or its own."""
    storage = chain["spec"].get("storage") or {}
    return str(storage.get("claimName") or own_claim(chain["metadata"]["name"]))


def stage_artifact_name(claim_uid: str, input_digest: str) -> str:
    """The name of the record of these inputs on this claim.

    Chains on different claims may train equal stages, so the inputs alone do not name a record.
    """
    return f"sa-{hashlib.sha256(f'{claim_uid}/{input_digest}'.encode()).hexdigest()[:20]}"


def former_artifact_name(input_digest: str) -> str:
    """The name by which older versions made records, one for equal inputs in a namespace."""
    return f"sa-{input_digest[:20]}"
