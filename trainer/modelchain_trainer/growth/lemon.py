"""LEMON, lossless expansion (Wang et al., arXiv 2310.07999): the student computes what its
predecessor did.

- Entries are copied as often as they fit. Copies differ in what is read of them: the shares add up
  to one and are unequal, so that copies do not learn the same.
- Channels of the stream that are left over hold the mean of the others (average expansion). A
  LayerNorm then keeps its mean and finds a variance that is smaller by the share of left-over
  channels; its scale makes up for that. What reads left-over channels may hold anything: after the
  norm they are zero.
- A layer that takes none of the predecessor's, or one that an earlier layer took, adds nothing to
  the stream: `grow` writes zeros where the rule says `closes`.

Exact across depth, and for any width of a text tower but for the norms' epsilon. A ViT's stream is
itself a LayerNorm's output and Swin's patch merging normalises four neighbours together, so images
need widths that are integer multiples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelchain_trainer.growth.copies import cyclic, taken
from modelchain_trainer.growth.rules import Axis, Part, Role, Space


def lemon(part: Part) -> int:
    value = part.old
    read = list(
        part.new.shape
    )  # how far the value reaches; beyond it the student's own initialisation stays
    for dim, (axis, new) in enumerate(zip(part.axes, part.new.shape, strict=True)):
        old = value.shape[dim]
        if axis.space is Space.FIXED or new == old:
            continue
        whole = new // old * old
        reach = whole if axis.space is Space.STREAM else new
        source = cyclic(axis, reach, old, part.head)
        grown = taken(value, dim, source, _shares(axis, source, old))
        if reach < new:
            grown = _left_over(axis, part, value, grown, dim, new)
        if axis.role in (Role.SCALES, Role.SCALES_STREAM) and not part.shifts:
            grown = grown * (whole / new) ** 0.5
        read[dim] = grown.shape[dim]
        value = grown
    part.new[tuple(slice(size) for size in read)] = value
    return value.numel()


def _left_over(axis: Axis, part: Part, old: Tensor, grown: Tensor, dim: int, new: int) -> Tensor:
    """Channels of the stream for which no whole copy is left."""
    if axis.role is Role.READS or (axis.role is not Role.WRITES and not part.shifts):
        return grown  # whatever the student has there
    mean = old.mean(dim, keepdim=True)
    rest = [new - grown.shape[dim] if d == dim else size for d, size in enumerate(grown.shape)]
    return torch.cat(
        [grown, (mean if axis.role is not Role.SCALES else torch.zeros_like(mean)).expand(rest)],
        dim,
    )


def _shares(axis: Axis, source: Tensor, old: int) -> Tensor | None:
    """Of `n` copies of an entry the i-th gets i / (1 + … + n) of what is read; in the shared space
    the root of it.
    """
    if axis.role is not Role.READS and axis.space is not Space.EMBEDDING:
        return None
    count = torch.bincount(source, minlength=old)[source]
    share = 2 * (torch.arange(len(source)) // old + 1) / (count * (count + 1))
    return share.sqrt() if axis.space is Space.EMBEDDING else share
