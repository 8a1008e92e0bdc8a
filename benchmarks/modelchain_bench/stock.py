"""What a lab writes today: open_clip's public pieces and a loop around them. Ours is measured against it.

Its transforms, its tokenizer at the whole context, its towers, its loss and torch's AdamW as open_clip's own script
calls it. A picture's captions are M texts; the loss is the mean over the M slots, which is what our trainer computes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import open_clip
import torch
from PIL import Image
from torch import Tensor


class StockLoop:
    def __init__(self, config: dict[str, Any], device: torch.device, precision: str, captions: int):
        self.device, self.captions = device, captions
        self.autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        self.model = open_clip.CLIP(**config).to(device).train()
        self.loss = open_clip.ClipLoss()
        self.transform = open_clip.image_transform(config["vision_cfg"]["image_size"], is_train=True)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": 0.1}]
        for name, parameter in self.model.named_parameters():
            plain = parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name
            groups[0 if plain else 1]["params"].append(parameter)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.98), eps=1e-8)

    def sample(self, picture: bytes, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A picture [3, H, W] and its captions [M, context], as open_clip's data pipeline makes them."""
        with Image.open(io.BytesIO(picture)) as image:
            return self.transform(image.convert("RGB")), self.tokenizer(list(captions))

    def batches(self, samples: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Pictures [N, 3, H, W] and captions [N * M, context]."""
        pictures: list[Tensor] = []
        texts: list[Tensor] = []
        for picture, captions in samples:
            pictures.append(picture)
            texts.append(captions)
            if len(pictures) == size:
                yield torch.stack(pictures), torch.cat(texts)
                pictures, texts = [], []

    def step(self, images: Tensor, texts: Tensor) -> Tensor:
        """One update; the loss, still on the device."""
        images = images.to(self.device, non_blocking=True)
        texts = texts.to(self.device, non_blocking=True)
        self.optimizer.zero_grad()
        with self.autocast:
            image, text = self.model.encode_image(images, normalize=True), self.model.encode_text(texts, normalize=True)
            scale, slots = self.model.logit_scale.exp(), text.unflatten(0, (len(image), self.captions)).unbind(1)
            loss = torch.stack([self.loss(image, slot, scale) for slot in slots]).mean()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)
        return loss.detach()
