"""Parts of a job that the API server refuses: pods, some of a gang's pods, Services, and pods of
verify Jobs. And a job that another controller suspends.
"""

from __future__ import annotations

import pytest
from podshapes import Pod, at, ended, in_init, init_failed, running, waiting, word
from stagelife import FIRST, Life, beside_a_sidecar, launched

from modelchain.api.contracts import LiveProgress
from modelchain.api.reasons import Code
from modelchain.api.status import State
from modelchain.plan.pools import NodePool, amount
from modelchain_operator.api.kube import JOBS
from modelchain_operator.reconcile.pod_evidence import OF_SERVICES, refusal
from modelchain_operator.runners.cpu_job import resources
from modelchain_operator.runners.verify import MOST

QUOTA = 'pods "x" is forbidden: exceeded quota: few, requested: pods=1, used: pods=1, limited: 1'
WEBHOOK = (
    'Internal error occurred: failed calling webhook "sidecar.istio.io": failed to call webhook:'
    ' Post "https://istiod.istio-system.svc:443/inject?timeout=10s": dial tcp 10.0.0.7:443:'
    " connect: connection refused"
)
INVALID = (
    'Pod "x" is invalid: spec.containers[0].resources.limits[rdma]: Invalid value: "rdma": must be'
    " a standard resource type or fully qualified"
)
SERVICES = 'services "x" is forbidden: exceeded quota: few, requested: services=1, limited: 0'
DONE = word("Succeeded", steps=100, macs=10**15)


def uncharged(life: Life) -> bool:
    stage = life.status.stages[0]
    return (stage.retries, stage.disruptions) == (0, 0)


@pytest.mark.parametrize(
    "words",
    [
        QUOTA,
        WEBHOOK,
        INVALID,
        'pods "x" is forbidden: no PriorityClass with name training was found',
        'pods "x" is forbidden: pod rejected: RuntimeClass "nvidia" not found',
        'admission webhook "validate.kyverno.svc-fail" denied the request: policy',
        "Timeout: request did not complete within requested timeout - context deadline exceeded",
    ],
)
@pytest.mark.parametrize("there", [0, 1], ids=["no pod", "some of the gang"])
def test_pods_that_are_refused(words: str, there: int) -> None:
    """Told in the server's words while a pod is missing. No deadline passes, and nothing is
    charged.
    """
    life = launched(nodes=2, **{"spec.deadlines": {"startSeconds": 30}})
    life.pods(*[running()][:there])
    life.look(1)
    life.event("FailedCreatePod", f"Error creating: {words}")
    stage = life.look(10)
    assert stage.stalled and stage.code is Code.PODS_FORBIDDEN and words in stage.reason
    assert any(words in text for text in life.said)
    life.look(3600)
    assert uncharged(life) and life.jobs == [FIRST] and life.status.is_true("Stalled")
    life.event("SuccessfulCreatePod", "Created pod: x")
    life.pods(running(start=3600, created=3600), running(1, start=3600, created=3600))
    stage = life.look(10)
    assert not stage.stalled and len(stage.attempts) == 1 and uncharged(life)


def test_a_first_step_that_comes_with_the_last_pod() -> None:
    """It is seen in the same pass. The hour before it counts towards no deadline."""
    life = launched(nodes=2, **{"spec.deadlines": {"stageSeconds": 60}})
    life.pods(running())
    life.look(1)
    life.event("FailedCreatePod", f"Error creating: {QUOTA}")
    life.look(3600)
    life.event("SuccessfulCreatePod", "Created pod: x")
    life.pods(running(), running(1, start=3601, created=3600))
    figures = {"samples_per_second": 1.0, "eta_seconds": 9.0, "attempt": FIRST, "macs": 10}
    answer = LiveProgress(step=1, steps=100, **figures)
    [master] = [o for (_, name), o in life.kube.objects.items() if name == f"{FIRST}-master-0"]
    life.controller.memory.note_answer(master["metadata"]["uid"], answer)
    attempt = life.look(10).attempts[0]
    assert attempt.stepped_at is not None and attempt.ending is None and uncharged(life)


