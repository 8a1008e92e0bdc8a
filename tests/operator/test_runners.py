"""The runner port: what every runner must do, and chains whose runner is edited."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from jobrequests import CPU_POOL, IMAGE, request
from plainjob import INDEX, PlainJob
from podshapes import at, owned
from specs import config, inline, with_changes

from modelchain.api.reasons import Code
from modelchain.api.spec import ModelChain
from modelchain.api.status import AttemptStatus, ChainStatus
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import (
    ARTIFACTS,
    CHAINS,
    CLAIMS,
    EVENTS,
    PODS,
    AlreadyExists,
    Conflict,
    NotFound,
    Object,
    Resource,
)
from modelchain_operator.api.objects import label, true_condition
from modelchain_operator.api.objects import name as name_of
from modelchain_operator.reconcile.controller import Controller
from modelchain_operator.reconcile.snapshot import Reader, Snapshot
from modelchain_operator.runners.port import Runner
from modelchain_operator.runners.pytorchjob import REPLICA_INDEX, REPLICA_TYPE, PyTorchJob
from modelchain_operator.runners.registry import RUNNERS, runner_for, runner_of
from modelchain_operator.runners.template import ROLE, TRAINING, TRAINS, image_of, task_of
from modelchain_operator.watch import service
from modelchain_operator.watch.service import Service

NOW = "2026-09-01T00:00:00Z"
QUEUE = "kueue.x-k8s.io/queue-name"
KINDS: list[tuple[Runner, Any]] = [
    (PyTorchJob(), lambda job: job["spec"]["runPolicy"]),
    (PlainJob(), lambda job: job["spec"]),
]
both = pytest.mark.parametrize(
    ("runner", "suspended_in"), KINDS, ids=[runner.kind for runner, _ in KINDS]
)


def merged(job: Object, patch: Object) -> Object:
    """The job after the API server has applied a merge patch."""
    out = dict(job)
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merged(out.get(key, {}), value) if isinstance(value, dict) else value
    return out


def made(runner: Runner, *conditions: str, **changes: Any) -> Object:
    """The job as the API server returns it."""
    job: Object = json.loads(json.dumps(runner.build(request(**changes))))
    job["metadata"] |= {"uid": "u-1", "resourceVersion": "7"}
    found = [{"type": kind, "status": "True", "message": f"{kind} said"} for kind in conditions]
    job["status"] = {"conditions": found}
    return job


# What every runner must do.


@both
def test_a_new_job_is_suspended_and_has_the_labels_that_find_it(
    runner: Runner, suspended_in: Any
) -> None:
    job = runner.build(request(priority_class="high", nodes=2))
    assert suspended_in(job)["suspend"] is True
    assert job["kind"] == runner.kind
    assert job["apiVersion"] == f"{runner.resource.group}/{runner.resource.version}"
    meta = job["metadata"]
    assert meta["labels"] == {
        "modelchain.dev/chain": "vit",
        "modelchain.dev/chain-uid": "11111111-2222-3333-4444-555555555555",
        "modelchain.dev/claim-uid": "99999999-8888-7777-6666-555555555555",
        "modelchain.dev/stage": "b",
        "modelchain.dev/attempt": "1",
        "modelchain.dev/input-digest": ("ab" * 32)[:63],
        "modelchain.dev/role": "train",
        QUEUE: "modelchain-held",
        "kueue.x-k8s.io/priority-class": "high",
    }
    assert meta["annotations"] == {"modelchain.dev/input-digest": "ab" * 32}
    [owner] = meta["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["controller"], owner["blockOwnerDeletion"]) == (
        "ModelChain",
        "vit",
        True,
        False,
    )
    assert task_of(job) == json.loads(request().task) and image_of(job) == IMAGE


@both
def test_a_release_without_a_queue_takes_two_patches(runner: Runner, suspended_in: Any) -> None:
    job = made(runner)
    assert not runner.state(job).released and runner.state(job).suspended
    fence = {"uid": "u-1", "resourceVersion": "7"}
    first = runner.release(job, None, NOW)
    assert first == {"metadata": fence | {"labels": {QUEUE: None}}}
    between = merged(job, first)
    assert not runner.state(between).released and runner.state(between).suspended
    second = runner.release(between, None, NOW)
    assert second["metadata"] == fence | {"annotations": {"modelchain.dev/released": NOW}}
    after = merged(between, second)
    assert suspended_in(after)["suspend"] is False
    state = runner.state(after)
    assert state.released and not state.suspended and state.queue is None


@both
def test_a_release_into_a_queue_leaves_the_suspension_to_kueue(
    runner: Runner, suspended_in: Any
) -> None:
    job = made(runner)
    patch = runner.release(job, "vision", NOW)
    assert "spec" not in patch
    state = runner.state(merged(job, patch))
    assert state.released and state.suspended and state.queue == "vision"


@both
def test_a_job_that_another_client_started_is_only_marked_as_released(
    runner: Runner, suspended_in: Any
) -> None:
    job = made(runner)
    suspended_in(job)["suspend"] = False
    for queue in (None, "vision"):
        patch = runner.release(job, queue, NOW)
        assert patch["metadata"].keys() == {"uid", "resourceVersion", "annotations"}
        assert "spec" not in patch


@both
def test_how_a_job_ended(runner: Runner, suspended_in: Any) -> None:
    success = "Succeeded" if runner.kind == "PyTorchJob" else "Complete"
    assert runner.state(made(runner)).finished is None
    assert runner.state(made(runner, "Suspended")).finished is None
    assert runner.state(made(runner, success)).finished == "Succeeded"
    failed = runner.state(made(runner, "Failed"))
    assert (failed.finished, failed.message) == ("Failed", "Failed said")
    job = made(runner)
    del job["status"]
    assert runner.state(job).finished is None and not runner.state(job).deleting
    job["metadata"]["deletionTimestamp"] = NOW
    assert runner.state(job).deleting


@both
def test_the_rank_of_a_pods_node(runner: Runner, suspended_in: Any) -> None:
    first, third = {REPLICA_TYPE: "master"}, {REPLICA_TYPE: "worker", REPLICA_INDEX: "1"}
    if runner.kind == "Job":
        first, third = {INDEX: "0"}, {INDEX: "2"}
    assert runner.node_rank({"metadata": {"labels": first}}) == 0
    assert runner.node_rank({"metadata": {"labels": third}}) == 2
    assert runner.node_rank({"metadata": {}}) is None


@both
def test_where_users_and_the_operator_look_for_a_job(runner: Runner, suspended_in: Any) -> None:
    kind = runner.kind.lower()
    assert runner.describe("vit-b-a1", "team") == f"kubectl describe {kind} vit-b-a1 -n team"
    assert runner.event_uids(made(runner)) == ("u-1",)
    assert runner.resource.qualified.startswith(f"{kind}s.")


# Two runners at once.


@pytest.fixture
def two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNNERS, "PlainJob", PlainJob())


def test_attempts_of_old_statuses_have_the_pytorchjob_runner(two_kinds: None) -> None:
    old = {"name": "a", "number": 1, "inputDigest": "d", "state": "Running"}
    attempt = AttemptStatus.model_validate_json(json.dumps(old))
    assert attempt.runner is None and runner_for(attempt.runner).kind == "PyTorchJob"
    assert runner_for("PlainJob").kind == "Job"
    assert runner_of(made(PlainJob())).kind == "Job"


def test_each_kind_of_job_is_watched_separately_and_once(
    two_kinds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(PyTorchJob):
        resource = Resource("example.com", "v1", "otherjobs")

    monkeypatch.setitem(RUNNERS, "Other", Other())
    watched: list[set[str]] = []

    async def watch(self: Service, receivers: dict[Resource, Any]) -> None:
        watched.append({kind.plural for kind in receivers})
        await asyncio.Event().wait()

    async def main() -> None:
        monkeypatch.setattr(Service, "_watch", watch)
        monkeypatch.setattr(Service, "_resync", lambda self: asyncio.Event().wait())
        monkeypatch.setattr(service.signal, "alarm", lambda seconds: None)
        served = Service(None, Stub(), [], None, "")  # type: ignore[arg-type]
        running = asyncio.create_task(served.run())
        await asyncio.sleep(0.1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())
    ours = {"modelchains", "stageartifacts", "pods", "jobs"}
    assert watched[0] == ours
    assert sorted(map(sorted, watched[1:])) == [["otherjobs"], ["pytorchjobs"]]


class Stub:
    """Stands in for a controller and for events, and ignores every call."""

    async def reconcile(self, key: tuple[str, str]) -> None: ...
    def remember(self, pod: Object) -> None: ...
    def artifact_changed(self, record: Object) -> None: ...
    def tell(self, *said: object) -> None: ...


class ApiServer:
    """Objects by kind and name. The kinds in `absent` are not installed."""

    def __init__(self) -> None:
        self.objects: defaultdict[Resource, dict[str, Object]] = defaultdict(dict)
        self.absent: set[Resource] = set()
        self.deleted: list[tuple[str, str]] = []
        self._versions: Iterator[int] = iter(range(1, 10_000))

    def put(self, resource: Resource, thing: Object) -> Object:
        stored: Object = json.loads(json.dumps(thing))
        version = next(self._versions)
        stored["metadata"] = {"uid": f"uid-{version}", "creationTimestamp": at(0)} | (
            stored["metadata"] | {"resourceVersion": str(version)}
        )
        self.objects[resource][stored["metadata"]["name"]] = stored
        return stored

    def names(self, runner: Runner) -> list[str]:
        """The jobs of attempts. Index Jobs may be of the same kind."""
        jobs = self.objects[runner.resource].values()
        return sorted(name_of(job) for job in jobs if label(job, ROLE) != "index")

    async def get(self, resource: Resource, namespace: str, name: str) -> Object:
        if name not in self.objects[resource]:
            raise NotFound(name)
        return self.objects[resource][name]

    async def list(
        self, resource: Resource, namespace: str, selector: str = "", fields: str = ""
    ) -> list[Object]:
        if resource in self.absent:
            raise NotFound(resource.plural)
        parts = selector.replace(TRAINS, "").split(",")
        wanted = dict(part.split("=") for part in parts if part and "!=" not in part)
        found = [
            thing
            for thing in self.objects[resource].values()
            if wanted.items() <= thing["metadata"].get("labels", {}).items()
        ]
        if TRAINS not in selector:
            return found
        return [t for t in found if t["metadata"].get("labels", {}).get(ROLE) in TRAINING]

    async def create(self, resource: Resource, body: Object) -> Object:
        if body["metadata"]["name"] in self.objects[resource]:
            raise AlreadyExists(body["metadata"]["name"])
        if body["metadata"]["labels"].get(ROLE) == "index":  # its data is indexed at once
            body = body | {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
        return self.put(resource, body)

    async def patch(self, resource: Resource, namespace: str, name: str, body: Object) -> Object:
        thing = await self.get(resource, namespace, name)
        for field in ("uid", "resourceVersion"):
            if body["metadata"][field] != thing["metadata"][field]:
                raise Conflict(name)
        return self.put(resource, merged(thing, body))

    async def delete(
        self, resource: Resource, namespace: str, name: str, uid: str, propagation: str = ""
    ) -> None:
        if (await self.get(resource, namespace, name))["metadata"]["uid"] != uid:
            raise Conflict(name)
        del self.objects[resource][name]
        self.deleted.append((resource.plural, name))

    async def replace_status(self, resource: Resource, body: Object) -> Object:
        return self.put(resource, body)


class Team:
    """One chain of one stage on an API server, reconciled by the real controller."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def unheard(self: Reader, pods: object) -> None: ...

        monkeypatch.setattr(Reader, "progress", unheard)
        self.server, self.now, self.kind = ApiServer(), 1_760_000_000.0, "PyTorchJob"
        changes = {
            "metadata.name": "family",
            "metadata.namespace": "team",
            "metadata.uid": "chain-uid",
            "metadata.generation": 1,
            "spec.runner": {"image": IMAGE, "nodePool": "cpu"},
            "spec.storage": {"claimTemplate": {"size": "1Gi"}},
            "spec.data.volume": {"claimName": "data"},
        }
        self.body = with_changes(inline(config(), **changes))
        self.chain = self.server.put(CHAINS, self.body)
        pools = PoolFile.model_validate({"nodePools": {"cpu": CPU_POOL.model_dump(by_alias=True)}})
        self.controller = Controller(self.server, Stub(), pools, lambda: self.now)  # type: ignore[arg-type]

    def one_pass(self) -> ChainStatus:
        """Makes one pass with the current runner and returns the status after it."""
        chain = self.server.objects[CHAINS]["family"]
        spec = ModelChain.model_validate(self.body)
        runner = spec.spec.runner.model_copy(update={"kind": self.kind})
        edited = spec.model_copy(update={"spec": spec.spec.model_copy(update={"runner": runner})})
        stored = ChainStatus.model_validate_json(json.dumps(chain.get("status") or {}))
        snapshot = Snapshot(chain, edited, stored, jobs={}, pods=[])
        asyncio.run(self.controller._decide_and_act(snapshot))
        return snapshot.status

    def attempts(self) -> list[tuple[str, str | None, bool]]:
        """Makes one pass and returns the attempts: name, runner, and whether it is open."""
        [stage] = self.one_pass().stages
        return [(a.name, a.runner, a.finished_at is None) for a in stage.attempts]

    def pod(self, runner: Runner, phase: str, **state: Any) -> None:
        """Creates rank 0's pod of the first attempt."""
        job = self.server.objects[runner.resource]["family-a-a1"]
        rank_0 = {INDEX: "0"} if runner.kind == "Job" else {REPLICA_TYPE: "master"}
        labels = job["metadata"]["labels"] | rank_0 | {REPLICA_INDEX: "0"}
        owner = owned(runner.kind, "family-a-a1", job["metadata"]["uid"])
        meta = {"name": "family-a-a1-master-0", "namespace": "team", "uid": "pod-uid"}
        meta |= {"labels": labels, "ownerReferences": [owner]}
        container = {"name": "trainer", "image": IMAGE, "resources": {}}
        status = {"phase": phase, "containerStatuses": [{"name": "trainer", "state": state}]}
        spec = {"containers": [container], "nodeName": "node-1"}
        self.server.put(PODS, {"metadata": meta, "spec": spec, "status": status})


