"""timm's Swin trunks of Table G, by name, with open_clip's head: four stages, each twice as wide
and at half the resolution of the one before.

Swin claims every config with a `timm_model_name`. A second family of timm trunks would share that
key. Then `is_of`, `is_of_cel`, `known_cel` and the rule of unknown names must tell the two apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from modelchain.cel import literal
from modelchain.families import tower
from modelchain.families.tower import Published, Shape, TableG, TowerRule, VisionFields, field

NAME = "Swin"
UNKNOWN_TRUNK = "timm_model_name '{name}' is not supported; use one of {known}"
BESIDE_TRUNK = (
    "patch_size, layers, head_width, mlp_ratio and width cannot be set beside timm_model_name"
)
TRUNK_IMAGE = "a Swin trunk of this name takes image_size 224"

EQUAL: tuple[str, ...] = ()  # the name fixes all but the sizes, alike in all four trunks
A100_MS: float = 0.590171  # fitted together with the constants of `modelchain.plan.plan`

HEAD_WIDTH = 32
PATCH = 4
WINDOW = 7
IMAGE = 224
MLP_RATIO = 4


def _trunk(width: int, *depths: int) -> Shape:
    return Shape(width, width // HEAD_WIDTH, depths)


TRUNKS = {
    "swin_tiny_patch4_window7_224": _trunk(96, 2, 2, 6, 2),
    "swin_small_patch4_window7_224": _trunk(96, 2, 2, 18, 2),
    "swin_base_patch4_window7_224": _trunk(128, 2, 2, 18, 2),
    "swin_large_patch4_window7_224": _trunk(192, 2, 2, 18, 2),
}


def _published(size: str, text_width: int, *cells: str) -> Published:
    vision = VisionFields(timm_model_name=f"swin_{size}_patch4_window7_224")
    return Published(vision, text_width, 512, TableG(*cells))


# The authors' released configs have other text widths.
MODELS: Mapping[str, Published] = {
    "Swin-T": _published("tiny", 256, "8.76", "26.60"),
    "Swin-S": _published("small", 384, "18.40", "55.82"),
    "Swin-B": _published("base", 512, "32.71", "98.84"),
    "Swin-L": _published("large", 768, "73.48", "222.94"),
}


def is_of(vision: VisionFields) -> bool:
    return vision.timm_model_name is not None


def is_of_cel(at: str) -> str:
    return f"has({at}.timm_model_name)"


def known_cel(at: str) -> str:
    name = f"{at}.timm_model_name"
    return f"!has({name}) || {name} in {literal(list(TRUNKS))}"


_OTHER = "!has(self.timm_model_name)"  # CEL: the tower `self` is of another family
_VIT_ONLY = ("patch_size", "width", "layers", "head_width", "mlp_ratio")
RULES: tuple[TowerRule, ...] = (
    TowerRule(
        UNKNOWN_TRUNK,
        lambda v: v.timm_model_name in TRUNKS,
        known_cel("self"),
        {"name": "timm_model_name", "known": ", ".join(TRUNKS)},
    ),
    TowerRule(
        BESIDE_TRUNK,
        lambda v: not v.model_fields_set.intersection(_VIT_ONLY),
        f"{_OTHER} || !({' || '.join(f'has(self.{key})' for key in _VIT_ONLY)})",
        {},
    ),
    TowerRule(
        TRUNK_IMAGE,
        lambda v: v.image_size == IMAGE,
        f"{_OTHER} || {field('image_size')} == {IMAGE}",
        {},
    ),
)


def shape(vision: VisionFields) -> Shape:
    return TRUNKS[vision.timm_model_name or ""]


def shape_cel(at: str) -> str:
    shapes = literal({name: shape.places() for name, shape in TRUNKS.items()})
    return f"{shapes}[{at}.timm_model_name]"


def patch_macs(vision: VisionFields) -> int:
    return tower.patch_macs(vision.image_size, PATCH, shape(vision).width)


def image_macs(vision: VisionFields, embed_dim: int) -> int:
    """The mean of the last stage's tokens is projected."""
    total = patch_macs(vision)
    tokens = (vision.image_size // PATCH) ** 2
    for width, depth, merged in _stages(vision):
        if merged:
            tokens //= 4
            total += tokens * 2 * width * width  # four neighbours of width/2 to one of width
        total += depth * tower.block_macs(width, MLP_RATIO * width, tokens, WINDOW**2)
    return total + width * embed_dim


def parameters(vision: VisionFields, embed_dim: int) -> int:
    """Patch embedding with bias and norm; in each stage merging (norm, no bias) and blocks; last
    norm and projection.
    """
    total = shape(vision).width * (3 * PATCH**2 + 1 + 2)
    for width, depth, merged in _stages(vision):
        if merged:
            total += 2 * width * width + 4 * width
        positions = (2 * WINDOW - 1) ** 2 * (width // HEAD_WIDTH)
        total += depth * (tower.block_parameters(width, MLP_RATIO * width) + positions)
    return total + 2 * width + width * embed_dim


def _stages(vision: VisionFields) -> Iterator[tuple[int, int, bool]]:
    """Of each stage of the tower: its width, its blocks, and whether patches are merged before."""
    of = shape(vision)
    for index, depth in enumerate(of.depths):
        yield of.width * 2**index, depth, index > 0


def resolved(vision: VisionFields) -> dict[str, str | float]:
    return {
        "timm_model_name": vision.timm_model_name or "",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": vision.image_size,
    }
