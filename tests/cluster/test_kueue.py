"""How jobs get into queues and out of them, with Kueue's webhooks and without.

No job starts before its release, and none keeps a queue it was not to have: the stand-in's log says
so after each test.
"""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import plays
import pytest
from apiclient import loop
from controlplane import ControlPlane, KubectlError
from faults import Answer, Exchange, Hold, Match, failure, request
from kubelet import Kubelet
from kueue import HELD, NODES, PRIORITY, QUEUE, RELEASED, Kueue, Tenant
from playedpod import Pod
from plays import Play
from proxy import FaultProxy
from rig import Object, Operator, Space, chain, fresh_namespace

DEMAND = "every job names its queue in kueue.x-k8s.io/queue-name"
OPERATOR = "modelchain-operator"


class World:
    """One operator behind a proxy for several namespaces, all but `plain` served by Kueue, each as
    its admin likes it:

    `given` has the LocalQueues default, vision and full; `open` vision alone; `all` vision, and
    jobs without a queue are managed, too; `demand` vision, and a policy that refuses jobs without a
    queue; `late` none yet.
    """

    SERVED = ("given", "open", "all", "demand", "late")

    def __init__(self, spaces: dict[str, Space], kueue: Kueue, kubelet: Kubelet, proxy: FaultProxy):
        self.spaces, self.kueue, self.kubelet, self.proxy = spaces, kueue, kubelet, proxy
        self.scripts: dict[str, Callable[[Pod], Play | None]] = {}
        kubelet.script = lambda pod: self.scripts.get(str(pod.chain), lambda pod: None)(pod)
        self.tenants = {name: kueue.serve(spaces[name].namespace) for name in self.SERVED}
        for name in ("default", "vision"):
            self.tenants["given"].add_queue(name)
        self.tenants["given"].add_queue("full", quota=0)
        for name in ("open", "all", "demand"):
            self.tenants[name].add_queue("vision")
        self.tenants["all"].manages_all = True
        self.tenants["demand"].policy = lambda job: (
            None if job["metadata"].get("labels", {}).get(QUEUE) else DEMAND
        )

    def apply(self, where: str, name: str, stages: int = 1, **runner: str) -> tuple[Space, Tenant]:
        """A chain whose inputs no other chain has."""
        changes = {f"spec.runner.{key}": value for key, value in runner.items()}
        seed = zlib.crc32(name.encode()) % 1000
        self.spaces[where].apply(chain(name, stages, **{"spec.recipe.seed": seed}, **changes))
        return self.spaces[where], self.tenants.get(
            where, Tenant(self.kueue, self.spaces[where].namespace)
        )

    def touches(self, tenant: Tenant, job: str) -> int:
        """Writes of ours to a job so far, those that were refused included."""
        return sum(seen.user == OPERATOR for seen in tenant.log(job))


