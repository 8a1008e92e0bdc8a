"""CLIP models: building and running them. The one module that knows open_clip's model classes (pinned `>=3.3,<4`).

Shape suffixes as everywhere in the trainer: N pictures, K captions, L tokens, D embedding dimensions, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from open_clip import CLIP, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

from modelchain_data.batches import Chunk


class Features(NamedTuple):
    """What a student's forward pass gives: raw features, and the same in the predecessor's space (after T)."""

    image: Tensor  # [N, D]
    text: Tensor  # [K, D]
    scale: Tensor  # [], exp(logit_scale)
    projected_image: Tensor  # [N, D of the predecessor]; `image` itself without T
    projected_text: Tensor  # [K, D of the predecessor]; `text` itself without T


def build(config: dict[str, Any], seed: int) -> CLIP:
    """A model of an open_clip config with open_clip's own initialisation: on the CPU, fp32, in training mode.

    A pure function of its arguments: the global generators are left alone and nothing is downloaded. timm's Swin trunks
    keep their default stochastic depth (drop_path 0.1), which acts in training mode only: put a teacher in `eval()`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        return CLIP(**config)


@cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    # Cached: making a tensor on a GPU from Python numbers waits for the GPU.
    mean, std = (torch.tensor(c, device=device).view(3, 1, 1) for c in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return mean, std


def normalise(images_N3HW: Tensor) -> Tensor:
    """uint8 RGB pixels to what the towers expect (float32, open_clip's default mean and std), on the same device."""
    mean, std = _normalisation(images_N3HW.device)
    return images_N3HW.float().div_(255).sub_(mean).div_(std)


def encode_image(model: CLIP, images_N3HW: Tensor) -> Tensor:
    """Features [N, D] of normalised pictures, not of unit length."""
    return model.encode_image(images_N3HW)


def encode_text(model: CLIP, tokens_NL: Tensor) -> Tensor:
    """Features [N, D] of tokenised captions, not of unit length, for any L <= context_length.

    Exact for every L that covers the end-of-text token, the highest id: attention is causal, so what follows that
    token cannot reach the feature. (`CLIP.encode_text` insists on the whole context.)
    """
    length = tokens_NL.shape[1]
    x_NLW = model.token_embedding(tokens_NL) + model.positional_embedding[:length]
    x_NLW = model.transformer(x_NLW, attn_mask=model.attn_mask[:length, :length])
    last_NW = x_NLW[torch.arange(len(x_NLW), device=x_NLW.device), tokens_NL.argmax(dim=-1)]
    return model.ln_final(last_NW) @ model.text_projection


def encode_text_chunks(model: CLIP, chunks: Sequence[Chunk]) -> Tensor:
    """Features [K, D] of captions sorted into chunks by length; together the chunks' rows are 0 to K - 1, each once."""
    features = torch.cat([encode_text(model, tokens) for tokens, _ in chunks])
    # Every row is written once, and the gradient is a plain selection: deterministic on every device.
    return torch.empty_like(features).index_copy(0, torch.cat([rows for _, rows in chunks]), features)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices only; no biases (Swin's 2-D position biases included), norms, scales."""
    return parameter.ndim >= 2 and "bias" not in name


def _projection(own: int, predecessor: int) -> nn.Linear:
    # T(.) of paper Eq. 1, starting as the left inverse of the insertion.
    linear = nn.utils.skip_init(nn.Linear, own, predecessor, bias=False)
    nn.init.eye_(linear.weight)
    return linear


class Student(nn.Module):
    """The model in training with its projections T, in one module so that DDP sees every parameter.

    T exists only when `predecessor_dim`, the predecessor's embed_dim, differs from the model's own.
    """

    def __init__(self, clip: CLIP, predecessor_dim: int | None = None):
        super().__init__()
        self.clip = clip
        own = clip.text_projection.shape[1]
        self.image_projection: nn.Linear | None = None
        self.text_projection: nn.Linear | None = None
        if predecessor_dim is not None and predecessor_dim != own:
            self.image_projection = _projection(own, predecessor_dim)
            self.text_projection = _projection(own, predecessor_dim)

    def forward(self, images_N3HW: Tensor, chunks: Sequence[Chunk]) -> Features:
        """Features of N normalised pictures and K chunked captions."""
        image = encode_image(self.clip, images_N3HW)
        text = encode_text_chunks(self.clip, chunks)
        return Features(
            image=image,
            text=text,
            scale=self.clip.logit_scale.exp(),
            projected_image=self.image_projection(image) if self.image_projection else image,
            projected_text=self.text_projection(text) if self.text_projection else text,
        )