def test_deadlines_count_from_when_the_last_pod_is_accepted() -> None:
    """A pod of the gang has run, and held its GPUs, for an hour by then."""
    life = launched(nodes=2, **{"spec.deadlines": {"startSeconds": 30, "stageSeconds": 60}})
    life.pods(running())
    life.look(1)
    life.event("FailedCreatePod", f"Error creating: {QUOTA}")
    life.look(3600)
    life.event("SuccessfulCreatePod", "Created pod: x")
    life.pods(running(), waiting(1, "ContainerCreating"))
    life.look(20)
    assert life.look(20).attempts[0].ending is None
    life.pods(running(), running(1, start=3640, created=3602))
    assert life.look(15).attempts[0].ending is None, "not a minute for the stage yet"
    assert life.look(30).attempts[0].ending == "StageDeadline"


def test_what_is_wrong_with_a_webhook_is_shown_by_its_configuration() -> None:
    life = launched()
    life.look(1)
    life.event("FailedCreatePod", f"Error creating: {WEBHOOK}")
    stage = life.look(10)
    assert stage.next.startswith("kubectl get mutatingwebhookconfigurations,")


def test_a_gang_that_is_refused_is_made_again_after_an_edit() -> None:
    """Some of its pods run already. With fewer nodes the job would be made differently."""
    life = launched(nodes=2)
    life.pods(running())
    life.look(1)
    life.event("FailedCreatePod", f"Error creating: {QUOTA}")
    life.look(10)
    life.edit(**{"spec.stages[0].resources": {"nodes": 1}})
    life.look(10)
    assert life.jobs == [] and uncharged(life)


def test_refused_services_are_told_while_pods_wait_for_rank_0() -> None:
    """All pods exist, and find one another by Services."""
    life = launched(nodes=2)
    life.pods(running(), in_init())
    life.look(10)
    assert not life.look().stalled
    life.event("FailedCreateService", f"Error creating: {SERVICES}")
    stage = life.look(10)
    assert stage.code is Code.PODS_FORBIDDEN and SERVICES in stage.reason
    life.look(10)
    life.event("SuccessfulCreateService", "Created service: x")
    assert not life.look().stalled


def test_a_stage_of_one_node_needs_no_service() -> None:
    life = launched()
    life.pods(running())
    life.event("FailedCreateService", f"Error creating: {SERVICES}")
    assert not life.look(60).stalled
    life.pods(ended(code=0, message=DONE))
    assert life.look(60).state is State.SUCCEEDED


@pytest.mark.parametrize("steps", [False, True])
def test_the_end_of_an_attempt_whose_pods_were_refused(steps: bool) -> None:
    """While rank 0's pod was refused, a worker gave up. That charges no budget, and the next
    attempt waits. If the attempt has taken a step since, its end is charged as any other.
    """
    life = launched(nodes=2)
    life.pods(in_init())
    life.look(1)
    life.event("FailedCreatePod", f"Error creating: {QUOTA}")
    life.look(10)
    life.pods(init_failed())
    assert life.look(220).stalled
    life.event("SuccessfulCreatePod", "Created pod: x")
    if steps:
        chain = life.kube.objects["modelchains", "vit"]
        chain["status"]["stages"][0]["attempts"][0]["partsRefused"] = False
    life.pods(running(start=220, created=220), init_failed())
    life.look(1)
    life.pods(ended(created=220, start=220, end=225), init_failed())
    life.end_job("Failed")
    stage = life.look(1)
    assert stage.attempts[0].failure == "Init" and stage.not_before is not None
    assert (stage.retries, stage.disruptions) == ((1, 1) if steps else (0, 0))
    assert life.look(11).attempt_count == 2


def event(reason: str, message: str, when: float) -> Pod:
    return {"reason": reason, "message": message, "lastTimestamp": at(when)}


