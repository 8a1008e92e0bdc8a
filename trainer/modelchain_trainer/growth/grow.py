"""A student filled from its predecessor: every parameter by its rule, a method in width and one in
depth.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelchain.errors import InputError
from modelchain_trainer.growth import simple
from modelchain_trainer.growth.copies import aki, fpi, net2net
from modelchain_trainer.growth.depth import DEPTH, constant
from modelchain_trainer.growth.lemon import lemon
from modelchain_trainer.growth.netexpand import netexpand
from modelchain_trainer.growth.report import KINDS, REST, GrowthReport
from modelchain_trainer.growth.rules import Part, Rule, Space, chunks, layers, match


@dataclass(frozen=True)
class Width:
    """A method in width: `fill` returns how many of a tensor's elements come from the
    predecessor.
    """

    fill: Callable[[Part], int]
    takes_apart: bool = True  # tensors with chunks are filled chunk by chunk
    repeats: bool = (
        True  # else a layer that does not take one for the first time adds nothing to the stream
    )


WIDTH = {
    "Insert": Width(simple.insert),
    "Duplicate": Width(simple.duplicate),
    "Interpolate": Width(simple.interpolate),
    "Net2Net": Width(net2net),
    "FPI": Width(fpi),
    "AKI": Width(aki),
    "LEMON": Width(lemon, repeats=False),
    "NetExpand": Width(netexpand),
    "Released": Width(simple.insert, takes_apart=False),
}


@torch.no_grad()
def grow(
    student: nn.Module,
    predecessor: Mapping[str, Tensor],
    width: str = "Insert",
    depth: str = "Duplicate",
) -> GrowthReport:
    """Fill `student` (an open_clip CLIP with its own initialisation), in place, from a
    predecessor's state dict.

    Raises InputError naming the parameter that no rule (or more than one) matches, that only one of
    the two models has, whose number of axes is not the rule's, or that would have to shrink; and
    for an unknown method.
    """
    if width not in WIDTH or depth not in DEPTH:
        raise InputError(
            f"growth by {width} in width and {depth} in depth is not known", field="spec.transfer"
        )
    method = WIDTH[width]
    parameters = dict(student.named_parameters())
    buffers = {name for name, _ in student.named_buffers()}
    sources = _sources(layers(predecessor.keys() - buffers), layers(parameters), width, depth)

    used: set[str] = set()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, parameter in parameters.items():
        rule, stack, layer = match(name)
        taken = sources[stack][layer] if stack else 0
        first = not stack or (taken is not None and sources[stack].index(taken) == layer)
        silent = rule.closes and not (first or method.repeats)
        if silent:
            parameter.zero_()
        if taken is None or silent:
            counts[stack or REST].update(new=parameter.numel())
            continue
        source, after = (
            name.replace(f"{stack}.{layer}.", f"{stack}.{at}.", 1) for at in (taken, taken + 1)
        )
        old = _cut(name, parameter, predecessor, source, rule)
        next_old = _cut(
            name, parameter, predecessor, after if after in predecessor else source, rule
        )
        head = _head_width(student, f"{stack}.{layer}", parameter, rule)
        part = Part(parameter, old, next_old, rule.axes, head, shifts=name.endswith("bias"))
        count = sum(method.fill(p) for p in (chunks(part) if method.takes_apart else [part]))
        kept = old.numel() if first else 0
        counts[stack or REST].update(
            inserted=kept, duplicated=count - kept, new=parameter.numel() - count
        )
        used.add(source)
    if left := sorted(predecessor.keys() - used - buffers):
        raise InputError(f"cannot grow: the student has no place for the predecessor's {left[0]}")
    total = sum(counts.values(), Counter())
    return GrowthReport({"width": width, "depth": depth}, *(total[kind] for kind in KINDS), counts)


def _sources(
    old: Mapping[str, int], new: Mapping[str, int], width: str, depth: str
) -> dict[str, list[int | None]]:
    """For each stack of the student, which of the predecessor's layers its layers take."""
    for stack, count in old.items():
        if count > new.get(stack, 0):
            raise InputError(f"cannot grow {stack}: {count} layers to {new.get(stack, 0)}")
    ways = dict.fromkeys(new, DEPTH[depth])
    if width == "Released":  # it repeats layers in the ViT alone
        ways |= {stack: constant for stack in new if not stack.startswith("visual.transformer.")}
    return {stack: ways[stack](old.get(stack, 0), count) for stack, count in new.items()}


def _cut(
    name: str, parameter: Tensor, predecessor: Mapping[str, Tensor], source: str, rule: Rule
) -> Tensor:
    """The predecessor's tensor for a parameter; of a shared space that shrinks, what there is room
    for.
    """
    if source not in predecessor:
        raise InputError(f"cannot grow {name}: the predecessor has no {source}")
    old = predecessor[source]
    shapes = f"shape {list(old.shape)} to {list(parameter.shape)}"
    if not len(rule.axes) == old.ndim == parameter.ndim:
        raise InputError(f"cannot grow {name}: {shapes}, but {len(rule.axes)} axes are expected")
    if not all(
        axis.fits(n, o) for axis, n, o in zip(rule.axes, parameter.shape, old.shape, strict=True)
    ):
        raise InputError(f"cannot grow {name}: {shapes}")
    return old[tuple(slice(size) for size in parameter.shape)]


def _head_width(student: nn.Module, layer: str, parameter: Tensor, rule: Rule) -> int:
    """Entries of one attention head along the parameter's axis of heads, if it has one."""
    for axis, size in zip(rule.axes, parameter.shape, strict=True):
        if axis.space is Space.HEADS:
            heads: Any = student.get_submodule(f"{layer}.attn").num_heads
            return int(size // axis.chunks // heads)
    return 1