@pytest.fixture
def team(two_kinds: None, monkeypatch: pytest.MonkeyPatch) -> Team:
    return Team(monkeypatch)


@pytest.mark.parametrize(
    ("kind", "other"), [("PyTorchJob", "PlainJob"), ("PlainJob", "PyTorchJob")]
)
def test_an_edit_of_the_runner_leaves_a_running_attempt_and_applies_to_the_next(
    team: Team, kind: str, other: str
) -> None:
    runner, next_runner = RUNNERS[kind], RUNNERS[other]
    team.kind = kind
    assert team.attempts() == [("family-a-a1", kind, True)]
    job = team.server.objects[runner.resource]["family-a-a1"]
    assert runner.state(job).released and not runner.state(job).suspended
    team.pod(runner, "Running", running={"startedAt": at(10)})
    team.kind = other
    for _ in range(3):
        team.now += 60
        assert team.attempts() == [("family-a-a1", kind, True)], "the stage is not launched again"
    assert team.server.names(runner) == ["family-a-a1"] and team.server.names(next_runner) == []
    # The attempt fails, and the retry uses the other runner.
    ended = {"exitCode": 1, "reason": "Error", "startedAt": at(10), "finishedAt": at(200)}
    team.pod(runner, "Failed", terminated=ended)
    failed = {"type": "Failed", "status": "True", "message": "it failed"}
    team.server.put(runner.resource, merged(job, {"status": {"conditions": [failed]}}))
    team.one_pass()
    team.now += 60
    assert team.attempts() == [("family-a-a1", kind, False), ("family-a-a2", other, True)]
    assert team.server.names(runner) == ["family-a-a1"]
    assert team.server.names(next_runner) == ["family-a-a2"]
    again = team.server.objects[next_runner.resource]["family-a-a2"]
    assert next_runner.state(again).released


