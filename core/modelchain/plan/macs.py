"""Multiply-accumulates and parameters of a model, from its config alone.

Counted is what `torch.utils.flop_counter.FlopCounterMode` counts, halved: convolutions, linear
layers, and attention's QKᵀ and AV over all pairs of tokens (also the causal text tower's). Norms,
softmax, activations and look-ups are free.
"""

from __future__ import annotations

from fractions import Fraction

from modelchain.api.modelconfig import (
    SWIN_HEAD_WIDTH,
    SWIN_PATCH,
    SWIN_WINDOW,
    ModelConfig,
    VisionConfig,
)

SWIN_MLP_RATIO = 4


def image_macs(config: ModelConfig) -> int:
    """Forward MACs of one image, projected to the embedding (the class token only, for a ViT)."""
    vision = config.vision_cfg
    if vision.is_swin:
        return _swin_macs(vision, config.embed_dim)
    tokens = _patches(vision) + 1
    block = _block_macs(vision.width, _mlp(vision.width, vision.mlp_ratio), tokens)
    return _patch_macs(vision) + vision.layers * block + vision.width * config.embed_dim


def text_macs(config: ModelConfig) -> int:
    """Forward MACs of one caption, padded to `context_length` tokens and projected at its
    end-of-text token.
    """
    text = config.text_cfg
    block = _block_macs(text.width, _mlp(text.width, text.mlp_ratio), text.context_length)
    return text.layers * block + text.width * config.embed_dim


def forward_macs(config: ModelConfig, captions: int) -> int:
    """Forward MACs of one sample: an image and its captions."""
    return image_macs(config) + captions * text_macs(config)


def parameters(config: ModelConfig) -> int:
    """Parameters as Table G counts them: the image tower whole, of the text tower the transformer's
    blocks alone.

    They are Table G's to its two decimals, but for ViT-XB: its width of 1024 and 12 layers give
    190.50 M, not 209.19.
    """
    vision, text = config.vision_cfg, config.text_cfg
    blocks = text.layers * _block_parameters(text.width, _mlp(text.width, text.mlp_ratio))
    return blocks + (_swin_parameters if vision.is_swin else _vit_parameters)(
        vision, config.embed_dim
    )


def training_macs(config: ModelConfig, captions: int, batch: int) -> Fraction:
    """MACs to train on one sample: forward, backward and its share of the update.

    The backward pass costs two forward passes, less the patch embedding's, whose input needs no
    gradient. The update costs 3 MACs a parameter once a step, so 3/batch a sample. Forward and
    backward are the paper's Appendix C.2; the update is not. C.2 charges 3 MACs a parameter to
    every sample, and Table G's training cells hold even 9: they are 3 C_f - C_f1 + 9 P, with its
    own C_f and P and the patch embedding's forward pass as C_f1, to 0.003 GMACs in nine of eleven
    cells (ViT-XB is 0.04 above that, Swin-B 0.40 below).
    """
    forward = forward_macs(config, captions)
    return 3 * forward - _patch_macs(config.vision_cfg) + Fraction(3 * parameters(config), batch)


def _mlp(width: int, ratio: float) -> int:
    return int(width * ratio)  # whole: ModelConfig refuses other ratios


def _patches(vision: VisionConfig) -> int:
    patch = SWIN_PATCH if vision.is_swin else vision.patch_size
    return (vision.image_size // patch) ** 2


def _patch_macs(vision: VisionConfig) -> int:
    patch = SWIN_PATCH if vision.is_swin else vision.patch_size
    return _patches(vision) * 3 * patch**2 * vision.base_width


def _block_macs(width: int, mlp: int, tokens: int, window: int | None = None) -> int:
    """One block over `tokens`, each attending to `window` of them (default: all): q, k, v, out;
    MLP; QKᵀ and AV.
    """
    return tokens * (4 * width**2 + 2 * width * mlp + 2 * (window or tokens) * width)


def _block_parameters(width: int, mlp: int) -> int:
    """q, k, v, out with biases; MLP with biases; two norms."""
    return 4 * width**2 + 4 * width + 2 * width * mlp + width + mlp + 4 * width


def _vit_parameters(vision: VisionConfig, embed: int) -> int:
    """Patch embedding (no bias), class token, positions, blocks, norms before and after,
    projection.
    """
    width, tokens = vision.width, _patches(vision) + 1
    block = _block_parameters(width, _mlp(width, vision.mlp_ratio))
    return width * (3 * vision.patch_size**2 + 1 + tokens + 4 + embed) + vision.layers * block


def _swin_macs(vision: VisionConfig, embed: int) -> int:
    tokens, width, total = _patches(vision), vision.base_width, _patch_macs(vision)
    for stage, depth in enumerate(vision.depths):
        if stage:
            tokens, width = tokens // 4, 2 * width
            total += (
                tokens * 2 * width * width
            )  # merging: four neighbours of width/2 to one of width
        total += depth * _block_macs(width, SWIN_MLP_RATIO * width, tokens, SWIN_WINDOW**2)
    return total + width * embed


def _swin_parameters(vision: VisionConfig, embed: int) -> int:
    """Patch embedding with bias and norm; per stage merging (norm, no bias) and blocks; last norm,
    projection.
    """
    width = vision.base_width
    total = width * (3 * SWIN_PATCH**2 + 1 + 2)
    for stage, depth in enumerate(vision.depths):
        if stage:
            width *= 2
            total += 2 * width * width + 4 * width
        positions = (2 * SWIN_WINDOW - 1) ** 2 * (width // SWIN_HEAD_WIDTH)
        total += depth * (_block_parameters(width, SWIN_MLP_RATIO * width) + positions)
    return total + 2 * width + width * embed
