"""The eleven models of the paper's Table G, by the name that a stage may give."""

from __future__ import annotations

from dataclasses import dataclass

from modelchain.api.modelconfig import ModelConfig, TextConfig, VisionConfig
from modelchain.families.registry import FAMILIES
from modelchain.families.tower import Published, TableG


@dataclass(frozen=True)
class ZooModel:
    config: ModelConfig
    paper: TableG


def _model(model: Published) -> ZooModel:
    width = model.text_width
    config = ModelConfig(
        embed_dim=model.embed_dim,
        vision_cfg=VisionConfig(**model.vision.model_dump(exclude_unset=True)),
        text_cfg=TextConfig(width=width, heads=width // 64, layers=12),
    )
    return ZooModel(config, model.paper)


MODELS: dict[str, ZooModel] = {
    name: _model(model) for family in FAMILIES for name, model in family.MODELS.items()
}
