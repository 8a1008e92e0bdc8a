"""What is seen of a CPU Job of the operator: what it waits for, why it failed, and whether it was
asked for again since. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.reasons import Code, Reason
from modelchain_operator.api import refusals
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import annotation, true_condition, uid
from modelchain_operator.api.objects import name as name_of
from modelchain_operator.reconcile.pod_evidence import refusal
from modelchain_operator.reconcile.snapshot import RETRY, Snapshot
from modelchain_operator.runners import pods as podread
from modelchain_operator.runners.registry import UNNAMED, runner_for
from modelchain_operator.runners.template import GENERATION

# For so many seconds after it was made, a pod that does not run yet is no news.
STARTS_WITHIN = 10.0


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
