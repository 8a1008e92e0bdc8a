"""Shard sets: WebDataset tars that are read by offset, with tokens from their index."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from modelchain.errors import InputError, WorkError
from modelchain.identity.digest import digest_of
from modelchain_data.build import (
    DIGESTS,
    Progress,
    Shards,
    alone,
    are_whole,
    build_set,
    find_set,
    fingerprint_of,
    index_files,
    known_digests,
)
from modelchain_data.samples import BAD_LABEL
from modelchain_data.shard_index import NOT_WHOLE, read_index

FEW_OPEN = 128  # shards that are kept open where the process may not open all
OTHER_FILES = 512  # that the process may open beside shards and their indexes
_kept_open = 0  # files that the sets of this process may keep open


class ShardSet:
    """Samples 0 .. len-1 of a list of shards, in their order. Threads may share it.

    `labels` is int32 [len]: -1 if there is none, -2 if it is not a whole number from 0.
    `caption_counts` is int32 [len], and `counts` the number of samples of each shard.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        indexes: Sequence[Path],
        fingerprint: str,
        rows: np.ndarray,
        counts: Sequence[int],
    ):
        self.fingerprint = fingerprint
        self.counts = counts
        self._rows = rows
        self._first = np.cumsum([0, *counts])  # the number of each shard's first sample
        self.labels, self.caption_counts = rows["label"], rows["captions"]
        self.without_caption = np.flatnonzero(self.caption_counts == 0)
        # By their first bytes. Others may prove undecodable later.
        self.unreadable = np.flatnonzero(~rows["picture"])
        # Of each shard the tar and its index. What leaves the cache is closed when the last thread
        # has finished reading it.
        kept = allow_open_files(2 * len(shards)) // 2
        self._open = lru_cache(kept)(lambda shard: shards[shard].open("rb", buffering=0))
        self._index = lru_cache(kept)(lambda shard: read_index(indexes[shard]))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def keys(self) -> list[str]:
        return [key for shard in range(len(self.counts)) for key in self._index(shard).names()[0]]

    @property
    def classnames(self) -> list[str | bool | None]:
        """None for a sample without a class name, and False if it is not a text."""
        shards = range(len(self.counts))
        return [name for shard in shards for name in self._index(shard).names()[1]]

    def key(self, i: int) -> str:
        shard = int(self._rows["shard"][i])
        return self._index(shard).names()[0][i - self._first[shard]]

    def caption_count(self, i: int) -> int:
        return int(self.caption_counts[i])

    def picture(self, i: int) -> bytes:
        """The encoded picture of sample `i`. Raises WorkError if its shard cannot be read, of class
        Data if it has changed.
        """
        row = self._rows[i]
        size = int(row["size"])
        try:
            file = self._open(int(row["shard"]))
            data = os.pread(file.fileno(), size, int(row["offset"]))
        except OSError as error:  # not of class Data: a file system may recover
            raise WorkError(f"sample {self.key(i)!r}: {error}") from error
        if len(data) != size:
            raise WorkError(
                f"{file.name}: sample {self.key(i)!r} is cut off; the shard has changed", "Data"
            )
        return data

    def tokens(self, i: int, j: int, context_length: int) -> np.ndarray:
        """Caption `j` of sample `i`, uint16 [<= context_length], from start to end of text, not
        padded.

        A longer caption is cut, and its last token becomes end of text, as in open_clip's
        SimpleTokenizer.
        """
        row = self._rows[i]
        index = self._index(int(row["shard"]))
        start, end = index.bounds[int(row["caption"]) + j :][:2].tolist()
        if end - start <= context_length:
            return index.tokens[start:end].copy()
        return np.append(index.tokens[start : start + context_length - 1], index.tokens[end - 1])


def open_set(
    shards: Sequence[Path],
    index: Path,
    on_progress: Progress = lambda *_: None,
    check: bool = True,
) -> ShardSet:
    """Open `shards` with the indexes that `pack` wrote beside them, or with those in the folder
    `index`.

    What is missing or damaged is built there, reporting (done, all) shards that had to be read. Of
    several processes that open the same shards one builds, and the others wait for it; on a file
    system without locks all build, and the first to finish wins. Without `check` an index is used
    although its bytes may have changed, which saves reading all of it.

    Raises InputError with up to five things that are wrong with the shards, each with file and
    member.
    """
    given = Shards.of(shards, index)
    with contextlib.suppress(*NOT_WHOLE):
        return _load(given, known_digests(given, index / DIGESTS), check)
    with alone(index, digest_of(given.states)):
        with contextlib.suppress(*NOT_WHOLE):  # another process may have built it meanwhile
            return _load(given, known_digests(given, index / DIGESTS), check)
        return _load(given, build_set(given, index / DIGESTS, on_progress), check=False)


