"""Make shards of other shards, of a caption table, or of scikit-learn's digits; pictures are shrunk once, not each epoch."""

from __future__ import annotations

import filecmp
import itertools
import json
import re
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchvision.io import encode_jpeg, encode_png
from torchvision.transforms.v2 import InterpolationMode, functional
from webdataset import TarWriter

from modelchain.errors import InputError
from modelchain.shards import expand
from modelchain_trainer.data.batches import decode
from modelchain_trainer.data.index import Problems, Progress, combine, read_shard, sha256, sync

MAX_CAPTIONS = 16  # the raw one and 15 sentences of the others, as in the paper
TABLE = [
    "filepath",
    "raw",
    "shortIB",
    "longIB",
    "shortSV",
    "longSV",
    "shortLLA",
    "longLLA",
]  # columns of DreamLIP's caption tables
# A full stop, not that of an initial or a title, before a capital or a digit.
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b[MD]r\.)(?<!\bMrs\.)(?<!\bSt\.)\s+(?=[\"'(]?[A-Z0-9])")
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGIT_TEMPLATES = [
    "a photo of the number {}.",
    "the digit {}.",
    "a handwritten {}.",
    "a picture of the digit {}.",
    "the number {}, by hand.",
    "a scan of a handwritten {}.",
    "a small picture of a {}.",
    "a blurry digit {}.",
    "a white {} on black.",
    "it reads {}.",
    "somebody wrote a {}.",
    "this is the number {}.",
    "a grey picture of a {}.",
    "a {} from a form.",
    "the figure {}.",
    "a coarse scan of the number {}.",
    "one digit: {}.",
    "a {} written with a pen.",
]


class Row(NamedTuple):
    """A sample to be; `read` gives its encoded picture, or raises OSError or ValueError; `where` names it in errors."""

    key: str
    read: Callable[[], bytes]
    meta: dict[str, Any]
    where: str


class Split(NamedTuple):
    """What was made of one split: its shards in brace notation, and the fingerprint that a spec may ask for."""

    name: str
    samples: int
    skipped: int
    shards: str
    fingerprint: str


def pack(
    source: str | Path,
    to: Path,
    *,
    size: int | None = 256,
    per_shard: int = 10_000,
    on_progress: Progress | None = None,
) -> list[Split]:
    """Write `to`/<split>-000000.tar ... and sizes.json (samples of each shard); the same source gives the same bytes.

    Args:
        source: a folder of tars, tars in brace notation, a DreamLIP caption table (.csv, .tsv), or the word digits.
        size: a picture whose short side is longer is shrunk to it; None keeps every picture as it is.
    Raises:
        InputError: a bad source, more than 0.1 % unusable rows in a split, or a folder `to` that holds something else.
    """
    digits = str(source) == "digits"
    if not digits and to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise InputError("exists already; remove it or choose another folder", file=to)
    splits, extras = _digits() if digits else _source(str(source))
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent) as folder:
        new, sizes, report = Path(folder) / "new", {}, []
        new.mkdir()
        for name, rows in splits.items():
            total, skipped = sum(1 for _ in rows()), []
            samples = _usable(rows(), total, size, skipped, source, on_progress)
            counts = _write(samples, new, name, per_shard)
            if not counts:
                raise InputError("holds no sample", file=source)
            last = f"-{{000000..{len(counts) - 1:06d}}}" if len(counts) > 1 else "-000000"
            mark = combine(sha256(new / shard) for shard in counts)
            report.append(Split(name, sum(counts.values()), len(skipped), str(to / f"{name}{last}.tar"), mark))
            sizes |= counts
        for name, content in (extras | {"sizes.json": json.dumps(sizes).encode()}).items():
            (new / name).write_bytes(content)
        sync(*new.iterdir(), new)
        try:
            new.rename(to)
            sync(to.parent)
        except OSError as error:
            if not _same(new, to):
                raise InputError("exists already and holds something else; choose another folder", file=to) from error
    return report


def _usable(
    rows: Iterator[Row], total: int, size: int | None, skipped: list[str], source: str | Path, report: Progress | None
) -> Iterator[dict[str, Any]]:
    """Samples as TarWriter takes them, in order; unusable rows go to `skipped` until they are too many (InputError)."""
    with ThreadPoolExecutor() as pool:
        done = 0
        while some := list(itertools.islice(rows, 256)):
            for row, found in zip(some, pool.map(lambda row: _shrunk(row, size), some), strict=True):
                if isinstance(found, Exception):
                    skipped.append(f"{row.where}: {found}")
                    if len(skipped) * 1000 > total:
                        message = (
                            f"more than 0.1 % of {total} rows are unusable (at most {total // 1000} may be); the first"
                        )
                        raise InputError(f"{message} is {skipped[0]}", file=source)
                    continue
                yield {"__key__": row.key, found[0]: found[1], "json": json.dumps(row.meta).encode()}
            done += len(some)
            if report:
                report(done, total)


