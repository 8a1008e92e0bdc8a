"""The verify Job: re-hashes the artifact of an attempt whose last word was lost, and answers in the
trainer's place.
"""

from __future__ import annotations

from collections.abc import Iterable

from modelchain.api.contracts import LastWord
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import Read, true_condition
from modelchain_operator.runners.pods import ended_at, last_word
from modelchain_operator.runners.port import JobRequest
from modelchain_operator.runners.template import metadata, verify_template

ARGUMENTS = ["verify"]
RESOURCES = {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}}
RETRIES = 2  # it reads only, so it may be tried again; a node that goes away is not counted


def name(attempt: str) -> str:
    return f"{attempt}-verify"


def build(request: JobRequest) -> Object:
    """A Job that runs anywhere the trainer image and the claim can be had, in no queue."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(request, name(request.name), "verify"),
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
    """The Job will try no more; without an answer from its pods, there is none."""
    return any(true_condition(job, kind) for kind in ("Complete", "Failed"))


def answer(pods: Iterable[Read]) -> LastWord | None:
    """What the newest pod to end with an answer found. A Failed word of class NoArtifact means
    there is none.
    """
    for pod in sorted(pods, key=lambda pod: ended_at(pod) or 0.0, reverse=True):
        if (word := last_word(pod)) is not None:
            return word
    return None
