"""The two losses of a stage, and how gradients get from them to every rank's parameters.

Every rank computes its own rows against the columns of all ranks, and `gather` carries gradients
back. After DDP's mean over ranks the gradient of each parameter, logit_scale included, is that of
the one loss over the global batch; the mean over ranks of the values is its value. All ranks hold
the same number of rows.

Shape suffixes: N rows of this rank, B rows of all ranks, M caption slots, D dimensions.
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
        # A copy, because the sum is in place. Contiguous, because backends send memory in order
        # and ignore strides.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        rank, world = ranks()
        return gradient.chunk(world)[rank]


def gather(x: Tensor) -> Tensor:
    """All ranks' rows in rank order, [world * N, ...]; its gradient is summed over ranks. All ranks
    must pass the same shape.
    """
    return _Gather.apply(x) if ranks()[1] > 1 else x


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def contrastive(image_ND: Tensor, text_NMD: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP loss of N pictures with M captions each (paper Eq. 2, as a mean): a scalar, computed in
    fp32 or better.

    For each caption slot it is the symmetric CLIP loss with negatives from the same slot only; then
    the mean over slots and directions. `logit_scale` is the factor itself (already exponentiated).
    """
    with torch.autocast(image_ND.device.type, enabled=False):
        image_ND, text_NMD = _unit(image_ND), _unit(text_NMD)
        to_text_MNB = logit_scale * image_ND @ gather(text_NMD).permute(1, 2, 0)
        to_image_MNB = logit_scale * text_NMD.transpose(0, 1) @ gather(image_ND).T
        # The column of each row's own partner, among the columns of all ranks.
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
    dimensions and the two terms are summed, as in the authors' code, where alpha is 500. The
    paper's Eq. 1 and 4 (squared norms, image and text averaged) on the same unit features are
    D / 2 times as large: 256 times at D = 512, where an alpha of 1.95 would pull as much. The paper
    does not say that the features of Eq. 1 are of unit length.
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
    Gao et al., arXiv 2101.06983).

    Args:
        forward: the student, wrapped in DDP or not. It enters autocast itself: around both passes
            together, autocast in torch before pytorch#165068 reuses weights that were cast without
            gradients.
        pieces: the micro-batches.
        loss_of: the loss of all rows together, and any parts of it to report.
        no_sync: DDP's; used for all pieces but the last, so that gradients are reduced once.
    Returns:
        Loss and parts, detached. Gradients add up in `.grad`.
    """
    if len(pieces) == 1:
        losses = loss_of(forward(pieces[0]))
        losses[0].backward()
        return tuple(value.detach() for value in losses)

    # First pass: only the features are kept, so memory holds the activations of no piece.
    cached = _without_gradients(forward, pieces)
    joined = _joined(cached)
    losses = loss_of(joined)
    losses[0].backward()  # leaves the gradient at each feature in `joined`

    # Second pass: each piece runs again, and its rows of those gradients go on to the parameters.
    for index, piece in enumerate(pieces):
        last = index == len(pieces) - 1
        with nullcontext() if last else no_sync():
            _backward_of_piece(forward(piece), joined, cached, index)
    return tuple(value.detach() for value in losses)


def _without_gradients(
    forward: Callable[[Piece], Features], pieces: Sequence[Piece]
) -> list[Features]:
    # The generators are forked, so that the second pass draws what this one drew (Swin's stochastic
    # depth).
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), torch.no_grad():
        return [forward(piece) for piece in pieces]


def _joined(cached: Sequence[Features]) -> Features:
    """All rows of all pieces, as leaves that collect gradients."""
    # A scalar (the logit scale) is the same in every piece, so the first one stands for all.
    joined = [
        parts[0].clone() if parts[0].ndim == 0 else torch.cat(parts)
        for parts in zip(*cached, strict=True)
    ]
    return Features(*(tensor.requires_grad_() for tensor in joined))


def _backward_of_piece(
    outputs: Features, joined: Features, cached: Sequence[Features], index: int
) -> None:
    """Backward from the features of piece `index`, with its rows of the gradients in `joined`."""
    last = index == len(cached) - 1
    used, gradients = [], []
    for field, output in enumerate(outputs):
        gradient = joined[field].grad
        if gradient is None:
            continue  # the loss does not use this feature
        if output.ndim == 0 and not last:
            continue  # the scale's gradient is that of all rows, and counts once
        if output.ndim:
            gradient = gradient.split([len(features[field]) for features in cached])[index]
        used.append(output)
        gradients.append(gradient)
    torch.autograd.backward(used, gradients)
