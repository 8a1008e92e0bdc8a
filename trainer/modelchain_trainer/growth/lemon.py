"""LEMON, lossless expansion (Wang et al., arXiv 2310.07999): the student computes what its
predecessor computed.

- Entries are copied as often as they fit. The copies differ in their weight when they are read:
  these weights add up to one and are unequal, so that the copies learn different things.
- Channels of the stream that are left over hold the mean of the others (average expansion). A
  LayerNorm then finds the same mean, and a variance that is smaller by the fraction of left-over
  channels; its scale makes up for that. After the norm these channels are zero, so the weights
  that read them do not matter.
- A layer that takes none of the predecessor's, or one that an earlier layer has taken, adds nothing
  to the stream: `grow` writes zeros where the rule says `closes`.

The result is exact when layers are added, and for any width of a text tower, except for the epsilon
of its norms. A ViT's stream is itself the output of a LayerNorm, and Swin's patch merging
normalises four neighbours together, so images need widths that are integer multiples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelchain_trainer.growth.copies import cyclic_map, select
from modelchain_trainer.growth.rules import Axis, Part, Role, Space


def lemon(part: Part) -> int:
    """Grow axis after axis.

    Entries that the result does not cover keep the student's initialisation.
    """
    value = part.old
    for dim, (axis, new) in enumerate(zip(part.axes, part.new.shape, strict=True)):
        old = value.shape[dim]
        if axis.space is Space.FIXED or new == old:
            continue
        whole = new // old * old  # entries that whole copies of all old ones fill
        # In the stream only whole copies keep the mean that a LayerNorm subtracts.
        reach = whole if axis.space is Space.STREAM else new
        source = cyclic_map(axis, reach, old, part.head)
        grown = select(value, dim, source, _reading_weights(axis, source, old))
        if reach < new:
            grown = _with_left_over(axis, part, value, grown, dim, new)
        if axis.role in (Role.SCALES, Role.SCALES_STREAM) and not part.shifts:
            grown = grown * (whole / new) ** 0.5
        value = grown
    part.new[tuple(slice(size) for size in value.shape)] = value
    return value.numel()


def _with_left_over(
    axis: Axis, part: Part, old: Tensor, grown: Tensor, dim: int, new: int
) -> Tensor:
    """`grown` with the channels of the stream appended for which no whole copy is left."""
    if axis.role is Role.READS or (axis.role is not Role.WRITES and not part.shifts):
        return grown  # they may hold anything
    filler = old.mean(dim, keepdim=True)
    if axis.role is Role.SCALES:  # a bias of the norm: zero after it
        filler = torch.zeros_like(filler)
    rest = list(grown.shape)
    rest[dim] = new - grown.shape[dim]
    return torch.cat([grown, filler.expand(rest)], dim)


def _reading_weights(axis: Axis, source: Tensor, old: int) -> Tensor | None:
    """Of `n` copies of an entry the i-th is read with weight i / (1 + ... + n). In the shared space
    both towers get the root of that. None where nothing is read.
    """
    if axis.role is not Role.READS and axis.space is not Space.EMBEDDING:
        return None
    count = torch.bincount(source, minlength=old)[source]
    copy = torch.arange(len(source)) // old + 1  # the i of each entry
    weights = 2 * copy / (count * (count + 1))
    return weights.sqrt() if axis.space is Space.EMBEDDING else weights
