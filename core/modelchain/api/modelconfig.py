"""An open_clip model config, of the shapes this version trains: ViT and Swin towers with a CLIP
text tower.

Field names are open_clip's own (`open_clip/model_configs/*.json`, CLIPVisionCfg, CLIPTextCfg), not
camelCase, so that a config can be pasted as it is. Anything that would change the arithmetic
without being listed here is refused.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from modelchain.api.messages import (
    BESIDE_TRUNK,
    HEADS,
    MLP,
    PATCHES,
    TEXT_HEADS,
    TIMM_ONLY,
    TRUNK_IMAGE,
    UNKNOWN_TRUNK,
)

VOCABULARY = 49_408  # open_clip's SimpleTokenizer; the end-of-text token is the highest id

# timm names of Table G's Swin trunks: first-stage width and blocks in each of the four stages.
SWIN_TRUNKS: dict[str, tuple[int, tuple[int, ...]]] = {
    "swin_tiny_patch4_window7_224": (96, (2, 2, 6, 2)),
    "swin_small_patch4_window7_224": (96, (2, 2, 18, 2)),
    "swin_base_patch4_window7_224": (128, (2, 2, 18, 2)),
    "swin_large_patch4_window7_224": (192, (2, 2, 18, 2)),
}
VIT_ONLY = ("patch_size", "width", "layers", "head_width", "mlp_ratio")
SWIN_HEAD_WIDTH, SWIN_PATCH, SWIN_WINDOW, SWIN_IMAGE = 32, 4, 7, 224


class _Config(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class VisionConfig(_Config):
    """A ViT (`layers`, `width`, ...), or a Swin trunk by its timm name."""

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

    @model_validator(mode="after")
    def _shape(self) -> VisionConfig:
        if self.timm_model_name is not None:
            self._swin()
        elif self.timm_pool is not None or self.timm_proj is not None:
            raise PydanticCustomError("vision", TIMM_ONLY)
        else:
            if self.width % self.head_width:
                raise PydanticCustomError("vision", HEADS, {"w": self.width, "h": self.head_width})
            if self.image_size % self.patch_size:
                raise PydanticCustomError(
                    "vision", PATCHES, {"s": self.image_size, "p": self.patch_size}
                )
            _whole_mlp(self.width, self.mlp_ratio)
        return self

    def _swin(self) -> None:
        if self.timm_model_name not in SWIN_TRUNKS:
            known = ", ".join(SWIN_TRUNKS)
            raise PydanticCustomError(
                "vision", UNKNOWN_TRUNK, {"name": self.timm_model_name, "known": known}
            )
        if self.model_fields_set.intersection(VIT_ONLY):
            raise PydanticCustomError("vision", BESIDE_TRUNK)
        if self.image_size != SWIN_IMAGE:
            raise PydanticCustomError("vision", TRUNK_IMAGE)

    @property
    def is_swin(self) -> bool:
        return self.timm_model_name is not None

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks in each stage of the tower; a ViT has one stage."""
        return SWIN_TRUNKS[self.timm_model_name][1] if self.timm_model_name else (self.layers,)

    @property
    def base_width(self) -> int:
        """Width of the first (for a ViT: every) block."""
        return SWIN_TRUNKS[self.timm_model_name][0] if self.timm_model_name else self.width

    @property
    def heads(self) -> int:
        return self.base_width // (SWIN_HEAD_WIDTH if self.is_swin else self.head_width)

    def resolved(self) -> dict[str, Any]:
        """The keys open_clip is given and the digest is made of, every default written out."""
        if self.is_swin:
            return {
                "timm_model_name": self.timm_model_name,
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
                "image_size": self.image_size,
            }
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "width": self.width,
            "layers": self.layers,
            "head_width": self.head_width,
            "mlp_ratio": self.mlp_ratio,
        }


class TextConfig(_Config):
    """CLIP's text transformer: causal, pooled at the end-of-text token."""

    context_length: int = Field(77, ge=3, le=4096)
    vocab_size: int = Field(VOCABULARY, ge=VOCABULARY, le=VOCABULARY)
    width: int = Field(512, ge=1, le=16_384)
    heads: int = Field(8, ge=1, le=256)
    layers: int = Field(12, ge=1, le=256)
    mlp_ratio: float = Field(4.0, gt=0, le=64)

    @model_validator(mode="after")
    def _shape(self) -> TextConfig:
        if self.width % self.heads:
            raise PydanticCustomError("text", TEXT_HEADS, {"w": self.width, "h": self.heads})
        _whole_mlp(self.width, self.mlp_ratio)
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def resolved(self) -> dict[str, Any]:
        return self.model_dump()


class ModelConfig(_Config):
    """`embed_dim`, `vision_cfg` and `text_cfg`, as in open_clip's model_configs."""

    embed_dim: int = Field(ge=1, le=16_384)
    vision_cfg: VisionConfig
    text_cfg: TextConfig
    quick_gelu: bool = False

    def resolved(self) -> dict[str, Any]:
        """Plain JSON with every default filled in: what is hashed, trained and exported."""
        return {
            "embed_dim": self.embed_dim,
            "quick_gelu": self.quick_gelu,
            "vision_cfg": self.vision_cfg.resolved(),
            "text_cfg": self.text_cfg.resolved(),
        }


def _whole_mlp(width: int, ratio: float) -> None:
    if width * ratio != int(width * ratio):
        raise PydanticCustomError("mlp", MLP, {"w": width, "r": ratio})
