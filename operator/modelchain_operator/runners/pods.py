"""Reading pods as the API server gives them: what runs, since when, how it ended, what it said, and
what it waits for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.reasons import Code, Reason
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import (
    Read,
    annotation,
    condition,
    is_deleting,
    seconds,
    true_condition,
    uid,
)
from modelchain_operator.api.objects import name as name_of
from modelchain_operator.runners.template import MAIN_CONTAINER

TERMINAL = ("Succeeded", "Failed")
NOT_STARTED = ("StartError", "ContainerCannotRun")
CLOCKS_DIFFER = 600.0  # seconds: a node's clock and ours, each five minutes wrong
STUCK_SECONDS = 60  # after a pod's grace is over
QUOTED = 240  # characters of a message that is quoted

Failure = tuple[FailureClass, str]  # the class, and a sentence


def is_live(pod: Read) -> bool:
    """Neither Succeeded nor Failed: it runs, or may; a pod that is being deleted still does."""
    return pod.get("status", {}).get("phase") not in TERMINAL


def is_running(pod: Read) -> bool:
    return is_live(pod) and state(pod, "running") is not None


def state(pod: Read, kind: Literal["waiting", "running", "terminated"]) -> Read | None:
    """The main container's state, if it is of that kind."""
    found = main_status(pod).get("state", {}).get(kind)
    return dict(found) if found is not None else None


def main_status(pod: Read) -> Read:
    """The container status of the container that our templates name; sidecars may have been
    added.
    """
    wanted = annotation(pod, MAIN_CONTAINER) or pod["spec"]["containers"][0]["name"]
    statuses = pod.get("status", {}).get("containerStatuses") or []
    return next((dict(status) for status in statuses if status["name"] == wanted), {})


def main_container(pod: Read) -> Read:
    containers = pod["spec"]["containers"]
    return next(
        (c for c in containers if c["name"] == annotation(pod, MAIN_CONTAINER)), containers[0]
    )


def disruption(pod: Read) -> Read | None:
    """The condition that says the platform ended the pod, not its work."""
    return true_condition(pod, "DisruptionTarget")


def created_at(pod: Read) -> float:
    return seconds(pod["metadata"].get("creationTimestamp")) or 0.0


def never_ran(pod: Read) -> bool:
    """The main container was tried and did not start: what its status then says of a start is no
    time.
    """
    return (state(pod, "terminated") or {}).get("reason") in NOT_STARTED


def started_at(pod: Read) -> float | None:
    """When the main container started, on its node's clock; None if it has not, as far as is
    known.
    """
    found = state(pod, "running") or state(pod, "terminated") or {}
    return None if never_ran(pod) else _time(found.get("startedAt"))


def ended_at(pod: Read) -> float | None:
    """When it ended; of a node that is lost, when that was noticed. None while it lives."""
    terminated = state(pod, "terminated")
    if terminated is not None and (finished := _time(terminated.get("finishedAt"))) is not None:
        return finished
    if is_live(pod):
        return None
    found = disruption(pod) or {}
    return seconds(found.get("lastTransitionTime")) or seconds(
        pod["metadata"].get("deletionTimestamp")
    )


def run_time(pod: Read, now: float) -> tuple[float, float | None] | None:
    """When the main container started and ended, in seconds since the epoch by our clock; None if
    it never ran.

    Its node's clock may be wrong. Between a start and an end of the same node it measures right all
    the same; a start before the pod's creation or after `now` is corrected by what the scheduler's
    clock says, or else is taken to be the creation. The answer does not move with `now`: every
    pass would write it.
    """
    started, finished, created = started_at(pod), ended_at(pod), created_at(pod)
    if started is None or (
        finished is not None and not 0 <= finished - started <= now - created + CLOCKS_DIFFER
    ):
        return None
    length = None if finished is None else finished - started
    if not created <= started <= now:
        started += _node_is_behind(pod)
    if not created <= started <= now:
        started = created
    return started, None if length is None else started + length


def _node_is_behind(pod: Read) -> float:
    """Seconds, from what the scheduler and the node give as the time the node took the pod; 0 if
    one says nothing.
    """
    scheduled = seconds((true_condition(pod, "PodScheduled") or {}).get("lastTransitionTime"))
    taken = seconds(pod["status"].get("startTime"))
    return 0.0 if scheduled is None or taken is None else scheduled - taken


def _time(text: str | None) -> float | None:
    """A kubelet may write 1970 for a time it does not know."""
    found = seconds(text)
    return found if found is not None and found > 0 else None


