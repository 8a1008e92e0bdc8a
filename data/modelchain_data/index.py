"""Shard sets: WebDataset tars that are read by offset. Their captions are tokenised once, by `pack`
or into a cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from modelchain.errors import InputError, Problem, WorkError
from modelchain.identity.digest import digest_of
from modelchain.io.files import fsync, sha256_of, write_atomic
from modelchain.io.guard import die_with_parent
from modelchain_data.samples import BAD_LABEL, Problems, read_shard
from modelchain_data.temporary import temporary_folder

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

Progress = Callable[[int, int], None]  # called with (done, all)

MAX_OPEN = 512  # a process may usually open 1,024 files
VERSION = 3  # of the index's files; another version is rebuilt
PACKED = "index"  # the folder of indexes that `pack` writes beside its shards
PARALLEL = 1 << 32  # bytes of shards from which several processes index them
MAX_PROCESSES = 8  # each takes 350 MB of memory
# What reading a damaged index may raise.
_NOT_WHOLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
_PICTURE = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)


class ShardSet:
    """Samples 0 .. len-1 of a list of shards, in their order. Threads may share it.

    `labels` is int64 [len]: -1 if there is none, -2 if it is not a whole number from 0.
    `caption_counts` is int64 [len]. `keys` and `classnames` are lists; a class name is None if
    there is none, and False if it is not a text.
    """

    def __init__(self, shards: Sequence[Path], place: Path, arrays: Sequence[np.ndarray]):
        self.fingerprint, self._place = place.name, place
        self._samples, self._bounds, self._tokens = arrays
        self.labels, self.caption_counts = self._samples[:, 3], self._samples[:, 5]
        self.without_caption = np.flatnonzero(self.caption_counts == 0)
        # By their first bytes. Others may prove undecodable later.
        self.unreadable = np.flatnonzero(self._samples[:, 6] == 0)
        # A file that leaves the cache is closed when the last thread has finished reading it.
        self._open = lru_cache(MAX_OPEN)(lambda shard: shards[shard].open("rb", buffering=0))

    keys = cached_property(lambda self: json.loads((self._place / "keys.json").read_bytes()))
    classnames = cached_property(
        lambda self: json.loads((self._place / "classnames.json").read_bytes())
    )

    def __len__(self) -> int:
        return len(self._samples)

    def caption_count(self, i: int) -> int:
        return int(self.caption_counts[i])

    def picture(self, i: int) -> bytes:
        """The encoded picture of sample `i`. Raises WorkError if its shard cannot be read, of class
        Data if it has changed.
        """
        shard, offset, size = self._samples[i, :3].tolist()
        try:
            file = self._open(shard)
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:  # not of class Data: a file system may recover
            raise WorkError(f"sample {self.keys[i]!r}: {error}") from error
        if len(data) != size:
            raise WorkError(
                f"{file.name}: sample {self.keys[i]!r} is cut off; the shard has changed", "Data"
            )
        return data

    def tokens(self, i: int, j: int, context_length: int) -> np.ndarray:
        """Caption `j` of sample `i`, uint16 [<= context_length], from start to end of text, not
        padded.

        A longer caption is cut, and its last token becomes end of text, as in open_clip's
        SimpleTokenizer.
        """
        start, end = self._bounds[self._samples[i, 4] + j :][:2].tolist()
        if end - start <= context_length:
            return self._tokens[start:end].copy()
        return np.append(self._tokens[start : start + context_length - 1], self._tokens[end - 1])


def open_set(
    shards: Sequence[Path], cache: Path, on_progress: Progress = lambda *_: None
) -> ShardSet:
    """Open `shards` with the index that `pack` wrote beside them, else with the one in
    `cache/<fingerprint>/`.

    If neither is whole, an index is built in the cache, reporting (done, all) shards. Of several
    processes one builds it, and the others wait for it. On a file system without locks all build
    it, and the first to finish wins. Raises InputError with up to five things that are wrong with
    the shards, each with file and member.
    """
    place = cache / fingerprint(shards, cache)
    there = place.exists()
    for found in (shards[0].parent / PACKED / place.name, place):
        with contextlib.suppress(*_NOT_WHOLE):
            return ShardSet(shards, found, _load(found))
    with _alone(place):
        with contextlib.suppress(*_NOT_WHOLE):  # another process may have built it meanwhile
            return ShardSet(shards, place, _load(place))
        if there:
            shutil.rmtree(place, ignore_errors=True)
        if not place.exists():
            build(shards, place, on_progress)
    return ShardSet(shards, place, _load(place))


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Lock the building of an index. This only saves work: without the lock, renames still keep an
    index whole or absent.
    """
    lock = place.with_name(f".{place.name}.lock")
    with lock.open("ab") as file:
        with contextlib.suppress(OSError):  # ENOLCK, ENOTSUP: some network file systems
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def fingerprint(shards: Sequence[Path], cache: Path) -> str:
    """SHA-256 (hex) over the shards' SHA-256 in order, without their names. Each shard's is cached
    by path, size and mtime.
    """
    file, problems, found = cache / "sha256.json", Problems(), []
    try:
        known = dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        known = {}
    for shard in shards:
        try:
            state = f"{shard.resolve()} {shard.stat().st_size} {shard.stat().st_mtime_ns}"
            digest = str(known.get(state))
            found.append(
                (state, digest if re.fullmatch("[0-9a-f]{64}", digest) else sha256_of(shard))
            )
        except OSError as error:
            problems.add(error.strerror, shard)
    problems.stop()
    if not set(found) <= known.items():
        cache.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(known | dict(found)).encode())
    return digest_of({"v": 1, "shards": [digest for _, digest in found]})


