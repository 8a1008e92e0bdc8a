"""`modelchain bench step`: one update of our trainer against one of the stock loop, on synthetic
pictures.

Both have the same model from the same weights, see the same pictures and captions, and compute the
same loss; only the captions' lengths are real.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from open_clip import CLIP
from torch import nn

from modelchain.api.modelconfig import ModelConfig
from modelchain.errors import InputError
from modelchain.plan.macs import image_macs, text_macs
from modelchain_bench.captions import captions as draw
from modelchain_bench.pairs import environment, interleaved, peak_flops, summary
from modelchain_bench.stock import StockLoop
from modelchain_data import batches as data
from modelchain_data.batches import Batch
from modelchain_trainer import models, runtime
from modelchain_trainer.devices import this_device
from modelchain_trainer.step import Step

DISTINCT = 4  # batches, so that the captions' lengths vary
ALPHA = 500.0
CACHE = Path.home() / ".cache" / "modelchain"


def measure(
    config: ModelConfig,
    batch: int,
    captions: int,
    *,
    pad: int | None = None,
    captions_file: Path | None = None,
    precision: str = "fp32",
    pairs: int = 5,
    without: tuple[str, ...] = (),
    predecessor: ModelConfig | None = None,
) -> dict[str, Any]:
    """Ratio of samples a second, ours over the stock loop's: the median of interleaved pairs.

    Args:
        batch: pictures a step, `captions` texts each.
        pad: no caption is processed shorter than this.
        without: of LEVERS, those that are switched off.
        predecessor: tell, too, what distilling from a model of this config would add; the ratio is
            without it.
    Raises:
        InputError: `captions_file` cannot be read, or `pad` is longer than the model's context.
    """
    resolved, context = config.resolved(), config.text_cfg.context_length
    if pad is not None and pad > context:
        raise InputError(f"{pad} is longer than the model's context of {context}", field="--pad")
    device = this_device()
    stock = StockLoop(resolved, device, precision, captions)
    ours = our_step(resolved, device, precision, predecessor, stock.model)
    teacher, ours.teacher = ours.teacher, None
    texts = [draw(batch * captions, index, captions_file, context) for index in range(DISTINCT)]
    lengths = [len(text) for some in texts for text in some]
    with ExitStack() as off:
        for lever in without:
            switch_off(lever, ours, off, context)
        made = [_batch(config, index, batch, some, pad) for index, some in enumerate(texts)]
        for_stock = [(models.normalise(b.images), _padded(b.captions, context)) for b in made]
        turn, stock_turn = itertools.cycle(made), itertools.cycle(for_stock)

        @without_determinism(device)
        def theirs() -> None:
            stock.step(*next(stock_turn))

        found = interleaved(lambda: ours(next(turn)), theirs, pairs, device, _warm_up(device))
        about = summary(found, batch)
        return {
            "batch": batch,
            "captions": captions,
            "precision": precision,
            "pad": pad,
            "without": list(without),
            **about,
            "tokens": {
                "real": sum(lengths) / DISTINCT,
                "processed": sum(b.processed_tokens for b in made) / DISTINCT,
            },
            "mfu": _mfu(config, batch, lengths, about["samplesPerSecond"]["ours"] / batch, device),
            "teacherShare": _teacher_share(ours, teacher, made, pairs, device) if teacher else None,
            "environment": environment(device),
        }


@contextmanager
def without_determinism(device: torch.device) -> Iterator[None]:
    """The stock loop as a lab runs it: what makes ours repeatable to the bit is not its to pay
    for.
    """
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(device.type == "cpu")


def _teacher_share(
    step: Step, teacher: nn.Module, made: list[Batch], pairs: int, device: torch.device
) -> float:
    """The part of a step with the teacher that goes away without it."""
    alone, together = (
        itertools.cycle(made),
        itertools.cycle(made),
    )  # of their own: both meet every batch

    def pulled() -> None:
        step.teacher = teacher
        step(next(together))
        step.teacher = None

    found = interleaved(lambda: step(next(alone)), pulled, pairs, device, _warm_up(device))
    return 1 - 1 / float(summary(found, 1)["ratio"])


def _warm_up(device: torch.device) -> int:
    """Each batch once before it counts where layers are compiled for its captions' lengths."""
    return DISTINCT if device.type == "cuda" else 1


