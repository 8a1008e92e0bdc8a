"""How far a stage has come: what a checkpoint keeps beside weights and optimizer moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modelchain.api.uses import Resumed


@dataclass
class Counters:
    """Irregularities of the training that led to these weights, for `results.json`."""

    skipped_batches: int = 0  # their loss or a gradient was not finite
    replaced_pictures: int = 0  # undecodable, as rank 0 has met them
    scarce_captions: int = 0  # samples with fewer captions than are drawn

    def to_json(self) -> dict[str, int]:
        return {
            "skippedBatches": self.skipped_batches,
            "replacedPictures": self.replaced_pictures,
            "scarceCaptions": self.scarce_captions,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, int]) -> Counters:
        return cls(
            skipped_batches=document.get("skippedBatches", 0),
            replaced_pictures=document.get("replacedPictures", 0),
            scarce_captions=document.get("scarceCaptions", 0),
        )


@dataclass
class TrainState:
    """The progress of a stage over all its attempts, `step` by `step`.

    Going back to a checkpoint replaces all of it, so that what is counted here belongs to the
    training that made the weights. What an attempt has spent is counted apart (`AttemptWork`).
    """

    step: int = 0  # steps done
    seconds: float = 0.0  # of training, all attempts together
    skips: int = 0  # batches in a row, up to `step`, that were skipped as not finite
    initial_metrics: dict[str, float] | None = None  # before the first step; None: not measured yet
    initial_loss: float | None = None  # task loss of the first step that was not skipped
    final_loss: float | None = None  # task loss of the last step that was not skipped
    counters: Counters = field(default_factory=Counters)
    # The attempt that has written this checkpoint; None in those of older trainers.
    written_by: Resumed | None = None

    def count(self, task_loss: float, skipped: bool) -> None:
        """Take in the numbers of one more step, in order."""
        if skipped:
            self.skips += 1
            self.counters.skipped_batches += 1
            return
        self.skips = 0
        self.final_loss = task_loss
        if self.initial_loss is None:
            self.initial_loss = task_loss

    def to_json(self) -> dict[str, Any]:
        """As `state.json` of a checkpoint holds it. The keys are a format: older trainers' files
        have the same.
        """
        measured = self.initial_metrics is not None
        initial = {"loss": self.initial_loss, "metrics": self.initial_metrics}
        return {
            "step": self.step,
            "seconds": self.seconds,
            "skips": self.skips,
            "initial": initial if measured else None,
            "finalLoss": self.final_loss,
            "counters": self.counters.to_json(),
            **({"writtenBy": self.written_by.model_dump(by_alias=True)} if self.written_by else {}),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TrainState:
        """Read a `state.json`. Only `step`, `seconds` and `initial` have always been there."""
        initial, written = document["initial"] or {}, document.get("writtenBy")
        return cls(
            step=document["step"],
            seconds=document["seconds"],
            skips=document.get("skips", 0),
            initial_metrics=initial.get("metrics"),
            initial_loss=initial.get("loss"),
            final_loss=document.get("finalLoss"),
            counters=Counters.from_json(document.get("counters", {})),
            written_by=Resumed.model_validate(written) if written else None,
        )


@dataclass
class AttemptWork:
    """What this attempt has done, including the steps it repeated after going back."""

    steps: int = 0
    samples: int = 0  # over all ranks
