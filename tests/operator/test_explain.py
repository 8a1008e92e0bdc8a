"""`explain`: for each way in which a chain does not run, the right reason, its cause, and the next
command.
"""

from __future__ import annotations

import shlex
from typing import Any

import podshapes
import pytest
import situations
from podshapes import at
from situations import (
    ATTEMPT,
    NOW,
    chain,
    claim,
    condition,
    current,
    event,
    job,
    lease,
    mine,
    told,
    workload,
)

from modelchain.api.contracts import FailureClass, Progress
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import ChainStatus, StageStatus, State, Total
from modelchain.decide.conditions import sentence
from modelchain.identity.digest import TRAINER_MATH
from modelchain_operator.api.kube import Object
from modelchain_operator.explain.clues import Line, gpu_time
from modelchain_operator.explain.explain import Explanation, document, explain
from modelchain_operator.explain.read import Situation
from modelchain_operator.reconcile.execute import with_words
from modelchain_operator.reconcile.pod_evidence import stuck
from modelchain_operator.runners.kueue import KueueQueue
from modelchain_operator.runners.pytorchjob import PyTorchJob


def ask(thing: Object, **more: Any) -> Explanation:
    found = explain(Situation(chain=thing, now=NOW, **{"leases": [lease()], **more}))
    assert found.state.endswith(".") and found.cause.endswith(".")
    assert "\n" not in found.state + found.cause + found.next
    words = shlex.split(found.next)
    assert words[0] in ("kubectl", "modelchain")
    if words[0] == "modelchain":
        assert words[3:5] == ["-n", "team"]
    assert "  " not in found.next and "{" not in found.next
    return found


def check(found: Explanation, reason: str, cause: str, then: str) -> None:
    assert found.reason == reason
    assert cause.lower() in found.cause.lower()
    assert found.next == then


# No operator reconciles the chain.


def test_created_and_no_operator_is_there() -> None:
    found = ask(chain(seen=-1), leases=[])
    check(found, "NoOperator", "no Lease modelchain-operator", "kubectl get deployments -A")
    assert "created" in found.state


def test_changed_and_the_operator_is_dead() -> None:
    found = ask(chain(current(), seen=2), leases=[lease(2990)])
    cause = "its Lease in namespace modelchain-system was last renewed by operator-7d 10m ago"
    check(found, "NoOperator", cause, "kubectl get pods -n modelchain-system")
    assert "changed" in found.state
    assert found.evidence == (
        Line(
            "lease/modelchain-operator in modelchain-system",
            "last renewed by operator-7d",
            pytest.approx(610, abs=1),
        ),
    )


def test_a_lease_that_was_given_back() -> None:
    assert "was given back" in ask(chain(seen=-1), leases=[lease(3599, "")]).cause


def test_the_lease_that_was_renewed_last_counts() -> None:
    assert (
        ask(chain(current(State.PENDING)), leases=[lease(10), lease(3599)]).reason == "InProgress"
    )


def test_a_recent_change() -> None:
    thing = chain(current(), seen=2)
    thing["metadata"]["managedFields"] = [
        {"time": at(3595)},
        {"time": at(3599), "subresource": "status"},
    ]
    check(ask(thing), "NotSeenYet", "5s old", "modelchain watch family -n team")


def test_an_operator_that_does_not_reconcile() -> None:
    then = "kubectl logs operator-7d -n modelchain-system --tail=50"
    check(
        ask(chain(current(), seen=2)),
        "NotSeen",
        "has not made a pass over this chain for 60m",
        then,
    )


@pytest.mark.parametrize("leases", [[], [lease(0)]])
def test_a_recent_change_without_a_live_operator(leases: list[Object]) -> None:
    thing = chain(current(), seen=2)
    for changed, reason in ((3571, "NotSeenYet"), (3569, "NoOperator")):
        thing["metadata"]["managedFields"] = [{"time": at(changed)}]
        assert ask(thing, leases=leases).reason == reason


