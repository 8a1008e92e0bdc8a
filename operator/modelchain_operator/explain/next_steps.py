"""For `explain`: what a queue, pods or a stall wait for, and the command that shows or mends it.
Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import condition, held
from modelchain_operator.explain.read import KUEUE, Queue
from modelchain_operator.reconcile.attempt import GONE
from modelchain_operator.reconcile.pod_evidence import evidence
from modelchain_operator.runners.pytorchjob import PyTorchJob

# Reasons of stages that have not failed, and that a retry mends.
RETRY_HELPS = ("VerifyUnanswered", "SuspendedByAnother", "SameDeviceError", "NodesAvoided")


class Wait(NamedTuple):
    """`lines`: (object, message, RFC 3339 time or None)."""

    reason: str
    cause: str
    next: str
    lines: Sequence[tuple[str, str, str | None]] = ()


def in_queue(queue: Queue, job: Object, namespace: str, unreadable: Sequence[str]) -> Wait:
    """Why Kueue does not let a job run, as its Workload and LocalQueue say."""
    name = job["metadata"]["name"]
    queues = f"kubectl get localqueues -n {namespace}"
    if not queue.installed:
        cause = (
            f"queue {queue.name} is Kueue's, and Kueue is not installed, so nothing will ever admit"
            f" {name}"
        )
        return Wait("KueueMissing", cause, f"kubectl get crd localqueues.{KUEUE}")
    if queue.local is None:
        return Wait(
            "LocalQueueMissing",
            f"there is no LocalQueue {queue.name} in namespace {namespace}",
            queues,
        )
    active = condition(queue.local, "Active")
    if active and active["status"] == "False":
        cause = f"LocalQueue {queue.name} takes nothing in: {active.get('message')}"
        line = (
            f"localqueue/{queue.name}",
            f"Active is False ({active.get('reason')})",
            active["lastTransitionTime"],
        )
        return Wait(
            "QueueInactive",
            cause,
            f"kubectl describe localqueue {queue.name} -n {namespace}",
            [line],
        )
    mine = [
        w for w in queue.workloads if any(o["uid"] == job["metadata"]["uid"] for o in _owners(w))
    ]
    if not mine and "workloads" in unreadable:
        return Wait(
            "Queued",
            "its Workload cannot be seen with your rights",
            f"kubectl get workloads -n {namespace}",
        )
    if not mine:
        cause = (
            f"Kueue has made no Workload for {name}; kubeflow.org/pytorchjob may be off in its"
            " integrations.frameworks"
        )
        return Wait(
            "NoWorkload",
            cause,
            "kubectl get configmap kueue-manager-config -n kueue-system -o yaml",
        )
    work = mine[-1]
    lines = [
        (
            f"workload/{work['metadata']['name']}",
            f"{kind} is {c['status']}: {c.get('message')}",
            c["lastTransitionTime"],
        )
        for kind in ("QuotaReserved", "Admitted", "Evicted", "Requeued")
        if (c := condition(work, kind)) is not None
    ]
    quota, evicted = condition(work, "QuotaReserved"), held(work, "Evicted")
    cause = "it waits for its turn; its place in the queue is not told"
    if held(work, "QuotaReserved"):
        cause = "its quota is reserved, and admission checks are still to pass"
    elif evicted:
        cause = (
            f"it was evicted ({evicted.get('reason')}) and waits for its turn again:"
            f" {evicted.get('message')}"
        )
    elif quota:
        cause = f"{quota.get('message')}; its place in the queue is not told"
    return Wait(
        "Queued",
        cause,
        f"kubectl describe workload {work['metadata']['name']} -n {namespace}",
        lines,
    )


def of_pods(pods: Sequence[Object], job: Object | None, nodes: int) -> str:
    """The sentence the operator itself would say of these pods; empty if there is nothing to
    say.
    """
    runner = PyTorchJob()
    state = runner.state(job) if job is not None else GONE
    return evidence(
        pods,
        (),
        job=state,
        nodes=nodes,
        node_rank=runner.node_rank,
        gpu_resource="nvidia.com/gpu",
        now=0.0,
    ).waiting


_KINDS = (
    ("Unschedulable", "Unschedulable", "for a node"),
    ("scheduling gate", "SchedulingGated", "behind a scheduling gate"),
    ("image", "Image", "for its image"),
    ("init container", "Init", "for rank 0's pod"),
)


def kind_of(cause: str) -> tuple[str, str]:
    """A reason constant, and what is waited for, for a sentence of `of_pods`."""
    told = cause if "mounts volumes" not in cause else ""
    return next(
        ((reason, what) for text, reason, what in _KINDS if text in told),
        ("Starting", "for its pods to start"),
    )


def after_refusal(message: str, namespace: str) -> str:
    """What to look at when the API server takes no pod; empty where only the job can tell."""
    if "exceeded quota" in message:
        return f"kubectl describe resourcequota -n {namespace}"
    if "PodSecurity" in message:
        return f"kubectl get namespace {namespace} --show-labels"
    if "maximum" in message or "minimum" in message:
        return f"kubectl describe limitrange -n {namespace}"
    return ""


def after_stall(
    reason: str, cause: str, chain: str, namespace: str, attempt: str, install: str
) -> str:
    """The next command for a reason constant of the status."""
    here = f"-n {namespace}"
    describe = f"kubectl describe mchain {chain} {here}"
    match reason:
        case "InvalidSpec" | "ClaimTaken" | "QueueRequired":
            return f"kubectl edit mchain {chain} {here}"
        case "RunnerMissing":
            return install
        case "ClaimMissing":
            return f"kubectl get pvc {here}"
        case "DataFailed":
            return cause.partition("has failed: ")[2].partition(";")[0] or describe
        case "ArtifactMissing" | "DigestConflict":
            found = re.search(r"\bsa-[0-9a-f]{20}\b", cause)
            return (
                f"kubectl describe sart {found[0]} {here}" if found else f"kubectl get sart {here}"
            )
        case "NameTaken":
            return f"kubectl describe pytorchjob {attempt} {here}"
        case "LaunchRefused" if "webhook" in cause:
            return "kubectl get pods -n kubeflow"
        case "LaunchRefused" | "ReleaseRefused" | "RecordRefused" | "PodsForbidden":
            return after_refusal(cause, namespace) or describe
        case "NodeLost":
            found = re.search(r"; node (\S+) does not answer", cause)
            return f"kubectl describe node {found[1]}" if found else describe
        case _ if reason in RETRY_HELPS:
            return f"modelchain retry {chain} {here}"
    return describe


def _owners(thing: Object) -> list[Object]:
    return thing["metadata"].get("ownerReferences") or []
