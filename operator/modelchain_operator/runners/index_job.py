"""The index Job. It indexes and checks a chain's data before the first GPU is asked for.

What it builds lies on the artifacts' claim, and all chains of that claim use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from modelchain.api.contracts import LastWord
from modelchain.identity.digest import digest_of
from modelchain.plan.pools import INDEX_CPU, INDEX_MEMORY, NodePool
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import Read, label
from modelchain_operator.runners import cpu_job
from modelchain_operator.runners.cpu_job import Amounts, CpuJob
from modelchain_operator.runners.port import JobRequest
from modelchain_operator.runners.template import CLAIM_UID, ROLE, Role

ROLE_OF_JOB: Role = "index"
# The most that the Job asks for by itself. It writes to the claim only, but a LimitRange may ask
# for a part of the node's disk.
MOST = Amounts(cpu=INDEX_CPU, memory=INDEX_MEMORY)


def name(made_from: Sequence[Any]) -> str:
    """The Job's name, by all that decides what it does.

    So the name alone makes sure that only one such Job exists in a namespace at a time.
    """
    return f"mchain-index-{digest_of(made_from)[:20]}"


def build(request: JobRequest) -> Object:
    """The Job. It is deleted with the chain that made it. What it has indexed stays."""
    work = CpuJob(
        role=ROLE_OF_JOB,
        program=("modelchain_data",),
        resources=resources(request.pool),
        writes=True,
        reads_data=True,
        deadline_seconds=request.pool.indexing.deadline_seconds,
    )
    return cpu_job.build(request, request.name, work)


def resources(pool: NodePool) -> Object:
    """What the configuration gives the Job, within what the pool gives a trainer.

    Without any figure for its memory it has a limit all the same.
    """
    limits = pool.indexing
    given = Amounts(cpu=limits.cpu, memory=limits.memory or INDEX_MEMORY, disk=None)
    return cpu_job.resources(pool, MOST, given)


def is_index_job(job: Read, claim_uid: str) -> bool:
    """Whether an operator made this Job for the claim, as its labels say."""
    return (label(job, ROLE), label(job, CLAIM_UID)) == (ROLE_OF_JOB, claim_uid)


def answer(pods: Iterable[Read]) -> LastWord | None:
    """The last word of the Job's pod that ended last."""
    return next(cpu_job.last_words(pods), None)
