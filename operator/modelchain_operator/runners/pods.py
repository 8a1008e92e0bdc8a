"""Reads pods as the API server returns them.

The first half answers when a pod started and how it ended, the second half what it waits for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.messages import one_line, shortened
from modelchain.api.reasons import Code, Reason
from modelchain.io.lastword import read_last_word
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import (
    Read,
    annotation,
    condition,
    is_deleting,
    seconds,
    true_condition,
)
from modelchain_operator.api.objects import name as name_of
from modelchain_operator.runners.port import Runner
from modelchain_operator.runners.template import MAIN_CONTAINER

TERMINAL = ("Succeeded", "Failed")
NOT_STARTED = ("StartError", "ContainerCannotRun")
# How far a node's clock and ours may be apart, in seconds: each may be wrong by five minutes.
CLOCKS_DIFFER = 600.0
# The most characters that are quoted of another program's message.
QUOTED = 240

# The class, and a sentence that explains it.
Failure = tuple[FailureClass, str]


def is_live(pod: Read) -> bool:
    """Whether the pod runs or may still run. A pod that is being deleted counts as live."""
    return pod.get("status", {}).get("phase") not in TERMINAL


def is_running(pod: Read) -> bool:
    return is_live(pod) and state(pod, "running") is not None


def has_ended(pod: Read) -> bool:
    """Whether the main container has ended, or will never run. A sidecar may still run."""
    return state(pod, "terminated") is not None or not is_live(pod)


def has_failed(pod: Read) -> bool:
    """Whether the main container failed, or the pod did before it ran.

    What becomes of a sidecar is no failure, though the pod's phase may be Failed for it.
    """
    terminated = state(pod, "terminated")
    if terminated is None:
        return bool(pod.get("status", {}).get("phase") == "Failed")
    return int(terminated.get("exitCode", 0)) != 0


def state(pod: Read, kind: Literal["waiting", "running", "terminated"]) -> Read | None:
    """The main container's state if it is of this kind, else None."""
    found = main_status(pod).get("state", {}).get(kind)
    return dict(found) if found is not None else None


def main_status(pod: Read) -> Read:
    """The status of the main container: webhooks may have added sidecars.

    Our template names it in an annotation. Without one, the first container is taken.
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
    """The condition that Kubernetes sets when it ends a pod itself, for example to drain a node."""
    return true_condition(pod, "DisruptionTarget")


def created_at(pod: Read) -> float:
    return seconds(pod["metadata"].get("creationTimestamp")) or 0.0


def never_ran(pod: Read) -> bool:
    """Whether the runtime tried to start the main container and could not.

    The kubelet writes a `startedAt` for it all the same, which must not be believed.
    """
    return (state(pod, "terminated") or {}).get("reason") in NOT_STARTED


def started_at(pod: Read) -> float | None:
    """When the main container started, by its node's clock. None if no start is known."""
    found = state(pod, "running") or state(pod, "terminated") or {}
    return None if never_ran(pod) else _time(found.get("startedAt"))


def ended_at(pod: Read) -> float | None:
    """When the pod ended; for a lost node, when Kubernetes noticed it. None for a live pod."""
    terminated = state(pod, "terminated")
    if terminated is not None and (finished := _time(terminated.get("finishedAt"))) is not None:
        return finished
    if is_live(pod):
        return None
    found = disruption(pod) or {}
    return seconds(found.get("lastTransitionTime")) or seconds(
        pod["metadata"].get("deletionTimestamp")
    )


class Times(NamedTuple):
    """When a pod held its GPUs, in seconds since the epoch by our clock."""

    # When it was bound to its node. None if only its container's start is known.
    scheduled: float | None
    # When its main container started; None before, or if it never ran.
    started: float | None
    # None while it may still run.
    finished: float | None


def times(pod: Read, now: float) -> Times | None:
    """When a pod held its GPUs; None if it never did.

    It holds them from the moment at which it is bound to its node, while images are pulled and
    volumes are mounted. The result must not depend on `now`, or every pass would write it.
    """
    bound = true_condition(pod, "PodScheduled") or {}
    scheduled = seconds(bound.get("lastTransitionTime"))
    if (ran := run_time(pod, now)) is not None:
        return Times(scheduled, *ran)
    if scheduled is None:
        return None
    if not has_ended(pod):
        return Times(scheduled, None, None)
    finished = ended_at(pod) or scheduled
    believed = scheduled <= finished <= now + CLOCKS_DIFFER
    return Times(scheduled, None, finished if believed else scheduled)


