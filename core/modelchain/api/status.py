"""The status of a chain, which is also its ledger. It has the same shape on a cluster and on a
laptop.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, TypedDict, Unpack

from pydantic import BeforeValidator, Field

from modelchain.api.contracts import FailureClass, Progress
from modelchain.api.reasons import Code, known, without_code, without_command
from modelchain.api.spec import Record


class State(StrEnum):
    PENDING = "Pending"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    VERIFYING = "Verifying"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUSPENDED = "Suspended"


EXACT = 2**53


def _storable(value: Any) -> Any:
    """An API server keeps numbers beyond 64 bits as floats: round to one, so that it is read back
    as it was written.
    """
    return (
        int(float(value))
        if isinstance(value, float) or (isinstance(value, int) and value > EXACT)
        else value
    )


Macs = Annotated[int, BeforeValidator(_storable)]


class PodTime(Record):
    """When one pod's container ran (seconds since the epoch), and on how many GPUs."""

    started: float
    finished: float | None = None
    gpus: int = 0
    # It is rank 0's pod; the attempt's running time is that of this pod.
    first: bool = False


class Spent(Record):
    """What closed attempts have spent; it does not change any more. `cost` is a decimal string, or
    None without a price.
    """

    macs: Macs = 0
    gpu_seconds: float = 0.0
    seconds: float = 0.0
    cost: str | None = None


class AttemptStatus(Record):
    """One launch of a stage. Immutable in name and digest; a retry is another attempt.

    `runner` is the kind that launches it, whatever the spec says later. On a cluster `uid` is its
    job's: a job is released only once its UID is here. `ending` is the deadline it is being ended
    for. `pods` are those of an open attempt, by UID; `gone` is what was spent by pods no longer
    listed.
    """

    name: str
    number: int
    input_digest: str
    runner: str | None = None  # None: recorded before there was a second kind
    state: State
    failure: FailureClass | None = None
    message: str = ""
    started_at: str | None = None
    finished_at: str | None = None
    gpu_seconds: float = 0.0
    cost: str | None = None
    macs: Macs = 0
    uid: str | None = None
    ending: FailureClass | None = None
    # The node whose own device ended it, and a short name of the fault.
    node: str | None = None
    fault: str = ""
    checkpoint_step: int = 0
    stepped_at: float | None = None
    pods: dict[str, PodTime] = {}
    gone: Spent = Spent()

    def changed(self, **fields: Unpack[AttemptFields]) -> AttemptStatus:
        """A copy in which these fields have these values."""
        return self.model_copy(update=dict(fields))


class AttemptFields(TypedDict, total=False):
    """Fields of `AttemptStatus` that may change, with their types; a test compares the two."""

    state: State
    failure: FailureClass | None
    message: str
    started_at: str | None
    finished_at: str | None
    gpu_seconds: float
    cost: str | None
    macs: int
    uid: str | None
    ending: FailureClass | None
    node: str | None
    fault: str
    checkpoint_step: int
    stepped_at: float | None
    pods: dict[str, PodTime]
    gone: Spent


class ArtifactRef(Record):
    """`path` is relative to the root, `digest` the SHA-256 of the weights."""

    path: str
    digest: str
    trainer_math: int | None = None  # of the trainer that made it, where that is known


