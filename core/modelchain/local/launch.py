"""Runs one attempt on this machine: a torchrun process and its workers.

torchx starts torchrun and tells whether it runs. We stop it ourselves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from itertools import takewhile
from pathlib import Path

from modelchain.api.contracts import EvaluationTask, Findings
from modelchain.errors import InputError, WorkError
from modelchain.local.lock import RootLock, holders

# Each of these signals asks `modelchain run` to stop.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Longer than the 30 s that torchrun gives its workers (TORCH_ELASTIC_SHUTDOWN_TIMEOUT below).
GRACE_SECONDS = 35.0


class TrainerProcess:
    """The processes of the running attempt. At most one attempt runs at a time."""

    def __init__(self, lock: RootLock):
        try:
            import torchx.runner
            import torchx.specs
        except ImportError as error:
            raise InputError(
                "training needs the trainer's packages: pip install 'modelchain[trainer]'"
            ) from error
        logging.getLogger("torchx").setLevel(logging.ERROR)
        self._specs = torchx.specs
        self._runner = torchx.runner.get_runner()
        self._lock = lock
        self._handle: str | None = None
        self._pid_file: Path | None = None
        self._stopping_since: float | None = None
        self.attempt: str | None = None

    def start(self, attempt: str, task: Path, processes: int, threads: int) -> None:
        """Start `torchrun -m modelchain_trainer TASK`. torchrun ends when this process ends."""
        directory = task.parent
        self._pid_file = directory / "pid"
        role = self._specs.Role(
            name="trainer",
            image=str(Path.cwd()),
            entrypoint=sys.executable,
            # torchx would substitute macros such as ${app_id}.
            args=[a.replace("$", "$$") for a in _arguments(self._pid_file, task, processes)],
            env=_environment(threads),
        )
        app = self._specs.AppDef(name=attempt, roles=[role])
        # torchx's scheduler installs signal handlers of its own, which kill torchrun after 10 s.
        # Ours are put back.
        handlers = {sig: signal.getsignal(sig) for sig in STOPS}
        with self._lock.as_stdin():
            self._handle = self._runner.run(
                app, scheduler="local_cwd", cfg={"log_dir": str(directory / "logs")}
            )
        for sig, handler in handlers.items():
            signal.signal(sig, handler)
        self.attempt = attempt
        self._stopping_since = None

    def is_live(self) -> bool:
        """Whether any process of the attempt runs. Workers that have outlived torchrun count."""
        if self._handle is None:
            return False
        status = self._runner.status(self._handle)
        if status is not None and not status.is_terminal():
            self._end_if_overdue()
            return True
        if holders(self._lock.path.parent):
            return True
        self._handle, self.attempt = None, None
        return False

    def stop(self) -> None:
        """Ask torchrun to stop, so that its workers write a checkpoint.

        `is_live` kills torchrun, and so its workers, if it still runs after GRACE_SECONDS.
        """
        if self._handle is None or self._stopping_since is not None:
            return
        if self._signal(signal.SIGTERM):
            self._stopping_since = time.monotonic()

    def _end_if_overdue(self) -> None:
        if (
            self._stopping_since is not None
            and time.monotonic() - self._stopping_since > GRACE_SECONDS
        ):
            self._signal(signal.SIGKILL)

    def _signal(self, sig: signal.Signals) -> bool:
        """Send torchrun a signal. False if its pid is not known yet, or if it has ended."""
        assert self._pid_file is not None
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            os.kill(int(self._pid_file.read_text()), sig)
            return True
        return False


def _arguments(pid_file: Path, task: Path, processes: int) -> list[str]:
    """Python's arguments to run torchrun under the guard, which ends it with this process."""
    return [
        "-m", "modelchain.io.guard", str(pid_file),
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes=1", f"--nproc-per-node={processes}", "--standalone", "--max-restarts=0",
        # Otherwise processes look for one another by the host's name, which may not resolve.
        "--local-addr=127.0.0.1",
        "-m", "modelchain_trainer", str(task),
    ]  # fmt: skip


def _environment(threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads),
        # With ACTIVE, waiting threads spin. We measured that a step then takes 60 times as long if
        # another process needs a core.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        # Otherwise gloo looks up the host's name, too.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "MODELCHAIN_RUNNER": str(os.getpid()),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "30",
    }


def measure(task: EvaluationTask) -> Findings:
    """Have a trainer measure metrics of a finished artifact. Raises WorkError if that fails."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(task.model_dump_json(by_alias=True))
        file.flush()
        command = [sys.executable, "-m", "modelchain_trainer", "evaluate", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise WorkError(
            f"measuring {task.artifact} failed: {done.stderr.strip() or done.returncode}"
        )
    return Findings.model_validate_json(done.stdout)


def processes_for(asked: int | None) -> int:
    """Processes of a stage on this machine.

    They are as many as the stage asks for, else one for each visible GPU, else one.
    """
    return asked or max(gpus(), 1)


@cache
def gpus() -> int:
    """The number of NVIDIA GPUs that CUDA programs see on this machine."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        return 0
    there = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    # CUDA respects this variable, and nvidia-smi ignores it.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or there == 0:
        return there
    # CUDA reads the list of devices until the first name that is empty or -1.
    names = takewhile(lambda name: name.strip() not in ("", "-1"), visible.split(","))
    return min(there, len(list(names)))


def threads_for(processes: int) -> int:
    """Threads of one process: an equal share of the cores this process may use."""
    return max(1, len(os.sched_getaffinity(0)) // processes)
