"""Growth by copying channels, units and heads such that what reads the copies reads what it read
before.

A map says of which old entry each new one is a copy, the same for all tensors of a layer and, for
the stream, of a tower. Whoever reads divides by the number of copies. That is exact for linear
layers and attention; through a LayerNorm only where all entries have equally many copies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modelchain_trainer.growth.rules import Axis, Part, Role, Space

Map = Callable[
    [Axis, int, int, int], Tensor
]  # axis, new, old, entries a head -> of which old entry each is a copy
Weights = Callable[
    [Axis, Tensor, int], Tensor | None
]  # axis, that map, old -> factor of each entry, None for ones


def net2net(part: Part) -> int:
    """Net2WiderNet (Chen et al., arXiv 1511.05641): new entries copy old ones drawn at random; a
    little noise on the copies tells them apart from then on.
    """
    part.new.copy_(spread(part, part.old, drawn, shared))
    noise = 0.01 * part.old.std() if part.old.numel() > 1 else 0.0
    same = torch.Generator().manual_seed(part.new.numel())  # on all ranks
    for dim, axis in enumerate(part.axes):
        if axis.role is Role.WRITES and axis.space is not Space.FIXED:
            copies = part.new.narrow(
                dim, part.old.shape[dim], part.new.shape[dim] - part.old.shape[dim]
            )
            copies += noise * torch.randn(copies.shape, generator=same).to(copies)
    return part.new.numel()


def fpi(part: Part) -> int:
    """bert2BERT's function-preserving initialisation (Chen et al., arXiv 2110.07143): exact where
    widths are integer multiples.
    """
    part.new.copy_(spread(part, part.old, cyclic, shared))
    return part.new.numel()


def aki(part: Part) -> int:
    """bert2BERT's advanced knowledge initialisation: as `fpi`, but new outputs copy those of the
    layer after, which tells them apart.
    """
    count = fpi(part)
    if (
        part.axes
        and part.axes[0].role is Role.WRITES
        and part.axes[0].space not in (Space.FIXED, Space.EMBEDDING)
    ):
        kept = len(part.old)
        part.new[kept:] = spread(part, part.after, cyclic, shared)[kept:]
    return count


def spread(part: Part, old: Tensor, copies: Map, weights: Weights) -> Tensor:
    """`old` at the student's shape: each entry a copy of the one that the map names, times its
    factor.
    """
    for dim, (axis, new) in enumerate(zip(part.axes, part.new.shape, strict=True)):
        size = old.shape[dim]
        if axis.space is Space.FIXED or new == size:
            continue
        source = copies(axis, new, size, part.head)
        old = taken(old, dim, source, weights(axis, source, size))
    return old


def taken(old: Tensor, dim: int, source: Tensor, factors: Tensor | None) -> Tensor:
    """Along one axis the entries that `source` names, each times its factor."""
    new = old.index_select(dim, source.to(old.device))
    return (
        new
        if factors is None
        else new * factors.to(new).view([-1 if d == dim else 1 for d in range(new.ndim)])
    )


def cyclic(axis: Axis, new: int, old: int, head: int) -> Tensor:
    """All old entries in order, again and again; heads stay whole, since `old` is a number of
    heads.
    """
    return torch.arange(new) % old


def drawn(axis: Axis, new: int, old: int, head: int) -> Tensor:
    """All old entries in order, then any; heads are drawn whole."""
    unit = head if axis.space is Space.HEADS else 1
    same = torch.Generator().manual_seed(new)  # all tensors of a space agree on it
    more = torch.randint(old // unit, ((new - old) // unit,), generator=same)
    groups = torch.cat([torch.arange(old // unit), more])
    return (groups[:, None] * unit + torch.arange(unit)).flatten()


def shared(axis: Axis, source: Tensor, old: int) -> Tensor | None:
    """Who reads divides by the number of copies; in the shared space lengths and angles stay as
    they were.
    """
    count = torch.bincount(source, minlength=old)[source]
    if axis.space is Space.EMBEDDING:
        return count.rsqrt()
    return 1 / count if axis.role is Role.READS else None