class StageStatus(Record):
    """One stage. `spent` is the ledger of its closed attempts; `macs`, `gpuSeconds` and `cost` add
    the open one.

    A stage without attempts of its own shows what the StageArtifact says that it found.
    `inheritsAt` is when the predecessor's trainer ended (seconds since the epoch), until this stage
    has a job.
    """

    name: str
    state: State = State.PENDING
    # A sentence; its code, of `modelchain.api.reasons.Code` or of a newer version's; and the
    # command to type next, where there is one.
    reason: str = ""
    reason_code: str = ""
    next: str = ""
    # The stage waits for a person, as `reason` says.
    stalled: bool = False
    input_digest: str | None = None
    # With which it was last finished or launched; kept while it waits.
    last_digest: str | None = None
    cache: Literal["Hit", "Miss"] | None = None
    epochs: int | None = None
    frozen: bool = False
    attempts: list[AttemptStatus] = []
    attempt_count: int = 0
    retries: int = 0
    disruptions: int = 0
    # Attempts that were retried, by how the one before ended; never renewed.
    retried: dict[FailureClass, int] = {}
    checkpoint_step: int = 0
    not_before: float | None = None
    progress: Progress | None = None
    results: dict[str, str] = {}
    inherits_at: float | None = None
    # From there until this stage had a job.
    transition_seconds: float | None = None
    planned_macs: Macs = 0
    spent: Spent = Spent()
    # The part of `spent` by closed attempts at `lastDigest`: what the StageArtifact will say.
    trained: Spent = Spent()
    macs: Macs = 0
    gpu_seconds: float = 0.0
    cost: str | None = None
    artifact: ArtifactRef | None = None

    def changed(self, **fields: Unpack[StageFields]) -> StageStatus:
        """A copy in which these fields have these values."""
        return self.model_copy(update=dict(fields))

    @property
    def code(self) -> Code | None:
        """Why the stage is as it is; None where another version wrote the status.

        An older version wrote no code; of a stage that has failed, its last attempt tells it.
        """
        if not self.reason_code and self.state is State.FAILED and self.attempts:
            return known(self.attempts[-1].failure or "")
        return known(self.reason_code)

    @property
    def message(self) -> str:
        """`reason` without the code and the command that stand beside it."""
        return without_code(without_command(self.reason, self.next), self.reason_code)


class StageFields(TypedDict, total=False):
    """Fields of `StageStatus` that may change, with their types; a test compares the two."""

    state: State
    reason: str
    reason_code: str
    next: str
    stalled: bool
    input_digest: str | None
    last_digest: str | None
    cache: Literal["Hit", "Miss"] | None
    epochs: int | None
    frozen: bool
    attempts: list[AttemptStatus]
    attempt_count: int
    retries: int
    disruptions: int
    retried: dict[FailureClass, int]
    checkpoint_step: int
    not_before: float | None
    progress: Progress | None
    results: dict[str, str]
    inherits_at: float | None
    transition_seconds: float | None
    planned_macs: int
    spent: Spent
    trained: Spent
    macs: int
    gpu_seconds: float
    cost: str | None
    artifact: ArtifactRef | None


class Condition(Record):
    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str
    last_transition_time: str
    observed_generation: int = 0


class Total(Record):
    macs: Macs = 0
    gpu_seconds: float = 0.0
    cost: str | None = None


class Summary(Record):
    """What one line of a table shows of a chain, ready to print."""

    stage: str = ""
    state: str = ""
    progress: str = ""
    accuracy: str = ""


# The newest nodes that are kept; a job cannot name any number of nodes.
MOST_AVOIDED = 16


class AvoidedNode(Record):
    """A node whose own device failed. The chain's attempts keep away from it until `until` (seconds
    since the epoch).
    """

    node: str
    until: float
    fault: str = ""


class ChainStatus(Record):
    """`retry` is the newest value of the retry annotation for which budgets were renewed. It stays
    when the annotation is removed.
    """

    observed_generation: int = -1
    conditions: list[Condition] = []
    summary: Summary = Summary()
    stages: list[StageStatus] = []
    total: Total = Total()
    avoid: list[AvoidedNode] = Field([], max_length=MOST_AVOIDED)
    retry: str | None = None

    def as_stored(self) -> ChainStatus:
        """As it is read back after it was written. `decide` compares with that form: otherwise it
        would find a difference in every pass, and write for ever.
        """
        return ChainStatus.model_validate_json(
            self.model_dump_json(by_alias=True, exclude_none=True)
        )

    def is_over(self, stages: int) -> bool:
        """Whether all stages have finished or one has failed. Then nothing starts by itself."""
        done = [stage.state is State.SUCCEEDED for stage in self.stages]
        return (len(done) == stages and all(done)) or any(
            s.state is State.FAILED for s in self.stages
        )

    @property
    def epochs(self) -> dict[str, int]:
        """By stage, the epochs that are known."""
        return {s.name: s.epochs for s in self.stages if s.epochs is not None}

    @property
    def frozen_epochs(self) -> dict[str, int]:
        """By stage, allocated epochs that a launch has fixed; an edit does not change them."""
        return {s.name: s.epochs for s in self.stages if s.frozen and s.epochs is not None}

    def condition(self, kind: str) -> Condition | None:
        return next((c for c in self.conditions if c.type == kind), None)

    def is_true(self, kind: str) -> bool:
        found = self.condition(kind)
        return found is not None and found.status == "True"
