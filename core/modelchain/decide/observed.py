"""What `decide` is given and what it answers: live reads in, one step out. The local runner and the
operator fill it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from modelchain.api.contracts import FailureClass, LastWord, Progress
from modelchain.api.reasons import Reason
from modelchain.api.status import AttemptStatus, ChainStatus, PodTime, Spent


@dataclass(frozen=True)
class Artifact:
    """A finished stage's record: on a laptop re-hashed and found whole, on a cluster its
    StageArtifact.
    """

    digest: str
    path: str
    macs: int
    metrics: Mapping[str, float]
    gpu_seconds: float = 0.0
    cost: str | None = None
    # `TRAINER_MATH` of the trainer that made it, where that is known.
    trainer_math: int | None = None

    @property
    def input_digest(self) -> str:
        """An artifact lies in a folder that is named by its input digest."""
        return self.path.split("/")[0]


@dataclass(frozen=True)
class Damage:
    """An artifact that exists and must not be used; it is never overwritten.

    `stalls`: a person has to decide, so the stage waits. Otherwise the stage has failed.
    """

    reason: Reason
    stalls: bool = False


@dataclass(frozen=True)
class Contact:
    """What asking rank 0 for its progress has told this process so far."""

    # When rank 0 last answered, in seconds since the epoch; None if it never did.
    answered: float | None = None
    # Since when it has not answered; None while it does.
    silent: float | None = None
    # Connections since its last answer that were accepted and stayed without one, and the seconds
    # from the first of them to the last.
    ignored: int = 0
    ignored_for: float = 0.0
    # Where it is asked.
    address: str = ""


@dataclass(frozen=True)
class Seen:
    """What is seen of one attempt.

    On a cluster an attempt's job is first `unreleased` (created, suspended), then `queued`
    (released, but a queue or the scheduler holds it), then live.
    """

    # It has a process, a pod that has not ended, or a job that may still make pods.
    live: bool
    # A process or a job of it exists or has existed.
    started: bool
    # Its last word, once it has ended.
    word: LastWord | None = None
    progress: Progress | None = None
    checkpoint_step: int = 0
    macs: int = 0
    gpu_seconds: float = 0.0
    uid: str | None = None
    unreleased: bool = False
    queued: bool = False
    # Why nothing runs yet, or why what it left is not recorded yet.
    waiting: Reason | None = None
    # Why a person has to act.
    stalled: Reason | None = None
    running: bool = False
    # What a wait is charged to if it lasts too long while it occupies nodes, and since when it
    # waits (seconds since the epoch).
    waits: tuple[FailureClass, float] | None = None
    # Why waiting longer cannot help.
    hopeless: tuple[FailureClass, str] | None = None
    # The job says that it succeeded. That alone is no evidence.
    succeeded: bool = False
    # What pods tell of a failure that left no last word.
    evidence: tuple[FailureClass, str] | None = None
    # The answer of the Job that hashes an artifact again whose last word was lost.
    verify: LastWord | Literal["Pending", "Unanswered"] | None = None
    # Running times by pod UID: of pods that exist, and of pods that are remembered (`gone_pods`).
    pods: Mapping[str, PodTime] = field(default_factory=dict)
    gone_pods: frozenset[str] = frozenset()
    # UIDs of pods whose container could not start.
    never_ran: frozenset[str] = frozenset()
    # Nodes whose own device failed, with a short name of the fault.
    bad_nodes: Mapping[str, str] = field(default_factory=dict)
    # Whether rank 0 answers when it is asked for its progress; None on a laptop.
    contact: Contact | None = None
    # Someone else suspended its job, and the job is in no queue.
    idle: bool = False

    @property
    def there(self) -> bool:
        """Created, queued or running."""
        return self.live or self.unreleased or self.queued or self.idle


@dataclass(frozen=True)
class Observed:
    """What one pass has read. The second half is there on a cluster alone."""

    status: ChainStatus
    artifact: Callable[[str], Artifact | Damage | None]
    attempt: Callable[[str], Seen]
    # Every attempt of the chain that has a process, a pod or an unfinished job, wanted or not.
    live: frozenset[str] = frozenset()
    # By input digest, the inputs of earlier work: they tell which field a miss is due to.
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fingerprint: str | None = None
    # A new value renews the retry budgets once.
    retry: str | None = None
    # Stop what runs and start nothing (Ctrl-C).
    interrupted: bool = False
    backoff_seconds: float = 10.0
    poll_seconds: float = 0.5
    # The highest attempt number that is known of a stage's name or an input digest: after a status
    # was lost, a name must not be used again.
    highest_number: Callable[[str, str], int] = lambda stage, digest: 0

    # A last word becomes an artifact when a StageArtifact records it.
    records: bool = False
    # Why nothing can be launched.
    obstacle: Reason | None = None
    # A pod that has not ended although its grace is over.
    stuck: Reason | None = None
    # By UID, unfinished jobs that no attempt in the status names.
    strays: Mapping[str, str] = field(default_factory=dict)
    # By UID, finished jobs that need not be kept.
    spent_jobs: Mapping[str, str] = field(default_factory=dict)
    # The chain's own claim does not exist yet.
    claim_missing: bool = False
    # Why the data is not there yet: a Job still fills its claim, or has failed.
    loading: Callable[[], Reason | None] = lambda: None
    # Who trains an input digest on a claim that several chains use: "" for no chain yet, "Mine", or
    # another chain's name; None where nothing is shared.
    share: Callable[[str], str | None] = lambda digest: None
    # The input digests that this chain has reserved.
    shares: frozenset[str] = frozenset()
    # The attempt's job would be made differently today.
    outdated: Callable[[Launch], bool] = lambda launch: False
    # The price of a GPU hour.
    price: str | None = None


@dataclass(frozen=True)
class Launch:
    """Start this attempt, whose intent the status already holds. On a cluster: make its job,
    suspended.
    """

    stage: int
    attempt: AttemptStatus
    inputs: Mapping[str, Any]
    predecessor: Artifact | None
    avoid: tuple[str, ...] = ()  # nodes it must not run on


@dataclass(frozen=True)
class Release:
    """Let the job run whose UID the status holds."""

    attempt: AttemptStatus


@dataclass(frozen=True)
class Stop:
    """End this attempt: checkpoint first, then exit. No budget is charged."""

    attempt: str


@dataclass(frozen=True)
class Discard:
    """Delete a job, by UID, that nothing needs: a late one, or one of the oldest that have
    finished.
    """

    uid: str
    name: str


@dataclass(frozen=True)
class Verify:
    """Have the artifact re-hashed whose attempt ended without a last word."""

    launch: Launch


@dataclass(frozen=True)
class RecordArtifact:
    """Write down what the attempt's last word says it left, and what all attempts at its inputs
    have spent.
    """

    launch: Launch
    word: LastWord
    spent: Spent


@dataclass(frozen=True)
class MakeClaim:
    """Make the claim that artifacts are kept on."""


@dataclass(frozen=True)
class TakeShare:
    """Claim an input digest for this chain, on a claim that others use, too."""

    digest: str


@dataclass(frozen=True)
class DropShare:
    digest: str


Action = (
    Launch | Release | Stop | Discard | Verify | RecordArtifact | MakeClaim | TakeShare | DropShare
)


@dataclass(frozen=True)
class Step:
    """Write `status` if `write`, else take `action`. `again`: seconds until the next look, None
    when at rest.
    """

    status: ChainStatus
    write: bool
    action: Action | None = None
    again: float | None = None
