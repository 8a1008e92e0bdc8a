"""The root's lock: an flock that trainers inherit, so a root is free only when nobody works in it
any more.
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
SURVIVOR_SECONDS = 45.0  # torchrun gives its workers 30 s to checkpoint


class RootLock:
    """Held from `acquire` until the process and every trainer it started have ended."""

    def __init__(self, root: Path, handle: int):
        self.path, self.handle = root / LOCK, handle

    @classmethod
    def acquire(cls, root: Path, say: Callable[[str], None]) -> RootLock:
        """Take the lock of `root`.

        Trainers that outlived their runner hold it too: they are named and waited for, then ended.

        Raises:
            WorkError: another `modelchain run` works in this root.
        """
        handle = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline, said = time.monotonic() + SURVIVOR_SECONDS, False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pass
            pids = holders(root)
            note = _note(root)
            if note.get("pid") in pids:
                os.close(handle)
                raise WorkError(
                    f"{root} is in use by `modelchain run` (pid {note['pid']}, since"
                    f" {note['since']})"
                )
            names = ", ".join(map(str, pids)) or "unknown"
            if not said:
                say(f"{root}: waiting for processes of an earlier run to end (pid {names})")
                said = True
            if time.monotonic() > deadline:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
                if time.monotonic() > deadline + 15:
                    os.close(handle)
                    raise WorkError(
                        f"{root} is still held by pid {names} of an earlier run, which could not be"
                        " ended"
                    )
            time.sleep(0.2)
        os.ftruncate(handle, 0)
        note_bytes = json.dumps(
            {"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        ).encode()
        os.pwrite(handle, note_bytes, 0)
        return cls(root, handle)

    def release(self) -> None:
        os.close(self.handle)

    @contextlib.contextmanager
    def as_stdin(self) -> Iterator[None]:
        """Processes started inside inherit the lock, as their standard input: torchx closes every
        other handle.
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


def holders(root: Path) -> list[int]:
    """Other processes with the lock file open, found in /proc."""
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
    try:
        note = json.loads((root / LOCK).read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}
