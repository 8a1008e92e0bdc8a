"""Makes the task of one attempt, from the `Launch` of `decide` and the runner's `Placement`."""

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

    # The absolute path of the root, where the attempt writes.
    root: str
    # The path by which the same root is read, for the predecessor's artifact.
    predecessors: str
    # The first part of the name of the attempt's directory. Its number is the second.
    owner: str
    # The file for the last word.
    last_word: str
    data: DataRequest
    # The threads of one process. If None, the trainer divides its cores among its processes.
    threads: int | None
    # The kind of device to compute on.
    device: Literal["cuda", "cpu"]


def task_for(
    chain: ModelChain, epochs: dict[str, int], launch: Launch, placement: Placement
) -> Task:
    """All that the trainer of this attempt needs.

    `epochs` has, by stage, the epochs in the status.
    """
    spec, attempt = chain.spec, launch.attempt
    planned = plan(chain, "analytic", {}, epochs).stages[launch.stage]
    macs = planned.individual.macs if launch.alone else planned.macs
    trained_for = planned.individual.epochs if launch.alone else planned.epochs
    samples = planned.samples // planned.epochs * trained_for
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
        macs_per_step=macs // (samples // spec.recipe.global_batch_size),
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
