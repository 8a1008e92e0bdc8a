"""What `decide` is given, `Observed`, and what it returns, a `Decision`.

The operator and the local runner each fill `Observed` from what they have just read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from modelchain.api.contracts import FailureClass, LastWord, Progress
from modelchain.api.reasons import Reason
from modelchain.api.spec import Evaluation
from modelchain.api.status import AttemptStatus, ChainStatus, PodTime, Spent
from modelchain.api.uses import NOT_USED, Resumed, Uses
from modelchain.plan.pools import NodePool
from modelchain.plan.prices import NO_PRICES, Prices


@dataclass(frozen=True)
class Artifact:
    """The artifact of a finished stage.

    On a laptop its files were hashed again and found whole. On a cluster a StageArtifact names it.
    """

    digest: str
    path: str
    macs: int
    # What the trainer measured at its end, in percent.
    metrics: Mapping[str, float]
    lost_macs: int = 0
    gpu_milliseconds: Uses = NOT_USED
    queue_seconds: float = 0.0
    cost: str | None = None
    unpriced_seconds: float = 0.0
    # `TRAINER_MATH` of the trainer that made it, where that is known.
    trainer_math: int | None = None
    # This very object, the chain with this UID, has made it. Always false on a laptop.
    own: bool = False
    # By the evaluation's name, the short key of what gave those of `metrics` that begin with it.
    evaluations: Mapping[str, str] = field(default_factory=dict)
    # By the evaluation's short key, metrics that were measured after the stage had finished.
    later: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    # By the evaluation's short key, on how many pictures it was measured, where that is known.
    pictures: Mapping[str, int] = field(default_factory=dict)

    @property
    def input_digest(self) -> str:
        """An artifact lies in a folder that is named by its input digest."""
        return self.path.split("/")[0]


@dataclass(frozen=True)
class Damage:
    """An artifact that exists but must not be used. It is never overwritten."""

    reason: Reason
    # A person has to decide what becomes of it, so the stage stalls. Otherwise the stage fails.
    stalls: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why the API server refused an action when it was last tried."""

    reason: Reason
    # Since when it has refused the action, in seconds since the epoch.
    since: float


@dataclass(frozen=True)
class Contact:
    """Whether rank 0 answers when this process asks it for its progress."""

    # When rank 0 last answered, in seconds since the epoch; None if it never did.
    answered: float | None = None
    # Since when it has not answered; None while it does.
    silent: float | None = None
    # How many connections rank 0 has accepted and not answered since its last answer. Unlike a
    # connection that fails, such a one shows that the trainer hangs.
    ignored: int = 0
    # The seconds between the first of these connections and the last.
    ignored_for: float = 0.0
    # The address at which rank 0 is asked, for a message.
    address: str = ""


@dataclass(frozen=True)
class Seen:
    """What is seen of one attempt.

    On a cluster an attempt's job is at first `unreleased` (created, and suspended), then `queued`
    (released, but waiting in a queue or for the scheduler), and then `live`.
    """

    # The attempt has a process, a pod that has not ended, or a job that may still make pods.
    live: bool
    # A process or a job of the attempt exists or has existed.
    started: bool
    # The last word, once the attempt has ended.
    word: LastWord | None = None
    # These are the trainer's own figures, as far as it can be asked: how far it is, what it has
    # spent, the part that a checkpoint has kept, how it has used its time, and what it resumes.
    progress: Progress | None = None
    checkpoint_step: int = 0
    macs: int = 0
    saved_macs: int = 0
    told: Uses = NOT_USED
    resumed: Resumed | None = None
    # The UID of the job, and the node pool that it was made for.
    uid: str | None = None
    pool: str | None = None
    unreleased: bool = False
    queued: bool = False
    # Why nothing runs yet, or why the artifact is not recorded yet.
    waiting: Reason | None = None
    # Why a person has to act.
    stalled: Reason | None = None
    # At least one pod, or the process, runs.
    running: bool = False
    # If pods occupy nodes and have not started: the failure class to charge if that lasts too long,
    # and since when they wait (seconds since the epoch).
    waits: tuple[FailureClass, float] | None = None
    # Why waiting longer cannot help.
    hopeless: tuple[FailureClass, str] | None = None
    # The job says that it succeeded. That alone is no evidence.
    succeeded: bool = False
    # What the pods tell of a failure, if no last word does.
    evidence: tuple[FailureClass, str] | None = None
    # If the last word was lost: the answer of the Job that hashes the artifact again. "Pending"
    # while that runs, "Unanswered" if it ended without an answer, None if it does not exist.
    verify: LastWord | Literal["Pending", "Unanswered"] | None = None
    # The times of pods by UID, of pods that exist and of pods that are only remembered.
    pods: Mapping[str, PodTime] = field(default_factory=dict)
    # The UIDs of those pods that are only remembered.
    gone_pods: frozenset[str] = frozenset()
    # What a GPU hour costs where its pods run.
    prices: Prices = NO_PRICES
    # By node whose own device failed, a short name of the fault.
    bad_nodes: Mapping[str, str] = field(default_factory=dict)
    # Whether rank 0 answers when it is asked for its progress; None on a laptop.
    contact: Contact | None = None
    # Another client has suspended the job, and the job is in no queue.
    idle: bool = False
    # The attempt has no job, and something else has its job's name.
    taken: Reason | None = None
    # The trainers have ended, although the job or a pod has not, for example because of a sidecar.
    trained: bool = False

    @property
    def there(self) -> bool:
        """Whether the attempt still exists: its job or process was made and has not ended."""
        return self.live or self.unreleased or self.queued or self.idle

    @property
    def may_train(self) -> bool:
        """Whether the attempt still exists and its trainers have not ended."""
        return self.there and not self.trained


