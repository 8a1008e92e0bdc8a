"""Shard sets: WebDataset tars read by offset, their captions tokenised once into a cache away from the data."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tarfile
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from open_clip.tokenizer import SimpleTokenizer

from modelchain.errors import InputError, Problem, WorkError

Progress = Callable[[int, int], None]  # called with (done, all)

PICTURES = ("jpg", "jpeg", "png", "webp")
MAX_OPEN = 512  # shards kept open; a process may usually open 1,024 files
VERSION = 1  # of the index's files; another version is rebuilt
_COLUMNS = {"shard": "i", "offset": "q", "size": "q", "label": "q", "captions": "q", "bounds": "q", "tokens": "H"}
_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)  # webdataset.tariterators.base_plus_ext


class Problems(list[Problem]):
    """What is wrong so far; raises InputError at the fifth problem, or with those there are on `stop`."""

    def add(self, message: str, file: str | Path, field: str | None = None) -> None:
        self.append(Problem(message, str(file), field))
        if len(self) == 5:
            self.stop()

    def stop(self) -> None:
        if self:
            raise InputError(*self)


class Record(NamedTuple):
    """One sample of a shard: where in the tar its picture lies (bytes), its captions and label, all its json held."""

    key: str
    offset: int
    size: int
    captions: list[str]
    label: int | None
    classname: str | None
    meta: dict[str, Any]


def read_shard(path: Path, problems: Problems) -> Iterator[Record]:
    """The samples of a plain tar in order; what is wrong with it goes to `problems`, naming the member."""
    member, seen = None, set()
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, found in itertools.groupby(_members(tar), key=lambda found: found[0]):
                parts: dict[str, tarfile.TarInfo] = {}
                for _, suffix, info in found:
                    member = info.name
                    if suffix in parts:
                        problems.add(f"sample {key!r} has two members .{suffix}", path, member)
                    parts[suffix] = info
                if key in seen:
                    problems.add(f"key {key!r} is used twice in this shard", path, member)
                seen.add(key)
                try:
                    yield _record(tar, key, parts)
                except (ValueError, RecursionError) as error:
                    problems.add(f"sample {key!r}: {error}", path, member)
            # tarfile takes any header it cannot read for the end; only a block of zeros is one.
            file.seek(tar.offset)
            if file.read(512) != bytes(512):
                problems.add("truncated or damaged tar: no end mark after the last member", path, member)
            elif not seen:
                problems.add("the tar holds no sample", path)
    except OSError as error:
        problems.add(error.strerror or str(error), path, member)
    except (tarfile.TarError, ValueError) as error:
        hint = "not a plain tar (a compressed one must be unpacked)" if member is None else "truncated or damaged tar"
        problems.add(f"{hint}: {error}", path, member)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, lower-case suffix and header of every file that webdataset counts as part of a sample."""
    for info in tar:
        match = _MEMBER.match(info.name)
        if info.isreg() and match and not re.match(r"__[^/]*__($|/)", info.name):
            yield match[1], match[2].lower(), info


def _record(tar: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo]) -> Record:
    """Make a sample of its members; ValueError says what is wrong with them."""
    text = {suffix: tar.extractfile(parts[suffix]).read().decode() for suffix in ("json", "txt", "cls") if suffix in parts}
    pictures = [parts[suffix] for suffix in PICTURES if suffix in parts]
    if len(pictures) != 1:
        raise ValueError(f"{len(pictures)} pictures (.{', .'.join(PICTURES)}) instead of one")
    meta = json.loads(text.get("json", "{}"))
    if not isinstance(meta, dict):
        raise ValueError("its json must be an object")
    lines = text["txt"].splitlines() if "txt" in text else None
    captions = meta.get("captions", [meta["caption"]] if "caption" in meta else lines)
    if captions is not None and not (isinstance(captions, list) and captions):
        raise ValueError("captions must be a list of at least one text")
    if not all(isinstance(caption, str) for caption in captions or []):
        raise ValueError("every caption must be a text")
    label, classname = meta.get("label"), meta.get("classname")
    if label is None and "cls" in text:
        label = int(text["cls"])
    if label is not None and (type(label) is not int or not 0 <= label < 2**31):
        raise ValueError(f"label must be a whole number from 0, not {label!r:.40}")
    if not isinstance(classname, str | None):
        raise ValueError("classname must be a text")
    captions = [caption for caption in captions or [] if caption.strip()]
    return Record(key, pictures[0].offset_data, pictures[0].size, captions, label, classname, meta)


