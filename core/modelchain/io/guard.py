"""`python -m modelchain.io.guard PIDFILE COMMAND...`: COMMAND, which ends when its parent ends.

torchx starts its processes in sessions of their own and has no hook between fork and exec, so this
stands in between: it asks the kernel for SIGTERM at the parent's death (kept across exec), notes
the pid, and becomes COMMAND.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
PARENT = "MODELCHAIN_TORCHRUN"  # torchrun's pid, for its workers to ask for the same


def die_with_parent(sig: signal.Signals, parent: int) -> None:
    """Have the kernel send `sig` to this process when its parent dies; leave at once if it already
    has.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    parent = os.getppid()
    die_with_parent(signal.SIGTERM, int(os.environ.get("MODELCHAIN_RUNNER", parent)))
    os.environ[PARENT] = str(os.getpid())
    Path(sys.argv[1]).write_text(str(os.getpid()))
    os.execvp(sys.argv[2], sys.argv[2:])
