"""The verify Job. It hashes an artifact again when the trainer's last word was lost.

Its own termination message then takes the place of the last word.
"""

from __future__ import annotations

from collections.abc import Iterable

from modelchain.api.contracts import LastWord
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import Read, true_condition, uid
from modelchain_operator.api.objects import name as name_of
from modelchain_operator.runners.pods import ended_at, last_word
from modelchain_operator.runners.port import JobRequest
from modelchain_operator.runners.template import metadata, verify_template

ARGUMENTS = ["verify"]
RESOURCES = {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}}
# The Job only reads, so a repetition does no harm. Disruptions, such as a drained node, are not
# counted: `podFailurePolicy` ignores them.
RETRIES = 2


def name(attempt: str) -> str:
    return f"{attempt}-verify"


def build(request: JobRequest, attempt: Read | None = None) -> Object:
    """The Job. It needs the trainer image and the claim but no GPU, so it is put in no queue.

    Kubernetes deletes it with the job of the attempt, so that no more of them are kept than of
    those. If that job, `attempt`, exists no longer, it deletes it with the chain.
    """
    meta = metadata(request, name(request.name), "verify")
    if attempt is not None:
        meta["ownerReferences"] = [
            {
                "apiVersion": attempt["apiVersion"],
                "kind": attempt["kind"],
                "name": name_of(attempt),
                "uid": uid(attempt),
            }
        ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": meta,
        "spec": {
            "backoffLimit": RETRIES,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "Ignore",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    }
                ]
            },
            "template": verify_template(request, ARGUMENTS, RESOURCES),
        },
    }


def finished(job: Read) -> bool:
    """Whether the Job has ended. If no pod has left an answer by then, none will come."""
    return any(true_condition(job, kind) for kind in ("Complete", "Failed"))


def answer(pods: Iterable[Read]) -> LastWord | None:
    """The last word of the pod that ended last, of those that left one.

    If it is `Failed`, its class says whether the artifact is missing or damaged.
    """
    for pod in sorted(pods, key=lambda pod: ended_at(pod) or 0.0, reverse=True):
        if (word := last_word(pod)) is not None:
            return word
    return None