@dataclass(frozen=True)
class IndexSeen:
    """What is seen of the Job that indexes the chain's data, while the data is not indexed."""

    # The Job's name.
    job: str
    # What it does, what it waits for, or why it has failed.
    reason: Reason
    # It does not exist, or has failed and was asked for again.
    due: bool = False
    # A person has to act before it can go on.
    stalls: bool = False
    # The data or the spec is wrong: the class with which the stage fails.
    failure: FailureClass | None = None


# What is seen of a measurement: the last word of its Job; what the Job does or waits for, or that
# its deadline has ended it; None if it is to be made, since there is none, or it has failed and was
# asked for again.
Measurement = LastWord | Reason | None

# Who has a share: this chain, none, or another one, for the reason given; None if none is needed.
Share = Literal["Mine", "Free"] | Reason | None


@dataclass(frozen=True)
class Observed:
    """What one pass has read. The fields after the blank line are filled on a cluster only."""

    # The stored status.
    status: ChainStatus
    # By input digest.
    artifact: Callable[[str], Artifact | Damage | None]
    # By the attempt's name.
    attempt: Callable[[str], Seen]
    # Names of all attempts that have a process, a pod or an unfinished job, wanted or not.
    live: frozenset[str] = frozenset()
    # By input digest, the inputs of earlier work. A comparison shows which field causes a miss.
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # The fingerprint of the training data.
    fingerprint: str | None = None
    # The value of the retry annotation. A new value renews the budgets once.
    retry: str | None = None
    # `run --alone`: train only the baseline of this stage, also if the gate does not ask for it.
    only: str | None = None
    # The user pressed Ctrl-C: stop what runs and start nothing.
    interrupted: bool = False
    # The wait before a first retry, and between two passes without an event.
    backoff_seconds: float = 10.0
    poll_seconds: float = 0.5
    # The highest attempt number in use, by all of an attempt's name but its number, and by input
    # digest. If the status was lost, it keeps a new attempt from taking the name of an old one.
    highest_number: Callable[[str, str], int] = lambda unnumbered, digest: 0

    # Artifacts count only once a StageArtifact records them.
    records: bool = False
    # Why nothing can be launched; None if nothing prevents it.
    obstacle: Reason | None = None
    # Why a pod still exists although its grace period is over.
    stuck: Reason | None = None
    # Strays, by UID: the names of unfinished jobs that belong to no attempt in the status.
    strays: Mapping[str, str] = field(default_factory=dict)
    # By UID, the names of finished jobs that need not be kept any more.
    spent_jobs: Mapping[str, str] = field(default_factory=dict)
    # The chain's own claim does not exist yet.
    claim_missing: bool = False
    # Why the data is not there yet: a Job still fills its claim, or has failed.
    loading: Callable[[], Reason | None] = lambda: None
    # The Job that indexes the data; None once the data is indexed, and on a laptop.
    indexing: Callable[[], IndexSeen | None] = lambda: None
    # Who has the share of an input digest.
    share: Callable[[str], Share] = lambda digest: None
    # The input digests of which this chain has the share.
    shares: frozenset[str] = frozenset()
    # Whether the attempt's job would be made differently today.
    outdated: Callable[[Launch], bool] = lambda launch: False
    # What became of a measurement.
    measurement: Callable[[Measure], Measurement] = lambda measure: None
    # By UID, the names of the chain's evaluation Jobs, as far as pods show them.
    evaluation_jobs: Mapping[str, str] = field(default_factory=dict)
    # The currency of all prices; empty without one.
    currency: str = ""
    # The node pool in which the chain's next attempt would run; None if there is no such pool.
    pool: NodePool | None = None
    # Why the API server refused an action when it was last tried; None if it did not.
    refused: Callable[[Action], Refusal | None] = lambda action: None