def where(pod: Read) -> str:
    """Its name and its node, for a sentence."""
    node = pod["spec"].get("nodeName")
    return f"pod {name_of(pod)}" + (f" on node {node}" if node else "")


def short(text: str | None) -> str:
    """A message of another program, as one line, cut to `QUOTED`."""
    line = " ".join((text or "").split())
    return line if len(line) <= QUOTED else f"{line[: QUOTED - 1]}…"


def gpus(pod: Read, resource: str) -> int:
    limits = main_container(pod).get("resources", {}).get("limits") or {}
    return int(limits.get(resource, 0))


def last_word(pod: Read) -> LastWord | None:
    """Its termination message, if the trainer wrote it: the container runtime leaves messages of
    its own there.
    """
    message = (state(pod, "terminated") or {}).get("message") or ""
    try:
        word = LastWord.model_validate_json(message)
    except ValidationError:
        return None
    return None if word.result == "Succeeded" and not word.manifest_digest else word


def remember(pod: Read) -> Object | None:
    """What is worth keeping of a pod that may be gone at the next pass, small; None while it has
    said nothing.

    Kept by UID from watch events: a pod deleted with its grace has its last word on that event
    alone.
    """
    if is_live(pod) and state(pod, "terminated") is None and disruption(pod) is None:
        return None
    meta, status = pod["metadata"], pod["status"]
    kept_meta = (
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "labels",
        "annotations",
    )
    kept_status = (
        "phase",
        "reason",
        "message",
        "conditions",
        "startTime",
        "containerStatuses",
        "initContainerStatuses",
    )
    containers: list[dict[str, Any]] = [
        {field: container[field] for field in ("name", "image", "resources") if field in container}
        for container in pod["spec"]["containers"]
    ]
    return {
        "metadata": {field: meta[field] for field in kept_meta if field in meta},
        "spec": {"containers": containers, "nodeName": pod["spec"].get("nodeName")},
        "status": {field: status[field] for field in kept_status if field in status},
    }


# What pods wait for.


@dataclass(frozen=True)
class Gang:
    """The pods an attempt should have. `nodes`: how many there are when all is well. `node_rank`:
    the runner's. `gpu_resource`: the name of the GPUs they ask for.
    """

    nodes: int
    node_rank: Callable[[Read], int | None]
    gpu_resource: str = "nvidia.com/gpu"

    def in_order(self, pods: Iterable[Read]) -> list[Read]:
        """By node rank."""
        return sorted(pods, key=lambda pod: self.node_rank(pod) or 0)


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


def why_waiting(live: Sequence[Read], gang: Gang) -> tuple[Reason | None, Failure | None]:
    """Why the pods do not run, and the failure if waiting longer cannot help."""
    waits = [wait for pod in gang.in_order(live) if (wait := _wait_of(pod)) is not None]
    there = [pod for pod in live if is_live(pod)]
    if not waits:
        return _incomplete(there, len(live), gang), None
    wait = min(waits, key=lambda wait: wait.weight)
    reason = wait.reason
    if gang.nodes > 1:
        running = sum(is_running(pod) for pod in there)
        reason = reason.with_message(f"{running} of {gang.nodes} pods run, {reason.message}")
    return reason, (wait.permanent, reason.text) if wait.permanent else None


def _incomplete(there: Sequence[Read], known: int, gang: Gang) -> Reason | None:
    """No pod waits, but pods are still ending or still to come."""
    if going := next((pod for pod in there if is_deleting(pod)), None):
        message = f"waits until {where(going)}, which is being deleted, has ended"
        return Reason(Code.PODS_ENDING, name_of(going), message)
    if there and len(there) == known < gang.nodes:
        message = f"{len(there)} of {gang.nodes} pods are there; the others are still to be created"
        return Reason(Code.PODS_MISSING, name_of(there[0]), message)
    return None


def _wait_of(pod: Read) -> _Wait | None:
    """What a pod waits for that has not started; None for any other."""
    if not is_live(pod) or started_at(pod) is not None or is_deleting(pod):
        return None
    scheduled = condition(pod, "PodScheduled")
    if scheduled is not None and scheduled["status"] == "False":
        return _scheduler_wait(pod, scheduled)
    inits = pod["status"].get("initContainerStatuses") or []
    for status in [*inits, *(pod["status"].get("containerStatuses") or [])]:
        now = status.get("state", {})
        waiting = now.get("waiting")
        if waiting is not None and waiting.get("reason") != "PodInitializing":
            return _container_wait(pod, status, waiting)
        if status in inits and now.get("running") is not None:
            runs = f"init container {status['name']} runs until rank 0's pod can be reached"
            return _Wait(5, _of_pod(Code.INIT, pod, runs))
    return _Wait(6, _of_pod(Code.STARTING, pod, "not yet looked at by a node or the scheduler"))


