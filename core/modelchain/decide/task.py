"""The task of one attempt, from what `decide` launches and from where its runner places it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from modelchain.api.contracts import DataRequest, Predecessor, Task
from modelchain.api.spec import ModelChain
from modelchain.decide.observed import Launch
from modelchain.plan.plan import plan


@dataclass(frozen=True)
class Placement:
    """Where and on what an attempt runs, as its runner arranges it on the trainer's machine."""

    root: str  # where the attempt writes: an absolute path
    predecessors: str  # the same root, as artifacts are read from it
    owner: str  # names the attempt's directory, together with its number
    last_word: str  # the file for the termination message
    data: DataRequest
    threads: int | None  # of one process
    device: Literal["cuda", "cpu"]  # what the attempt is to compute on


def task_for(
    chain: ModelChain, epochs: dict[str, int], launch: Launch, placement: Placement
) -> Task:
    """All that the trainer of this attempt needs. `epochs` are those of every stage in
    the status.
    """
    spec, attempt = chain.spec, launch.attempt
    planned = plan(chain, "analytic", {}, epochs).stages[launch.stage]
    return Task(
        chain=chain.metadata.name,
        stage=planned.name,
        model=planned.model,
        attempt=attempt.name,
        input_digest=attempt.input_digest,
        inputs=dict(launch.inputs),
        root=placement.root,
        owner=f"{placement.owner}-a{attempt.number}",
        predecessor=_predecessor(chain, launch, placement.predecessors),
        data=placement.data,
        micro_batch_size=spec.recipe.micro_batch_size,
        checkpoint_seconds=spec.checkpoint.every_seconds,
        macs_per_step=planned.macs // (planned.samples // spec.recipe.global_batch_size),
        threads=placement.threads,
        device=placement.device,
        start_seconds=spec.deadlines.start_seconds,
        stall_seconds=spec.deadlines.stall_seconds,
        last_word=placement.last_word,
    )


def _predecessor(chain: ModelChain, launch: Launch, root: str) -> Predecessor | None:
    artifact = launch.predecessor
    if artifact is None:
        return None
    return Predecessor(
        stage=chain.spec.stages[launch.stage - 1].name,
        input_digest=artifact.input_digest,
        artifact_digest=artifact.digest,
        path=str(PurePosixPath(root) / artifact.path),
    )
