"""What a runner is: all that the operator knows of one kind of training job.

A second kind is a second file beside `pytorchjob` and a second entry of `registry`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from modelchain.errors import InputError
from modelchain.plan.pools import NodePool
from modelchain_operator.api.kube import Object, Resource
from modelchain_operator.api.objects import Read, is_deleting, true_condition
from modelchain_operator.runners import kueue

TASK_BYTES = 64 * 1024


@dataclass(frozen=True)
class JobRequest:
    """One attempt, all that its objects are made from.

    `name` is the attempt's. `task` is `modelchain.api.contracts.Task` as JSON, at most 64 KiB.
    `mount_path` is where the data lies; `data_claim` None leaves it to the image. `priority_class`
    is Kueue's. `avoid` are nodes not to run on.
    """

    name: str
    namespace: str
    chain: str
    chain_uid: str
    stage: str
    attempt: int
    input_digest: str
    pool: NodePool
    image: str
    artifacts_claim: str
    task: str
    nodes: int = 1
    processes_per_node: int = 1
    data_claim: str | None = None
    mount_path: str = "/data"
    priority_class: str | None = None
    avoid: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (size := len(self.task.encode())) > TASK_BYTES:
            raise InputError(
                f"the task of stage {self.stage} takes {size} bytes, more than {TASK_BYTES}; name"
                " fewer shards, or shorter paths",
                field="spec.data",
            )


@dataclass(frozen=True)
class JobState:
    """A job as it was read. `released`: we let it run, as our annotation says; a queue may hold it
    `suspended` still.

    `queue` is the one its label names, None for none and for our placeholder. `message` is the
    job's own word on why it failed; none of this is evidence of success.
    """

    released: bool
    suspended: bool
    finished: Literal["Succeeded", "Failed"] | None
    deleting: bool
    message: str
    queue: str | None = None


def job_state(job: Read, *, suspended: bool, success: str) -> JobState:
    """Of a kind whose conditions are `Failed` and `success`."""
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
    """A kind of training job. All methods are pure.

    `kind` is the job's own in the API, `resource` its URL. `install` is the command that installs
    the kind. `controller` makes its pods, and `controller_pods` is the command that shows whether
    it runs. `framework` is Kueue's name of the kind.
    """

    resource: Resource
    kind: str
    install: str
    controller: str
    controller_pods: str
    framework: str

    def build(self, request: JobRequest) -> Object:
        """The job to create: suspended, and in a queue that does not exist.

        So nothing runs before its UID is recorded, and no webhook can give it another queue.
        """
        ...

    def release(self, job: Read, queue: str | None, now: str) -> Object:
        """The next merge patch on the way to let `job` run; it fails if the job is another or has
        changed since it was read. `now` (RFC 3339) is what the annotation says that marks it as
        released.

        Without a queue it takes two: Kueue's webhook refuses to take a queue's label from a job
        that is not suspended.
        """
        ...

    def state(self, job: Read) -> JobState: ...

    def node_rank(self, pod: Read) -> int | None:
        """Which node of its job a pod is; 0 holds rank 0. None for a pod that this kind did not
        make.
        """
        ...

    def event_uids(self, job: Read) -> tuple[str, ...]:
        """UIDs of the objects whose events say why pods of this job are refused: of the job itself,
        or of what it makes its pods through.
        """
        ...

    def describe(self, name: str, namespace: str) -> str:
        """The command that shows a job and its events."""
        ...
