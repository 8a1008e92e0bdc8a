"""Captions for benchmarks: random words with the lengths of Flickr8k's captions, or from a file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from open_clip.tokenizer import SimpleTokenizer

from modelchain.errors import InputError

# By the number of tokens, start and end of text included: how many of Flickr8k's 29,995 training
# captions have it. fmt: off
LENGTHS = {
    4: 8,
    5: 24,
    6: 132,
    7: 366,
    8: 855,
    9: 1795,
    10: 2413,
    11: 2665,
    12: 3129,
    13: 3094,
    14: 3088,
    15: 2740,
    16: 2432,
    17: 1938,
    18: 1493,
    19: 1061,
    20: 786,
    21: 611,
    22: 420,
    23: 293,
    24: 192,
    25: 144,
    26: 89,
    27: 78,
    28: 52,
    29: 33,
    30: 25,
    31: 8,
    32: 6,
    33: 7,
    34: 6,
    35: 5,
    36: 2,
    37: 2,
    38: 1,
    39: 1,
    42: 1,
}
# fmt: on


def captions(
    count: int, seed: int, file: Path | None = None, context_length: int = 77
) -> list[np.ndarray]:
    """`count` captions as the loader gives them: uint16, from start to end of text, at most
    `context_length` tokens.

    They are random words with the lengths above, drawn without replacement while there are any, or
    lines of `file`. Raises InputError if `file` cannot be read or holds no caption.
    """
    rng, tokenizer = np.random.default_rng(seed), _tokenizer()
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    if file is None:
        all_ = np.repeat(list(LENGTHS), list(LENGTHS.values()))
        words = [
            rng.integers(0, start, max(min(length, context_length) - 2, 0))
            for length in _draw(rng, all_, count)
        ]
    else:
        lines = _draw(rng, np.array(_lines(file), object), count)
        words = [tokenizer.encode(line)[: context_length - 2] for line in lines]
    return [np.array([start, *inner, end], np.uint16) for inner in words]


_tokenizer = cache(SimpleTokenizer)


def _draw(rng: np.random.Generator, population: np.ndarray, count: int) -> list[Any]:
    """`count` members. Each is drawn once before any is drawn twice."""
    rounds = -(-count // len(population))
    return np.concatenate([rng.permutation(population) for _ in range(rounds)])[:count].tolist()


def _lines(file: Path) -> list[str]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot be read: {getattr(error, 'strerror', None) or error}", file=file
        ) from error
    if not lines:
        raise InputError("holds no caption; one a line is read", file=file)
    return lines
