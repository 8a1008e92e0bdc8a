"""What the pods of one attempt say: its last word, or why there is none; what it waits for; how
long it ran.

Pure. Pods come as dicts: those read now, and those remembered from the watch, which may add
evidence and never make an attempt look ended (RULES section 7).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import PodTime
from modelchain_operator.api import objects
from modelchain_operator.api.objects import Read
from modelchain_operator.runners import pods as podread
from modelchain_operator.runners.port import JobState

STUCK_SECONDS = 60  # after a pod's grace is over
QUOTED = 240  # characters of a message that is quoted

Failure = tuple[FailureClass, str]


@dataclass(frozen=True)
class Evidence:
    """Of one attempt.

    `word`: rank 0's success, or the word of the failure that came first; None while nothing has
    ended, or if nobody left one. `failure`: what pods say of a failure without a word. `waiting`:
    why pods do not run, `permanent` if waiting longer cannot help. `stalled`: a pod that will not
    go, and what to type. `pods`: running times by UID, of pods that are there and of those that are
    gone (`gone`); `never_ran`: UIDs of pods whose container could not start. `bad_nodes`: nodes
    whose own device failed, with a short name of what was wrong.
    """

    live: bool = False
    running: int = 0
    word: LastWord | None = None
    failure: Failure | None = None
    waiting: Reason | None = None
    permanent: Failure | None = None
    stalled: Reason | None = None
    pods: Mapping[str, PodTime] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    never_ran: frozenset[str] = frozenset()
    bad_nodes: Mapping[str, str] = field(default_factory=dict)


def evidence(
    live: Sequence[Read],
    remembered: Iterable[Read],
    *,
    job: JobState,
    nodes: int,
    node_rank: Callable[[Read], int | None],
    gpu_resource: str,
    now: float,
    known: Container[str] | None = None,
    going: Mapping[str, float] | None = None,
) -> Evidence:
    """What is known of an attempt from its pods.

    Args:
        live: the attempt's pods, just read.
        remembered: `pods.remember` of the attempt's pods, seen earlier.
        job: of the attempt; it tells a failure whose pods are all gone.
        nodes: how many pods the attempt has when all is well.
        node_rank: the runner's.
        now: seconds since the epoch.
        known: UIDs whose running time the status still carries, where it has summed up others: a
            remembered pod that is in the sum must not come back. None while nothing was summed up.
        going: by UID, since when this process knows that a pod is being deleted; None: the API
            server's clock is ours.
    """
    read = {objects.uid(pod): pod for pod in live}
    gone = {objects.uid(pod): pod for pod in remembered if objects.uid(pod) not in read}
    everything = {**gone, **read}
    run = _current_run(list(everything.values()), node_rank)
    word, failure = _how_it_ended(run, node_rank)
    if job.finished == "Failed" and word is None and failure is None:
        failure = FailureClass.UNKNOWN, f"the job failed and its pods are gone ({job.message})"
    waiting, permanent = _why_waiting(live, nodes, node_rank)
    times = {
        uid: PodTime(
            started=ran[0],
            finished=ran[1],
            gpus=podread.gpus(pod, gpu_resource),
            first=node_rank(pod) == 0,
        )
        for uid, pod in everything.items()
        if (ran := podread.run_time(pod, now)) is not None
        and (uid in read or known is None or uid in known)
    }
    return Evidence(
        live=any(podread.is_live(pod) for pod in live),
        running=sum(podread.is_running(pod) for pod in live),
        word=word,
        failure=failure,
        waiting=waiting,
        permanent=permanent,
        stalled=_stuck(live, now, going),
        pods=times,
        gone=frozenset(gone),
        never_ran=frozenset(uid for uid, pod in everything.items() if podread.never_ran(pod)),
        bad_nodes=_bad_nodes(run),
    )


def refusal(events: Iterable[Read]) -> str:
    """Why pods of a job are refused at creation, in the words of its newest event that says so;
    else empty.
    """
    refused = [
        event
        for event in events
        if event.get("reason") in ("FailedCreatePod", "FailedCreate")
        and any(text in event["message"] for text in ("forbidden", "denied"))
    ]
    if not refused:
        return ""
    newest = max(refused, key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "")
    return str(newest["message"]).removeprefix("Error creating: ")


def _current_run(pods: list[Read], node_rank: Callable[[Read], int | None]) -> list[Read]:
    """Those of the newest start. A queue may evict a job and start it again: same job, same pod
    names, new pods.
    """
    run: list[Read] = []
    for pod in sorted(pods, key=podread.created_at):
        again = any(node_rank(other) == node_rank(pod) for other in run)
        if again and all(
            (podread.ended_at(other) or 0.0) <= podread.created_at(pod) for other in run
        ):
            run = []
        run.append(pod)
    return run


# -- how it ended ----------------------------------------------------------------------------------

# A cause beats its consequences. Peers of a dead rank die of an error; what is left is asked to
# stop, or is killed.
_PLAIN_ERROR = (FailureClass.ERROR,)
_CONSEQUENCES = (FailureClass.PREEMPTED, FailureClass.KILLED, FailureClass.UNKNOWN)

_LOST = ("NodeLost", "NodeShutdown", "Shutdown", "Terminated")  # a pod's own reason
_TAKEN = {  # reasons of the condition DisruptionTarget
    "PreemptionByScheduler": (FailureClass.PREEMPTED, "was preempted by a pod of higher priority"),
    "EvictionByEvictionAPI": (
        FailureClass.PREEMPTED,
        "was evicted (a node is drained, or somebody asked for it)",
    ),
    "TerminationByKubelet": (FailureClass.PREEMPTED, "was ended by its node"),
    "DeletionByTaintManager": (
        FailureClass.NODE_LOST,
        "was on a node that became unreachable or was tainted",
    ),
    "DeletionByPodGC": (FailureClass.NODE_LOST, "was on a node that no longer exists"),
}


@dataclass(frozen=True)
class _Cause:
    at: float
    weight: int
    failure: FailureClass
    sentence: str
    word: LastWord | None = None


def _how_it_ended(
    run: Sequence[Read], node_rank: Callable[[Read], int | None]
) -> tuple[LastWord | None, Failure | None]:
    causes, first_word = [], None
    for pod in sorted(run, key=lambda pod: node_rank(pod) or 0):
        word = podread.last_word(pod)
        if word is not None and word.result == "Succeeded":
            if node_rank(pod) == 0:
                return word, None
            word = None  # success is rank 0's to report
        first_word = first_word or word
        causes += _causes(pod, word)
    if not causes:
        return None, None
    cause = min(causes, key=lambda cause: (cause.weight, cause.at))
    if cause.word is None and first_word is None:
        return None, (cause.failure, cause.sentence)
    # The figures of a word are kept even where a pod knows the cause better.
    word = cause.word or (
        first_word
        and first_word.model_copy(update={"failure": cause.failure, "message": cause.sentence})
    )
    return word, None


def _causes(pod: Read, word: LastWord | None) -> list[_Cause]:
    """Why this pod failed: by its own word, and by what its node and the control plane say; empty
    if it did not.
    """
    at = (
        podread.ended_at(pod)
        or objects.seconds((podread.disruption(pod) or {}).get("lastTransitionTime"))
        or 0.0
    )
    causes = []
    if word is not None:
        failure = word.failure or FailureClass.ERROR
        weight = 2 if failure in _CONSEQUENCES else 1 if failure in _PLAIN_ERROR else 0
        said = word.message if failure.permanent else f"{_where(pod)}: {word.message}"
        if failure is FailureClass.PREEMPTED and objects.is_deleting(pod):
            said = f"{_where(pod)} was deleted"
        word = word.model_copy(update={"failure": failure, "message": said})
        causes.append(_Cause(at, weight, failure, said, word))
    if (known := _by_platform(pod)) is not None:
        causes.append(_Cause(at, 0, *known))
    terminated = podread.state(pod, "terminated") or {}
    if not causes and (
        pod["status"].get("phase") == "Failed" or terminated.get("exitCode", 0) != 0
    ):
        causes.append(_Cause(at, 2, FailureClass.UNKNOWN, _unknown(pod, terminated)))
    return causes


def _bad_nodes(run: Sequence[Read]) -> dict[str, str]:
    """By node, the fault of its own devices: as a trainer there found it, or as the kubelet refused
    the pod.
    """
    nodes = {}
    for pod in run:
        node, word = pod["spec"].get("nodeName"), podread.last_word(pod)
        if node and word is not None and word.failure is FailureClass.HARDWARE and word.node:
            nodes[node] = word.fault or FailureClass.HARDWARE
        elif node and _refused_device(pod):
            nodes[node] = pod["status"]["reason"]
    return nodes


def _refused_device(pod: Read) -> bool:
    """Its node has taken the pod, and has no healthy device for it."""
    said = pod["status"].get("message") or ""
    return pod["status"].get("reason") == "UnexpectedAdmissionError" and "healthy devices" in said


def _where(pod: Read) -> str:
    node = pod["spec"].get("nodeName")
    return f"pod {objects.name(pod)}" + (f" on node {node}" if node else "")


def _by_platform(pod: Read) -> Failure | None:
    status, name, where = pod["status"], objects.name(pod), _where(pod)
    said = _short(status.get("message"))
    terminated = podread.state(pod, "terminated") or {}
    if status.get("phase") == "Succeeded":
        return None
    if status.get("reason") == "Evicted" and "exceeds the" in said:
        return (
            FailureClass.VOLUME_FULL,
            f"{where} was evicted: {said} Raise ephemeralStorage of the node pool",
        )
    if status.get("reason") == "Evicted":
        storage = "ephemeral-storage" in said
        advice = (
            "; raise ephemeralStorage of the node pool, or free the node's disk" if storage else ""
        )
        return (
            FailureClass.PREEMPTED,
            f"{where} was evicted by its node: {said or 'no reason given'}{advice}",
        )
    if status.get("reason") in _LOST:
        return FailureClass.NODE_LOST, f"{where} lost its node: {said or status['reason']}"
    if _refused_device(pod):
        return FailureClass.HARDWARE, f"{where} got no device: {said}"
    if (taken := podread.disruption(pod)) is not None:
        failure, how = _TAKEN.get(
            taken["reason"], (FailureClass.PREEMPTED, f"was taken away ({taken['reason']})")
        )
        return failure, f"{where} {how}"
    if terminated.get("reason") == "OOMKilled":
        limits = podread.main_container(pod).get("resources", {}).get("limits") or {}
        limit = limits.get("memory", "none, so the node's")
        return (
            FailureClass.OUT_OF_MEMORY,
            (
                f"{where} ran out of memory (limit: {limit}); raise memory of the node pool, or"
                " lower recipe.microBatchSize"
            ),
        )
    if terminated.get("reason") in podread.NOT_STARTED:
        return (
            FailureClass.IMAGE,
            f"the image of {where} cannot be started: {_short(terminated.get('message'))}",
        )
    for init in status.get("initContainerStatuses") or []:
        ended = init.get("state", {}).get("terminated") or {}
        if ended.get("exitCode", 0) != 0:
            return (
                FailureClass.INIT,
                (
                    f"init container {init['name']} of {where} failed with exit code"
                    f" {ended['exitCode']}: rank 0's pod was not reachable in time; see: kubectl"
                    f" logs {name} -c {init['name']} -n {pod['metadata']['namespace']}"
                ),
            )
    return None


def _unknown(pod: Read, terminated: Read) -> str:
    name, namespace = objects.name(pod), pod["metadata"]["namespace"]
    if not terminated:
        said = (
            _short(pod["status"].get("message")) or pod["status"].get("reason") or "no reason given"
        )
        return (
            f"pod {name} failed before its container ran: {said}; see: kubectl describe pod {name}"
            f" -n {namespace}"
        )
    code = terminated.get("exitCode")
    killed = " (killed)" if code == 137 else ""
    return (
        f"pod {name} left no last word, exit code {code}{killed}; see: kubectl logs {name} -n"
        f" {namespace}"
    )


def _short(text: str | None) -> str:
    """One line of somebody else's, cut."""
    line = " ".join((text or "").split())
    return line if len(line) <= QUOTED else f"{line[: QUOTED - 1]}…"


