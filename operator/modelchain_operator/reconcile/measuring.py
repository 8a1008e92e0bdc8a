"""What is seen of the Jobs that measure metrics on finished artifacts.

Pure: it reads nothing itself, as `observe` does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from modelchain.api.reasons import Code, Reason
from modelchain.api.status import StageStatus
from modelchain.decide.conditions import UNDERWAY, why_unmeasured
from modelchain.decide.measure import measures
from modelchain.decide.observed import Measure, Measurement
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import annotation, is_deleting
from modelchain_operator.api.objects import name as name_of
from modelchain_operator.reconcile import cpu_jobs
from modelchain_operator.reconcile.events import Kind
from modelchain_operator.reconcile.memory import Memory
from modelchain_operator.reconcile.snapshot import Snapshot
from modelchain_operator.runners import cpu_job, evaluation_job
from modelchain_operator.runners.template import INPUT_DIGEST


def news(before: StageStatus, stage: StageStatus) -> Iterator[tuple[Kind, Code, str]]:
    """The events on metrics of a finished stage: those that were measured, and those that cannot
    be.
    """
    known = {one.evaluation: one.code for one in before.unmeasured}
    missing = {one.evaluation for one in stage.unmeasured}
    for name in known.keys() - missing:
        if name in stage.results:
            text = f"stage {stage.name}: {name} {stage.results[name]} was measured"
            yield "Normal", Code.STAGE_MEASURED, text
    for one in stage.unmeasured:
        if one.code in (None, *UNDERWAY) or known.get(one.evaluation) is one.code:
            continue
        yield "Warning", one.code, why_unmeasured(stage, one)


class Measurements:
    """One chain's evaluation Jobs."""

    def __init__(self, snapshot: Snapshot, memory: Memory, now: float):
        self.snapshot = snapshot
        self.memory = memory
        self.now = now

    def seen(self, measure: Measure) -> Measurement:
        """What became of one measurement. A last word counts before the Job's own conditions: these
        may come late, and a sidecar may keep them from coming at all.
        """
        job: Object | None = self.snapshot.want("cpu job", measure.job)
        if job is None:
            return None
        of = measure.artifact.input_digest
        if not self._is_ours(job) or annotation(job, INPUT_DIGEST) != of:
            return self._taken(measure.job)
        if is_deleting(job):
            message = f"waits until an earlier {measure.job} is gone"
            return Reason(Code.NAME_GOING, measure.job, message)
        return self._of(job)

    def _of(self, job: Object) -> Measurement:
        pods = self._pods(job)
        word = next(cpu_job.last_words(pods), None)
        if word is not None and word.result == "Succeeded":
            return word
        if not cpu_jobs.over(job, pods):
            refused = cpu_jobs.refused(self.snapshot, job, pods, self.now)
            return refused or cpu_jobs.waiting(pods, self.now) or measures(name_of(job))
        if cpu_jobs.asked_again(job, self.snapshot.chain):
            return None
        mend = "raise evaluating.deadlineSeconds of the node pool, then retry"
        if late := cpu_jobs.too_late(job, mend):
            name = name_of(job)
            return Reason(Code.MEASURE_DEADLINE, name, f"job {name} was ended: {late}")
        return word or cpu_jobs.without_word(job, pods, "raise `memory` of the node pool")

    def jobs(self) -> Mapping[str, str]:
        """By UID, the names of evaluation Jobs that have pods."""
        role = evaluation_job.ROLE_OF_JOB
        return dict(cpu_jobs.ours(self.snapshot, role, cpu_jobs.named(self.snapshot, role)))

    def _is_ours(self, job: Object) -> bool:
        return cpu_jobs.is_ours(self.snapshot, evaluation_job.ROLE_OF_JOB, job)

    def _pods(self, job: Object) -> list[Object]:
        """The Job's pods, and what is remembered of those that are gone."""
        pods = [*self.snapshot.pods, *self.memory.pods_of(self.snapshot.uid)]
        return [pod for pod in pods if cpu_job.made(job, pod)]

    def _taken(self, name: str) -> Reason:
        message = f"Job {name} is not this chain's, so the metric cannot be measured; delete it"
        look = f"kubectl describe job {name} -n {self.snapshot.namespace}"
        return Reason(Code.NAME_TAKEN, name, message, look)
