"""`python -m modelchain.io.guard PIDFILE COMMAND...` runs COMMAND so that it ends with its parent.

torchx starts its processes in sessions of their own and has no hook between fork and exec. So this
program runs in between: it asks the kernel for SIGTERM at the parent's death (which exec keeps),
writes its pid to PIDFILE, and executes COMMAND.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
PARENT = "MODELCHAIN_TORCHRUN"  # torchrun's pid, with which its workers call `die_with_parent`


def die_with_parent(sig: signal.Signals, parent: int) -> None:
    """Have the kernel send `sig` to this process when its parent dies. If the parent has died
    already, end at once.
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