def run_time(pod: Read, now: float) -> tuple[float, float | None] | None:
    """When the main container started and ended, in seconds since the epoch by our clock.

    None if it never ran, or if its times cannot be true. The end is None while it runs.

    The node's clock may be wrong, but the time between two of its readings is right. So the length
    is taken from the node, and only the start is corrected: first by the scheduler's clock, and if
    that gives no possible time either, to the pod's creation. The result must not depend on `now`,
    or every pass would see a change and write it.
    """
    started = started_at(pod)
    finished = ended_at(pod)
    created = created_at(pod)
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
    """By how many seconds the node's clock is behind the scheduler's; 0 if that is not known.

    Both note the time of the same moment: the scheduler when it binds the pod to the node, the node
    when it accepts the pod.
    """
    scheduled = seconds((true_condition(pod, "PodScheduled") or {}).get("lastTransitionTime"))
    taken = seconds(pod["status"].get("startTime"))
    return 0.0 if scheduled is None or taken is None else scheduled - taken


def _time(text: str | None) -> float | None:
    """The time, or None where a kubelet did not know it and wrote 1970."""
    found = seconds(text)
    return found if found is not None and found > 0 else None


def where(pod: Read) -> str:
    """The pod's name and node, as a part of a sentence."""
    node = pod["spec"].get("nodeName")
    return f"pod {name_of(pod)}" + (f" on node {node}" if node else "")


def short(text: str | None) -> str:
    """A message of another program, as one line, cut to `QUOTED`.

    Its end is kept, because most programs put the cause of an error last.
    """
    return shortened(one_line(text or ""), QUOTED)


def gpus(pod: Read, resource: str) -> int:
    limits = main_container(pod).get("resources", {}).get("limits") or {}
    return int(limits.get(resource, 0))


def last_word(pod: Read) -> LastWord | None:
    """The pod's termination message, if the trainer wrote it.

    The container runtime writes messages of its own to the same place. A success without a
    manifest's digest is not believed, since only a hash is evidence of success.
    """
    word = read_last_word((state(pod, "terminated") or {}).get("message") or "")
    if word is None or (word.result == "Succeeded" and not word.manifest_digest):
        return None
    return word


def remember(pod: Read) -> Object | None:
    """The parts of an ended pod that tell how it ended; None while it still runs undisturbed.

    They are kept because the pod may be gone at the next pass. If it was deleted, the watch event
    of its end is the only place where its last word can be read.
    """
    if is_live(pod) and state(pod, "terminated") is None and disruption(pod) is None:
        return None
    spec = {
        kind: [_only(container, _KEPT["container"]) for container in pod["spec"].get(kind) or []]
        for kind in ("containers", "initContainers")
    }
    return {
        "metadata": _only(pod["metadata"], _KEPT["metadata"]),
        "spec": {**spec, "nodeName": pod["spec"].get("nodeName")},
        "status": _only(pod["status"], _KEPT["status"]),
    }


# The fields of a pod that are remembered.
_KEPT = {
    "metadata": (
        "name",
        "namespace",
        "uid",
        "ownerReferences",
        "creationTimestamp",
        "deletionTimestamp",
        "labels",
        "annotations",
    ),
    "container": ("name", "image", "resources", "restartPolicy"),
    "status": (
        "phase",
        "reason",
        "message",
        "conditions",
        "startTime",
        "containerStatuses",
        "initContainerStatuses",
    ),
}


def _only(thing: Read, fields: Iterable[str]) -> dict[str, Any]:
    return {field: thing[field] for field in fields if field in thing}


# -- what pods wait for ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Gang:
    """The pods that an attempt should have."""

    # How many: one for each node.
    nodes: int
    # The runner of the attempt's job.
    runner: Runner
    # The resource name of the GPUs that the pods ask for.
    gpu_resource: str = "nvidia.com/gpu"

    def node_rank(self, pod: Read) -> int | None:
        return self.runner.node_rank(pod)

    def in_order(self, pods: Iterable[Read]) -> list[Read]:
        """The pods, sorted by node rank."""
        return sorted(pods, key=lambda pod: self.node_rank(pod) or 0)


