"""Evaluations that are added later: the Job that measures them, what becomes of it, and the record
that keeps the metrics.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import podshapes
import pytest
from lab import NAMESPACE, Lab, success
from podshapes import T0, owned

from modelchain.api.contracts import EvaluationTask, FailureClass, LastWord
from modelchain.api.reasons import Code
from modelchain.api.spec import Evaluation
from modelchain.api.status import State, Unmeasured
from modelchain.identity.digest import short_key
from modelchain.plan.pools import NodePool, PoolFile
from modelchain_operator.api.kube import (
    ARTIFACTS,
    CHAINS,
    EVENTS,
    JOBS,
    PODS,
    Conflict,
    Forbidden,
    Object,
)
from modelchain_operator.runners import cpu_job, evaluation_job
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS

FOOD = {"name": "food", "kind": "Retrieval", "shards": "/data/food.tar"}
CARS = {"name": "cars", "kind": "Retrieval", "shards": "/data/cars.tar"}
ASKS_FOOD = {"spec.evaluation": [FOOD]}
ASKS_BOTH = {"spec.evaluation": [FOOD, CARS]}
SHARED = {"spec.storage": {"claimName": "shared"}}
STOPPED = LastWord(result="Failed", failure=FailureClass.PREEMPTED, message="stopped")


def key(evaluation: dict[str, str]) -> str:
    return short_key(Evaluation.model_validate(evaluation))


class Measuring(Lab):
    """A lab in which pods of evaluation Jobs end on command."""

    @property
    def measuring(self) -> list[str]:
        return [name for name in self.names(JOBS) if "-eval-" in name]

    @property
    def job(self) -> Object:
        (name,) = self.measuring
        return self.get(JOBS, name)

    def train(self, name: str = "family", *evaluations: dict[str, str], **changes: Any) -> None:
        """The chain is trained, and its trainers measure these evaluations."""
        self.apply(name, **changes)
        self.passes(name)
        word = success().model_copy(
            update={
                "metrics": {one["name"]: 61.0 for one in evaluations},
                "evaluations": {one["name"]: key(one) for one in evaluations},
                "pictures": {one["name"]: 25_250 for one in evaluations},
            }
        )
        self.end(f"{name}-a-a1", word)
        self.passes(name, 2)
        assert self.status(name).is_true("Complete")

    def pod(self, word: LastWord | None = None, *, code: int | None = 0, **more: Any) -> Object:
        """The Job's pod has ended with this code and last word; with None it runs."""
        job, since = self.job, self.now - T0
        said = word.model_dump_json(by_alias=True, exclude_none=True) if word else ""
        pod = podshapes.running(created=since)
        if code is not None:
            pod = podshapes.ended(code=code, message=said, created=since, end=since + 1, **more)
        self.now += 60
        return self.kube.put(
            PODS, podshapes.of_job(job, pod, f"{job['metadata']['uid']}-x-{since}")
        )

    def measure(self, pictures: int | None = None, **metrics: float) -> None:
        counts = {name: pictures for name in metrics if "/" not in name and pictures}
        self.pod(LastWord(result="Succeeded", metrics=metrics, pictures=counts))

    def fail(self, word: LastWord | None = None, **more: Any) -> None:
        """The Job and its pod have failed."""
        self.pod(word, code=1, **more)
        failed = {"type": "Failed", "status": "True", "reason": "x", "message": "as its pods"}
        self.kube.put(JOBS, self.job | {"status": {"conditions": [failed]}})

    def collect(self) -> None:
        """Kubernetes deletes the pods of Jobs that are gone."""
        for name in self.names(PODS):
            (owner,) = self.get(PODS, name)["metadata"]["ownerReferences"]
            if owner["kind"] == "Job" and owner["name"] not in self.names(JOBS):
                self.drop(PODS, name)

    def retry(self, token: str = "again") -> None:
        chain = self.get(CHAINS, "family")
        chain["metadata"]["annotations"] = {"modelchain.dev/retry": token}
        self.kube.put(CHAINS, chain)

    @property
    def entry(self) -> Unmeasured:
        (one,) = self.stage().unmeasured
        return one


def edited() -> Measuring:
    """A chain that was trained with one evaluation, and then got another one."""
    lab = Measuring()
    lab.train("family", FOOD, **ASKS_FOOD)
    assert lab.measuring == []
    lab.apply(**ASKS_BOTH)
    lab.passes(count=2)
    return lab


# What the Job is.


