"""The stand-in kubelet against the real scheduler, controllers and training-operator."""

from __future__ import annotations

import hashlib
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from controlplane import ControlPlane, KubectlError
from kubelet import Kubelet
from playedpod import Pod
from plays import Play, evict, hang, image_error, init_error, node_loss, oom, preempt, stall, stuck
from rig import PATHS

from modelchain.api.contracts import (
    DataRequest,
    FailureClass,
    LastWord,
    LiveProgress,
    Task,
    TaskEvaluation,
    TrainFiles,
)

DIGEST = hashlib.sha256(b"inputs").hexdigest()
LABELS = {"modelchain.dev/chain": "c", "modelchain.dev/stage": "s", "modelchain.dev/attempt": "1"}


def task(attempt: str = "c-s-a1") -> Task:
    """A task of 100 steps."""
    evaluation = TaskEvaluation(
        name="digits",
        kind="ZeroShot",
        shards="/data/val.tar",
        class_names="mnist",
        templates="openai",
        files=[],
    )
    train = TrainFiles(
        files=["/data/train.tar"], samples=1000, captions_per_sample=4, fingerprint=None
    )
    return Task(
        chain="c",
        stage="s",
        model="inline $(M)",
        attempt=attempt,
        input_digest=DIGEST,
        inputs={"epochs": 10, "globalBatchSize": 100, "data": {"samples": 1000}},
        root="/artifacts",
        owner=attempt,
        predecessor=None,
        data=DataRequest(index="/artifacts/index", file="c", train=train, evaluation=[evaluation]),
        micro_batch_size=None,
        checkpoint_seconds=60,
        macs_per_step=7,
        threads=None,
        device="cpu",
        start_seconds=1800,
        stall_seconds=1800,
        last_word="/dev/termination-log",
    )


def template(
    role: str = "train", attempt: str = "c-s-a1", inits: int = 0, **spec: Any
) -> dict[str, Any]:
    """A trainer's or verify Job's pod template."""
    container = {
        "name": "pytorch",
        "image": "trainer",
        "env": [
            {
                "name": "MODELCHAIN_TASK",
                "value": task(attempt).model_dump_json(by_alias=True).replace("$", "$$"),
            }
        ],
        "volumeMounts": [{"name": "artifacts", "mountPath": "/artifacts"}],
    }
    return {
        "metadata": {
            "labels": LABELS | {"modelchain.dev/role": role},
            "annotations": {"modelchain.dev/input-digest": DIGEST},
        },
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 30,
            "containers": [container],
            "initContainers": [{"name": f"init-{i}", "image": "init"} for i in range(inits)],
            "volumes": [{"name": "artifacts", "persistentVolumeClaim": {"claimName": "artifacts"}}],
            **spec,
        },
    }


class Bench:
    """A namespace with a claim, a kubelet, and short words for what the tests ask."""

    def __init__(self, plane: ControlPlane, namespace: str, kubelet: Kubelet):
        self.plane, self.namespace, self.kubelet = plane, namespace, kubelet
        spec = {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "rwx",
            "resources": {"requests": {"storage": "1Gi"}},
        }
        self.apply("v1", "PersistentVolumeClaim", {"name": "artifacts"}, spec)

    def apply(
        self, version: str, kind: str, metadata: dict[str, Any], spec: dict[str, Any]
    ) -> None:
        body = {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}
        self.plane.kubectl("create", "-n", self.namespace, "-f", "-", input=json.dumps(body))

    def pod(self, name: str, **options: Any) -> None:
        made = template(**options)
        self.apply("v1", "Pod", {"name": name, **made["metadata"]}, made["spec"])

    def get(self, what: str) -> dict[str, Any]:
        """An object by `kind/name`; empty if it is not there."""
        kind, _, name = what.partition("/")
        try:
            return self.plane.read(f"{PATHS[kind].format(self.namespace)}/{name}")
        except KubectlError as error:
            if not str(error).startswith("404"):
                raise
            return {}

    def delete(self, *what: str) -> None:
        self.plane.kubectl("delete", "-n", self.namespace, *what)

    def patch(self, what: str, body: dict[str, Any]) -> None:
        self.plane.kubectl(
            "patch", "-n", self.namespace, what, "--type=merge", "-p", json.dumps(body)
        )

    def until(
        self, what: str, true: Callable[[dict[str, Any]], Any], seconds: float = 30
    ) -> dict[str, Any]:
        """The object once it is as wanted."""
        deadline = time.monotonic() + seconds
        while not (found := self.get(what)) or not true(found):
            assert time.monotonic() < deadline, (
                f"{what} did not come to be: {json.dumps(found.get('status'))}"
            )
            time.sleep(0.1)
        return found