_PULL = (
    "ErrImagePull",
    "ErrImageNeverPull",
    "ImagePullBackOff",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
)
# What containerd, CRI-O and registries answer. No image can have such a name.
_NO_SUCH_IMAGE = re.compile(r"code = NotFound|manifest unknown|: not found$")
_NEVER_AS_ROOT = ("runAsNonRoot", "non-numeric user")


@dataclass(frozen=True)
class _Wait:
    # The wait with the lowest weight is shown: it explains most.
    weight: int
    reason: Reason
    # Set if waiting longer cannot help: how the attempt then fails.
    permanent: FailureClass | None = None


def why_waiting(live: Sequence[Read], gang: Gang) -> tuple[Reason | None, Failure | None]:
    """Why the pods do not run, and the failure if waiting longer cannot help."""
    waits = [wait for pod in gang.in_order(live) if (wait := _wait_of(pod, gang)) is not None]
    unfinished = [pod for pod in live if is_live(pod)]
    if not waits:
        return _incomplete(unfinished, len(live), gang), None
    wait = min(waits, key=lambda wait: wait.weight)
    reason = wait.reason
    if gang.nodes > 1:
        # One waiting pod keeps the whole gang from training, so its reason stands for all.
        running = sum(is_running(pod) for pod in unfinished)
        reason = reason.with_message(f"{running} of {gang.nodes} pods run, {reason.message}")
    return reason, (wait.permanent, reason.text) if wait.permanent else None


def _incomplete(unfinished: Sequence[Read], known: int, gang: Gang) -> Reason | None:
    """Why a gang without a waiting pod is not complete: a pod is being deleted, or is missing.

    `known` also counts the pods that have ended. If one has, no pod is missing: the attempt ends.
    """
    if going := next((pod for pod in unfinished if is_deleting(pod)), None):
        message = f"waits until {where(going)}, which is being deleted, has ended"
        return Reason(Code.PODS_ENDING, name_of(going), message)
    count = len(unfinished)
    if unfinished and count == known < gang.nodes:
        message = f"{count} of {gang.nodes} pods are there; the others are still to be created"
        return Reason(Code.PODS_MISSING, name_of(unfinished[0]), message)
    return None


def _wait_of(pod: Read, gang: Gang) -> _Wait | None:
    """What a pod waits for before it starts. None if it has started, ended or is being deleted."""
    if has_ended(pod) or started_at(pod) is not None or is_deleting(pod):
        return None
    scheduled = condition(pod, "PodScheduled")
    if scheduled is not None and scheduled["status"] == "False":
        return _scheduler_wait(pod, scheduled)
    if waits := [*_init_waits(pod, gang), *_container_waits(pod)]:
        return min(waits, key=lambda wait: wait.weight)
    if pod["status"].get("containerStatuses"):
        return _being_started(pod)
    text = "neither the scheduler nor a node has taken it up yet"
    return _Wait(6, _of_pod(Code.STARTING, pod, text))


def _init_waits(pod: Read, gang: Gang) -> Iterator[_Wait]:
    """The init container that runs. Sidecars among them run for as long as the pod does."""
    for status in pod["status"].get("initContainerStatuses") or []:
        name = status["name"]
        if status.get("state", {}).get("running") is None or name in sidecars(pod):
            continue
        if name == gang.runner.init_container:
            text = f"init container {name} runs until rank 0's pod can be reached"
            yield _Wait(5, _of_pod(Code.INIT, pod, text))
        else:
            yield _Wait(5, _of_pod(Code.STARTING, pod, f"init container {name} runs"))


def sidecars(pod: Read) -> set[str]:
    """The init containers that are sidecars: they are started first and run until the pod ends."""
    inits = pod["spec"].get("initContainers") or []
    return {init["name"] for init in inits if init.get("restartPolicy") == "Always"}


def _container_waits(pod: Read) -> Iterator[_Wait]:
    status = pod["status"]
    for kind in ("initContainerStatuses", "containerStatuses"):
        for container in status.get(kind) or []:
            waiting = container.get("state", {}).get("waiting")
            if waiting is not None and waiting.get("reason") != "PodInitializing":
                yield _container_wait(pod, container, waiting)


