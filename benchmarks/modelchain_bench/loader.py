"""`modelchain bench loader`: samples that one core loads, ours against open_clip's pipeline on the
same files.
"""

from __future__ import annotations

import io
import itertools
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modelchain.errors import InputError
from modelchain.identity.shards import expand
from modelchain_bench.captions import LENGTHS
from modelchain_bench.pairs import Pair, environment, summary
from modelchain_bench.stock import stock_pipeline
from modelchain_data.batches import Batches
from modelchain_data.index import open_set
from modelchain_data.pack import pack, suffix_of
from modelchain_data.samples import Problems, read_shard
from modelchain_data.tars import read_at

PICTURES = 128
HEIGHT = 480
WIDTH = 640
QUALITY = 90
# Exponent by which amplitudes fall with frequency. It makes JPEGs of 0.25 bytes a pixel, like
# photographs.
FALL = 1.5
Sample = tuple[str, bytes, list[str]]  # key, encoded picture, captions
WORDS = (
    "a the man woman dog two children girl boy in on with red blue black white shirt water grass"
    " runs stands"
)


def measure_loader(
    batch: int,
    captions: int,
    data: str | None = None,
    *,
    image_size: int = 224,
    context_length: int = 77,
    pairs: int = 5,
    seconds: float = 2.0,
) -> dict[str, Any]:
    """Turns of ours and of the stock pipeline on the same files, and of ours on the same pictures
    packed.

    Seconds are CPU time of the whole process, which decodes with one thread: so other work on the
    machine does not count. Both crop and resize a picture and tokenise `captions` texts of it. Ours
    gives uint8, which the device normalises; the stock pipeline gives floats. `data` are tars
    (braces allowed) whose first pictures are taken; None: synthetic pictures of 640 x 480. A turn
    takes about `seconds`.

    Raises:
        InputError: `data` cannot be read, or holds fewer samples than `batch`, or samples without
            captions.
    """
    with _one_thread(), tempfile.TemporaryDirectory(prefix="modelchain-bench-") as folder:
        shard, samples = sampled(data, batch, Path(folder))
        packed = Path(pack(shard, Path(folder, "packed"))[0].shards)
        options = {"global_batch_size": batch, "captions_per_sample": captions}
        options |= {"image_size": image_size, "context_length": context_length}
        stock = iter(stock_pipeline(str(shard), batch, captions, image_size, context_length))
        makers = [_ours(shard, options), lambda: next(stock), _ours(packed, options)]
        turns = _turns(makers, pairs, seconds)
    return {
        "batch": batch,
        "captions": captions,
        "imageSize": image_size,
        **summary([Pair(ours, stock) for ours, stock, _ in turns], batch),
        "packedSamplesPerSecond": round(statistics.median(batch / own for *_, own in turns), 3),
        "pictures": _about(data, samples),
        "environment": environment(torch.device("cpu")),
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _turns(makers: list[Callable[[], object]], pairs: int, seconds: float) -> list[list[float]]:
    """CPU seconds a batch of each maker, in turns, after a first batch that is not counted."""
    for make in makers:
        make()
    return [[_seconds(make, seconds) for make in makers] for _ in range(pairs)]


def _about(data: str | None, samples: list[Sample]) -> dict[str, Any]:
    return {
        "source": data or f"synthetic, {WIDTH} x {HEIGHT}",
        "count": len(samples),
        "bytes": sum(len(picture) for _, picture, _ in samples) // len(samples),
    }


def sampled(data: str | None, batch: int, folder: Path) -> tuple[Path, list[Sample]]:
    """A tar in `folder` of the first pictures of `data`, or of synthetic ones. Raises what
    `measure_loader` raises.
    """
    samples = list(_first(data)) if data else synthetic(max(batch, PICTURES))
    if len(samples) < batch:
        raise InputError(
            f"{len(samples)} pictures are taken, fewer than the batch of {batch}", file=data
        )
    return _write(folder / "train-000000.tar", samples), samples


def synthetic(count: int = PICTURES, seed: int = 0) -> list[Sample]:
    """Coloured noise with the spectrum of photographs, each with five captions of Flickr8k's
    lengths.
    """
    rng, samples = np.random.default_rng(seed), []
    lengths, words = np.repeat(list(LENGTHS), list(LENGTHS.values())), WORDS.split()
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH))
    frequency[0, 0] = np.inf
    for number in range(count):
        waves = rng.normal(size=(4, *frequency.shape)) * np.exp(
            2j * np.pi * rng.random((4, *frequency.shape))
        )
        grey, *colours = np.fft.irfft2(waves / frequency**FALL, (HEIGHT, WIDTH))
        pixels = np.stack([grey + 0.3 * colour for colour in colours], -1)
        pixels = (128 + 50 * pixels / pixels.std()).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
        texts = [" ".join(rng.choice(words, length - 2)) for length in rng.choice(lengths, 5)]
        samples.append((f"{number:06d}", buffer.getvalue(), texts))
    return samples


def _first(data: str) -> Iterator[Sample]:
    """The first samples of the tars, at most PICTURES."""
    problems, shards = Problems(), [Path(name) for name in expand(data)]
    if gone := [shard for shard in shards if not shard.is_file()]:
        raise InputError("no such file", file=gone[0])
    found = ((shard, sample) for shard in shards for sample in read_shard(shard, problems))
    for number, (shard, (key, offset, size, texts, *_)) in enumerate(
        itertools.islice(found, PICTURES)
    ):
        if not texts:
            raise InputError(f"sample {key!r} has no caption", file=shard)
        yield f"{number:06d}", read_at(shard, offset, size), texts
    problems.stop()


def _write(shard: Path, samples: list[Sample]) -> Path:
    with tarfile.open(shard, "w") as tar:
        for key, picture, texts in samples:
            for name, content in (
                (suffix_of(picture), picture),
                ("json", json.dumps({"captions": texts}).encode()),
            ):
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return shard


def _ours(shard: Path, options: dict[str, int]) -> Callable[[], object]:
    """Makes the next batch at each call."""
    batches = Batches(data=open_set([shard], shard.parent / "cache"), seed=0, threads=1, **options)
    decoder, steps = ThreadPoolExecutor(1), itertools.count()
    return lambda: batches.batch(next(steps), decoder)


def _seconds(make: Callable[[], object], least: float) -> float:
    """CPU seconds a batch, over batches that together take `least`."""
    made, start = 0, time.process_time()
    while (spent := time.process_time() - start) < least:
        make()
        made += 1
    return spent / made
