"""`modelchain bench step`: one update of our trainer against one of the stock loop, on synthetic
pictures.

Both start from the same weights, get the same pictures and captions, and compute the same loss. Of
the data only the captions' lengths are real.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from modelchain_bench.pairs import Pair, environment, interleaved, peak_flops, summary
from modelchain_bench.stock import StockLoop
from modelchain_data import batches as data
from modelchain_data.batches import Batch
from modelchain_trainer import models, runtime
from modelchain_trainer.devices import this_device
from modelchain_trainer.step import Step

DISTINCT = 4  # batches, so that the captions' lengths vary
ALPHA = 500.0
CACHE = Path.home() / ".cache" / "modelchain"


@dataclass(frozen=True)
class Options:
    """How the two loops are compared."""

    batch: int  # pictures a step
    captions: int  # of each picture
    pad: int | None = None  # no caption is processed shorter than this
    captions_file: Path | None = None  # None: texts of Flickr8k's lengths
    precision: str = "fp32"
    pairs: int = 5  # turns of each loop
    without: tuple[str, ...] = ()  # of LEVERS, those that are switched off
    # Measures, too, what distilling from a model of this config would add. The ratio is without it.
    predecessor: ModelConfig | None = None


def measure(config: ModelConfig, options: Options) -> dict[str, Any]:
    """Ratio of samples a second, ours over the stock loop's: the median of interleaved pairs.

    Raises:
        InputError: `captions_file` cannot be read, or `pad` is longer than the model's context.
    """
    context, device = config.text_cfg.context_length, this_device()
    if options.pad is not None and options.pad > context:
        raise InputError(
            f"{options.pad} is longer than the model's context of {context}", field="--pad"
        )
    stock = StockLoop(config.resolved(), device, options.precision, options.captions)
    ours = our_step(config.resolved(), device, options.precision, options.predecessor, stock.model)
    texts = _texts(options, context)
    with ExitStack() as off:
        for lever in options.without:
            switch_off(lever, ours, off, context)
        made = [
            _batch(config, index, options.batch, some, options.pad)
            for index, some in enumerate(texts)
        ]
        found, teacher_share = _compared(ours, stock, made, options.pairs, device)
    about = summary(found, options.batch)
    steps_per_second = about["samplesPerSecond"]["ours"] / options.batch
    lengths = [len(text) for some in texts for text in some]
    return {
        **_named(options),
        **about,
        "tokens": _tokens(lengths, made),
        "mfu": _mfu(config, options.batch, lengths, steps_per_second, device),
        "teacherShare": teacher_share,
        "environment": environment(device),
    }


def _texts(options: Options, context: int) -> list[list[np.ndarray]]:
    """Captions as tokens, for each of the batches."""
    count = options.batch * options.captions
    return [draw(count, index, options.captions_file, context) for index in range(DISTINCT)]


def _named(options: Options) -> dict[str, Any]:
    return {
        "batch": options.batch,
        "captions": options.captions,
        "precision": options.precision,
        "pad": options.pad,
        "without": list(options.without),
    }


def _tokens(lengths: list[int], made: list[Batch]) -> dict[str, float]:
    """Tokens a step: of the captions, and of those that are computed."""
    return {
        "real": sum(lengths) / DISTINCT,
        "processed": sum(batch.processed_tokens for batch in made) / DISTINCT,
    }


def _compared(
    ours: Step, stock: StockLoop, made: list[Batch], pairs: int, device: torch.device
) -> tuple[list[Pair], float | None]:
    """Seconds of both loops on the same batches, ours without its teacher; and if it has one, the
    teacher's share.
    """
    teacher, ours.teacher = ours.teacher, None
    context = made[0].context_length
    for_stock = [(models.normalise(b.images), _padded(b.captions, context)) for b in made]
    turn, stock_turn = itertools.cycle(made), itertools.cycle(for_stock)

    @without_determinism(device)
    def theirs() -> None:
        stock.step(*next(stock_turn))

    found = interleaved(lambda: ours(next(turn)), theirs, pairs, device, _warm_up(device))
    share = _teacher_share(ours, teacher, made, pairs, device) if teacher else None
    return found, share


@contextmanager
def without_determinism(device: torch.device) -> Iterator[None]:
    """Runs the stock loop as a lab does, without what makes ours repeatable to the bit."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(device.type == "cpu")


def _teacher_share(
    step: Step, teacher: nn.Module, made: list[Batch], pairs: int, device: torch.device
) -> float:
    """The part of a step with the teacher that it takes less without it."""
    alone, together = itertools.cycle(made), itertools.cycle(made)  # both meet every batch

    def pulled() -> None:
        step.teacher = teacher
        step(next(together))
        step.teacher = None

    found = interleaved(lambda: step(next(alone)), pulled, pairs, device, _warm_up(device))
    return 1 - 1 / float(summary(found, 1)["ratio"])


def _warm_up(device: torch.device) -> int:
    """Turns before the first that counts: on a GPU one of each batch, since layers are compiled for
    the lengths of its captions.
    """
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
    found_inf = property(lambda _: None, lambda *_: None)  # only the fused kernel can skip a batch


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
    if pad:  # zeros after the end of a text change only its length
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
    """Useful FLOP a second over the device's peak: the forward pass and twice that backward, over
    real tokens only.
    """
    peak = peak_flops(device)
    if peak is None:
        return None

    def of(length: int) -> int:
        text = config.text_cfg.model_copy(update={"context_length": length})
        return text_macs(config.model_copy(update={"text_cfg": text}))

    texts = sum(of(length) * count for length, count in Counter(lengths).items()) / DISTINCT
    return round(6 * (image_macs(config) * batch + texts) * steps_per_second / peak, 4)
