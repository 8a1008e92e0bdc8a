"""Building indexes. What is there already is not made again, so an interrupted build goes on where
it stopped, and a set of shards from two other sets has nothing to tokenise.

An index folder holds `shards/<key>`, the indexes of shards; `<key>/`, the indexes of sets; and
`sha256.json`, the digests of shards. Each file and each folder gets its name when it is whole. So
processes that build at the same time do no harm, with or without locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from modelchain.api.contracts import FailureClass
from modelchain.errors import Problem, WorkError
from modelchain.identity.digest import digest_of
from modelchain.io.files import fsync, sha256_of, write_atomic
from modelchain.io.guard import die_with_parent
from modelchain_data.samples import Problems
from modelchain_data.shard_index import (
    NOT_WHOLE,
    ROW,
    VERSION,
    index_shard,
    is_whole,
    read_index,
    shard_key,
)
from modelchain_data.temporary import temporary_folder
from modelchain_data.tokens import tokeniser

Progress = Callable[[int, int], None]  # called with (done, all) shards that had to be read

PACKED = "index"  # the index folder that `pack` writes beside its shards
SHARDS = "shards"
DIGESTS = "sha256.json"
SET = "index.json"
ROWS = "samples"
SAVE_SECONDS = 10.0  # between two writes of the digests
PARALLEL = 1 << 30  # bytes of shards from which several processes read them
MAX_PROCESSES = 16
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # of a container, where it has control groups v2


class Shards(NamedTuple):
    """The shards of a set, in order, with the folder for their indexes."""

    paths: Sequence[Path]
    states: Sequence[str]  # path, size and mtime, by which their digests are remembered
    index: Path

    @classmethod
    def of(cls, paths: Sequence[Path], index: Path) -> Shards:
        """Raises InputError with up to five shards that are missing."""
        problems, states = Problems(), []
        for path in paths:
            try:
                state = path.stat()
                states.append(f"{path.resolve()} {state.st_size} {state.st_mtime_ns}")
            except OSError as error:
                problems.add(error.strerror, path)
        problems.stop()
        return cls(paths, states, index)


def fingerprint_of(digests: Sequence[str]) -> str:
    """SHA-256 (hex) over the shards' SHA-256 in order, without their names."""
    return digest_of({"v": 1, "shards": list(digests)})


def set_key(fingerprint: str) -> str:
    """Names the index of the set of shards with this fingerprint."""
    return digest_of({"v": VERSION, "tokeniser": tokeniser(), "set": fingerprint})


def build_set(shards: Shards, digests: Path, on_progress: Progress) -> list[str]:
    """Build what is missing of the indexes of a set and of its shards, in the shards' index folder.
    Returns the SHA-256 of the shards, which are remembered in the file `digests`.

    Raises InputError with the first five things that are wrong with the shards.
    """
    found = index_shards(shards, digests, on_progress)
    fingerprint = fingerprint_of(found)
    try:
        find_set(shards, fingerprint, check=True)
    except NOT_WHOLE:
        write_set(index_files(shards, found), shards.index / set_key(fingerprint))
    return found


def find_set(shards: Shards, fingerprint: str, check: bool) -> tuple[np.ndarray, list[int]]:
    """The rows of a set, mapped into memory, and how many each of its shards has; from beside the
    first shard, or from the shards' index folder.

    Raises one of NOT_WHOLE if it is in neither, or, with `check`, if it is damaged.
    """
    for folder in (shards.paths[0].parent / PACKED, shards.index):
        with contextlib.suppress(*NOT_WHOLE):
            return _read_set(folder / set_key(fingerprint), check)
    raise FileNotFoundError(set_key(fingerprint))


def index_files(shards: Shards, digests: Sequence[str]) -> list[Path]:
    """The file of each shard's index, which may not exist."""
    return [_index_of(p, d, shards.index) for p, d in zip(shards.paths, digests, strict=True)]


def _index_of(shard: Path, digest: str, index: Path) -> Path:
    """The file of a shard's index: in the folder `index`, or else beside the shard."""
    key = shard_key(digest)
    own, beside = index / SHARDS / key, shard.parent / PACKED / SHARDS / key
    return beside if not own.exists() and beside.exists() else own


def are_whole(files: Sequence[Path]) -> list[bool]:
    """Of each file, whether it is the whole index of a shard. All cores hash them."""
    with ThreadPoolExecutor(cores()) as pool:
        different = list(dict.fromkeys(files))
        whole = dict(zip(different, pool.map(is_whole, different), strict=True))
    return [whole[file] for file in files]


def known_digests(shards: Shards, file: Path) -> list[str | None]:
    """The SHA-256 of each shard, if it is remembered in `file`."""
    known = _remembered(file)
    return [known.get(state) for state in shards.states]


def _remembered(file: Path) -> dict[str, str]:
    """Digests by the state of their shards."""
    try:
        known = dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}
    return {s: d for s, d in known.items() if re.fullmatch("[0-9a-f]{64}", str(d))}


