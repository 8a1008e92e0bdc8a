"""The kinds of runner, by `spec.runner.kind`.

Every attempt is launched, read, released and deleted by the runner that its intent names.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from modelchain.api.status import AttemptStatus
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import Read, controller, true_condition, uid
from modelchain_operator.runners.port import JobState, Runner
from modelchain_operator.runners.pytorchjob import PyTorchJob
from modelchain_operator.runners.trainjob import TrainJob

# The kind of an attempt whose status names none, since an older operator wrote it.
UNNAMED = "PyTorchJob"
RUNNERS: dict[str, Runner] = {"PyTorchJob": PyTorchJob(), "TrainJob": TrainJob()}
# In a spec: the first of these kinds that is installed.
AUTO = "Auto"
# The most kinds of parts that lie between a job and its pods.
MOST_PARTS = 2
# The conditions with which a part ends.
PART_ENDS = ("Complete", "Completed", "Failed")


def chosen(kind: str, missing: Container[str]) -> str:
    """The kind of runner of an attempt that is intended now.

    Args:
        kind: that of the spec.
        missing: the kinds that are not installed.
    """
    if kind != AUTO:
        return kind
    *first, last = RUNNERS
    return next((name for name in first if name not in missing), last)


def runner_for(kind: str | None) -> Runner:
    """The runner that an attempt's status names. Raises KeyError for an unknown kind."""
    return RUNNERS[kind or UNNAMED]


def runner_of(job: Read) -> Runner:
    """The runner of a job, found by the job's kind."""
    return next(runner for runner in RUNNERS.values() if runner.kind == job["kind"])


def state_of(job: Read) -> JobState:
    return runner_of(job).state(job)


def job_uid_of(pod: Read) -> str | None:
    """The UID of the job that has made a pod, or of a part of it; None if no job of any kind has.

    That tells whether a pod may train. Whose pod it is, `pods_made_by` tells.
    """
    return next(filter(None, (runner.job_uid(pod) for runner in RUNNERS.values())), None)


def pods_made_by(
    job_uid: str | None,
    attempt: AttemptStatus,
    pods: Iterable[Object],
    makers: Mapping[str, str],
) -> list[Object]:
    """Those of the pods that the attempt's own job has made. Labels are no evidence of that.

    A pod of which a user has taken away the owner counts if it counted before.

    Args:
        makers: by the UID of a job's part, the UID of what has made it.
    """
    if job_uid is None:
        return []
    return [
        pod
        for pod in pods
        if job_behind(job_uid_of(pod), makers) == job_uid or uid(pod) in attempt.pods
    ]


def job_behind(part: str | None, makers: Mapping[str, str]) -> str | None:
    """The UID of the job that a part belongs to; that of a job is its own."""
    for _ in range(MOST_PARTS):
        part = makers.get(part or "", part)
    return part


def is_part(thing: Read, kind: str) -> bool:
    """Whether a thing with our labels is made by this kind, or was and has lost its owner.

    Without an owner it still makes pods.
    """
    owner = controller(thing)
    return owner is None or owner["kind"] == kind


def makes_pods(part: Read) -> bool:
    """Whether a part may still make pods, or other parts that do."""
    return not any(true_condition(part, kind) for kind in PART_ENDS)