def our_step(
    config: dict[str, Any],
    device: torch.device,
    precision: str,
    predecessor: ModelConfig | None,
    weights: CLIP,
) -> Step:
    """Our update of a model that starts from `weights`."""
    clip, teacher = models.build(config, 0), None
    clip.load_state_dict(weights.state_dict())
    if predecessor is not None:
        teacher = models.build(predecessor.resolved(), 1).to(device).eval().requires_grad_(False)
    student = models.Student(clip, predecessor.embed_dim if predecessor else None).to(device)
    if runtime.compiles(device, CACHE, print):
        models.compile_layers(student, teacher)
    return Step(
        student=student,
        teacher=teacher,
        steps=10_000,
        learning_rate=1e-4,
        warmup_steps=0,
        weight_decay=0.1,
        precision=precision,
        seed=0,
        alpha=ALPHA,
    )


def switch_off(lever: str, step: Step, off: ExitStack, context: int) -> None:
    """Take one of LEVERS from `step` until `off` ends."""
    if lever == "chunks":  # every caption at the whole context
        for attribute, value in (("CHUNKS", 1), ("PAD_MULTIPLE", context)):
            off.enter_context(patch.object(data, attribute, value))
    elif lever == "pooled":
        off.enter_context(patch.object(models.Layer, "forward", _whole_layer(models.Layer.forward)))
    elif lever == "lookup":
        off.enter_context(
            patch.object(models, "encode_text_chunks", _chunk_by_chunk(models.encode_text_chunks))
        )
    elif lever == "fused":
        groups = [
            {name: group[name] for name in ("params", "weight_decay")}
            for group in step.optimizer.param_groups
        ]
        off.enter_context(
            patch.object(step, "optimizer", _PlainAdamW(groups, betas=(0.9, 0.98), eps=1e-8))
        )
    elif lever == "compiled":
        off.enter_context(torch.compiler.set_stance("force_eager"))


class _PlainAdamW(torch.optim.AdamW):
    found_inf = property(lambda _: None, lambda *_: None)  # the fused kernel alone can skip a batch


def _whole_layer(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def whole(self: Any, x: Any, attn_mask: Any = None, at: Any = None) -> torch.Tensor:
        y = forward(self, x, attn_mask)
        return y if at is None else y[torch.arange(len(y), device=y.device), at]

    return whole


def _chunk_by_chunk(encode: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def chunk_by_chunk(model: CLIP, chunks: list[data.Chunk]) -> torch.Tensor:
        parts = [
            encode(model, [(tokens, torch.arange(len(tokens), device=tokens.device))])
            for tokens, _ in chunks
        ]
        return torch.cat(parts)[torch.cat([rows for _, rows in chunks]).argsort()]

    return chunk_by_chunk


def _batch(
    config: ModelConfig, index: int, size: int, texts: list[np.ndarray], pad: int | None
) -> Batch:
    side, context = config.vision_cfg.image_size, config.text_cfg.context_length
    generator = torch.Generator().manual_seed(index)
    pictures = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    if pad:  # zeros after the end of a text change nothing but the length
        texts = [np.pad(text, (0, max(pad - len(text), 0))) for text in texts]
    return Batch(index, np.arange(size), pictures, texts, context)


def _padded(captions: list[np.ndarray], context: int) -> torch.Tensor:
    return torch.from_numpy(
        np.stack([np.pad(text, (0, context - len(text))) for text in captions]).astype(np.int64)
    )


def _mfu(
    config: ModelConfig,
    batch: int,
    lengths: list[int],
    steps_per_second: float,
    device: torch.device,
) -> float | None:
    """Useful FLOP a second over the device's peak: forward and twice that backward, over real
    tokens alone.
    """
    peak = peak_flops(device)
    if peak is None:
        return None

    def of(length: int) -> int:
        text = config.text_cfg.model_copy(update={"context_length": length})
        return text_macs(config.model_copy(update={"text_cfg": text}))

    texts = sum(of(length) * count for length, count in Counter(lengths).items()) / DISTINCT
    return round(6 * (image_macs(config) * batch + texts) * steps_per_second / peak, 4)