def test_it_reads_artifact_and_data_without_a_gpu_or_a_queue() -> None:
    job = edited().job
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["command"] == ["python", "-m", "modelchain_trainer", "evaluate"]
    mounts = {m["mountPath"]: m.get("readOnly", False) for m in container["volumeMounts"]}
    assert mounts == {"/artifacts": True, "/data": True, "/tmp": False, "/home/modelchain": False}
    claims = [v["persistentVolumeClaim"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [
        {"claimName": "family-artifacts", "readOnly": True},
        {"claimName": "data", "readOnly": True},
    ]
    labels = job["metadata"]["labels"]
    assert labels["modelchain.dev/role"] == "evaluate" and labels["modelchain.dev/stage"] == "a"
    assert not any("kueue" in label for label in labels)
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("ModelChain", "family-chain")


def test_its_task_names_the_artifact_and_one_evaluation() -> None:
    lab = edited()
    (container,) = lab.job["spec"]["template"]["spec"]["containers"]
    variables = {v["name"]: v.get("value", "").replace("$$", "$") for v in container["env"]}
    task = EvaluationTask.model_validate_json(variables["MODELCHAIN_TASK"])
    (record,) = lab.records()
    assert task.artifact == f"/artifacts/{record['spec']['path']}"
    assert task.artifact_digest == record["spec"]["artifactDigest"]
    assert task.names == ["cars"] and [e.name for e in task.data.evaluation] == ["food", "cars"]
    assert task.data.index == "/tmp/index", "the artifacts cannot be written to"
    assert task.device == "cpu" and task.last_word == "/dev/termination-log"


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ({}, {}),
        ({"cpu": 96, "memory": "900Gi"}, {"cpu": "16", "memory": "64Gi"}),
        ({"cpu": 2, "memory": "2Gi"}, {"cpu": "2", "memory": "2Gi"}),
    ],
)
def test_what_it_asks_for(pool: dict[str, Any], expected: dict[str, str]) -> None:
    given = NodePool.model_validate({"gpu": "A100", "gpusPerNode": 8, **pool})
    assert cpu_job.resources(given, evaluation_job.MOST).get("limits", {}) == expected


@pytest.mark.parametrize(("pool", "seconds"), [({}, 86400), ({"deadlineSeconds": 600}, 600)])
def test_it_has_a_deadline(pool: dict[str, Any], seconds: int) -> None:
    given = {"gpu": "CPU", "gpusPerNode": 0, "evaluating": pool}
    lab = Measuring(PoolFile.model_validate({"nodePools": {"cpu": given}}))
    lab.train("family", FOOD, **ASKS_FOOD)
    lab.apply(**ASKS_BOTH)
    lab.passes(count=2)
    assert lab.job["spec"]["activeDeadlineSeconds"] == seconds


# A metric that was not measured.


def test_an_added_evaluation_is_measured_without_training() -> None:
    lab = edited()
    assert lab.names(PYTORCHJOBS) == ["family-a-a1"]
    status, name = lab.status(), lab.job["metadata"]["name"]
    assert status.is_true("Complete") and status.summary.state == "Complete"
    assert (lab.entry.evaluation, lab.entry.code) == ("cars", Code.MEASURING)
    assert lab.entry.next == f"kubectl logs -f job/{name} -n {NAMESPACE}"
    writes = len(lab.statuses)
    lab.pod(code=None)
    lab.passes(count=3)
    assert len(lab.statuses) == writes and lab.job["metadata"]["name"] == name
    lab.measure(8041, **{"cars": 7.125, "cars/text-to-image-r1": 3.0})
    lab.passes(count=2)
    (record,) = lab.records()
    assert record["spec"]["pictures"] == {"food": 25_250}
    assert record["status"]["metrics"][key(CARS)]["pictures"] == 8041
    measured = record["status"]["metrics"][key(CARS)]
    assert measured["metrics"] == {"cars": "7.12", "cars/text-to-image-r1": "3.00"}
    assert "accuracy" not in record["status"], "the first metric is the trainer's"
    assert measured["image"].endswith("0" * 64) and measured["measuredAt"].startswith("2026-")
    stage = lab.stage()
    assert stage.results == {"food": "61.00", "cars": "7.12", "cars/text-to-image-r1": "3.00"}
    assert stage.unmeasured == [] and lab.status().is_true("Measured")
    assert stage.state is State.SUCCEEDED and stage.cache == "Hit"
    assert lab.measuring == [], "it is deleted once its metrics are recorded"
    told = ("Normal", "StageMeasured", "stage a: cars 7.12 was measured")
    assert lab.events.told.count(told) == 1
    lab.collect()
    writes = len(lab.statuses)
    lab.passes(count=3)
    assert len(lab.statuses) == writes and lab.measuring == []


