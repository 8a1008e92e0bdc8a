"""Make shards of other shards, a caption table or handwritten digits: shrunk and tokenised once for all."""

from __future__ import annotations

import filecmp
import itertools
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torchvision.io import encode_jpeg
from torchvision.transforms.v2 import InterpolationMode, functional
from webdataset import ShardWriter

from modelchain.cli.files import fsync
from modelchain.errors import InputError
from modelchain.shards import expand
from modelchain_data import digits
from modelchain_data.batches import decode
from modelchain_data.digits import Row
from modelchain_data.index import PACKED, Problems, Progress, build, fingerprint, read_at, read_shard

MAX_CAPTIONS = 16  # the raw one and 15 sentences, as in the paper
COLUMNS = 8  # of a DreamLIP table: filepath raw shortIB longIB shortSV longSV shortLLA longLLA
# White space after a full stop (not that of a title or an initial) and before a capital or a digit.
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b[MD]r\.)(?<!\bMrs\.)(?<!\bSt\.)\s+(?=[\"'(]?[A-Z0-9])")
Note = Callable[[int], None]  # called with the rows of the split that are done


class Split(NamedTuple):
    """What was made of one split: its shards in brace notation, and the fingerprint a spec may ask for."""

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
    on_progress: Note = lambda _: None,
    on_index: Progress = lambda *_: None,
) -> list[Split]:
    """Write `to`/<split>-000000.tar ..., sizes.json (samples of each shard) and the splits' indexes in index/.

    The same source gives the same bytes.

    Args:
        source: a folder of tars, tars in brace notation, a DreamLIP caption table (.csv, .tsv), or the word digits.
        size: a picture whose short side is longer is shrunk to it; None keeps every picture as it is.
    Raises:
        InputError: a bad source, over 0.1 % unusable rows in a split, or a folder `to` that holds something else.
    """
    if str(source) != "digits" and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError("exists already; remove it or choose another folder", file=to)
    splits, lists = digits.splits() if str(source) == "digits" else (_source(Path(source)), {})
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent.resolve()) as folder:
        new, sizes, report = Path(folder, "new"), {}, []
        (new / PACKED).mkdir(parents=True)
        for name, rows in splits.items():
            skipped = _write(rows, new, name, size, per_shard, source, on_progress)
            shards = sorted(new.glob(f"{name}-*.tar"))
            mark = fingerprint(shards, Path(folder))
            counts = build(shards, new / PACKED / mark, on_index)
            numbers = f"{{000000..{len(shards) - 1:06d}}}" if len(shards) > 1 else "000000"
            report.append(Split(name, sum(counts), skipped, str(to / f"{name}-{numbers}.tar"), mark))
            sizes |= {shard.name: count for shard, count in zip(shards, counts, strict=True)}
        for name, content in (lists | {"sizes.json": sizes}).items():
            (new / name).write_text(json.dumps(content))
        names = _files(new)
        for name in names:
            fsync(new / name)
        try:
            new.rename(to)
            fsync(to.parent)
        except OSError as error:
            there = _files(to)
            earlier = [name for name in names if not name.startswith(f"{PACKED}/")]  # by a version without an index
            if there not in (names, earlier) or filecmp.cmpfiles(new, to, there, shallow=False)[0] != there:
                raise InputError("exists and holds something else; choose another folder", file=to) from error
    return report


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir())


def _write(
    rows: Iterable[Row],
    folder: Path,
    split: str,
    size: int | None,
    per_shard: int,
    source: str | Path,
    on_progress: Note,
) -> int:
    """Write the usable rows as shards, in order; returns how many are not usable, over 0.1 % is an InputError."""
    rows, done, bad = iter(rows), 0, []
    pattern = str(folder / split).replace("%", "%%") + "-%06d.tar"
    options = {"maxsize": float("inf"), "encoder": False, "mtime": 0, "format": "PAX_FORMAT", "verbose": 0}
    with ShardWriter(pattern, per_shard, **options) as shards, ThreadPoolExecutor() as pool:
        while some := list(itertools.islice(rows, 256)):
            for (key, where, _, meta), found in zip(some, pool.map(partial(_picture, size), some), strict=True):
                if isinstance(found, Exception):
                    bad.append(f"{where}: {found}")
                else:
                    shards.write({"__key__": key, found[0]: found[1], "json": json.dumps(meta).encode()})
            done += len(some)
            on_progress(done)
    if not done:
        raise InputError("holds no sample", file=source)
    if len(bad) * 1000 > done:
        message = f"{len(bad)} of {done} rows are unusable, at most {done // 1000} may be; the first is {bad[0]}"
        raise InputError(message, file=source)
    return len(bad)


def _picture(size: int | None, row: Row) -> tuple[str, bytes] | Exception:
    """Suffix and bytes of the row's picture: unchanged if small enough, else a smaller JPEG; or why it is unusable."""
    try:
        if row[3].get("captions") == []:
            raise ValueError(f"no caption in {COLUMNS} columns parted by tabs")
        data = row[2]()
        picture = decode(data)
    except (OSError, ValueError) as error:
        return error
    if size is None or min(picture.shape[1:]) <= size:
        return suffix_of(data), data
    small = functional.resize(picture, [size], InterpolationMode.BICUBIC, antialias=True).contiguous()
    return "jpg", encode_jpeg(small, quality=95).numpy().tobytes()


def suffix_of(picture: bytes) -> str:
    """The suffix in a shard of an encoded picture that can be decoded."""
    return {b"\xff\xd8": "jpg", b"\x89P": "png"}.get(picture[:2], "webp")


def _source(path: Path) -> dict[str, Iterator[Row]]:
    """The rows of each split."""
    if path.suffix in (".csv", ".tsv"):
        return {"train": _table(path)}
    splits = defaultdict(list)
    for shard in sorted(path.rglob("*.tar")) if path.is_dir() else [Path(name) for name in expand(str(path))]:
        splits[re.sub(r"[-_]?\d+$", "", shard.stem) or "train"].append(shard)
    if not splits:
        raise InputError("holds no .tar file", file=path)
    return {name: _shards(shards) for name, shards in splits.items()}


def _shards(shards: list[Path]) -> Iterator[Row]:
    problems = Problems()
    for shard in shards:
        for key, offset, size, captions, label, meta in read_shard(shard, problems):
            meta |= {"label": None if label < 0 else label} | ({"captions": captions} if captions else {})
            yield key, f"{shard}: {key}", partial(read_at, shard, offset, size), meta
    problems.stop()


def _table(path: Path) -> Iterator[Row]:
    """Rows of a DreamLIP table. Not by `csv`: a field may start with a quote that is never closed."""
    if not path.is_file():
        raise InputError("no such file", file=path)
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        if (found := next(file, "").count("\t") + 1) != COLUMNS:
            raise InputError(f"must have {COLUMNS} columns parted by tabs, not {found}", file=path)
        for number, line in enumerate(file, 2):
            name, *texts = line.rstrip("\r\n").split("\t")
            captions = captions_of(*texts) if len(texts) == COLUMNS - 1 else []
            yield f"{number:09d}", f"line {number} ({name})", (path.parent / name).read_bytes, {"captions": captions}


def captions_of(raw: str, *others: str) -> list[str]:
    """The raw caption, then the sentences of the others in order; empty ones are dropped, sixteen at most are kept."""
    sentences = itertools.chain([raw], *(_SENTENCE_END.split(text) for text in others))
    return [text.strip() for text in sentences if re.search(r"\w", text)][:MAX_CAPTIONS]
