"""What the pods of one attempt tell of it.

They tell its last word, or why there is none; what the attempt waits for; how long it ran.

All functions are pure. They are given pods as dicts: those that were just read, and those that are
remembered from the watch. A remembered pod may add evidence, but alone it never makes an attempt
count as ended.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.faults import fault_at_start, is_of_a_volume
from modelchain.api.messages import one_line
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import Capacity, PodTime
from modelchain.api.uses import NOT_USED
from modelchain_operator.api import objects
from modelchain_operator.api.objects import Read
from modelchain_operator.runners import pods as podread
from modelchain_operator.runners.port import JobState
from modelchain_operator.runners.template import SHARED_MEMORY

# A pod is stuck if it still exists this long after its grace period is over.
STUCK_SECONDS = 60


@dataclass(frozen=True)
class Evidence:
    """The evidence on one attempt."""

    # At least one pod may still run.
    live: bool = False
    # How many pods exist.
    count: int = 0
    # How many pods run.
    running: int = 0
    # When the last main container ended, in seconds since the epoch; None if one may still run.
    # Sidecars may run on.
    ended: float | None = None
    # All main containers have exited with 0. That alone is no evidence of success.
    completed: bool = False
    # The last word of rank 0 if it succeeded, else that of the failure that caused the others. None
    # while no pod has ended, or if none left a last word.
    word: LastWord | None = None
    # What the pods tell of a failure, if there is no last word.
    failure: podread.Failure | None = None
    # Why pods do not run yet.
    waiting: Reason | None = None
    # Why waiting longer cannot help.
    permanent: podread.Failure | None = None
    # The times of pods by UID, of pods that exist and of pods that are only remembered.
    pods: Mapping[str, PodTime] = field(default_factory=dict)
    # The UIDs of pods that are only remembered.
    gone: frozenset[str] = frozenset()
    # By node whose own device failed, a short name of the fault.
    bad_nodes: Mapping[str, str] = field(default_factory=dict)


def evidence(  # long: its contract takes half of it
    live: Sequence[Read],
    remembered: Iterable[Read],
    *,
    job: JobState,
    gang: podread.Gang,
    now: float,
    known: Container[str] | None = None,
    capacity: Callable[[Any], Capacity | None] = lambda pod: None,
) -> Evidence:
    """What the pods of an attempt tell of it.

    Args:
        live: the pods as they were just read.
        remembered: pods as the watch has shown them; they may exist no longer.
        job: the attempt's job. It tells of a failure if no pod is left.
        now: seconds since the epoch.
        known: the UIDs of pods whose running time is in the status by itself. The status has summed
            up all other pods, so a remembered one of those must not count again. None if nothing
            was summed up yet.
        capacity: how the node of a pod is bought.
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
        count=len(live),
        running=sum(podread.is_running(pod) for pod in live),
        ended=_trainers_ended([pod for pod in run if objects.uid(pod) in read], gang),
        completed=_completed(run, gang),
        word=word,
        failure=failure,
        waiting=waiting,
        permanent=permanent,
        pods=_times(timed, gang, now, capacity),
        gone=frozenset(gone),
        bad_nodes=_bad_nodes(run),
    )


def _times(
    pods: Iterable[Read],
    gang: podread.Gang,
    now: float,
    capacity: Callable[[Any], Capacity | None],
) -> dict[str, PodTime]:
    """The times of pods that held GPUs, by UID, and what rank 0's last words say of their work."""
    times = {}
    for pod in pods:
        if (held := podread.times(pod, now)) is not None:
            first = gang.node_rank(pod) == 0
            word = podread.last_word(pod) if first else None
            times[objects.uid(pod)] = PodTime(
                **held._asdict(),
                gpus=podread.gpus(pod, gang.gpu_resource),
                first=first,
                capacity=capacity(pod),
                **(_told(word) if word else {}),
            )
    return times


def _told(word: LastWord) -> dict[str, Any]:
    """What a last word of rank 0's pod says of the work. Another rank may have written it, which
    does not know how the time was used. After a stall, the next trainer knows best what was kept.
    """
    told = word.milliseconds
    return {
        "macs": word.macs,
        "saved_macs": word.saved_macs,
        "told": told,
        "over": told != NOT_USED and word.failure is not FailureClass.STALL_DEADLINE,
    }