def _shrunk(row: Row, size: int | None) -> tuple[str, bytes] | Exception:
    """Suffix and bytes of the row's picture: unchanged if it is small enough, else a smaller JPEG."""
    try:
        data = row.read()
        picture = decode(data)
        if row.meta.get("captions") == []:
            raise ValueError(f"no caption in {len(TABLE)} columns")
    except (OSError, ValueError) as error:
        return error
    if size is None or min(picture.shape[1:]) <= size:
        return {b"\xff\xd8": "jpg", b"\x89P": "png"}.get(data[:2], "webp"), data
    small = functional.resize(picture, [size], InterpolationMode.BICUBIC, antialias=True)
    return "jpg", encode_jpeg(small.contiguous(), quality=95).numpy().tobytes()


def _write(samples: Iterator[dict[str, Any]], folder: Path, split: str, per_shard: int) -> dict[str, int]:
    """Write shards of at most `per_shard` samples; returns the count of each."""
    counts: dict[str, int] = {}
    for first in samples:
        name, keys = f"{split}-{len(counts):06d}.tar", set()
        with (
            (folder / name).open("wb") as file,
            TarWriter(file, encoder=False, mtime=0, format=tarfile.PAX_FORMAT) as tar,
        ):
            for sample in itertools.chain([first], itertools.islice(samples, per_shard - 1)):
                if sample["__key__"] in keys:
                    raise InputError(f"key {sample['__key__']!r} is used twice in split {split!r}")
                keys.add(sample["__key__"])
                tar.write(sample)
        counts[name] = len(keys)
    return counts


def _same(new: Path, to: Path) -> bool:
    names = sorted(path.name for path in new.iterdir())
    same = to.is_dir() and names == sorted(path.name for path in to.iterdir())
    return same and filecmp.cmpfiles(new, to, names, shallow=False)[0] == names


Sources = tuple[dict[str, Callable[[], Iterator[Row]]], dict[str, bytes]]  # rows of each split; files to add


def _source(source: str) -> Sources:
    path = Path(source)
    if path.suffix in (".csv", ".tsv"):
        return {"train": partial(_table_rows, path)}, {}
    shards = sorted(path.rglob("*.tar")) if path.is_dir() else [Path(name) for name in expand(source)]
    if not shards:
        raise InputError("holds no .tar file", file=path)
    splits = defaultdict(list)
    for shard in shards:
        splits[re.sub(r"[-_]?\d+$", "", shard.stem) or "train"].append(shard)
    lists = [path / name for name in ("classnames.json", "templates.json")]
    rows = {name: partial(_shard_rows, split) for name, split in splits.items()}
    return rows, {file.name: file.read_bytes() for file in lists if file.is_file()}


def _shard_rows(shards: list[Path]) -> Iterator[Row]:
    def read(shard: Path, offset: int, size: int) -> bytes:
        with shard.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    problems = Problems()
    for shard in shards:
        for record in read_shard(shard, problems):
            meta = record.meta | {"label": record.label, "classname": record.classname}
            if record.captions:
                meta["captions"] = record.captions
            yield Row(record.key, partial(read, shard, record.offset, record.size), meta, f"{shard}: {record.key}")
    problems.stop()


def _table_rows(path: Path) -> Iterator[Row]:
    """Rows of a DreamLIP table. No csv reader: a field may start with a quote that is never closed."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for number, line in enumerate(file):
                fields = line.rstrip("\r\n").split("\t")
                if number and line.strip():
                    captions = captions_of(*fields[1:]) if len(fields) == len(TABLE) else []
                    where, read = f"line {number + 1} ({fields[0]})", (path.parent / fields[0]).read_bytes
                    yield Row(f"{number:09d}", read, {"captions": captions}, where)
                elif not number and len(fields) != len(TABLE):
                    raise InputError(f"must have {len(TABLE)} columns parted by tabs ({' '.join(TABLE)})", file=path)
    except OSError as error:
        raise InputError(error.strerror, file=path) from error


def captions_of(raw: str, *others: str) -> list[str]:
    """The raw caption, then the sentences of the others in order; empty ones are dropped, sixteen at most are kept."""
    sentences = itertools.chain([raw], *(_SENTENCE_END.split(text) for text in others))
    return [text.strip() for text in sentences if re.search(r"\w", text)][:MAX_CAPTIONS]


def _digits() -> Sources:
    try:
        from sklearn.datasets import load_digits  # only the quickstart needs it
    except ImportError as error:
        raise InputError("digits come with scikit-learn; install it: pip install scikit-learn") from error
    splits, seen, digits = defaultdict(list), Counter(), load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target.tolist(), strict=True)):
        seen[label] += 1  # every fifth of each class: every fifth of all would hold 21 ones and 52 threes
        grey = torch.from_numpy(image * 255 / 16).round().byte().repeat_interleave(4, 0).repeat_interleave(4, 1)
        captions = [template.format(DIGITS[label]) for template in DIGIT_TEMPLATES]
        meta = {"captions": captions, "label": label, "classname": DIGITS[label]}
        read = partial(bytes, encode_png(grey[None]).numpy())
        splits["train" if seen[label] % 5 else "val"].append(Row(f"digit-{number:04d}", read, meta, f"digit {number}"))
    lists = {"classnames.json": DIGITS, "templates.json": DIGIT_TEMPLATES}
    rows = {name: partial(iter, split) for name, split in splits.items()}
    return rows, {name: json.dumps(content).encode() for name, content in lists.items()}
