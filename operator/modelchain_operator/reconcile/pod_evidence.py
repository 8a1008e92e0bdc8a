"""What the pods of one attempt say: its last word, or why there is none; what it waits for; how
long it ran.

Pure. Pods come as dicts: those read now, and those remembered from the watch. A remembered pod may
add evidence, and never makes an attempt look ended.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.reasons import Reason
from modelchain.api.status import PodTime
from modelchain_operator.api import objects
from modelchain_operator.api.objects import Read
from modelchain_operator.runners import pods as podread
from modelchain_operator.runners.port import JobState


@dataclass(frozen=True)
class Evidence:
    """Of one attempt.

    `word`: rank 0's success, or the word of the failure that came first; None while nothing has
    ended, or if no pod left one. `failure`: what pods say of a failure without a word. `waiting`:
    why pods do not run, `permanent` if waiting longer cannot help. `stalled`: a pod that does not
    end, and what to type. `pods`: running times by UID, of pods that are there and of those that
    are gone (`gone`); `never_ran`: UIDs of pods whose container could not start. `bad_nodes`: nodes
    whose own device failed, with a short name of what was wrong.
    """

    live: bool = False
    running: int = 0
    word: LastWord | None = None
    failure: podread.Failure | None = None
    waiting: Reason | None = None
    permanent: podread.Failure | None = None
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
    gang: podread.Gang,
    now: float,
    known: Container[str] | None = None,
    going: Mapping[str, float] | None = None,
) -> Evidence:
    """What is known of an attempt from its pods, `live` as just read, `remembered` as seen before.

    Args:
        job: of the attempt; it tells a failure whose pods are all gone.
        now: seconds since the epoch.
        known: UIDs whose running time the status still carries, where it has summed up others: a
            remembered pod that is in the sum must not come back. None while nothing was summed up.
        going: by UID, since when this process knows that a pod is being deleted; None: the API
            server's clock is ours.
    """
    read = {objects.uid(pod): pod for pod in live}
    gone = {objects.uid(pod): pod for pod in remembered if objects.uid(pod) not in read}
    pods = {**gone, **read}
    timed = [pod for uid, pod in pods.items() if uid in read or known is None or uid in known]
    run = _current_run(list(pods.values()), gang)
    word, failure = _how_it_ended(run, job, gang)
    waiting, permanent = podread.why_waiting(live, gang)
    return Evidence(
        live=any(podread.is_live(pod) for pod in live),
        running=sum(podread.is_running(pod) for pod in live),
        word=word,
        failure=failure,
        waiting=waiting,
        permanent=permanent,
        stalled=podread.stuck(live, now, going),
        pods=_run_times(timed, gang, now),
        gone=frozenset(gone),
        never_ran=frozenset(uid for uid, pod in pods.items() if podread.never_ran(pod)),
        bad_nodes=_bad_nodes(run),
    )


def _run_times(pods: Iterable[Read], gang: podread.Gang, now: float) -> dict[str, PodTime]:
    """By UID, of the pods that ran."""
    times = {}
    for pod in pods:
        if (ran := podread.run_time(pod, now)) is not None:
            started, finished = ran
            gpus, first = podread.gpus(pod, gang.gpu_resource), gang.node_rank(pod) == 0
            times[objects.uid(pod)] = PodTime(
                started=started, finished=finished, gpus=gpus, first=first
            )
    return times


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


def _current_run(pods: list[Read], gang: podread.Gang) -> list[Read]:
    """Those of the newest start. A queue may evict a job and start it again: same job, same pod
    names, new pods.
    """
    run: list[Read] = []
    for pod in sorted(pods, key=podread.created_at):
        again = any(gang.node_rank(other) == gang.node_rank(pod) for other in run)
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
        "was evicted (a node is drained, or an eviction was requested)",
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
    run: Sequence[Read], job: JobState, gang: podread.Gang
) -> tuple[LastWord | None, podread.Failure | None]:
    """The last word that counts, or else a failure without one; neither while nothing has ended."""
    causes, first_word = [], None
    for pod in gang.in_order(run):
        word = podread.last_word(pod)
        if word is not None and word.result == "Succeeded":
            if gang.node_rank(pod) == 0:
                return word, None
            word = None  # success is rank 0's to report
        first_word = first_word or word
        causes += _causes(pod, word)
    if not causes and job.finished == "Failed":
        return None, (
            FailureClass.UNKNOWN,
            f"the job failed and its pods are gone ({job.message})",
        )
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
        said = word.message if failure.permanent else f"{podread.where(pod)}: {word.message}"
        if failure is FailureClass.PREEMPTED and objects.is_deleting(pod):
            said = f"{podread.where(pod)} was deleted"
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


def _by_platform(pod: Read) -> podread.Failure | None:
    """Why the pod failed, as its node or the control plane says; None if they say nothing."""
    if pod["status"].get("phase") == "Succeeded":
        return None
    causes = (
        _evicted(pod),
        _node_lost(pod),
        _no_device(pod),
        _taken_away(pod),
        _out_of_memory(pod),
        _not_started(pod),
        _init_failed(pod),
    )
    return next((cause for cause in causes if cause is not None), None)


def _evicted(pod: Read) -> podread.Failure | None:
    if pod["status"].get("reason") != "Evicted":
        return None
    said = podread.short(pod["status"].get("message"))
    if "exceeds the" in said:
        advice = "Raise ephemeralStorage of the node pool"
        return FailureClass.VOLUME_FULL, f"{podread.where(pod)} was evicted: {said} {advice}"
    advice = ""
    if "ephemeral-storage" in said:
        advice = "; raise ephemeralStorage of the node pool, or free the node's disk"
    said = said or "no reason given"
    return FailureClass.PREEMPTED, f"{podread.where(pod)} was evicted by its node: {said}{advice}"


def _node_lost(pod: Read) -> podread.Failure | None:
    reason = pod["status"].get("reason")
    if reason not in _LOST:
        return None
    said = podread.short(pod["status"].get("message")) or reason
    return FailureClass.NODE_LOST, f"{podread.where(pod)} lost its node: {said}"


def _no_device(pod: Read) -> podread.Failure | None:
    if not _refused_device(pod):
        return None
    said = podread.short(pod["status"].get("message"))
    return FailureClass.HARDWARE, f"{podread.where(pod)} got no device: {said}"


def _taken_away(pod: Read) -> podread.Failure | None:
    taken = podread.disruption(pod)
    if taken is None:
        return None
    other = FailureClass.PREEMPTED, f"was taken away ({taken['reason']})"
    failure, how = _TAKEN.get(taken["reason"], other)
    return failure, f"{podread.where(pod)} {how}"


def _out_of_memory(pod: Read) -> podread.Failure | None:
    terminated = podread.state(pod, "terminated") or {}
    if terminated.get("reason") != "OOMKilled":
        return None
    limits = podread.main_container(pod).get("resources", {}).get("limits") or {}
    limit = limits.get("memory", "none, so the node's")
    return (
        FailureClass.OUT_OF_MEMORY,
        f"{podread.where(pod)} ran out of memory (limit: {limit}); raise memory of the node pool,"
        " or lower recipe.microBatchSize",
    )


def _not_started(pod: Read) -> podread.Failure | None:
    if not podread.never_ran(pod):
        return None
    said = podread.short((podread.state(pod, "terminated") or {}).get("message"))
    return FailureClass.IMAGE, f"the image of {podread.where(pod)} cannot be started: {said}"


def _init_failed(pod: Read) -> podread.Failure | None:
    for init in pod["status"].get("initContainerStatuses") or []:
        ended = init.get("state", {}).get("terminated") or {}
        if ended.get("exitCode", 0) != 0:
            name, namespace = objects.name(pod), pod["metadata"]["namespace"]
            return (
                FailureClass.INIT,
                f"init container {init['name']} of {podread.where(pod)} failed with exit code"
                f" {ended['exitCode']}: rank 0's pod was not reachable in time; see: kubectl"
                f" logs {name} -c {init['name']} -n {namespace}",
            )
    return None


def _unknown(pod: Read, terminated: Read) -> str:
    name, namespace = objects.name(pod), pod["metadata"]["namespace"]
    if not terminated:
        said = (
            podread.short(pod["status"].get("message"))
            or pod["status"].get("reason")
            or "no reason given"
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
