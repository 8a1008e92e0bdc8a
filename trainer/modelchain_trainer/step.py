"""One update of a stage's model: forward, losses, backward, AdamW. Nothing in it waits for the
device.
"""

from __future__ import annotations

import math
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
MAX_SCALE = 100.0  # of the logits, as CLIP clips it (Radford et al. 2021, section 2.5)


@dataclass(kw_only=True)
class Step:
    """Call it with a batch to update `student` once."""

    student: models.Student
    teacher: torch.nn.Module | None  # frozen; None: no distillation
    steps: int  # of the whole stage, for the learning-rate schedule
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    precision: str
    seed: int
    alpha: float  # weight of the distillation loss
    micro_batch: int | None = None  # pictures of this rank at a time; None: all at once

    def __post_init__(self) -> None:
        self.device = self.student.clip.logit_scale.device
        self.rank, self.world = runtime.ranks()
        self.autocast = runtime.autocast(self.device, self.precision)
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=0.0, betas=(0.9, 0.98), eps=1e-8, fused=True
        )
        self.wrapped: torch.nn.Module = self.student
        if self.world > 1:
            self.wrapped = DistributedDataParallel(
                self.student, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        # Of the last call, for the step's entry in the journal.
        self.tokens = (0, 0)  # of this rank's captions: without and with padding
        self.current_learning_rate = 0.0

    def _parameter_groups(self) -> list[dict[str, object]]:
        decayed: list[Tensor] = []
        free: list[Tensor] = []
        for name, parameter in self.student.named_parameters():
            (decayed if models.decays(name, parameter) else free).append(parameter)
        return [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": free, "weight_decay": 0.0},
        ]

    def __call__(self, batch: Batch) -> Tensor:
        """Update once. Returns [loss, task loss, distillation loss, skipped, logit scale] of the
        global batch, on the device.

        `skipped` is 1 if a loss or a gradient was not finite; then no weight, moment or step count
        has changed.
        """
        self._set_learning_rate(batch.step)
        # Swin's stochastic depth draws from this generator: the same numbers after a resume, others
        # on every rank.
        torch.manual_seed(self.seed << 32 ^ batch.step << 10 ^ self.rank)
        self.optimizer.zero_grad(set_to_none=True)

        losses = self._backward(batch)
        if self.world > 1:
            # Each rank has the loss of its own rows; their mean is that of the global batch.
            dist.all_reduce(losses)
            losses /= self.world

        # As GradScaler does it: where `found_inf` is 1, the fused kernel changes nothing. The
        # decision stays on the device, and the host does not wait for it.
        skipped = self._not_finite(losses)
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        self.optimizer.step()
        with torch.no_grad():
            scale = self.student.clip.logit_scale.clamp_(0, math.log(MAX_SCALE)).exp()
        return torch.stack([*losses, skipped, scale])

    def _set_learning_rate(self, step: int) -> None:
        self.current_learning_rate = runtime.learning_rate(
            step, self.steps, self.warmup_steps, self.learning_rate
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.current_learning_rate

    def _backward(self, batch: Batch) -> Tensor:
        """Leave the gradients of `batch` in the parameters. Returns [loss, task loss, distillation
        loss] of this rank's rows.
        """
        parts = batch.pieces(self.micro_batch)
        self.tokens = (
            sum(part.real_tokens for part in parts),
            sum(part.processed_tokens for part in parts),
        )
        pieces = [self.to_device(part) for part in parts]
        targets = self._teach(pieces) if self.teacher is not None else None

        def forward(piece: Piece) -> models.Features:
            with self.autocast():
                return self.wrapped(*piece)

        def loss_of(features: models.Features) -> tuple[Tensor, ...]:
            text_NMD = features.text.unflatten(0, (len(features.image), -1))
            task = contrastive(features.image, text_NMD, features.scale)
            pull = features.scale.new_zeros(())
            if targets is not None:
                pull = distillation(
                    features.projected_image, features.projected_text, *targets, self.alpha
                )
            return task + pull, task, pull

        no_sync: Any = self.wrapped.no_sync if self.world > 1 else nullcontext
        return torch.stack(cached_backward(forward, pieces, loss_of, no_sync)).float()

    def _not_finite(self, losses: Tensor) -> Tensor:
        """1.0 or 0.0, on the device: whether a loss or a gradient is not finite, or so large that
        its square would not be.

        Losses and gradients are those of the global batch, so either all ranks skip it or none.
        """
        norms = torch._foreach_norm(
            [p.grad for p in self.student.parameters() if p.grad is not None]
        )
        return 1 - torch.isfinite(torch.stack([*losses, *norms])).all().float()

    def to_device(self, piece: Batch) -> Piece:
        """Pictures travel as bytes and are normalised there."""
        move = partial(Tensor.to, device=self.device, non_blocking=True)
        return models.normalise(move(piece.images)), [
            (move(tokens), move(rows)) for tokens, rows in piece.chunks
        ]

    @torch.inference_mode()
    def _teach(self, pieces: list[Piece]) -> tuple[Tensor, Tensor]:
        """The teacher's features of the same crops and captions: [N, D] and [N*M, D]."""
        with self.autocast():
            images = torch.cat([models.encode_image(self.teacher, images) for images, _ in pieces])
            texts = torch.cat(
                [models.encode_text_chunks(self.teacher, chunks) for _, chunks in pieces]
            )
        return images, texts
