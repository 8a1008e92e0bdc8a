"""Where the tests of pods run: a node of our own in namespaces (`node.py`), or the cluster of a
kubeconfig.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import machine
from build import find_or_build
from controlplane import Cluster
from node import ADDRESS, CGROUP, HOST, PREFIX, cgroups

HERE = Path(__file__).parent
LINK = "mc-e2e"


class Lab(Cluster):
    """Our own node. `ask` passes a command to it; everything ends with `stop`, or when this process
    dies.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(
            directory / "cluster" / "admin.kubeconfig", find_or_build().paths["kubectl"]
        )
        self.directory = directory
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        # The kernel kills it with the *thread* that started it (PR_SET_PDEATHSIG), so that is one
        # that lives on.
        self._launcher = ThreadPoolExecutor(1)

    def start(self) -> Lab:
        sweep()  # of a run that was killed
        self.directory.mkdir(parents=True, exist_ok=True)
        self._log = (self.directory / "node.log").open("w")
        inner = [sys.executable, str(HERE / "node.py"), str(self.directory)]
        private = [
            "unshare",
            "--mount",
            "--net",
            "--pid",
            "--ipc",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        self._process = self._launcher.submit(
            subprocess.Popen,
            ["setpriv", "--pdeathsig", "KILL", *private, *inner],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        ).result()
        try:
            child = self._child()
            machine.run(
                "ip",
                "link",
                "add",
                LINK,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                str(child),
            )
            machine.run("ip", "address", "add", f"{HOST}/{PREFIX}", "dev", LINK)
            machine.run("ip", "link", "set", LINK, "up")
            self._say("network is there")
            self._answer()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Everything ends at once: the kernel kills what lives in the namespaces."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        sweep()

    def ask(self, *words: str) -> str:
        """`stop NAME` and `start NAME` of a component, or `ctr …`; what it answers. Raises
        RuntimeError.
        """
        with self._lock:
            self._say(" ".join(words))
            return self._answer()

    def ctr(self, *words: str) -> str:
        said: str = json.loads(self.ask("ctr", *words))
        return said

    def _child(self) -> int:
        """The first process inside, seen from outside."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        for _ in range(200):
            found = children.read_text().split()
            if found and _network(found[0]) != _network("self"):
                return int(found[0])
            time.sleep(0.05)
        raise RuntimeError(f"the node did not start: {self._said()}")

    def _say(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line or line.startswith("error: "):
            raise RuntimeError(f"{line or 'the node ended'}: {self._said()}")
        return line

    def _said(self) -> str:
        return (self.directory / "node.log").read_text()[-3000:]


def _network(process: str) -> Path:
    return Path("/proc", process, "ns/net").readlink()


def sweep() -> None:
    """What outlives the namespaces for a while, or for good: the link and control groups."""
    with contextlib.suppress(RuntimeError):  # there is none
        machine.run("ip", "link", "delete", LINK)
    for attempt in range(50):
        time.sleep(0.1 * (attempt > 0))
        if all(_removed(hierarchy / CGROUP) for hierarchy in cgroups()):
            return


def _removed(group: Path) -> bool:
    """A control group is removed from its leaves up, and only once its processes are gone."""
    for folder in sorted(group.rglob("*"), key=lambda p: -len(p.parts)) if group.exists() else []:
        if folder.is_dir():
            with contextlib.suppress(OSError):
                folder.rmdir()
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """One lab a machine: names of links and addresses are fixed."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(
                f"another `make e2e` runs on this machine ({directory / 'lock'}, {ADDRESS})"
            ) from None
        yield