def _trainers_ended(pods: Sequence[Read], gang: podread.Gang) -> float | None:
    """When the last main container ended, if none will run any more; else None.

    If one has failed, those that have not started will not run either. A pod that is being deleted
    tells nothing: its job may be suspended, and then makes it again.

    Args:
        pods: those of the newest start of the job, as they were just read.
        gang: the pods that the attempt should have.
    """
    ended = [pod for pod in pods if podread.has_ended(pod)]
    if len(pods) < gang.nodes or any(objects.is_deleting(pod) for pod in pods):
        return None
    failed = any(podread.has_failed(pod) for pod in ended)
    if any(podread.is_running(pod) for pod in pods) or (len(ended) < len(pods) and not failed):
        return None
    return max((podread.ended_at(pod) or podread.created_at(pod) for pod in ended), default=None)


def _completed(run: Sequence[Read], gang: podread.Gang) -> bool:
    """Whether the main container of every pod has exited with 0."""
    done = [podread.has_ended(pod) and not podread.has_failed(pod) for pod in run]
    return len(done) >= gang.nodes and all(done)


# The reasons of the events that tell of the parts of a job: those that were refused, each with the
# reason of those that were made.
_PARTS = {
    "FailedCreatePod": "SuccessfulCreatePod",
    "FailedCreate": "SuccessfulCreate",
    "FailedCreateService": "SuccessfulCreateService",
}
OF_SERVICES = ("FailedCreateService",)


def refusal(events: Iterable[Read], refused: Container[str] = frozenset(_PARTS)) -> str:
    """Why the API server refuses parts of a job, in its words; empty if it does not.

    Args:
        events: those of the job.
        refused: the reasons of the events that count.
    """
    told = list(events)
    standing = [e for e in told if e.get("reason", "") in refused and _stands(e, told)]
    if not standing:
        return ""
    message = one_line(str(max(standing, key=_time_of)["message"]))
    return message.removeprefix("(combined from similar events): ").removeprefix("Error creating: ")


def _stands(event: Read, told: Iterable[Read]) -> bool:
    """Whether a refusal still stands: no part of its kind was made after it."""
    made = _PARTS[event["reason"]]
    later = (e for e in told if e.get("reason") == made and _time_of(e) > _time_of(event))
    return next(later, None) is None and "already exists" not in event["message"]


def _time_of(event: Read) -> float:
    return objects.seconds(event.get("lastTimestamp") or event.get("eventTime")) or 0.0


def _current_run(pods: list[Read], gang: podread.Gang) -> list[Read]:
    """The pods of the newest start of a job.

    A queue may evict a job and start it again. Then the job and the names of its pods stay the
    same, and the pods are new.
    """
    run: list[Read] = []
    for pod in sorted(pods, key=podread.created_at):
        # A new run begins with a second pod of the same rank, made after all earlier ones ended.
        again = any(gang.node_rank(other) == gang.node_rank(pod) for other in run)
        if again and all(
            (podread.ended_at(other) or 0.0) <= podread.created_at(pod) for other in run
        ):
            run = []
        run.append(pod)
    return run


def stuck(
    live: Sequence[Read], now: float, deleting_since: Mapping[str, float] | None
) -> Reason | None:
    """Why a deleted pod still exists after its grace period: its node does not answer.

    `deleting_since` says, by UID, since when this process has known that a pod is being deleted.
    None means that our clock and the API server's agree.

    The deletion timestamp includes the grace period, and is by the API server's clock. If our clock
    is minutes ahead, a pod within its grace period would look stuck. So the grace period must also
    have passed by our own clock, from when we first saw the deletion.
    """
    for pod in live:
        meta, due = pod["metadata"], objects.seconds(pod["metadata"].get("deletionTimestamp"))
        if not podread.is_live(pod) or due is None or now <= due + STUCK_SECONDS:
            continue
        grace = meta.get("deletionGracePeriodSeconds") or 0
        waited = (
            deleting_since is None
            or now - deleting_since.get(objects.uid(pod), now) > grace + STUCK_SECONDS
        )
        # A restarted operator has not waited itself, but no two clocks are as far apart as this.
        if waited or now > due + STUCK_SECONDS + podread.CLOCKS_DIFFER:
            name, node = objects.name(pod), pod["spec"].get("nodeName", "unknown")
            message = (
                f"pod {name} should have ended at {meta['deletionTimestamp']}; node {node} does not"
                f" answer. If it is dead for certain: kubectl delete pod {name} -n"
                f" {meta['namespace']} --force --grace-period=0"
            )
            return Reason(Code.NODE_LOST, name, message, f"kubectl describe node {node}")
    return None