def test_an_old_lease_hides_no_cause() -> None:
    """An operator may run without a Lease, and does not renew one that an earlier operator left."""
    stage = current(
        State.PENDING, Reason(Code.CLAIM_MISSING, "data", "there is no claim data"), stalled=True
    )
    found = ask(chain(stage, condition("Stalled")), leases=[lease(3534)])
    check(found, "ClaimMissing", "there is no claim data", "kubectl get pvc -n team")
    silent = "last renewed by operator-7d; if no operator runs, nothing goes on"
    assert found.evidence[-1] == Line(
        "lease/modelchain-operator in modelchain-system", silent, pytest.approx(66, abs=1)
    )


# Finished, failed, stopped.


def test_complete() -> None:
    stages = [
        StageStatus(name=name, state=State.SUCCEEDED, results={"top1": "30.0"}) for name in "a"
    ]
    thing = chain(None, condition("Complete"), seen=3)
    status = ChainStatus(
        observed_generation=3,
        conditions=[condition("Complete")],
        stages=stages,
        total=Total(gpu_seconds=7200, cost="7.20"),
    )
    thing["status"] = status.model_dump(mode="json", by_alias=True)
    then = "kubectl get sart -l modelchain.dev/chain=family -n team"
    check(
        ask(thing), "Complete", "top1 30.0 %; the chain took 0 MACs, 2.0 GPU hours, cost 7.20", then
    )
    found = ask(thing, leases=[lease(0)], unreadable=("pods", "events"))
    check(found, "Complete", "", then)
    assert "its one stage finished 60m ago" in found.state and len(found.evidence) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 GPU seconds"), (359, "359 GPU seconds"), (360, "0.1 GPU hours")]
)
def test_short_times_are_not_rounded_to_zero(seconds: float, text: str) -> None:
    assert gpu_time(seconds) == text


@pytest.mark.parametrize(
    ("failure", "then"),
    [
        ("OutOfMemory", "kubectl edit mchain family -n team"),
        ("NonFinite", "kubectl edit mchain family -n team"),
        ("CorruptPredecessor", "modelchain retry family -n team"),
        ("UserError", "kubectl edit mchain family -n team"),
        ("Image", "kubectl edit mchain family -n team"),
        ("StageDeadline", "kubectl edit mchain family -n team"),
    ],
)
def test_failed(failure: str, then: str) -> None:
    ended = ATTEMPT.model_copy(
        update={"failure": FailureClass(failure), "message": "it broke", "finished_at": at(3540)}
    )
    reason = Reason(Code(failure), message="it broke; 3 retries are allowed")
    stage = told(StageStatus(name="b", state=State.FAILED, attempts=[ended]), reason)
    found = ask(chain(stage, condition("Stalled"), condition("Failed")))
    check(found, failure, "it broke; 3 retries are allowed.", then)
    assert found.evidence == (Line("attempt family-b-a2", f"{failure}: it broke", 60.0),)


def test_failed_and_suspended() -> None:
    thing = chain(current(State.FAILED, Reason(Code.ERROR, message="no")), suspend=True)
    assert "besides, the chain is suspended" in ask(thing).cause


def test_suspended() -> None:
    stage = StageStatus(
        name="b", state=State.SUSPENDED, reason="spec.suspend is true", checkpoint_step=120
    )
    check(
        ask(chain(stage, suspend=True)),
        "Suspended",
        "from step 120",
        "modelchain resume family -n team",
    )


def test_stopping() -> None:
    found = ask(chain(current(State.RUNNING), suspend=True), pods=[mine(podshapes.running())])
    check(found, "Stopping", "write a checkpoint", "modelchain watch family -n team")


def test_deleting() -> None:
    thing = chain(current())
    thing["metadata"]["deletionTimestamp"] = at(3500)
    found = ask(thing, pods=[mine(podshapes.deleted(podshapes.running(), grace_over=3600))])
    check(
        found,
        "Deleting",
        "still ending (1)",
        "kubectl get pods -l modelchain.dev/chain=family -n team",
    )
    assert found.evidence[0].message == "is ending"


# Stalled, for the operator's own reasons.


RUNNER = PyTorchJob()
LAUNCH_REFUSED = Reason(Code.LAUNCH_REFUSED, "family-b-a2", next_command=RUNNER.controller_pods)


