"""The kinds of runner, by `spec.runner.kind`.

Every attempt is launched, read, released and deleted by the runner that its intent names.
"""

from __future__ import annotations

from modelchain_operator.api.objects import Read
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
