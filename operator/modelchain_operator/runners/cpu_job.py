"""The Jobs that the operator runs beside training. They need no GPU and are put in no queue.

Each of them may be run again without harm, so Kubernetes itself retries them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from modelchain.api.contracts import LastWord
from modelchain.errors import EXIT_BAD_INPUT, EXIT_PREEMPTED
from modelchain.io.lastword import read_last_word
from modelchain.plan.pools import NodePool, amount
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import Read, maker, true_condition
from modelchain_operator.runners.pods import ended_at, has_ended, is_live, state
from modelchain_operator.runners.port import JobRequest
from modelchain_operator.runners.template import (
    Role,
    cpu_template,
    guaranteed,
    metadata,
    owner_reference,
)

# How often Kubernetes runs a failed pod again, at most.
RETRIES = 2


@dataclass(frozen=True)
class CpuJob:
    """What a Job runs, and what it needs for that."""

    # It also names the container.
    role: Role
    # The Python module and its arguments. The task is in the environment.
    program: tuple[str, ...]
    resources: Object
    # The owner reference to the object with which Kubernetes deletes the Job; None: the chain.
    owner: Object | None = None
    # Whether it writes to the artifacts' claim.
    writes: bool = False
    # Whether it reads the data's claim.
    reads_data: bool = False
    # After so many seconds Kubernetes ends the Job as failed; None: never.
    deadline_seconds: int | None = None


def build(request: JobRequest, name: str, work: CpuJob) -> Object:
    """The Job of this name."""
    owner = work.owner or owner_reference(request.chain, request.chain_uid)
    template = cpu_template(
        request,
        work.role,
        work.program,
        work.resources,
        writes=work.writes,
        reads_data=work.reads_data,
    )
    deadline = {"activeDeadlineSeconds": work.deadline_seconds} if work.deadline_seconds else {}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(request, name, work.role) | {"ownerReferences": [owner]},
        "spec": {
            "backoffLimit": RETRIES,
            "podFailurePolicy": {"rules": _rules(work.role)},
            "template": template,
            **deadline,
        },
    }


def _rules(container: str) -> list[Object]:
    """A disruption, such as a drained node, is not counted. Wrong input fails at once, since it
    would be wrong again.
    """

    def on_exit(code: int, action: str) -> Object:
        codes = {"containerName": container, "operator": "In", "values": [code]}
        return {"action": action, "onExitCodes": codes}

    disrupted = [{"type": "DisruptionTarget", "status": "True"}]
    return [
        {"action": "Ignore", "onPodConditions": disrupted},
        on_exit(EXIT_PREEMPTED, "Ignore"),
        on_exit(EXIT_BAD_INPUT, "FailJob"),
    ]


class Amounts(NamedTuple):
    """Quantities of what a Job asks for; None stands for no quantity."""

    cpu: str | None
    memory: str | None
    # Of its node's disk.
    disk: str | None = "16Gi"


NOTHING = Amounts(None, None, None)


def resources(pool: NodePool, most: Amounts, given: Amounts = NOTHING) -> Object:
    """What the pool gives a trainer, but no GPU, and at most `most`, or `given` instead of that.

    So a LimitRange that admits the trainers admits this Job, and it fits on almost any node. Where
    the pool gives nothing, the Job asks for what is `given`.
    """
    of_pool = Amounts(pool.cpu, pool.memory, pool.ephemeral_storage)
    names = ("cpu", "memory", "ephemeral-storage")
    parts = zip(names, of_pool, most, given, strict=True)
    return guaranteed(
        {name: _least(has, wants or at_most) or wants for name, has, at_most, wants in parts}
    )


def _least(quantity: str | None, most: str | None) -> str | None:
    """The quantity, but at most this; None if there is none."""
    return None if quantity is None or most is None else min(quantity, most, key=amount)


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


def last_words(pods: Iterable[Read]) -> Iterator[LastWord]:
    """The last words of these pods. The pod that ended last comes first."""
    for pod in sorted(pods, key=lambda pod: ended_at(pod) or 0.0, reverse=True):
        word = read_last_word((state(pod, "terminated") or {}).get("message") or "")
        if word is not None:
            yield word
