"""What a machine needs for a node of its own; said before anything is started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

FREE_GIB = 30
MEMORY_GIB = 8
# Debian's names; each is asked for by a program of it.
PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "prometheus": "prometheus",
    "ip": "iproute2",
    "openssl": "openssl",
}


def cache() -> Path:
    """Where base, images and the node's files are kept from one run to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelchain" / "e2e"


def missing_packages() -> list[str]:
    return [package for program, package in PACKAGES.items() if not shutil.which(program)]


def wants() -> list[str]:
    """What is missing, a sentence each; packages apart."""
    found = []
    if sys.platform != "linux" or os.geteuid() != 0:
        found.append(
            "needs Linux and root: the node makes namespaces, mounts and control groups of its own"
        )
        return found
    if subprocess.run(
        ["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True
    ).returncode:
        found.append(
            "`unshare --mount --net --pid` is refused here: run it outside of an unprivileged"
            " container"
        )
    if not shutil.which("go"):
        found.append(
            "needs Go 1.24 or newer, which builds Kubernetes from the module proxy:"
            " https://go.dev/dl"
        )
    if missing_packages() and not shutil.which("apt-get"):
        found.append(
            f"needs what Debian calls {', '.join(missing_packages())}, and there is no apt-get to"
            " install them"
        )
    there = cache()
    while not there.exists():
        there = there.parent
    held = sum(
        f.stat().st_blocks * 512 for f in cache().rglob("*") if f.is_file() and not f.is_symlink()
    )
    free = (shutil.disk_usage(there).free + held) / 2**30
    if free < FREE_GIB:
        found.append(
            f"needs {FREE_GIB} GB free under {cache()}, of which its own files count: {free:.0f}"
            " GB are"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if memory < MEMORY_GIB:
        found.append(f"needs {MEMORY_GIB} GB of memory; here are {memory:.0f}")
    return found


def install() -> None:
    """Debian's packages that are missing. Raises CalledProcessError."""
    if packages := missing_packages():
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        apt = ["apt-get", "-q", "-o", "Acquire::Retries=5"]
        run(*apt, "update")
        command = [*apt, "install", "-y", "--no-install-recommends", *packages]
        subprocess.run(command, check=True, env=environment, capture_output=True)


def run(*command: str) -> None:
    """Raises RuntimeError with what the command wrote."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