# -- what it waits for -----------------------------------------------------------------------------

_PULL = (
    "ErrImagePull",
    "ImagePullBackOff",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
)
_NO_SUCH_IMAGE = ("not found", "notfound", "manifest unknown")
_NEVER_AS_ROOT = ("runAsNonRoot", "non-numeric user")


@dataclass(frozen=True)
class _Wait:
    weight: int  # the most telling first
    reason: Reason
    permanent: FailureClass | None = None


def _why_waiting(
    live: Sequence[Read], nodes: int, node_rank: Callable[[Read], int | None]
) -> tuple[Reason | None, Failure | None]:
    """Why the attempt does not run, and what it fails of if waiting longer cannot help."""
    waits = [
        wait
        for pod in sorted(live, key=lambda pod: node_rank(pod) or 0)
        if (wait := _wait(pod)) is not None
    ]
    there = [pod for pod in live if podread.is_live(pod)]
    if not waits:
        return _incomplete(there, len(live), nodes), None
    wait = min(waits, key=lambda wait: wait.weight)
    reason = wait.reason
    if nodes > 1:
        running = sum(podread.is_running(pod) for pod in there)
        reason = reason.with_message(f"{running} of {nodes} pods run, {reason.message}")
    return reason, (wait.permanent, reason.text) if wait.permanent else None


