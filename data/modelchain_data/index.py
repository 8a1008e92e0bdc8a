"""Shard sets: WebDataset tars read by offset, their captions tokenised once: by `pack`, or into a cache elsewhere."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import tarfile
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from open_clip.tokenizer import SimpleTokenizer

from modelchain.cli.files import fsync, sha256_of, write_atomic
from modelchain.cli.local.guard import die_with_parent
from modelchain.digest import digest_of
from modelchain.errors import InputError, Problem, WorkError

Progress = Callable[[int, int], None]  # called with (done, all)

PICTURES = ("jpg", "jpeg", "png", "webp")
MAX_PROBLEMS, MAX_OPEN = 5, 512  # a process may usually open 1,024 files
VERSION = 2  # of the index's files; another version is rebuilt
PACKED = "index"  # the folder of indexes that `pack` leaves beside its shards
PARALLEL, MAX_PROCESSES = 1 << 32, 8  # bytes of shards from which processes pay; each takes 350 MB of memory
_NOT_WHOLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading a damaged index may raise
_PICTURE = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP", re.DOTALL)
_MEMBER = re.compile(r"(?!__[^/]*__)((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # as webdataset's base_plus_ext


class Problems(list[Problem]):
    """What is wrong so far; raises InputError at the fifth problem, or with those there are on `stop`."""

    def add(self, message: str, file: str | Path, field: str | None = None) -> None:
        self.append(Problem(message, str(file), field))
        if len(self) == MAX_PROBLEMS:
            self.stop()

    def stop(self) -> None:
        if self:
            raise InputError(*self)


# Key, offset and size of the picture in the tar (bytes), captions, label (-1: none), all that the json held.
Sample = tuple[str, int, int, list[str], int, dict[str, Any]]


def read_shard(path: Path, problems: Problems) -> Iterator[Sample]:
    """The samples of a plain tar in order; what is wrong with it goes to `problems`, naming the member."""
    member, seen = None, set()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            files = ((_MEMBER.fullmatch(info.name), info) for info in tar if info.isreg())
            for key, group in itertools.groupby((f for f in files if f[0]), key=lambda f: f[0][1]):
                members = [(match[2].lower(), info) for match, info in group]
                parts, member = dict(members), members[-1][1].name
                try:
                    if key in seen or len(parts) < len(members):
                        raise ValueError("its key, or one of its suffixes, is used twice in this shard")
                    seen.add(key)
                    yield _sample(tar, key, parts)
                except (ValueError, RecursionError) as error:
                    problems.add(f"sample {key!r}: {error}", path, member)
            file.seek(tar.offset)  # tarfile takes any header it cannot read for the end; only a block of zeros is one
            if file.read(512) != bytes(512):
                problems.add("truncated or damaged tar: no end mark after the last member", path, member)
            elif member is None:
                problems.add("the tar holds no sample", path)
    except (tarfile.TarError, OSError, ValueError) as error:
        problems.add(f"not a whole, plain tar (a compressed one must be unpacked): {error}", path, member)


def _sample(tar: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo]) -> Sample:
    """A sample of its members by suffix; ValueError says what is wrong with them."""
    read = {name: tar.extractfile(parts[name]).read().decode() for name in ("json", "txt", "cls") if name in parts}
    pictures = [parts[suffix] for suffix in PICTURES if suffix in parts]
    if len(pictures) != 1:
        raise ValueError(f"has {len(pictures)} pictures (.{', .'.join(PICTURES)}) instead of one")
    meta = json.loads(read.get("json", "{}"))
    if not isinstance(meta, dict):
        raise ValueError("its json must be an object")
    lines = read["txt"].splitlines() if "txt" in read else None
    captions = meta.get("captions", [meta["caption"]] if "caption" in meta else lines)
    given, texts = captions is not None or "captions" in meta, captions if isinstance(captions, list) else []
    if given and not (texts and all(isinstance(text, str) for text in texts)):
        raise ValueError("captions must be a list of texts, at least one")
    label = meta.get("label")
    if label is None:
        label = int(read.get("cls", "-1"))
    if type(label) is not int or not -1 <= label < 2**31:
        raise ValueError(f"label must be a whole number from 0, not {label!r:.40}")
    if not isinstance(meta.get("classname"), str | None):
        raise ValueError("classname must be a text")
    texts = [caption for caption in texts if caption.strip()]
    return key, pictures[0].offset_data, pictures[0].size, texts, label, meta


class ShardSet:
    """Samples 0 .. len-1 of a list of shards, in their order; may be used from many threads.

    `labels` int64 [len], -1 where there is none; `caption_counts` int64 [len]; `keys` and `classnames` are lists.
    """

    def __init__(self, shards: Sequence[Path], place: Path, arrays: Sequence[np.ndarray]):
        self.fingerprint, self._place = place.name, place
        self._samples, self._bounds, self._tokens = arrays
        self.labels, self.caption_counts = self._samples[:, 3], self._samples[:, 5]
        self.unreadable = np.flatnonzero(self._samples[:, 6] == 0)  # by their first bytes; others may turn out so later
        # A file put out of the cache is closed once the last thread that reads it lets go.
        self._open = lru_cache(MAX_OPEN)(lambda shard: shards[shard].open("rb", buffering=0))

    keys = cached_property(lambda self: json.loads((self._place / "keys.json").read_bytes()))
    classnames = cached_property(lambda self: json.loads((self._place / "classnames.json").read_bytes()))

    def __len__(self) -> int:
        return len(self._samples)

    def caption_count(self, i: int) -> int:
        return int(self.caption_counts[i])

    def picture(self, i: int) -> bytes:
        """The encoded picture of sample `i`; WorkError if its shard cannot be read, of class Data if it has changed."""
        shard, offset, size = self._samples[i, :3].tolist()
        try:
            file = self._open(shard)
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise WorkError(f"sample {self.keys[i]!r}: {error}") from error  # a file system may come back
        if len(data) != size:
            raise WorkError(f"{file.name}: sample {self.keys[i]!r} is cut off; the shard has changed", "Data")
        return data

    def tokens(self, i: int, j: int, context_length: int) -> np.ndarray:
        """Caption `j` of sample `i`, uint16 [<= context_length], from start to end of text, not padded.

        A longer caption is cut and its last token made end of text, as open_clip's SimpleTokenizer does.
        """
        start, end = self._bounds[self._samples[i, 4] + j :][:2].tolist()
        if end - start <= context_length:
            return self._tokens[start:end].copy()
        return np.append(self._tokens[start : start + context_length - 1], self._tokens[end - 1])


def open_set(shards: Sequence[Path], cache: Path, on_progress: Progress = lambda *_: None) -> ShardSet:
    """Open `shards` by the index that `pack` left beside them, or else the one in `cache/<fingerprint>/`.

    If neither is whole, it is built in the cache, reporting (done, all) shards. Processes may race: one builds, the
    others wait and use its index; where the file system knows no locks, the first to finish wins. Raises InputError
    with up to five things that are wrong with the shards, each with file and member.
    """
    place = cache / fingerprint(shards, cache)
    there = place.exists()
    for found in (shards[0].parent / PACKED / place.name, place):
        with contextlib.suppress(*_NOT_WHOLE):
            return ShardSet(shards, found, _load(found))
    with _alone(place):
        with contextlib.suppress(*_NOT_WHOLE):  # another process has built it, or mended it, and reads it
            return ShardSet(shards, place, _load(place))
        if there:
            shutil.rmtree(place, ignore_errors=True)
        if not place.exists():
            build(shards, place, on_progress)
    return ShardSet(shards, place, _load(place))


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Only to save work: without a lock, or with one that is lost, renames still keep an index whole or absent."""
    lock = place.with_name(f".{place.name}.lock")
    with lock.open("ab") as file:
        with contextlib.suppress(OSError):  # ENOLCK, ENOTSUP: some network file systems
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def fingerprint(shards: Sequence[Path], cache: Path) -> str:
    """SHA-256 (hex) over the shards' SHA-256 in order, never their names; each is cached by path, size and mtime."""
    file, problems, found = cache / "sha256.json", Problems(), []
    try:
        known = dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        known = {}
    for shard in shards:
        try:
            state = f"{shard.resolve()} {shard.stat().st_size} {shard.stat().st_mtime_ns}"
            digest = str(known.get(state))
            found.append((state, digest if re.fullmatch("[0-9a-f]{64}", digest) else sha256_of(shard)))
        except OSError as error:
            problems.add(error.strerror, shard)
    problems.stop()
    if not set(found) <= known.items():
        cache.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(known | dict(found)).encode())
    return digest_of({"v": 1, "shards": [digest for _, digest in found]})


