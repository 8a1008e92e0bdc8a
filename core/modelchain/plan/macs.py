"""Multiply-accumulates and parameters of a model, from its config alone.

MACs are half of what `torch.utils.flop_counter.FlopCounterMode` counts: convolutions, linear
layers, and attention's QKᵀ and AV over all pairs of tokens (also in the causal text tower). Norms,
softmax, activations and table lookups count nothing.
"""

from __future__ import annotations

from fractions import Fraction

from modelchain.api.modelconfig import ModelConfig
from modelchain.families.tower import block_macs, block_parameters, hidden


def image_macs(config: ModelConfig) -> int:
    """Forward MACs of one image, projected to the embedding."""
    vision = config.vision_cfg
    return vision.family.image_macs(vision, config.embed_dim)


def text_macs(config: ModelConfig) -> int:
    """Forward MACs of one caption, padded to `context_length` tokens and projected at its
    end-of-text token.
    """
    text = config.text_cfg
    block = block_macs(text.width, hidden(text.width, text.mlp_ratio), text.context_length)
    return text.layers * block + text.width * config.embed_dim


def forward_macs(config: ModelConfig, captions: int) -> int:
    """Forward MACs of one sample: an image and its captions."""
    return image_macs(config) + captions * text_macs(config)


def parameters(config: ModelConfig) -> int:
    """Parameters as Table G counts them: the whole image tower, and of the text tower only the
    transformer's blocks.

    They equal Table G's to its two decimals, except for ViT-XB: its width of 1024 and 12 layers
    give 190.50 M, not 209.19.
    """
    vision, text = config.vision_cfg, config.text_cfg
    blocks = text.layers * block_parameters(text.width, hidden(text.width, text.mlp_ratio))
    return blocks + vision.family.parameters(vision, config.embed_dim)


def training_macs(config: ModelConfig, captions: int, batch: int) -> Fraction:
    """MACs to train on one sample: forward, backward and its share of the update.

    The backward pass costs two forward passes, less the patch embedding's, whose input needs no
    gradient. The update costs 3 MACs a parameter once a step, so 3/batch a sample. Forward and
    backward are the paper's Appendix C.2; the update is not. C.2 charges 3 MACs a parameter to
    every sample, and Table G's training cells hold even 9: they are 3 C_f - C_f1 + 9 P, with its
    own C_f and P and the patch embedding's forward pass as C_f1, to 0.003 GMACs in nine of eleven
    cells (ViT-XB is 0.04 above that, Swin-B 0.40 below).
    """
    forward, vision = forward_macs(config, captions), config.vision_cfg
    no_gradient = vision.family.patch_macs(vision)
    return 3 * forward - no_gradient + Fraction(3 * parameters(config), batch)
