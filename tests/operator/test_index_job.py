"""The index Job: what it asks for, that nothing is launched before it has ended well, and what
becomes of one that has failed, or that runs for nothing.
"""

from __future__ import annotations

import json
from typing import Any

import podshapes
import pytest
from lab import NAMESPACE, Lab
from podshapes import T0, owned

from modelchain.api.contracts import FailureClass, IndexTask, LastWord
from modelchain.api.reasons import Code
from modelchain.api.status import State
from modelchain.plan.pools import NodePool
from modelchain_operator.api.kube import CHAINS, EVENTS, JOBS, PODS, NotFound, Object
from modelchain_operator.runners import index_job
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS

SHARED = {"spec.storage": {"claimName": "shared"}}
DONE = LastWord(result="Succeeded", fingerprint="f" * 64)


class Indexed(Lab):
    """A lab in which index Jobs end when a test ends them."""

    def __init__(self) -> None:
        super().__init__()
        self.kube.indexes_at_once = False
        self.claim("shared")

    @property
    def index_jobs(self) -> list[str]:
        return [name for name in self.names(JOBS) if name.startswith("mchain-index-")]

    @property
    def job(self) -> Object:
        (name,) = self.index_jobs
        return self.get(JOBS, name)

    @property
    def attempts(self) -> list[str]:
        return self.names(PYTORCHJOBS)

    def pod(self, word: LastWord | None = None, *, code: int | None = None, **more: Any) -> Object:
        """This is the Job's pod from now on: it runs, or has ended with this code and last word."""
        job, since = self.job, self.now - T0
        said = word.model_dump_json(by_alias=True, exclude_none=True) if word else ""
        pod = podshapes.running(created=since)
        if code is not None:
            pod = podshapes.ended(code=code, message=said, created=since, end=since + 1, **more)
        return self.kube.put(PODS, podshapes.of_job(job, pod, f"{job['metadata']['uid']}-x"))

    def fail(self, word: LastWord | None = None, *, reason: str = "BackoffLimitExceeded") -> None:
        """The Job and its pod have failed."""
        self.pod(word, code=1)
        failed = {"type": "Failed", "status": "True", "reason": reason, "message": "as its pods"}
        self.kube.put(JOBS, self.job | {"status": {"conditions": [failed]}})

    def complete(self) -> None:
        done = {"type": "Complete", "status": "True"}
        self.kube.put(JOBS, self.job | {"status": {"conditions": [done]}})

    def retry(self, name: str = "family", token: str = "again") -> None:
        chain = self.get(CHAINS, name)
        chain["metadata"]["annotations"] = {"modelchain.dev/retry": token}
        self.kube.put(CHAINS, chain)


def applied(**changes: Any) -> Indexed:
    """A lab with a chain after its first pass."""
    lab = Indexed()
    lab.apply(**changes)
    lab.passes()
    return lab


def said(failure: FailureClass, message: str) -> LastWord:
    return LastWord(result="Failed", failure=failure, message=message)


# What the Job is.


def test_it_reads_the_data_and_writes_the_index_without_a_gpu() -> None:
    spec = applied().job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["command"] == ["python", "-m", "modelchain_data"]
    mounts = {m["mountPath"]: m.get("readOnly", False) for m in container["volumeMounts"]}
    assert mounts == {"/artifacts": False, "/data": True, "/tmp": False, "/home/modelchain": False}
    claims = {
        v["name"]: v["persistentVolumeClaim"] for v in spec["volumes"] if v["name"] in DATA_VOLUMES
    }
    assert claims["data"] == {"claimName": "data", "readOnly": True}
    assert claims["artifacts"] == {"claimName": "family-artifacts"}
    assert not any("gpu" in name for name in container["resources"]["limits"])
    variables = {v["name"]: v.get("value", "").replace("$$", "$") for v in container["env"]}
    task = IndexTask.model_validate_json(variables["MODELCHAIN_TASK"])
    assert task.data.index == "/artifacts/index" and task.last_word == "/dev/termination-log"


DATA_VOLUMES = ("data", "artifacts")


