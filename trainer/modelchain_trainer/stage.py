"""The things a stage trains with, built in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from modelchain.api.contracts import Predecessor, Task
from modelchain_data.batches import Batch
from modelchain_trainer import artifact, growth, models, runtime
from modelchain_trainer.checkpoint import Checkpointer
from modelchain_trainer.hyperparameters import Hyperparameters
from modelchain_trainer.step import Step

GROWTH_PICTURES = 16  # enough to compare the layers of student and predecessor


@dataclass(frozen=True)
class StageParts:
    """The parts are fixed once built; what changes in training are their parameters."""

    student: models.Student
    teacher: torch.nn.Module | None  # the frozen predecessor, unless alpha is 0
    grown: growth.GrowthReport | None  # None for a first stage
    step: Step
    saver: Checkpointer


def build_stage(
    task: Task,
    hyper: Hyperparameters,
    saver: Checkpointer,
    device: torch.device,
    world: int,
    say: Callable[[str], None],
) -> StageParts:
    """A student with its first weights, its teacher, and the step that updates it.

    Raises WorkError (the predecessor's bytes are not those its digest names) and InputError (it
    cannot be grown into this student).
    """
    clip = models.build(hyper.model_config, hyper.seed)
    grown = teacher = teacher_dim = None
    if task.predecessor is not None:
        assert hyper.transfer is not None, "a successor's inputs have `transfer`"
        config, weights = artifact.load_predecessor(task.predecessor)
        grown = growth.grow(clip, weights, hyper.transfer.width, hyper.transfer.depth)
        if hyper.alpha:
            teacher = models.frozen(config, weights, device)
            teacher_dim = config["embed_dim"]
    student = models.Student(clip, teacher_dim).to(device)
    if runtime.compiles(device, Path(task.root) / "cache", say):
        models.compile_layers(student, teacher)
    # The task's micro-batch is one of all ranks together, like its global batch.
    micro_batch = task.micro_batch_size // world if task.micro_batch_size else None
    step = Step(
        student=student,
        teacher=teacher,
        steps=hyper.steps,
        learning_rate=hyper.learning_rate,
        warmup_steps=hyper.warmup_steps,
        weight_decay=hyper.weight_decay,
        precision=hyper.precision,
        seed=hyper.seed,
        alpha=hyper.alpha,
        micro_batch=micro_batch,
    )
    return StageParts(student, teacher, grown, step, saver)


def growth_cosines(
    stage: StageParts, predecessor: Predecessor, batch: Batch
) -> dict[str, list[float]]:
    """How alike the layers of the grown student and its predecessor are, on pictures and captions
    of `batch`; see `growth.agreement`. The predecessor is loaded if it is not the teacher.
    """
    step = stage.step
    teacher = stage.teacher
    if teacher is None:
        teacher = models.frozen(*artifact.load_predecessor(predecessor), step.device)
    piece = step.to_device(batch.pieces(GROWTH_PICTURES)[0])
    # No training step has these shapes: to compile for them takes longer than to run them.
    with step.autocast(), torch.compiler.set_stance("force_eager"):
        return growth.agreement(
            stage.student.clip, teacher, lambda clip: models.Student(clip)(*piece)
        )
