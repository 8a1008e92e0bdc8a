"""Hidden folders for unfinished work. They are removed at the end of the work, and after a kill at
the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# The process that works in the folder locks this file, and the kernel unlocks it when that ends.
MARK = ".modelchain-in-use"


@contextlib.contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, which is removed with its content at the end of the block, also
    after Ctrl-C.

    Folders that killed processes have left are removed first. On a file system without locks they
    stay, since nothing tells whether their process lives.
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
    """Hold the folder's mark. It is locked before it gets its name, so that no process finds it
    unlocked while this one lives.
    """
    draft = folder / f"{MARK}.new"
    with draft.open("wb") as file:
        with contextlib.suppress(OSError):  # ENOLCK, ENOTSUP: some network file systems
            fcntl.flock(file, fcntl.LOCK_EX)
            draft.rename(folder / MARK)
        yield


def _remove_dead(parent: Path) -> None:
    for mark in parent.glob(f".*/{MARK}"):
        # BlockingIOError: a process works in this folder
        with contextlib.suppress(OSError), mark.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(mark.parent, ignore_errors=True)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except KeyboardInterrupt:  # a closing terminal or a stopping service sends several signals
        _remove(folder)
        raise
