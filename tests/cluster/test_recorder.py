"""The recorder: each broken promise is told, and what it reads from a real etcd is what
happened.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from controlplane import ControlPlane
from kubelet import Kubelet
from plays import hang
from recorder import ARTIFACTS, JOBS, PODS, History, Recorder
from test_kubelet import task

from modelchain.api.contracts import Predecessor

D1, D2 = "1" * 64, "2" * 64
A, B = "chain-a", "chain-b"


def labels(stage: str, number: int, chain: str = A) -> dict[str, str]:
    values = {
        "chain-uid": chain,
        "chain": "c",
        "stage": stage,
        "attempt": str(number),
        "role": "train",
    }
    return {f"modelchain.dev/{name}": value for name, value in values.items()}


def template(
    stage: str, number: int, predecessor: str | None = None, chain: str = A
) -> dict[str, Any]:
    before = None
    if predecessor:
        before = Predecessor(
            stage="s1", input_digest=D1, artifact_digest=predecessor, path="/predecessors"
        )
    text = task(stage).model_copy(update={"predecessor": before}).model_dump_json(by_alias=True)
    container = {
        "name": "pytorch",
        "image": "trainer",
        "env": [{"name": "MODELCHAIN_TASK", "value": text}],
    }
    meta = {
        "labels": labels(stage, number, chain),
        "annotations": {"modelchain.dev/input-digest": D1},
    }
    return {"metadata": meta, "spec": {"containers": [container]}}


def job(
    stage: str,
    number: int,
    *,
    uid: str = "u",
    suspend: bool = False,
    ended: str | None = None,
    digest: str = D1,
    predecessor: str | None = None,
    released: bool = False,
) -> bytes:
    told = {"modelchain.dev/released": "2026-01-01T00:00:00Z"} if released else {}
    annotations = {"modelchain.dev/input-digest": digest} | told
    meta = {"uid": uid, "labels": labels(stage, number), "annotations": annotations}
    replica = {
        "replicas": 1,
        "restartPolicy": "Never",
        "template": template(stage, number, predecessor),
    }
    conditions = [{"type": ended, "status": "True"}] if ended else []
    spec = {"runPolicy": {"suspend": suspend}, "pytorchReplicaSpecs": {"Master": replica}}
    return json.dumps(
        {"metadata": meta, "spec": spec, "status": {"conditions": conditions}}
    ).encode()


def artifact(inputs: str, weights: str) -> bytes:
    return json.dumps({"spec": {"inputDigest": inputs, "artifactDigest": weights}}).encode()


S1, S2, SART = f"{JOBS}ns/c-s1-a1", f"{JOBS}ns/c-s2-a1", f"{ARTIFACTS}ns/sa-1"


def test_a_run_as_it_should_be() -> None:
    history = History()
    history.put(1, S1, job("s1", 1, suspend=True))
    history.put(2, S1, job("s1", 1))
    history.put(3, S1, job("s1", 1, ended="Failed"))
    history.put(4, f"{JOBS}ns/c-s1-a2", job("s1", 2, uid="v"))
    history.put(5, f"{JOBS}ns/c-s1-a2", job("s1", 2, uid="v", ended="Succeeded"))
    history.put(6, SART, artifact(D1, "w"))
    history.put(7, S2, job("s2", 1, uid="w", suspend=True, digest=D2, predecessor="w"), at=9.0)
    history.put(8, S2, job("s2", 1, uid="w", digest=D2, predecessor="w"), at=9.5)
    assert history.violations == []
    assert (history.created["w"], history.released["w"]) == (9.0, 9.5)


def test_two_live_attempts_of_a_chain_are_told_once() -> None:
    history = History()
    history.put(1, S1, job("s1", 1))
    history.put(2, S2, job("s2", 1, uid="v", suspend=True))
    assert history.violations == []
    history.put(3, S2, job("s2", 1, uid="v"))
    history.put(4, S2, job("s2", 1, uid="v"))
    assert (
        len(history.violations) == 1
        and "revision 3: chain chain-a has 2 live attempts" in history.violations[0]
    )
    history.delete(5, S1)
    history.put(6, S2, job("s2", 1, uid="v"))
    assert len(history.violations) == 1


def test_a_launch_after_a_success_unless_its_record_was_deleted() -> None:
    history = History()
    history.put(1, SART, artifact(D1, "w"))
    history.put(2, S1, job("s1", 1, suspend=True))
    assert history.violations == []
    history.put(3, S1, job("s1", 1))
    assert ["released after the artifact" in v for v in history.violations] == [True]
    history.put(4, f"{JOBS}ns/c-s9-a1", job("s9", 1, uid="q", suspend=True, released=True))
    assert len(history.violations) == 2, "one that waits in a queue is released, too"
    history.put(5, f"{JOBS}elsewhere/c-s1-a1", job("s1", 1, uid="u"))
    history.delete(6, SART)
    history.put(7, S1, job("s1", 1, ended="Failed"))
    history.put(8, f"{JOBS}ns/c-s1-a3", job("s1", 3, uid="z", suspend=True))
    assert len(history.violations) == 2


def test_a_successor_before_its_predecessor_is_recorded() -> None:
    history = History()
    history.put(1, SART, artifact(D1, "other weights"))
    history.put(2, S2, job("s2", 1, suspend=True, digest=D2, predecessor="w"))
    assert ["before a StageArtifact of its predecessor w" in v for v in history.violations] == [
        True
    ]


def test_a_number_that_comes_back() -> None:
    history = History()
    history.put(1, S1, job("s1", 1, suspend=True))
    history.delete(2, S1)
    history.put(3, S1, job("s1", 1, uid="v"))
    assert history.violations == [], "the first was never released"
    history.delete(4, S1)
    history.put(5, S1, job("s1", 1, uid="w", suspend=True))
    assert ["has the number of another job" in v for v in history.violations] == [True]
    history.put(6, S1, job("s1", 1, uid="w"))
    assert ["released, and another one" in v for v in history.violations] == [False, True]


def test_a_creation_that_a_test_held_back_may_come_late_but_is_not_released() -> None:
    history = History(late={"c-s1-a1"})
    history.put(1, S1, job("s1", 1))
    history.delete(2, S1)
    history.put(3, S1, job("s1", 1, uid="w", suspend=True))
    assert history.violations == []
    history.put(4, S1, job("s1", 1, uid="w"))
    assert ["released, and another one" in v for v in history.violations] == [True]


def test_objects_of_others_are_none_of_ours() -> None:
    history = History()
    history.put(
        1, S1, json.dumps({"metadata": {"uid": "x"}, "spec": {"pytorchReplicaSpecs": {}}}).encode()
    )
    history.delete(2, S1)
    history.delete(3, f"{PODS}ns/never-seen")
    assert history.violations == [] and history.created == {}


@pytest.fixture
def recorder(control_plane: ControlPlane) -> Iterator[Recorder]:
    with Recorder(control_plane.etcd) as recorder:
        yield recorder


def apply(
    plane: ControlPlane,
    namespace: str,
    name: str,
    stage: str,
    number: int,
    chain: str,
    **template_of: Any,
) -> None:
    replica = {
        "replicas": 1,
        "restartPolicy": "Never",
        "template": template(stage, number, chain=chain, **template_of),
    }
    spec = {"runPolicy": {"cleanPodPolicy": "None"}, "pytorchReplicaSpecs": {"Master": replica}}
    meta = {
        "name": name,
        "labels": labels(stage, number, chain),
        "annotations": {"modelchain.dev/input-digest": D1},
    }
    body = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": meta, "spec": spec}
    plane.kubectl("create", "-n", namespace, "-f", "-", input=json.dumps(body))


def wait(plane: ControlPlane, namespace: str, what: str, condition: str) -> None:
    plane.kubectl("wait", "-n", namespace, what, f"--for={condition}", "--timeout=40s")


def test_real_jobs_and_pods_are_read_from_etcd(
    control_plane: ControlPlane, namespace: str, recorder: Recorder
) -> None:
    with Kubelet(control_plane.kubeconfig) as kubelet:
        kubelet.script = lambda pod: hang() if pod.namespace == namespace else None
        kubelet.stop_delay = 5
        apply(control_plane, namespace, "c-s1-a1", "s1", 1, A)
        control_plane.kubectl(
            "wait", "-n", namespace, "--for=create", "pod/c-s1-a1-master-0", "--timeout=40s"
        )
        wait(control_plane, namespace, "pod/c-s1-a1-master-0", "jsonpath={.status.phase}=Running")
        recorder.verify()
        # Background deletion: the job goes at once, its pod in five seconds. It is still alive.
        control_plane.kubectl("delete", "-n", namespace, "pytorchjob", "c-s1-a1", "--wait=false")
        wait(control_plane, namespace, "pytorchjob/c-s1-a1", "delete")
        apply(control_plane, namespace, "c-s1-a2", "s1", 2, A)
        with pytest.raises(AssertionError, match=r"2 live attempts.*c-s1-a1-master-0"):
            recorder.verify()
        wait(control_plane, namespace, "pod/c-s1-a1-master-0", "delete")
        assert any("c-s1-a2" in key for key in recorder.orphans(A))
        control_plane.kubectl("delete", "-n", namespace, "pytorchjob", "c-s1-a2")
        deadline = time.monotonic() + 40
        while left := recorder.orphans(A):
            assert time.monotonic() < deadline, left


def test_hand_overs_are_timed_and_a_restart_of_etcd_loses_nothing(
    control_plane: ControlPlane, namespace: str, recorder: Recorder
) -> None:
    with Kubelet(control_plane.kubeconfig):
        apply(control_plane, namespace, "d-s1-a1", "s1", 1, B)
        wait(control_plane, namespace, "pytorchjob/d-s1-a1", "condition=Succeeded")
        control_plane.restart("etcd")
        apply(control_plane, namespace, "d-s2-a1", "s2", 1, B, predecessor="w")
    history = recorder.catch_up()
    assert (
        len(history.violations) == 1
        and "d-s2-a1 was made before a StageArtifact" in history.violations[0]
    )
    assert (B, "s1", "1") in history.ended and len(history.jobs_of[B]) == 2
    assert [0 < seconds < 60 for seconds in history.handovers(B)] == [True]