def test_an_attempt_of_a_status_that_names_no_runner_is_found(team: Team) -> None:
    team.one_pass()
    chain = team.server.objects[CHAINS]["family"]
    del chain["status"]["stages"][0]["attempts"][0]["runner"]
    team.pod(PyTorchJob(), "Running", running={"startedAt": at(10)})
    team.kind = "PlainJob"
    assert team.attempts() == [("family-a-a1", None, True)]
    assert team.server.names(PlainJob()) == [] and team.server.deleted == []


def test_an_attempt_without_pods_is_replaced_by_one_of_the_other_runner(team: Team) -> None:
    team.one_pass()
    team.kind = "PlainJob"
    team.one_pass()
    assert team.server.deleted == [("pytorchjobs", "family-a-a1")]
    team.one_pass()
    assert team.attempts() == [
        ("family-a-a1", "PyTorchJob", False),
        ("family-a-a2", "PlainJob", True),
    ]
    assert team.server.names(PyTorchJob()) == [] and team.server.names(PlainJob()) == [
        "family-a-a2"
    ]


def test_a_missing_kind_is_reported_only_for_the_next_launch(team: Team) -> None:
    team.server.absent = {PyTorchJob.resource}
    team.kind = "PlainJob"
    assert team.attempts() == [("family-a-a1", "PlainJob", True)], "only the other kind is missing"
    team.pod(PlainJob(), "Running", running={"startedAt": at(10)})
    team.kind = "PyTorchJob"
    status = team.one_pass()
    assert not status.stages[0].stalled and team.server.names(PlainJob()) == ["family-a-a1"]
    # Without pods the attempt would be replaced, but the other kind is not installed.
    team.server.objects[PODS].clear()
    assert team.attempts() == [("family-a-a1", "PlainJob", True)]
    # Once the job is gone, the next launch needs the missing kind.
    job = team.server.objects[PlainJob.resource].pop("family-a-a1")
    assert job["metadata"]["uid"]
    team.one_pass()
    team.now += 60
    status = team.one_pass()
    assert status.stages[0].reason == (
        f"RunnerMissing: PyTorchJob is not installed; {PyTorchJob.install}"
    )


