"""Captions to tokens, the same as open_clip's SimpleTokenizer makes, but without torch and many
times as fast: each word is tokenised once, and ftfy reads only captions that are not plain ASCII.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import struct
from collections.abc import Mapping
from functools import cache, lru_cache
from heapq import heappop, heappush
from importlib.util import find_spec
from pathlib import Path

import ftfy
import regex

MERGES = 49152 - 256 - 2  # of the vocabulary's file, as in open_clip
WORD_END, SPECIAL = "</w>", ("<start_of_text>", "<end_of_text>")
MAX_WORDS = 1 << 17  # kept at a time; they take 40 MB
MAX_LENGTH = 32  # of a word that is kept
_PIECE = regex.compile(
    "|".join(SPECIAL) + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_BLANKS = str.maketrans("\t\n\f\r", "    ")  # the white space that ftfy leaves


class Tokenizer(dict[str, bytes]):
    """The tokens of words, by word, as bytes of uint16. A word that is not there is added."""

    def __init__(self) -> None:
        lines = gzip.decompress(_vocabulary().read_bytes()).decode().split("\n")
        merges = [line.split() for line in lines[1 : MERGES + 1]]
        self._letters = _letters()
        letters = list(self._letters.values())
        names = [*letters, *(letter + WORD_END for letter in letters), *map("".join, merges)]
        self._numbers = {name: number for number, name in enumerate([*names, *SPECIAL])}
        self._ranks = {(first, second): rank for rank, (first, second) in enumerate(merges)}
        self._start, self._end = (self[name] for name in SPECIAL)

    def encode(self, caption: str) -> bytes:
        """The caption's tokens, from start to end of text, as bytes of uint16."""
        if not _is_plain(caption):
            caption = _cleaned(caption)
        words = map(self.__getitem__, caption.lower().split())
        return b"".join([self._start, *words, self._end])

    def __missing__(self, word: str) -> bytes:
        numbers = [number for piece in _PIECE.findall(word) for number in self._tokens(piece)]
        tokens = struct.pack(f"<{len(numbers)}H", *numbers)
        if len(self) >= MAX_WORDS:
            self.clear()
        if len(word) <= MAX_LENGTH:
            self[word] = tokens
        return tokens

    def _tokens(self, piece: str) -> list[int]:
        if piece in SPECIAL:
            return [self._numbers[piece]]
        parts = [self._letters[byte] for byte in piece.encode()]
        parts[-1] += WORD_END
        return [self._numbers[part] for part in _merged(parts, self._ranks)]


@cache
def tokeniser() -> str:
    """Names the tokens: the SHA-256 of the vocabulary."""
    return hashlib.sha256(_vocabulary().read_bytes()).hexdigest()


def _vocabulary() -> Path:
    # Found without importing open_clip, which loads torch: 3 seconds and 700 MB.
    package = find_spec("open_clip")
    assert package is not None and package.origin is not None
    return Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz")


def _letters() -> dict[int, str]:
    """A printable sign for each byte: itself, or, for those that are no sign of Latin-1, one from
    U+0100 on.
    """
    signs = [byte for byte in range(256) if _is_sign(byte)]
    others = [byte for byte in range(256) if not _is_sign(byte)]
    return {b: chr(b) for b in signs} | {b: chr(256 + n) for n, b in enumerate(others)}


def _is_sign(byte: int) -> bool:
    return 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255


def _merged(parts: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Byte pair encoding: of the pairs of neighbours, the one of lowest rank is merged wherever it
    occurs, until no pair has a rank.

    A heap holds the pairs, so that a word of n letters takes n log n steps. A page of Chinese has
    thousands of letters without a space.
    """
    parts, count = list(parts), len(parts)
    before, after = list(range(-1, count - 1)), list(range(1, count + 1))
    pairs: list[tuple[int, int, str, str]] = []

    def add(at: int) -> None:
        """The pair that begins at `at`, if it has a rank."""
        if at >= 0 and after[at] < count:
            first, second = parts[at], parts[after[at]]
            if (rank := ranks.get((first, second))) is not None:
                heappush(pairs, (rank, at, first, second))

    for at in range(count):
        add(at)
    while pairs:
        rank, merged = pairs[0][0], []
        while pairs and pairs[0][0] == rank:  # these are all occurrences of one pair, in order
            _, at, first, second = heappop(pairs)
            right = after[at]
            # Another merge may have taken one of the two.
            if right < count and (parts[at], parts[right]) == (first, second):
                parts[at] = first + second
                parts[right] = ""
                after[at] = after[right]
                if after[at] < count:
                    before[after[at]] = at
                merged.append(at)
        for at in merged:
            add(before[at])
            add(at)
    return [part for part in parts if part]


def _is_plain(caption: str) -> bool:
    """Whether ftfy and `html.unescape` would change no more than white space: printable ASCII
    without entities.
    """
    if not caption.isascii() or "&" in caption:
        return False
    return caption.isprintable() or caption.translate(_BLANKS).isprintable()


@lru_cache(1 << 12)  # captions made from templates repeat
def _cleaned(caption: str) -> str:
    return html.unescape(html.unescape(ftfy.fix_text(caption)))
