"""What pods tell of an attempt: every kind of failure that pods can show, and what several pods
show together.
"""

from __future__ import annotations

import json
import re
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from podshapes import (
    IMAGE,
    T0,
    Pod,
    at,
    deleted,
    disrupted,
    ended,
    evicted,
    in_init,
    init_failed,
    pending,
    running,
    scheduled,
    unschedulable,
    waiting,
    word,
)

from modelchain.api.contracts import FailureClass
from modelchain.api.reasons import Code, Reason
from modelchain_operator.api import objects
from modelchain_operator.reconcile import pod_evidence
from modelchain_operator.reconcile.pod_evidence import Evidence, evidence, refusal
from modelchain_operator.runners import pods as podread
from modelchain_operator.runners.port import JobState
from modelchain_operator.runners.pytorchjob import PyTorchJob

F = FailureClass


def job(finished: Any = None, message: str = "") -> JobState:
    return JobState(
        released=True, suspended=False, finished=finished, deleting=False, message=message
    )


def seen(
    *live: Pod, remembered: tuple[Pod, ...] = (), nodes: int | None = None, **more: Any
) -> Evidence:
    return evidence(
        live,
        [kept for pod in remembered if (kept := podread.remember(pod)) is not None],
        job=more.pop("job", job()),
        gang=podread.Gang(nodes or max(len(live), 1), PyTorchJob()),
        now=T0 + more.pop("now", 200.0),
        known=more.pop("known", ()),
    )


def stuck(
    pod: Pod, now: float = 200.0, deleting_since: dict[str, float] | None = None
) -> Reason | None:
    return pod_evidence.stuck([pod], T0 + now, deleting_since)


def text(reason: Reason | None) -> str:
    return reason.text if reason else ""


def told(found: Evidence) -> tuple[FailureClass | None, str]:
    """The failure class and its message, from the last word or else from the pods."""
    if found.word is not None:
        assert found.failure is None
        return found.word.failure, found.word.message
    assert found.failure is not None
    return found.failure


def test_what_rank_0_of_each_start_says_that_it_has_spent() -> None:
    """A queue evicted the attempt and started it again. Each start counts from 0."""
    first = [
        ended(0, end=20, code=1, message=word(macs=500)),
        ended(1, end=20, code=1, message=word(macs=500)),
    ]
    second = running(0, start=40, created=30)
    found = seen(*first, second, nodes=2, known=None)
    assert [pod.macs for pod in found.pods.values()] == [500, 0, 0], "the other ranks say the same"


# -- one failed pod --------------------------------------------------------------------------------