def refused(code: Code, said: str) -> Reason:
    """The reason that the operator remembers for a refusal of the API server."""
    reason = LAUNCH_REFUSED if code is Code.LAUNCH_REFUSED else Reason(code)
    return with_words(reason, "team", said)


@pytest.mark.parametrize(
    ("reason", "cause", "then"),
    [
        (
            Reason(Code.INVALID_SPEC, message="spec.data.volume.claimName: name it"),
            "spec.data.volume.claimName: name it",
            "kubectl edit mchain family -n team",
        ),
        (
            Reason(
                Code.RUNNER_MISSING,
                "PyTorchJob",
                "PyTorchJob is not installed; kubectl apply",
                RUNNER.install,
            ),
            "PyTorchJob is not installed; kubectl apply",
            (
                "kubectl apply --server-side -k"
                " 'github.com/kubeflow/trainer.git/manifests/overlays/standalone?ref=v1.9.4'"
            ),
        ),
        (
            Reason(Code.CLAIM_MISSING, "data", "there is no claim data"),
            "there is no claim data",
            "kubectl get pvc -n team",
        ),
        (
            Reason(Code.CLAIM_TAKEN, "x", "claim x was not made for this chain"),
            "claim x was not made for this chain",
            "kubectl edit mchain family -n team",
        ),
        (
            Reason(
                Code.NAME_TAKEN,
                "family-b-a2",
                "a PyTorchJob family-b-a2 is there",
                RUNNER.describe("family-b-a2", "team"),
            ),
            "a PyTorchJob family-b-a2 is there",
            "kubectl describe pytorchjob family-b-a2 -n team",
        ),
        (
            refused(Code.LAUNCH_REFUSED, "500 failed calling webhook validator"),
            "500 failed calling webhook validator",
            "kubectl get pods -n kubeflow",
        ),
        (
            refused(Code.LAUNCH_REFUSED, "403 exceeded quota: count"),
            "403 exceeded quota: count",
            "kubectl describe resourcequota -n team",
        ),
        (
            refused(Code.LAUNCH_REFUSED, "422 the object is bad"),
            "422 the object is bad",
            "kubectl describe mchain family -n team",
        ),
        (
            refused(Code.RECORD_REFUSED, "403 exceeded quota: count"),
            "403 exceeded quota: count",
            "kubectl describe resourcequota -n team",
        ),
        (
            refused(Code.RELEASE_REFUSED, "422 the object is bad"),
            "422 the object is bad",
            "kubectl describe mchain family -n team",
        ),
        (
            refused(Code.PODS_FORBIDDEN, 'violates PodSecurity "restricted"'),
            'violates PodSecurity "restricted"',
            "kubectl get namespace team --show-labels",
        ),
        (
            refused(Code.PODS_FORBIDDEN, "maximum cpu usage per Container is 1"),
            "maximum cpu usage per Container is 1",
            "kubectl describe limitrange -n team",
        ),
        (
            Reason(Code.VERIFY_UNANSWERED, message="nothing is trained again"),
            "nothing is trained again",
            "modelchain retry family -n team",
        ),
        (
            Reason(Code.QUEUE_REQUIRED, message="every job names a queue"),
            "every job names a queue",
            "kubectl edit mchain family -n team",
        ),
        (
            Reason(Code.SUSPENDED_BY_ANOTHER, message="another client has suspended it"),
            "another client has suspended it",
            "modelchain retry family -n team",
        ),
        (
            Reason(
                Code.SAME_DEVICE_ERROR,
                "n1, n2",
                "the devices of nodes n1, n2 failed alike",
            ),
            "the devices of nodes n1, n2 failed alike",
            "modelchain retry family -n team",
        ),
    ],
)
def test_stalled(reason: Reason, cause: str, then: str) -> None:
    stage = current(State.PENDING, reason, stalled=True)
    thing = chain(stage, condition("Stalled", reason.code, sentence(stage)))
    check(ask(thing), reason.code, cause, then)