# -- how it ended ----------------------------------------------------------------------------------

# The cause of a failure outranks its consequences. When a rank dies, its peers die of an error, and
# torchrun stops or kills the remaining processes.
_PLAIN_ERROR = (FailureClass.ERROR,)
_CONSEQUENCES = (FailureClass.PREEMPTED, FailureClass.KILLED, FailureClass.UNKNOWN)

# Values of a pod's `status.reason`.
_LOST = ("NodeLost", "NodeShutdown", "Shutdown", "Terminated")
# By the reason of the condition DisruptionTarget.
_TAKEN = {
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
    """One thing that may have ended the attempt. The smallest weight counts, then the earliest."""

    # Seconds since the epoch.
    at: float
    # 0 for a cause, 1 for an error that may be a consequence, 2 for one that probably is.
    weight: int
    failure: FailureClass
    sentence: str
    word: LastWord | None = None


def _how_it_ended(
    run: Sequence[Read], job: JobState, gang: podread.Gang
) -> tuple[LastWord | None, podread.Failure | None]:
    """The last word that counts, or else a failure without one. Both are None while no pod has
    ended.
    """
    causes, first_word = [], None
    for pod in gang.in_order(run):
        word = podread.last_word(pod)
        if word is not None and word.result == "Succeeded":
            if gang.node_rank(pod) == 0:
                return word, None
            word = None  # only rank 0 may report success
        first_word = first_word or word
        causes += _causes(pod, word, gang)
    if not causes and job.finished == "Failed" and not _completed(run, gang):
        return None, (
            FailureClass.UNKNOWN,
            f"the job failed and its pods are gone ({job.message})",
        )
    if not causes:
        return None, None
    cause = min(causes, key=lambda cause: (cause.weight, cause.at))
    if cause.word is None and first_word is None:
        return None, (cause.failure, cause.sentence)
    # The pod may know the cause better than any last word. The first word still has the figures.
    word = cause.word or (
        first_word
        and first_word.model_copy(update={"failure": cause.failure, "message": cause.sentence})
    )
    return word, None


def _causes(pod: Read, word: LastWord | None, gang: podread.Gang) -> list[_Cause]:
    """Why this pod failed, as its last word, its node and the control plane say; empty if it did
    not fail.
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
    if (known := _by_platform(pod, gang)) is not None:
        causes.append(_Cause(at, 0, *known))
    if not causes and podread.has_failed(pod):
        causes.append(_Cause(at, 2, FailureClass.UNKNOWN, _unknown(pod)))
    return causes


def _bad_nodes(run: Sequence[Read]) -> dict[str, str]:
    """By node, a short name of its device's fault, as a trainer or the kubelet on it reports."""
    nodes = {}
    for pod in run:
        node, word = pod["spec"].get("nodeName"), podread.last_word(pod)
        if word is not None and word.failure is FailureClass.HARDWARE and word.node:
            fault = word.fault or FailureClass.HARDWARE
        elif _refused_device(pod):
            fault = pod["status"]["reason"]
        else:
            fault = _fault_at_start(pod)
        if node and fault:
            nodes[node] = fault
    return nodes


def _fault_at_start(pod: Read) -> str:
    """The name of the device error for which the main container could not be started, or empty."""
    return fault_at_start(_runtimes_words(pod)) if podread.never_ran(pod) else ""


def _runtimes_words(pod: Read) -> str:
    """What the container runtime says of the end of the main container."""
    return str((podread.state(pod, "terminated") or {}).get("message") or "")


def _refused_device(pod: Read) -> bool:
    """Whether the kubelet refused a scheduled pod, as its node has no healthy device for it."""
    said = pod["status"].get("message") or ""
    return pod["status"].get("reason") == "UnexpectedAdmissionError" and "healthy devices" in said


def _by_platform(pod: Read, gang: podread.Gang) -> podread.Failure | None:
    """Why the pod failed, as its node or the control plane says; None if they say nothing."""
    if podread.has_ended(pod) and not podread.has_failed(pod):
        return None
    causes = (
        _evicted(pod),
        _node_lost(pod),
        _no_device(pod),
        _taken_away(pod),
        _out_of_memory(pod),
        _not_started(pod),
        _init_failed(pod, gang.runner.init_container),
    )
    return next((cause for cause in causes if cause is not None), None)


# What the kubelet says of a pod that has used more disk than its own limits allow.
_OVER_ITS_DISK = re.compile(
    r"Container (?P<container>\S+) exceeded its local ephemeral storage limit"
    r"|Usage of EmptyDir volume \"(?P<volume>[^\"]*)\" exceeds the limit"
    r"|exceeds the total limit of containers"
)


def _evicted(pod: Read) -> podread.Failure | None:
    if pod["status"].get("reason") != "Evicted":
        return None
    said = podread.short(pod["status"].get("message"))
    if (over := _OVER_ITS_DISK.search(said)) is not None:
        advice = _more_disk(pod, over["container"], over["volume"])
        return FailureClass.VOLUME_FULL, f"{podread.where(pod)} was evicted: {said} {advice}"
    advice = ""
    if "ephemeral-storage" in said:
        advice = "; raise ephemeralStorage of the node pool, or free the node's disk"
    said = said or "no reason given"
    return FailureClass.PREEMPTED, f"{podread.where(pod)} was evicted by its node: {said}{advice}"


def _more_disk(pod: Read, container: str | None, volume: str | None) -> str:
    """What to raise after a container or an emptyDir volume has exceeded its limit."""
    if volume == SHARED_MEMORY:
        return "Raise shmSize of the node pool"
    if container not in (None, podread.main_container(pod)["name"]):
        return f"Raise the limit of container {container}, which the node pool does not set"
    return "Raise ephemeralStorage of the node pool"


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
    said = one_line(_runtimes_words(pod))
    if len(said) > podread.QUOTED:  # the cause comes last
        said = f"...{said[3 - podread.QUOTED :]}"
    if _fault_at_start(pod):
        return FailureClass.HARDWARE, f"{podread.where(pod)} got no device: {said}"
    if is_of_a_volume(_runtimes_words(pod)):
        return FailureClass.UNKNOWN, f"a volume of {podread.where(pod)} cannot be used: {said}"
    return FailureClass.IMAGE, f"the image of {podread.where(pod)} cannot be started: {said}"


def _init_failed(pod: Read, rendezvous: str) -> podread.Failure | None:
    """The failure of an init container. A sidecar's exit code says nothing of the work."""
    if podread.state(pod, "terminated") is not None:
        return None  # the main container has been started, so no init container had failed
    for init in pod["status"].get("initContainerStatuses") or []:
        code = (init.get("state", {}).get("terminated") or {}).get("exitCode", 0)
        if code == 0 or init["name"] in podread.sidecars(pod):
            continue
        failed = f"init container {init['name']} of {podread.where(pod)} failed with exit code"
        see = f"see: kubectl logs {objects.name(pod)} -c {init['name']} -n {_namespace(pod)}"
        if init["name"] == rendezvous:
            why = "rank 0's pod was not reachable in time"
            return FailureClass.INIT, f"{failed} {code}: {why}; {see}"
        return FailureClass.UNKNOWN, f"{failed} {code}; {see}"
    return None


def _unknown(pod: Read) -> str:
    name, namespace = objects.name(pod), _namespace(pod)
    terminated = podread.state(pod, "terminated")
    if terminated is None:
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


def _namespace(pod: Read) -> str:
    return str(pod["metadata"]["namespace"])
