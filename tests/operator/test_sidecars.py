"""Pods with more containers than ours: webhooks add sidecars, which outlive the trainer."""

from __future__ import annotations

from typing import Any

import pytest
from podshapes import Pod, at, deleted, ended, running, unschedulable, word
from stagelife import FIRST, beside_a_sidecar, launched

from modelchain.api.contracts import FailureClass
from modelchain.api.reasons import Code
from modelchain.api.status import State
from modelchain_operator.api.kube import JOBS, PODS

DONE = word("Succeeded", steps=100, macs=10**15, metrics={"top1": 30.5})
SECOND = "vit-vit-s-a1"


def done(rank: int = 0, message: str = DONE) -> Pod:
    return beside_a_sidecar(ended(rank, code=0, message=message if rank == 0 else ""))


def broken(failure: str = "Error", **more: Any) -> Pod:
    return beside_a_sidecar(ended(message=word("Failed", failure, "it broke", **more)))


def native(pod: Pod, **state: Any) -> Pod:
    """The pod with Istio's proxy as a native sidecar: an init container that is restarted."""
    proxy = {"name": "istio-proxy", "image": "istio"}
    pod["spec"]["initContainers"] = [proxy | {"restartPolicy": "Always"}]
    pod["status"]["initContainerStatuses"] = [proxy | {"state": state}]
    ours = [s for s in pod["status"].get("containerStatuses", []) if s["name"] == "pytorch"]
    pod["status"]["containerStatuses"] = ours
    return pod


def exited(code: int) -> dict[str, Any]:
    return {"exitCode": code, "reason": "Error", "startedAt": at(1), "finishedAt": at(130)}


# -- the trainer has ended and a sidecar has not ---------------------------------------------------


def test_a_stage_succeeds_beside_a_sidecar() -> None:
    """The record comes first. The job is deleted a minute later, and then the next stage begins."""
    life = launched()
    life.pods(running())
    life.look(50)
    life.pods(done())
    stage = life.look(60)
    assert stage.state is State.SUCCEEDED and stage.results == {"top1": "30.50"}
    assert [a.state for a in stage.attempts] == [State.SUCCEEDED] and stage.gpu_seconds == 100 * 8
    assert len(life.records) == 1 and life.jobs == [FIRST]
    assert "waits for an earlier attempt to stop" in life.status.stages[1].reason
    life.look(59)
    assert life.jobs == [FIRST], "the sidecar has a minute to end by itself"
    life.look(2, passes=1)
    assert life.jobs == [], "deleted, and nothing launched in its place before its pod is gone"
    life.look(30)
    assert life.jobs == [] and life.status.stages[1].attempts == []
    life.pods()
    life.look()
    assert life.jobs == [SECOND] and life.status.stages[0].gpu_seconds == 100 * 8


def test_a_last_stage_succeeds_beside_a_sidecar() -> None:
    """The chain is complete at once. Its passes go on until the job is gone."""
    life = launched(**{"spec.stages[1]": {"name": "vit-s", "model": "ViT-S-16", "epochs": 20}})
    thing = life.kube.objects["modelchains", "vit"]
    thing["spec"]["stages"] = thing["spec"]["stages"][:1]
    thing["metadata"]["generation"] = 2
    life.pods(done())
    life.look(120)
    assert life.status.is_true("Complete") and life.jobs == [FIRST]
    life.look(61)
    assert life.jobs == []
    life.pods()
    before = life.status
    life.look(600)
    assert life.status == before, "nothing more is written"


@pytest.mark.parametrize("failure", ["Error", "NonFinite", "VolumeFull", "Hardware", "UserError"])
def test_a_stage_fails_beside_a_sidecar(failure: str) -> None:
    """The attempt is closed with the trainer's class; its job is deleted a minute later."""
    life = launched()
    life.pods(running())
    life.look(50)
    life.pods(broken(failure))
    stage = life.look(60)
    assert [a.failure for a in stage.attempts] == [FailureClass(failure)]
    assert stage.attempts[0].finished_at and life.jobs == [FIRST]
    assert stage.code is Code(failure), "it says why it failed while its pod ends"
    life.look(61)
    assert life.jobs == [] and len(life.status.stages[0].attempts) == 1
    life.pods()
    life.look(30)
    assert life.jobs == ([] if failure == "UserError" else ["vit-vit-t-a2"])


def test_no_time_is_charged_and_no_deadline_passes_while_a_sidecar_runs_on() -> None:
    limits = {"startSeconds": 15, "stallSeconds": 15, "stageSeconds": 120}
    life = launched(**{"spec.deadlines": limits})
    life.pods(done(), job=FIRST)
    stage = life.look(10_000)
    assert stage.state is State.SUCCEEDED and stage.gpu_seconds == 100 * 8
    assert (stage.retries, stage.disruptions) == (0, 0)


def test_a_last_word_that_is_missing_is_verified_before_the_job_is_deleted() -> None:
    life = launched()
    life.pods(done(message=""))
    assert life.look(120).state is State.VERIFYING
    assert (JOBS.plural, f"{FIRST}-verify") in life.kube.objects
    life.edit(**{"spec.suspend": True})
    life.look(600)
    assert life.jobs == [FIRST], "a suspension does not delete it either"
    life.edit(3, **{"spec.suspend": False})
    life.verify_pod(ended(code=0, message=DONE))
    assert life.look().state is State.SUCCEEDED and life.jobs == [FIRST]
    life.look(61)
    assert life.jobs == []