def _of_pod(code: Code, pod: Read, text: str, *, see: bool = False) -> Reason:
    """Why a pod waits. `see`: the sentence ends with the command that shows the pod."""
    shown: Literal["", "see"] = "see" if see else ""
    bare = code not in (Code.UNSCHEDULABLE, Code.SCHEDULING_GATED)
    return Reason(code, name_of(pod), f"{name_of(pod)} waits: {text}", _describe(pod), shown, bare)


def _scheduler_wait(pod: Read, scheduled: Read) -> _Wait:
    said = short(scheduled.get("message")) or "no node was found yet"
    if scheduled.get("reason") == "SchedulingGated":
        return _Wait(3, _of_pod(Code.SCHEDULING_GATED, pod, f"held by a scheduling gate ({said})"))
    # The scheduler goes on to say why preemption does not help either, which is as long again.
    said = re.split(r"\.? (?:no new claims to deallocate, )?preemption: ", said)[0]
    said = said.removesuffix(". not found")  # said twice where a claim is missing
    why = scheduled.get("reason", "Unschedulable")
    if why != "Unschedulable":  # the scheduler's own error, which is no lack of nodes
        return _Wait(2, _of_pod(Code.STARTING, pod, f"{why}: {said}", see=True))
    return _Wait(2, _of_pod(Code.UNSCHEDULABLE, pod, said, see=True))


def _container_wait(pod: Read, status: Read, waiting: Read) -> _Wait:
    # The kubelet tells the same failure in turn as ErrImagePull and as ImagePullBackOff with a
    # preface.
    said = short(str(waiting.get("message") or "").rsplit("ErrImagePull: ", 1)[-1])
    reason, image = waiting.get("reason", ""), status.get("image", "")
    more = said or f"see: {_describe(pod)}"
    if reason == "InvalidImageName":
        return _bad_image(pod, f"{image} is no image name; correct runner.image")
    if reason in _PULL or reason == "ErrImageNeverPull":
        if any(text in said.lower() for text in _NO_SUCH_IMAGE):
            return _bad_image(pod, f"there is no image {image}; correct runner.image ({said})")
        return _Wait(1, _of_pod(Code.IMAGE, pod, f"image {image} cannot be pulled: {more}"))
    if reason == "CreateContainerConfigError" and any(text in said for text in _NEVER_AS_ROOT):
        return _bad_image(pod, f"the image's user is root; set runAsUser of the node pool ({said})")
    if reason in ("", "ContainerCreating"):
        does = "its node pulls the image and mounts volumes; if for long, see: "
        return _Wait(4, _of_pod(Code.STARTING, pod, does + _describe(pod)))
    return _Wait(1, _of_pod(Code.STARTING, pod, f"{reason}: {more}"))


def _bad_image(pod: Read, text: str) -> _Wait:
    return _Wait(0, _of_pod(Code.IMAGE, pod, text), FailureClass.IMAGE)


def _describe(pod: Read) -> str:
    return f"kubectl describe pod {name_of(pod)} -n {pod['metadata']['namespace']}"


def stuck(live: Sequence[Read], now: float, going: Mapping[str, float] | None) -> Reason | None:
    """A pod that outstays its grace: its node does not answer. The deletion's timestamp has the
    grace in it.

    That is the API server's clock, and ours may be minutes ahead of it: then a pod within its grace
    would be called stuck. So its grace must have passed by our own clock, too, since we first saw
    it go.
    """
    for pod in live:
        meta, due = pod["metadata"], seconds(pod["metadata"].get("deletionTimestamp"))
        if not is_live(pod) or due is None or now <= due + STUCK_SECONDS:
            continue
        grace = meta.get("deletionGracePeriodSeconds") or 0
        waited = going is None or now - going.get(uid(pod), now) > grace + STUCK_SECONDS
        if waited or now > due + STUCK_SECONDS + CLOCKS_DIFFER:
            name, node = name_of(pod), pod["spec"].get("nodeName", "unknown")
            message = (
                f"pod {name} should have ended at {meta['deletionTimestamp']}; node {node} does not"
                f" answer. If it is dead for certain: kubectl delete pod {name} -n"
                f" {meta['namespace']} --force --grace-period=0"
            )
            return Reason(Code.NODE_LOST, name, message, f"kubectl describe node {node}")
    return None
