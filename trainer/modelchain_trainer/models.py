"""CLIP models: building and running them. The only module that knows open_clip's model classes
(pinned `>=3.3,<4`).

Shape suffixes, as everywhere in the trainer: N pictures, K captions, L tokens, D embedding
dimensions, H and W pixels; inside a layer W is the width of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from open_clip import CLIP, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transformer import ResidualAttentionBlock
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from modelchain_data.batches import Chunk


class Features(NamedTuple):
    """The result of a student's forward pass: features of any length, and the same features in the
    predecessor's space (after T).
    """

    image: Tensor  # [N, D]
    text: Tensor  # [K, D]
    scale: Tensor  # [], exp(logit_scale)
    projected_image: Tensor  # [N, D of the predecessor]; `image` itself without T
    projected_text: Tensor  # [K, D of the predecessor]; `text` itself without T


class Layer(ResidualAttentionBlock):  # type: ignore[misc]
    """open_clip's layer with the same parameters. It can also compute its output for a single token
    of each sequence.

    The last layer of a tower needs no more: keys and values of every token, but queries and the MLP
    of the pooled token alone.
    """

    def forward(
        self, x_NLW: Tensor, attn_mask: Tensor | None = None, at: Tensor | int | None = None
    ) -> Tensor:
        """The stream after this layer: [N, L, W], or [N, W] of the tokens that `at` names.

        Args:
            attn_mask: only its presence counts, because in CLIP it is always the causal one. With
                it a token sees those up to itself, else all.
            at: the token of each sequence, int64 [N]; or, without a mask, one number for all.
        """
        y_NLW = self.ln_1(x_NLW)
        queried = y_NLW
        causal = attn_mask is not None
        mask = None
        if at is not None:
            every = slice(None) if isinstance(at, int) else torch.arange(len(at), device=at.device)
            x_NLW, queried = x_NLW[every, at], y_NLW[every, at].unsqueeze(1)
            if causal:
                assert not isinstance(at, int), "one number for all needs no mask"
                # One query a sequence: a causal mask has to say where in the sequence it stands.
                places = torch.arange(y_NLW.shape[1], device=y_NLW.device)
                mask = (places <= at[:, None])[:, None, None]
                causal = False
        attended = _attention(self.attn, queried, y_NLW, mask, causal).flatten(2)
        x = x_NLW + linear(attended, self.attn.out_proj.weight, self.attn.out_proj.bias).view_as(
            x_NLW
        )
        return x + self.mlp(self.ln_2(x))


def _attention(
    attn: nn.MultiheadAttention, queried: Tensor, y: Tensor, mask: Tensor | None, causal: bool
) -> Tensor:
    """Attention of the tokens `queried` [N, Q, W] over all tokens `y` [N, L, W]: [N, Q, heads, W /
    heads].
    """
    width = attn.embed_dim
    weight, bias = attn.in_proj_weight, attn.in_proj_bias  # query, key and value in one
    heads = (attn.num_heads, -1)
    if queried is y:
        q, k, v = linear(y, weight, bias).unflatten(-1, (3, *heads)).unbind(2)
    else:
        q = linear(queried, weight[:width], bias[:width]).unflatten(-1, heads)
        k, v = linear(y, weight[width:], bias[width:]).unflatten(-1, (2, *heads)).unbind(2)
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)


def build(config: dict[str, Any], seed: int) -> CLIP:
    """A model of an open_clip config with open_clip's own initialisation: on the CPU, fp32, in
    training mode.

    A pure function of its arguments: it does not touch the global generators and downloads nothing.
    timm's Swin trunks keep their default stochastic depth (drop_path 0.1), which acts in training
    mode only, so a teacher has to be put in `eval()`.
    """
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the accelerators too, which are not forked here.
        torch.default_generator.manual_seed(seed)
        clip = CLIP(**config)
    for module in clip.modules():
        if isinstance(module, ResidualAttentionBlock):
            module.__class__ = Layer  # the same parameters, another forward
    return clip


def frozen(config: dict[str, Any], weights: dict[str, Tensor], device: torch.device) -> CLIP:
    """A trained model for evaluation alone, as a teacher is."""
    clip = build(config, seed=0)  # of the initialisation nothing remains
    clip.load_state_dict(weights)
    return clip.to(device).eval().requires_grad_(False)


@cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    # Cached, because making a tensor on a GPU from Python numbers waits for the GPU.
    mean = torch.tensor(OPENAI_DATASET_MEAN, device=device)
    std = torch.tensor(OPENAI_DATASET_STD, device=device)
    return mean.view(3, 1, 1), std.view(3, 1, 1)


def normalise(images_N3HW: Tensor) -> Tensor:
    """uint8 RGB pixels as the towers expect them: float32, open_clip's default mean and std, on the
    same device.
    """
    mean, std = _normalisation(images_N3HW.device)
    return images_N3HW.float().div_(255).sub_(mean).div_(std)


def encode_image(model: CLIP, images_N3HW: Tensor) -> Tensor:
    """Features [N, D] of normalised pictures, not of unit length."""
    visual = model.visual
    if not hasattr(visual, "transformer"):  # Swin: it pools over all tokens
        return visual(images_N3HW)
    x_NLW = visual._embeds(images_N3HW)
    *layers, last = visual.transformer.resblocks
    for layer in layers:
        x_NLW = layer(x_NLW)
    return visual.ln_post(last(x_NLW, at=0)) @ visual.proj


def encode_text_chunks(model: CLIP, chunks: Sequence[Chunk]) -> Tensor:
    """Features [K, D], not of unit length, of captions in chunks of any length L <= context_length;
    together the chunks' rows are 0 to K - 1, each once.

    Exact for every L that covers the end-of-text token, which has the highest id: attention is
    causal, so what follows that token cannot reach the feature. (`CLIP.encode_text` insists on the
    whole context.)
    """
    tokens, rows = zip(*chunks, strict=True)
    # All chunks are looked up at once, because the gradient of each look-up is as large as the
    # whole vocabulary.
    looked_up = model.token_embedding(torch.cat([some.flatten() for some in tokens]))
    embedded = looked_up.split([some.numel() for some in tokens])
    *layers, last = model.transformer.resblocks
    parts = []
    for tokens_NL, x in zip(tokens, embedded, strict=True):
        x_NLW = x.view(*tokens_NL.shape, -1) + model.positional_embedding[: tokens_NL.shape[1]]
        for layer in layers:
            x_NLW = layer(x_NLW, model.attn_mask)
        pooled = last(x_NLW, model.attn_mask, tokens_NL.argmax(dim=-1))
        parts.append(model.ln_final(pooled) @ model.text_projection)
    features = torch.cat(parts)
    # Every row is written once and the gradient is a plain selection, so this is deterministic on
    # every device.
    return torch.empty_like(features).index_copy(0, torch.cat(rows), features)


def compile_layers(*towers: nn.Module | None) -> None:
    """Compile each layer in place. The layers of a ViT or a text tower have the same code, so a
    tower costs two compilations for each length of captions (13 at most, by the loader) and not one
    a layer; in a Swin every block costs one.
    """
    # Student and teacher, both towers, every length, with and without gradients: all of them count
    # as recompilations of one function.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 1024
    # Otherwise DDP cuts every layer's graph where a bucket is full, the first after 1 MiB. A layer
    # is small enough as it is for communication to overlap with the backward pass.
    torch._dynamo.config.optimize_ddp = False
    for tower in towers:
        for module in tower.modules() if tower is not None else ():
            if isinstance(module, Layer | SwinTransformerBlock):
                module.compile(dynamic=False)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices only, not to norms, scales and biases, Swin's 2-D
    position biases included.
    """
    return parameter.ndim >= 2 and "bias" not in name


def _projection(own: int, predecessor: int) -> nn.Linear:
    # T(.) of paper Eq. 1. It starts as the left inverse of the insertion, so that distillation does
    # not begin by destroying what was inherited.
    projection = nn.utils.skip_init(nn.Linear, own, predecessor, bias=False)
    nn.init.eye_(projection.weight)
    return projection


class Student(nn.Module):
    """The model in training with its projections T, in one module so that DDP sees every parameter.

    T exists only if `predecessor_dim`, the predecessor's embed_dim, differs from the model's own.
    """

    def __init__(self, clip: CLIP, predecessor_dim: int | None = None):
        super().__init__()
        self.clip = clip
        own = clip.text_projection.shape[1]
        self.image_projection = self.text_projection = None
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
