"""Growth: a successor's first weights from its trained predecessor (inverse weight initialisation, paper 3.1.1).

Every parameter matches exactly one rule, which says what its axes are. In width a method places the predecessor's
tensor inside the student's own initialisation; in depth a method says which predecessor layer each student layer
takes. Another method is another entry of WIDTH or DEPTH. Buffers are never touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from modelchain.errors import InputError


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter: `chunks` tensors of their own lie side by side along it, each inserted on its own."""

    chunks: int = 1
    grows: bool = True
    shrinks: bool = False

    def fits(self, new: int, old: int) -> bool:
        """Whether a predecessor's axis of `old` entries can go into a student's axis of `new`."""
        sizes = new == old or (self.grows if new > old else self.shrinks)
        return sizes and new % self.chunks == old % self.chunks == 0

    def blocks(self, new: int, old: int) -> list[tuple[slice, slice]]:
        """For each chunk the student's leading entries and the predecessor's entries that go there."""
        new, old = new // self.chunks, old // self.chunks
        keep = min(new, old)
        return [(slice(i * new, i * new + keep), slice(i * old, i * old + keep)) for i in range(self.chunks)]


WIDTH_AXIS = Axis()  # channels, MLP units, heads: head width is constant along a chain, so leading heads stay whole
EMBEDDING = Axis(shrinks=True)  # the shared space: Table G goes 512, 384, 512, 768
FIXED = Axis(grows=False)  # positions, vocabulary, colours, pixels of a patch
QKV = Axis(chunks=3)  # query, key and value in one tensor
MERGED = Axis(chunks=4)  # Swin's patch merging: the channels of four neighbours, concatenated


@dataclass(frozen=True)
class Rule:
    """Parameters whose whole name matches `pattern`; its groups `stack` and `layer` say where a repeated layer is."""

    pattern: str
    axes: tuple[Axis, ...]


_VIT = r"(?P<stack>(visual\.)?transformer\.resblocks)\.(?P<layer>\d+)\."
_TRUNK = r"visual\.trunk\."
_SWIN = r"(?P<stack>visual\.trunk\.layers\.\d+\.blocks)\.(?P<layer>\d+)\."

RULES = (
    Rule(r"logit_scale", ()),
    # text tower
    Rule(r"token_embedding\.weight|positional_embedding", (FIXED, WIDTH_AXIS)),
    Rule(r"ln_final\.(weight|bias)", (WIDTH_AXIS,)),
    Rule(r"text_projection", (WIDTH_AXIS, EMBEDDING)),
    # ViT
    Rule(r"visual\.conv1\.weight", (WIDTH_AXIS, FIXED, FIXED, FIXED)),
    Rule(r"visual\.class_embedding|visual\.ln_(pre|post)\.(weight|bias)", (WIDTH_AXIS,)),
    Rule(r"visual\.positional_embedding", (FIXED, WIDTH_AXIS)),
    Rule(r"visual\.proj", (WIDTH_AXIS, EMBEDDING)),
    # layers of the ViT and of the text tower
    Rule(_VIT + r"attn\.in_proj_weight", (QKV, WIDTH_AXIS)),
    Rule(_VIT + r"attn\.in_proj_bias", (QKV,)),
    Rule(_VIT + r"(attn\.out_proj|mlp\.c_fc|mlp\.c_proj)\.weight", (WIDTH_AXIS, WIDTH_AXIS)),
    Rule(_VIT + r"((attn\.out_proj|mlp\.c_fc|mlp\.c_proj)\.bias|ln_[12]\.(weight|bias))", (WIDTH_AXIS,)),
    # Swin (timm's trunk, open_clip's head)
    Rule(_TRUNK + r"patch_embed\.proj\.weight", (WIDTH_AXIS, FIXED, FIXED, FIXED)),
    Rule(_TRUNK + r"(patch_embed\.proj\.bias|(patch_embed\.)?norm\.(weight|bias))", (WIDTH_AXIS,)),
    Rule(_TRUNK + r"layers\.\d+\.downsample\.norm\.(weight|bias)", (MERGED,)),
    Rule(_TRUNK + r"layers\.\d+\.downsample\.reduction\.weight", (WIDTH_AXIS, MERGED)),
    Rule(r"visual\.head\.proj\.weight", (EMBEDDING, WIDTH_AXIS)),
    Rule(_SWIN + r"attn\.qkv\.weight", (QKV, WIDTH_AXIS)),
    Rule(_SWIN + r"attn\.qkv\.bias", (QKV,)),
    Rule(_SWIN + r"attn\.relative_position_bias_table", (FIXED, WIDTH_AXIS)),
    Rule(_SWIN + r"(attn\.proj|mlp\.fc[12])\.weight", (WIDTH_AXIS, WIDTH_AXIS)),
    Rule(_SWIN + r"((attn\.proj|mlp\.fc[12])\.bias|norm[12]\.(weight|bias))", (WIDTH_AXIS,)),
)


