"""The two objects of a TrainJob's attempt, how its pods are proven to be its own, and what becomes
of it if the operator dies between two writes.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from jobrequests import IMAGE, generated, of_examples, request
from plainjob import INDEX
from podshapes import T0, at, owned
from team import Team, merged

from modelchain.api.contracts import FailureClass
from modelchain.api.reasons import Code
from modelchain.api.status import StageStatus
from modelchain_operator.api.kube import EVENTS, JOBS, PODS, AlreadyExists, Object, Resource
from modelchain_operator.runners.kueue import PRIORITY_CLASS, QUEUE
from modelchain_operator.runners.template import TASK_VARIABLE, image_of, task_of
from modelchain_operator.runners.trainjob import JOBSETS, RUNTIMES, STEP, TRAINJOBS, TrainJob

RUNNER = TrainJob()
FIRST = "family-a-a1"
REQUESTS = [*of_examples(), *(generated(seed) for seed in range(40))]


def runtime(**changes: Any) -> Object:
    made = RUNNER.runtime(request(**changes))
    assert made is not None
    return made


# -- the objects -----------------------------------------------------------------------------------


def test_the_runtime_retries_nothing_and_has_our_pods() -> None:
    made = runtime(nodes=4)
    spec = made["spec"]
    assert spec["mlPolicy"] == {"numNodes": 4, "torch": {}}
    assert spec["template"]["spec"]["failurePolicy"] == {"maxRestarts": 0}
    [node] = spec["template"]["spec"]["replicatedJobs"]
    assert (node["name"], node["template"]["spec"]["backoffLimit"]) == ("node", 0)
    assert node["template"]["metadata"]["labels"][STEP] == "trainer"
    pods = node["template"]["spec"]["template"]["spec"]
    assert pods["restartPolicy"] == "Never"
    [container] = pods["containers"]
    assert (container["name"], container["image"]) == ("node", IMAGE)
    assert container["command"][:3] == ["python", "-m", "torch.distributed.run"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"metrics": 9090, "progress": 9091}


@pytest.mark.parametrize("asked", REQUESTS, ids=lambda r: f"{r.chain}-{r.stage}")
def test_both_objects_say_the_same(asked: Any) -> None:
    job, made = RUNNER.build(asked), RUNNER.runtime(asked)
    assert made is not None
    assert job["spec"]["runtimeRef"]["name"] == made["metadata"]["name"] == asked.name
    assert job["metadata"]["ownerReferences"] == made["metadata"]["ownerReferences"]
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (
        asked.nodes,
        asked.processes_per_node,
    )
    assert [variable["name"] for variable in trainer["env"]] == [TASK_VARIABLE]
    assert (task_of(job), image_of(job)) == (task_of(made), image_of(made))
    assert RUNNER.nodes(job) == made["spec"]["mlPolicy"]["numNodes"]


def test_each_object_is_found_by_its_labels_and_only_the_job_has_a_queue() -> None:
    asked = request(priority_class="high")
    made = RUNNER.runtime(asked)
    assert made is not None
    [node] = made["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]
    ours = RUNNER.build(asked)["metadata"]["labels"]
    assert ours.pop(QUEUE) == "modelchain-held" and ours.pop(PRIORITY_CLASS) == "high"
    for thing in (made, made["spec"]["template"], node["template"], pod):
        labels = thing["metadata"]["labels"]
        assert ours.items() <= labels.items()
        assert not {key for key in labels if "kueue" in key}
        assert thing["metadata"]["annotations"]["modelchain.dev/input-digest"] == "ab" * 32


def test_which_part_has_made_a_pod() -> None:
    pod = {
        "metadata": {
            "name": "vit-b-a1-node-0-3-x7k2q",
            "labels": {INDEX: "3"},
            "ownerReferences": [owned("Job", "vit-b-a1-node-0", "job-uid")],
        }
    }
    assert RUNNER.job_uid(pod) == "job-uid" and RUNNER.node_rank(pod) == 3
    for change in (
        {"ownerReferences": []},
        {"ownerReferences": [owned("PyTorchJob", "vit-b-a1-node-0", "job-uid")]},
        {"ownerReferences": [owned("Job", "vit-b-a1-node-0", "u") | {"controller": False}]},
        {"name": "copy"},
        {"name": "vit-b-a1-node-0-3-copy"},
        {"labels": {INDEX: "2"}},
        {"labels": {}},
    ):
        assert RUNNER.job_uid({"metadata": pod["metadata"] | change}) is None


def test_the_longest_names_fit() -> None:
    """JobSet refuses a TrainJob whose pods would have longer names than a label may have."""
    attempt = f"{'c' * 24}-{'s' * 16}-a999"
    pod = f"{attempt}-node-0-999-x7k2q"
    assert len(pod) == 63
    owner = owned("Job", f"{attempt}-node-0", "job-uid")
    meta = {"name": pod, "labels": {INDEX: "999"}, "ownerReferences": [owner]}
    assert RUNNER.job_uid({"metadata": meta}) == "job-uid"


# -- an attempt ------------------------------------------------------------------------------------


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> Team:
    team = Team(monkeypatch)
    team.kind, team.now = "TrainJob", T0 + 1000
    return team


def launched(team: Team) -> Object:
    """The job of the first attempt, which was released."""
    assert team.attempts() == [(FIRST, "TrainJob", True)]
    job: Object = team.server.objects[TRAINJOBS][FIRST]
    assert RUNNER.state(job).released and not RUNNER.state(job).suspended
    return job


def looked(team: Team, seconds: float = 60.0) -> StageStatus:
    """The stage after one more pass."""
    team.now += seconds
    [stage] = team.one_pass().stages
    return stage


def ended(code: int = 0, message: str = "") -> Object:
    return {
        "terminated": {
            "exitCode": code,
            "startedAt": at(10),
            "finishedAt": at(200),
            "message": message,
        }
    }


WORD = json.dumps(
    {"result": "Succeeded", "manifestDigest": "a" * 64, "artifactDigest": "d" * 64, "steps": 1}
)


def test_the_runtime_is_made_first_and_both_go_together(team: Team) -> None:
    made: list[str] = []
    create = team.server.create

    async def noted(resource: Resource, body: Object) -> Object:
        made.append(resource.plural)
        return await create(resource, body)

    team.server.create = noted  # type: ignore[method-assign]
    launched(team)
    assert made[-2:] == ["trainingruntimes", "trainjobs"]
    team.kind = "PyTorchJob"  # an attempt without pods is replaced
    team.one_pass()
    assert team.server.deleted == [("trainjobs", FIRST), ("trainingruntimes", FIRST)]
    looked(team)
    assert team.attempts()[-1] == ("family-a-a2", "PyTorchJob", True)


def test_a_runtime_that_goes_slowly_is_deleted_once(team: Team) -> None:
    """Trainer keeps a runtime until its TrainJob is gone, and that until its pods are."""
    job = launched(team)
    stored = team.server.objects[RUNTIMES][FIRST]
    team.server.put(TRAINJOBS, merged(job, {"metadata": {"deletionTimestamp": at(0)}}))
    team.kind = "PyTorchJob"
    team.one_pass()
    team.server.put(RUNTIMES, merged(stored, {"metadata": {"deletionTimestamp": at(0)}}))
    looked(team)
    assert team.server.deleted.count(("trainingruntimes", FIRST)) <= 1


def intended(team: Team, monkeypatch: pytest.MonkeyPatch) -> Object:
    """The operator dies between the two creations. Returns the runtime that it leaves."""
    create = team.server.create

    async def dies(resource: Resource, body: Object) -> Object:
        if resource == TRAINJOBS:
            raise ConnectionError("the operator dies here")
        return await create(resource, body)

    with monkeypatch.context() as patch:
        patch.setattr(team.server, "create", dies)
        with pytest.raises(ConnectionError):
            team.one_pass()
    assert not team.server.objects[TRAINJOBS]
    left: Object = team.server.objects[RUNTIMES][FIRST]
    return left


def test_a_death_between_the_two_objects_is_harmless(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = intended(team, monkeypatch)
    launched(team)
    assert team.server.objects[RUNTIMES][FIRST]["metadata"]["uid"] == left["metadata"]["uid"]
    assert team.server.deleted == []


def test_a_runtime_that_was_made_before_an_edit_is_made_anew(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = intended(team, monkeypatch)
    team.body["spec"]["runner"]["image"] = IMAGE.replace("0" * 64, "1" * 64)
    job = launched(team)
    stored = team.server.objects[RUNTIMES][FIRST]
    assert stored["metadata"]["uid"] != left["metadata"]["uid"]
    assert image_of(job) == image_of(stored) == team.body["spec"]["runner"]["image"]


@pytest.mark.parametrize("field", ["modelchain.dev/chain-uid", "modelchain.dev/input-digest"])
def test_a_runtime_of_another_takes_the_name(
    team: Team, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    left = intended(team, monkeypatch)
    kind = "labels" if field.endswith("uid") else "annotations"
    other = merged(left, {"metadata": {kind: {field: "another"}, "ownerReferences": []}})
    team.server.put(RUNTIMES, other)
    for _ in range(3):
        try:
            attempts = team.attempts()
        except AlreadyExists:  # the next pass sees whose it is
            continue
    assert [(name, open_) for name, _, open_ in attempts] == [
        (FIRST, False),
        ("family-a-a2", True),
    ]
    assert team.server.names(RUNNER) == ["family-a-a2"] and not team.server.deleted
    assert FIRST in team.server.objects[RUNTIMES], "another's is not touched"


def test_a_pod_counts_by_its_owners_up_to_the_trainjob(team: Team) -> None:
    job = launched(team)
    team.pod(RUNNER, "Running", running={"startedAt": at(10)})
    assert looked(team).attempts[0].pods.keys() == {"pod-uid"}
    team.pod(RUNNER, "Succeeded", **ended(message=WORD))
    done = {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
    team.server.put(TRAINJOBS, merged(job, done))
    for resource, kind in ((JOBSETS, "Completed"), (JOBS, "Complete")):
        for part in team.server.parts_of(FIRST, resource):
            over = {"status": {"conditions": [{"type": kind, "status": "True"}]}}
            team.server.put(resource, merged(part, over))
    assert looked(team).artifact is not None


@pytest.mark.parametrize(
    "forged",
    [
        {"ownerReferences": [owned("TrainJob", FIRST, "another-uid")]},
        {"ownerReferences": [owned("Deployment", FIRST, "uid")]},
        {"ownerReferences": [owned("JobSet", FIRST, "jobset-uid")]},
        {"ownerReferences": []},
    ],
    ids=["another TrainJob", "a Deployment", "itself", "none"],
)
def test_a_pod_whose_owners_lead_elsewhere_is_no_evidence(team: Team, forged: Object) -> None:
    job = launched(team)
    team.pod(RUNNER, "Succeeded", **ended(message=WORD))
    team.parts(**forged)
    failed = {"status": {"conditions": [{"type": "Failed", "status": "True", "message": "m"}]}}
    team.server.put(TRAINJOBS, merged(job, failed))
    for resource in (JOBSETS, JOBS):
        team.server.objects[resource] = {}
    stage = looked(team)
    assert stage.artifact is None
    assert stage.attempts[0].failure is FailureClass.UNKNOWN


@pytest.mark.parametrize("kept", [(JOBSETS, JOBS), (JOBS,)], ids=["JobSet", "Job"])
def test_nothing_is_launched_while_a_part_may_still_make_pods(
    team: Team, kept: tuple[Resource, ...]
) -> None:
    """A user deletes the TrainJob in the background. Its JobSet and Job are deleted after it."""
    launched(team)
    team.parts()
    del team.server.objects[TRAINJOBS][FIRST]
    if JOBSETS not in kept:
        del team.server.objects[JOBSETS][FIRST]
    for _ in range(3):
        looked(team)
    assert team.server.names(RUNNER) == [] and len(looked(team).attempts) == 1
    team.server.objects[JOBSETS].clear()
    del team.server.objects[JOBS][f"{FIRST}-node-0"]
    for _ in range(3):
        looked(team)
    assert team.server.names(RUNNER) == ["family-a-a2"]


def test_nothing_is_launched_while_a_pod_without_its_job_lives(team: Team) -> None:
    """Its Job is gone, and this operator has never seen it, so nothing proves whose pod it is."""
    launched(team)
    team.pod(RUNNER, "Running", running={"startedAt": at(10)})
    for resource in (TRAINJOBS, JOBSETS, JOBS):
        team.server.objects[resource] = {}
    for _ in range(3):
        looked(team)
    assert team.server.names(RUNNER) == []
    team.server.objects[PODS].clear()
    for _ in range(3):
        looked(team)
    assert team.server.names(RUNNER) == ["family-a-a2"]


def test_a_pod_stays_proven_after_its_job_is_gone(team: Team) -> None:
    """The operator has seen whose Job it was. The pod's last word counts."""
    launched(team)
    team.pod(RUNNER, "Pending", waiting={"reason": "ContainerCreating"})
    looked(team)
    for resource in (TRAINJOBS, JOBSETS, JOBS):
        team.server.objects[resource] = {}
    [pod] = team.server.objects[PODS].values()
    container = {"name": "trainer", "state": ended(message=WORD)}
    status = {"phase": "Succeeded", "containerStatuses": [container]}
    team.server.put(PODS, pod | {"status": status})
    assert looked(team).artifact is not None


