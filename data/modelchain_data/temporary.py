"""Hidden folders for what is being made: gone at the end, and those of processes that were killed
at the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# locked by the process that works in the folder; the kernel unlocks it when that dies
MARK = ".modelchain-in-use"


@contextlib.contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, removed with all in it at the end of the block, also by Ctrl-C.

    Folders of this kind whose process has ended are removed first; where the file system knows no
    locks, they stay.
    """
    _remove_dead(parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{prefix}-", dir=parent.resolve()))
    try:
        with _in_use(folder):
            yield folder
    finally:
        _remove(folder)


@contextlib.contextmanager
def _in_use(folder: Path) -> Iterator[None]:
    """The mark is locked before it gets its name, so that nobody finds it unlocked while this
    process lives.
    """
    draft = folder / f"{MARK}.new"
    with draft.open("wb") as file:
        with contextlib.suppress(OSError):  # ENOLCK, ENOTSUP: some network file systems
            fcntl.flock(file, fcntl.LOCK_EX)
            draft.rename(folder / MARK)
        yield


def _remove_dead(parent: Path) -> None:
    for mark in parent.glob(f".*/{MARK}"):
        with (
            contextlib.suppress(OSError),
            mark.open("rb") as file,
        ):  # BlockingIOError: somebody works there
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(mark.parent, ignore_errors=True)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except (
        KeyboardInterrupt
    ):  # a terminal that closes, or a service that stops, sends more than one signal
        _remove(folder)
        raise