def test_a_verify_job_beside_a_sidecar_without_an_answer() -> None:
    """The Job never ends, since its sidecar runs on. It has not answered all the same."""
    life = launched()
    life.pods(done(message=""))
    life.look(120)
    life.verify_pod(beside_a_sidecar(ended(code=1)))
    stage = life.look()
    assert stage.stalled and stage.code is Code.VERIFY_UNANSWERED and life.jobs == [FIRST]


@pytest.mark.parametrize("message", [DONE, ""])
def test_a_sidecars_exit_code_is_no_failure(message: str) -> None:
    """The pod and the job have failed, for the sidecar's code; the trainer has not."""
    life = launched()
    pod = ended(code=0, message=message)
    pod["status"]["phase"] = "Failed"
    life.pods(pod)
    life.end_job("Failed")
    stage = life.look(120)
    assert stage.state is (State.SUCCEEDED if message else State.VERIFYING)
    assert (stage.retries, stage.disruptions) == (0, 0)


def test_a_gang_has_ended_once_all_its_trainers_have() -> None:
    life = launched(nodes=2)
    life.pods(done(), running(1))
    assert life.look(120).state is not State.SUCCEEDED and life.records == []
    life.pods(done(), done(1))
    assert life.look(1).state is State.SUCCEEDED


def test_a_gang_of_which_one_trainer_failed_and_another_never_started() -> None:
    """Without the sidecar the job would have failed. The pod that waits holds up nothing."""
    life = launched(nodes=2)
    life.pods(broken(), unschedulable(1))
    assert life.look(120).attempts[0].failure is FailureClass.ERROR


def test_an_eviction_by_the_queue_is_no_end() -> None:
    """The pods end because the job is suspended, which a pass may not have seen yet."""
    life = launched()
    life.pods(deleted(broken("Preempted"), grace_over=500))
    stage = life.look(120)
    assert stage.attempts[0].finished_at is None
    life.suspend_job(True)
    assert life.look().attempts[0].finished_at is None


def test_a_job_that_cannot_end_although_its_pods_have() -> None:
    """Its controller stops at a Service that is refused, so it never says that it succeeded."""
    life = launched()
    life.pods(ended(code=0, message=DONE, end=100))
    life.look(105)
    assert life.records == [], "a job normally ends a moment after its pods"
    assert life.look(10).state is State.SUCCEEDED and life.jobs == [FIRST]
    life.look(61)
    assert life.jobs == [SECOND]


def test_an_operator_that_starts_while_a_sidecar_runs_on() -> None:
    life = launched()
    life.pods(done())
    life.look(120)
    life.restart()
    life.look(61)
    assert life.jobs == []


# -- native sidecars -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 137, 143])
@pytest.mark.parametrize("failure", ["Error", "NonFinite", "Data", "Preempted", None])
def test_a_native_sidecars_exit_code_is_no_failure(code: int, failure: str | None) -> None:
    message = word("Failed", failure) if failure else ""
    life = launched()
    life.pods(native(ended(message=message), terminated=exited(code)))
    life.end_job("Failed")
    assert life.look(120).attempts[0].failure is FailureClass(failure or "Unknown")


def test_a_native_sidecar_is_no_wait_for_rank_0() -> None:
    life = launched()
    pod = running()
    pod["status"]["phase"] = "Pending"
    pod["status"]["containerStatuses"][1]["state"] = {"waiting": {"reason": "PodInitializing"}}
    life.pods(native(pod, running={"startedAt": at(1)}))
    stage = life.look(20)
    assert stage.code is Code.STARTING and "rank 0" not in stage.reason
    assert "its node pulls the image and mounts volumes" in stage.reason


def test_only_init_pytorch_waits_for_rank_0() -> None:
    """Another init container that fails is told by name. Rank 0's pod has nothing to do with it."""
    life = launched()
    pod = native(running(), terminated=exited(255))
    del pod["status"]["containerStatuses"][0]["state"]["running"]
    pod["status"]["phase"] = "Failed"
    pod["spec"]["initContainers"] = [{"name": "istio-proxy", "image": "istio"}]
    life.pods(pod)
    life.end_job("Failed")
    attempt = life.look(20).attempts[0]
    assert attempt.failure is FailureClass.UNKNOWN and "rank 0" not in attempt.message
    assert "init container istio-proxy" in attempt.message and "255" in attempt.message
    assert f"kubectl logs {FIRST}-master-0 -c istio-proxy -n team" in attempt.message


def test_a_sidecars_image_is_not_the_runners() -> None:
    """It cannot be corrected in the spec, so the attempt waits until the deadline of its start."""
    life = launched()
    pod = running()
    pod["status"]["phase"] = "Pending"
    proxy, ours = pod["status"]["containerStatuses"]
    proxy["state"] = {"waiting": {"reason": "ErrImagePull", "message": "istio: not found"}}
    ours["state"] = {"waiting": {"reason": "ContainerCreating"}}
    life.pods(pod)
    stage = life.look(20)
    assert stage.code is Code.IMAGE and "image istio of container istio-proxy" in stage.reason
    assert "runner.image" not in stage.reason and stage.attempts[0].ending is None


def test_remembered_pods_keep_what_tells_a_sidecar() -> None:
    life = launched()
    life.pods(native(ended(message=word("Failed", "NonFinite")), terminated=exited(143)))
    life.look(20)
    del life.kube.objects[PODS.plural, f"{FIRST}-master-0"]
    life.end_job("Failed")
    assert life.look(20).attempts[0].failure is FailureClass.NON_FINITE
