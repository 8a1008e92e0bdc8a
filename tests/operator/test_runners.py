"""The runner port: what every runner must do, and chains whose runner is edited."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from jobrequests import IMAGE, request
from plainjob import INDEX, PlainJob
from podshapes import at
from team import Stub, Team, merged

from modelchain.api.reasons import Code
from modelchain.api.status import AttemptStatus
from modelchain_operator.api.kube import (
    ARTIFACTS,
    CHAINS,
    CLAIMS,
    EVENTS,
    PODS,
    Object,
    Resource,
)
from modelchain_operator.api.objects import true_condition
from modelchain_operator.runners.port import Runner
from modelchain_operator.runners.pytorchjob import REPLICA_INDEX, REPLICA_TYPE, PyTorchJob
from modelchain_operator.runners.registry import RUNNERS, runner_for, runner_of
from modelchain_operator.runners.template import image_of, task_of
from modelchain_operator.runners.trainjob import TrainJob
from modelchain_operator.watch import service
from modelchain_operator.watch.service import Service

NOW = "2026-09-01T00:00:00Z"
QUEUE = "kueue.x-k8s.io/queue-name"
KINDS: list[tuple[Runner, Any]] = [
    (PyTorchJob(), lambda job: job["spec"]["runPolicy"]),
    (TrainJob(), lambda job: job["spec"]),
    (PlainJob(), lambda job: job["spec"]),
]
every = pytest.mark.parametrize(
    ("runner", "suspended_in"), KINDS, ids=[runner.kind for runner, _ in KINDS]
)


def made(runner: Runner, *conditions: str, **changes: Any) -> Object:
    """The job as the API server returns it."""
    job: Object = json.loads(json.dumps(runner.build(request(**changes))))
    job["metadata"] |= {"uid": "u-1", "resourceVersion": "7"}
    found = [{"type": kind, "status": "True", "message": f"{kind} said"} for kind in conditions]
    job["status"] = {"conditions": found}
    return job


# What every runner must do.


@every
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


@every
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


@every
def test_a_release_into_a_queue_leaves_the_suspension_to_kueue(
    runner: Runner, suspended_in: Any
) -> None:
    job = made(runner)
    patch = runner.release(job, "vision", NOW)
    assert "spec" not in patch
    state = runner.state(merged(job, patch))
    assert state.released and state.suspended and state.queue == "vision"


@every
def test_a_job_that_another_client_started_is_only_marked_as_released(
    runner: Runner, suspended_in: Any
) -> None:
    job = made(runner)
    suspended_in(job)["suspend"] = False
    for queue in (None, "vision"):
        patch = runner.release(job, queue, NOW)
        assert patch["metadata"].keys() == {"uid", "resourceVersion", "annotations"}
        assert "spec" not in patch


@every
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


@every
def test_the_rank_of_a_pods_node(runner: Runner, suspended_in: Any) -> None:
    first, third = {REPLICA_TYPE: "master"}, {REPLICA_TYPE: "worker", REPLICA_INDEX: "1"}
    if runner.kind != "PyTorchJob":
        first, third = {INDEX: "0"}, {INDEX: "2"}
    assert runner.node_rank({"metadata": {"labels": first}}) == 0
    assert runner.node_rank({"metadata": {"labels": third}}) == 2
    assert runner.node_rank({"metadata": {}}) is None


@every
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
    assert sorted(map(sorted, watched[1:])) == [["otherjobs"], ["pytorchjobs"], ["trainjobs"]]


@pytest.fixture
def team(two_kinds: None, monkeypatch: pytest.MonkeyPatch) -> Team:
    return Team(monkeypatch)


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("PyTorchJob", "PlainJob"),
        ("PlainJob", "PyTorchJob"),
        ("PyTorchJob", "TrainJob"),
        ("TrainJob", "PyTorchJob"),
    ],
)
def test_an_edit_of_the_runner_leaves_a_running_attempt_and_applies_to_the_next(
    team: Team, kind: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "PlainJob" not in (kind, other):  # its Jobs would be those that TrainJobs make
        monkeypatch.delitem(RUNNERS, "PlainJob")
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
    over = {"status": {"conditions": [failed]}}
    team.server.put(runner.resource, merged(job, over))
    for resource in runner.parts:
        for part in team.server.parts_of("family-a-a1", resource):
            team.server.put(resource, merged(part, over))
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
    chain["status"]["stages"][0]["attempts"][0]["runner"] = "MPIJob"
    asyncio.run(team.controller.reconcile(("team", "family")))
    stalled = true_condition(team.server.objects[CHAINS]["family"], "Stalled") or {}
    assert stalled["reason"] == Code.STATUS_UNREADABLE
    assert "the runner MPIJob" in stalled["message"]
    assert team.server.names(PyTorchJob()) == ["family-a-a1"]
    assert not team.server.objects[ARTIFACTS] and not team.server.objects[EVENTS]
    assert list(team.server.objects[CLAIMS]) == ["family-artifacts"]


# The runner that is chosen where the spec names none.


def installed(team: Team, *kinds: str) -> None:
    team.server.absent = {RUNNERS[kind].resource for kind in RUNNERS.keys() - {*kinds}}


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch) -> Team:
    team = Team(monkeypatch)
    team.kind = "Auto"
    return team


@pytest.mark.parametrize(
    ("kinds", "taken"),
    [
        (("PyTorchJob", "TrainJob"), "PyTorchJob"),
        (("PyTorchJob",), "PyTorchJob"),
        (("TrainJob",), "TrainJob"),
    ],
)
def test_auto_takes_the_first_kind_that_is_installed(
    auto: Team, kinds: tuple[str, ...], taken: str
) -> None:
    installed(auto, *kinds)
    assert auto.attempts() == [("family-a-a1", taken, True)]
    assert auto.server.names(RUNNERS[taken]) == ["family-a-a1"]


def test_auto_without_any_kind_names_all_of_them(auto: Team) -> None:
    installed(auto)
    assert auto.one_pass().stages[0].reason == (
        f"RunnerMissing: neither PyTorchJob nor TrainJob is installed; {TrainJob.install}"
    )


def test_what_auto_has_chosen_stays_for_the_attempt(auto: Team) -> None:
    """Even if no pod runs yet. The next attempt is of the kind that is preferred then."""
    installed(auto, "TrainJob")
    assert auto.attempts() == [("family-a-a1", "TrainJob", True)]
    installed(auto, "PyTorchJob", "TrainJob")
    for _ in range(3):
        auto.now += 60
        assert auto.attempts() == [("family-a-a1", "TrainJob", True)]
    assert auto.server.deleted == []
    del auto.server.objects[TrainJob.resource]["family-a-a1"]
    for _ in range(3):
        auto.now += 60
        auto.one_pass()
    assert auto.attempts()[-1] == ("family-a-a2", "PyTorchJob", True)


def test_a_kind_that_is_not_installed_is_not_asked_for_at_every_look(auto: Team) -> None:
    installed(auto, "PyTorchJob")
    asked: list[str] = []
    listed = auto.server.list

    async def noted(resource: Resource, *rest: str, **more: str) -> list[Object]:
        asked.append(resource.plural)
        return await listed(resource, *rest, **more)

    auto.server.list = noted  # type: ignore[method-assign]
    auto.one_pass()
    asked.clear()
    auto.one_pass()
    assert "pytorchjobs" in asked and "trainjobs" not in asked
    auto.kind = "TrainJob"  # now the chain asks for it
    auto.one_pass()
    assert "trainjobs" in asked
    asked.clear()
    auto.kind, auto.now = "Auto", auto.now + 61
    auto.one_pass()
    assert "trainjobs" in asked