def test_it_is_the_chains_and_in_no_queue() -> None:
    job = applied(**{"spec.runner.queueName": "vision"}).job
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("ModelChain", "family-chain")
    labels = job["metadata"]["labels"]
    assert labels["modelchain.dev/role"] == "index" and "modelchain.dev/stage" not in labels
    assert not any("kueue" in label for label in labels)
    assert job["spec"]["backoffLimit"] == 2 and job["spec"]["activeDeadlineSeconds"] == 6 * 3600


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ({}, {"memory": "3Gi"}),
        ({"cpu": 96, "memory": "900Gi"}, {"cpu": "16", "memory": "3Gi"}),
        ({"cpu": 2, "memory": "2Gi"}, {"cpu": "2", "memory": "2Gi"}),
        ({"cpu": "500m", "memory": "600Mi"}, {"cpu": "500m", "memory": "600Mi"}),
        ({"cpu": 96, "indexing": {"cpu": 64}}, {"cpu": "64", "memory": "3Gi"}),
        ({"indexing": {"cpu": 4, "memory": "9Gi"}}, {"cpu": "4", "memory": "9Gi"}),
        ({"memory": "8Gi", "indexing": {"memory": "9Gi"}}, {"memory": "8Gi"}),
    ],
)
def test_what_it_asks_for(pool: dict[str, Any], expected: dict[str, str]) -> None:
    """The pool's figures bound it. Its memory is always stated."""
    given = NodePool.model_validate({"gpu": "A100", "gpusPerNode": 8, **pool})
    resources = index_job.resources(given)
    assert resources["limits"] == resources["requests"] == expected


def test_what_its_name_depends_on() -> None:
    """The name covers what the Job reads, where it writes, and the program; and nothing else."""

    def name(**changes: Any) -> str:
        return str(applied(**changes).job["metadata"]["name"])

    plain = name()
    assert plain == name(**{"spec.recipe.learningRate": "0.5", "metadata.name": "family"})
    image = {"image": "registry.example/trainer@sha256:" + "1" * 64, "nodePool": "cpu"}
    others = [
        {"spec.data.train.samples": 1_000_001},
        {"spec.data.train.shards": "/data/other-{000..009}.tar"},
        {"spec.data.train.fingerprint": "f" * 64},
        {"spec.data.volume": {"claimName": "other"}},
        {"spec.storage": {"claimName": "shared"}},
        {"spec.runner": image},
    ]
    names = [name(**changes) for changes in others]
    assert len({plain, *names}) == 1 + len(others)


# Before the first attempt.


def test_nothing_is_launched_before_the_data_is_indexed() -> None:
    lab = applied()
    stage, job = lab.stage(), lab.job["metadata"]["name"]
    assert (stage.state, stage.code, lab.attempts) == (State.INDEXING, Code.INDEXING, [])
    assert stage.reason == f"job {job} indexes and checks the data"
    assert stage.next == f"kubectl logs -f job/{job} -n {NAMESPACE}"
    assert not stage.attempts and stage.attempt_count == 0
    assert lab.status().summary.state == "Indexing"
    assert ("Normal", "StageIndexing") in [event[:2] for event in lab.events.told]
    writes = len(lab.statuses)
    lab.passes(count=3)
    assert len(lab.statuses) == writes and lab.attempts == []
    lab.complete()
    lab.passes()
    assert lab.attempts == ["family-a-a1"]


def test_the_last_word_of_its_pod_is_enough() -> None:
    """A sidecar may keep the Job from completing. Without the Job's pod as owner it is none."""
    lab = applied()
    pod = lab.pod(DONE, code=0)
    pod["status"]["phase"] = "Running"
    forged = pod | {"metadata": pod["metadata"] | {"ownerReferences": []}}
    lab.kube.put(PODS, forged)
    lab.passes()
    assert lab.attempts == []
    lab.kube.put(PODS, pod)
    lab.passes()
    assert lab.attempts == ["family-a-a1"]


def test_a_hit_needs_no_index() -> None:
    lab = applied()
    lab.complete()
    lab.passes()
    lab.finish("family-a-a1")
    lab.passes()
    assert lab.stage().state is State.SUCCEEDED
    lab.drop(JOBS, lab.index_jobs[0])
    lab.apply(**{"spec.evaluation": [], "spec.data.volume": {"claimName": "moved"}})
    lab.passes(count=2)
    assert lab.stage().state is State.SUCCEEDED and lab.index_jobs == []


def test_later_stages_use_the_same_job() -> None:
    lab = applied(stages="ab")
    lab.complete()
    lab.passes()
    made = dict(lab.job["metadata"])
    lab.finish("family-a-a1")
    lab.passes(count=2)
    assert lab.attempts == ["family-a-a1", "family-b-a1"] and lab.job["metadata"] == made


