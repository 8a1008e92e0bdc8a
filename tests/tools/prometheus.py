"""The real `prometheus` and `promtool`: those in PATH, or else those of Debian's package, unpacked
once beside the control plane's programs. Nothing is installed, so no root is needed.

`python tests/tools/prometheus.py` fetches the package if need be and prints the two paths.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

sys.path.append(str(Path(__file__).parents[1] / "cluster"))
from golang import Unavailable, cache_home, locked

PACKAGE = "prometheus"
PROGRAMS = ("prometheus", "promtool")
_NEEDED = ("apt-get", "dpkg-deb")


def program(name: Literal["prometheus", "promtool"]) -> Path:
    """One of the programs, fetched first where it is missing. Raises `Unavailable`."""
    if there := shutil.which(name):
        return Path(there)
    cache = cache_home() / "prometheus"
    path = cache / name
    if not path.is_file():
        if missing := [tool for tool in _NEEDED if not shutil.which(tool)]:
            raise Unavailable(
                f"{name} is not in PATH, and without {' and '.join(missing)} it cannot be taken"
                " from Debian: install Prometheus (https://prometheus.io/download)"
            )
        with locked(cache):
            if not path.is_file():
                _fetch(cache)
    return path


def _fetch(cache: Path) -> None:
    """Put both programs into this folder. Raises `Unavailable`."""
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as name:
        folder = Path(name)
        for state in ("lists", "archives"):
            (folder / state / "partial").mkdir(parents=True)
        # Lists of its own: those of the machine may be missing, old, or root's.
        places = [f"Dir::State::lists={folder}/lists", f"Dir::Cache={folder}/archives"]
        given = [*places, "APT::Sandbox::User=root", "Acquire::Retries=5"]
        apt = ["apt-get", "-q", *(word for one in given for word in ("-o", one))]
        _run(folder, *apt, "update")
        _run(folder, *apt, "download", PACKAGE)
        (archive,) = folder.glob("*.deb")
        _run(folder, "dpkg-deb", "-x", str(archive), "unpacked")
        for program in PROGRAMS:
            (folder / "unpacked" / "usr" / "bin" / program).rename(cache / program)


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip()[-2000:]
        raise Unavailable(f"Debian's package {PACKAGE}: {' '.join(command)}: {said}")


if __name__ == "__main__":
    for each in PROGRAMS:
        print(program(each))