@pytest.mark.parametrize("state", [State.PENDING, State.FAILED])
@pytest.mark.parametrize("code", [code for code in Code if code.command])
def test_conditions_events_and_explain_name_the_same_command(code: Code, state: State) -> None:
    """An event has the condition's sentence."""
    stage = current(state, Reason(code, "x", "why"), stalled=state is State.PENDING)
    said = sentence(stage)
    assert said.endswith(f"why; next: {stage.next}")
    assert ask(chain(stage, condition("Stalled", code, said))).next == stage.next


def test_a_code_that_a_newer_operator_wrote() -> None:
    stage = current(State.PENDING, stalled=True).changed(reason="who knows", reason_code="NewOne")
    thing = chain(stage, condition("Stalled", "NewOne", "stage b: who knows"))
    check(ask(thing), "NewOne", "who knows", "kubectl describe mchain family -n team")


def test_a_node_that_does_not_answer() -> None:
    pod = podshapes.deleted(podshapes.running(), grace_over=0)
    why = stuck([pod], NOW, None)
    assert why is not None and why.code is Code.NODE_LOST
    thing = chain(current(State.RUNNING, why, stalled=True), condition("Stalled"))
    check(ask(thing), "NodeLost", "should have ended", "kubectl describe node node-0")


def test_a_refused_spec_concerns_no_stage() -> None:
    thing = chain(
        None,
        condition("Stalled", "InvalidSpec", "spec.stages: too few; correct it and apply it again"),
    )
    check(ask(thing), "InvalidSpec", "spec.stages: too few", "kubectl edit mchain family -n team")


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (State.PENDING, Reason(Code.CLAIM_MISSING, "data", "there is no claim data")),
        (State.PENDING, Reason(Code.INVALID_SPEC, message="nope is no node pool")),
        (State.FAILED, Reason(Code.NON_FINITE, message="the loss is nan")),
    ],
)
def test_a_refused_spec_comes_before_the_reason_of_a_stage(state: State, reason: Reason) -> None:
    stage = current(state, reason, stalled=state is not State.FAILED)
    thing = situations.refused(chain(stage, condition("Stalled", reason.code)), "too few stages")
    check(ask(thing), "InvalidSpec", "too few stages", "kubectl edit mchain family -n team")


# Queued or running.


def test_only_avoided_nodes_are_left() -> None:
    stage = current(
        State.QUEUED,
        Reason(Code.NODES_AVOIDED, message="no node is left but n1 (0/4 nodes are available)"),
    )
    waiting = mine(podshapes.unschedulable())
    check(
        ask(chain(stage), pods=[waiting]),
        "NodesAvoided",
        "no node is left but n1",
        "modelchain retry family -n team",
    )


def test_a_trainer_that_cannot_be_reached() -> None:
    stage = current(
        State.RUNNING,
        Reason(
            Code.PROGRESS_UNKNOWN,
            message="rank 0 does not tell its progress at 10.0.0.1:9091, pod x",
        ),
    )
    found = ask(chain(stage), pods=[mine(podshapes.running())])
    check(found, "ProgressUnknown", "10.0.0.1:9091", "kubectl get networkpolicies -n team")


@pytest.mark.parametrize("complete", [True, False])
def test_a_stage_that_was_trained_with_another_trainer_math(complete: bool) -> None:
    thing = chain(current(State.RUNNING), *([condition("Complete")] if complete else []))
    thing["status"]["stages"][0]["artifact"] = {
        "path": "d/artifact",
        "digest": "d",
        "trainerMath": TRAINER_MATH - 1,
    }
    thing["status"]["stages"][1]["artifact"] = {
        "path": "d/artifact",
        "digest": "d",
        "trainerMath": TRAINER_MATH,
    }
    told = [
        line
        for line in ask(thing, pods=[mine(podshapes.running())]).evidence
        if "trainer math" in line.message
    ]
    assert [line.object for line in told] == ["stage a"] and "rerun" in told[0].message


# Between attempts.