@pytest.fixture
def bench(control_plane: ControlPlane, namespace: str) -> Iterator[Bench]:
    with Kubelet(control_plane.kubeconfig, labels={"pool": "a100"}) as kubelet:
        yield Bench(control_plane, namespace, kubelet)


def play(kubelet: Kubelet, chosen: Play) -> None:
    kubelet.script = lambda pod: chosen


def ended(pod: dict[str, Any]) -> bool:
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def terminated(pod: dict[str, Any]) -> dict[str, Any]:
    return dict(pod["status"]["containerStatuses"][0]["state"]["terminated"])


def word(pod: dict[str, Any]) -> LastWord:
    return LastWord.model_validate_json(terminated(pod)["message"])


def conditions(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {c["type"]: c for c in pod["status"]["conditions"]}


def test_a_trainer_succeeds_once_and_later_pods_find_its_artifact(bench: Bench) -> None:
    bench.pod("a", inits=1, nodeSelector={"pool": "a100"})
    first = bench.until("pod/a", ended)
    assert first["status"]["phase"] == "Succeeded" and first["status"]["podIP"].startswith("127.")
    assert first["status"]["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0
    assert (
        conditions(first)["Ready"]["reason"] == "PodCompleted"
        and conditions(first)["Initialized"]["status"] == "True"
    )
    said = word(first)
    assert said.artifact_digest == hashlib.sha256(b"weights" + DIGEST.encode()).hexdigest()
    assert (said.steps, said.macs, said.seconds) == (100, 700, 1.0) and set(said.metrics) == {
        "digits"
    }

    bench.pod("b", attempt="c-s-a2")
    bench.pod("verify", role="verify")
    again = word(bench.until("pod/b", ended))
    assert again.artifact_digest == said.artifact_digest and again.macs == 0
    assert word(bench.until("pod/verify", ended)) == said
    assert [p.task.model for p in bench.kubelet.pods.values() if p.task] == ["inline $(M)"] * 2
    assert bench.kubelet.trained[DIGEST] == ["c-s-a1"] and bench.kubelet.finished[DIGEST] == 1

    bench.kubelet.volume(bench.namespace, "artifacts").artifacts.clear()
    bench.pod("absent", role="verify")
    absent = bench.until("pod/absent", ended)
    assert terminated(absent)["exitCode"] == 1 and word(absent).failure == FailureClass.NO_ARTIFACT


def test_a_gang_of_the_training_operator_starts_together_and_ends_together(bench: Bench) -> None:
    replica = {"replicas": 1, "restartPolicy": "Never", "template": template()}
    spec = {
        "runPolicy": {"cleanPodPolicy": "None"},
        "pytorchReplicaSpecs": {"Master": replica, "Worker": replica},
    }
    bench.apply("kubeflow.org/v1", "PyTorchJob", {"name": "c-s-a1"}, spec)

    def succeeded(job: dict[str, Any]) -> bool:
        return any(
            c["type"] == "Succeeded" and c["status"] == "True"
            for c in job.get("status", {}).get("conditions", [])
        )

    bench.until("pytorchjob/c-s-a1", succeeded)
    assert word(bench.get("pod/c-s-a1-master-0")).result == "Succeeded"
    worker = bench.until("pod/c-s-a1-worker-0", ended)
    assert worker["status"]["phase"] == "Succeeded" and not terminated(worker).get("message")


def test_failures_look_like_a_kubelets(bench: Bench) -> None:
    plays = {"oom": oom(), "evicted": evict(), "image": image_error(), "init": init_error()}
    bench.kubelet.script = lambda pod: plays[pod.name]
    for name in plays:
        bench.pod(name, inits=1, attempt=name)
    assert terminated(bench.until("pod/oom", ended)) | {
        "reason": "OOMKilled",
        "exitCode": 137,
    } == terminated(bench.get("pod/oom"))
    evicted = bench.until("pod/evicted", ended)
    assert (
        evicted["status"]["reason"] == "Evicted"
        and conditions(evicted)["DisruptionTarget"]["status"] == "True"
    )
    assert (word(evicted).failure, word(evicted).checkpoint_step) == (
        FailureClass.PREEMPTED,
        word(evicted).step,
    )
    init = bench.until("pod/init", ended)["status"]
    assert init["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 1
    waits = bench.until("pod/image", lambda pod: "ImagePullBackOff" in json.dumps(pod["status"]))
    assert waits["status"]["phase"] == "Pending"


def test_a_deleted_trainer_checkpoints_and_the_next_attempt_resumes(bench: Bench) -> None:
    bench.kubelet.stop_delay = 1.5
    bench.kubelet.script = lambda pod: stall(0.25) if pod.name == "a" else None
    bench.pod("a")
    bench.until("pod/a", lambda pod: pod["status"].get("phase") == "Running")
    address = bench.get("pod/a")["status"]["podIP"]

    def progress() -> LiveProgress:
        with urllib.request.urlopen(f"http://{address}:9091/progress", timeout=5) as answer:
            return LiveProgress.model_validate_json(answer.read())

    while (told := progress()).step < 25:
        assert told.samples_per_second > 0
        time.sleep(0.1)
    assert (told.step, told.steps, told.samples_per_second) == (25, 100, 0)
    with urllib.request.urlopen(f"http://{address}:9090/metrics", timeout=5) as answer:
        assert b"modelchain_trainer_step 25.0" in answer.read()

    keep = {
        "metadata": {"finalizers": ["modelchain.dev/test"]}
    }  # so that its last state can be read
    bench.patch("pod/a", keep)
    bench.delete("pod/a", "--wait=false")
    assert (
        said := word(bench.until("pod/a", ended))
    ).failure == FailureClass.PREEMPTED and said.checkpoint_step == 25
    bench.patch("pod/a", {"metadata": {"finalizers": None}})
    bench.plane.kubectl("wait", "--for=delete", "-n", bench.namespace, "pod/a", "--timeout=20s")
    bench.pod("b", attempt="c-s-a2")
    assert word(bench.until("pod/b", ended)).macs == 75 * 7
    assert (
        bench.kubelet.trained[DIGEST] == ["c-s-a1", "c-s-a2"]
        and bench.kubelet.finished[DIGEST] == 1
    )


def test_a_preempted_pod_goes_and_a_stuck_one_stays(bench: Bench) -> None:
    bench.kubelet.script = lambda pod: preempt() if pod.name == "preempted" else stuck()
    bench.pod("preempted")
    bench.pod("stuck")
    bench.until("pod/stuck", lambda pod: pod["status"].get("phase") == "Running")
    bench.delete("pod/stuck", "--wait=false", "--grace-period=1")
    bench.plane.kubectl(
        "wait", "--for=delete", "-n", bench.namespace, "pod/preempted", "--timeout=20s"
    )
    assert bench.get("pod/stuck")["status"]["phase"] == "Running"
    bench.delete("pod/stuck", "--force", "--grace-period=0")
    assert not bench.get("pod/stuck")


def test_a_lost_node_is_found_out_by_the_real_controllers(bench: Bench) -> None:
    play(bench.kubelet, node_loss())
    bench.pod("a")
    terminating = bench.until(
        "pod/a", lambda pod: "deletionTimestamp" in pod["metadata"], seconds=60
    )
    node = terminating["spec"]["nodeName"]
    assert (
        conditions(terminating)["Ready"]["status"] == "False"
        and terminating["status"]["phase"] == "Running"
    )
    bench.kubelet.recover_node(node)
    bench.plane.kubectl("wait", "--for=delete", "-n", bench.namespace, "pod/a", "--timeout=20s")


def test_what_goes_wrong_in_a_play_is_told(control_plane: ControlPlane, namespace: str) -> None:
    def broken(pod: Pod) -> Play:
        return init_error() if pod.namespace == namespace else hang()

    with (
        pytest.raises(AssertionError, match="no init container"),
        Kubelet(control_plane.kubeconfig) as kubelet,
    ):
        kubelet.script = broken
        Bench(control_plane, namespace, kubelet).pod("a")
        deadline = time.monotonic() + 20
        while not kubelet.errors and time.monotonic() < deadline:
            time.sleep(0.1)


def test_kubeconfig_by_content_and_by_file_is_the_same(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    flat = tmp_path / "kubeconfig"
    flat.write_text(control_plane.kubectl("config", "view", "--flatten"))
    with Kubelet(flat, 1, name="flat"):
        assert "flat-0" in control_plane.kubectl("get", "nodes")
