"""The paper's own three methods in width (Figure A a to c), and the third as in the authors'
released code.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from modelchain_trainer.growth.copies import copied, cyclic_map
from modelchain_trainer.growth.rules import Part, Space


def insert(part: Part) -> int:
    """Insertion (c): the predecessor's tensor is the leading corner, and the rest keeps the
    student's own initialisation.

    `Released` is the same on tensors that were not split into their chunks: query, key and value
    then land where they do not belong (docs/growth.md).
    """
    part.new[corner(part)] = part.old
    return part.old.numel()


def duplicate(part: Part) -> int:
    """Duplication (a): copies side by side, unscaled. Consumers read each copy in full."""
    part.new.copy_(copied(part, part.old, cyclic_map, lambda *_: None))
    return part.new.numel()


def interpolate(part: Part) -> int:
    """Interpolation (b): linear along every axis that grows, which is bilinear for a matrix."""
    value = part.old
    for dim, (axis, size) in enumerate(zip(part.axes, part.new.shape, strict=True)):
        if axis.space is not Space.FIXED and size > value.shape[dim]:
            value = _stretched(value, dim, size)
    part.new.copy_(value)
    return part.new.numel()


def _stretched(tensor: Tensor, dim: int, size: int) -> Tensor:
    last = tensor.movedim(dim, -1)
    lines = functional.interpolate(last.reshape(-1, 1, last.shape[-1]), size=size, mode="linear")
    return lines.reshape(*last.shape[:-1], size).movedim(-1, dim)


def corner(part: Part) -> tuple[slice, ...]:
    """Where the predecessor's tensor goes in the student's."""
    return tuple(slice(size) for size in part.old.shape)