def _incomplete(there: Sequence[Read], known: int, nodes: int) -> Reason | None:
    """No pod waits, but pods are still going or still to come."""
    if going := next((pod for pod in there if objects.is_deleting(pod)), None):
        message = f"waits until {_where(going)}, which is being deleted, has ended"
        return Reason(Code.PODS_ENDING, objects.name(going), message)
    if there and len(there) == known < nodes:
        message = f"{len(there)} of {nodes} pods are there; the others are still to be created"
        return Reason(Code.PODS_MISSING, objects.name(there[0]), message)
    return None


def _wait(pod: Read) -> _Wait | None:
    if not podread.is_live(pod) or podread.started_at(pod) is not None or objects.is_deleting(pod):
        return None
    scheduled = objects.condition(pod, "PodScheduled")
    if scheduled is not None and scheduled["status"] == "False":
        return _unscheduled(pod, scheduled)
    inits = pod["status"].get("initContainerStatuses") or []
    for status in [*inits, *(pod["status"].get("containerStatuses") or [])]:
        state = status.get("state", {})
        waiting = state.get("waiting")
        if waiting is not None and waiting.get("reason") != "PodInitializing":
            return _container_wait(pod, status, waiting)
        if status in inits and state.get("running") is not None:
            text = f"init container {status['name']} runs until rank 0's pod can be reached"
            return _Wait(5, _of_pod(Code.INIT, pod, text))
    return _Wait(6, _of_pod(Code.STARTING, pod, "not yet looked at by a node or the scheduler"))


