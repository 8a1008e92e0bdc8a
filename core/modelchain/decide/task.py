"""The task of one attempt, from what `decide` says to launch. Where things lie is the runner's to
say.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Literal

from modelchain.api.contracts import DataRequest, Predecessor, Task
from modelchain.api.spec import ModelChain
from modelchain.decide.observed import Artifact, Launch
from modelchain.plan.plan import plan


def task_for(
    chain: ModelChain,
    epochs: dict[str, int],
    launch: Launch,
    *,
    root: str,
    predecessors: str,
    owner: str,
    data: DataRequest,
    threads: int | None,
    device: Literal["cuda", "cpu"],
    last_word: str,
) -> Task:
    """All that the trainer of this attempt is told.

    Args:
        epochs: of every stage, as the status holds them.
        root: where the attempt writes; absolute on the trainer's machine.
        predecessors: the root as artifacts are read from it.
        owner: names the attempt's directory, with its number.
        device: what the attempt is to compute on.
        last_word: the file for the termination message.
    """
    spec = chain.spec
    planned = plan(chain, "analytic", {}, epochs).stages[launch.stage]
    steps = planned.samples // spec.recipe.global_batch_size
    before = launch.predecessor
    return Task(
        chain=chain.metadata.name,
        stage=planned.name,
        model=planned.model,
        attempt=launch.attempt.name,
        input_digest=launch.attempt.input_digest,
        inputs=dict(launch.inputs),
        root=root,
        owner=f"{owner}-a{launch.attempt.number}",
        predecessor=_predecessor(spec.stages[launch.stage - 1].name, before, predecessors)
        if before
        else None,
        data=data,
        micro_batch_size=spec.recipe.micro_batch_size,
        checkpoint_seconds=spec.checkpoint.every_seconds,
        macs_per_step=planned.macs // steps,
        threads=threads,
        device=device,
        start_seconds=spec.deadlines.start_seconds,
        stall_seconds=spec.deadlines.stall_seconds,
        last_word=last_word,
    )


def _predecessor(stage: str, artifact: Artifact, root: str) -> Predecessor:
    return Predecessor(
        stage=stage,
        input_digest=artifact.input_digest,
        artifact_digest=artifact.digest,
        path=str(PurePosixPath(root) / artifact.path),
    )
