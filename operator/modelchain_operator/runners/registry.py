"""The kinds of runner, by `spec.runner.kind`.

Every attempt is launched, read, released and deleted by the runner that its intent names.
"""

from __future__ import annotations

from collections.abc import Iterable

from modelchain.api.status import AttemptStatus
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import Read, uid
from modelchain_operator.runners.port import JobState, Runner
from modelchain_operator.runners.pytorchjob import PyTorchJob

# The kind of an attempt whose status names none, since an older operator wrote it.
UNNAMED = "PyTorchJob"
RUNNERS: dict[str, Runner] = {"PyTorchJob": PyTorchJob()}


def runner_for(kind: str | None) -> Runner:
    """The runner that an attempt's status names. Raises KeyError for an unknown kind."""
    return RUNNERS[kind or UNNAMED]


def runner_of(job: Read) -> Runner:
    """The runner of a job, found by the job's kind."""
    return next(runner for runner in RUNNERS.values() if runner.kind == job["kind"])


def state_of(job: Read) -> JobState:
    return runner_of(job).state(job)


def job_uid_of(pod: Read) -> str | None:
    """The UID of the job that has made a pod; None if no job of any kind has."""
    return next(filter(None, (runner.job_uid(pod) for runner in RUNNERS.values())), None)


def pods_made_by(
    job_uid: str | None, attempt: AttemptStatus, pods: Iterable[Object]
) -> list[Object]:
    """Those of the pods that the attempt's own job has made. Labels are no evidence of that.

    A pod of which a user has taken away the owner counts if it counted before.
    """
    if job_uid is None:
        return []
    return [pod for pod in pods if job_uid_of(pod) == job_uid or uid(pod) in attempt.pods]
