"""Reading pods as the API server gives them: what runs, since when, how it ended, and what it
said.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ValidationError

from modelchain.api.contracts import LastWord
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import Read, annotation, seconds, true_condition
from modelchain_operator.runners.template import MAIN_CONTAINER

TERMINAL = ("Succeeded", "Failed")
NOT_STARTED = ("StartError", "ContainerCannotRun")
CLOCKS_DIFFER = 600.0  # seconds: a node's clock and ours, each five minutes wrong


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
    """When the main container started, on its node's clock; None if it has not, as far as anybody
    knows.
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
    clock says, or else is taken to be the creation. The answer does not move with `now`: every look
    would write it.
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
    """What is worth keeping of a pod that may be gone at the next look, small; None while it has
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