def insert(new: Tensor, old: Tensor, axes: tuple[Axis, ...]) -> int:
    """Insertion (paper Figure A c): `old` into the leading corner of each chunk of `new`, in place.

    Returns how many elements of `new` came from `old`; the others keep their value.
    """
    count = 0
    for blocks in product(*(axis.blocks(n, o) for axis, n, o in zip(axes, new.shape, old.shape, strict=True))):
        part = old[tuple(source for _, source in blocks)]
        new[tuple(target for target, _ in blocks)] = part
        count += part.numel()
    return count


def duplicate(old: int, new: int) -> list[int]:
    """Duplicate insertion (paper 3.1.1): the predecessor's layer, of `old`, for each of the student's `new` layers.

    Not told apart: Swin's plain and shifted windows, which alternate; 6 -> 18 layers takes each three times in a row.
    """
    return [layer * old // new for layer in range(new)]


WIDTH = {"Insert": insert}
DEPTH = {"Duplicate": duplicate}


@dataclass(frozen=True)
class GrowthReport:
    """Where the student's elements came from; the three counts add up to all its parameters."""

    method: dict[str, str]
    inserted: int  # from the predecessor, by the first student layer that takes a predecessor layer
    duplicated: int  # from the predecessor, by later student layers taking the same one
    new: int  # kept from the student's own initialisation

    def to_dict(self) -> dict[str, Any]:
        """As in `results.json`: `{method: {width, depth}, inserted, duplicated, new}`."""
        return asdict(self)


def grow(
    student: nn.Module, predecessor: Mapping[str, Tensor], width: str = "Insert", depth: str = "Duplicate"
) -> GrowthReport:
    """Fill `student` (an open_clip CLIP with its own initialisation), in place, from a predecessor's state dict.

    Raises InputError naming the parameter that no rule (or more than one) matches, that only one of the two models
    has, whose number of axes is not the rule's, or that would have to shrink; and for an unknown method.
    """
    if width not in WIDTH or depth not in DEPTH:
        raise InputError(f"growth by {width} in width and {depth} in depth is not known", field="spec.transfer")
    parameters = dict(student.named_parameters())
    buffers = {name for name, _ in student.named_buffers()}
    old_layers, new_layers = _layers(predecessor.keys() - buffers), _layers(parameters)
    for tower, count in old_layers.items():
        if count > new_layers.get(tower, 0):
            raise InputError(f"cannot grow {tower}: {count} layers to {new_layers.get(tower, 0)}")
    sources = {stack: DEPTH[depth](old_layers.get(stack, 0), count) for stack, count in new_layers.items()}

    used: set[str] = set()
    inserted = duplicated = new = 0
    for name, parameter in parameters.items():
        rule, stack, layer = _match(name)
        source, first = name, True
        if stack:
            taken = sources[stack]
            source = name.replace(f"{stack}.{layer}.", f"{stack}.{taken[layer]}.", 1)
            first = taken.index(taken[layer]) == layer
        if source not in predecessor:
            raise InputError(f"cannot grow {name}: the predecessor has no {source}")
        old = predecessor[source]
        shapes = f"shape {list(old.shape)} to {list(parameter.shape)}"
        if not len(rule.axes) == old.ndim == parameter.ndim:
            raise InputError(f"cannot grow {name}: {shapes}, but {len(rule.axes)} axes are expected")
        if not all(axis.fits(n, o) for axis, n, o in zip(rule.axes, parameter.shape, old.shape, strict=True)):
            raise InputError(f"cannot grow {name}: {shapes}")
        with torch.no_grad():
            count = WIDTH[width](parameter, old, rule.axes)
        inserted, duplicated = (inserted + count, duplicated) if first else (inserted, duplicated + count)
        new += parameter.numel() - count
        used.add(source)
    if left := sorted(predecessor.keys() - used - buffers):
        raise InputError(f"cannot grow: the student has no place for the predecessor's {left[0]}")
    return GrowthReport({"width": width, "depth": depth}, inserted, duplicated, new)


def _match(name: str) -> tuple[Rule, str | None, int]:
    # The rule of a parameter and, in a stack of layers, the stack's name and the layer's index.
    found = [(rule, match) for rule in RULES if (match := re.fullmatch(rule.pattern, name))]
    if len(found) != 1:
        raise InputError(f"cannot grow {name}: {len(found)} growth rules match it, expected one")
    rule, match = found[0]
    groups = match.groupdict()
    return rule, groups.get("stack"), int(groups.get("layer") or 0)


def _layers(names: Iterable[str]) -> dict[str, int]:
    # How many layers each stack has, from the highest index among its parameters' names.
    counts: dict[str, int] = {}
    for name in sorted(names):
        _, stack, layer = _match(name)
        if stack:
            counts[stack] = max(counts.get(stack, 0), layer + 1)
    return counts