class ShardSet:
    """Samples 0 .. len-1 of a list of shards, in their order; may be used from many threads.

    `labels` int64 [len], -1 where there is none; `caption_counts` int64 [len].
    """

    def __init__(self, shards: list[Path], fingerprint: str, place: Path, columns: dict[str, np.ndarray]):
        self.shards, self.fingerprint, self.labels = shards, fingerprint, columns["label"]
        self.caption_counts = np.diff(columns["captions"])
        self._place, self._columns = place, columns
        # A file put out of the cache is closed when the last thread that reads it lets go.
        self._open = lru_cache(MAX_OPEN)(lambda shard: shards[shard].open("rb", buffering=0))

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def keys(self) -> list[str]:
        return json.loads((self._place / "keys.json").read_bytes())

    @cached_property
    def classnames(self) -> list[str | None]:
        return json.loads((self._place / "classnames.json").read_bytes())

    def caption_count(self, i: int) -> int:
        return int(self.caption_counts[i])

    def picture(self, i: int) -> bytes:
        """The encoded picture of sample `i`; WorkError (class Data) if its shard is gone or has changed."""
        shard, offset, size = (int(self._columns[name][i]) for name in ("shard", "offset", "size"))
        try:
            file = self._open(shard)
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise WorkError(f"{self.shards[shard]}: {error.strerror}", "Data") from error
        if len(data) != size:
            raise WorkError(f"{self.shards[shard]}: sample {self.keys[i]!r} is cut off; the shard has changed", "Data")
        return data

    def tokens(self, i: int, j: int, context_length: int) -> np.ndarray:
        """Caption `j` of sample `i`, uint16 [<= context_length], from start to end of text, not padded.

        A longer caption is cut and its last token made end of text, as open_clip's SimpleTokenizer does.
        """
        caption, flat = self._columns["captions"][i] + j, self._columns["tokens"]
        start, end = self._columns["bounds"][caption : caption + 2]
        if end - start <= context_length:
            return flat[start:end]
        return np.append(flat[start : start + context_length - 1], flat[end - 1])


def open_set(shards: Sequence[Path], cache: Path, on_progress: Progress | None = None) -> ShardSet:
    """Open `shards`, first building their index in `cache/<fingerprint>/` (reporting shards) if none there is whole.

    Processes may race: the first to finish wins, the others use its index. Raises InputError with up to five
    things that are wrong with the shards, each with file and member.
    """
    mark = fingerprint(shards, cache)
    place = cache / mark
    columns = _load(place)
    if columns is None:
        _build(shards, place, on_progress)
        columns = _load(place)
    if columns is None:
        raise WorkError(f"{place}: the index just written does not verify")
    return ShardSet(list(shards), mark, place, columns)


