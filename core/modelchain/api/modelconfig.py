"""An open_clip model config, of the shapes this version trains: ViT and Swin towers with a CLIP
text tower.

Field names are open_clip's own (`open_clip/model_configs/*.json`, CLIPVisionCfg, CLIPTextCfg), not
camelCase, so that a config can be pasted unchanged. A key that is not listed here is refused, since
it could change the arithmetic.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from modelchain.api.messages import TEXT_HEADS
from modelchain.families.registry import family_of
from modelchain.families.tower import WHOLE_MLP, ConfigModel, Family, Shape, VisionFields

VOCABULARY = 49_408  # open_clip's SimpleTokenizer; the end-of-text token is the highest id


class VisionConfig(VisionFields):
    """A ViT (`layers`, `width`, ...), or a Swin trunk by its timm name."""

    @model_validator(mode="after")
    def _rules_of_its_family(self) -> VisionConfig:
        for rule in self.family.RULES:
            if not rule.holds(self):
                raise PydanticCustomError("vision", rule.message, rule.python_values(self))
        return self

    @property
    def family(self) -> Family:
        return family_of(self)

    @property
    def shape(self) -> Shape:
        return self.family.shape(self)

    def resolved(self) -> dict[str, Any]:
        """The keys that open_clip is given and that are hashed, with every default filled in."""
        return self.family.resolved(self)


class TextConfig(ConfigModel):
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
        if self.width * self.mlp_ratio != int(self.width * self.mlp_ratio):
            raise PydanticCustomError("text", WHOLE_MLP, {"w": self.width, "r": self.mlp_ratio})
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def resolved(self) -> dict[str, Any]:
        return self.model_dump()


class ModelConfig(ConfigModel):
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
