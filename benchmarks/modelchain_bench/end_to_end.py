"""`modelchain bench end-to-end`: from files to updated weights, ours against the stock loop on the
same files.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import webdataset

from modelchain.api.modelconfig import ModelConfig
from modelchain_bench.loader import sampled
from modelchain_bench.pairs import environment, interleaved, summary
from modelchain_bench.step import our_step, without_determinism
from modelchain_bench.stock import StockLoop, stock_pipeline
from modelchain_data.batches import Batches
from modelchain_data.index import open_set
from modelchain_trainer.devices import this_device
from modelchain_trainer.step import Step

STEPS = 4  # in a turn, for each worker: twice what the stock loop's workers have prefetched


def measure(
    config: ModelConfig,
    batch: int,
    captions: int,
    data: str | None,
    *,
    precision: str,
    pairs: int,
    workers: int,
) -> dict[str, Any]:
    """Ratio of samples a second over turns of STEPS steps a worker, and the part of our turns that
    waits for data.

    `data` are tars (braces allowed); None: synthetic pictures of 640 x 480. `workers` are threads
    that decode for ours, processes for the stock loop.

    Raises:
        InputError: what `modelchain_bench.loader.sampled` raises.
    """
    device, steps = this_device(), STEPS * workers
    with tempfile.TemporaryDirectory(prefix="modelchain-bench-") as folder:
        shard, _ = sampled(data, batch, Path(folder))
        stock = StockLoop(config.resolved(), device, precision, captions)
        step = our_step(config.resolved(), device, precision, None, stock.model)
        batches = _our_batches(config, shard, batch, captions, workers, device)
        ours = _OurTurns(step, batches.from_step(0), steps, device)
        theirs = _stock_batches(config, shard, batch, captions, workers)
        found = interleaved(ours, _stock_turns(stock, theirs, steps, device), pairs, device)
        ours.batches.close()
    return {
        "batch": batch,
        "captions": captions,
        "precision": precision,
        "workers": workers,
        "stepsPerTurn": steps,
        **summary(found, batch * steps),
        "dataWait": ours.data_wait(pairs),
        "data": data or "synthetic",
        "environment": environment(device),
    }


def _our_batches(
    config: ModelConfig, shard: Path, batch: int, captions: int, threads: int, device: torch.device
) -> Batches:
    return Batches(
        data=open_set([shard], shard.parent / "cache"),
        image_size=config.vision_cfg.image_size,
        context_length=config.text_cfg.context_length,
        seed=0,
        global_batch_size=batch,
        captions_per_sample=captions,
        threads=threads,
        pinned=device.type == "cuda",
    )


def _stock_batches(
    config: ModelConfig, shard: Path, batch: int, captions: int, workers: int
) -> Iterator[Any]:
    side, context = config.vision_cfg.image_size, config.text_cfg.context_length
    pipeline = stock_pipeline(str(shard), batch, captions, side, context)
    return iter(
        webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers, prefetch_factor=2)
    )


class _OurTurns:
    """Each call is a turn of `steps` steps; it notes how long they waited for data."""

    def __init__(self, step: Step, batches: Any, steps: int, device: torch.device):
        self.step = step
        self.batches = batches
        self.steps = steps
        self.device = device
        self.turns: list[tuple[float, float]] = []  # seconds of waiting, and of the whole turn

    def __call__(self) -> None:
        start, waited = time.perf_counter(), 0.0
        for _ in range(self.steps):
            asked = time.perf_counter()
            made = next(self.batches)
            waited += time.perf_counter() - asked
            self.step(made)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.turns.append((waited, time.perf_counter() - start))

    def data_wait(self, last: int) -> float:
        """The part of the last turns that waited for data."""
        counted = self.turns[-last:]
        return round(sum(wait for wait, _ in counted) / sum(whole for _, whole in counted), 5)


def _stock_turns(
    stock: StockLoop, batches: Iterator[Any], steps: int, device: torch.device
) -> Callable[[], None]:
    @without_determinism(device)
    def turn() -> None:
        for _ in range(steps):
            stock.step(*next(batches))

    return turn