def _of_pod(code: Code, pod: Read, text: str, *, see: bool = False) -> Reason:
    """Why a pod waits. `see`: the sentence ends with the command that shows the pod."""
    shown: Literal["", "see"] = "see" if see else ""
    bare = code not in (Code.UNSCHEDULABLE, Code.SCHEDULING_GATED)
    return Reason(code, name_of(pod), f"{name_of(pod)} waits: {text}", _describe(pod), shown, bare)


def _scheduler_wait(pod: Read, scheduled: Read) -> _Wait:
    message = short(scheduled.get("message")) or "no node was found yet"
    if scheduled.get("reason") == "SchedulingGated":
        text = f"held by a scheduling gate ({message})"
        return _Wait(3, _of_pod(Code.SCHEDULING_GATED, pod, text))
    # The scheduler adds why preemption would not help. That is as long again and tells no more.
    message = re.split(r"\.? (?:no new claims to deallocate, )?preemption: ", message)[0]
    # Where a claim is missing, the scheduler writes "not found" twice.
    message = message.removesuffix(". not found")
    why = scheduled.get("reason", "Unschedulable")
    if why != "Unschedulable":  # the scheduler itself failed; this does not mean a lack of nodes
        return _Wait(2, _of_pod(Code.STARTING, pod, f"{why}: {message}", see=True))
    return _Wait(2, _of_pod(Code.UNSCHEDULABLE, pod, message, see=True))


def _container_wait(pod: Read, status: Read, waiting: Read) -> _Wait:
    # The kubelet reports one failed pull alternately as ErrImagePull and as ImagePullBackOff, whose
    # message quotes the first. We cut the quote out, or the reason would change at every poll.
    message = short(str(waiting.get("message") or "").rsplit("ErrImagePull: ", 1)[-1])
    reason = waiting.get("reason", "")
    if reason in ("", "ContainerCreating"):
        return _being_started(pod)
    if status["name"] != main_container(pod)["name"]:
        return _other_wait(pod, status, reason, message)
    if reason == "InvalidImageName" or reason in _PULL:
        return _image_wait(pod, status.get("image", ""), reason, message)
    if reason == "CreateContainerConfigError" and any(text in message for text in _NEVER_AS_ROOT):
        text = f"the image's user is root; set runAsUser of the node pool ({message})"
        return _bad_image(pod, text)
    return _Wait(1, _of_pod(Code.STARTING, pod, f"{reason}: {message or _see(pod)}"))


def _other_wait(pod: Read, status: Read, reason: str, message: str) -> _Wait:
    """The wait of a container that is not ours: a webhook or the job's controller has added it."""
    name, more = status["name"], message or _see(pod)
    if reason == "InvalidImageName" or reason in _PULL:
        text = f"image {status.get('image', '')} of container {name} cannot be pulled: {more}"
        return _Wait(1, _of_pod(Code.IMAGE, pod, text))
    return _Wait(1, _of_pod(Code.STARTING, pod, f"container {name}: {reason}: {more}"))


def _image_wait(pod: Read, image: str, reason: str, message: str) -> _Wait:
    if reason == "InvalidImageName":
        return _bad_image(pod, f"{image} is no image name; correct runner.image")
    if _NO_SUCH_IMAGE.search(message):
        return _bad_image(pod, f"there is no image {image}; correct runner.image ({message})")
    text = f"image {image} cannot be pulled: {message or _see(pod)}"
    return _Wait(1, _of_pod(Code.IMAGE, pod, text))


def _bad_image(pod: Read, text: str) -> _Wait:
    return _Wait(0, _of_pod(Code.IMAGE, pod, text), FailureClass.IMAGE)


def _being_started(pod: Read) -> _Wait:
    does = "its node pulls the image and mounts volumes; if for long, "
    return _Wait(4, _of_pod(Code.STARTING, pod, does + _see(pod)))


def _see(pod: Read) -> str:
    return f"see: {_describe(pod)}"


def _describe(pod: Read) -> str:
    return f"kubectl describe pod {name_of(pod)} -n {pod['metadata']['namespace']}"
