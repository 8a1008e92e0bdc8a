"""A cluster to try things on: start this, type what it prints in another terminal; Ctrl-C ends it.

The control plane and training-operator are real; pods are played by a stand-in kubelet, and train
nothing.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "core")]

from build import Unavailable, find_or_build  # noqa: E402
from controlplane import ControlPlane, new_directory  # noqa: E402
from kubelet import Kubelet  # noqa: E402
from plays import usual  # noqa: E402
from rig import Space  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="that a stage seems to train (default: 60)"
    )
    seconds = parser.parse_args().seconds
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # also where a shell has told its background jobs to ignore it
        signal.signal(number, signal.default_int_handler)
    try:
        kubectl = find_or_build().paths["kubectl"]
    except Unavailable as reason:
        sys.exit(str(reason))
    control_plane = ControlPlane(new_directory()).start()
    try:
        Space(control_plane, "default", data="datasets")
        play = usual(seconds)
        with Kubelet(control_plane.kubeconfig, count=4, script=lambda pod: play):
            print(
                f"export KUBECONFIG={control_plane.kubeconfig} PATH={kubectl.parent}:$PATH",
                flush=True,
            )
            print(
                "modelchain-operator --no-leader-election   # and: kubectl apply -f"
                " examples/vit-cc3m.yaml",
                flush=True,
            )
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        pass
    finally:
        control_plane.stop()


if __name__ == "__main__":
    main()
