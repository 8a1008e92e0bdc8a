"""Fills a student from its predecessor: every parameter by its rule, by a method in width and one
in depth.
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
from modelchain_trainer.growth.report import REST, GrowthReport
from modelchain_trainer.growth.rules import GrowthRule, Part, Space, layers, match, split_chunks


@dataclass(frozen=True)
class Width:
    """A method in width."""

    fill: Callable[[Part], int]  # returns how many elements of a tensor the predecessor gave
    splits_chunks: bool = True  # whether tensors with chunks are filled chunk by chunk
    # If False, only the first layer that takes one of the predecessor's acts; the others add
    # nothing to the stream.
    repeats: bool = True


WIDTH = {
    "Insert": Width(simple.insert),
    "Duplicate": Width(simple.duplicate),
    "Interpolate": Width(simple.interpolate),
    "Net2Net": Width(net2net),
    "FPI": Width(fpi),
    "AKI": Width(aki),
    "LEMON": Width(lemon, repeats=False),
    "NetExpand": Width(netexpand),
    "Released": Width(simple.insert, splits_chunks=False),
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

    Raises InputError for an unknown method, and for a parameter, which it names, that no rule or
    more than one matches, that only one of the two models has, whose number of axes is not the
    rule's, or that would have to shrink.
    """
    if width not in WIDTH or depth not in DEPTH:
        raise InputError(
            f"growth by {width} in width and {depth} in depth is not known", field="spec.transfer"
        )
    parameters = dict(student.named_parameters())
    buffers = {name for name, _ in student.named_buffers()}
    old_layers = layers(predecessor.keys() - buffers)
    sources = _layer_sources(old_layers, layers(parameters), width, depth)

    used: set[str | None] = set()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, parameter in parameters.items():
        place = _place(name, sources)
        filled = _grow_parameter(student, name, parameter, predecessor, place, WIDTH[width])
        counts[place.stack or REST].update(filled)
        used.add(place.source)
    if left := sorted(predecessor.keys() - used - buffers):
        raise InputError(f"cannot grow: the student has no place for the predecessor's {left[0]}")
    total = sum(counts.values(), Counter())
    return GrowthReport(
        method={"width": width, "depth": depth},
        inserted=total["inserted"],
        duplicated=total["duplicated"],
        new=total["new"],
        stacks=counts,
    )


@dataclass(frozen=True)
class _Place:
    """Where a parameter of the student gets its values from."""

    rule: GrowthRule
    stack: str | None  # of layers; None outside of stacks
    layer: int  # in that stack
    source: str | None  # the predecessor's parameter; None: it keeps its own initialisation
    after: str  # the same parameter one layer further in the predecessor, which may not exist
    first: bool  # whether no earlier layer of the stack takes the same layer

    def silent(self, method: Width) -> bool:
        """Whether zeros here are to keep the layer from adding anything to the stream: it takes no
        layer of the predecessor's, or one that an earlier layer has taken.
        """
        return self.rule.closes and not self.first and not method.repeats


def _place(name: str, sources: Mapping[str, list[int | None]]) -> _Place:
    rule, stack, layer = match(name)
    if stack is None:
        return _Place(rule, None, 0, source=name, after=name, first=True)
    taken = sources[stack][layer]
    if taken is None:
        return _Place(rule, stack, layer, source=None, after=name, first=False)
    here = f"{stack}.{layer}."
    return _Place(
        rule,
        stack,
        layer,
        source=name.replace(here, f"{stack}.{taken}.", 1),
        after=name.replace(here, f"{stack}.{taken + 1}.", 1),
        first=sources[stack].index(taken) == layer,
    )


def _grow_parameter(
    student: nn.Module,
    name: str,
    parameter: Tensor,
    predecessor: Mapping[str, Tensor],
    place: _Place,
    method: Width,
) -> dict[str, int]:
    """Fill one parameter; how many of its elements are of which of report.KINDS."""
    if place.silent(method):
        parameter.zero_()
        return {"new": parameter.numel()}
    if place.source is None:
        return {"new": parameter.numel()}
    after = place.after if place.after in predecessor else place.source
    part = Part(
        new=parameter,
        old=_old_tensor(name, parameter, predecessor, place.source, place.rule),
        after=_old_tensor(name, parameter, predecessor, after, place.rule),
        axes=place.rule.axes,
        head=_head_width(student, f"{place.stack}.{place.layer}", parameter, place.rule),
        shifts=name.endswith("bias"),
    )
    parts = split_chunks(part) if method.splits_chunks else [part]
    filled = sum(method.fill(one) for one in parts)
    inserted = part.old.numel() if place.first else 0  # a layer taken again is all duplicate
    return {
        "inserted": inserted,
        "duplicated": filled - inserted,
        "new": parameter.numel() - filled,
    }


def _layer_sources(
    old: Mapping[str, int], new: Mapping[str, int], width: str, depth: str
) -> dict[str, list[int | None]]:
    """For each stack of the student, which of the predecessor's layers each of its layers takes."""
    for stack, count in old.items():
        if count > new.get(stack, 0):
            raise InputError(f"cannot grow {stack}: {count} layers to {new.get(stack, 0)}")
    methods = dict.fromkeys(new, DEPTH[depth])
    if width == "Released":  # the authors' code repeats layers in the ViT alone
        methods |= {stack: constant for stack in new if not stack.startswith("visual.transformer.")}
    return {stack: methods[stack](old.get(stack, 0), count) for stack, count in new.items()}


def _old_tensor(
    name: str, parameter: Tensor, predecessor: Mapping[str, Tensor], source: str, rule: GrowthRule
) -> Tensor:
    """The predecessor's tensor `source` for a parameter. Where the shared space shrinks it is cut
    off to what there is room for.
    """
    if source not in predecessor:
        raise InputError(f"cannot grow {name}: the predecessor has no {source}")
    old = predecessor[source]
    shapes = f"shape {list(old.shape)} to {list(parameter.shape)}"
    if not len(rule.axes) == old.ndim == parameter.ndim:
        raise InputError(f"cannot grow {name}: {shapes}, but {len(rule.axes)} axes are expected")
    sizes = zip(rule.axes, parameter.shape, old.shape, strict=True)
    if not all(axis.fits(new, old_size) for axis, new, old_size in sizes):
        raise InputError(f"cannot grow {name}: {shapes}")
    return old[tuple(slice(size) for size in parameter.shape)]


def _head_width(student: nn.Module, layer: str, parameter: Tensor, rule: GrowthRule) -> int:
    """Entries of one attention head along the parameter's axis of heads; 1 if it has none."""
    for axis, size in zip(rule.axes, parameter.shape, strict=True):
        if axis.space is Space.HEADS:
            heads: Any = student.get_submodule(f"{layer}.attn").num_heads
            return int(size // axis.chunks // heads)
    return 1
