"""What is seen of the Job that indexes a chain's data, before the first GPU is asked for.

Pure: it reads nothing itself, as `observe` does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modelchain.api.contracts import LastWord
from modelchain.api.reasons import Code, Reason
from modelchain.decide.observed import IndexSeen
from modelchain.errors import InputError
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import (
    is_deleting,
    label,
    true_condition,
    uid,
)
from modelchain_operator.api.objects import name as name_of
from modelchain_operator.reconcile import cpu_jobs
from modelchain_operator.reconcile import job_requests as requests
from modelchain_operator.reconcile.memory import Memory
from modelchain_operator.reconcile.snapshot import Snapshot
from modelchain_operator.runners import cpu_job, index_job
from modelchain_operator.runners.template import CHAIN, CHAIN_UID


class Indexer:
    """One chain's index Job. Another chain that reads the same data may have made it."""

    def __init__(self, snapshot: Snapshot, config: PoolFile, memory: Memory, now: float):
        self.snapshot = snapshot
        self.config = config
        self.memory = memory
        self.now = now

    def seen(self) -> IndexSeen | None:
        """What the Job does or waits for, or why it has failed; None once the data is indexed."""
        claim: Object | None = self.snapshot.want("claim")
        if claim is None:
            return None  # nothing is launched either, before there is a claim
        name = self._name(claim)
        if (self.snapshot.namespace, name) in self.memory.indexed:
            return None
        job: Object | None = self.snapshot.want("cpu job", name)
        if job is None:
            return IndexSeen(name, self._indexes(name), due=True)
        if not index_job.is_index_job(job, uid(claim)):
            return IndexSeen(name, self._taken(name), stalls=True)
        if is_deleting(job):
            reason = Reason(Code.NAME_GOING, name, f"waits until an earlier {name} is gone")
            return IndexSeen(name, reason)
        seen = self._of(job)
        if seen is None:
            self.memory.note_indexed((self.snapshot.namespace, name))
        return seen

    def strays(self) -> Iterator[tuple[str, str]]:
        """By UID, the chain's index Jobs that run for nothing: after an edit of what it reads, or
        while it is suspended. Their live pods tell of them.
        """
        running = cpu_jobs.named(self.snapshot, index_job.ROLE_OF_JOB, live=True)
        unwanted = running - {self._wanted()} if running else set()
        return cpu_jobs.ours(self.snapshot, index_job.ROLE_OF_JOB, unwanted)

    def _name(self, claim: Object) -> str:
        return requests.index_name(self.snapshot.spec, self.config, uid(claim))

    def _wanted(self) -> str | None:
        """The name of the only index Job that may run; None if none may, or none can be made."""
        if self.snapshot.spec.spec.suspend:
            return None
        claim: Object | None = self.snapshot.want("claim")
        try:
            return None if claim is None else self._name(claim)
        except InputError:
            return None

    def _is_ours(self, job: Object) -> bool:
        return cpu_jobs.is_ours(self.snapshot, index_job.ROLE_OF_JOB, job)

    # -- one Job -----------------------------------------------------------------------------------

    def _of(self, job: Object) -> IndexSeen | None:
        """What is seen of a Job that exists.

        The last word of its pod comes before the Job's own conditions: these may come late, and a
        sidecar may keep them from coming at all.
        """
        name = name_of(job)
        if true_condition(job, "Complete") is not None:
            return None
        pods = self._pods(job)
        word = index_job.answer(pods)
        if word is not None and word.result == "Succeeded":
            return None
        if not cpu_jobs.over(job, pods):
            return self._going_on(job, pods)
        if self._asked_again(job):
            return IndexSeen(name, self._indexes(name), due=True)
        return self._failed(job, pods, word)

    def _pods(self, job: Object) -> list[Object]:
        """The Job's pods, and what is remembered of those that are gone."""
        if self._is_ours(job):
            pods = [*self.snapshot.pods, *self.memory.pods_of(self.snapshot.uid)]
        else:
            pods = self.snapshot.want("pods of index", label(job, CHAIN_UID)) or []
        return [pod for pod in pods if cpu_job.made(job, pod)]

    def _going_on(self, job: Object, pods: Sequence[Object]) -> IndexSeen:
        name = name_of(job)
        refused = cpu_jobs.refused(self.snapshot, job, pods, self.now)
        if refused is not None:
            return IndexSeen(name, refused, stalls=True)
        return IndexSeen(name, cpu_jobs.waiting(pods, self.now) or self._indexes(name, job))

    def _indexes(self, name: str, job: Object | None = None) -> Reason:
        """The Job is at work, or is about to be made."""
        message = f"job {name} indexes and checks the data"
        if job is not None and not self._is_ours(job):
            message = f"job {name} of chain {label(job, CHAIN)} indexes and checks the same data"
        if job is not None and job.get("spec", {}).get("suspend"):
            message = f"another client has suspended job {name}, which is to index the data"
        return Reason(Code.INDEXING, name, message)

    def _taken(self, name: str) -> Reason:
        message = f"Job {name} is no operator's, so the data cannot be indexed; delete it"
        look = f"kubectl describe job {name} -n {self.snapshot.namespace}"
        return Reason(Code.NAME_TAKEN, name, message, look)

    # -- one that has failed -----------------------------------------------------------------------

    def _asked_again(self, job: Object) -> bool:
        """Whether the chain that made a failed Job was edited, asked for again or deleted since.

        Only then is the Job made again, whichever chain needs it. So two chains that need the same
        Job do not make it again and again in turn.
        """
        chain = self._chain_of(job)
        return chain is None or cpu_jobs.asked_again(job, chain)

    def _chain_of(self, job: Object) -> Object | None:
        """The chain that made a Job; None if it exists no longer."""
        if self._is_ours(job):
            return self.snapshot.chain
        chain: Object | None = self.snapshot.want("chain", label(job, CHAIN))
        return chain if chain is not None and uid(chain) == label(job, CHAIN_UID) else None

    def _failed(self, job: Object, pods: Sequence[Object], word: LastWord | None) -> IndexSeen:
        """Only the chain that made the Job fails with it. Others wait until that one is mended."""
        name, why = name_of(job), self._why(job, pods, word)
        if not self._is_ours(job):
            chain, space = label(job, CHAIN), self.snapshot.namespace
            retry = f"modelchain retry {chain} -n {space}"
            message = f"job {name} of chain {chain}, which indexes the same data, has failed: {why}"
            return IndexSeen(name, Reason(Code.INDEX_FAILED, name, message, retry), stalls=True)
        if word is not None and word.failure is not None and word.failure.permanent:
            reason = Reason(Code(word.failure), name, word.message)
            return IndexSeen(name, reason, failure=word.failure)
        reason = Reason(Code.INDEX_FAILED, name, f"job {name} has failed: {why}")
        return IndexSeen(name, reason, stalls=True)

    def _why(self, job: Object, pods: Sequence[Object], word: LastWord | None) -> str:
        mend = "raise indexing.deadlineSeconds of the node pool. What it has indexed stays"
        if late := cpu_jobs.too_late(job, mend):
            return late
        if word is not None:
            return f"{word.failure}: {word.message}"
        more = "raise indexing.memory of the node pool"
        return cpu_jobs.without_word(job, pods, more).message