def test_events_of_the_job_set_and_of_the_job_tell_why_pods_are_refused(team: Team) -> None:
    launched(team)
    team.parts()
    asked: list[str] = []
    listed = team.server.list

    async def events(resource: Resource, *rest: str, **more: str) -> list[Object]:
        if resource != EVENTS:
            return await listed(resource, *rest, **more)
        asked.append(more["fields"].removeprefix("involvedObject.uid="))
        refused = {
            "reason": "FailedCreate",
            "message": 'Error creating: pods "x" is forbidden: exceeded quota: q',
            "lastTimestamp": at(0),
        }
        return [refused] if asked[-1] == "job-uid" else []

    team.server.list = events  # type: ignore[method-assign]
    looked(team)  # it starts to wait for pods
    stage = looked(team)
    assert {"jobset-uid", "job-uid"} < set(asked)
    assert stage.code is Code.PODS_FORBIDDEN and "exceeded quota" in stage.message


def test_a_kind_without_its_job_sets_counts_as_missing(team: Team) -> None:
    team.server.absent = {JOBSETS}
    assert team.one_pass().stages[0].reason == (
        f"RunnerMissing: TrainJob is not installed; {RUNNER.install}"
    )
    assert not team.server.objects[RUNTIMES]
    team.kind = "PyTorchJob"
    assert team.attempts() == [(FIRST, "PyTorchJob", True)]