def test_which_refusal_stands() -> None:
    """The newest one, in the server's words, unless a part of its kind was made later."""
    refused = event("FailedCreatePod", f"Error creating: {INVALID}", 5)
    service = event("FailedCreateService", f"Error creating: {SERVICES}", 4)
    assert refusal([service, refused]) == INVALID
    assert refusal([service, refused], OF_SERVICES) == SERVICES
    assert refusal([refused, event("SuccessfulCreatePod", "Created pod: x", 6)]) == ""
    assert refusal([refused, event("SuccessfulCreatePod", "Created pod: x", 5)]) == INVALID
    assert refusal([refused, event("SuccessfulCreateService", "Created service: x", 6)]) == INVALID
    combined = f"(combined from similar events): Error creating: {QUOTA}"
    assert refusal([event("FailedCreate", combined, 1)]) == QUOTA
    there = event("FailedCreatePod", 'Error creating: pods "x" already exists', 7)
    assert refusal([there]) == "" and refusal([there, refused]) == INVALID
    assert refusal([event("FailedCreatePod", "Error creating: \x1b[2Jno", 1)]) == "\\x1b[2Jno"


# -- the verify Job --------------------------------------------------------------------------------


def test_a_verify_jobs_pods_that_are_refused() -> None:
    life = launched()
    life.pods(beside_a_sidecar(ended(code=0)))
    life.look(120)
    job = life.kube.objects[JOBS.plural, f"{FIRST}-verify"]
    job["metadata"]["creationTimestamp"] = at(120)
    life.event("FailedCreate", f"Error creating: {QUOTA}", job)
    assert not life.look().stalled
    stage = life.look(10)
    assert stage.stalled and stage.code is Code.PODS_FORBIDDEN and QUOTA in stage.reason
    assert stage.state is State.VERIFYING and life.jobs == [FIRST]
    life.verify_pod(ended(code=0, message=DONE))
    assert life.look(10).state is State.SUCCEEDED


@pytest.mark.parametrize(
    ("pool", "wanted"),
    [
        ({"cpu": "2", "memory": "2Gi"}, {"cpu": "2", "memory": "2Gi"}),
        ({"cpu": 96, "memory": "900Gi"}, {"cpu": "4", "memory": "16Gi"}),
        ({"cpu": "500m", "ephemeralStorage": "1Ti"}, {"cpu": "500m", "ephemeral-storage": "16Gi"}),
        ({}, {}),
    ],
)
def test_a_verify_jobs_resources_are_the_pools(pool: Pod, wanted: Pod) -> None:
    """A LimitRange that admits the trainers admits the Job; but it needs no whole node."""
    asked = resources(NodePool.model_validate({"gpu": "A100", "gpusPerNode": 8, **pool}), MOST)
    assert asked == ({"requests": wanted, "limits": wanted} if wanted else {})


def test_quantities() -> None:
    texts = {"500m": 0.5, "96": 96, "1.5": 1.5, "1k": 1e3, "2Ki": 2048, "1Gi": 2**30, "3T": 3e12}
    assert {text: amount(text) for text in texts} == texts


# -- another controller suspends the job -----------------------------------------------------------


def test_another_controller_that_suspends_a_job_is_told_and_never_fought() -> None:
    """It suspends the job again and again. There is one attempt, and no budget is charged."""
    life = launched()
    for turn in range(10):
        began = turn * 100.0
        life.pods(running(created=began, start=began + 1))
        stage = life.look(10)
        assert not stage.stalled and stage.state in (State.STARTING, State.RUNNING)
        life.suspend_job(True)
        for _ in range(3):
            stage = life.look(20)
            assert stage.stalled and stage.code is Code.SUSPENDED_BY_ANOTHER
            assert life.job()["spec"]["runPolicy"]["suspend"] is True
            life.pods()
        life.suspend_job(False)
        life.now = began + 100
    assert life.jobs == [FIRST] and len(stage.attempts) == 1 and uncharged(life)
    life.pods(running(created=1000, start=1001))
    life.look(10)
    life.pods(ended(code=0, message=DONE, created=1000, start=1001, end=1010))
    life.end_job("Succeeded")
    assert life.look(20).state is State.SUCCEEDED


def test_no_deadline_passes_while_another_controller_suspends_a_job() -> None:
    life = launched(**{"spec.deadlines": {"startSeconds": 30, "stageSeconds": 60}})
    life.pods(running())
    life.look(20)
    life.suspend_job(True)
    life.pods()
    life.look(10_000)
    assert life.jobs == [FIRST] and uncharged(life)
    life.edit(**{"metadata.annotations": {"modelchain.dev/retry": "1"}})
    life.look()
    life.look()
    assert life.jobs == ["vit-vit-t-a2"] and uncharged(life)
