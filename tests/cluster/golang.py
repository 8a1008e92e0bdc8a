"""Programs in Go, built from the Go module proxy into a cache outside the tree."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DOWNLOADS = 3  # how often a command that downloads is tried


class Unavailable(Exception):
    """No programs are here and none can be built; the message says what to install."""


def is_installed() -> bool:
    return shutil.which("go") is not None


def cache_home() -> Path:
    """Where all that tests keep from one run to the next lies."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelchain"


def cache(kind: str, pinned: bytes) -> Path:
    """The folder of programs of this kind, for what pins their versions."""
    return cache_home() / kind / hashlib.sha256(pinned).hexdigest()[:20]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder is made, and other processes build nothing in it meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(module: Path, package: str, path: Path, link: str) -> None:
    """Build a package of a module's dependencies, or one with its version, whole or not at all.

    Args:
        module: the folder of go.mod.
        path: the program. Its name is the package's last part, or is chosen.
        link: the linker's flags, for a package without a version.
    """
    start = time.monotonic()
    print(f"building {path.name} ...", end=" ", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as folder:
        made = Path(folder, path.name)
        if "@" in package:
            go(module, "install", package, GOBIN=folder)
        else:
            go(module, "build", "-trimpath", "-ldflags", link, "-o", str(made), package)
        made.rename(path)
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def go(module: Path, *args: str, **environment: str) -> str:
    """Its output. Modules are downloaded on the way, so it is tried again, from what is there."""
    for attempt in range(1, DOWNLOADS + 1):
        command = subprocess.run(
            ["go", *args],
            cwd=module,
            env={**os.environ, "CGO_ENABLED": "0", **environment},
            text=True,
            capture_output=True,
        )
        if command.returncode == 0:
            break
        if attempt == DOWNLOADS:
            raise RuntimeError(f"go {' '.join(args)}: {command.stderr[-2000:]}")
        time.sleep(5 * attempt)
    return command.stdout
