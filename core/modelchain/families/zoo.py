"""The eleven models of the paper's Table G: their configs, and the table's own cells.

Embedding dimensions are those that Table G's parameter counts imply (ViT-S 384, ViT-L 768, all
others 512); the authors' released configs differ (512 everywhere, other Swin text widths). ViT-XB's
counts imply nothing: its image tower, 1024 wide and 12 deep as the table says, has 152.67 M at 512,
the table 171.36, and the difference would take an embedding of some 18,800. Its printed MACs do go
with that width (48.76 GMACs; 48.73 by our count of six captions); 512 is what its neighbour ViT-B
has.
"""

from __future__ import annotations

from dataclasses import dataclass

from modelchain.api.modelconfig import ModelConfig, TextConfig, VisionConfig


@dataclass(frozen=True)
class TableG:
    """MACs a sample in Table G, in 10^9, as printed: for four captions, it says, but those of six
    fit (to 3.6 %).
    """

    forward: str
    training: str


@dataclass(frozen=True)
class ZooModel:
    config: ModelConfig
    paper: TableG


def _text(width: int) -> TextConfig:
    return TextConfig(width=width, heads=width // 64, layers=12)


def _vit(width: int, layers: int, text: int, embed: int, *cells: str) -> ZooModel:
    vision = VisionConfig(width=width, layers=layers, head_width=64, patch_size=16)
    return ZooModel(
        ModelConfig(embed_dim=embed, vision_cfg=vision, text_cfg=_text(text)), TableG(*cells)
    )


def _swin(size: str, text: int, *cells: str) -> ZooModel:
    vision = VisionConfig(timm_model_name=f"swin_{size}_patch4_window7_224")
    return ZooModel(
        ModelConfig(embed_dim=512, vision_cfg=vision, text_cfg=_text(text)), TableG(*cells)
    )


MODELS: dict[str, ZooModel] = {
    "ViT-T-16": _vit(192, 12, 256, 512, "5.82", "17.57"),
    "ViT-C-16": _vit(256, 12, 320, 512, "9.23", "27.87"),
    "ViT-S-16": _vit(384, 12, 384, 384, "14.44", "43.65"),
    "ViT-M-16": _vit(512, 12, 448, 512, "21.88", "66.17"),
    "ViT-B-16": _vit(768, 12, 512, 512, "35.09", "106.27"),
    "ViT-XB-16": _vit(1024, 12, 512, 512, "48.76", "148.05"),
    "ViT-L-16": _vit(1024, 24, 768, 768, "100.92", "306.11"),
    "Swin-T": _swin("tiny", 256, "8.76", "26.60"),
    "Swin-S": _swin("small", 384, "18.40", "55.82"),
    "Swin-B": _swin("base", 512, "32.71", "98.84"),
    "Swin-L": _swin("large", 768, "73.48", "222.94"),
}
