"""The root's lock: an flock that trainers inherit.

So a root is free only once no process works in it any more, not even a trainer whose runner died.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from modelchain.errors import WorkError

LOCK = ".lock"
# How long trainers of an earlier run may take to end, before they are killed. torchrun gives its
# workers 30 s for a checkpoint.
SURVIVOR_SECONDS = 45.0
# How long killed processes may take to end.
KILL_SECONDS = 15.0


class RootLock:
    """The lock of a root, from `acquire` until this process and all its trainers have ended."""

    def __init__(self, root: Path, handle: int):
        self.path, self.handle = root / LOCK, handle

    @classmethod
    def acquire(cls, root: Path, say: Callable[[str], None]) -> RootLock:
        """Take the lock of `root`.

        Trainers that have outlived their runner still have the lock. `say` is told their pids. They
        are killed if they do not end in time.

        Raises:
            WorkError: another `modelchain run` works in this root, or trainers of an earlier run
                could not be ended.
        """
        handle = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _wait_for(handle, root, say)
        except BaseException:
            os.close(handle)
            raise
        os.ftruncate(handle, 0)
        note = {"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(handle, json.dumps(note).encode(), 0)
        return cls(root, handle)

    def release(self) -> None:
        os.close(self.handle)

    @contextlib.contextmanager
    def as_stdin(self) -> Iterator[None]:
        """Make the lock's handle the standard input of processes that are started in this block.

        So they inherit the lock: torchx closes all other handles.
        """
        try:
            saved = os.dup(0)
        except OSError:
            saved = None
        os.dup2(self.handle, 0)
        try:
            yield
        finally:
            if saved is None:
                os.close(0)
            else:
                os.dup2(saved, 0)
                os.close(saved)


def _wait_for(handle: int, root: Path, say: Callable[[str], None]) -> None:
    """Lock the file, once the trainers of an earlier run have ended or were killed."""
    deadline, reported = time.monotonic() + SURVIVOR_SECONDS, False
    while not _locked(handle):
        pids = holders(root)
        _check_other_run(root, pids)
        names = ", ".join(map(str, pids)) or "unknown"
        if not reported:
            say(f"{root}: waiting for processes of an earlier run to end (pid {names})")
            reported = True
        if time.monotonic() > deadline:
            _kill(pids)
        if time.monotonic() > deadline + KILL_SECONDS:
            raise WorkError(
                f"{root} is still in use by pid {names} of an earlier run, which could not be ended"
            )
        time.sleep(0.2)


def _locked(handle: int) -> bool:
    """Try to lock the file. False if another process has the lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_other_run(root: Path, pids: list[int]) -> None:
    """Raise WorkError if the runner that wrote its pid into the lock file still has the lock."""
    note = _note(root)
    if note.get("pid") in pids:
        raise WorkError(
            f"{root} is in use by `modelchain run` (pid {note['pid']}, since {note['since']})"
        )


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def holders(root: Path) -> list[int]:
    """The pids of other processes that have the lock file open, from /proc."""
    try:
        lock = (root / LOCK).stat()
    except FileNotFoundError:
        return []
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for handle in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    seen = handle.stat()
                    if (seen.st_dev, seen.st_ino) == (lock.st_dev, lock.st_ino):
                        found.append(int(process.name))
                        break
    return sorted(found)


def _note(root: Path) -> dict[str, object]:
    """What the last runner wrote into the lock file: its pid, and since when it runs."""
    try:
        note = json.loads((root / LOCK).read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