@pytest.fixture(scope="module")
def world(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("kueue")
    kubeconfig = control_plane.kubeconfig_for(OPERATOR, ["system:masters"])
    with ExitStack() as stack:
        names = {
            name: stack.enter_context(fresh_namespace(control_plane))
            for name in (*World.SERVED, "plain")
        }
        spaces = {name: Space(control_plane, namespace) for name, namespace in names.items()}
        kueue = stack.enter_context(Kueue(control_plane))
        kubelet = stack.enter_context(Kubelet(control_plane.kubeconfig, labels=NODES))
        proxy = stack.enter_context(FaultProxy(kubeconfig))
        world = World(spaces, kueue, kubelet, proxy)
        stack.enter_context(
            Operator(proxy.kubeconfig(directory / "proxy"), directory, tuple(names.values()))
        )
        yield world


@pytest.fixture(autouse=True)
def _promises(world: World) -> Iterator[None]:
    yield
    world.proxy.clear()
    assert world.kueue.broken() == []


def held(queue: str | None) -> list[tuple[str | None, bool, bool]]:
    """The way of a job into a queue that admits it: (queue, suspended, released)."""
    return [(HELD, True, False), (queue, True, True), (queue, False, True)]


UNQUEUED = [
    (HELD, True, False),
    (None, True, False),
    (None, False, True),
]  # two PATCHes: a label's and a release's


def spent(stage: Object) -> tuple[list[str], int, int]:
    return [a["state"] for a in stage["attempts"]], stage["retries"], stage["disruptions"]


def stalled(space: Space, name: str, reason: str) -> str:
    """The message, once the chain stands still for this reason."""

    def said() -> Object | None:
        found = space.condition("Stalled", name)
        return found if found and (found["status"], found["reason"]) == ("True", reason) else None

    return str(space.wait(said, f"{name} is stalled: {reason}")["message"])


def queued(space: Space, name: str) -> None:
    space.wait(lambda: space.stage("a", name).get("state") == "Queued", f"{name} is queued")


def suspend(space: Space, job: str, value: bool) -> None:
    """By another client."""
    body = json.dumps({"spec": {"runPolicy": {"suspend": value}}})
    space.kubectl("patch", "pytorchjob", job, "--type=merge", "-p", body)


# -- the stand-in itself ---------------------------------------------------------------------------


def test_the_stand_in_does_as_kueue_does(world: World) -> None:
    """With jobs of no chain; what it refuses and what it starts is in its docstring."""
    space, tenant = world.spaces["given"], world.tenants["given"]
    template = {"spec": {"containers": [{"name": "pytorch", "image": "none"}]}}

    def make(name: str, labels: dict[str, str], where: Space = space, **policy: bool) -> Object:
        spec = {
            "runPolicy": policy,
            "pytorchReplicaSpecs": {"Master": {"replicas": 1, "template": template}},
        }
        meta = {"name": name, "labels": labels}
        where.apply(
            {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": meta, "spec": spec}
        )
        return where.get("pytorchjob", name)

    def patch(name: str, meta: Object, where: Space = space, **policy: bool) -> None:
        body = json.dumps({"metadata": meta, "spec": {"runPolicy": policy}})
        where.kubectl("patch", "pytorchjob", name, "--type=merge", "-p", body)

    def runs(name: str, where: Space = space) -> bool:
        return not where.get("pytorchjob", name)["spec"]["runPolicy"].get("suspend")

    made = make("defaulted", {})
    assert made["metadata"]["labels"] == {QUEUE: "default"} and made["spec"]["runPolicy"]["suspend"]
    space.wait(lambda: runs("defaulted"), "it is admitted")
    for wrong in ({QUEUE: "vision"}, {QUEUE: None}):
        with pytest.raises(KubectlError, match="field is immutable"):
            patch("defaulted", {"labels": wrong})
    patch("defaulted", {"annotations": {"note": "mine"}})  # not looked at

    make("nowhere", {QUEUE: HELD, PRIORITY: "high"})
    with pytest.raises(KubectlError, match="must not be empty in namespace with default queue"):
        patch("nowhere", {"labels": {QUEUE: None}})
    with pytest.raises(KubectlError, match="field is immutable"):
        patch("nowhere", {"labels": {PRIORITY: "low"}})
    patch("nowhere", {}, suspend=False)
    space.wait(lambda: not runs("nowhere"), "a queue that does not exist admits no job")
    patch("nowhere", {"labels": {QUEUE: "vision"}})
    space.wait(lambda: runs("nowhere"), "the Workload follows the label")
    suspend(space, "nowhere", True)
    space.wait(lambda: runs("nowhere"), "an admitted one is started again")
    tenant.quota["vision"] = 0
    tenant.evict("nowhere")
    space.wait(lambda: not runs("nowhere"), "it is evicted")
    time.sleep(1)
    assert not runs("nowhere")
    del tenant.quota["vision"]
    space.wait(lambda: runs("nowhere"), "it is admitted again")

    make("free", {QUEUE: HELD}, world.spaces["open"], suspend=True)
    with pytest.raises(KubectlError, match="field is immutable"):
        patch("free", {"labels": {QUEUE: None}}, world.spaces["open"], suspend=False)
    patch("free", {"labels": {QUEUE: None}}, world.spaces["open"])
    patch("free", {}, world.spaces["open"], suspend=False)
    make("found", {}, world.spaces["all"])
    assert not runs("found", world.spaces["all"]), "manageJobsWithoutQueueName suspends at creation"
    time.sleep(1)
    assert runs("free", world.spaces["open"]), "what has no label is none of Kueue's"
    for where in ("given", "open", "all"):
        world.spaces[where].kubectl("delete", "pytorchjobs", "--all")


# -- into a queue, or none -------------------------------------------------------------------------


def test_no_queue_is_asked_and_there_is_a_default_one(world: World) -> None:
    """The admin's quota holds: each job is released into it, and starts when it has its turn."""
    world.tenants["given"].quota["default"] = 0
    space, tenant = world.apply("given", "defaulted", 2)
    queued(space, "defaulted")
    space.wait(lambda: tenant.ways("defaulted-a-a1")[1:], "it is released")
    time.sleep(1.5)
    assert tenant.ways("defaulted-a-a1") == held("default")[:2]
    assert space.list("pods", "modelchain.dev/chain=defaulted,modelchain.dev/role=train") == []
    del tenant.quota["default"]
    stages = space.until("Complete", "defaulted")["stages"]
    assert [spent(stage) for stage in stages] == [(["Succeeded"], 0, 0)] * 2
    for job in ("defaulted-a-a1", "defaulted-b-a1"):
        assert tenant.ways(job) == held("default")
        assert [seen for seen in tenant.log(job) if seen.refused] == []


def test_no_queue_is_asked_and_there_is_no_default_one(world: World) -> None:
    space, tenant = world.apply("open", "unqueued", 2)
    stages = space.until("Complete", "unqueued")["stages"]
    assert [spent(stage) for stage in stages] == [(["Succeeded"], 0, 0)] * 2
    for job in ("unqueued-a-a1", "unqueued-b-a1"):
        assert tenant.ways(job) == UNQUEUED
        assert [seen for seen in tenant.log(job) if seen.refused] == []
        assert {seen.user for seen in tenant.log(job) if seen.released != seen.suspend} == {
            OPERATOR
        }


def test_the_queue_asked_for(world: World) -> None:
    space, tenant = world.apply("given", "asked", queueName="vision", priorityClass="high")
    assert spent(space.until("Complete", "asked")["stages"][0]) == (["Succeeded"], 0, 0)
    assert tenant.ways("asked-a-a1") == held("vision")
    assert {seen.labels.get(PRIORITY) for seen in tenant.log("asked-a-a1")} == {"high"}


def test_without_kueue(world: World) -> None:
    """No webhook, no LocalQueue of the name `default`."""
    space, _ = world.apply("plain", "plain", 2)
    space.until("Complete", "plain")
    for job in space.list("pytorchjobs", "modelchain.dev/chain=plain"):
        assert QUEUE not in job["metadata"]["labels"] and RELEASED in job["metadata"]["annotations"]


def test_a_default_queue_that_comes_while_a_job_is_released(world: World) -> None:
    """Its label can no longer be taken away; it goes into that queue instead."""
    tenant = world.tenants["late"]

    async def comes(exchange: Exchange) -> Answer:
        answered = await exchange.forward()
        if "/v1beta1/" in exchange.request.path:  # the older version is asked for last
            await world.kueue.make_queue(tenant, "default")
        return answered

    rule = world.proxy.on(request("get", "localqueues", namespace=tenant.namespace), comes, times=2)
    space, _ = world.apply("late", "late")
    assert spent(space.until("Complete", "late")["stages"][0]) == (["Succeeded"], 0, 0)
    assert rule.hits == 2 and tenant.ways("late-a-a1") == held("default")
    assert any("must not be empty" in str(seen.refused) for seen in tenant.log("late-a-a1"))


# -- suspended again -------------------------------------------------------------------------------


def test_an_eviction_charges_no_budget(world: World) -> None:
    space, tenant = world.apply("given", "evicted", queueName="vision")
    runs: list[str] = []

    def script(pod: Pod) -> Play:
        runs.append(pod.uid)
        return plays.stall() if len(runs) == 1 else plays.succeed()

    world.scripts["evicted"] = script
    space.wait(lambda: space.stage("a", "evicted").get("progress", {}).get("step"), "it trains")
    tenant.quota["vision"] = 0
    tenant.evict("evicted-a-a1")
    queued(space, "evicted")
    space.wait(
        lambda: not space.list("pods", "modelchain.dev/chain=evicted,modelchain.dev/role=train"),
        "its pods are gone",
    )
    count = world.touches(tenant, "evicted-a-a1")
    time.sleep(1.5)
    assert world.touches(tenant, "evicted-a-a1") == count, "nothing is fought"
    del tenant.quota["vision"]
    stage = space.until("Complete", "evicted")["stages"][0]
    assert spent(stage) == (["Succeeded"], 0, 0) and len(runs) == 2
    assert tenant.ways("evicted-a-a1") == [*held("vision"), *held("vision")[1:]]


def test_suspended_by_another(world: World) -> None:
    """manageJobsWithoutQueueName: a job that is in no queue is suspended again. Nothing is fought
    or charged.
    """
    world.scripts["other"] = lambda pod: plays.hang() if pod.attempt == 1 else None
    space, tenant = world.apply("all", "other")
    says = stalled(space, "other", "SuspendedByAnother")
    assert f"modelchain retry other -n {space.namespace}" in says
    job = space.get("pytorchjob", "other-a-a1")
    assert tenant.ways("other-a-a1") == [*UNQUEUED, (None, True, True)]
    version = space.at_rest("other")
    writes = len(tenant.log("other-a-a1"))
    time.sleep(4)
    assert len(tenant.log("other-a-a1")) == writes and world.touches(tenant, "other-a-a1") <= 4
    assert space.version("other") == version
    assert space.names("pytorchjobs") == ["other-a-a1"]
    assert space.list("pods", "modelchain.dev/chain=other,modelchain.dev/role=train") == []
    (state,), *charged = spent(space.stage("a", "other"))
    assert charged == [0, 0] and state not in ("Failed", "Succeeded")

    tenant.manages_all = False
    space.patch("other", annotations={"modelchain.dev/retry": "1"})
    stage = space.until("Complete", "other")["stages"][0]
    assert [a["name"] for a in stage["attempts"]] == ["other-a-a1", "other-a-a2"]
    assert spent(stage)[1:] == (0, 0)
    space.wait(
        lambda: (
            job["metadata"]["uid"] not in {j["metadata"]["uid"] for j in space.list("pytorchjobs")}
        ),
        "the suspended job is gone",
    )


def test_a_queue_is_demanded(world: World) -> None:
    """A webhook refuses the release: said in its words, and mended by naming a queue."""
    space, tenant = world.apply("demand", "demanded")
    says = stalled(space, "demanded", "QueueRequired")
    assert DEMAND in says and "queueName" in says
    writes = world.touches(tenant, "demanded-a-a1")
    time.sleep(3)
    assert world.touches(tenant, "demanded-a-a1") <= writes + 2, "it is tried again seldom"
    assert space.list("pods", "modelchain.dev/chain=demanded,modelchain.dev/role=train") == []
    space.patch("demanded", {"runner": {"queueName": "vision"}})
    stage = space.until("Complete", "demanded")["stages"][0]
    assert spent(stage)[1:] == (0, 0)
    last = stage["attempts"][-1]["name"]
    assert tenant.ways(last) == held("vision")


# -- others write to a held job --------------------------------------------------------------------


def records_uid(chain: str) -> Match:
    """The PUT by which a status first has the UID of stage a's job."""

    def match(r: Any) -> bool:
        if (r.verb, r.resource, r.subresource, r.name) != (
            "update",
            "modelchains",
            "status",
            chain,
        ):
            return False
        stages = json.loads(r.body)["status"].get("stages", [])
        return any(attempt.get("uid") for stage in stages for attempt in stage["attempts"])

    return match


def test_a_held_job_that_is_given_a_queue(world: World) -> None:
    """Its release is of what is there then, and into the queue it is to have."""
    hold = Hold()
    world.proxy.on(request("patch", "pytorchjobs", name="taken-a-a1"), hold)
    space, tenant = world.apply("given", "taken")
    space.wait(lambda: hold.held, "its release is on its way")
    space.kubectl("label", "pytorchjob", "taken-a-a1", f"{QUEUE}=full", "--overwrite")
    hold.release()
    assert spent(space.until("Complete", "taken")["stages"][0]) == (["Succeeded"], 0, 0)
    assert tenant.ways("taken-a-a1") == [
        (HELD, True, False),
        ("full", True, False),
        *held("default")[1:],
    ]


def test_a_held_job_that_is_started_before_its_uid_is_recorded(world: World) -> None:
    """Once it is, what is missing is the annotation alone: the job runs, and there is no other."""
    hold = Hold()
    world.scripts["started"] = lambda pod: plays.succeed(2)
    world.proxy.on(records_uid("started"), hold)
    space, _ = world.apply("plain", "started")
    space.wait(lambda: hold.held, "its UID is on its way")
    uid = space.get("pytorchjob", "started-a-a1")["metadata"]["uid"]
    suspend(space, "started-a-a1", False)
    space.wait(
        lambda: space.list("pods", "modelchain.dev/chain=started,modelchain.dev/role=train"),
        "it has a pod",
    )
    assert RELEASED not in space.get("pytorchjob", "started-a-a1")["metadata"]["annotations"]
    hold.release()
    stage = space.until("Complete", "started")["stages"][0]
    job = space.get("pytorchjob", "started-a-a1")
    assert job["metadata"]["uid"] == uid == stage["attempts"][0]["uid"]
    assert RELEASED in job["metadata"]["annotations"] and job["metadata"]["labels"][QUEUE] == HELD
    assert spent(stage) == (["Succeeded"], 0, 0)
    assert world.kubelet.finished[stage["inputDigest"]] == 1


def test_a_held_job_that_is_started_and_whose_uid_is_not_recorded(world: World) -> None:
    """The PUT is lost. Either the UID is recorded then, or the job is deleted; it is never two that
    train.
    """
    lost = asyncio.Event()

    async def lose(exchange: Exchange) -> Answer:
        await lost.wait()
        return failure(500, "by the fault proxy")

    world.scripts["lost"] = lambda pod: plays.succeed(2)
    rule = world.proxy.on(records_uid("lost"), lose)
    space, _ = world.apply("plain", "lost")
    space.wait(lambda: rule.hits, "its UID is on its way")
    uid = space.get("pytorchjob", "lost-a-a1")["metadata"]["uid"]
    suspend(space, "lost-a-a1", False)
    loop().call_soon_threadsafe(lost.set)
    stage = space.until("Complete", "lost")["stages"][0]
    (job,) = space.list("pytorchjobs", "modelchain.dev/chain=lost")
    last = stage["attempts"][-1]
    assert (last["name"], last["uid"]) == (job["metadata"]["name"], job["metadata"]["uid"])
    assert RELEASED in job["metadata"]["annotations"]
    assert job["metadata"]["uid"] == uid or len(world.kubelet.trained[stage["inputDigest"]]) <= 2
    assert world.kubelet.finished[stage["inputDigest"]] == 1 and spent(stage)[1:] == (0, 0)


def test_a_job_that_no_intent_names(world: World) -> None:
    """With a chain's labels, and running: it is deleted, and the one that is recorded goes on."""
    world.scripts["named"] = lambda pod: plays.stall() if pod.attempt == 1 else plays.hang()
    space, _ = world.apply("plain", "named")
    space.wait(lambda: space.stage("a", "named").get("progress", {}).get("step"), "it trains")
    job = space.get("pytorchjob", "named-a-a1")
    meta = {key: job["metadata"][key] for key in ("labels", "annotations")} | {"name": "named-a-a7"}
    meta["labels"] = meta["labels"] | {"modelchain.dev/attempt": "7"}
    meta["annotations"] = {
        key: value for key, value in meta["annotations"].items() if key != RELEASED
    }
    copy = {key: job[key] for key in ("apiVersion", "kind", "spec")} | {"metadata": meta}
    copy["spec"] = copy["spec"] | {"runPolicy": {"suspend": False}}
    space.apply(copy)
    space.kubectl("wait", "--for=delete", "pytorchjob/named-a-a7", "--timeout=30s")
    now = space.get("pytorchjob", "named-a-a1")
    assert (
        now["metadata"]["uid"] == job["metadata"]["uid"]
        and "deletionTimestamp" not in now["metadata"]
    )
    assert spent(space.stage("a", "named")) == (["Running"], 0, 0)
    space.patch("named", {"suspend": True})
