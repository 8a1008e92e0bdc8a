"""The loop that a lab would write from open_clip's public pieces, for our trainer to be measured
against.

It has open_clip's transforms, tokenizer at the whole context, towers and loss, and torch's AdamW as
open_clip's own script calls it. A picture has M captions. The loss is the mean over the M slots, as
our trainer computes it.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import open_clip
import torch
import webdataset
from torch import Tensor


def stock_pipeline(
    shards: str, batch: int, captions: int, image_size: int, context_length: int
) -> Any:
    """Batches without end, as from open_clip's get_wds_dataset: pictures [N, 3, H, W] and captions
    [N, M, context].
    """
    tokenizer, drawing = open_clip.SimpleTokenizer(context_length=context_length), random.Random(0)
    transform = open_clip.image_transform(image_size, is_train=True)

    def texts(meta: dict[str, list[str]]) -> Tensor:
        known = meta["captions"]
        drawn = (
            drawing.sample(known, captions)
            if len(known) >= captions
            else drawing.choices(known, k=captions)
        )
        return tokenizer(drawn)  # type: ignore[no-any-return]

    # Not split between workers: each reads the whole of a single shard.
    pipeline = (
        webdataset.WebDataset(shards, shardshuffle=False, workersplitter=None)
        .repeat()
        .decode("pilrgb")
    )
    pipeline = pipeline.rename(image="jpg;png;jpeg;webp", text="json").map_dict(
        image=transform, text=texts
    )
    return pipeline.to_tuple("image", "text").batched(batch)


class StockLoop:
    def __init__(self, config: dict[str, Any], device: torch.device, precision: str, captions: int):
        self.device, self.captions = device, captions
        self.autocast = (
            torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        )
        self.model = open_clip.CLIP(**config).to(device).train()
        self.loss = open_clip.ClipLoss(cache_labels=True)
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": 0.0},
            {"params": [], "weight_decay": 0.1},
        ]
        for name, parameter in self.model.named_parameters():
            plain = (
                parameter.ndim < 2
                or "bn" in name
                or "ln" in name
                or "bias" in name
                or "logit_scale" in name
            )
            groups[0 if plain else 1]["params"].append(parameter)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-8)

    def step(self, images: Tensor, texts: Tensor) -> Tensor:
        """One update on captions [N * M, L] or [N, M, L]. Returns the loss, on the device."""
        images = images.to(self.device, non_blocking=True)
        texts = texts.to(self.device, non_blocking=True).flatten(0, -2)
        self.optimizer.zero_grad()
        with self.autocast:
            image = self.model.encode_image(images, normalize=True)
            text = self.model.encode_text(texts, normalize=True)
            scale = self.model.logit_scale.exp()
            slots = text.unflatten(0, (len(image), self.captions)).unbind(1)
            loss = torch.stack([self.loss(image, slot, scale) for slot in slots]).mean()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)
        return loss.detach()
