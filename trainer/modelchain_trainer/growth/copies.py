"""Growth by copying channels, hidden units and heads, so that what reads the copies gets what it
got before.

A map says which old entry each new entry copies. It is the same for all tensors of a layer, and in
the stream for all of a tower. Consumers divide by the number of copies. That is exact for linear
layers and attention; through a LayerNorm it is exact only if all entries have equally many copies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modelchain_trainer.growth.rules import Axis, Part, Role, Space

# (axis, new size, old size, entries of a head) -> for each new entry the index of the old one.
Map = Callable[[Axis, int, int, int], Tensor]
# (axis, that map, old size) -> the factor of each new entry; None: all are 1.
Factors = Callable[[Axis, Tensor, int], Tensor | None]


def net2net(part: Part) -> int:
    """Net2WiderNet (Chen et al., arXiv 1511.05641): new entries copy old ones that are drawn at
    random. A little noise on the copies lets them learn different things.
    """
    part.new.copy_(copied(part, part.old, drawn_map, divided_by_copies))
    noise = 0.01 * part.old.std() if part.old.numel() > 1 else 0.0
    # A seed of its own, so that all ranks draw the same noise.
    generator = torch.Generator().manual_seed(part.new.numel())
    for dim, axis in enumerate(part.axes):
        if axis.role is Role.WRITES and axis.space is not Space.FIXED:
            kept = part.old.shape[dim]
            copies = part.new.narrow(dim, kept, part.new.shape[dim] - kept)
            copies += noise * torch.randn(copies.shape, generator=generator).to(copies)
    return part.new.numel()


def fpi(part: Part) -> int:
    """bert2BERT's function-preserving initialisation (Chen et al., arXiv 2110.07143): exact where
    widths are integer multiples.
    """
    part.new.copy_(copied(part, part.old, cyclic_map, divided_by_copies))
    return part.new.numel()


def aki(part: Part) -> int:
    """bert2BERT's advanced knowledge initialisation: as `fpi`, but new outputs copy those of the
    next layer, so that they differ from the old ones.
    """
    count = fpi(part)
    if (
        part.axes
        and part.axes[0].role is Role.WRITES
        and part.axes[0].space not in (Space.FIXED, Space.EMBEDDING)
    ):
        kept = len(part.old)
        part.new[kept:] = copied(part, part.after, cyclic_map, divided_by_copies)[kept:]
    return count


def copied(part: Part, old: Tensor, map_of: Map, factors_of: Factors) -> Tensor:
    """`old` in the student's shape: each entry is a copy of the one that the map names, times its
    factor.
    """
    for dim, (axis, new) in enumerate(zip(part.axes, part.new.shape, strict=True)):
        size = old.shape[dim]
        if axis.space is Space.FIXED or new == size:
            continue
        source = map_of(axis, new, size, part.head)
        old = select(old, dim, source, factors_of(axis, source, size))
    return old


def select(old: Tensor, dim: int, source: Tensor, factors: Tensor | None) -> Tensor:
    """Along axis `dim` the entries that `source` names, each times its factor."""
    new = old.index_select(dim, source.to(old.device))
    if factors is None:
        return new
    along_dim = [-1 if d == dim else 1 for d in range(new.ndim)]
    return new * factors.to(new).view(along_dim)


def cyclic_map(axis: Axis, new: int, old: int, head: int) -> Tensor:
    """All old entries in order, again and again. Heads stay whole, because `old` is a multiple of a
    head's width.
    """
    return torch.arange(new) % old


def drawn_map(axis: Axis, new: int, old: int, head: int) -> Tensor:
    """All old entries in order, then entries drawn at random; heads are drawn as a whole."""
    unit = head if axis.space is Space.HEADS else 1
    # The seed depends on the size alone, so that all tensors of a space draw the same entries.
    generator = torch.Generator().manual_seed(new)
    more = torch.randint(old // unit, ((new - old) // unit,), generator=generator)
    units = torch.cat([torch.arange(old // unit), more])
    return (units[:, None] * unit + torch.arange(unit)).flatten()


def divided_by_copies(axis: Axis, source: Tensor, old: int) -> Tensor | None:
    """Consumers divide by the number of copies. In the shared space of pictures and captions both
    towers divide by its root, so that lengths and angles stay as they were.
    """
    count = torch.bincount(source, minlength=old)[source]
    if axis.space is Space.EMBEDDING:
        return count.rsqrt()
    return 1 / count if axis.role is Role.READS else None