def _of_pod(code: Code, pod: Read, text: str, *, see: bool = False) -> Reason:
    """The reason of a pod that waits. `see`: the sentence ends with the command that shows it."""
    name = objects.name(pod)
    describe = f"kubectl describe pod {name} -n {pod['metadata']['namespace']}"
    bare = code not in (Code.UNSCHEDULABLE, Code.SCHEDULING_GATED)
    shown: Literal["", "see"] = "see" if see else ""
    return Reason(code, name, f"{name} waits: {text}", describe, shown, bare)


def _unscheduled(pod: Read, scheduled: Read) -> _Wait:
    said = _short(scheduled.get("message")) or "no node was found yet"
    if scheduled.get("reason") == "SchedulingGated":
        return _Wait(3, _of_pod(Code.SCHEDULING_GATED, pod, f"held by a scheduling gate ({said})"))
    # How preemption would not help either is as long again.
    said = re.split(r"\.? (?:no new claims to deallocate, )?preemption: ", said)[0]
    said = said.removesuffix(". not found")  # said twice where a claim is missing
    why = scheduled.get("reason", "Unschedulable")
    if why != "Unschedulable":  # the scheduler's own error, which is no lack of nodes
        return _Wait(2, _of_pod(Code.STARTING, pod, f"{why}: {said}", see=True))
    return _Wait(2, _of_pod(Code.UNSCHEDULABLE, pod, said, see=True))


