"""What an edit of a chain would train, before anything runs: `modelchain plan --against`. Pure.

Each stage is looked up by the code by which a running chain looks it up, so the two agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from modelchain.api import messages
from modelchain.api.artifact import StageArtifactSpec
from modelchain.api.spec import ModelChain, Storage
from modelchain.api.status import ChainStatus, StageStatus
from modelchain.decide.decide import planned_stages
from modelchain.decide.observed import Artifact, Damage, Observed
from modelchain.decide.outcome import Turn
from modelchain.decide.stage import LookedUp, look_up
from modelchain.errors import InputError
from modelchain.identity.digest import differing_fields, digest_of, stage_inputs
from modelchain.plan.plan import plan

# Stands for a predecessor that is still to be trained: no record has its digest.
UNTRAINED = Artifact("0" * 64, f"{'0' * 64}/artifact", macs=0, metrics={})


class Effect(StrEnum):
    """What an edit means for one stage."""

    # Its artifact exists, so nothing is trained.
    HIT = "Hit"
    # It is trained, or goes on being trained, as it would be without the edit.
    AS_BEFORE = "As before"
    # It was trained, and is trained again.
    RETRAINS = "Retrains"
    # It was not in the chain before.
    NEW = "New"


# The effects for which an edit pays.
TRAINS = (Effect.RETRAINS, Effect.NEW)


@dataclass(frozen=True)
class StageChange:
    """What an edit means for one stage, or for the same model trained alone, and why."""

    stage: str
    alone: bool
    effect: Effect
    why: str
    epochs: int


@dataclass(frozen=True)
class Before:
    """A chain as it was before an edit."""

    status: ChainStatus
    # By input digest.
    artifacts: Mapping[str, Artifact]
    inputs: Mapping[str, Mapping[str, Any]]
    # The stages and the baselines that it had.
    stages: frozenset[str]
    baselines: frozenset[str]


def finished(chain: ModelChain) -> Before:
    """A chain as if all that it asks for had been trained. No artifact has its real digest."""
    planned = plan(chain, "analytic", {})
    artifacts: dict[str, Artifact] = {}
    inputs: dict[str, Mapping[str, Any]] = {}
    fingerprint = chain.spec.data.train.fingerprint

    def trained(index: int, epochs: int, before: str | None) -> StageStatus:
        made = stage_inputs(
            chain.spec, index, epochs=epochs, fingerprint=fingerprint, predecessor=before
        )
        digest = digest_of(made)
        inputs[digest] = made
        artifacts[digest] = Artifact(digest, f"{digest}/artifact", macs=0, metrics={})
        stage = chain.spec.stages[index]
        allocated = stage.epochs is None
        return StageStatus(
            name=stage.name,
            epochs=epochs,
            frozen=allocated,
            input_digest=digest,
            last_digest=digest,
        )

    stages: list[StageStatus] = []
    for index, one in enumerate(planned.stages):
        before = stages[-1].input_digest if stages else None
        stages.append(trained(index, one.epochs, before))
    alone = chain.spec.gate.train if chain.spec.gate else []
    baselines = [
        trained(index, one.individual.epochs, None)
        for index, one in enumerate(planned.stages)
        if one.name in alone
    ]
    status = ChainStatus(stages=stages, baselines=baselines)
    return Before(status, artifacts, inputs, _names(stages), _names(baselines))


def recorded(status: ChainStatus, records: Iterable[StageArtifactSpec]) -> Before:
    """A chain as its status and the records on its claim tell."""
    records = list(records)
    artifacts = {
        one.input_digest: Artifact(one.artifact_digest, one.path, one.macs, metrics={})
        for one in records
    }
    inputs = {one.input_digest: one.inputs for one in records}
    return Before(status, artifacts, inputs, _names(status.stages), _names(status.baselines))


def as_found_by(chain: ModelChain, other: ModelChain, before: Before) -> Before:
    """What a chain finds of what `other` was before. For an edit of `other` that is all of it.

    A chain of another name or namespace is no edit: it finds the artifacts of a claim that both
    name, and nothing else.

    Raises:
        InputError: the API server refuses the edit.
    """
    spaces = {chain.metadata.namespace, other.metadata.namespace} - {None}
    if chain.metadata.name == other.metadata.name and len(spaces) < 2:
        _check_storage(chain.spec.storage, other.spec.storage)
        return before
    claims = [one.spec.storage.claim_name if one.spec.storage else None for one in (chain, other)]
    if len(spaces) == 2 or claims[0] is None or claims[0] != claims[1]:
        return Before(ChainStatus(), {}, {}, frozenset(), frozenset())
    return replace(before, status=ChainStatus(), stages=frozenset(), baselines=frozenset())


def _check_storage(after: Storage | None, before: Storage | None) -> None:
    """The rule of the CRD. Raises InputError if it is broken."""
    fixed = {"claim_name", "claim_template"}
    if before is not None and (
        after is None or after.model_dump(include=fixed) != before.model_dump(include=fixed)
    ):
        raise InputError(messages.STORAGE, field="spec.storage")


def _names(stages: Iterable[StageStatus]) -> frozenset[str]:
    return frozenset(stage.name for stage in stages)


def changes(chain: ModelChain, before: Before) -> list[StageChange]:
    """What the spec of `chain` would train, stage by stage; each baseline before its stage."""
    observed = Observed(
        status=before.status,
        artifact=before.artifacts.get,
        attempt=_no_attempt,
        inputs=before.inputs,
        fingerprint=chain.spec.data.train.fingerprint,
    )
    stages, baselines, planned = planned_stages(chain, observed, fresh=True, now=0.0)
    turn = Turn(
        chain,
        index=0,
        observed=observed,
        now=0.0,
        finished=False,
        retried=False,
        stopping=None,
        plan=planned,
        avoid=(),
    )
    return list(_along(turn, stages, baselines, before))


def _no_attempt(name: str) -> Any:
    raise AssertionError(f"an edit is looked at without its attempts, but {name} was asked for")


def _along(
    turn: Turn,
    stages: Iterable[StageStatus],
    baselines: Mapping[str, StageStatus],
    before: Before,
) -> Iterator[StageChange]:
    for index, stage in enumerate(stages):
        turn = replace(turn, index=index)
        if stage.name in baselines:
            row = replace(turn, alone=True, predecessor=None)
            yield _change(row, baselines[stage.name], before.baselines)[0]
        change, artifact = _change(turn, stage, before.stages)
        yield change
        turn = replace(turn, predecessor=artifact or UNTRAINED)


def _change(
    turn: Turn, stage: StageStatus, names: frozenset[str]
) -> tuple[StageChange, Artifact | None]:
    """What happens to one stage, and its artifact if it exists."""
    inputs = look_up(turn, stage)
    epochs = inputs.stage.epochs
    assert epochs is not None

    def of(effect: Effect, why: str) -> StageChange:
        return StageChange(stage.name, turn.alone, effect, why, epochs)

    if isinstance(inputs.found, Artifact):
        return of(Effect.HIT, "its artifact exists"), inputs.found
    if isinstance(inputs.found, Damage):
        return of(Effect.AS_BEFORE, inputs.found.reason.message), None
    if stage.name not in names:
        return of(Effect.NEW, "new in the chain"), None
    if stage.last_digest is None and not stage.attempts:
        return of(Effect.AS_BEFORE, "was never trained"), None
    if inputs.stage.input_digest in {stage.input_digest, *(a.input_digest for a in stage.attempts)}:
        return of(Effect.AS_BEFORE, inputs.miss.message), None
    return of(Effect.RETRAINS, _why(turn, stage, inputs)), None


def _why(turn: Turn, stage: StageStatus, inputs: LookedUp) -> str:
    """Why a stage is trained again. The digest of a predecessor is of no use to a reader."""
    old = turn.observed.inputs.get(stage.last_digest or "")
    if old is None:
        return inputs.miss.message
    changed = differing_fields(old, inputs.inputs)
    own = [field for field in changed if field != "predecessor"]
    return f"{', '.join(own)} changed" if own else "its predecessor is trained again"