@dataclass(frozen=True)
class Launch:
    """Launch this attempt, whose intent is in the status. A job is made suspended at first."""

    # The stage's place in the chain, from 0.
    stage: int
    attempt: AttemptStatus
    # The hashed inputs.
    inputs: Mapping[str, Any]
    predecessor: Artifact | None
    # Nodes that the attempt must not run on.
    avoid: tuple[str, ...] = ()
    # The stage's model is trained alone, as a baseline.
    alone: bool = False


@dataclass(frozen=True)
class Release:
    """Let the attempt's job run. Its UID is in the status."""

    attempt: AttemptStatus


@dataclass(frozen=True)
class Stop:
    """Ask this attempt to write a checkpoint and exit. That charges no budget."""

    attempt: str


@dataclass(frozen=True)
class Discard:
    """Delete a job that is not needed: a stray, a finished one that is too old to be kept, or a CPU
    Job.
    """

    uid: str
    name: str


@dataclass(frozen=True)
class Verify:
    """Make the Job that hashes the artifact again of an attempt that ended without a last word."""

    launch: Launch


@dataclass(frozen=True)
class RecordArtifact:
    """Make the StageArtifact of an attempt, from its last word.

    `spent` is what all attempts at its inputs have spent, and `price_sources` says where the prices
    come from.
    """

    launch: Launch
    word: LastWord
    spent: Spent
    price_sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measure:
    """Make the Job that runs one evaluation on a finished artifact."""

    # The stage's place in the chain, from 0.
    stage: int
    artifact: Artifact
    evaluation: Evaluation
    # The Job's name.
    job: str


@dataclass(frozen=True)
class RecordMetrics:
    """Add to the artifact's StageArtifact what such a Job has measured."""

    measure: Measure
    metrics: Mapping[str, float]
    # On how many pictures; None if the Job did not say.
    pictures: int | None = None


@dataclass(frozen=True)
class MakeClaim:
    """Make the chain's own claim for artifacts."""


@dataclass(frozen=True)
class MakeIndex:
    """Make the Job of this name, which indexes the chain's data. One that has failed is deleted
    first.
    """

    job: str


@dataclass(frozen=True)
class TakeShare:
    """Take the share of an input digest, so that no other chain on the same claim trains it."""

    digest: str


@dataclass(frozen=True)
class DropShare:
    """Give back the share of an input digest."""

    digest: str


Action = (
    Launch
    | Release
    | Stop
    | Discard
    | Verify
    | RecordArtifact
    | Measure
    | RecordMetrics
    | MakeClaim
    | MakeIndex
    | TakeShare
    | DropShare
)


def subject_of(action: Action) -> str:
    """What an action is about: an attempt or a job by its name, or an input digest."""
    match action:
        case Launch(attempt=attempt) | Release(attempt=attempt):
            return attempt.name
        case Verify(launch=launch) | RecordArtifact(launch=launch):
            return launch.attempt.name
        case (
            Stop(attempt=name)
            | Discard(name=name)
            | MakeIndex(job=name)
            | Measure(job=name)
            | RecordMetrics(measure=Measure(job=name))
        ):
            return name
        case TakeShare(digest=digest) | DropShare(digest=digest):
            return digest
        case MakeClaim():
            return ""


@dataclass(frozen=True)
class Decision:
    """What to do next: write `status` if `write` is set, else take `action` if there is one.

    `again` is the seconds until the next pass; None if only an event can change anything.
    """

    status: ChainStatus
    write: bool
    action: Action | None = None
    again: float | None = None