def _load(place: Path) -> list[np.ndarray]:
    """The index if every file of it is whole: samples, bounds and tokens, as `build` writes them."""
    index = json.loads((place / "index.json").read_bytes())
    if index["v"] != VERSION or any(sha256_of(place / name) != digest for name, digest in index["files"].items()):
        raise ValueError("another version, or damaged")
    names = ("samples.npy", "bounds.npy", "tokens.npy")
    # As plain arrays: slicing a memmap is slow.
    return [np.load(place / name, mmap_mode="r", allow_pickle=False).view(np.ndarray) for name in names]


@dataclass
class _Part:
    """What a shard adds to the index: rows (offset, size, label, captions, picture?), and tokens with their lengths."""

    rows: list[tuple[int, int, int, int, bool]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    classnames: list[str | None] = field(default_factory=list)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    tokens: array[int] = field(default_factory=lambda: array("H"))
    problems: list[Problem] = field(default_factory=list)


@cache
def _encoder() -> tuple[SimpleTokenizer, Callable[[str], list[int]]]:
    tokenizer = SimpleTokenizer()
    return tokenizer, lru_cache(1 << 16)(tokenizer.encode)  # captions made from templates repeat


def _read(shard: Path) -> _Part:
    part, problems, (tokenizer, encode) = _Part(), Problems(), _encoder()
    file = None
    with contextlib.ExitStack() as stack, contextlib.suppress(InputError):  # enough problems to stop at
        for key, offset, size, captions, label, meta in read_shard(shard, problems):
            file = file or stack.enter_context(shard.open("rb"))
            picture = bool(_PICTURE.match(os.pread(file.fileno(), 12, offset)))
            part.rows.append((offset, size, label, len(captions), picture))
            part.keys.append(key)
            part.classnames.append(meta.get("classname"))
            for caption in captions:
                before = len(part.tokens)
                part.tokens.extend([tokenizer.sot_token_id, *encode(caption), tokenizer.eot_token_id])
                part.lengths.append(len(part.tokens) - before)
    part.problems = list(problems)
    return part


def _read_all(shards: Sequence[Path]) -> Iterator[_Part]:
    """The parts of the shards in order; by processes where there is much to tokenise."""
    processes = min(len(shards), len(os.sched_getaffinity(0)), MAX_PROCESSES)
    if processes == 1 or sum(shard.stat().st_size for shard in shards) < PARALLEL:
        yield from map(_read, shards)
        return
    try:
        ours = (signal.SIGTERM, os.getpid())  # they end when this process is killed
        with ProcessPoolExecutor(processes, get_context("spawn"), die_with_parent, ours) as pool:
            yield from pool.map(_read, shards)
    except BrokenProcessPool as error:
        raise WorkError(f"a process that indexes {shards[0].parent} was ended, perhaps for want of memory") from error


def build(shards: Sequence[Path], place: Path, on_progress: Progress) -> list[int]:
    """Write samples int64 [n, 7] (shard, offset, size, label, first caption, captions, picture?), bounds and tokens.

    Returns the samples of each shard. Raises InputError with up to five things that are wrong with them.
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
    with tempfile.TemporaryDirectory(prefix=".index-", dir=place.parent) as folder:
        new = Path(folder, "new")
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


def read_at(shard: Path, offset: int, size: int) -> bytes:
    """Bytes of a member of `shard`."""
    with shard.open("rb") as file:
        return os.pread(file.fileno(), size, offset)


def check_pictures(data: ShardSet, allowed: int, file: str | Path, field: str) -> None:
    """Refuse (InputError) more than `allowed` members that are no JPEG, PNG or WebP by their first bytes."""
    bad = data.unreadable
    if len(bad) > allowed:
        message = f"{len(bad)} of {len(data)} pictures are no JPEG, PNG or WebP (at most {allowed} may be)"
        raise InputError(f"{message}; the first is that of sample {data.keys[bad[0]]!r}", file=file, field=field)


def check_training(data: ShardSet, samples: int, captions_per_sample: int, file: str | Path) -> int:
    """How many samples have fewer captions than asked (theirs are drawn with replacement).

    Raises InputError naming the spec's field: not exactly `samples`, over 0.1 % with too few, or one with none.
    """
    if len(data) != samples:
        message = f"the shards hold {len(data)} samples, not {samples}"
        raise InputError(message, file=file, field="spec.data.train.samples")
    short = np.flatnonzero(data.caption_counts < captions_per_sample)
    if len(short) * 1000 > samples or not data.caption_counts.all():
        worst = int(np.argmin(data.caption_counts))
        message = f"{len(short)} of {samples} samples have fewer than {captions_per_sample} captions (at most "
        message += f"{samples // 1000} may, none may have 0): {data.keys[worst]!r} has {data.caption_count(worst)}"
        raise InputError(message, file=file, field="spec.data.train.captionsPerSample")
    return len(short)


def check_labels(data: ShardSet, class_names: Sequence[str], file: str | Path, field: str | None = None) -> None:
    """Refuse (InputError) samples with no label among `class_names`, or whose class name stands there elsewhere."""
    named = {name for name in data.classnames if name is not None}
    if named and not named & set(class_names) and len(class_names) != len(named):
        message = f"{len(class_names)} class names, none of them among the {len(named)} that the samples have"
        raise InputError(f"{message}, such as {min(named)!r}", file=file, field=field)
    wrong = []
    for key, label, name in zip(data.keys, data.labels.tolist(), data.classnames, strict=True):
        if not 0 <= label < len(class_names):
            found = f"label {label}" if label >= 0 else "no label"
            wrong.append(f"sample {key!r} has {found}; there are {len(class_names)} class names")
        elif name in class_names and class_names[label] != name:
            wrong.append(f"sample {key!r} is called {name!r}, but its label {label} stands for {class_names[label]!r}")
    if wrong:
        more = f" (and {len(wrong) - 1} more of {len(data)} samples do not match)" if len(wrong) > 1 else ""
        raise InputError(wrong[0] + more, file=file, field=field)