def test_back_off() -> None:
    ended = ATTEMPT.model_copy(
        update={"failure": FailureClass.ERROR, "message": "it broke", "finished_at": at(3590)}
    )
    stage = told(
        StageStatus(name="b", state=State.PENDING, attempts=[ended], not_before=NOW + 20),
        Reason(Code.ERROR, message="it broke; tries again"),
    )
    found = ask(chain(stage), pods=[mine(podshapes.ended())])
    check(found, "BackOff", "it broke.", "kubectl logs vit-b-a1-master-0 -n team")
    assert "in 20s" in found.state
    check(ask(chain(stage)), "BackOff", "", "kubectl describe mchain family -n team")


def test_shared_stage() -> None:
    message = "chain other trains the same stage on the same claim"
    stage = current(State.QUEUED, Reason(Code.SHARED_STAGE, "other", message))
    check(
        ask(chain(stage)), "SharedStage", "chain other trains", "modelchain explain other -n team"
    )


def test_data_that_is_still_being_packed() -> None:
    loading = Reason(Code.DATA_LOADING, "pack", "job pack fills claim photos")
    stage = told(StageStatus(name="b"), loading)
    check(
        ask(chain(stage)),
        "DataLoading",
        "job pack fills claim photos",
        "kubectl logs -f job/pack -n team",
    )


def test_data_that_is_being_indexed() -> None:
    reason = Reason(Code.INDEXING, "mchain-index-0", "job mchain-index-0 indexes the data")
    stage = told(StageStatus(name="b", state=State.INDEXING), reason)
    pod = podshapes.running()
    pod["metadata"]["labels"] |= {"modelchain.dev/role": "index"}
    found = ask(chain(stage), pods=[pod])
    then = "kubectl logs -f job/mchain-index-0 -n team"
    check(found, "Indexing", "job mchain-index-0 indexes the data", then)
    assert [line.object for line in found.evidence] == [f"pod/{pod['metadata']['name']}"]


# Queues.


@pytest.mark.parametrize(
    ("queue", "reason", "cause", "then"),
    [
        (
            KueueQueue("q"),
            "KueueMissing",
            "Kueue is not installed",
            "kubectl get crd localqueues.kueue.x-k8s.io",
        ),
        (
            KueueQueue("q", True),
            "LocalQueueMissing",
            "no LocalQueue q",
            "kubectl get localqueues -n team",
        ),
        (
            KueueQueue("q", True, {"metadata": {}}),
            "NoWorkload",
            "integrations.frameworks",
            "kubectl get configmap kueue-manager-config -n kueue-system -o yaml",
        ),
        (
            KueueQueue(
                "q",
                True,
                {
                    "metadata": {},
                    "status": {
                        "conditions": [
                            {
                                "type": "Active",
                                "status": "False",
                                "message": "stopped",
                                "lastTransitionTime": at(0),
                            }
                        ]
                    },
                },
            ),
            "QueueInactive",
            "takes nothing in: stopped",
            "kubectl describe localqueue q -n team",
        ),
        (
            KueueQueue(
                "q",
                True,
                {"metadata": {}},
                [workload(("QuotaReserved", "False", "8 more GPUs needed"))],
            ),
            "Queued",
            "8 more GPUs needed; Kueue does not show its place in the queue",
            "kubectl describe workload pytorchjob-family-b-a2 -n team",
        ),
        (
            KueueQueue(
                "q",
                True,
                {"metadata": {}},
                [workload(("QuotaReserved", "True", ""), ("Admitted", "False", ""))],
            ),
            "Queued",
            "admission checks",
            "kubectl describe workload pytorchjob-family-b-a2 -n team",
        ),
        (
            KueueQueue(
                "q",
                True,
                {"metadata": {}},
                [workload(("Evicted", "True", "preempted by a higher priority"))],
            ),
            "Queued",
            "preempted by a higher priority",
            "kubectl describe workload pytorchjob-family-b-a2 -n team",
        ),
    ],
)
def test_queued(queue: KueueQueue, reason: str, cause: str, then: str) -> None:
    found = ask(chain(current(State.QUEUED)), jobs=[job(True, "q")], queue=queue)
    check(found, reason, cause, then)


