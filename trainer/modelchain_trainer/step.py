"""One update of a stage's model: forward, losses, backward, AdamW. Nothing in it waits for the
device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from modelchain_data.batches import Batch, Chunk
from modelchain_trainer import models, runtime
from modelchain_trainer.loss import cached_backward, contrastive, distillation

Piece = tuple[Tensor, list[Chunk]]  # normalised pictures and the captions' chunks, on the device


@dataclass
class Step:
    """Calls are updates. `inputs` are the hashed ones of a task; `micro_batch` is one rank's
    pictures at a time.
    """

    student: models.Student
    teacher: torch.nn.Module | None
    inputs: Mapping[str, Any]
    steps: int
    alpha: float
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        student, inputs, self.device = (
            self.student,
            self.inputs,
            self.student.clip.logit_scale.device,
        )
        self.rank, self.world = runtime.ranks()
        self.tokens, self.learning_rate = (
            (0, 0),
            0.0,
        )  # of the last call; this rank's tokens: real, and with padding
        self.precision = runtime.autocast(self.device, inputs["precision"])
        named, decays = (
            list(student.named_parameters()),
            {True: float(inputs["weightDecay"]), False: 0.0},
        )
        groups = [
            {
                "params": [p for name, p in named if models.decays(name, p) == decayed],
                "weight_decay": decay,
            }
            for decayed, decay in decays.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-8, fused=True)
        self.wrapped: torch.nn.Module = student
        if self.world > 1:
            self.wrapped = DistributedDataParallel(
                student, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def __call__(self, batch: Batch) -> Tensor:
        """Update once; [loss, task loss, distillation loss, skipped, logit scale] of the global
        batch, on the device.

        `skipped` is 1 where a loss or a gradient was not finite, and nothing has changed.
        """
        peak, warmup = float(self.inputs["learningRate"]), self.inputs["warmupSteps"]
        self.learning_rate = runtime.learning_rate(batch.step, self.steps, warmup, peak)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        # Swin's drop_path draws from it: the same after a resume, another on every rank.
        torch.manual_seed(self.inputs["seed"] << 32 ^ batch.step << 10 ^ self.rank)
        self.optimizer.zero_grad(set_to_none=True)
        parts = batch.pieces(self.micro_batch)
        self.tokens = (
            sum(part.real_tokens for part in parts),
            sum(part.processed_tokens for part in parts),
        )
        pieces = [self.to_device(part) for part in parts]
        targets = self._teach(pieces) if self.teacher is not None else None

        def forward(piece: Piece) -> models.Features:
            with self.precision():
                return self.wrapped(*piece)  # type: ignore[no-any-return]

        def loss_of(features: models.Features) -> tuple[Tensor, ...]:
            text_NMD = features.text.unflatten(0, (len(features.image), -1))
            task = contrastive(features.image, text_NMD, features.scale)
            pull = features.scale.new_zeros(())
            if targets is not None:
                pull = distillation(
                    features.projected_image, features.projected_text, *targets, self.alpha
                )
            return task + pull, task, pull

        no_sync = self.wrapped.no_sync if self.world > 1 else nullcontext
        losses = torch.stack(cached_backward(forward, pieces, loss_of, no_sync)).float()
        if self.world > 1:
            dist.all_reduce(losses)
            losses /= self.world
        # As with GradScaler: where it is 1, the fused kernel changes nothing, and no host has to
        # know.
        skipped = self.optimizer.found_inf = self._not_finite(losses)
        self.optimizer.step()
        with torch.no_grad():
            scale = self.student.clip.logit_scale.clamp_(0, math.log(100)).exp()
        return torch.stack([*losses, skipped, scale])

    def _not_finite(self, losses: Tensor) -> Tensor:
        """1.0 or 0.0, on the device: whether a loss or a gradient is not finite, or its square
        would not be.

        Losses and gradients are those of the global batch, so that all ranks skip, or none.
        """
        norms = torch._foreach_norm(
            [p.grad for p in self.student.parameters() if p.grad is not None]
        )
        return 1 - torch.isfinite(torch.stack([*losses, *norms])).all().float()

    def to_device(self, piece: Batch) -> Piece:
        """Pictures go over as bytes; chunks as they are."""
        move = partial(Tensor.to, device=self.device, non_blocking=True)
        return models.normalise(move(piece.images)), [
            (move(tokens), move(rows)) for tokens, rows in piece.chunks
        ]

    @torch.inference_mode()
    def _teach(self, pieces: list[Piece]) -> tuple[Tensor, Tensor]:
        """The teacher's features of the same crops and captions: [N, D] and [N*M, D]."""
        with self.precision():
            images = torch.cat([models.encode_image(self.teacher, images) for images, _ in pieces])
            texts = torch.cat(
                [models.encode_text_chunks(self.teacher, chunks) for _, chunks in pieces]
            )
        return images, texts
