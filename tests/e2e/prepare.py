"""Everything that `make e2e` needs: says first what the machine cannot do, then installs and
builds, with times.

With MODELCHAIN_TEST_KUBECONFIG nothing is made: the tests run in that cluster, on images it can
pull.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "cluster")]

import build  # noqa: E402
import machine  # noqa: E402


def main() -> None:
    if sys.argv[1:] == ["--clean"]:
        return clean()
    if os.environ.get("MODELCHAIN_TEST_KUBECONFIG"):
        print(
            "the tests run in the cluster of MODELCHAIN_TEST_KUBECONFIG; nothing is prepared here"
        )
        return
    print(
        f"a node of its own needs Linux, root and {machine.FREE_GIB} GB free; it is kept in"
        f" {machine.cache()}"
    )
    if wants := machine.wants():
        sys.exit(
            "\n".join(["this machine cannot run `make e2e`:", *(f"- {want}" for want in wants)])
        )
    try:
        timed("packages", machine.install)
        timed("control plane", lambda: build.find_or_build())
        timed("node's programs", lambda: [build.program(name) for name in build.NODE])
    except build.Unavailable as reason:
        sys.exit(str(reason))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)}: {error.stderr.decode()[-2000:]}")
    except RuntimeError as error:
        sys.exit(str(error))
    import images

    timed("images", lambda: images.build(machine.cache()))


def clean() -> None:
    """Not beside a run: its lock is taken first."""
    import images
    import lab

    with lab.alone(machine.cache()):
        lab.sweep()
        if (machine.cache() / "buildah").exists():
            images.Buildah(machine.cache() / "buildah").forget()
        shutil.rmtree(machine.cache(), ignore_errors=True)
    print(f"removed {machine.cache()}")


def timed(name: str, what: Callable[[], object]) -> None:
    start = time.monotonic()
    print(f"{name} ...", end=" ", flush=True)
    what()
    print(f"{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
