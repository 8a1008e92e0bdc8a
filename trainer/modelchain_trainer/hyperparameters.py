"""The hyperparameters of a stage, typed.

A task carries them as JSON, because the input digest hashes that JSON. The trainer reads it once,
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class TransferInputs:
    """How a successor inherits from its predecessor."""

    width: str  # growth method in width, a key of growth.grow.WIDTH
    depth: str  # growth method in depth, a key of growth.depth.DEPTH
    alpha: float  # weight of the distillation loss (see loss.distillation); 0: no teacher


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What a stage's weights depend on, beside its data and its predecessor."""

    model_config: dict[str, Any]  # an open_clip model config
    samples: int  # of the training set
    epochs: int
    global_batch_size: int  # pictures a step, over all ranks
    captions_per_sample: int
    learning_rate: float  # at the peak of the schedule
    warmup_steps: int
    weight_decay: float
    precision: Literal["fp32", "bf16"]
    seed: int
    transfer: TransferInputs | None = None  # None for a first stage

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Hyperparameters:
        """Read them from a task's inputs, which core's `stage_inputs` has made."""
        transfer = None
        if "transfer" in inputs:
            given = inputs["transfer"]
            alpha = float(given["distillation"]["alpha"])
            transfer = TransferInputs(width=given["width"], depth=given["depth"], alpha=alpha)
        return cls(
            model_config=inputs["modelConfig"],
            samples=inputs["data"]["samples"],
            epochs=inputs["epochs"],
            global_batch_size=inputs["globalBatchSize"],
            captions_per_sample=inputs["captionsPerSample"],
            # Decimals are texts in the inputs, so that equal numbers have one spelling to hash.
            learning_rate=float(inputs["learningRate"]),
            warmup_steps=inputs["warmupSteps"],
            weight_decay=float(inputs["weightDecay"]),
            precision=inputs["precision"],
            seed=inputs["seed"],
            transfer=transfer,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch; the samples left over are dropped."""
        return self.samples // self.global_batch_size

    @property
    def steps(self) -> int:
        """Steps of the whole stage."""
        return self.epochs * self.steps_per_epoch

    @property
    def alpha(self) -> float:
        return self.transfer.alpha if self.transfer else 0.0

    @property
    def image_size(self) -> int:
        """Height and width of a picture, in pixels."""
        return int(self.model_config["vision_cfg"]["image_size"])

    @property
    def context_length(self) -> int:
        """The most tokens of a caption."""
        return int(self.model_config["text_cfg"]["context_length"])
