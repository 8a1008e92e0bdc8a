"""All data of a chain, opened and checked before its first step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path

from modelchain.api.contracts import DataRequest, TaskEvaluation
from modelchain.errors import InputError
from modelchain.identity.shards import paths
from modelchain_data.build import Progress
from modelchain_data.index import (
    ShardSet,
    check_labels,
    check_pictures,
    check_training,
    open_set,
)
from modelchain_data.prompts import class_names, prompt_templates

SECONDS = 3.0  # between two lines of progress


class IndexingLine:
    """Prints the progress of indexing and the time left to standard error, every few seconds."""

    def __init__(self) -> None:
        self.started = self.said = time.monotonic()

    def __call__(self, done: int, all_: int) -> None:
        now = time.monotonic()
        if now - self.said > SECONDS:
            self.said = now
            left = timedelta(seconds=round((now - self.started) / done * (all_ - done)))
            print(f"indexing shards: {done} of {all_}, {left} left", file=sys.stderr, flush=True)


def open_data(
    request: DataRequest,
    note: Callable[[str], None] = lambda _: None,
    on_progress: Progress = lambda *_: None,
    check: bool = True,
) -> tuple[ShardSet, list[tuple[TaskEvaluation, ShardSet]]]:
    """Open the training and evaluation shards. Missing indexes are built in `request.index`.
    Without `check` indexes that are there are used unread.

    Raises:
        InputError: the data contradicts the spec; with file and field.
    """
    train = request.train
    shards = [Path(file) for file in paths(train.files)]
    train_set = open_set(shards, Path(request.index), on_progress, check)
    if train.fingerprint is not None and train.fingerprint != train_set.fingerprint:
        message = (
            f"is {train.fingerprint}, but these shards have {train_set.fingerprint}: not the data"
            " this was written for"
        )
        raise InputError(message, file=request.file, field="spec.data.train.fingerprint")
    check_pictures(train_set, train.samples // 1000, request.file, "spec.data.train.shards")
    scarce = check_training(train_set, train.samples, train.captions_per_sample, request.file)
    if bare := len(train_set.without_caption):
        note(
            f"{bare} of {train.samples} samples have no caption and are left out; the next in order"
            " stand in for them"
        )
    if scarce:
        note(
            f"{scarce} samples have fewer than {train.captions_per_sample} captions; theirs are"
            " drawn with replacement"
        )
    return train_set, open_evaluations(request, check)


def open_evaluations(
    request: DataRequest, check: bool = True, only: Collection[str] | None = None
) -> list[tuple[TaskEvaluation, ShardSet]]:
    """Open the evaluation shards only, and check their labels against the class names. With `only`,
    those of the evaluations with these names.
    """
    opened = []
    for index, evaluation in enumerate(request.evaluation):
        if only is not None and evaluation.name not in only:
            continue
        shards = [Path(file) for file in paths(evaluation.files)]
        samples = open_set(shards, Path(request.index), check=check)
        check_pictures(samples, 0, request.file, f"spec.evaluation[{index}].shards")
        if evaluation.kind == "ZeroShot":
            prompt_templates(evaluation)
            names = class_names(evaluation)
            check_labels(samples, names, request.file, f"spec.evaluation[{index}].classNames")
        elif not samples.caption_counts.all():
            message = (
                f"sample {samples.key(int(samples.caption_counts.argmin()))!r} has no caption to"
                " retrieve it by"
            )
            raise InputError(message, file=request.file, field=f"spec.evaluation[{index}].shards")
        opened.append((evaluation, samples))
    return opened
