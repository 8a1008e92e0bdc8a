"""The verify Job. It hashes an artifact again when the trainer's last word was lost.

Its own termination message then takes the place of the last word.
"""

from __future__ import annotations

from collections.abc import Iterable

from modelchain.api.contracts import FailureClass, LastWord
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import Read, uid
from modelchain_operator.api.objects import name as name_of
from modelchain_operator.runners import cpu_job
from modelchain_operator.runners.cpu_job import Amounts, CpuJob
from modelchain_operator.runners.port import JobRequest

# The failures that answer what was asked.
ANSWERS = (FailureClass.NO_ARTIFACT, FailureClass.CORRUPT_ARTIFACT)
# The most that the Job asks for, as it only reads files and hashes them.
MOST = Amounts(cpu="4", memory="16Gi")


def name(attempt: str) -> str:
    return f"{attempt}-verify"


def build(request: JobRequest, attempt: Read | None = None) -> Object:
    """The Job. It needs the trainer image and the claim.

    Kubernetes deletes it with the job of the attempt, so that no more of them are kept than of
    those. If that job, `attempt`, exists no longer, it deletes it with the chain.
    """
    work = CpuJob(
        role="verify",
        program=("modelchain_trainer", "verify"),
        resources=cpu_job.resources(request.pool, MOST),
        owner=None if attempt is None else _owner(attempt),
    )
    return cpu_job.build(request, name(request.name), work)


def _owner(attempt: Read) -> Object:
    return {
        "apiVersion": attempt["apiVersion"],
        "kind": attempt["kind"],
        "name": name_of(attempt),
        "uid": uid(attempt),
    }


def answer(pods: Iterable[Read]) -> LastWord | None:
    """The last word of the pod that ended last, of those that left an answer.

    It is success, or its class says whether the artifact is missing or damaged. Another failure is
    no answer. Nor is a success without a manifest's digest, since only a hash is evidence.
    """
    for word in cpu_job.last_words(pods):
        proven = word.result == "Succeeded" and bool(word.manifest_digest)
        if proven or word.failure in ANSWERS:
            return word
    return None
