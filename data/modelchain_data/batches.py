"""Batches whose content is a pure function of (seed, step), so that the loader's only state is the
step.
"""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode, functional

from modelchain.errors import WorkError
from modelchain_data.index import ShardSet

SCALE = (0.9, 1.0)  # of open_clip's AugmentationCfg
RATIO = (3 / 4, 4 / 3)  # of torchvision's RandomResizedCrop
LOG_RATIO = (math.log(RATIO[0]), math.log(RATIO[1]))
CHUNKS = 4
CHUNK_ROWS = 128
PAD_MULTIPLE = 4
PREFETCH, MAKING = 3, 2  # batches ahead of the step, and how many of them are made at once

# Pillow warns at half the number of pixels that it refuses. It also warns of transparency in a
# palette, which we drop on purpose.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """The random numbers of a stream, of which each has 2^128. Stream 0 orders the epoch, and
    stream 1 + i belongs to sample i.
    """
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, stream, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@lru_cache(maxsize=2)  # at the end of an epoch batches of the next are made, too
def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the samples in an epoch: a permutation of 0 .. samples-1 (int64, read-only)."""
    order = _generator(seed, epoch, 0).permutation(samples)
    order.setflags(write=False)
    return order


def global_batch(step: int, samples: int, global_batch_size: int, seed: int) -> np.ndarray:
    """Sample ids int64 [global_batch_size] of `step`, before unusable ones are replaced. Samples at
    the end of an epoch that fill no batch are dropped.
    """
    epoch, batch = divmod(step, samples // global_batch_size)
    return epoch_order(samples, seed, epoch)[batch * global_batch_size :][:global_batch_size]


def crop_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, by the algorithm of torchvision's
    RandomResizedCrop.get_params.
    """
    for _ in range(10):
        area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * rng.random())
        ratio = math.exp(LOG_RATIO[0] + (LOG_RATIO[1] - LOG_RATIO[0]) * rng.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int((height - h + 1) * rng.random()), int((width - w + 1) * rng.random()), h, w
    # The picture is too tall or too wide for every allowed ratio: take the largest central box.
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def decode(data: bytes) -> Tensor:
    """An encoded JPEG, PNG or WebP as RGB uint8 [3, height, width]. Raises ValueError if it cannot
    be decoded.

    Pictures of more than 178,956,970 pixels are refused by their header. Transparency is dropped,
    and the EXIF orientation is ignored.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            if data.startswith(b"\xff\xd8") and image.mode in ("RGB", "L"):
                # twice as fast as Pillow
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                return decode_jpeg(encoded, mode=ImageReadMode.RGB)
            # On a damaged file torchvision's PNG decoder ends the process (SIGSEGV, seen with
            # 0.29), while Pillow raises.
            return torch.from_numpy(_rgb(image)).permute(2, 0, 1)
    except Image.DecompressionBombError as error:
        raise ValueError(f"too large a picture: {error}") from error
    except (
        Exception
    ) as error:  # decoders raise RuntimeError, OSError, SyntaxError, struct.error ...
        raise ValueError(f"not a whole picture: {error}") from error


def _rgb(image: Image.Image) -> np.ndarray:
    """The picture as uint8 [height, width, 3]. Of 16 bits the upper 8 are kept, as Pillow does
    except for grey, which it clips.
    """
    if image.mode.startswith("I"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


def resized(picture: Tensor, box: tuple[int, int, int, int], size: int) -> Tensor:
    """The box (top, left, height, width) of a decoded picture as uint8 [3, size, size], resized
    bicubic with antialias.

    numpy copies the window: torch would use as many threads as for a matrix product, in each of the
    decoding threads.
    """
    top, left, height, width = box
    window = np.ascontiguousarray(
        picture.permute(1, 2, 0).numpy()[top : top + height, left : left + width]
    )
    rows_first = torch.from_numpy(window).permute(2, 0, 1)
    return functional.resize(rows_first, [size, size], InterpolationMode.BICUBIC, antialias=True)


def evaluation_image(data: bytes, size: int) -> Tensor:
    """A picture for evaluation as uint8 [3, size, size]: the shorter side is resized to `size`,
    then the centre is cropped. PIL does it, so that all bits equal open_clip's.
    """
    image = functional.resize(
        functional.to_pil_image(decode(data)), [size], InterpolationMode.BICUBIC
    )
    return functional.pil_to_tensor(functional.center_crop(image, [size, size]))


# Tokens int64 [n, L], padded with 0, and the captions' rows in the batch, int64 [n].
Chunk = tuple[Tensor, Tensor]


def cut_chunks(captions: list[np.ndarray], context_length: int) -> list[Chunk]:
    """Sort captions by length and cut them into equal chunks, each padded to its longest caption.

    There are four chunks, or up to eight if each then has at least 128 captions. Lengths are
    rounded up to a multiple of 4, from 33 tokens on of 8, from 65 on of 16, and so on, so that a
    compiled text tower meets at most 13 lengths in a context of 77. If the number of chunks does
    not divide the number of captions, chunks differ by one caption.
    """
    lengths, chunks = np.array([len(caption) for caption in captions]), []
    count = min(max(CHUNKS, min(2 * CHUNKS, len(captions) // CHUNK_ROWS)), len(captions))
    for rows in np.array_split(np.argsort(lengths, kind="stable"), count):
        longest = int(lengths[rows[-1]])
        multiple = max(PAD_MULTIPLE, 1 << (longest - 1).bit_length() >> 3)
        width = min(-(-longest // multiple) * multiple, context_length)
        tokens = np.zeros((len(rows), width), np.int64)
        tokens[np.arange(width) < lengths[rows, None]] = np.concatenate(
            [captions[row] for row in rows]
        )
        chunks.append((torch.from_numpy(tokens), torch.from_numpy(rows)))
    return chunks


@dataclass
class Batch:
    """One rank's part of a step: n pictures with M captions each. Caption `slot` of picture i is
    row i * M + slot.

    `ids` is int64 [n], after unusable samples were replaced; `images` is uint8 [n, 3, S, S];
    `captions` are n * M arrays of tokens, not padded. With `pinned` the chunks lie in page-locked
    memory, from which a GPU copies while the host computes.
    """

    step: int
    ids: np.ndarray
    images: Tensor
    captions: list[np.ndarray]
    context_length: int
    pinned: bool = False
    chunks: list[Chunk] = field(init=False)
    real_tokens: int = field(init=False)
    processed_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.chunks = cut_chunks(self.captions, self.context_length)
        if self.pinned:
            self.chunks = [(tokens.pin_memory(), rows.pin_memory()) for tokens, rows in self.chunks]
        self.real_tokens = sum(map(len, self.captions))
        self.processed_tokens = sum(tokens.numel() for tokens, _ in self.chunks)

    def pieces(self, size: int | None) -> list[Batch]:
        """Micro-batches of `size` pictures, each with its own chunks, or the whole batch if `size`
        is None.
        """
        n, m = len(self.ids), len(self.captions) // len(self.ids)
        if size is None or size >= n:
            return [self]
        parts = ((slice(at, at + size), slice(at * m, (at + size) * m)) for at in range(0, n, size))
        same = (self.context_length, self.pinned)
        return [
            Batch(self.step, self.ids[i], self.images[i], self.captions[c], *same) for i, c in parts
        ]


@dataclass(kw_only=True)
class Batches:
    """The training batches of one rank. The number of ranks and threads does not change the global
    batch.
    """

    data: ShardSet
    image_size: int
    context_length: int
    global_batch_size: int  # a multiple of world_size, not more than the samples
    captions_per_sample: int
    seed: int
    rank: int = 0
    world_size: int = 1
    threads: int = 2
    pinned: bool = False  # see Batch; needs a GPU
    _bad: set[int] = field(default_factory=set, init=False)

    @property
    def replaced(self) -> int:
        """How many undecodable pictures this rank has met. Each is replaced by the next
        in order.
        """
        return len(self._bad)

    @cached_property
    def scarce(self) -> int:
        """How many samples have fewer captions than are drawn. Theirs are drawn with replacement;
        samples with none are left out.
        """
        return int((self.data.caption_counts < self.captions_per_sample).sum())

    def from_step(self, step: int) -> Iterator[Batch]:
        """Batches of `step`, `step` + 1 and so on without end. Threads make them ahead; closing the
        generator ends the threads.

        Raises WorkError of class Data if over 0.1 % of the samples are undecodable, or a shard is
        missing or has changed.
        """
        with ThreadPoolExecutor(self.threads) as decoders, ThreadPoolExecutor(MAKING) as conductor:
            ahead = deque(conductor.submit(self.batch, step + i, decoders) for i in range(PREFETCH))
            try:
                for upcoming in itertools.count(step + PREFETCH):
                    batch = ahead.popleft().result()
                    ahead.append(conductor.submit(self.batch, upcoming, decoders))
                    yield batch
            finally:
                conductor.shutdown(cancel_futures=True)

    def batch(self, step: int, decoders: ThreadPoolExecutor) -> Batch:
        """The batch of `step`, made now by these threads. Raises what `from_step` raises."""
        epoch, batch = divmod(step, len(self.data) // self.global_batch_size)
        n, m = self.global_batch_size // self.world_size, self.captions_per_sample
        shape = (n, 3, self.image_size, self.image_size)
        ids = np.empty(n, np.int64)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.pinned)
        captions: list[np.ndarray] = [ids] * (n * m)
        pixels = images.numpy()

        def fill(first: int) -> None:
            for row in range(first, n, self.threads):
                sample = self._sample(epoch, (batch * self.world_size + self.rank) * n + row)
                ids[row], pixels[row], captions[row * m : (row + 1) * m] = sample

        list(decoders.map(fill, range(self.threads)))
        return Batch(step, ids, images, captions, self.context_length, self.pinned)

    def _sample(self, epoch: int, position: int) -> tuple[int, np.ndarray, list[np.ndarray]]:
        """Id, crop and captions of the first usable sample from `position` on in the
        epoch's order.
        """
        order = epoch_order(len(self.data), self.seed, epoch)
        for at in itertools.count(position):
            sample = int(order[at % len(order)])
            if not self.data.caption_count(sample):  # at most 0.1 % of them, by `check_training`
                continue
            try:
                picture = decode(self.data.picture(sample))
                break
            except ValueError as error:
                self._bad.add(sample)
                bad, total = len(self._bad), len(self.data)
                if bad * 1000 > total:
                    message = (
                        f"{bad} of {total} pictures cannot be decoded (at most {total // 1000} may)"
                    )
                    key = self.data.key(sample)
                    raise WorkError(f"{message}; the last is {key!r}: {error}", "Data") from error
        rng = _generator(self.seed, epoch, 1 + sample)
        available, wanted = self.data.caption_count(sample), self.captions_per_sample
        drawn = rng.choice(available, wanted, replace=available < wanted).tolist()
        crop = resized(picture, crop_box(rng, *picture.shape[1:]), self.image_size)
        return (
            sample,
            crop.numpy(),
            [self.data.tokens(sample, caption, self.context_length) for caption in drawn],
        )
