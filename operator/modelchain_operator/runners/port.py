"""What a runner has to provide: all that the operator knows of one kind of training job.

For a second kind, add a file beside `pytorchjob` and an entry in `registry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from modelchain.errors import InputError
from modelchain.plan.pools import NodePool
from modelchain_operator.api.kube import Object, Resource
from modelchain_operator.api.objects import Read, is_deleting, true_condition
from modelchain_operator.runners import kueue

# The most bytes of a task, which a pod gets as an environment variable.
TASK_BYTES = 64 * 1024


@dataclass(frozen=True)
class JobRequest:
    """All that the objects of one attempt, or of one CPU Job, are made from."""

    # The attempt's name, or the CPU Job's.
    name: str
    namespace: str
    chain: str
    chain_uid: str
    pool: NodePool
    image: str
    artifacts_claim: str
    # The UID of that claim: a claim of the same name may replace it, and holds other files.
    claim_uid: str
    # A task of `modelchain.api.contracts` as JSON, at most TASK_BYTES long.
    task: str
    # These three are None if a CPU Job is not about a stage, an attempt, or an input digest.
    stage: str | None = None
    # The attempt's number.
    attempt: int | None = None
    input_digest: str | None = None
    nodes: int = 1
    processes_per_node: int = 1
    # The claim that holds the data; None if the image does.
    data_claim: str | None = None
    # Where the data is mounted.
    mount_path: str = "/data"
    # The name of a WorkloadPriorityClass of Kueue.
    priority_class: str | None = None
    # Nodes that the attempt must not run on.
    avoid: tuple[str, ...] = ()
    # The attempt trains a baseline.
    alone: bool = False

    def __post_init__(self) -> None:
        if (size := len(self.task.encode())) > TASK_BYTES:
            raise InputError(
                f"the task of {self.what} takes {size} bytes, more than {TASK_BYTES}; name fewer"
                " shards, or shorter paths",
                field="spec.data",
            )

    @property
    def what(self) -> str:
        """What the objects are for, in a message."""
        return f"job {self.name}" if self.stage is None else f"stage {self.stage}"


@dataclass(frozen=True)
class JobState:
    """A job as it was read. Nothing here is evidence of success."""

    # We have let the job run, as our annotation on it says.
    released: bool
    # The job may not make pods. Kueue suspends even a released job while its queue has no room.
    suspended: bool
    finished: Literal["Succeeded", "Failed"] | None
    deleting: bool
    # Why the job failed, as the job itself says.
    message: str
    # The queue that the job is in; None if it is in none, or is not released.
    queue: str | None = None


def job_state(job: Read, *, suspended: bool, success: str) -> JobState:
    """The state of a job whose kind has the conditions `Failed` and `success`."""
    failed = true_condition(job, "Failed")
    finished: Literal["Succeeded", "Failed"] | None = None
    if failed is not None:
        finished = "Failed"
    elif true_condition(job, success) is not None:
        finished = "Succeeded"
    return JobState(
        released=kueue.is_released(job),
        suspended=suspended,
        finished=finished,
        deleting=is_deleting(job),
        message=failed.get("message", "") if failed is not None else "",
        queue=kueue.queue_of(job),
    )


class Runner(Protocol):
    """A kind of training job. All methods are pure."""

    # How the API server names the kind in a URL and in an object.
    resource: Resource
    kind: str
    # The command that installs the kind.
    install: str
    # The controller that makes the pods, and the command that shows whether it runs.
    controller: str
    controller_pods: str
    # Kueue's name of the kind.
    framework: str
    # The init container in which a pod waits until rank 0's pod can be reached; empty if the kind
    # has none.
    init_container: str

    def build(self, request: JobRequest) -> Object:
        """The job to create: suspended, and in a queue that does not exist.

        So no pod runs before the status has the job's UID, and no webhook puts the job into another
        queue.
        """
        ...

    def release(self, job: Read, queue: str | None, now: str) -> Object:
        """The next merge patch that is needed to let `job` run.

        Without a queue two patches are needed, since Kueue's webhook refuses to remove the label of
        a queue from a job that is not suspended. The API server refuses a patch if the job is
        another one or has changed since it was read.

        Args:
            job: as it was just read.
            queue: the LocalQueue to put it into; None for none.
            now: the time of the release (RFC 3339), for the annotation that marks the job.
        """
        ...

    def state(self, job: Read) -> JobState: ...

    def nodes(self, job: Read) -> int:
        """The number of pods that the job makes, one for each node."""
        ...

    def job_uid(self, pod: Read) -> str | None:
        """The UID of the job that has made a pod; None if no job of this kind has.

        The pod's owner references have to lead to the job. Labels are no evidence, since everyone
        who may create pods can copy them.
        """
        ...

    def node_rank(self, pod: Read) -> int | None:
        """The number of a pod in its job; rank 0 runs in pod 0. None for a pod of another kind."""
        ...

    def event_uids(self, job: Read) -> tuple[str, ...]:
        """UIDs of the objects whose events say why pods of this job are refused.

        That is the job itself, or the objects by which it makes its pods.
        """
        ...

    def describe(self, name: str, namespace: str) -> str:
        """The command that shows a job and its events."""
        ...