def test_why_it_does_not_start_is_told() -> None:
    lab = applied()
    name, uid = lab.job["metadata"]["name"], lab.job["metadata"]["uid"]
    message = 'pods "x" is forbidden: exceeded quota: cpu'
    told = {"reason": "FailedCreate", "message": f"Error creating: {message}"}
    told |= {
        "involvedObject": {"uid": uid},
        "metadata": {"name": "e"},
        "lastTimestamp": podshapes.at(50),
    }
    lab.kube.put(EVENTS, told)
    lab.now = podshapes.T0 + 100
    lab.passes()
    stage = lab.stage()
    assert stage.stalled and stage.code is Code.PODS_FORBIDDEN and message in stage.message
    lab.drop(EVENTS, "e")
    pod = lab.pod()
    waits = podshapes.unschedulable()["status"]
    lab.kube.put(PODS, pod | {"status": waits})
    lab.now += 60
    lab.passes()
    stage = lab.stage()
    assert (stage.state, stage.code) == (State.INDEXING, Code.UNSCHEDULABLE)
    assert not stage.stalled and f"{name}-x" in stage.next


def test_a_job_of_its_name_that_is_no_operators_is_left_alone() -> None:
    lab = applied()
    name = lab.job["metadata"]["name"]
    lab.kube.put(JOBS, {"metadata": {"name": name, "namespace": NAMESPACE}, "spec": {}})
    lab.passes()
    stage = lab.stage()
    assert stage.stalled and stage.code is Code.NAME_TAKEN and lab.index_jobs == [name]


# One that has failed.


def test_wrong_data_fails_the_stage() -> None:
    lab = applied()
    problem = "spec.data.train.samples: is 10, but the shards hold 9"
    lab.fail(said(FailureClass.USER_ERROR, problem), reason="PodFailurePolicy")
    lab.passes(count=2)
    stage = lab.stage()
    assert (stage.state, stage.code) == (State.FAILED, Code.USER_ERROR)
    assert problem in stage.reason and lab.attempts == [] and stage.retries == 0
    assert lab.status().is_true("Failed")


@pytest.mark.parametrize(
    ("word", "reason", "why"),
    [
        (said(FailureClass.VOLUME_FULL, "no space left"), "", "VolumeFull: no space left"),
        (
            said(FailureClass.PREEMPTED, "stopped"),
            "DeadlineExceeded",
            "not ended after 21600 s",
        ),
        (None, "BackoffLimitExceeded", "left no last word: exit code 1"),
    ],
)
def test_another_failure_stalls_the_stage_until_a_retry(
    word: LastWord | None, reason: str, why: str
) -> None:
    lab = applied()
    first = lab.job["metadata"]["uid"]
    lab.fail(word, reason=reason)
    lab.passes(count=2)
    stage = lab.stage()
    assert stage.stalled and stage.code is Code.INDEX_FAILED and why in stage.message
    assert stage.next == f"modelchain retry family -n {NAMESPACE}"
    assert lab.job["metadata"]["uid"] == first and lab.attempts == []
    lab.retry()
    lab.passes(count=2)
    assert lab.job["metadata"]["uid"] != first and "status" not in lab.job
    assert lab.stage().state is State.INDEXING and not lab.stage().stalled
    lab.complete()
    lab.passes()
    assert lab.attempts == ["family-a-a1"]


def test_out_of_memory_names_the_limit() -> None:
    lab = applied()
    lab.fail()
    name = f"{lab.index_jobs[0]}-x"
    pod = lab.get(PODS, name)
    status = pod["status"]["containerStatuses"][-1]
    status["state"]["terminated"]["reason"] = "OOMKilled"
    lab.kube.put(PODS, pod)
    lab.restart()  # what an operator remembers of the pod is not needed
    lab.passes()
    assert "ran out of memory (limit: " in lab.stage().message
    assert "raise indexing.memory of the node pool" in lab.stage().message


def test_an_edit_makes_it_again_and_a_retry_that_is_removed_does_not() -> None:
    lab = applied(**{"metadata.annotations": {"modelchain.dev/retry": "first"}})
    lab.fail(said(FailureClass.ERROR, "it broke"))
    lab.passes()
    assert lab.stage().stalled
    lab.retry(token="")
    lab.passes(count=2)
    assert lab.stage().stalled and "status" in lab.job
    lab.apply(**{"spec.recipe.learningRate": "0.25"})
    lab.passes(count=2)
    assert "status" not in lab.job and lab.stage().state is State.INDEXING


# Two chains that read the same data.


def together() -> Indexed:
    """Two chains that need the same Job, and the first has made it."""
    lab = applied(**SHARED)
    lab.apply("other", **SHARED, **{"spec.stages[0].rerun": "mine"})
    lab.passes("other")
    return lab


def test_chains_on_one_claim_share_the_job() -> None:
    lab = together()
    stage, job = lab.stage("other"), lab.job["metadata"]
    assert job["labels"]["modelchain.dev/chain"] == "family" and stage.state is State.INDEXING
    assert stage.message == f"job {job['name']} of chain family indexes and checks the same data"
    lab.complete()
    lab.passes("other")
    lab.passes()
    assert lab.attempts == ["family-a-a1", "other-a-a1"]