def test_the_record_says_what_the_trainer_measured() -> None:
    """The trainer's own keys count: the spec may have been edited since its launch."""
    lab = Measuring()
    changed = {**FOOD, "shards": "/data/other.tar"}
    lab.train("family", FOOD, **{"spec.evaluation": [changed]})
    (record,) = lab.records()
    assert record["spec"]["evaluations"] == {"food": key(FOOD)}
    assert lab.stage().results == {}, "61.00 is another evaluation's"
    assert lab.entry.code is Code.MEASURING
    lab.measure(food=5.0)
    lab.passes(count=2)
    assert lab.stage().results == {"food": "5.00"} and lab.status().is_true("Measured")
    (record,) = lab.records()
    assert (record["spec"]["accuracy"], record["status"]["accuracy"]) == ("61.00", "5.00")
    lab.collect()
    lab.apply(**ASKS_FOOD)
    lab.passes(count=2)
    assert lab.stage().results == {"food": "61.00"} and lab.measuring == []


def test_another_chain_measures_what_the_record_that_it_finds_lacks() -> None:
    lab = Measuring()
    lab.claim("shared")
    lab.train("one", FOOD, **ASKS_FOOD, **SHARED)
    lab.apply("two", **ASKS_BOTH, **SHARED)
    lab.passes("two", 2)
    assert lab.names(PYTORCHJOBS) == ["one-a-a1"] and lab.status("two").is_true("Complete")
    assert lab.job["metadata"]["labels"]["modelchain.dev/chain"] == "two"
    lab.measure(cars=7.0)
    lab.passes("two", 2)
    assert lab.stage("two").results == {"food": "61.00", "cars": "7.00"}
    lab.apply("one", **ASKS_BOTH, **SHARED)
    lab.passes("one", 2)
    assert lab.stage("one").results == {"food": "61.00", "cars": "7.00"} and lab.measuring == []


def test_two_chains_that_measure_the_same_do_no_harm() -> None:
    """The second one finds that its record has changed, and reads it again."""
    lab = Measuring()
    lab.claim("shared")
    for name in ("one", "two"):
        lab.apply(name, **SHARED)
        lab.passes(name)
    lab.finish("one-a-a1")
    lab.passes("one", 2)
    lab.passes("two", 2)
    for name in ("one", "two"):
        lab.apply(name, **SHARED, **ASKS_FOOD)
        lab.passes(name, 2)
    assert len(lab.measuring) == 2
    (record,) = lab.records()
    theirs = {"metrics": {"food": "1.00"}, "measuredAt": "now", "image": "i"}
    jobs = [lab.drop(JOBS, name) for name in lab.measuring]
    for job in jobs:
        lab.kube.put(JOBS, job)
        lab.measure(food=2.0)
        lab.drop(JOBS, job["metadata"]["name"])
    for job in jobs:
        lab.kube.put(JOBS, job)
    lab.kube.put(ARTIFACTS, record | {"status": {"metrics": {key(FOOD): theirs}}})
    for name in ("one", "two"):
        lab.passes(name, 3)
        assert lab.stage(name).results == {"food": "1.00"}
    assert lab.measuring == []


def test_a_suspended_chain_measures_nothing() -> None:
    lab = edited()
    lab.pod(code=None)
    lab.apply(**ASKS_BOTH, **{"spec.suspend": True})
    lab.passes(count=2)
    assert lab.measuring == [] and lab.entry.code is Code.MEASURE_WAITS
    lab.collect()
    lab.apply(**ASKS_BOTH)
    lab.passes(count=2)
    assert len(lab.measuring) == 1


def test_only_a_job_of_the_operator_is_deleted() -> None:
    """Everyone who may create pods can copy the labels of ours."""
    lab = edited()
    pod = lab.pod(code=None)
    lab.kube.put(JOBS, {"metadata": {"name": "users", "namespace": NAMESPACE}, "spec": {}})
    pod["metadata"] |= {"name": "users-x", "ownerReferences": [owned("Job", "users", "uusers")]}
    lab.kube.put(PODS, pod)
    lab.apply(**ASKS_FOOD)
    lab.passes(count=3)
    assert lab.measuring == [] and "users" in lab.names(JOBS)


# A Job that does not start, or fails.


