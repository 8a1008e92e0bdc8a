"""What the axes of every parameter mean. Each parameter matches exactly one rule; buffers are never
touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum, auto
from itertools import product

from torch import Tensor

from modelchain.errors import InputError


class Space(StrEnum):
    """What an axis counts. A method that copies an entry of a space copies it in every tensor of
    the layer that has an axis of this space.
    """

    STREAM = auto()  # channels of the residual stream
    HEADS = auto()  # channels inside attention; the width of a head is constant along a chain
    MLP = auto()  # hidden units
    EMBEDDING = auto()  # the space that images and captions share
    FIXED = auto()  # positions, vocabulary, colours, pixels of a patch: never grows


class Role(StrEnum):
    """What a tensor does along an axis."""

    WRITES = auto()  # its outputs
    READS = auto()  # its inputs
    SCALES = auto()  # weight or bias of a LayerNorm whose output is read
    SCALES_STREAM = auto()  # of a LayerNorm whose output is the stream itself


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter. `chunks` independent tensors lie side by side along it, and each is
    grown by itself.
    """

    space: Space
    role: Role = Role.WRITES
    chunks: int = 1

    def fits(self, new: int, old: int) -> bool:
        """Whether a predecessor's axis of `old` entries can go into a student's of `new`. Only the
        shared space may shrink: in the paper's Table G it goes 512, 384, 512, 768.
        """
        if new % self.chunks or old % self.chunks:
            return False
        if new > old:
            return self.space is not Space.FIXED
        return new == old or self.space is Space.EMBEDDING

    def slices(self, size: int) -> list[slice]:
        """Where along an axis of `size` entries each chunk lies."""
        step = size // self.chunks
        return [slice(i * step, (i + 1) * step) for i in range(self.chunks)]


STREAM = Axis(Space.STREAM)
READS_STREAM = Axis(Space.STREAM, Role.READS)
NORM = Axis(Space.STREAM, Role.SCALES)
NORM_OF_STREAM = Axis(Space.STREAM, Role.SCALES_STREAM)
HEADS = Axis(Space.HEADS)
QKV = replace(HEADS, chunks=3)  # query, key and value in one tensor
READS_HEADS = Axis(Space.HEADS, Role.READS)
MLP = Axis(Space.MLP)
READS_MLP = Axis(Space.MLP, Role.READS)
EMBEDDING = Axis(Space.EMBEDDING)
FIXED = Axis(Space.FIXED)
MERGED_NORM = replace(NORM, chunks=4)  # Swin's patch merging concatenates four neighbours
READS_MERGED = replace(READS_STREAM, chunks=4)


@dataclass(frozen=True)
class GrowthRule:
    """Parameters whose whole name matches `pattern`. Its groups `stack` and `layer` say where a
    repeated layer is.

    `closes`: these parameters are the last that act on what a layer adds to the stream. If they are
    zero, the layer adds nothing.
    """

    pattern: str
    axes: tuple[Axis, ...]
    closes: bool = False


_VIT_LAYER = r"(?P<stack>(visual\.)?transformer\.resblocks)\.(?P<layer>\d+)"
_SWIN_LAYER = r"(?P<stack>visual\.trunk\.layers\.\d+\.blocks)\.(?P<layer>\d+)"
_VIT, _SWIN = _VIT_LAYER + r"\.", _SWIN_LAYER + r"\."
_TRUNK = r"visual\.trunk\."