def _container_wait(pod: Read, status: Read, waiting: Read) -> _Wait:
    # The kubelet tells the same failure in turn as ErrImagePull and as ImagePullBackOff with a
    # preface.
    said = _short(str(waiting.get("message") or "").rsplit("ErrImagePull: ", 1)[-1])
    reason, image = waiting.get("reason", ""), status.get("image", "")
    if reason == "InvalidImageName":
        return _bad_image(pod, f"{image} is no image name; correct runner.image")
    if reason in _PULL or reason == "ErrImageNeverPull":
        if any(text in said.lower() for text in _NO_SUCH_IMAGE):
            return _bad_image(pod, f"there is no image {image}; correct runner.image ({said})")
        return _Wait(1, _quoted(Code.IMAGE, pod, f"image {image} cannot be pulled", said))
    if reason == "CreateContainerConfigError" and any(text in said for text in _NEVER_AS_ROOT):
        return _bad_image(pod, f"the image's user is root; set runAsUser of the node pool ({said})")
    if reason in ("", "ContainerCreating"):
        text = "its node pulls the image and mounts volumes; if for long, see: "
        describe = _of_pod(Code.STARTING, pod, "").next
        return _Wait(4, _of_pod(Code.STARTING, pod, text + describe))
    return _Wait(1, _quoted(Code.STARTING, pod, reason, said))


def _bad_image(pod: Read, text: str) -> _Wait:
    return _Wait(0, _of_pod(Code.IMAGE, pod, text), FailureClass.IMAGE)


def _quoted(code: Code, pod: Read, what: str, said: str) -> Reason:
    """With the kubelet's own words, or with the command that shows more."""
    describe = _of_pod(code, pod, "").next
    return _of_pod(code, pod, f"{what}: {said or f'see: {describe}'}")


def _stuck(live: Sequence[Read], now: float, going: Mapping[str, float] | None) -> Reason | None:
    """A pod that outstays its grace: its node does not answer. The deletion's timestamp has the
    grace in it.

    That is the API server's clock, and ours may be minutes ahead of it: then a pod within its grace
    would be called stuck. So its grace must have passed by our own clock, too, since we first saw
    it go.
    """
    for pod in live:
        meta, due = pod["metadata"], objects.seconds(pod["metadata"].get("deletionTimestamp"))
        if not podread.is_live(pod) or due is None or now <= due + STUCK_SECONDS:
            continue
        grace = meta.get("deletionGracePeriodSeconds") or 0
        waited = going is None or now - going.get(objects.uid(pod), now) > grace + STUCK_SECONDS
        if waited or now > due + STUCK_SECONDS + podread.CLOCKS_DIFFER:
            name, node = objects.name(pod), pod["spec"].get("nodeName", "unknown")
            message = (
                f"pod {name} should have ended at {meta['deletionTimestamp']}; node {node} does not"
                f" answer. If it is dead for certain: kubectl delete pod {name} -n"
                f" {meta['namespace']} --force --grace-period=0"
            )
            return Reason(Code.NODE_LOST, name, message, f"kubectl describe node {node}")
    return None
