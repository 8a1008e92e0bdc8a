"""The verify Job. It hashes an artifact again when the trainer's last word was lost.

Its own termination message then takes the place of the last word.
"""

from __future__ import annotations

from collections.abc import Iterable

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.plan.pools import NodePool, amount
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import Read, maker, true_condition, uid
from modelchain_operator.api.objects import name as name_of
from modelchain_operator.runners.pods import ended_at, has_ended, is_live, last_word
from modelchain_operator.runners.port import JobRequest
from modelchain_operator.runners.template import guaranteed, metadata, verify_template

ARGUMENTS = ["verify"]
# The failures that answer what was asked.
ANSWERS = (FailureClass.NO_ARTIFACT, FailureClass.CORRUPT_ARTIFACT)
# The most that the Job asks for, as it only reads files and hashes them.
MOST_CPU = "4"
MOST_MEMORY = "16Gi"
MOST_DISK = "16Gi"
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
            "template": verify_template(request, ARGUMENTS, resources(request.pool)),
        },
    }


def resources(pool: NodePool) -> Object:
    """What the pool gives a trainer, as far as the Job can use it, and no GPU.

    So a LimitRange that admits the trainers admits this Job, and it fits on almost any node.
    """
    return guaranteed(
        {
            "cpu": _least(pool.cpu, MOST_CPU),
            "memory": _least(pool.memory, MOST_MEMORY),
            "ephemeral-storage": _least(pool.ephemeral_storage, MOST_DISK),
        }
    )


def _least(quantity: str | None, most: str) -> str | None:
    return None if quantity is None else min(quantity, most, key=amount)


def finished(job: Read) -> bool:
    """Whether the Job has ended. If no pod has left an answer by then, none will come."""
    return any(true_condition(job, kind) for kind in ("Complete", "Failed"))


def made(job: Read, pod: Read) -> bool:
    """Whether the pod is one of the Job's."""
    owner = maker(pod, "Job")
    return owner is not None and owner["uid"] == job["metadata"]["uid"]


def silent(pods: Iterable[Read]) -> bool:
    """Whether a pod's main container has ended while a sidecar keeps the Job from noticing."""
    return any(is_live(pod) and has_ended(pod) for pod in pods)


def answer(pods: Iterable[Read]) -> LastWord | None:
    """The last word of the pod that ended last, of those that left an answer.

    It is success, or its class says whether the artifact is missing or damaged. Another failure is
    no answer.
    """
    for pod in sorted(pods, key=lambda pod: ended_at(pod) or 0.0, reverse=True):
        word = last_word(pod)
        if word is not None and (word.result == "Succeeded" or word.failure in ANSWERS):
            return word
    return None
