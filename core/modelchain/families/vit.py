"""open_clip's own ViT: a width, a depth, and a class token that is projected to the embedding."""

from __future__ import annotations

from collections.abc import Mapping

from modelchain.cel import given, whole_product
from modelchain.families import tower
from modelchain.families.tower import (
    DEPTHS,
    Published,
    Shape,
    TableG,
    TowerRule,
    VisionFields,
    field,
)

NAME = "ViT"
HEADS = "width {w} is not divisible into heads of head_width {h}"
PATCHES = "image_size {s} is not divisible by patch_size {p}"
TIMM_ONLY = "timm_pool and timm_proj go with timm_model_name"

EQUAL: tuple[str, ...] = ("head_width", "patch_size", "mlp_ratio")
A100_MS: float = 0.0


def _published(width: int, layers: int, text_width: int, embed_dim: int, *cells: str) -> Published:
    vision = VisionFields(width=width, layers=layers, head_width=64, patch_size=16)
    return Published(vision, text_width, embed_dim, TableG(*cells))


# Embedding dimensions are those that Table G's parameter counts imply (ViT-S 384, ViT-L 768, all
# others 512); the authors' released configs have 512 everywhere. ViT-XB's counts imply none: its
# image tower, 1024 wide and 12 deep as the table says, has 152.67 M parameters at 512, the table
# 171.36 M, and the difference would take an embedding of some 18,800. Its printed MACs agree with
# that width and depth (48.76 GMACs; we count 48.73 with six captions). It has 512 as ViT-B does.
MODELS: Mapping[str, Published] = {
    "ViT-T-16": _published(192, 12, 256, 512, "5.82", "17.57"),
    "ViT-C-16": _published(256, 12, 320, 512, "9.23", "27.87"),
    "ViT-S-16": _published(384, 12, 384, 384, "14.44", "43.65"),
    "ViT-M-16": _published(512, 12, 448, 512, "21.88", "66.17"),
    "ViT-B-16": _published(768, 12, 512, 512, "35.09", "106.27"),
    "ViT-XB-16": _published(1024, 12, 512, 512, "48.76", "148.05"),
    "ViT-L-16": _published(1024, 24, 768, 768, "100.92", "306.11"),
}

_OTHER = "has(self.timm_model_name)"  # CEL: the tower `self` is of another family
RULES: tuple[TowerRule, ...] = (
    TowerRule(
        HEADS,
        lambda v: v.width % v.head_width == 0,
        f"{_OTHER} || {field('width')} % {field('head_width')} == 0",
        {"w": "width", "h": "head_width"},
    ),
    TowerRule(
        PATCHES,
        lambda v: v.image_size % v.patch_size == 0,
        f"{_OTHER} || {field('image_size')} % {field('patch_size')} == 0",
        {"s": "image_size", "p": "patch_size"},
    ),
    TowerRule(
        tower.WHOLE_MLP,
        lambda v: v.width * v.mlp_ratio == int(v.width * v.mlp_ratio),
        f"{_OTHER} || {whole_product(field('width'), field('mlp_ratio'))}",
        {"w": "width", "r": "mlp_ratio"},
    ),
    TowerRule(
        TIMM_ONLY,
        lambda v: v.timm_pool is None and v.timm_proj is None,
        f"{_OTHER} || (!has(self.timm_pool) && !has(self.timm_proj))",
        {},
    ),
)


def is_of(vision: VisionFields) -> bool:
    return vision.timm_model_name is None


def is_of_cel(at: str) -> str:
    return f"!has({at}.timm_model_name)"


def shape(vision: VisionFields) -> Shape:
    return Shape(vision.width, vision.width // vision.head_width, (vision.layers,))


def shape_cel(at: str) -> str:
    width, head_width, layers = (
        given(at, VisionFields, name) for name in ("width", "head_width", "layers")
    )
    return f"[{width}, {width} / {head_width}, {', '.join([layers] * DEPTHS)}]"


def known_cel(at: str) -> str:
    return ""


def patch_macs(vision: VisionFields) -> int:
    return tower.patch_macs(vision.image_size, vision.patch_size, vision.width)


def image_macs(vision: VisionFields, embed_dim: int) -> int:
    """Only the class token is projected."""
    mlp = tower.hidden(vision.width, vision.mlp_ratio)
    block = tower.block_macs(vision.width, mlp, _tokens(vision))
    return patch_macs(vision) + vision.layers * block + vision.width * embed_dim


def parameters(vision: VisionFields, embed_dim: int) -> int:
    """Patch embedding (no bias), class token, positions, two norms, projection; the blocks."""
    width = vision.width
    block = tower.block_parameters(width, tower.hidden(width, vision.mlp_ratio))
    ends = 3 * vision.patch_size**2 + 1 + _tokens(vision) + 4 + embed_dim
    return width * ends + vision.layers * block


def _tokens(vision: VisionFields) -> int:
    return int((vision.image_size // vision.patch_size) ** 2) + 1


def resolved(vision: VisionFields) -> dict[str, str | float]:
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "width": vision.width,
        "layers": vision.layers,
        "head_width": vision.head_width,
        "mlp_ratio": vision.mlp_ratio,
    }