def test_why_it_does_not_start_is_told() -> None:
    lab = edited()
    message = 'pods "x" is forbidden: exceeded quota: cpu'
    told = {
        "reason": "FailedCreate",
        "message": f"Error creating: {message}",
        "involvedObject": {"uid": lab.job["metadata"]["uid"]},
        "metadata": {"name": "e"},
        "lastTimestamp": podshapes.at(50),
    }
    lab.kube.put(EVENTS, told)
    lab.now += 100
    lab.passes()
    assert lab.entry.code is Code.PODS_FORBIDDEN and message in lab.entry.reason
    assert lab.status().is_true("Complete") and not lab.status().is_true("Measured")
    pod = lab.pod(code=None)
    lab.kube.put(PODS, pod | {"status": podshapes.unschedulable()["status"]})
    lab.passes()
    assert lab.entry.code is Code.UNSCHEDULABLE


def test_a_job_of_its_name_that_is_not_the_chains_is_left_alone() -> None:
    lab = edited()
    name = lab.job["metadata"]["name"]
    lab.kube.put(JOBS, {"metadata": {"name": name, "namespace": NAMESPACE}, "spec": {}})
    lab.passes()
    assert lab.entry.code is Code.NAME_TAKEN and lab.measuring == [name]


@pytest.mark.parametrize(
    ("word", "more", "why"),
    [
        (
            LastWord(result="Failed", failure=FailureClass.DATA, message="no picture"),
            {},
            "Data: no picture",
        ),
        (None, {}, "left no last word: exit code 1"),
        (None, {"reason": "OOMKilled"}, "OutOfMemory: "),
    ],
)
def test_a_failure_is_told_and_a_retry_measures_again(
    word: LastWord | None, more: dict[str, Any], why: str
) -> None:
    lab = edited()
    first = lab.job["metadata"]["uid"]
    lab.fail(word, **more)
    lab.passes(count=2)
    assert lab.entry.code is Code.MEASURE_FAILED and why in lab.entry.reason
    assert lab.entry.next == f"modelchain retry family -n {NAMESPACE}"
    condition = lab.status().condition("Measured")
    assert condition and condition.reason == "MeasureFailed" and why in condition.message
    assert lab.status().is_true("Complete") and lab.stage().retries == 0
    assert [event[:2] for event in lab.events.told].count(("Warning", "MeasureFailed")) == 1
    writes = len(lab.statuses)
    lab.passes(count=3)
    assert len(lab.statuses) == writes and lab.job["metadata"]["uid"] == first, "kept for its logs"
    lab.retry()
    lab.passes(count=2)
    lab.collect()
    assert lab.job["metadata"]["uid"] != first and lab.entry.code is Code.MEASURING
    lab.measure(cars=7.0)
    lab.passes(count=2)
    assert lab.status().is_true("Measured") and lab.measuring == []


@pytest.mark.parametrize("kind", ["Failed", "FailureTarget"])
def test_one_that_hangs_ends_at_its_deadline_until_a_retry(kind: str) -> None:
    """Kubernetes adds `Failed` only once the pods are gone. On a dead node they may stay."""
    lab = Measuring()
    lab.train("family", **{"spec.evaluation": []})
    lab.apply(**ASKS_BOTH)
    lab.passes(count=2)
    first = lab.job["metadata"]
    lab.pod(None if kind == "FailureTarget" else STOPPED, code=None if kind != "Failed" else 75)
    late = {"type": kind, "status": "True", "reason": "DeadlineExceeded", "message": "too long"}
    lab.kube.put(JOBS, lab.job | {"status": {"conditions": [late]}})
    lab.passes()
    food, cars = lab.stage().unmeasured
    name = first["name"]
    assert (food.code, cars.code) == (Code.MEASURE_DEADLINE, Code.MEASURING), "the next one goes on"
    assert food.reason == (
        f"job {name} was ended: it had not ended after 86400 s; raise evaluating.deadlineSeconds of"
        " the node pool, then retry"
    )
    assert food.next == f"modelchain retry family -n {NAMESPACE}"
    condition = lab.status().condition("Measured")
    assert condition and condition.reason == "MeasureDeadline" and name in condition.message
    assert lab.status().is_true("Complete") and lab.stage().retries == 0
    assert [event[:2] for event in lab.events.told].count(("Warning", "MeasureDeadline")) == 1
    (second,) = set(lab.measuring) - {name}
    lab.drop(JOBS, second)  # the other evaluation does not matter from here on
    lab.apply(**ASKS_FOOD)
    lab.passes(count=2)
    lab.collect()
    assert lab.job["metadata"]["uid"] != first["uid"] and lab.entry.code is Code.MEASURING
    lab.measure(food=7.0)
    lab.passes(count=2)
    assert lab.status().is_true("Measured") and lab.measuring == []


