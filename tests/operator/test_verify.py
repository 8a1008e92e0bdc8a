"""The verify Job: it only reads, requests no GPU and no queue, and its pods' answer is found."""

from __future__ import annotations

from typing import Any

from jobrequests import request
from podshapes import ended, running, word

from modelchain.api.contracts import FailureClass
from modelchain.plan.pools import NodePool
from modelchain_operator.runners import cpu_job, verify


def built(**changes: Any) -> dict[str, Any]:
    return verify.build(request(**changes))


def test_it_reads_the_artifacts_and_nothing_else() -> None:
    spec = built()["spec"]["template"]["spec"]
    [container] = spec["containers"]
    assert container["command"] == ["python", "-m", "modelchain_trainer", "verify"]
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    assert (
        mounts.keys() == {"/artifacts", "/tmp", "/home/modelchain"}
        and mounts["/artifacts"]["readOnly"]
    )
    [claim] = [v["persistentVolumeClaim"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
    assert claim == {"claimName": "vit-artifacts", "readOnly": True}
    assert spec["restartPolicy"] == "Never"


def test_it_runs_anywhere_without_gpus_or_a_queue() -> None:
    pool = NodePool.model_validate(
        {"gpu": "A100", "gpusPerNode": 8, "nodeSelector": {"a": "b"}, "memory": "900Gi"}
    )
    job = built(pool=pool, nodes=4)
    spec = job["spec"]["template"]["spec"]
    assert "nodeSelector" not in spec and spec["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists"}
    ]
    assert spec["containers"][0]["resources"]["limits"] == {"memory": "16Gi"}
    assert not any("kueue" in label for label in job["metadata"]["labels"])


def test_the_name_and_labels_of_a_verify_job() -> None:
    job = built()
    assert job["metadata"]["name"] == verify.name("vit-b-a1") == "vit-b-a1-verify"
    for labels in (job["metadata"]["labels"], job["spec"]["template"]["metadata"]["labels"]):
        assert labels["modelchain.dev/role"] == "verify" and labels["modelchain.dev/attempt"] == "1"
    assert job["metadata"]["ownerReferences"][0]["uid"] == "11111111-2222-3333-4444-555555555555"


def test_a_disruption_of_its_pod_does_not_count_as_a_failure() -> None:
    spec = built()["spec"]
    drained, stopped, wrong = spec["podFailurePolicy"]["rules"]
    assert drained == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    for rule, action, code in ((stopped, "Ignore", 75), (wrong, "FailJob", 2)):
        on_exit = {"containerName": "verify", "operator": "In", "values": [code]}
        assert rule == {"action": action, "onExitCodes": on_exit}
    assert spec["backoffLimit"] == 2


def test_the_newest_answer_counts() -> None:
    absent = ended(0, message=word("Failed", "NoArtifact", "there is none"), end=50)
    silent = ended(0, end=80, created=60)
    there = ended(0, code=0, message=word("Succeeded"), end=90, created=70)
    assert verify.answer([running()]) is None and verify.answer([silent]) is None
    found = verify.answer([silent, absent])
    assert found and found.failure is FailureClass.NO_ARTIFACT
    found = verify.answer([there, absent, silent])
    assert found and found.result == "Succeeded"


def test_when_a_verify_job_has_finished() -> None:
    def job(kind: str, status: str) -> dict[str, Any]:
        return {"status": {"conditions": [{"type": kind, "status": status}]}}

    assert cpu_job.finished(job("Complete", "True")) and cpu_job.finished(job("Failed", "True"))
    assert not cpu_job.finished(job("Failed", "False")) and not cpu_job.finished(
        job("FailureTarget", "True")
    )
    assert not cpu_job.finished({})