def test_the_other_chain_makes_it_anew_once_it_is_gone() -> None:
    lab = together()
    lab.drop(CHAINS, "family")
    lab.drop(JOBS, lab.index_jobs[0])  # as Kubernetes deletes it with its chain
    lab.passes("other")
    assert lab.job["metadata"]["labels"]["modelchain.dev/chain"] == "other"


def test_two_chains_do_not_make_a_failing_job_again_in_turn() -> None:
    lab = together()
    lab.fail(said(FailureClass.USER_ERROR, "the shards hold 9"))
    first = lab.job["metadata"]["resourceVersion"]
    for _ in range(3):
        lab.passes("other")
        lab.passes()
    assert lab.job["metadata"]["resourceVersion"] == first
    waits = lab.stage("other")
    assert waits.stalled and waits.state is not State.FAILED
    assert waits.next == f"modelchain retry family -n {NAMESPACE}"
    assert lab.stage().state is State.FAILED
    # Once the chain that made it is retried, edited or gone, either may make it again.
    lab.retry("family")
    lab.passes("other")
    assert lab.job["metadata"]["labels"]["modelchain.dev/chain"] == "other"
    lab.passes()
    assert lab.stage().state is State.INDEXING, "the first one waits for the other's now"


def test_both_make_it_at_once() -> None:
    """Each has read that there is none. The API server takes one, and the other chain waits."""
    lab = Indexed()
    for name in ("family", "other"):
        lab.apply(name, **SHARED, **{"spec.stages[0].rerun": name})
    lab.passes()
    real, calls = lab.kube.get, []

    async def late(resource: Any, namespace: str, name: str) -> Object:
        if name.startswith("mchain-index-") and not calls:
            calls.append(name)
            raise NotFound(name, code=404)
        return await real(resource, namespace, name)

    lab.kube.get = late  # type: ignore[method-assign]
    lab.passes("other")
    assert calls and lab.job["metadata"]["labels"]["modelchain.dev/chain"] == "family"
    assert lab.stage("other").state is State.INDEXING
    assert "of chain family" in lab.stage("other").message


# One that runs for nothing.


def test_a_suspended_chain_makes_none_and_ends_its_own() -> None:
    lab = applied(**{"spec.suspend": True})
    assert lab.index_jobs == [] and lab.stage().state is State.SUSPENDED
    lab.apply()
    lab.passes()
    lab.pod()
    lab.passes()
    assert len(lab.index_jobs) == 1
    lab.apply(**{"spec.suspend": True})
    lab.passes(count=2)
    assert lab.index_jobs == [] and lab.stage().state is State.SUSPENDED


def test_suspension_leaves_another_chains_job() -> None:
    lab = together()
    lab.pod()
    lab.apply("other", **SHARED, **{"spec.suspend": True})
    lab.passes("other", count=2)
    assert len(lab.index_jobs) == 1


def test_an_edit_of_the_data_ends_the_one_before() -> None:
    lab = applied()
    (before,) = lab.index_jobs
    lab.pod()
    lab.apply(**{"spec.data.train.shards": "/data/other-{000..009}.tar"})
    lab.passes(count=2)
    (after,) = lab.index_jobs
    assert after != before


@pytest.mark.parametrize(
    "labels",
    [{}, {"modelchain.dev/chain-uid": "family-chain", "modelchain.dev/role": "verify"}],
    ids=["a user's", "the chain's own verify Job"],
)
def test_a_pod_cannot_name_a_job_to_be_deleted(labels: dict[str, str]) -> None:
    """Everyone who may create pods can write their labels and owners."""
    lab = applied()
    lab.kube.put(JOBS, {"metadata": {"name": "backup", "namespace": NAMESPACE, "labels": labels}})
    pod = lab.pod()
    pod["metadata"] |= {"name": "forged", "uid": "forged"}
    pod["metadata"]["ownerReferences"] = [owned("Job", "backup", "ubackup")]
    lab.kube.put(PODS, pod)
    lab.passes(count=2)
    assert "backup" in lab.names(JOBS)


def test_the_task_is_not_too_large_for_a_pod() -> None:
    """Shards travel as a pattern."""
    lab = applied(**{"spec.data.train.shards": "/data/{000000..099999}.tar"})
    (container,) = lab.job["spec"]["template"]["spec"]["containers"]
    task = next(v["value"] for v in container["env"] if v["name"] == "MODELCHAIN_TASK")
    assert json.loads(task)["data"]["train"]["files"] == "/data/{000000..099999}.tar"
