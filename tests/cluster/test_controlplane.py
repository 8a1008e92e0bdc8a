"""The control plane of the tests is a real one, comes up in seconds and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import build
import pytest
import yaml
from controlplane import COMPONENTS, Cluster, ControlPlane, KubectlError, new_directory
from rig import PATHS

TRAINING_JOB = """
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {name: train}
spec:
  pytorchReplicaSpecs:
    Master:
      replicas: 1
      restartPolicy: Never
      template: {spec: {containers: [{name: pytorch, image: none}]}}
"""

BATCH_JOB = """
apiVersion: batch/v1
kind: Job
metadata: {name: verify}
spec: {template: {spec: {restartPolicy: Never, containers: [{name: verify, image: none}]}}}
"""


def eventually(what: str, holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until `holds()`; fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not after {seconds} s: {what}"
        time.sleep(0.1)


def seen_by_scheduler(cluster: Cluster, namespace: str) -> list[str]:
    """The container names of the pods that the scheduler has bound or has found no node for."""
    pods = cluster.read(PATHS["pod"].format(namespace))["items"]
    seen = [
        p
        for p in pods
        if any(c["type"] == "PodScheduled" for c in p["status"].get("conditions", []))
    ]
    return sorted(pod["spec"]["containers"][0]["name"] for pod in seen)


def runs(pid: int) -> bool:
    """False for a zombie too."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_start_takes_seconds_and_stop_leaves_nothing(
    control_plane: ControlPlane, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    another = ControlPlane(new_directory())
    try:
        another.start()
        seconds = time.monotonic() - start
        pids = another.pids()
        statuses = [Path(f"/proc/{pid}/status").read_text() for pid in pids.values()]
    finally:
        another.stop()
    megabytes = sum(int(status.split("VmRSS:")[1].split()[0]) for status in statuses) / 1024
    with capsys.disabled():
        print(f"\n[control plane] ready in {seconds:.1f} s, {megabytes:.0f} MB resident")
    assert set(pids) == set(COMPONENTS)
    assert not any(runs(pid) for pid in pids.values())
    assert not another.directory.exists()


def test_jobs_get_pods_and_pods_the_schedulers_word(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("apply", "-n", namespace, "-f", "-", input=TRAINING_JOB)
    cluster.kubectl("apply", "-n", namespace, "-f", "-", input=BATCH_JOB)
    eventually(
        "two pods seen", lambda: seen_by_scheduler(cluster, namespace) == ["pytorch", "verify"]
    )


def test_the_webhook_refuses_a_bad_training_job(cluster: Cluster, namespace: str) -> None:
    bad = TRAINING_JOB.replace("pytorch,", "other,")
    with pytest.raises(
        KubectlError, match=r"validator\.pytorchjob\.training-operator.*denied the request"
    ):
        cluster.kubectl("apply", "-n", namespace, "-f", "-", input=bad)


def test_what_an_owner_owns_goes_with_it(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("create", "configmap", "owner", "-n", namespace)
    uid = cluster.kubectl(
        "get", "configmap", "owner", "-n", namespace, "-o", "jsonpath={.metadata.uid}"
    )
    owner = f"ownerReferences: [{{apiVersion: v1, kind: ConfigMap, name: owner, uid: {uid}}}]"
    for job, name in ((TRAINING_JOB, "train"), (BATCH_JOB, "verify")):
        owned = job.replace(f"metadata: {{name: {name}}}", f"metadata: {{name: {name}, {owner}}}")
        cluster.kubectl("create", "-n", namespace, "-f", "-", input=owned)

    def count() -> int:
        kinds = (PATHS[kind].format(namespace) for kind in ("pytorchjob", "job", "pod"))
        return sum(len(cluster.read(path)["items"]) for path in kinds)

    eventually("two jobs, each with its pod", lambda: count() == 4)
    cluster.kubectl("delete", "configmap", "owner", "-n", namespace)
    eventually("jobs and pods gone", lambda: count() == 0)


def test_workers_are_allowed_under_the_restricted_standard(
    control_plane: ControlPlane, namespace: str
) -> None:
    control_plane.kubectl(
        "label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted"
    )
    template = {
        "spec": {
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "pytorch",
                    "image": "none",
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }
            ],
        }
    }
    job = yaml.safe_load(TRAINING_JOB)
    replicas = {"replicas": 1, "restartPolicy": "Never", "template": template}
    job["spec"]["pytorchReplicaSpecs"] = {"Master": replicas, "Worker": replicas}
    control_plane.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(job))
    eventually(
        "two pods seen",
        lambda: seen_by_scheduler(control_plane, namespace) == ["pytorch", "pytorch"],
    )


def test_rights_are_checked(control_plane: ControlPlane) -> None:
    nobody = control_plane.kubeconfig_for("nobody", ["no-one"])
    with pytest.raises(KubectlError, match='User "nobody" cannot list resource "pods"'):
        control_plane.kubectl("--kubeconfig", str(nobody), "get", "pods")


@pytest.mark.parametrize("name", COMPONENTS)
def test_everything_works_again_after_a_components_death(
    control_plane: ControlPlane, namespace: str, name: str
) -> None:
    before = control_plane.pids()
    control_plane.restart(name)
    after = control_plane.pids()
    assert {other for other in COMPONENTS if before[other] != after[other]} == {name}
    control_plane.kubectl("apply", "-n", namespace, "-f", "-", input=BATCH_JOB)
    control_plane.kubectl("apply", "-n", namespace, "-f", "-", input=TRAINING_JOB)
    eventually(
        "two pods seen",
        lambda: seen_by_scheduler(control_plane, namespace) == ["pytorch", "verify"],
    )


def test_a_killed_run_leaves_no_process_and_the_next_start_removes_its_files(
    control_plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
        import time
        from controlplane import ControlPlane, new_directory
        control_plane = ControlPlane(new_directory()).start()
        print(control_plane.directory, *control_plane.pids().values(), flush=True)
        time.sleep(600)
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    folder = Path(__file__).parent
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout
        directory, *pids = run.stdout.readline().split()
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        new_directory()
        assert Path(directory).exists(), "a run that is alive was taken for a crashed one"
        run.kill()
    eventually("no process", lambda: not any(runs(int(pid)) for pid in pids))
    new_directory()
    assert not Path(directory).exists()


def test_only_processes_of_the_crashed_run_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = new_directory()
    with subprocess.Popen(["sleep", "600"]) as ours, subprocess.Popen(["sleep", "600"]) as other:
        started = Path(f"/proc/{ours.pid}/stat").read_text().rpartition(")")[2].split()[19]
        (left / "processes").write_text(f"{os.getpid()} 0\n{ours.pid} {started}\n{other.pid} 0\n")
        new_directory()
        eventually("the process left is gone", lambda: not runs(ours.pid))
        assert runs(other.pid), "it only has the id of a process of the crashed run"
        assert not left.exists()
        other.kill()


def test_where_neither_go_nor_programs_are_the_reason_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        build.Unavailable, match=r"install Go.*setup-envtest use.*KUBEBUILDER_ASSETS"
    ):
        build.find_or_build()


def test_given_programs_are_used(
    control_plane: ControlPlane, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etcd").touch()
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    paths = build.find_or_build().paths
    assert paths["etcd"] == tmp_path / "etcd"
    assert paths["kube-scheduler"].parent != tmp_path