def test_workloads_that_the_user_may_not_read() -> None:
    queue = KueueQueue("q", True, {"metadata": {}})
    found = ask(chain(current()), jobs=[job(True, "q")], queue=queue, unreadable=("workloads",))
    assert "your rights" in found.cause
    assert found.evidence[-1] == Line("workloads", "you may not read these, so this may not be all")


# Pods.


def test_pods_that_are_refused() -> None:
    thing = job()
    said = event(thing, 'Error creating: pods "x" is forbidden: exceeded quota: q', "PyTorchJob")
    found = ask(chain(current()), jobs=[thing], events=[said])
    check(found, "PodsForbidden", "exceeded quota", "kubectl describe resourcequota -n team")


def test_no_controller_creates_pods() -> None:
    check(
        ask(chain(current()), jobs=[job()]),
        "NoPods",
        "training-operator",
        "kubectl get pods -n kubeflow",
    )


@pytest.mark.parametrize(
    ("pod", "reason", "cause"),
    [
        (
            podshapes.unschedulable(message="0/3 nodes: 3 Insufficient nvidia.com/gpu."),
            "Unschedulable",
            "Insufficient",
        ),
        (
            podshapes.unschedulable(reason="SchedulingGated", message="gated"),
            "SchedulingGated",
            "gate",
        ),
        (podshapes.waiting(0, "ErrImagePull", "manifest unknown"), "Image", "there is no image"),
        (podshapes.waiting(0, "ImagePullBackOff", "401 unauthorized"), "Image", "cannot be pulled"),
        (podshapes.waiting(0, "InvalidImageName"), "Image", "correct runner.image"),
        (podshapes.waiting(0, "ContainerCreating"), "Starting", "mounts volumes"),
        (podshapes.pending(), "Starting", "neither the scheduler nor a node has taken it up yet"),
    ],
)
def test_a_pod_waits(pod: Object, reason: str, cause: str) -> None:
    found = ask(chain(current()), jobs=[job()], pods=[mine(pod)])
    check(found, reason, cause, "kubectl describe pod vit-b-a1-master-0 -n team")


def test_a_name_is_not_read_as_a_cause() -> None:
    """The chain is named after ImageNet; its pod waits in an init container, not for an image."""
    pod = mine(podshapes.in_init())
    pod["metadata"]["name"] = "imagenet-vit-b-a1-worker-0"
    pod["metadata"]["ownerReferences"][0]["name"] = "imagenet-vit-b-a1"
    found = ask(chain(current()), jobs=[job()], pods=[pod])
    then = "kubectl describe pod imagenet-vit-b-a1-worker-0 -n team"
    check(found, Code.INIT, "init container init-pytorch runs", then)


def test_an_event_tells_what_a_mount_waits_for() -> None:
    pod = mine(podshapes.waiting(0, "ContainerCreating"))
    found = ask(
        chain(current()), jobs=[job()], pods=[pod], events=[event(pod, "FailedMount: nfs is down")]
    )
    assert "nfs is down" in found.cause


def test_half_a_gang_waits() -> None:
    thing = chain(
        current(), stages=[{"name": "a"}, {"name": "b", "resources": {"nodes": 2}}, {"name": "c"}]
    )
    found = ask(
        thing, jobs=[job()], pods=[mine(podshapes.running()), mine(podshapes.unschedulable(1))]
    )
    assert "1 of 2 pods run" in found.cause


@pytest.mark.parametrize("phase", ["Pending", "Lost"])
def test_a_pod_waits_for_an_unbound_claim(phase: str) -> None:
    volume = claim(phase=phase)
    pod = mine(podshapes.unschedulable(message="pod has unbound immediate PersistentVolumeClaims"))
    said = event(volume, 'storageclass.storage.k8s.io "rwx" not found', "PersistentVolumeClaim")
    claims = {"data": claim("data", "Bound"), "family-artifacts": volume}
    found = ask(chain(current()), jobs=[job()], pods=[pod], claims=claims, events=[said])
    check(
        found,
        {"Pending": Code.CLAIM_PENDING, "Lost": Code.CLAIM_LOST}[phase],
        '"rwx" not found',
        "kubectl describe pvc family-artifacts -n team",
    )


