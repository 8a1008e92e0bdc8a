"""Make shards of other shards, a caption table or handwritten digits: shrunk and tokenised once for
all.
"""

from __future__ import annotations

import filecmp
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from modelchain_data.digits import Row
from modelchain_data.index import PACKED, Progress, build, fingerprint
from modelchain_data.sources import rows_of, tars_of
from modelchain_data.table import read_table
from modelchain_data.temporary import temporary_folder

PER_SHARD = 10_000  # samples
Note = Callable[[int], None]  # called with the rows of the split that are done
Rows = Callable[[], Iterator[Row]]  # from the first one on, each time


class Split(NamedTuple):
    """What was made of one split: its shards in brace notation, and the fingerprint a spec may ask
    for.
    """

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
    """Write `to`/<split>-000000.tar ..., sizes.json (samples of each shard) and the splits' indexes
    in index/.

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
    if captions is not None and not _is_table(source):
        raise InputError(
            "only a caption table (.csv, .tsv) has columns to choose from",
            file=source,
            field="--captions",
        )
    if str(source) != "digits" and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError("exists already; remove it or choose another folder", file=to)
    splits, lists = _source(source, captions)
    to.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(to.parent, to.name) as folder:
        new, sizes, report = folder / "new", {}, []
        (new / PACKED).mkdir(parents=True)
        for name, rows in splits.items():
            captioned = any(row.meta.get("captions") for row in rows())
            picture = partial(_picture, size, captioned)
            shards, skipped = _write(
                rows(), f"{new / name}-", picture, per_shard, source, on_progress
            )
            mark = fingerprint(shards, folder)
            counts = build(shards, new / PACKED / mark, on_index)
            numbers = f"{{000000..{len(shards) - 1:06d}}}" if len(shards) > 1 else "000000"
            report.append(
                Split(
                    name, sum(counts), skipped, str(to / f"{name}-{numbers}.tar"), mark, captioned
                )
            )
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
            earlier = [
                name for name in names if not name.startswith(f"{PACKED}/")
            ]  # by a version without an index
            if (
                there not in (names, earlier)
                or filecmp.cmpfiles(new, to, there, shallow=False)[0] != there
            ):
                raise InputError(
                    "exists and holds something else; choose another folder", file=to
                ) from error
    return report


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


def _write(
    rows: Iterator[Row],
    prefix: str,
    picture: Callable[[Row], tuple[str, bytes] | Exception],
    per_shard: int,
    source: str | Path,
    on_progress: Note,
) -> tuple[list[Path], int]:
    """Write the usable rows as shards; returns these and how many rows are not usable (InputError
    over 0.1 %).
    """
    done, bad, written = 0, [], []
    options = {
        "maxsize": float("inf"),
        "encoder": False,
        "mtime": 0,
        "format": "PAX_FORMAT",
        "verbose": 0,
    }
    options["post"] = lambda name: written.append(Path(name))
    with (
        ShardWriter(prefix.replace("%", "%%") + "%06d.tar", per_shard, **options) as shards,
        ThreadPoolExecutor() as pool,
    ):
        while some := list(itertools.islice(rows, 256)):
            for row, found in zip(some, pool.map(picture, some), strict=True):
                if isinstance(found, Exception):
                    bad.append(f"{row.where}: {found}")
                else:
                    shards.write(
                        {
                            "__key__": row.key,
                            found[0]: found[1],
                            "json": json.dumps(row.meta).encode(),
                        }
                    )
            done += len(some)
            on_progress(done)
    if not done:
        raise InputError("holds no sample", file=source)
    if len(bad) * 1000 > done:
        message = (
            f"{len(bad)} of {done} rows are unusable, at most {done // 1000} may be; the first is"
            f" {bad[0]}"
        )
        raise InputError(message, file=source)
    return written, len(bad)


def _picture(size: int | None, captioned: bool, row: Row) -> tuple[str, bytes] | Exception:
    """Suffix and bytes of the row's picture: unchanged if small enough, else a smaller JPEG; or why
    it is unusable.
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
