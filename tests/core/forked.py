"""Programs as processes that are forked from one that has loaded their packages. A process that
loads them itself takes seven seconds of a core for a trainer's, and two for an operator's.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

from modelchain.io.guard import die_with_parent

_context = multiprocessing.get_context("forkserver")


def preload(*modules: str) -> None:
    """Name what the process is to load from which the others are forked."""
    _context.set_forkserver_preload([__name__, *modules])
    # It would end by itself. Waiting for it adds its CPU time, with theirs, to that of the tests.
    atexit.register(forkserver._forkserver._stop)  # type: ignore[attr-defined]


class Program:
    """A started program: `program` is a file, or `-m` and a module, as Python is told; its output
    is appended to `log`. It ends at the latest with the process that started it.
    """

    def __init__(
        self,
        program: Sequence[str],
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
    ):
        told = (program, list(arguments), log, dict(environment))
        self._process = _context.Process(target=_run, args=told, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait(self, seconds: float) -> int | None:
        """Its exit code; None if it still runs after so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode

    def alive(self) -> bool:
        return self._process.is_alive()

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL, now."""
        self._process.kill()
        self._process.join()


def _run(
    program: Sequence[str], arguments: list[str], log: Path, environment: Mapping[str, str]
) -> None:
    """It dies with the process it was forked from, and that one with ours."""
    die_with_parent(signal.SIGKILL, os.getppid())
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ |= environment
    sys.argv = [program[-1], *arguments]
    run = runpy.run_module if program[0] == "-m" else runpy.run_path
    run(program[-1], run_name="__main__")