EPHEMERAL = "Pod ephemeral local storage usage exceeds the total limit of containers 100Gi. "
NODE_FULL = (
    "The node was low on resource: ephemeral-storage. Threshold quantity: 1Gi, available: 900Mi. "
)
ROWS: dict[str, tuple[Pod, FailureClass, str]] = {
    "user error": (
        ended(code=2, message=word("Failed", "UserError", "batch > samples")),
        F.USER_ERROR,
        "batch >",
    ),
    "NaN": (
        ended(message=word("Failed", "NonFinite", "the loss is nan at step 7")),
        F.NON_FINITE,
        "nan",
    ),
    "corrupt predecessor": (
        ended(message=word("Failed", "CorruptPredecessor", "hash")),
        F.CORRUPT_PREDECESSOR,
        "hash",
    ),
    "volume full": (
        ended(message=word("Failed", "VolumeFull", "no space left")),
        F.VOLUME_FULL,
        "no space",
    ),
    "exception": (ended(message=word()), F.ERROR, "it broke"),
    "stopped": (ended(message=word("Failed", "Preempted", "stopped")), F.PREEMPTED, "stopped"),
    "out of memory": (
        ended(code=137, reason="OOMKilled"),
        F.OUT_OF_MEMORY,
        r"limit: 64Gi\); raise memory",
    ),
    "out of memory, told to stop": (
        ended(reason="OOMKilled", message=word("Failed", "Preempted", "stopped")),
        F.OUT_OF_MEMORY,
        "raise memory",
    ),
    "preempted": (
        disrupted(ended(code=143), "PreemptionByScheduler"),
        F.PREEMPTED,
        "higher priority",
    ),
    "drained": (disrupted(ended(code=143), "EvictionByEvictionAPI"), F.PREEMPTED, "drained"),
    "shut down": (disrupted(ended(code=143), "TerminationByKubelet"), F.PREEMPTED, "by its node"),
    "tainted": (disrupted(running(), "DeletionByTaintManager"), F.NODE_LOST, "unreachable"),
    "node gone": (disrupted(ended(code=137), "DeletionByPodGC"), F.NODE_LOST, "no longer exists"),
    "low on disk": (
        evicted(ended(code=137), NODE_FULL),
        F.PREEMPTED,
        "low on resource.*raise ephemeralStorage",
    ),
    "low on memory": (
        evicted(ended(code=137), "The node was low on resource: memory. "),
        F.PREEMPTED,
        "memory",
    ),
    "over its disk": (evicted(ended(code=137), EPHEMERAL), F.VOLUME_FULL, "Raise ephemeralStorage"),
    "init": (init_failed(), F.INIT, r"kubectl logs vit-b-a1-worker-0 -c init-pytorch -n team"),
    "no program": (
        ended(code=128, reason="StartError", message='exec: "python": executable file not found'),
        F.IMAGE,
        "python",
    ),
    "lost message": (
        ended(code=1),
        F.UNKNOWN,
        "exit code 1; see: kubectl logs vit-b-a1-master-0 -n team",
    ),
    "killed": (ended(code=137), F.UNKNOWN, r"137 \(killed\)"),
    "not JSON": (ended(message="Killed"), F.UNKNOWN, "no last word"),
    "unknown class": (
        ended(message=word("Failed", "Gremlins", "they ate it")),
        F.ERROR,
        "they ate it",
    ),
    "unknown field": (
        ended(message=word("Failed", "NonFinite", "nan", mood="bad")),
        F.NON_FINITE,
        "nan",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_failure_that_one_pod_shows(name: str) -> None:
    pod, failure, sentence = ROWS[name]
    found = seen(pod)
    assert told(found)[0] is failure
    assert re.search(sentence, told(found)[1]), told(found)[1]
    assert told(seen(remembered=(pod,))) == told(found), "a remembered pod gives the same evidence"


def test_a_pod_without_a_container_status() -> None:
    pod = scheduled()
    pod["status"] |= {
        "phase": "Failed",
        "reason": "UnexpectedAdmissionError",
        "message": "Allocate failed: no GPUs",
    }
    assert told(seen(pod)) == (
        F.UNKNOWN,
        (
            "pod vit-b-a1-master-0 failed before its container ran: Allocate failed: no GPUs; see:"
            " kubectl describe pod vit-b-a1-master-0 -n team"
        ),
    )


NO_DEVICE = (
    "Pod was rejected: Allocate failed due to no healthy devices present; cannot allocate unhealthy"
    " devices "
)


@pytest.mark.parametrize(
    ("reason", "message", "failure", "bad"),
    [
        (
            "UnexpectedAdmissionError",
            NO_DEVICE + "nvidia.com/gpu",
            F.HARDWARE,
            {"node-0": "UnexpectedAdmissionError"},
        ),
        (
            "UnexpectedAdmissionError",
            "Pod was rejected: Allocate failed due to requested number",
            F.UNKNOWN,
            {},
        ),
        ("NodeShutdown", "Pod was rejected: Node is shutting down", F.NODE_LOST, {}),
        ("OutOfcpu", "Pod was rejected: Node didn't have enough resource: cpu", F.UNKNOWN, {}),
        ("NodeAffinity", "Pod was rejected: Predicate NodeAffinity failed", F.UNKNOWN, {}),
        ("DeadlineExceeded", "Pod was active on the node too long", F.UNKNOWN, {}),
    ],
)
def test_a_pod_that_its_node_refuses(
    reason: str, message: str, failure: FailureClass, bad: dict[str, str]
) -> None:
    """A missing healthy device is the node's fault. A remembered pod gives the same evidence."""
    pod = scheduled()
    pod["status"] |= {"phase": "Failed", "reason": reason, "message": message}
    for found in (seen(pod), seen(remembered=(pod,))):
        assert told(found)[0] is failure and found.bad_nodes == bad
        assert failure is F.UNKNOWN or "node-0" in told(found)[1]


@pytest.mark.parametrize("reason", ["NodeLost", "NodeShutdown", "Terminated"])
def test_a_pods_own_reason_names_the_lost_node(reason: str) -> None:
    pod = running()
    pod["status"] |= {"phase": "Failed", "reason": reason, "message": "the node is shutting down"}
    failure, sentence = told(seen(pod))
    assert failure is F.NODE_LOST and "node-0" in sentence


def test_success_is_rank_0s_last_word() -> None:
    found = seen(
        ended(0, code=0, message=word("Succeeded", steps=7)), ended(1, code=1, message=word())
    )
    assert found.word and (found.word.result, found.word.steps, found.failure) == (
        "Succeeded",
        7,
        None,
    )
    other = seen(ended(0, code=0), ended(1, code=0, message=word("Succeeded")))
    assert other.word is None and other.failure is None


def test_success_needs_its_digests() -> None:
    found = seen(ended(code=0, message=json.dumps({"result": "Succeeded"})))
    assert (found.word, found.failure) == (None, None)


def test_a_job_that_failed_and_left_nothing() -> None:
    found = seen(job=job("Failed", "1 Master replica(s) failed"))
    assert told(found)[0] is F.UNKNOWN and "1 Master replica(s) failed" in told(found)[1]
    assert seen(job=job("Succeeded")).failure is None, "the verify Job will look for the artifact"


# -- several pods: the cause, not its consequences -------------------------------------------------

OOM = ended(1, code=137, reason="OOMKilled", end=60)
GROUPS: dict[str, tuple[list[Pod], FailureClass]] = {
    "the first of two": (
        [
            ended(0, end=90, message=word("Failed", "Data")),
            ended(1, end=80, message=word("Failed", "NonFinite")),
        ],
        F.NON_FINITE,
    ),
    "the rest is stopped": (
        [OOM, ended(0, end=50, message=word("Failed", "Preempted", checkpointStep=9))],
        F.OUT_OF_MEMORY,
    ),
    "the rest says nothing": (
        [ended(0, end=50), ended(1, end=60, message=word("Failed", "Data"))],
        F.DATA,
    ),
    "the rest breaks": (
        [OOM, ended(0, end=59, message=word(message="connection reset by peer"))],
        F.OUT_OF_MEMORY,
    ),
    "a node goes, peers break": (
        [
            disrupted(running(1), "DeletionByTaintManager", when=300),
            ended(0, message=word(message="NCCL timeout")),
        ],
        F.NODE_LOST,
    ),
    "an exception, the rest is stopped": (
        [ended(0, end=90, message=word("Failed", "Preempted")), ended(1, end=95, message=word())],
        F.ERROR,
    ),
    "all preempted": (
        [
            disrupted(ended(r, message=word("Failed", "Preempted")), "PreemptionByScheduler")
            for r in (0, 1)
        ],
        F.PREEMPTED,
    ),
    "a worker never began": ([running(0), init_failed(1)], F.INIT),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_cause_is_found_in_any_order_of_pods(name: str) -> None:
    pods, failure = GROUPS[name]
    for order in permutations(pods):
        assert told(seen(*order))[0] is failure


def test_the_figures_of_a_last_word_are_kept_if_another_pod_shows_the_cause() -> None:
    pods, _ = GROUPS["the rest is stopped"]
    found = seen(*pods)
    assert found.word and (found.word.failure, found.word.checkpoint_step) == (F.OUT_OF_MEMORY, 9)
    assert "vit-b-a1-worker-0" in found.word.message


def test_a_remembered_last_word_counts() -> None:
    said = deleted(ended(0, message=word("Failed", "NonFinite")), grace_over=150)
    assert told(seen(ended(1, end=120), remembered=(said,), nodes=2))[0] is F.NON_FINITE


def test_a_restart_by_the_queue_forgets_the_evicted_pods() -> None:
    before = [ended(r, end=100, message=word("Failed", "Preempted")) for r in (0, 1)]
    again = [running(r, created=150, start=160) for r in (0, 1)]
    found = seen(*again, remembered=tuple(before))
    assert (found.word, found.failure, found.running) == (None, None, 2)
    out_of_memory = ended(1, created=150, start=160, end=190, code=137, reason="OOMKilled")
    assert told(seen(again[0], out_of_memory, remembered=tuple(before)))[0] is F.OUT_OF_MEMORY


def test_a_pod_that_was_replaced_while_its_peers_ran_is_still_the_cause() -> None:
    lost = disrupted(ended(1, end=50, code=143), "PreemptionByScheduler", when=50)
    peers = [ended(0, end=120, message=word()), running(1, created=60, start=70)]
    assert told(seen(*peers, remembered=(lost,)))[0] is F.PREEMPTED


# -- what an attempt waits for ---------------------------------------------------------------------

NO_GPU = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
NOT_FOUND = (
    f'rpc error: code = NotFound desc = failed to pull and unpack image "{IMAGE}": not found'
)
WAITS: dict[str, tuple[list[Pod], str, FailureClass | None]] = {
    "nothing": ([running()], "", None),
    "not made": ([], "", None),
    "no claim": (
        [
            unschedulable(
                message='0/1 nodes are available: persistentvolumeclaim "data" not found. not found'
            )
        ],
        'persistentvolumeclaim "data" not found; see: kubectl',
        None,
    ),
    "no room": (
        [unschedulable(message=NO_GPU)],
        f"^Unschedulable: vit-b-a1-master-0 waits: {NO_GPU}",
        None,
    ),
    "gated": (
        [unschedulable(reason="SchedulingGated", message="gates")],
        "held by a scheduling gate",
        None,
    ),
    "just made": ([pending()], "neither the scheduler nor a node has taken it up yet", None),
    "no such image": (
        [waiting(0, "ErrImagePull", NOT_FOUND)],
        "there is no image .* correct runner.image",
        F.IMAGE,
    ),
    "backing off": ([waiting(0, "ImagePullBackOff", NOT_FOUND)], "there is no image", F.IMAGE),
    "registry away": (
        [waiting(0, "ErrImagePull", "dial tcp: i/o timeout")],
        "cannot be pulled: .*timeout",
        None,
    ),
    "not allowed": (
        [waiting(0, "ImagePullBackOff", "403 Forbidden")],
        "cannot be pulled: .*403",
        None,
    ),
    "registry away, and a name that seems to tell": (
        [waiting(0, "ErrImagePull", "ghcr.io/notfound-labs/x:not-found: 503 Service Unavailable")],
        "cannot be pulled: .*503",
        None,
    ),
    "no secret to pull with": (
        [waiting(0, "ErrImagePull", 'secret "regcred" not found')],
        "cannot be pulled: .*regcred",
        None,
    ),
    "no image name": (
        [waiting(0, "InvalidImageName", image="Trainer:@")],
        "no image name",
        F.IMAGE,
    ),
    "no secret": (
        [waiting(0, "CreateContainerConfigError", 'secret "x" not found')],
        'secret "x" not found',
        None,
    ),
    "root": (
        [
            waiting(
                0,
                "CreateContainerConfigError",
                "container has runAsNonRoot and image will run as root",
            )
        ],
        "set runAsUser of the node pool",
        F.IMAGE,
    ),
    "being made": (
        [waiting(0, "ContainerCreating")],
        "kubectl describe pod vit-b-a1-master-0 -n team",
        None,
    ),
    "half a gang": (
        [running(0), running(1), running(2), unschedulable(3, message=NO_GPU)],
        "^Unschedulable: 3 of 4 pods run, vit-b-a1-worker-2 waits: ",
        None,
    ),
    "init": (
        [running(0), in_init(1)],
        "1 of 2 pods run, vit-b-a1-worker-0 waits: init container init-pytorch",
        None,
    ),
    "the worst first": (
        [unschedulable(0), waiting(1, "ErrImagePull", NOT_FOUND), in_init(2)],
        "^0 of 3 pods run, vit-b-a1-worker-0 waits: there is no image",
        F.IMAGE,
    ),
    "going": ([deleted(pending(), grace_over=210)], "waits until pod .* has ended", None),
    "over": ([ended(message=word())], "", None),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_an_attempt_waits_for(name: str) -> None:
    pods, sentence, failure = WAITS[name]
    found = seen(*pods)
    assert re.search(sentence, text(found.waiting)) if sentence else not found.waiting, (
        found.waiting
    )
    assert (found.permanent and found.permanent[0]) == failure


def test_a_failed_pull_has_the_same_reason_during_its_back_off() -> None:
    backing_off = f'Back-off pulling image "{IMAGE}": ErrImagePull: {NOT_FOUND}'
    tried, later = (
        seen(waiting(0, "ErrImagePull", NOT_FOUND)),
        seen(waiting(0, "ImagePullBackOff", backing_off)),
    )
    assert tried.waiting == later.waiting


def test_long_messages_are_cut() -> None:
    assert (
        len(seen(unschedulable(message="0/5000 nodes are available: " + "x, " * 2000)).waiting.text)
        < 340
    )


def test_pods_that_are_still_to_be_created() -> None:
    reason = seen(running(0), nodes=4).waiting
    assert reason.text == "1 of 4 pods are there; the others are still to be created"
    assert reason.code is Code.PODS_MISSING
    assert seen(deleted(running(0), grace_over=210)).waiting.code is Code.PODS_ENDING


def test_pods_that_are_refused_at_creation() -> None:
    def event(reason: str, message: str, when: float) -> Pod:
        return {"reason": reason, "message": message, "lastTimestamp": at(when)}

    quota = 'Error creating: pods "x" is forbidden: exceeded quota: gpus'
    standard = 'Error creating: pods "x" is forbidden: violates PodSecurity "restricted:latest"'
    events = [
        event("FailedCreatePod", standard, 5),
        event("FailedCreatePod", quota, 1),
        event("Created", "x", 9),
    ]
    assert refusal(events) == standard.removeprefix("Error creating: ")
    assert refusal(events[2:]) == ""


# -- liveness and time -----------------------------------------------------------------------------


def test_only_pods_that_were_read_are_live() -> None:
    assert (
        seen(pending()).live
        and seen(running()).live
        and seen(deleted(running(), grace_over=150)).live
    )
    assert not seen(ended()).live
    assert not seen(remembered=(disrupted(running(), "DeletionByTaintManager"),)).live


def test_a_pod_that_exceeds_its_grace_period() -> None:
    pod = deleted(running(), grace_over=150)
    assert stuck(pod, now=209) is None
    stalled = stuck(pod, now=211)
    assert (
        "kubectl delete pod vit-b-a1-master-0 -n team --force --grace-period=0" in stalled.text
        and "node-0" in stalled.text
    )
    assert stuck(pod, now=999) == stalled, "the reason stays the same, so it is written once"
    assert stuck(deleted(ended(), grace_over=150), now=999) is None


def test_a_pod_within_its_grace_period_if_our_clock_is_ahead() -> None:
    """The operator's clock is five minutes ahead of the API server's. By the timestamp alone, every
    pod that is being deleted would seem stuck.
    """
    pod, ahead = deleted(running(), grace_over=150), 300.0
    first_seen = {objects.uid(pod): T0 + 30 + ahead}  # deleted at 30 with a grace of 120
    for now in (31, 150, 200):
        assert stuck(pod, now=now + ahead, deleting_since=first_seen) is None
    assert "--force" in stuck(pod, now=30 + 120 + 61 + ahead, deleting_since=first_seen).text, (
        "the grace period is over by either clock"
    )
    assert stuck(pod, now=211, deleting_since={}) is None, (
        "an operator that has just started has not seen the grace period pass"
    )
    assert "--force" in stuck(pod, now=150 + 60 + 601, deleting_since={}).text, (
        "clocks do not differ that much"
    )


WHEN: dict[str, str | None] = {"1970": "1970-01-01T00:00:00Z", "null": None, "now": at(100)}


@pytest.mark.parametrize("reason", ["StartError", "ContainerCannotRun"])
@pytest.mark.parametrize("finished", WHEN)
@pytest.mark.parametrize("started", ["1970", "null"])
def test_a_container_that_never_started_has_no_time(
    reason: str, started: str, finished: str
) -> None:
    pod = ended(code=128, reason=reason, message="driver not loaded")
    state = pod["status"]["containerStatuses"][1]["state"]["terminated"]
    state |= {"startedAt": WHEN[started], "finishedAt": WHEN[finished]}
    found = seen(pod)
    [time] = found.pods.values()
    assert told(found)[0] is F.IMAGE and time.started is None
    assert (time.scheduled, time.finished) == (T0, T0 + (100 if finished == "now" else 0)), (
        "it held its node until its end, if that is known"
    )
    uid = objects.uid(pod)
    assert seen(remembered=(pod,), known={uid}).pods == found.pods


@pytest.mark.parametrize("finished", ["1970", "null"])
def test_a_container_whose_end_is_unknown(finished: str) -> None:
    """After ContainerStatusUnknown it is not known how long the container ran. It must count
    neither as years nor as a negative time.
    """
    pod = ended(code=137, reason="ContainerStatusUnknown")
    state = pod["status"]["containerStatuses"][1]["state"]["terminated"]
    state |= {"startedAt": WHEN["1970"], "finishedAt": WHEN[finished]}
    [time] = seen(pod).pods.values()
    assert time.started is None and time.finished == time.scheduled
    assert told(seen(pod))[0] is F.UNKNOWN


SKEWS = [0, -2, 2, -300, 300, -1900, 1900]


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("tells", [True, False])
def test_a_node_whose_clock_is_off(skew: float, tells: bool) -> None:
    """A start and an end are from the node's clock, so their difference is right. The interval is
    moved to where it is possible by our clock.
    """
    over = ended(0, start=10 + skew, end=100 + skew)
    going = running(0, start=10 + skew)
    if tells:
        for pod in (over, going):
            pod["status"]["startTime"] = at(1 + skew)
    [time] = seen(over, now=110).pods.values()
    assert time.finished is not None and time.finished - time.started == 90
    assert time.started >= T0 and time.finished <= T0 + 110
    [open_] = seen(going, now=110).pods.values()
    assert T0 <= open_.started <= T0 + 110 and open_.finished is None
    if tells and skew:
        assert abs(open_.started - T0 - 10) <= 2


def test_times_and_gpus() -> None:
    found = seen(running(0, start=10), ended(1, start=20, end=50), unschedulable(2))
    first, second = sorted(found.pods.values(), key=lambda pod: pod.started)
    assert (first.started - T0, first.finished, first.gpus, first.first) == (10, None, 8, True)
    assert (second.started - T0, second.finished, second.first) == (20, T0 + 50, False)
    assert found.running == 1


def test_a_pod_on_a_lost_node_counts_until_the_loss_was_noticed() -> None:
    pod = disrupted(running(start=10), "DeletionByPodGC", when=80)
    pod["status"]["phase"] = "Failed"
    [time] = seen(pod).pods.values()
    assert time.finished == T0 + 80


def test_the_time_of_a_pod_that_is_gone_counts_only_if_the_status_lists_it() -> None:
    pod = ended(start=20, end=50)
    uid = objects.uid(pod)
    assert seen(remembered=(pod,)).pods == {}
    assert seen(remembered=(pod,), known={uid}).pods == seen(pod).pods


def test_only_pods_with_evidence_are_remembered_and_little_of_each() -> None:
    assert podread.remember(running()) is None and podread.remember(pending()) is None
    big = ended(message=word())
    big["metadata"]["managedFields"] = [{"x": "y" * 100_000}]
    big["spec"]["containers"][0]["env"] = [{"name": "MODELCHAIN_TASK", "value": "x" * 60_000}]
    kept = podread.remember(big)
    assert kept is not None and len(json.dumps(kept)) < 3_000


# -- any pod that the API may return ---------------------------------------------------------------

MESSAGES = [
    "",
    "{",
    "null",
    "Killed",
    word(),
    word("Succeeded"),
    word("Failed", "Preempted"),
    word("Failed", "Gremlins"),
    '{"result":"Failed"}',
    "[]",
    "é" * 2048,
    word(metrics={"a": "x"}),
]


@st.composite
def any_pod(draw: st.DrawFn) -> Pod:
    rank, end = draw(st.integers(0, 3)), draw(st.integers(20, 150))
    code, message = draw(st.sampled_from([0, 1, 2, 75, 137, 143])), draw(st.sampled_from(MESSAGES))
    pod = draw(
        st.sampled_from(
            [
                pending(rank),
                running(rank),
                in_init(rank),
                init_failed(rank),
                unschedulable(rank),
                waiting(rank, "ErrImagePull", NOT_FOUND),
                waiting(rank, "CrashLoopBackOff"),
                ended(rank, code=code, message=message, end=end),
            ]
        )
    )
    pod = json.loads(json.dumps(pod))
    if draw(st.booleans()):
        reasons = ["PreemptionByScheduler", "DeletionByPodGC", "SomethingNew"]
        pod = disrupted(pod, draw(st.sampled_from(reasons)), when=end)
    if draw(st.booleans()):
        pod = deleted(pod, grace_over=end)
    for place in ("conditions", "containerStatuses"):  # an API server may send null for a list
        if draw(st.integers(0, 9)) == 0:
            pod["status"][place] = None
    pod["metadata"]["uid"] = draw(st.uuids()).hex
    return pod


@settings(max_examples=300, deadline=None)
@given(
    st.lists(any_pod(), max_size=5),
    st.lists(any_pod(), max_size=3),
    st.randoms(use_true_random=False),
)
def test_any_pods_give_consistent_evidence(live: list[Pod], gone: list[Pod], chance: Any) -> None:
    found = seen(*live, remembered=tuple(gone), nodes=4)
    shuffled = list(live)
    chance.shuffle(shuffled)
    assert seen(*shuffled, remembered=tuple(gone), nodes=4).live == found.live
    assert found.word is None or found.failure is None
    if found.word and found.word.result == "Succeeded":
        assert found.word.manifest_digest and found.word.artifact_digest
    elif found.word:
        assert found.word.failure is not None
    assert found.live == any(p["status"]["phase"] not in ("Succeeded", "Failed") for p in live)
    assert found.pods.keys() <= {p["metadata"]["uid"] for p in live}
    nothing_failed = all(
        p["status"]["phase"] not in ("Failed", "Succeeded") and podread.disruption(p) is None
        for p in [*live, *gone]
    )
    if nothing_failed:
        assert (found.word, found.failure) == (None, None)
    assert "\n" not in text(found.waiting) + text(pod_evidence.stuck(live, T0 + 200, None))


@pytest.mark.parametrize("ahead", [-3600, -5, 0, 5, 3600])
@pytest.mark.parametrize("told", [True, False])
def test_a_start_does_not_move_with_our_clock(ahead: int, told: bool) -> None:
    """This is true for any clock of the node, and with or without the pod's startTime. Otherwise
    every pass would write a new status.
    """
    alive = running(start=10 + ahead)
    over = ended(1, start=10 + ahead, end=40 + ahead)
    for pod in (alive, over):
        if told:
            pod["status"]["startTime"] = at(ahead)
    early, late = seen(alive, over, now=41), seen(alive, over, now=45)
    assert early.pods == late.pods
    for pod in late.pods.values():
        assert pod.started >= T0, "no pod starts before it was created"
        if told:
            assert pod.started - T0 == pytest.approx(10, abs=5)
        assert pod.finished is None or pod.finished - pod.started == 30
