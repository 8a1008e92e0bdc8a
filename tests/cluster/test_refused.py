"""What the cluster does not let a chain do: objects refused at creation, a runner that is not
installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from controlplane import ControlPlane, new_directory
from kubelet import Kubelet
from plays import lost_message
from recorder import Recorder
from rig import Operator, Space, chain

QUOTA = {
    "apiVersion": "v1",
    "kind": "ResourceQuota",
    "metadata": {"name": "few"},
    "spec": {"hard": {"pods": "0"}},
}


def test_pods_refused_by_a_quota(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    """Told in the words of the event, charged to no budget, and over when the quota is raised."""
    space = Space(control_plane, namespace)
    with (
        Kubelet(control_plane.kubeconfig),
        Operator(control_plane.kubeconfig, tmp_path, (namespace,)),
        Recorder(control_plane.etcd) as recorder,
    ):
        space.apply(QUOTA)
        space.wait(
            lambda: space.get("quota", "few").get("status", {}).get("hard"), "the quota is in force"
        )
        space.apply(
            chain(stages=1) | {"spec": chain(stages=1)["spec"] | {"deadlines": {"startSeconds": 1}}}
        )
        stalled = space.until("Stalled")["conditions"][0]
        assert stalled["reason"] == "PodsForbidden"
        assert (
            "exceeded quota: few, requested: pods=1, used: pods=0, limited: pods=0"
            in stalled["message"]
        )
        space.kubectl(
            "patch", "quota", "few", "--type=merge", "-p", '{"spec": {"hard": {"pods": "9"}}}'
        )
        stage = space.until("Complete")["stages"][0]
        assert len(stage["attempts"]) == 1 and (stage["retries"], stage["disruptions"]) == (0, 0)
        recorder.verify()


def test_a_record_refused_by_a_quota(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    """The stage has finished and cannot be recorded: said in the quota's words, and never a reason
    to train again.
    """
    space = Space(control_plane, namespace)
    kind = "count/stageartifacts.modelchain.dev"
    with (
        Kubelet(control_plane.kubeconfig),
        Operator(control_plane.kubeconfig, tmp_path, (namespace,)),
        Recorder(control_plane.etcd) as recorder,
    ):
        space.apply(QUOTA | {"spec": {"hard": {kind: "0"}}})
        space.wait(
            lambda: space.get("quota", "few").get("status", {}).get("hard"), "the quota is in force"
        )
        space.apply(chain(stages=2))
        stalled = space.until("Stalled")["conditions"][0]
        assert stalled["reason"] == "RecordRefused" and "exceeded quota: few" in stalled["message"]
        space.kubectl("delete", "quota", "few")
        stages = space.until("Complete")["stages"]
        assert [len(stage["attempts"]) for stage in stages] == [1, 1]
        recorder.verify()


@pytest.mark.parametrize(
    ("kind", "hard", "reason"),
    [
        ("persistentvolumeclaims", 1, "ClaimRefused"),
        ("count/leases.coordination.k8s.io", 0, "ShareRefused"),
        ("count/pytorchjobs.kubeflow.org", 0, "LaunchRefused"),
        ("count/jobs.batch", 0, "IndexRefused"),
        ("count/jobs.batch", 1, "VerifyRefused"),  # the index Job comes first
    ],
)
@pytest.mark.timeout(240)
def test_what_a_quota_refuses(
    control_plane: ControlPlane, namespace: str, tmp_path: Path, kind: str, hard: int, reason: str
) -> None:
    """The status has the quota's words, no budget is charged, and a raised quota ends it."""
    space = Space(control_plane, namespace)
    shared = {"spec.storage": {"claimName": "data"}} if reason == "ShareRefused" else {}
    script = lambda pod: lost_message() if pod.role == "train" else None  # noqa: E731
    with (
        Kubelet(control_plane.kubeconfig, script=script),
        Operator(control_plane.kubeconfig, tmp_path, (namespace,)),
        Recorder(control_plane.etcd) as recorder,
    ):
        space.apply(QUOTA | {"spec": {"hard": {kind: str(hard)}}})
        space.wait(
            lambda: space.get("quota", "few").get("status", {}).get("hard"), "the quota is in force"
        )
        space.apply(chain(stages=1, **shared))
        # A refused launch is no stall for a minute.
        stalled = space.until("Stalled", timeout=120)["conditions"][0]
        assert stalled["reason"] == reason and "exceeded quota: few" in stalled["message"]
        space.kubectl("delete", "quota", "few")
        stage = space.until("Complete", timeout=90)["stages"][0]
        assert len(stage["attempts"]) == 1 and (stage["retries"], stage["disruptions"]) == (0, 0)
        recorder.verify()


def test_the_restricted_pod_security_standard(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    """Our pods pass it, workers with their init container included."""
    control_plane.kubectl(
        "label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted"
    )
    space = Space(control_plane, namespace)
    with (
        Kubelet(control_plane.kubeconfig),
        Operator(control_plane.kubeconfig, tmp_path, (namespace,)),
    ):
        space.apply(chain(stages=1, **{"spec__stages[0].resources": {"nodes": 2}}))
        space.until("Complete")


@pytest.fixture
def without_runner() -> Iterator[ControlPlane]:
    """A control plane of its own: its PyTorchJobs can be taken away."""
    made = ControlPlane(new_directory()).start()
    yield made
    made.stop()


def test_a_runner_installed_later_is_found(without_runner: ControlPlane, tmp_path: Path) -> None:
    crd = without_runner.kubectl("get", "crd", "pytorchjobs.kubeflow.org", "-o", "yaml")
    without_runner.kubectl("delete", "crd", "pytorchjobs.kubeflow.org")
    space = Space(without_runner, "default")
    with Kubelet(without_runner.kubeconfig), Operator(without_runner.kubeconfig, tmp_path):
        space.apply(chain(stages=1))
        stalled = space.until("Stalled")["conditions"][0]
        assert (
            stalled["reason"] == "RunnerMissing"
            and "kubectl apply --server-side -k" in stalled["message"]
        )
        without_runner.kubectl("create", "-f", "-", input=crd)
        without_runner.restart("training-operator")
        space.until("Complete", timeout=90)
