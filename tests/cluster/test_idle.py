"""A cluster at rest is left at rest: nothing is written while nothing changes, and little is read.

MODELCHAIN_IDLE_SECONDS=300 watches for five minutes instead of one.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest
import sweeps
from controlplane import ControlPlane
from faults import Request
from kubelet import Kubelet
from plays import stall, usual
from proxy import FaultProxy
from rig import CONFIG, Operator, Space, chain

SECONDS = float(os.environ.get("MODELCHAIN_IDLE_SECONDS", "60"))
FINISHED = RUNNING = 50 if sweeps.everything() else 8
PROGRESS_SECONDS = 30  # the default
READS_A_LOOK = 4  # chain, jobs, pods, and whether the stage's artifact is recorded
SHARED_READS = 2  # a minute: the LIST of all chains


@pytest.mark.timeout(SECONDS + 300)
def test_nothing_is_written_while_nothing_changes(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    space = Space(control_plane, namespace)
    script = lambda pod: stall(0.5, 0.1) if pod.chain.startswith("running") else usual(0.1)  # noqa: E731
    settings = CONFIG | {"progressSeconds": PROGRESS_SECONDS}
    with (
        Kubelet(control_plane.kubeconfig, script=script) as kubelet,
        FaultProxy(control_plane.kubeconfig) as proxy,
    ):
        kubeconfig = proxy.kubeconfig(tmp_path / "proxy")
        with Operator(kubeconfig, tmp_path, (namespace,), leader_election=True, settings=settings):
            names = [
                f"{kind}-{i}"
                for kind, n in (("finished", FINISHED), ("running", RUNNING))
                for i in range(n)
            ]
            chains = [chain(name, 2 if name.startswith("running") else 1) for name in names]
            for seed, made in enumerate(chains):  # the same inputs are trained once
                made["spec"]["recipe"]["seed"] = seed
            space.apply({"apiVersion": "v1", "kind": "List", "items": chains})
            calm = Counter({"Complete": FINISHED, "Running": RUNNING})
            space.wait(lambda: _states(space) == calm, "calm", 150)
            # Each running chain is looked at once more: its last step may not be written yet.
            space.wait(lambda: _quiet(proxy, PROGRESS_SECONDS + 2), "no more writes", 120)
            begin = len(proxy.log)
            time.sleep(SECONDS)
            seen = proxy.log[begin:]
    written = [str(request) for request in seen if request.kind in ("write", "event")]
    assert not written
    assert {request.kind for request in seen} <= {"read", "lease", "watch"}
    reads = Counter(
        request.verb + " " + request.resource for request in seen if request.kind == "read"
    )
    minutes = SECONDS / 60
    looks = RUNNING * (60 / PROGRESS_SECONDS + 1) * minutes  # one more by the resync
    claims = RUNNING * (minutes + 1)
    assert reads.total() <= looks * READS_A_LOOK + claims + SHARED_READS * (minutes + 1), reads
    print(
        f"reads a minute and running chain: {reads.total() / minutes / RUNNING:.1f} {dict(reads)}"
    )
    assert all(len(kubelet.trained[digest]) == 1 for digest in kubelet.trained)


def _states(space: Space) -> Counter[str]:
    return Counter(
        made.get("status", {}).get("summary", {}).get("state") for made in space.list("mchain")
    )


def _quiet(proxy: FaultProxy, seconds: float) -> bool:
    """Nothing was written for so long."""
    writes: list[Request] = [r for r in proxy.log if r.kind in ("write", "event")]
    return time.monotonic() - writes[-1].at > seconds
