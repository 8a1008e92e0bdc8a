"""`.ci/levels`, with a stub for pytest: an interrupt leaves no process and no folder behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Like pytest, it tears down on SIGINT alone, and exits with 2.
STUB = """#!/usr/bin/env python3
import os, sys, time
name = os.path.basename(sys.argv[1])
open(f"{os.environ['SEEN']}/{name}.pid", "w").write(str(os.getpid()))
print("output of", name, flush=True)
try:
    time.sleep(300 if name in ("trainer", "local") else 0)
except KeyboardInterrupt:
    open(f"{os.environ['SEEN']}/{name}.torn-down", "w")
    sys.exit(2)
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The scripts beside stubs, which write to the folder `seen`."""
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "seen").mkdir()
    (tmp_path / "tmp").mkdir()
    for name, text in {"pytest": STUB, "python": "#!/bin/sh\nexit 0\n"}.items():
        file = tmp_path / ".venv" / "bin" / name
        file.write_text(text)
        file.chmod(0o755)
    return tmp_path


def started(copy: Path) -> subprocess.Popen[str]:
    """With an interrupt that counts: a shell starts what it puts in the background, be it these
    tests themselves, with SIGINT ignored, and a child inherits that.
    """
    here = {"TMPDIR": str(copy / "tmp"), "SEEN": str(copy / "seen")}
    return subprocess.Popen(
        [copy / ".ci" / "levels"],
        env=os.environ | here,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_nothing_behind(copy: Path, sent: signal.Signals) -> None:
    levels = started(copy)
    busy = copy / "seen" / "trainer.pid"
    limit = time.monotonic() + 30
    while not (busy.exists() and busy.read_text()):
        assert time.monotonic() < limit and levels.poll() is None
        time.sleep(0.05)
    os.kill(levels.pid, sent)
    said, _ = levels.communicate(timeout=60)
    assert levels.returncode == 130, said
    assert (copy / "seen" / "trainer.torn-down").exists()
    assert not any(is_alive(int(file.read_text())) for file in (copy / "seen").glob("*.pid"))
    assert list((copy / "tmp").iterdir()) == []
    assert "output of trainer" in said


@pytest.mark.parametrize(("sweeps", "levels"), [("", 10), ("all", 11)])
def test_levels_that_end(
    copy: Path, monkeypatch: pytest.MonkeyPatch, sweeps: str, levels: int
) -> None:
    """A real Flux is a level of `make test-all` alone."""
    monkeypatch.setenv("MODELCHAIN_SWEEPS", sweeps)
    stub = copy / ".venv" / "bin" / "pytest"
    stub.write_text(stub.read_text().replace("300 if", "0 if"))
    ends = started(copy)
    said, _ = ends.communicate(timeout=60)
    assert ends.returncode == 0 and said.count("output of") == levels, said
    assert ("output of flux" in said) == (sweeps == "all")
    assert list((copy / "tmp").iterdir()) == []