def fingerprint(shards: Sequence[Path], cache: Path) -> str:
    """SHA-256 (hex) over the shards' SHA-256 in order, never their names; each is cached by path, size and mtime."""
    problems, digests = Problems(), {}
    try:
        known = dict(json.loads((cache / "sha256.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        known = {}
    for shard in shards:
        try:
            path, stat = str(shard.resolve()), shard.stat()
            match known.get(path):
                case [stat.st_size, stat.st_mtime_ns, str(digest)] if re.fullmatch("[0-9a-f]{64}", digest):
                    digests[path] = known[path]
                case _:
                    digests[path] = [stat.st_size, stat.st_mtime_ns, sha256(shard)]
        except OSError as error:
            problems.add(error.strerror, shard)
    problems.stop()
    if not digests.items() <= known.items():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".sha256-", dir=cache) as folder:
            new = Path(folder) / "sha256.json"
            new.write_text(json.dumps(known | digests))
            sync(new)
            new.replace(cache / new.name)
    return combine(digests[str(shard.resolve())][2] for shard in shards)


def combine(digests: Iterable[str]) -> str:
    """The fingerprint of shards with these SHA-256, in order."""
    return hashlib.sha256("\n".join(["v1", *digests]).encode()).hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(*paths: Path) -> None:
    """Fsync files or folders."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def _load(place: Path) -> dict[str, np.ndarray] | None:
    """The index's columns if every file is whole, else None."""
    try:
        index = json.loads((place / "index.json").read_bytes())
        if index["v"] != VERSION or any(sha256(place / name) != digest for name, digest in index["files"].items()):
            return None
        columns = {name: np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _COLUMNS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return {name: column.view(np.ndarray) for name, column in columns.items()}  # slicing a memmap is slow


def _build(shards: Sequence[Path], place: Path, on_progress: Progress | None) -> None:
    problems, tokenizer = Problems(), SimpleTokenizer()
    encode = lru_cache(1 << 16)(tokenizer.encode)  # captions made from templates repeat
    columns = {name: array(code) for name, code in _COLUMNS.items()}
    columns["captions"].append(0)
    columns["bounds"].append(0)
    texts: dict[str, list[str | None]] = {"keys": [], "classnames": []}
    for number, shard in enumerate(shards):
        for record in read_shard(shard, problems):
            for caption in record.captions:
                columns["tokens"].extend([tokenizer.sot_token_id, *encode(caption), tokenizer.eot_token_id])
                columns["bounds"].append(len(columns["tokens"]))
            row = (number, record.offset, record.size, -1 if record.label is None else record.label)
            for name, value in zip(_COLUMNS, (*row, len(columns["bounds"]) - 1), strict=False):
                columns[name].append(value)
            texts["keys"].append(record.key)
            texts["classnames"].append(record.classname)
        if on_progress:
            on_progress(number + 1, len(shards))
    problems.stop()
    with tempfile.TemporaryDirectory(prefix=".index-", dir=place.parent) as folder:
        new = Path(folder) / "new"
        new.mkdir()
        for name, column in columns.items():
            np.save(new / f"{name}.npy", np.asarray(column))
        for name, values in texts.items():
            (new / f"{name}.json").write_text(json.dumps(values))
        files = {path.name: sha256(path) for path in new.iterdir()}
        (new / "index.json").write_text(json.dumps({"v": VERSION, "files": files}))
        sync(*new.iterdir(), new)
        if place.exists() and _load(place) is None:
            place.rename(Path(folder) / "damaged")
        try:
            new.rename(place)
        except OSError:
            return  # another process was first
        sync(place.parent)


def check_training(data: ShardSet, samples: int, captions_per_sample: int, file: str | Path) -> int:
    """Compare the shards with the spec: exactly `samples`, at most 0.1 % of them with too few captions, none without.

    Returns how many have too few (theirs are drawn with replacement); raises InputError naming the spec's field.
    """
    if len(data) != samples:
        message = f"the shards hold {len(data)} samples, not {samples}"
        raise InputError(message, file=file, field="spec.data.train.samples")
    short = np.flatnonzero(data.caption_counts < captions_per_sample)
    if len(short) * 1000 > samples or not data.caption_counts.all():
        worst = short[np.argmin(data.caption_counts[short])]
        message = f"{len(short)} of {samples} samples have fewer than {captions_per_sample} captions (at most "
        message += f"{samples // 1000} may, none may have 0); {data.keys[worst]!r} has {data.caption_count(worst)}"
        raise InputError(message, file=file, field="spec.data.train.captionsPerSample")
    return len(short)


def check_labels(data: ShardSet, class_names: Sequence[str], file: str | Path, field: str | None = None) -> None:
    """Refuse (InputError) a sample with no label among `class_names`, or whose class name stands there elsewhere."""
    problems = Problems()
    for key, label, name in zip(data.keys, data.labels.tolist(), data.classnames, strict=True):
        if not 0 <= label < len(class_names):
            told = "no label" if label < 0 else f"label {label}"
            problems.add(f"sample {key!r} has {told}; there are {len(class_names)} class names", file, field)
        elif name in class_names and class_names[label] != name:
            told = f"label {label}, which is {class_names[label]!r}, but is called {name!r}"
            problems.add(f"sample {key!r} has {told}", file, field)
    problems.stop()
