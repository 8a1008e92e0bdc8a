"""The index of one shard: a file with the place of each sample, its label, and the tokens of its
captions. It depends on the shard's bytes alone, so every set with this shard uses the same file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
from array import array
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from modelchain.errors import InputError, Problem
from modelchain.identity.digest import digest_of
from modelchain_data.samples import Problems, Sample, read_shard
from modelchain_data.tokens import Tokenizer, tokeniser

VERSION = 4  # of the indexes of shards and of sets; one of another version is not used
# A sample. `shard` is the number of its shard in a set, and 0 in the index of one shard. `caption`
# is the number of its first caption in the shard. `picture` says whether its picture's first bytes
# are those of a JPEG, PNG or WebP.
ROW = np.dtype(
    [
        ("offset", "<i8"),
        ("size", "<i8"),
        ("caption", "<i8"),
        ("shard", "<i4"),
        ("label", "<i4"),
        ("captions", "<i4"),
        ("picture", "?"),
    ]
)
SHA256, HEAD = 32, 256  # bytes: of the SHA-256 of all that follows it; where the arrays begin
# What reading a damaged index may raise.
NOT_WHOLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
_PICTURE = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)


class ShardIndex(NamedTuple):
    """The index of a shard, mapped into memory."""

    rows: np.ndarray  # ROW [samples]
    bounds: np.ndarray  # int64 [captions + 1]: where each caption's tokens begin, and the last ends
    tokens: np.ndarray  # uint16
    texts: np.ndarray  # JSON

    def names(self) -> tuple[list[str], list[str | bool | None]]:
        """The samples' keys and class names. A class name is None if there is none, and False if it
        is not a text.
        """
        texts = json.loads(self.texts.tobytes())
        return texts["keys"], texts["classnames"]


def shard_key(digest: str) -> str:
    """Names the index of a shard with this SHA-256."""
    return digest_of({"v": VERSION, "tokeniser": tokeniser(), "shard": digest})


def index_shard(shard: Path) -> tuple[list[np.ndarray], list[Problem]]:
    """The content of the index of `shard`, as arrays of bytes, and up to five things that are wrong
    with the shard.
    """
    making, problems = _Making(), Problems()
    with contextlib.ExitStack() as stack, contextlib.suppress(InputError):  # the fifth problem
        file = None
        for sample in read_shard(shard, problems):
            file = file or stack.enter_context(shard.open("rb"))
            begin = os.pread(file.fileno(), 12, sample.offset)
            making.add(sample, picture=bool(_PICTURE.match(begin)))
    return making.content(), list(problems)


def read_index(path: Path) -> ShardIndex:
    """Map an index into memory. Raises one of NOT_WHOLE if it is cut off or no index."""
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    sizes = json.loads(data[SHA256:HEAD])
    arrays, at = [], HEAD
    for name, kind in (("bounds", "<i8"), ("tokens", "<u2"), ("rows", ROW), ("texts", "u1")):
        arrays.append(np.frombuffer(data, kind, sizes[name], at))
        at += arrays[-1].nbytes
    if at != len(data):
        raise ValueError("of another length")
    bounds, tokens, rows, texts = arrays
    return ShardIndex(rows, bounds, tokens, texts)


def is_whole(path: Path) -> bool:
    """Whether there is an index at `path` whose bytes are those that were written."""
    try:
        with path.open("rb") as file:
            return file.read(SHA256) == hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return False


@cache
def _encoder() -> Tokenizer:
    return Tokenizer()


class _Making:
    """The index of a shard while its samples are read."""

    def __init__(self) -> None:
        self._encoder = _encoder()
        self._rows: list[tuple[int, int, int, int, int, int, bool]] = []
        self._lengths, self._tokens = array("q", [0]), bytearray()
        self._keys: list[str] = []
        self._classnames: list[str | Literal[False] | None] = []

    def add(self, sample: Sample, picture: bool) -> None:
        first, count = len(self._lengths) - 1, len(sample.captions)
        for caption in sample.captions:
            tokens = self._encoder.encode(caption)
            self._tokens += tokens
            self._lengths.append(len(tokens) // 2)
        self._rows.append((sample.offset, sample.size, first, 0, sample.label, count, picture))
        self._keys.append(sample.key)
        name = sample.meta.get("classname")
        self._classnames.append(name if isinstance(name, str | None) else False)

    def content(self) -> list[np.ndarray]:
        """The file: a SHA-256 of the rest, the sizes of the arrays, and the arrays."""
        texts = json.dumps({"keys": self._keys, "classnames": self._classnames}).encode()
        arrays = {
            "bounds": np.cumsum(self._lengths, dtype="<i8"),
            "tokens": np.frombuffer(self._tokens, "<u2"),
            "rows": np.array(self._rows, ROW),
            "texts": np.frombuffer(texts, "u1"),
        }
        sizes = json.dumps({name: len(values) for name, values in arrays.items()})
        head = np.frombuffer(sizes.encode().ljust(HEAD - SHA256), "u1")
        body, digest = [head, *(values.view("u1") for values in arrays.values())], hashlib.sha256()
        for part in body:
            digest.update(part)
        return [np.frombuffer(digest.digest(), "u1"), *body]
