"""Passes of the operator against an API server in memory: a launch, and what prevents it."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from memorykube import MOMENT, MemoryKube, chain
from specs import with_changes

from modelchain.api.reasons import Code
from modelchain.io.load import status_of
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import (
    CHAINS,
    CLAIMS,
    LEASES,
    PODS,
    Conflict,
    Object,
    Resource,
)
from modelchain_operator.reconcile.controller import Controller
from modelchain_operator.runners.pytorchjob import PyTorchJob

NOW = 1_767_225_700.0


def reconciled(*jobs: Object) -> tuple[Code | None, list[str]]:
    """The code of the first stage after a few passes, and the names of the jobs that exist."""

    async def main() -> tuple[Code | None, list[str]]:
        kube = MemoryKube(lambda status: None)
        kube.put(CHAINS, chain())
        kube.put(CLAIMS, {"metadata": {"name": "artifacts", "namespace": "team"}})
        for job in jobs:
            kube.put(PyTorchJob.resource, job)
        events: Any = SimpleNamespace(tell=lambda *_: None)
        api: Any = kube
        controller = Controller(api, events, PoolFile(), clock=lambda: NOW)
        for _ in range(3):
            await controller.reconcile(("team", "vit"))
        status = status_of(await kube.get(CHAINS, "team", "vit"))
        names = [job["metadata"]["name"] for job in await kube.list(PyTorchJob.resource)]
        return status.stages[0].code, names

    return asyncio.run(main())


def named_like_the_first_attempt(**meta: Any) -> Object:
    return {
        "kind": "PyTorchJob",
        "metadata": {"name": "vit-vit-t-a1", "namespace": "team", "labels": {}, **meta},
        "spec": {"runPolicy": {"suspend": True}},
    }


def test_a_chain_is_launched() -> None:
    assert reconciled() == (Code.MISS, ["vit-vit-t-a1"])


def test_a_job_of_the_attempts_name_is_being_deleted() -> None:
    going = named_like_the_first_attempt(deletionTimestamp=MOMENT)
    assert reconciled(going) == (Code.NAME_GOING, ["vit-vit-t-a1"])


def test_a_job_of_the_attempts_name_is_not_ours() -> None:
    """The next attempt takes the next number. The other job is left alone."""
    foreign = named_like_the_first_attempt()
    assert reconciled(foreign) == (Code.MISS, ["vit-vit-t-a1", "vit-vit-t-a2"])


class Operator:
    """An operator with one chain, `vit`, on an API server in memory."""

    def __init__(self) -> None:
        self.now, self.told, self.written = NOW, [], []  # type: ignore[var-annotated]
        self.kube = MemoryKube(self.written.append)
        self.kube.put(CHAINS, chain())
        self.kube.put(CLAIMS, {"metadata": {"name": "artifacts", "namespace": "team"}})
        events: Any = SimpleNamespace(tell=lambda _, kind, code, text: self.told.append(code))
        api: Any = self.kube
        self.controller = Controller(api, events, PoolFile(), clock=lambda: self.now)

    def passes(self, number: int = 3) -> None:
        async def main() -> None:
            for _ in range(number):
                await self.controller.reconcile(("team", "vit"))

        asyncio.run(main())

    @property
    def chain(self) -> Object:
        return self.kube.objects[CHAINS.plural, "vit"]

    def change(self, **changes: Any) -> None:
        generation = self.chain["metadata"]["generation"] + 1
        self.kube.put(
            CHAINS, with_changes({"metadata.generation": generation, **changes}, self.chain)
        )

    def condition(self, kind: str) -> Any:
        found = [c for c in self.chain["status"]["conditions"] if c["type"] == kind]
        return found[0] if found else None

    def names(self, resource: Any) -> list[str]:
        return [name for plural, name in self.kube.objects if plural == resource.plural]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("status.stages[0].cascade", {"verdict": "Passed"}, "stages.0.cascade"),
        ("status.cascades", [], "cascades"),
        ("status.stages[0].state", "Dreaming", "stages.0.state"),
        ("status.stages[0].attempts[0].runner", "TrainJob", "the runner TrainJob"),
    ],
)
def test_a_status_of_a_newer_version_is_told_and_nothing_is_done(
    path: str, value: Any, says: str
) -> None:
    operator = Operator()
    operator.passes()
    jobs, before = operator.names(PyTorchJob.resource), dict(operator.kube.objects)
    operator.change(**{path: value, "spec.suspend": True})
    stored = operator.chain["status"]
    operator.written.clear()
    operator.passes(5)
    assert len(operator.written) == 1, "the conditions are written once"
    stalled, ready = operator.condition("Stalled"), operator.condition("Ready")
    assert stalled["status"] == "True" and stalled["reason"] == "StatusUnreadable"
    assert says in stalled["message"] and "install that version again" in stalled["message"]
    assert ready["status"] == "False" and operator.condition("Reconciling") is None
    kept = {**operator.chain["status"], "conditions": stored["conditions"]}
    assert kept == stored, "all else stays for the version that can read it"
    assert operator.told[-1] == Code.STATUS_UNREADABLE
    assert operator.names(PyTorchJob.resource) == jobs
    assert {k: v for k, v in operator.kube.objects.items() if k[0] != CHAINS.plural} == {
        k: v for k, v in before.items() if k[0] != CHAINS.plural
    }, "nothing else was written, made or deleted"


def test_two_versions_at_once_do_not_take_turns_in_writing() -> None:
    operator = Operator()
    operator.passes()
    operator.change(**{"status.stages[0].gate": {}})
    good = operator.chain["status"]["conditions"]
    operator.written.clear()
    for _ in range(20):  # the newer version writes its conditions after each pass of ours
        operator.passes(1)
        operator.kube.put(CHAINS, with_changes({"status.conditions": good}, operator.chain))
        operator.now += 5
    assert len(operator.written) == 1
    operator.now += 600
    operator.passes(1)
    assert len(operator.written) == 2


def test_a_chain_goes_on_once_its_status_can_be_read_again() -> None:
    operator = Operator()
    operator.passes()
    status = operator.chain["status"]
    operator.change(**{"status.stages[0].gate": {}})
    operator.passes()
    operator.kube.put(CHAINS, with_changes({"status": status}, operator.chain))
    operator.passes()
    assert operator.condition("Stalled") is None and operator.condition("Reconciling") is not None


@pytest.mark.parametrize("job", ["none", "runs"])
def test_a_chain_whose_spec_is_refused_gives_its_share_back(job: str) -> None:
    """Otherwise another chain of the same stage would wait for ever. While a job of its own still
    trains the stage, it keeps the share.
    """
    operator = Operator()
    operator.passes()
    assert len(operator.names(LEASES)) == 1 and len(operator.names(PyTorchJob.resource)) == 1
    if job == "none":
        del operator.kube.objects[PyTorchJob.resource.plural, "vit-vit-t-a1"]
    operator.change(**{"spec.data.train.shards": "/data/{a,b{c,../../etc/x}}.tar"})
    operator.passes()
    assert operator.condition("Stalled")["reason"] == "InvalidSpec"
    assert len(operator.names(LEASES)) == (job == "runs")
    if job == "runs":  # once the job has ended, the share is given back
        found = operator.kube.objects[PyTorchJob.resource.plural, "vit-vit-t-a1"]
        conditions = [{"type": "Failed", "status": "True", "message": "it broke"}]
        operator.kube.put(PyTorchJob.resource, {**found, "status": {"conditions": conditions}})
        operator.passes(1)
        assert operator.names(LEASES) == []


@pytest.mark.parametrize("word", ["abc", "A" * 64, "\u001b[2J" + "0" * 64])
def test_a_bad_digest_in_a_last_word_is_a_failure_and_no_exception(word: str) -> None:
    operator = Operator()
    operator.passes()
    job = operator.kube.objects[PyTorchJob.resource.plural, "vit-vit-t-a1"]
    template = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    owner = {"kind": job["kind"], "name": job["metadata"]["name"]}
    meta = {
        **template["metadata"],
        "name": "vit-vit-t-a1-master-0",
        "namespace": "team",
        "uid": "pod",
        "creationTimestamp": MOMENT,
        "ownerReferences": [{**owner, "uid": job["metadata"]["uid"], "controller": True}],
    }
    meta["labels"] = {
        **template["metadata"]["labels"],
        "training.kubeflow.org/replica-type": "master",
        "training.kubeflow.org/replica-index": "0",
    }
    said = {"result": "Succeeded", "manifestDigest": word, "artifactDigest": "0" * 64, "steps": 9}
    ended = {"exitCode": 0, "startedAt": MOMENT, "finishedAt": MOMENT, "message": json.dumps(said)}
    container = template["spec"]["containers"][0]["name"]
    status = {
        "phase": "Succeeded",
        "containerStatuses": [{"name": container, "state": {"terminated": ended}}],
    }
    operator.kube.put(PODS, {"metadata": meta, "spec": template["spec"], "status": status})
    done = {"conditions": [{"type": "Succeeded", "status": "True"}]}
    operator.kube.put(PyTorchJob.resource, {**job, "status": done})
    operator.passes()
    stage = status_of(operator.chain).stages[0]
    assert (stage.code, stage.retries) == (Code.NO_ARTIFACT, 1)
    assert "as manifestDigest" in stage.reason and stage.reason.isprintable()


class BehindOnce:
    """Answers one read of the chain with an older version, as a pass has it that began earlier."""

    def __init__(self, kube: MemoryKube, older: Object):
        self.read, self.older = kube.get, [older]

    async def get(self, resource: Resource, namespace: str, name: str) -> Object:
        if resource is CHAINS and self.older:
            return self.older.pop()
        return await self.read(resource, namespace, name)


def test_what_another_operator_has_made_meanwhile_is_not_deleted() -> None:
    """The pass has read a suspended chain. Then the chain is resumed, and a stage launched.

    The job and the share that the pass finds are named by no status that it knows.
    """
    operator = Operator()
    operator.change(**{"spec.suspend": True})
    operator.passes()
    suspended = operator.chain
    operator.change(**{"spec.suspend": False})
    operator.passes()
    made = operator.names(PyTorchJob.resource), operator.names(LEASES)
    assert made[0] == ["vit-vit-t-a1"] and len(made[1]) == 1
    operator.kube.get = BehindOnce(operator.kube, suspended).get  # type: ignore[method-assign]
    with pytest.raises(Conflict):
        operator.passes(1)
    operator.passes()
    assert made == (operator.names(PyTorchJob.resource), operator.names(LEASES))