def _load(place: Path) -> list[np.ndarray]:
    """The samples, bounds and tokens of an index, as `build` writes them, if all its files are
    whole.
    """
    index = json.loads((place / "index.json").read_bytes())
    if index["v"] != VERSION or any(
        sha256_of(place / name) != digest for name, digest in index["files"].items()
    ):
        raise ValueError("another version, or damaged")
    names = ("samples.npy", "bounds.npy", "tokens.npy")
    # Viewed as plain arrays, since slicing a memmap is slow.
    return [
        np.load(place / name, mmap_mode="r", allow_pickle=False).view(np.ndarray) for name in names
    ]


@dataclass
class _Part:
    """What a shard adds to the index: rows (offset, size, label, captions, picture?), and tokens
    with their lengths.
    """

    rows: list[tuple[int, int, int, int, bool]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    classnames: list[str | Literal[False] | None] = field(default_factory=list)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    tokens: array[int] = field(default_factory=lambda: array("H"))
    problems: list[Problem] = field(default_factory=list)


@cache
def _encoder() -> tuple[SimpleTokenizer, Callable[[str], list[int]]]:
    # To import open_clip takes four seconds. Usually the index is there, and nothing is tokenised.
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    return tokenizer, lru_cache(1 << 16)(tokenizer.encode)  # captions made from templates repeat


def _read(shard: Path) -> _Part:
    part, problems, (tokenizer, encode) = _Part(), Problems(), _encoder()
    file = None
    # InputError: there are so many problems that reading stops.
    with contextlib.ExitStack() as stack, contextlib.suppress(InputError):
        for key, offset, size, captions, label, meta in read_shard(shard, problems):
            file = file or stack.enter_context(shard.open("rb"))
            picture = bool(_PICTURE.match(os.pread(file.fileno(), 12, offset)))
            part.rows.append((offset, size, label, len(captions), picture))
            part.keys.append(key)
            name = meta.get("classname")
            part.classnames.append(name if isinstance(name, str | None) else False)
            for caption in captions:
                before = len(part.tokens)
                part.tokens.extend(
                    [tokenizer.sot_token_id, *encode(caption), tokenizer.eot_token_id]
                )
                part.lengths.append(len(part.tokens) - before)
    part.problems = list(problems)
    return part


def _read_all(shards: Sequence[Path]) -> Iterator[_Part]:
    """The parts of the shards in order. Several processes read them if there is much to
    tokenise.
    """
    processes = min(len(shards), len(os.sched_getaffinity(0)), MAX_PROCESSES)
    if processes == 1 or sum(shard.stat().st_size for shard in shards) < PARALLEL:
        yield from map(_read, shards)
        return
    try:
        ours = (signal.SIGTERM, os.getpid())  # they end when this process is killed
        with ProcessPoolExecutor(processes, get_context("spawn"), die_with_parent, ours) as pool:
            yield from pool.map(_read, shards)
    except BrokenProcessPool as error:
        raise WorkError(
            f"a process that indexes {shards[0].parent} was ended, perhaps for want of memory"
        ) from error


def build(shards: Sequence[Path], place: Path, on_progress: Progress) -> list[int]:
    """Write the index of `shards` to `place`: samples int64 [n, 7] (shard, offset, size, label,
    first caption, captions, picture?), the bounds of captions, and tokens.

    Returns the number of samples in each shard. Raises InputError with up to five things that are
    wrong with them.
    """
    problems, samples, keys, classnames = Problems(), [], [], []
    lengths, tokens, captions = array("q", [0]), array("H"), 0
    for number, part in enumerate(_read_all(shards)):
        for problem in part.problems:
            problems.add(problem.message, problem.file or "", problem.field)
        for offset, size, label, count, picture in part.rows:
            samples.append((number, offset, size, label, captions, count, picture))
            captions += count
        keys += part.keys
        classnames += part.classnames
        lengths.extend(part.lengths)
        tokens.extend(part.tokens)
        on_progress(number + 1, len(shards))
    problems.stop()
    with temporary_folder(place.parent, "index") as folder:
        new = folder / "new"
        new.mkdir()
        np.save(new / "samples.npy", np.array(samples))
        np.save(new / "bounds.npy", np.cumsum(lengths))
        np.save(new / "tokens.npy", np.asarray(tokens))
        (new / "keys.json").write_text(json.dumps(keys))
        (new / "classnames.json").write_text(json.dumps(classnames))
        digests = {file.name: sha256_of(file) for file in new.iterdir()}
        for name in digests:
            fsync(new / name)
        write_atomic(new / "index.json", json.dumps({"v": VERSION, "files": digests}).encode())
        with contextlib.suppress(OSError):  # another process was first
            new.rename(place)
        fsync(place.parent)
    return np.bincount([sample[0] for sample in samples], minlength=len(shards)).tolist()


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
            f"{message}; the first is that of sample {data.keys[bad[0]]!r}", file=file, field=field
        )


def check_training(data: ShardSet, samples: int, captions_per_sample: int, file: str | Path) -> int:
    """How many samples have captions, but fewer than are drawn (so that theirs are drawn with
    replacement).

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
            f" {data.keys[bare[0]]!r}"
        )
        raise InputError(message, file=file, field="spec.data.train.shards")
    short = np.flatnonzero((counts > 0) & (counts < captions_per_sample))
    if len(short) * 1000 > samples:
        worst = int(short[np.argmin(counts[short])])
        message = (
            f"{len(short)} of {samples} samples have fewer than {captions_per_sample} captions"
            f" {most}"
        )
        message += f": {data.keys[worst]!r} has {data.caption_count(worst)}"
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
