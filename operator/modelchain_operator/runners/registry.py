"""The kinds of runner, by `spec.runner.kind`. Every attempt is launched, read, released and deleted
by the runner that its intent names.
"""

from __future__ import annotations

from modelchain_operator.api.objects import Read
from modelchain_operator.runners.port import JobState, Runner
from modelchain_operator.runners.pytorchjob import PyTorchJob

UNNAMED = "PyTorchJob"  # the kind of attempts that were recorded before their status named one
RUNNERS: dict[str, Runner] = {"PyTorchJob": PyTorchJob()}


def runner_for(kind: str | None) -> Runner:
    """The runner that an attempt's status names. Raises KeyError for a kind that is not
    registered.
    """
    return RUNNERS[kind or UNNAMED]


def runner_of(job: Read) -> Runner:
    """The runner of a job, by its kind as the API server gives it."""
    return next(runner for runner in RUNNERS.values() if runner.kind == job["kind"])


def state_of(job: Read) -> JobState:
    return runner_of(job).state(job)