def test_a_pod_waits_for_a_missing_claim() -> None:
    pod = mine(podshapes.unschedulable(message='persistentvolumeclaim "data" not found. not found'))
    found = ask(chain(current()), jobs=[job()], pods=[pod], claims={"data": None})
    assert found.evidence[-1].message.endswith('"data" not found')
    check(found, "ClaimMissing", "claim data is missing", "kubectl get pvc -n team")


def test_a_claim_that_waits_for_its_first_pod_is_no_cause() -> None:
    pod = mine(podshapes.unschedulable(message="3 Insufficient nvidia.com/gpu"))
    found = ask(chain(current()), jobs=[job()], pods=[pod], claims={"family-artifacts": claim()})
    assert found.reason == "Unschedulable"


# Running.


def test_running() -> None:
    progress = Progress(step=30, steps=120, samples_per_second=512.4, eta_seconds=90.0)
    stage = current(State.RUNNING, progress=progress)
    found = ask(chain(stage), jobs=[job()], pods=[mine(podshapes.running(start=0))])
    check(
        found,
        "Running",
        "step 30 of 120 (25%), 0:01:30 left at 512 samples/s",
        "kubectl logs -f vit-b-a1-master-0 -n team",
    )
    assert "Stage b (2 of 3) of chain family has run for 60m" in found.state


def test_a_pod_with_copied_labels_is_not_the_stages() -> None:
    """As `kubectl debug --copy-to --keep-labels` makes one. Its log is not the stage's."""
    copy, own = (mine(podshapes.running(start=0, created=created)) for created in (50, 0))
    copy["metadata"] |= {"name": "copy", "uid": "copy", "ownerReferences": []}
    found = ask(chain(current(State.RUNNING)), jobs=[job()], pods=[copy, own])
    assert found.next == "kubectl logs -f vit-b-a1-master-0 -n team"
    assert "pod/copy" not in {line.object for line in found.evidence}


def test_a_pod_of_an_earlier_job_of_the_same_name_is_not_the_attempts() -> None:
    """The operator does not count it either: the job was deleted, and its pod still ends."""
    earlier = mine(podshapes.running(start=0))
    earlier["metadata"]["ownerReferences"] = [podshapes.owned("PyTorchJob", "vit-b-a1", "earlier")]
    found = ask(chain(current(State.STARTING)), jobs=[job()], pods=[earlier])
    assert found.reason == "NoPods"
    ended = ATTEMPT.changed(failure=FailureClass.ERROR, message="it broke", finished_at=at(3590))
    stage = told(
        StageStatus(name="b", state=State.PENDING, attempts=[ended], not_before=NOW + 20),
        Reason(Code.ERROR, message="it broke; tries again"),
    )
    assert "logs" not in ask(chain(stage), pods=[earlier]).next


def test_running_without_a_step() -> None:
    found = ask(chain(current(State.STARTING)), jobs=[job()], pods=[mine(podshapes.running())])
    assert found.reason == "Running" and "first step" in found.cause


def test_running_without_progress() -> None:
    attempt = ATTEMPT.model_copy(update={"stepped_at": NOW - 1200})
    stage = current(State.RUNNING).model_copy(update={"attempts": [attempt]})
    found = ask(chain(stage), jobs=[job()], pods=[mine(podshapes.running())])
    assert "no step for 20m; after 1800 s" in found.cause


def test_verifying() -> None:
    found = ask(
        chain(
            current(
                State.VERIFYING,
                Reason(Code.VERIFIES, message="its last word was lost; its artifact is re-hashed"),
            )
        ),
        jobs=[job()],
        pods=[mine(podshapes.ended(code=0))],
    )
    check(found, "Verifying", "last word was lost", "modelchain watch family -n team")


def test_the_json_document_has_every_field() -> None:
    seen = Situation(chain=chain(seen=-1), now=NOW, leases=[lease(0)])
    found = document(seen, explain(seen))
    assert list(found) == ["chain", "namespace", "reason", "state", "cause", "next", "evidence"]
    assert list(found["evidence"][0]) == ["object", "message", "ageSeconds"]
