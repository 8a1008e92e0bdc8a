"""A pod is evidence only if the attempt's own job has made it. Anyone who may create pods can copy
labels.
"""

from __future__ import annotations

import pytest
from jobrequests import request
from podshapes import Pod, ended, made_for, owned, running, word
from stagelife import FIRST, Life, beside_a_sidecar, launched

from modelchain.api.contracts import FailureClass
from modelchain.api.status import State
from modelchain_operator.api.kube import JOBS, PODS
from modelchain_operator.runners.pytorchjob import PyTorchJob

SUCCESS = word("Succeeded", steps=1, macs=1)


def copied(life: Life, pod: Pod, **meta: object) -> Pod:
    """A pod with the labels of the job's own, as `kubectl debug --copy-to --keep-labels` makes."""
    copy = made_for(life.job(), pod)
    del copy["metadata"]["ownerReferences"]
    copy["metadata"] |= {"name": "copy", "uid": "copy", **meta}
    return life.kube.put(PODS, copy)


def adopted(life: Life) -> dict[str, object]:
    """The job's controller becomes the owner of each pod that has the labels of its own."""
    return {"ownerReferences": [owned("PyTorchJob", FIRST, life.job()["metadata"]["uid"])]}


OTHERS = {
    "another job": {"ownerReferences": [owned("PyTorchJob", FIRST, "another-uid")]},
    "a Deployment": {"ownerReferences": [owned("ReplicaSet", FIRST, "uid")]},
    "none": {},
}


@pytest.mark.parametrize("owner", [*OTHERS, "adopted"])
def test_a_copy_with_a_forged_last_word_is_no_evidence(owner: str) -> None:
    life = launched()
    copied(life, ended(code=0, message=SUCCESS), **OTHERS.get(owner) or {})
    if owner == "adopted":
        copied(life, ended(code=0, message=SUCCESS), **adopted(life))
    life.end_job("Failed")
    stage = life.look(120)
    assert life.records == [] and stage.attempts[0].failure is FailureClass.UNKNOWN


@pytest.mark.parametrize("owner", [*OTHERS, "adopted"])
def test_a_copy_that_lives_keeps_no_attempt_open_and_blocks_no_launch(owner: str) -> None:
    life = launched()
    life.pods(ended(code=0, message=SUCCESS, end=100))
    more = adopted(life) if owner == "adopted" else OTHERS[owner]
    if owner == "another job":
        more = {}  # such a pod may be an earlier job's; see below
    copied(life, running(), **more)
    life.end_job("Succeeded")
    assert life.look(120).state is State.SUCCEEDED
    assert life.look().gpu_seconds == 100 * 8 and life.jobs == ["vit-vit-s-a1", FIRST]


def test_a_copys_labels_choose_no_number() -> None:
    life = Life()
    job = PyTorchJob().build(request(chain="vit", stage="vit-t", name=FIRST))
    job["metadata"] |= {"uid": "u", "labels": job["metadata"]["labels"] | {
        "modelchain.dev/chain-uid": "c" * 36
    }}  # fmt: skip
    for number in ("998", "many"):
        copy = made_for(job, running())
        copy["metadata"]["labels"]["modelchain.dev/attempt"] = number
        copy["metadata"] |= {"name": f"copy-{number}", "uid": number, "ownerReferences": []}
        life.kube.put(PODS, copy)
    life.look()
    assert life.jobs == [FIRST]


def test_a_pod_of_an_earlier_job_of_the_same_name_is_live_and_no_evidence() -> None:
    """The status was lost, and the job deleted in the background. Its pod still trains."""
    life = launched()
    life.pods(running())
    del life.kube.objects["pytorchjobs", FIRST]
    life.edit(1, status={})
    life.restart()
    stage = life.look(20)
    assert life.jobs == [] and "waits for an earlier attempt to stop" in stage.reason
    assert stage.attempt_count == 1


def test_a_pod_whose_owner_a_user_takes_away_still_counts() -> None:
    """`kubectl delete --cascade=orphan` leaves the pod to train. Nothing else may start."""
    life = launched()
    life.pods(running())
    life.look(20)
    orphan = life.kube.objects[PODS.plural, f"{FIRST}-master-0"]
    orphan["metadata"]["ownerReferences"] = []
    del life.kube.objects["pytorchjobs", FIRST]
    assert life.look(20).attempts[0].finished_at is None and life.jobs == []
    orphan |= {"status": ended(code=0, message=SUCCESS)["status"]}
    assert life.look(200).state is State.SUCCEEDED


def test_a_copy_of_a_verify_pod_answers_nothing() -> None:
    life = launched()
    life.pods(beside_a_sidecar(ended(code=0)))
    life.look(120)
    job = life.kube.objects[JOBS.plural, f"{FIRST}-verify"]
    copy = ended(code=0, message=SUCCESS)
    copy["metadata"] |= {"name": "copy", "uid": "copy", "labels": job["metadata"]["labels"]}
    del copy["metadata"]["ownerReferences"]
    life.kube.put(PODS, copy)
    assert life.look(20).state is State.VERIFYING and life.records == []


def test_which_job_has_made_a_pod() -> None:
    runner, pod = PyTorchJob(), running(1)
    assert runner.job_uid(pod) == "job-uid"
    for change in (
        {"ownerReferences": []},
        {"ownerReferences": [owned("Job", "vit-b-a1", "job-uid")]},
        {"ownerReferences": [owned("PyTorchJob", "vit-b-a1", "u") | {"controller": False}]},
        {"name": "copy"},
    ):
        assert runner.job_uid({**pod, "metadata": {**pod["metadata"], **change}}) is None
    assert runner.nodes(runner.build(request(nodes=1))) == 1
    assert runner.nodes(runner.build(request(nodes=4))) == 4
