"""For `explain`: what a queue, pods or a stall wait for, and the command that shows or mends it.
Pure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from modelchain_operator.api.kube import Object
from modelchain_operator.reconcile.attempt import GONE
from modelchain_operator.reconcile.pod_evidence import evidence
from modelchain_operator.runners import pods as podread
from modelchain_operator.runners.port import Runner

# Reasons of stages that have not failed, and that a retry mends.
RETRY_HELPS = ("VerifyUnanswered", "SuspendedByAnother", "SameDeviceError", "NodesAvoided")


def of_pods(pods: Sequence[Object], job: Object | None, nodes: int, runner: Runner) -> str:
    """The sentence the operator itself would say of these pods; empty if there is nothing to
    say.
    """
    state = runner.state(job) if job is not None else GONE
    return evidence(
        pods,
        (),
        job=state,
        gang=podread.Gang(nodes, runner.node_rank),
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
    reason: str, cause: str, chain: str, namespace: str, attempt: str, runner: Runner
) -> str:
    """The next command for a reason constant of the status."""
    here = f"-n {namespace}"
    describe = f"kubectl describe mchain {chain} {here}"
    match reason:
        case "InvalidSpec" | "ClaimTaken" | "QueueRequired":
            return f"kubectl edit mchain {chain} {here}"
        case "RunnerMissing":
            return runner.install
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
            return runner.describe(attempt, namespace)
        case "LaunchRefused" if "webhook" in cause:
            return runner.controller_pods
        case "LaunchRefused" | "ReleaseRefused" | "RecordRefused" | "PodsForbidden":
            return after_refusal(cause, namespace) or describe
        case "NodeLost":
            found = re.search(r"; node (\S+) does not answer", cause)
            return f"kubectl describe node {found[1]}" if found else describe
        case _ if reason in RETRY_HELPS:
            return f"modelchain retry {chain} {here}"
    return describe