@pytest.mark.parametrize("verb", ["create", "status"])
def test_a_refusal_is_told_and_the_next_try_goes_on(verb: str) -> None:
    lab = Measuring()
    lab.train("family", FOOD, **ASKS_FOOD)
    kind = JOBS if verb == "create" else ARTIFACTS
    lab.kube.refuse[verb, kind.plural] = Forbidden("exceeded quota: few", code=403)
    lab.apply(**ASKS_BOTH)
    lab.passes(count=3)
    if verb == "status":
        lab.measure(cars=7.0)
        lab.passes(count=3)
    assert lab.entry.code is Code.MEASURE_REFUSED and "exceeded quota" in lab.entry.reason
    assert ("Warning", "MeasureRefused") in [event[:2] for event in lab.events.told]
    writes = len(lab.statuses)
    lab.passes(count=3)
    assert len(lab.statuses) == writes
    lab.restart()
    lab.passes()
    assert len(lab.statuses) == writes, "another operator does not tell another story"
    del lab.kube.refuse[verb, kind.plural]
    lab.passes(count=2)
    if verb == "create":
        lab.measure(cars=7.0)
        lab.passes(count=2)
    assert lab.status().is_true("Measured") and lab.stage().results["cars"] == "7.00"


# Crashes.


class Crash(Exception):
    """The operator is killed."""


def crashing(lab: Lab, at: int, *, committed: bool) -> list[str]:
    """From now on the write with this number kills the operator, before or after it counts.

    Returns the list of writes so far.
    """
    writes: list[str] = []

    def cut(name: str, write: Callable[..., Awaitable[Object]]) -> Callable[..., Awaitable[Object]]:
        async def wrapped(*arguments: Any, **more: Any) -> Object:
            writes.append(name)
            if len(writes) == at and not committed:
                raise Crash
            answer = await write(*arguments, **more)
            if len(writes) == at:
                raise Crash
            return answer

        return wrapped

    for name in ("create", "replace_status", "patch_status", "delete"):
        setattr(lab.kube, name, cut(name, getattr(lab.kube, name)))
    return writes


def life(at: int, *, committed: bool) -> tuple[Measuring, list[str]]:
    """Two evaluations are added. The operator is killed at one write, and starts again."""
    lab = Measuring()
    lab.train("family", **{"spec.evaluation": []})
    writes = crashing(lab, at, committed=committed)
    lab.apply(**ASKS_BOTH)
    answered: set[str] = set()
    for _ in range(30):
        try:
            lab.passes()
        except Crash:
            lab.restart()
        assert len(lab.measuring) <= 1, "one Job at a time"
        for name in lab.measuring:
            uid = lab.get(JOBS, name)["metadata"]["uid"]
            if uid not in answered:
                (container,) = lab.job["spec"]["template"]["spec"]["containers"]
                (task,) = (v["value"] for v in container["env"] if v["name"] == "MODELCHAIN_TASK")
                lab.measure(**{name: float(len(answered)) for name in json.loads(task)["names"]})
                answered.add(uid)
        lab.collect()
    assert len(answered) == 2, "nothing is measured twice"
    return lab, writes


WRITES = life(0, committed=False)[1]


@pytest.mark.parametrize("committed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", range(1, len(WRITES) + 1))
def test_an_operator_that_is_killed_at_any_write_measures_everything_once(
    at: int, committed: bool
) -> None:
    lab, _ = life(at, committed=committed)
    (record,) = lab.records()
    assert {k: m["metrics"] for k, m in record["status"]["metrics"].items()} == {
        key(FOOD): {"food": "0.00"},
        key(CARS): {"cars": "1.00"},
    }
    assert lab.stage().results == {"food": "0.00", "cars": "1.00"}
    assert record["status"]["accuracy"] == "0.00" and "accuracy" not in record["spec"]
    assert lab.status().is_true("Measured") and lab.measuring == []
    assert lab.names(PYTORCHJOBS) == ["family-a-a1"]


def test_a_record_that_changed_meanwhile_is_a_conflict() -> None:
    lab = edited()
    lab.measure(cars=7.0)
    (record,) = lab.records()

    async def late(resource: Any, namespace: str, name: str, body: Object) -> Object:
        lab.kube.put(ARTIFACTS, record)
        del lab.kube.patch_status  # type: ignore[attr-defined]
        raise Conflict("it has changed", code=409)

    lab.kube.patch_status = late  # type: ignore[method-assign]
    lab.passes()
    assert "cars" not in lab.stage().results
    lab.passes(count=2)
    assert lab.stage().results["cars"] == "7.00"
