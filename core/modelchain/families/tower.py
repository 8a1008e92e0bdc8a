"""What every family of image towers has: the config's fields, the rules on them, its published
models, and what a transformer block costs.

A family is one module beside this one, which holds all that `Family` lists. `registry` names the
families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from modelchain.cel import given, quoted

WHOLE_MLP = "width {w} times mlp_ratio {r} is not a whole number"
DEPTHS = 4  # places that a rule of the CRD has for the depths of a tower's stages


class ConfigModel(BaseModel):
    """Base of the config's parts: an unknown key is an error and no value is converted."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class VisionFields(ConfigModel):
    """The keys of open_clip's CLIPVisionCfg that this version knows, for all families."""

    image_size: int = Field(224, ge=1, le=4096)
    patch_size: int = Field(16, ge=1, le=4096)
    width: int = Field(768, ge=1, le=16_384)
    layers: int = Field(12, ge=1, le=256)
    head_width: int = Field(64, ge=1, le=1024)
    mlp_ratio: float = Field(4.0, gt=0, le=64)
    timm_model_name: str | None = Field(None, max_length=63)
    timm_model_pretrained: Literal[False] = False
    timm_pool: Literal["avg"] | None = None
    timm_proj: Literal["linear"] | None = None


# CEL for a field of the tower `self`.
field = partial(given, "self", VisionFields)


@dataclass(frozen=True)
class TowerRule:
    """A condition on the fields of a tower: `holds` checks it on the command line, `cel` on the API
    server.

    `cel` is evaluated for towers of every family, so it must be true for the others. `message`
    names `values` in braces: each is a field of the tower, or a text.
    """

    message: str
    holds: Callable[[VisionFields], bool]
    cel: str
    values: Mapping[str, str]

    def python_values(self, vision: VisionFields) -> dict[str, str | float]:
        """The values that the message names, of this tower."""
        return {
            name: getattr(vision, value) if value in VisionFields.model_fields else value
            for name, value in self.values.items()
        }

    def cel_values(self) -> dict[str, str]:
        """CEL for the values that the message names."""
        return {
            name: field(value) if value in VisionFields.model_fields else quoted(value)
            for name, value in self.values.items()
        }


@dataclass(frozen=True)
class Shape:
    """What may grow along a chain: the width and the heads of the first block, and the number of
    blocks in each stage of the tower.
    """

    width: int
    heads: int
    depths: tuple[int, ...]

    def places(self) -> list[int]:
        """The shape as a list of one length for all families, as the CRD's rules compare it."""
        return [self.width, self.heads, *self.depths * (DEPTHS // len(self.depths))]


@dataclass(frozen=True)
class TableG:
    """MACs of one sample in 10^9, as the paper's Table G prints them. The table says
    four captions, but the numbers fit six (within 3.6 %).
    """

    forward: str
    training: str


@dataclass(frozen=True)
class Published:
    """A model of the paper's Table G. Its text tower has 12 layers and heads 64 wide."""

    vision: VisionFields
    text_width: int
    embed_dim: int
    paper: TableG


class Family(Protocol):
    """What the module of a family holds."""

    NAME: str
    """As messages call it."""
    MODELS: Mapping[str, Published]
    """The models of Table G, by the name that a stage may give, smallest first."""
    RULES: tuple[TowerRule, ...]
    """What must hold within one tower. The first that fails is reported."""
    EQUAL: tuple[str, ...]
    """Fields that must be equal along a chain, beside `image_size`."""
    A100_MS: float
    """Milliseconds that a sample takes on an A100 beyond what its MACs explain."""

    def is_of(self, vision: VisionFields) -> bool:
        """Whether the tower is of this family: true for exactly one family."""

    def is_of_cel(self, at: str) -> str:
        """CEL for `is_of`; `at` is CEL for the tower's config."""

    def shape(self, vision: VisionFields) -> Shape:
        """The tower's shape. Its rules must hold."""

    def shape_cel(self, at: str) -> str:
        """CEL for `Shape.places`."""

    def known_cel(self, at: str) -> str:
        """CEL that is true where `shape_cel` can be evaluated; empty if that is always."""

    def patch_macs(self, vision: VisionFields) -> int:
        """Forward MACs of the patch embedding for one image."""

    def image_macs(self, vision: VisionFields, embed_dim: int) -> int:
        """Forward MACs of one image, projected to `embed_dim`."""

    def parameters(self, vision: VisionFields, embed_dim: int) -> int:
        """Parameters of the tower with its projection to `embed_dim`."""

    def resolved(self, vision: VisionFields) -> dict[str, str | float]:
        """The keys that open_clip is given and that are hashed, with every default filled in."""


def hidden(width: int, ratio: float) -> int:
    """Hidden units of a block's MLP. The rules refuse a ratio for which this is not whole."""
    return int(width * ratio)


def block_macs(width: int, mlp: int, tokens: int, window: int | None = None) -> int:
    """Forward MACs of one block over `tokens`, each attending to `window` of them (default: all).

    The terms are q, k, v and out; the MLP; QKᵀ and AV.
    """
    return tokens * (4 * width**2 + 2 * width * mlp + 2 * (window or tokens) * width)


def block_parameters(width: int, mlp: int) -> int:
    """Parameters of one block: q, k, v, out and the MLP with biases, and two norms."""
    return 4 * width**2 + 4 * width + 2 * width * mlp + width + mlp + 4 * width


def patch_macs(image: int, patch: int, width: int) -> int:
    """Forward MACs of a patch embedding: a convolution of three colours, as large as its stride."""
    return (image // patch) ** 2 * 3 * patch**2 * width
