"""Make shards of other shards, a caption table or handwritten digits, with pictures shrunk and
captions tokenised once.
"""

from __future__ import annotations

import filecmp
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torchvision.io import encode_jpeg
from torchvision.transforms.v2 import InterpolationMode, functional
from webdataset import ShardWriter

from modelchain.errors import InputError
from modelchain.io.files import fsync
from modelchain_data import digits
from modelchain_data.batches import decode
from modelchain_data.build import (
    DIGESTS,
    PACKED,
    Progress,
    Shards,
    build_set,
    find_set,
    fingerprint_of,
)
from modelchain_data.digits import SourceRow
from modelchain_data.sources import rows_of, tars_of
from modelchain_data.table import read_table
from modelchain_data.temporary import temporary_folder

PER_SHARD = 10_000  # samples
AT_ONCE = 256  # rows whose pictures are decoded in parallel
Note = Callable[[int], None]  # called with the number of finished rows of the split
Rows = Callable[[], Iterator[SourceRow]]  # each call starts at the first row


class Split(NamedTuple):
    """What was made of one split: its shards in brace notation, and the fingerprint for a spec."""

    name: str
    samples: int
    skipped: int
    shards: str
    fingerprint: str
    captioned: bool  # False: no sample has a caption, all have labels


def pack(
    source: str | Path,
    to: Path,
    *,
    size: int | None = 256,
    per_shard: int = PER_SHARD,
    captions: Sequence[str] | None = None,
    on_progress: Note = lambda _: None,
    on_index: Progress = lambda *_: None,
) -> list[Split]:
    """Write `to`/<split>-000000.tar and so on, sizes.json (the samples of each shard), and the
    splits' indexes in index/.

    The same source gives the same bytes.

    Args:
        source: a folder of tars, tars in brace notation, a DreamLIP caption table (.csv, .tsv), or
            the word digits.
        size: a picture whose short side is longer is shrunk to it; None keeps every picture as it
            is.
        captions: the columns of a caption table to take captions from; None: all.
    Raises:
        InputError: a bad source, over 0.1 % unusable rows in a split, or a folder `to` that holds
            something else.
    """
    _check(source, to, captions)
    splits, lists = _source(source, captions)
    to.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(to.parent, to.name) as folder:
        packer = _Packer(source, folder / "new", size, per_shard, on_progress, on_index)
        made = [packer.split(name, rows, to) for name, rows in splits.items()]
        sizes = {shard: count for _, counts in made for shard, count in counts.items()}
        for name, content in (lists | {"sizes.json": sizes}).items():
            (packer.folder / name).write_text(json.dumps(content))
        _move(packer.folder, to)
    return [split for split, _ in made]


def _check(source: str | Path, to: Path, captions: Sequence[str] | None) -> None:
    if captions is not None and not _is_table(source):
        raise InputError(
            "only a caption table (.csv, .tsv) has columns to choose from",
            file=source,
            field="--captions",
        )
    if str(source) != "digits" and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError("exists already; remove it or choose another folder", file=to)


def _move(new: Path, to: Path) -> None:
    """Make `new` be `to` at once, or leave `to` alone if it holds the same."""
    names = _files(new)
    for name in names:
        fsync(new / name)
    try:
        new.rename(to)
        fsync(to.parent)
    except OSError as error:
        # An earlier version packed the same shards without an index, or with another.
        data, there = (
            [name for name in found if not name.startswith(f"{PACKED}/")]
            for found in (names, _files(to))
        )
        if there != data or filecmp.cmpfiles(new, to, data, shallow=False)[0] != data:
            raise InputError(
                "exists and holds something else; choose another folder", file=to
            ) from error


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir())


def _is_table(source: str | Path) -> bool:
    return Path(source).suffix.lower() in (".csv", ".tsv")


def _source(
    source: str | Path, captions: Sequence[str] | None
) -> tuple[dict[str, Rows], dict[str, list[str]]]:
    """The rows of each split, and lists to write beside the shards by file name."""
    if str(source) == "digits":
        splits, lists = digits.splits()
        return {name: partial(iter, rows) for name, rows in splits.items()}, lists
    if _is_table(source):
        return {"train": partial(read_table, Path(source), captions)}, {}
    return {name: partial(rows_of, tars) for name, tars in tars_of(Path(source)).items()}, {}


