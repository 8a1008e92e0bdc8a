"""`modelchain bench end-to-end`: from files to updated weights, ours against the stock loop on the
same files.
"""

from __future__ import annotations

import tempfile
import time
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

STEPS = 4  # a turn, for each worker: twice what the stock loop's have ready when its turn begins


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
    """Ratio of samples a second over turns of STEPS steps a worker, and the part of ours that waits
    for data.

    Args:
        data: tars (braces allowed); None: synthetic pictures of 640 x 480.
        workers: threads that decode for ours, processes for the stock loop.
    Raises:
        InputError: `data` cannot be read, or holds fewer samples than `batch`, or samples without
            captions.
    """
    device, resolved, steps = this_device(), config.resolved(), STEPS * workers
    side, context = config.vision_cfg.image_size, config.text_cfg.context_length
    with tempfile.TemporaryDirectory(prefix="modelchain-bench-") as folder:
        shard, _ = sampled(data, batch, Path(folder))
        stock = StockLoop(resolved, device, precision, captions)
        ours = our_step(resolved, device, precision, None, stock.model)
        pipeline = stock_pipeline(str(shard), batch, captions, side, context)
        theirs = iter(
            webdataset.WebLoader(pipeline, batch_size=None, num_workers=workers, prefetch_factor=2)
        )
        batches = Batches(
            data=open_set([shard], Path(folder, "cache")),
            image_size=side,
            context_length=context,
            seed=0,
            global_batch_size=batch,
            captions_per_sample=captions,
            threads=workers,
            pinned=device.type == "cuda",
        )
        ahead = batches.from_step(0)
        waited: list[tuple[float, float]] = []

        def our_turn() -> None:
            start, waiting = time.perf_counter(), 0.0
            for _ in range(steps):
                asked = time.perf_counter()
                made = next(ahead)
                waiting += time.perf_counter() - asked
                ours(made)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            waited.append((waiting, time.perf_counter() - start))

        @without_determinism(device)
        def stock_turn() -> None:
            for _ in range(steps):
                stock.step(*next(theirs))

        found = interleaved(our_turn, stock_turn, pairs, device)
        ahead.close()  # type: ignore[attr-defined]
        counted = waited[-pairs:]
    return {
        "batch": batch,
        "captions": captions,
        "precision": precision,
        "workers": workers,
        "stepsPerTurn": steps,
        **summary(found, batch * steps),
        "dataWait": round(sum(wait for wait, _ in counted) / sum(whole for _, whole in counted), 5),
        "data": data or "synthetic",
        "environment": environment(device),
    }
