"""What is seen of a CPU Job of the operator: what it waits for, why it failed, and whether it was
asked for again since. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.reasons import Code, Reason
from modelchain_operator.api import refusals
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import (
    annotation,
    is_deleting,
    label,
    maker,
    true_condition,
    uid,
)
from modelchain_operator.api.objects import name as name_of
from modelchain_operator.reconcile.pod_evidence import refusal
from modelchain_operator.reconcile.snapshot import RETRY, Snapshot
from modelchain_operator.runners import cpu_job
from modelchain_operator.runners import pods as podread
from modelchain_operator.runners.registry import UNNAMED, runner_for
from modelchain_operator.runners.template import CHAIN_UID, GENERATION, ROLE, Role

# For so many seconds after it was made, a pod that does not run yet is no news.
STARTS_WITHIN = 10.0


def named(snapshot: Snapshot, role: Role, *, live: bool = False) -> set[str]:
    """The names of the Jobs of this role that the chain's pods tell of, or its live pods alone."""
    pods = (pod for pod in snapshot.pods if label(pod, ROLE) == role and not is_deleting(pod))
    owners = (maker(pod, "Job") for pod in pods if not live or podread.is_live(pod))
    return {owner["name"] for owner in owners if owner is not None}


def ours(snapshot: Snapshot, role: Role, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """By UID, those of these Jobs that the chain has made, unless they are being deleted.

    A pod is no evidence of who made the Job that it names, so the Job is read as well.
    """
    for name in sorted(names):
        job: Object | None = snapshot.want("cpu job", name)
        if job is not None and is_ours(snapshot, role, job) and not is_deleting(job):
            yield uid(job), name_of(job)


def is_ours(snapshot: Snapshot, role: Role, job: Object) -> bool:
    """Whether this chain has made the Job, for this role."""
    return (label(job, CHAIN_UID), label(job, ROLE)) == (snapshot.uid, role)


def over(job: Object, pods: Iterable[Object]) -> bool:
    """Whether nothing more is to be expected of a Job.

    Its deadline counts before its pods are gone, since one whose node does not answer may stay.
    """
    return cpu_job.finished(job) or cpu_job.silent(pods) or bool(too_late(job, ""))


def too_late(job: Object, mend: str) -> str:
    """Why a Job has ended that Kubernetes ended at its deadline; empty for another one.

    `mend` says what to do about it.
    """
    ends = (true_condition(job, kind) or {} for kind in ("Failed", "FailureTarget"))
    if not any(end.get("reason") == "DeadlineExceeded" for end in ends):
        return ""
    return f"it had not ended after {job['spec'].get('activeDeadlineSeconds')} s; {mend}"


def asked_again(job: Object, chain: Object) -> bool:
    """Whether the chain was edited, or has a new value of the retry annotation, since its Job was
    made. To remove the annotation asks for nothing.
    """
    retry, generation = annotation(chain, RETRY), str(chain["metadata"]["generation"])
    anew = bool(retry) and annotation(job, RETRY) != retry
    return anew or annotation(job, GENERATION) != generation


def waiting(pods: Iterable[Object], now: float) -> Reason | None:
    """What a Job's pods wait for; None if they are at work, or are soon."""
    gang = podread.Gang(nodes=1, runner=runner_for(UNNAMED))
    late = [pod for pod in pods if now >= podread.created_at(pod) + STARTS_WITHIN]
    reason, _ = podread.why_waiting([pod for pod in late if podread.is_live(pod)], gang)
    return reason


def refused(snapshot: Snapshot, job: Object, pods: Sequence[Object], now: float) -> Reason | None:
    """Why the API server refuses to create the Job's pod. Only an event shows that."""
    if pods or now < podread.created_at(job) + STARTS_WITHIN:
        return None
    message = refusal(snapshot.want("events", uid(job)) or [])
    if not message:
        return None
    look = refusals.next_command(message, snapshot.namespace)
    return Reason(Code.PODS_FORBIDDEN, name_of(job), message, look)


def without_word(job: Object, pods: Iterable[Object], more_memory: str) -> LastWord:
    """What a Job would have said that failed without a last word.

    `more_memory` says how to give it more memory.
    """
    failed = true_condition(job, "Failed") or {}
    told = (_without_word(pod, more_memory) for pod in pods if podread.has_failed(pod))
    said = podread.short(failed.get("message")) or "its pod left no last word"
    failure, message = next(told, (FailureClass.UNKNOWN, said))
    return LastWord(result="Failed", failure=failure, message=message)


def _without_word(pod: Object, more_memory: str) -> podread.Failure:
    """Why a pod has failed that left no last word."""
    ended = podread.state(pod, "terminated") or {}
    if ended.get("reason") == "OOMKilled":
        limits = podread.main_container(pod).get("resources", {}).get("limits") or {}
        limit = limits.get("memory", "none, so the node's")
        message = f"{podread.where(pod)} ran out of memory (limit: {limit}); {more_memory}"
        return FailureClass.OUT_OF_MEMORY, message
    said = podread.short(pod["status"].get("message")) or f"exit code {ended.get('exitCode')}"
    return FailureClass.UNKNOWN, f"{podread.where(pod)} left no last word: {said}"