@dataclass(frozen=True)
class _Packer:
    """Writes splits of `source` as shards with their index, in `folder`."""

    source: str | Path
    folder: Path
    size: int | None
    per_shard: int
    on_progress: Note
    on_index: Progress

    def split(self, name: str, rows: Rows, to: Path) -> tuple[Split, dict[str, int]]:
        """Write one split. Returns what was made, where it will lie in `to`, and the samples of
        each shard.
        """
        (self.folder / PACKED).mkdir(parents=True, exist_ok=True)
        captioned = any(row.meta.get("captions") for row in rows())
        shards, skipped = self._write(name, rows(), captioned)
        made = Shards.of(shards, self.folder / PACKED)
        mark = fingerprint_of(build_set(made, self.folder.parent / DIGESTS, self.on_index))
        counts = find_set(made, mark, check=False)[1]
        last = len(shards) - 1
        numbers = f"{{000000..{last:06d}}}" if last else "000000"
        pattern = str(to / f"{name}-{numbers}.tar")
        split = Split(name, sum(counts), skipped, pattern, mark, captioned)
        return split, dict(zip((shard.name for shard in shards), counts, strict=True))

    def _write(
        self, name: str, rows: Iterator[SourceRow], captioned: bool
    ) -> tuple[list[Path], int]:
        """Write the usable rows; returns the shards, and how many rows are not usable."""
        done = 0
        written = list[Path]()
        unusable = list[str]()
        picture = partial(_picture, self.size, captioned)
        with self._writer(name, written) as shards, ThreadPoolExecutor() as pool:
            while some := list(itertools.islice(rows, AT_ONCE)):
                for row, found in zip(some, pool.map(picture, some), strict=True):
                    if isinstance(found, Exception):
                        unusable.append(f"{row.where}: {found}")
                    else:
                        shards.write(_sample(row, *found))
                done += len(some)
                self.on_progress(done)
        self._check(done, unusable)
        return written, len(unusable)

    def _writer(self, name: str, written: list[Path]) -> ShardWriter:
        """Adds each shard that it has finished to `written`."""
        return ShardWriter(
            f"{self.folder / name}-".replace("%", "%%") + "%06d.tar",
            self.per_shard,
            maxsize=float("inf"),
            post=lambda shard: written.append(Path(shard)),
            encoder=False,
            mtime=0,
            format="PAX_FORMAT",
            verbose=0,
        )

    def _check(self, done: int, unusable: list[str]) -> None:
        """Raise InputError if there are no rows, or over 0.1 % of them are unusable."""
        if not done:
            raise InputError("holds no sample", file=self.source)
        if len(unusable) * 1000 > done:
            raise InputError(
                f"{len(unusable)} of {done} rows are unusable, at most {done // 1000} may be; the"
                f" first is {unusable[0]}",
                file=self.source,
            )


def _sample(row: SourceRow, suffix: str, picture: bytes) -> dict[str, str | bytes]:
    """A row as webdataset's writer takes it."""
    return {"__key__": row.key, suffix: picture, "json": json.dumps(row.meta).encode()}


def _picture(size: int | None, captioned: bool, row: SourceRow) -> tuple[str, bytes] | Exception:
    """Suffix and bytes of a row's picture, unchanged if small enough and else a smaller JPEG; or
    the exception that tells why the row is unusable.
    """
    try:
        data = row.read()
        if not row.meta.get("captions") and captioned:
            raise ValueError("has no caption")
        if not row.meta.get("captions") and row.meta.get("label") is None:
            raise ValueError("has neither a caption nor a label")
        picture = decode(data)
    except (OSError, ValueError) as error:
        return error
    if size is None or min(picture.shape[1:]) <= size:
        return suffix_of(data), data
    small = functional.resize(
        picture, [size], InterpolationMode.BICUBIC, antialias=True
    ).contiguous()
    return "jpg", encode_jpeg(small, quality=95).numpy().tobytes()


def suffix_of(picture: bytes) -> str:
    """The suffix in a shard of an encoded picture that can be decoded."""
    return {b"\xff\xd8": "jpg", b"\x89P": "png"}.get(picture[:2], "webp")
