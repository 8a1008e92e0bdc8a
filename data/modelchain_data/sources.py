"""The tars that `pack` reads, by split, and their samples under unique keys."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from modelchain.errors import InputError
from modelchain.identity.shards import expand
from modelchain_data.digits import SourceRow
from modelchain_data.samples import Problems, read_shard
from modelchain_data.tars import is_hidden, read_at

# The end of train-000000, train_7, train-00000-of-00002.
_NUMBER = re.compile(r"[-_.]?\d+([-_.]?of[-_.]?\d+)?$", re.IGNORECASE)
_COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.\w+)$", re.IGNORECASE)


def tars_of(source: Path) -> dict[str, list[Path]]:
    """The tars of each split, in order: those in and below a folder, or those that a pattern names.

    Raises:
        InputError: there is none, or one in the folder is compressed.
    """
    splits = defaultdict(list)
    if source.is_dir():
        shards = sorted(_in_folder(source, set()))
    else:
        shards = [Path(name) for name in expand(str(source))]
    for shard in shards:
        splits[_NUMBER.sub("", shard.stem) or "train"].append(shard)
    if not splits:
        raise InputError("holds no .tar file", file=source)
    return dict(splits)


def _in_folder(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """The tars in and below a folder, without hidden ones. Links to folders are followed, and each
    folder is read once.
    """
    state = folder.stat()
    if (state.st_dev, state.st_ino) in seen:
        return
    seen.add((state.st_dev, state.st_ino))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if is_hidden(entry.name) or is_hidden(f"{entry.name}/"):
            continue
        if entry.is_symlink() and not path.exists():
            raise InputError("is a link that leads nowhere; mend or remove it", file=path)
        if entry.is_dir():
            yield from _in_folder(path, seen)
        elif _COMPRESSED.search(entry.name):
            raise InputError(
                "is compressed; unpack it to a .tar first, or move it elsewhere", file=path
            )
        elif path.suffix.lower() == ".tar":
            yield path


def rows_of(shards: list[Path]) -> Iterator[SourceRow]:
    """The samples of one split. If a key was used before, the number of the tar (from 0) is
    appended.

    Raises:
        InputError: up to five things that are wrong with the tars, with file and member.
    """
    problems, used = Problems(), set()
    for number, shard in enumerate(shards):
        for sample in read_shard(shard, problems):
            key, meta = sample.key, sample.meta
            meta.setdefault("label", None)
            while key in used:
                key = f"{key}-{number}"
            used.add(key)
            if sample.captions:
                meta["captions"] = sample.captions
            else:
                meta.pop("captions", None)
            read = partial(read_at, shard, sample.offset, sample.size)
            yield SourceRow(key, f"{shard}: {sample.key}", read, meta)
    problems.stop()