def _load(shards: Shards, digests: Sequence[str | None], check: bool) -> ShardSet:
    """Open the set if all of it is there. Raises one of NOT_WHOLE otherwise."""
    if None in digests:
        raise ValueError("a shard has not been hashed")
    files = index_files(shards, digests)
    if check and not all(are_whole(files)):
        raise ValueError("a shard's index is damaged")
    fingerprint = fingerprint_of(digests)
    rows, counts = find_set(shards, fingerprint, check)
    return ShardSet(shards.paths, files, fingerprint, rows, counts)


def allow_open_files(count: int) -> int:
    """Raise this process's limit of open files, so that `count` more can be kept open. Returns how
    many of them can be: fewer if the hard limit is too low, but at least 2 * FEW_OPEN.
    """
    global _kept_open
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # RLIM_INFINITY is -1
    soft, most = (sys.maxsize if limit < 0 else limit for limit in (soft, hard))
    wanted = min(_kept_open + count + OTHER_FILES, most)
    if wanted > soft:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    allowed = min(count, max(soft - OTHER_FILES - _kept_open, 2 * FEW_OPEN))
    _kept_open += allowed
    return allowed


def check_pictures(data: ShardSet, allowed: int, file: str | Path, field: str) -> None:
    """Raise InputError if more than `allowed` members are no JPEG, PNG or WebP by their first
    bytes.
    """
    bad = data.unreadable
    if len(bad) > allowed:
        message = (
            f"{len(bad)} of {len(data)} pictures are no JPEG, PNG or WebP (at most {allowed}"
            " may be)"
        )
        raise InputError(
            f"{message}; the first is that of sample {data.key(bad[0])!r}", file=file, field=field
        )


def check_training(data: ShardSet, samples: int, captions_per_sample: int, file: str | Path) -> int:
    """How many samples have fewer captions than are drawn. They are drawn with replacement.
    Samples without any caption are not counted.

    Raises InputError, with the spec's field, if there are not exactly `samples`, or if over 0.1 %
    of them have no captions or too few.
    """
    if len(data) != samples:
        message = f"the shards hold {len(data)} samples, not {samples}"
        raise InputError(message, file=file, field="spec.data.train.samples")
    counts, bare = data.caption_counts, data.without_caption
    most = f"(at most {samples // 1000} may)"
    if len(bare) * 1000 > samples:
        message = (
            f"{len(bare)} of {samples} samples have no caption {most}; the first is"
            f" {data.key(bare[0])!r}"
        )
        raise InputError(message, file=file, field="spec.data.train.shards")
    short = np.flatnonzero((counts > 0) & (counts < captions_per_sample))
    if len(short) * 1000 > samples:
        worst = int(short[np.argmin(counts[short])])
        message = (
            f"{len(short)} of {samples} samples have fewer than {captions_per_sample} captions"
            f" {most}"
        )
        message += f": {data.key(worst)!r} has {data.caption_count(worst)}"
        raise InputError(message, file=file, field="spec.data.train.captionsPerSample")
    return len(short)


def check_labels(
    data: ShardSet, class_names: Sequence[str], file: str | Path, field: str | None = None
) -> None:
    """Raise InputError for samples whose label is not in `class_names`, or whose class name has
    another label there.
    """
    named = {name for name in data.classnames if name}
    if named and not named & set(class_names) and len(class_names) != len(named):
        message = (
            f"{len(class_names)} class names, none of them among the {len(named)} that the samples"
            " have"
        )
        raise InputError(f"{message}, such as {min(named)!r}", file=file, field=field)
    wrong = []
    for key, label, name in zip(data.keys, data.labels.tolist(), data.classnames, strict=True):
        if label == BAD_LABEL:
            wrong.append(f"sample {key!r}: its label must be a whole number from 0")
        elif name is False:
            wrong.append(f"sample {key!r}: its classname must be a text")
        elif not 0 <= label < len(class_names):
            found = f"label {label}" if label >= 0 else "no label"
            wrong.append(f"sample {key!r} has {found}; there are {len(class_names)} class names")
        elif name in class_names and class_names[label] != name:
            wrong.append(
                f"sample {key!r} is called {name!r}, but its label {label} stands for"
                f" {class_names[label]!r}"
            )
    if wrong:
        more = (
            f" (and {len(wrong) - 1} more of {len(data)} samples do not match)"
            if len(wrong) > 1
            else ""
        )
        raise InputError(wrong[0] + more, file=file, field=field)