def index_shards(shards: Shards, digests: Path, on_progress: Progress) -> list[str]:
    """Index the shards that have no whole index, and hash those whose digest is not in the file
    `digests`. Returns the digests.

    Raises InputError with the first five things that are wrong with the shards.
    """
    found = known_digests(shards, digests)
    todo = _unfinished(shards, found)
    problems, saved = Problems(), time.monotonic()
    with temporary_folder(shards.index, "shards") as folder:
        works = [_Work(shards.paths[n], found[n], shards.index, folder) for n in todo]
        try:
            for done, (number, result) in enumerate(zip(todo, _results(works), strict=True), 1):
                found[number], wrong = result
                for problem in wrong:
                    problems.add(problem.message, problem.file or "", problem.field)
                on_progress(done, len(todo))
                if time.monotonic() - saved > SAVE_SECONDS:
                    _save(digests, shards.states, found)
                    saved = time.monotonic()
            problems.stop()
        finally:
            _save(digests, shards.states, found)
    return [str(digest) for digest in found]


def _unfinished(shards: Shards, digests: Sequence[str | None]) -> list[int]:
    """The numbers of the shards whose digest is not known, or whose index is not whole."""
    found = {
        n: _index_of(path, digest, shards.index)
        for n, (path, digest) in enumerate(zip(shards.paths, digests, strict=True))
        if digest is not None
    }
    whole = dict(zip(found, are_whole(list(found.values())), strict=True))
    return [n for n in range(len(digests)) if not whole.get(n)]


def _save(file: Path, states: Sequence[str], digests: Sequence[str | None]) -> None:
    found = {s: d for s, d in zip(states, digests, strict=True) if d is not None}
    if found.items() <= _remembered(file).items():
        return
    with alone(file.parent, file.name):
        write_atomic(file, json.dumps(_remembered(file) | found).encode())


class _Work(NamedTuple):
    """A shard to be hashed, if its digest is None, and then indexed, if that has not been done."""

    shard: Path
    digest: str | None
    index: Path
    folder: Path  # for unfinished files


def _do(work: _Work) -> tuple[str | None, list[Problem]]:
    """The shard's digest, and what is wrong with it. A shard in which something is wrong gets no
    index.
    """
    shard = work.shard
    try:
        # The index is made right after, while the system still has the shard in memory.
        digest = work.digest or sha256_of(shard)
    except OSError as error:
        return None, [Problem(str(error.strerror), str(shard))]
    if is_whole(_index_of(shard, digest, work.index)):
        return digest, []
    content, problems = index_shard(shard)
    if not problems:
        key = shard_key(digest)
        new = work.folder / f"{key}-{os.getpid()}"  # two shards may have the same bytes
        with new.open("wb") as file:
            file.writelines(content)
        fsync(new)
        (work.index / SHARDS).mkdir(exist_ok=True)
        new.replace(work.index / SHARDS / key)
        fsync(work.index / SHARDS)
    return digest, problems


def _results(works: Sequence[_Work]) -> Iterator[tuple[str | None, list[Problem]]]:
    """The results of `_do`, in order. Several processes work if there is much to read."""
    processes = min(len(works), cores(), MAX_PROCESSES)
    if processes < 2 or sum(work.shard.stat().st_size for work in works) < PARALLEL:
        yield from map(_do, works)
        return
    try:
        ours = (signal.SIGTERM, os.getpid())  # they end when this process is killed
        with ProcessPoolExecutor(processes, get_context("spawn"), die_with_parent, ours) as pool:
            yield from pool.map(_do, works)
    except BrokenProcessPool as error:
        raise WorkError(
            f"a process that indexes {works[0].shard.parent} was ended, perhaps for want of memory",
            FailureClass.OUT_OF_MEMORY,
        ) from error


def cores() -> int:
    """How many cores this process may use: its affinity, or a container's limit if that is
    lower.
    """
    allowed = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no such file; "max": no limit
        quota, period = CPU_LIMIT.read_text().split()
        return max(1, min(allowed, round(int(quota) / int(period))))
    return allowed


def write_set(files: Sequence[Path], place: Path) -> None:
    """Make the folder `place` the index of a set: the rows of its shards' indexes one after
    another, and how many each shard has. What is there is damaged, and is removed.
    """
    shutil.rmtree(place, ignore_errors=True)
    with temporary_folder(place.parent, "set") as folder:
        new, counts = folder / "new", []
        new.mkdir()
        with (new / ROWS).open("wb") as out:
            for number, file in enumerate(files):
                rows = read_index(file).rows.copy()
                rows["shard"] = number
                out.write(rows.tobytes())
                counts.append(len(rows))
        fsync(new / ROWS)
        about = {"counts": counts, "sha256": sha256_of(new / ROWS)}
        write_atomic(new / SET, json.dumps(about).encode())
        with contextlib.suppress(OSError):  # another process was first
            new.rename(place)
        fsync(place.parent)


def _read_set(place: Path, check: bool) -> tuple[np.ndarray, list[int]]:
    about = json.loads((place / SET).read_bytes())
    # Viewed as a plain array, since slicing a memmap is slow.
    rows = np.memmap(place / ROWS, ROW, "r").view(np.ndarray)
    if len(rows) != sum(about["counts"]) or (check and sha256_of(place / ROWS) != about["sha256"]):
        raise ValueError("damaged")
    return rows, about["counts"]


@contextlib.contextmanager
def alone(index: Path, name: str) -> Iterator[None]:
    """Lock the set or the file of this name against other builders. This only saves work: without
    the lock, renames still keep an index whole or absent.
    """
    index.mkdir(parents=True, exist_ok=True)
    lock = index / f".{name}.lock"
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(lock.open("ab"))
            with contextlib.suppress(OSError):  # ENOLCK, ENOTSUP: some network file systems
                fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):  # the one who had the lock removes it
                if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    break
        stack.callback(lock.unlink, missing_ok=True)
        yield
