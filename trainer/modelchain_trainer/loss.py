"""The two losses of a stage and how gradients get from them to every rank's parameters.

Every rank computes its own rows against all ranks' columns and `gather` carries gradients back, so
that after DDP's mean over ranks each parameter's gradient, logit_scale's included, is that of the
one loss over the global batch, and the mean over ranks of the values is its value. Ranks hold
equally many rows. Shape suffixes: N rows of this rank, B of all ranks, M caption slots, D
dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from modelchain_trainer.models import Features
from modelchain_trainer.runtime import ranks

Piece = TypeVar("Piece")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        gathered = x.new_empty(ranks()[1] * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        # A copy, as the sum is in place; contiguous, as backends go by memory order.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        rank, world = ranks()
        return gradient.chunk(world)[rank]


def gather(x: Tensor) -> Tensor:
    """All ranks' rows in rank order, [world * N, ...]; its gradient is summed over ranks. Shapes
    must be equal.
    """
    return _Gather.apply(x) if ranks()[1] > 1 else x


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def contrastive(image_ND: Tensor, text_NMD: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP loss of N pictures with M captions each (paper Eq. 2, as a mean): a scalar, computed in
    fp32 or better.

    For each caption slot the symmetric CLIP loss, negatives from the same slot only; mean over
    slots and directions. `logit_scale` is the factor itself (already exponentiated).
    """
    with torch.autocast(image_ND.device.type, enabled=False):
        image_ND, text_NMD = _unit(image_ND), _unit(text_NMD)
        to_text_MNB = logit_scale * image_ND @ gather(text_NMD).permute(1, 2, 0)
        to_image_MNB = logit_scale * text_NMD.transpose(0, 1) @ gather(image_ND).T
        rows, slots = text_NMD.shape[:2]
        own = (ranks()[0] * rows + torch.arange(rows, device=image_ND.device)).repeat(slots)
        return (
            F.cross_entropy(to_text_MNB.flatten(0, 1), own)
            + F.cross_entropy(to_image_MNB.flatten(0, 1), own)
        ) / 2


def distillation(
    student_image: Tensor,
    student_text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    alpha: float,
) -> Tensor:
    """Inverse feature distillation: alpha times the mean squared difference of unit features, image
    plus text.

    Student features are those after T; images [N, D], texts [K, D]. The mean is over rows *and*
    dimensions and the two are summed, as in the authors' code, where alpha is 500. Eq. 1 and 4
    (squared norms, image and text averaged) on the same unit features are D / 2 times this: 256
    times at D = 512, so alpha for the same pull would be 1.95. The paper does not say that Eq. 1's
    features are of unit length.
    """
    image = F.mse_loss(_unit(student_image), _unit(teacher_image))
    return alpha * (image + F.mse_loss(_unit(student_text), _unit(teacher_text)))


def cached_backward(
    forward: Callable[[Piece], Features],
    pieces: Sequence[Piece],
    loss_of: Callable[[Features], tuple[Tensor, ...]],
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[Tensor, ...]:
    """Backward pass of one loss over several micro-batches, exact, by feature caching (GradCache,
    arXiv 2101.06983).

    All pieces run without gradients, the loss of their joined rows gives the gradient at each
    feature, then each piece runs again and carries its share back. `forward` is the (DDP-wrapped)
    student, entering autocast itself: around both passes, autocast in torch before pytorch#165068
    reuses weights cast without gradients. `loss_of` gives the loss and any parts to report;
    `no_sync` is DDP's, for all pieces but the last. Returns loss and parts, detached; gradients add
    up in `.grad`.
    """
    if len(pieces) == 1:
        losses = loss_of(forward(pieces[0]))
        losses[0].backward()
        return tuple(value.detach() for value in losses)

    # Forked, so that the second pass draws what the first drew (Swin's stochastic depth).
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.no_grad():
        cached = [forward(piece) for piece in pieces]
    # A scalar (the logit scale) is the same in every piece, so one stands for all.
    joined = [
        parts[0].clone() if parts[0].ndim == 0 else torch.cat(parts)
        for parts in zip(*cached, strict=True)
    ]
    losses = loss_of(Features(*(tensor.requires_grad_() for tensor in joined)))
    losses[0].backward()

    for index, piece in enumerate(pieces):
        last = index == len(pieces) - 1
        with nullcontext() if last else no_sync():
            outputs, gradients = [], []
            for field, output in enumerate(forward(piece)):
                gradient = joined[field].grad
                if gradient is None or (output.ndim == 0 and not last):
                    continue  # unused by the loss, or the scale, which counts once
                if output.ndim:
                    gradient = gradient.split([len(features[field]) for features in cached])[index]
                outputs.append(output)
                gradients.append(gradient)
            torch.autograd.backward(outputs, gradients)
    return tuple(value.detach() for value in losses)