def test_a_stray_is_deleted_by_the_kind_it_was_listed_as(team: Team) -> None:
    """Even if a stray has the name of an attempt, the attempt's own job stays."""
    team.one_pass()
    job = team.server.objects[PyTorchJob.resource]["family-a-a1"]
    stray = PlainJob().build(request())
    stray["metadata"] |= {"name": "family-a-a1", "labels": job["metadata"]["labels"]}
    team.server.put(PlainJob.resource, stray)
    for _ in range(2):
        assert team.attempts() == [("family-a-a1", "PyTorchJob", True)]
    assert team.server.deleted == [("jobs", "family-a-a1")]
    assert team.server.names(PyTorchJob()) == ["family-a-a1"]


def test_verify_jobs_are_no_strays(team: Team) -> None:
    """The kind of a runner's jobs may be one that the operator uses for other jobs."""
    team.one_pass()
    job = team.server.objects[PyTorchJob.resource]["family-a-a1"]
    check = PlainJob().build(request())
    labels = job["metadata"]["labels"] | {"modelchain.dev/role": "verify"}
    check["metadata"] |= {"name": "family-a-a1-verify", "labels": labels}
    team.server.put(PlainJob.resource, check)
    team.one_pass()
    assert team.server.deleted == []


def test_a_status_that_names_an_unknown_runner_is_not_acted_on(team: Team) -> None:
    team.one_pass()
    chain = team.server.objects[CHAINS]["family"]
    chain["status"]["stages"][0]["attempts"][0]["runner"] = "TrainJob"
    asyncio.run(team.controller.reconcile(("team", "family")))
    stalled = true_condition(team.server.objects[CHAINS]["family"], "Stalled") or {}
    assert stalled["reason"] == Code.STATUS_UNREADABLE
    assert "the runner TrainJob" in stalled["message"]
    assert team.server.names(PyTorchJob()) == ["family-a-a1"]
    assert not team.server.objects[ARTIFACTS] and not team.server.objects[EVENTS]
    assert list(team.server.objects[CLAIMS]) == ["family-artifacts"]
