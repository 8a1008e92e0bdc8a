"""All that the operator knows of Kueue.

The first half keeps a job from running until its release, and puts it into a queue. The second half
finds why Kueue does not let a job run. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from modelchain.api.reasons import Code
from modelchain.plan.pools import NodePool
from modelchain_operator.api.kube import Object, Resource
from modelchain_operator.api.objects import Read, annotation, condition, label, true_condition

GROUP = "kueue.x-k8s.io"
QUEUE, PRIORITY_CLASS = f"{GROUP}/queue-name", f"{GROUP}/priority-class"
REQUIRED_TOPOLOGY = f"{GROUP}/podset-required-topology"
PREFERRED_TOPOLOGY = f"{GROUP}/podset-preferred-topology"
# A queue that does not exist. A job is in it until its release, so that Kueue cannot start the job
# before, and Kueue's webhook does not put it into another queue.
UNRELEASED_QUEUE = "modelchain-held"
# The annotation with the time of a job's release. Only a job that has it is released.
RELEASED = "modelchain.dev/released"
# Kueue's webhook puts a job that names no queue into the LocalQueue of this name, if it exists.
DEFAULT_QUEUE = "default"
VERSIONS = ("v1beta2", "v1beta1")
LOCAL_QUEUES = tuple(Resource(GROUP, version, "localqueues") for version in VERSIONS)
WORKLOADS = tuple(Resource(GROUP, version, "workloads") for version in VERSIONS)


# -- a job and its queue ---------------------------------------------------------------------------


def labels(priority_class: str | None) -> dict[str, str]:
    """The labels of a job that is not released yet."""
    priority = {PRIORITY_CLASS: priority_class} if priority_class else {}
    return {QUEUE: UNRELEASED_QUEUE} | priority


def topology(pool: NodePool) -> dict[str, str]:
    """The annotations of a pod template that keep the pods of a job near one another."""
    if pool.topology is None:
        return {}
    if pool.topology.required is not None:
        return {REQUIRED_TOPOLOGY: pool.topology.required}
    assert pool.topology.preferred is not None
    return {PREFERRED_TOPOLOGY: pool.topology.preferred}


def queue_of(job: Read) -> str | None:
    """The LocalQueue of a job; None for one that is in none, or is not released yet."""
    queue = label(job, QUEUE)
    return queue if queue not in ("", UNRELEASED_QUEUE) else None


def is_released(job: Read) -> bool:
    return annotation(job, RELEASED) is not None


def release(
    job: Read, queue: str | None, now: str, *, suspended: bool, unsuspend: Object
) -> Object:
    """The next merge patch that is needed to let a job run, as `Runner.release` describes it.

    Args:
        job: as it was just read.
        queue: the LocalQueue to put it into; None for none.
        now: the time of the release (RFC 3339).
        suspended: whether the job is suspended.
        unsuspend: the patch of the job's spec that lifts the suspension.
    """
    # A UID or resourceVersion that is not the job's makes the API server refuse the patch.
    meta: Object = {name: job["metadata"][name] for name in ("uid", "resourceVersion")}
    released = meta | {"annotations": {RELEASED: now}}
    if not suspended:
        # Another client lifted the suspension. The job is ours all the same, and the queue of a
        # job that is not suspended can no longer be changed.
        return {"metadata": released}
    if queue is not None:
        return {"metadata": released | {"labels": {QUEUE: queue}}}  # Kueue lifts the suspension
    # Without a queue the first patch removes the label, and the second lifts the suspension.
    if label(job, QUEUE):
        return {"metadata": meta | {"labels": {QUEUE: None}}}
    return {"metadata": released, "spec": unsuspend}


# -- why a job waits in its queue ------------------------------------------------------------------


@dataclass(frozen=True)
class KueueQueue:
    """The queue of one chain, as it was read."""

    name: str
    # Whether Kueue is installed.
    installed: bool = False
    # The LocalQueue; None if it does not exist.
    local: Object | None = None
    # All Workloads of its namespace.
    workloads: Sequence[Object] = ()


class Wait(NamedTuple):
    """Why a job waits in its queue."""

    reason: Code
    cause: str
    # The command to type next.
    next: str
    # What was found: an object, its message, and the time (RFC 3339) or None.
    lines: Sequence[tuple[str, str, str | None]] = ()


def why_queued(
    queue: KueueQueue, job: Read, framework: str, namespace: str, *, hidden: bool
) -> Wait:
    """Why Kueue does not let a job run, as its Workload and LocalQueue say.

    Args:
        queue: the job's queue.
        job: as it was read.
        framework: Kueue's name of the job's kind.
        namespace: of the job, for commands.
        hidden: the user may not read Workloads.
    """
    if (wait := _queue_missing(queue, job, namespace)) is not None:
        return wait
    if (wait := _inactive(queue, namespace)) is not None:
        return wait
    owners = ((w, w["metadata"].get("ownerReferences") or []) for w in queue.workloads)
    mine = [w for w, owns in owners if any(o["uid"] == job["metadata"]["uid"] for o in owns)]
    if mine:
        return _of_workload(mine[-1], namespace)
    if hidden:
        cause = "its Workload cannot be read with your rights"
        return Wait(Code.QUEUED, cause, f"kubectl get workloads -n {namespace}")
    return Wait(
        Code.NO_WORKLOAD,
        f"Kueue has made no Workload for {job['metadata']['name']}; {framework} may be off in its"
        " integrations.frameworks",
        "kubectl get configmap kueue-manager-config -n kueue-system -o yaml",
    )


def _queue_missing(queue: KueueQueue, job: Read, namespace: str) -> Wait | None:
    if not queue.installed:
        cause = (
            f"queue {queue.name} is Kueue's, and Kueue is not installed, so nothing will ever admit"
            f" {job['metadata']['name']}"
        )
        return Wait(Code.KUEUE_MISSING, cause, f"kubectl get crd localqueues.{GROUP}")
    if queue.local is None:
        cause = f"there is no LocalQueue {queue.name} in namespace {namespace}"
        return Wait(Code.LOCAL_QUEUE_MISSING, cause, f"kubectl get localqueues -n {namespace}")
    return None


def _inactive(queue: KueueQueue, namespace: str) -> Wait | None:
    active = condition(queue.local, "Active") if queue.local is not None else None
    if active is None or active["status"] != "False":
        return None
    said = f"Active is False ({active.get('reason')})"
    return Wait(
        Code.QUEUE_INACTIVE,
        f"LocalQueue {queue.name} takes nothing in: {active.get('message')}",
        f"kubectl describe localqueue {queue.name} -n {namespace}",
        [(f"localqueue/{queue.name}", said, active["lastTransitionTime"])],
    )


def _of_workload(work: Read, namespace: str) -> Wait:
    name = work["metadata"]["name"]
    lines = [
        (
            f"workload/{name}",
            f"{kind} is {c['status']}: {c.get('message')}",
            c["lastTransitionTime"],
        )
        for kind in ("QuotaReserved", "Admitted", "Evicted", "Requeued")
        if (c := condition(work, kind)) is not None
    ]
    return Wait(
        Code.QUEUED,
        _why_not_admitted(work),
        f"kubectl describe workload {name} -n {namespace}",
        lines,
    )


def _why_not_admitted(work: Read) -> str:
    if true_condition(work, "QuotaReserved"):
        return "its quota is reserved, and admission checks are still to pass"
    if (evicted := true_condition(work, "Evicted")) is not None:
        why, message = evicted.get("reason"), evicted.get("message")
        return f"it was evicted ({why}) and waits for its turn again: {message}"
    if (quota := condition(work, "QuotaReserved")) is not None:
        return f"{quota.get('message')}; Kueue does not show its place in the queue"
    return "it waits for its turn; Kueue does not show its place in the queue"