RULES = (
    GrowthRule(r"logit_scale", ()),
    # text tower
    GrowthRule(r"token_embedding\.weight|positional_embedding", (FIXED, STREAM)),
    GrowthRule(r"ln_final\.(weight|bias)", (NORM,)),
    GrowthRule(r"text_projection", (READS_STREAM, EMBEDDING)),
    # ViT
    GrowthRule(r"visual\.conv1\.weight", (STREAM, FIXED, FIXED, FIXED)),
    GrowthRule(r"visual\.class_embedding", (STREAM,)),
    GrowthRule(r"visual\.ln_pre\.(weight|bias)", (NORM_OF_STREAM,)),
    GrowthRule(r"visual\.ln_post\.(weight|bias)", (NORM,)),
    GrowthRule(r"visual\.positional_embedding", (FIXED, STREAM)),
    GrowthRule(r"visual\.proj", (READS_STREAM, EMBEDDING)),
    # layers of the ViT and of the text tower
    GrowthRule(_VIT + r"ln_[12]\.(weight|bias)", (NORM,)),
    GrowthRule(_VIT + r"attn\.in_proj_weight", (QKV, READS_STREAM)),
    GrowthRule(_VIT + r"attn\.in_proj_bias", (QKV,)),
    GrowthRule(_VIT + r"attn\.out_proj\.weight", (STREAM, READS_HEADS), closes=True),
    GrowthRule(_VIT + r"mlp\.c_fc\.weight", (MLP, READS_STREAM)),
    GrowthRule(_VIT + r"mlp\.c_fc\.bias", (MLP,)),
    GrowthRule(_VIT + r"mlp\.c_proj\.weight", (STREAM, READS_MLP), closes=True),
    GrowthRule(_VIT + r"(attn\.out_proj|mlp\.c_proj)\.bias", (STREAM,), closes=True),
    # Swin (timm's trunk, open_clip's head)
    GrowthRule(_TRUNK + r"patch_embed\.proj\.weight", (STREAM, FIXED, FIXED, FIXED)),
    GrowthRule(_TRUNK + r"patch_embed\.proj\.bias", (STREAM,)),
    GrowthRule(_TRUNK + r"patch_embed\.norm\.(weight|bias)", (NORM_OF_STREAM,)),
    GrowthRule(_TRUNK + r"norm\.(weight|bias)", (NORM,)),
    GrowthRule(_TRUNK + r"layers\.\d+\.downsample\.norm\.(weight|bias)", (MERGED_NORM,)),
    GrowthRule(_TRUNK + r"layers\.\d+\.downsample\.reduction\.weight", (STREAM, READS_MERGED)),
    GrowthRule(r"visual\.head\.proj\.weight", (EMBEDDING, READS_STREAM)),
    GrowthRule(_SWIN + r"norm[12]\.(weight|bias)", (NORM,)),
    GrowthRule(_SWIN + r"attn\.qkv\.weight", (QKV, READS_STREAM)),
    GrowthRule(_SWIN + r"attn\.qkv\.bias", (QKV,)),
    GrowthRule(_SWIN + r"attn\.relative_position_bias_table", (FIXED, HEADS)),
    GrowthRule(_SWIN + r"attn\.proj\.weight", (STREAM, READS_HEADS), closes=True),
    GrowthRule(_SWIN + r"mlp\.fc1\.weight", (MLP, READS_STREAM)),
    GrowthRule(_SWIN + r"mlp\.fc1\.bias", (MLP,)),
    GrowthRule(_SWIN + r"mlp\.fc2\.weight", (STREAM, READS_MLP), closes=True),
    GrowthRule(_SWIN + r"(attn\.proj|mlp\.fc2)\.bias", (STREAM,), closes=True),
)


@dataclass(frozen=True)
class Part:
    """What a method in width fills. No axis of `new` is shorter than that of `old`."""

    new: Tensor  # to be filled in place; holds the student's own initialisation
    old: Tensor  # the predecessor's
    after: Tensor  # the same of the predecessor's next layer; `old` if there is none
    axes: tuple[Axis, ...]
    head: int = 1  # entries of an attention head along the axis of space HEADS
    shifts: bool = False  # a bias, not a weight


def split_chunks(part: Part) -> Iterator[Part]:
    """The independent tensors that lie side by side in a part, as views of it."""
    per_axis = [
        list(zip(axis.slices(new), axis.slices(old), strict=True))
        for axis, new, old in zip(part.axes, part.new.shape, part.old.shape, strict=True)
    ]
    plain = tuple(replace(axis, chunks=1) for axis in part.axes)
    for pairs in product(*per_axis):
        ours = tuple(new for new, _ in pairs)
        theirs = tuple(old for _, old in pairs)
        yield replace(
            part, new=part.new[ours], old=part.old[theirs], after=part.after[theirs], axes=plain
        )


def match(name: str) -> tuple[GrowthRule, str | None, int]:
    """The rule of a parameter and, in a stack of layers, the stack's name and the layer's index."""
    found = [(rule, hit) for rule in RULES if (hit := re.fullmatch(rule.pattern, name))]
    if len(found) != 1:
        raise InputError(f"cannot grow {name}: {len(found)} growth rules match it, expected one")
    rule, hit = found[0]
    groups = hit.groupdict()
    return rule, groups.get("stack"), int(groups.get("layer") or 0)


def layer_of(module: str) -> tuple[str, int] | None:
    """The stack's name and the layer's index, if a module of this name is a repeated layer."""
    hit = re.fullmatch(_VIT_LAYER, module) or re.fullmatch(_SWIN_LAYER, module)
    return (hit["stack"], int(hit["layer"])) if hit else None


def layers(names: Iterable[str]) -> dict[str, int]:
    """How many layers each stack has, from the highest index among its parameters' names."""
    counts: dict[str, int] = {}
    for name in sorted(names):
        _, stack, layer = match(name)
        if stack:
            counts[stack] = max(counts.get(stack, 0), layer + 1)
    return counts
