"""What `decide` sees and says: live reads in, one step out. Filled by the local runner and by the
operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from modelchain.api.contracts import FailureClass, LastWord, Progress
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
    trainer_math: int | None = (
        None  # `TRAINER_MATH` of the trainer that made it, where that is known
    )

    @property
    def input_digest(self) -> str:
        """The folder it lies in is named by it (RULES section 8)."""
        return self.path.split("/")[0]


@dataclass(frozen=True)
class Damage:
    """An artifact that is there and must not be used: it is never overwritten. `stalls`: it waits
    for somebody.
    """

    message: str
    stalls: bool = False


@dataclass(frozen=True)
class Contact:
    """What came of asking rank 0 for its progress, as far as this process knows.

    `answered`: when it last answered (seconds since the epoch); None if never. `silent`: since when
    nothing came back, None while it answers. `ignored`: connections that were accepted and stayed
    unanswered since it last answered, and the seconds from the first of them to the last.
    `address`: where it is asked.
    """

    answered: float | None = None
    silent: float | None = None
    ignored: int = 0
    ignored_for: float = 0.0
    address: str = ""


@dataclass(frozen=True)
class Seen:
    """What is seen of one attempt.

    On a cluster its job is first `held` (made suspended, not yet released), then `queued`
    (released, nothing runs: a queue holds it, or its pods are not scheduled), then live. `waiting`
    says why nothing runs yet, or why what it left is not recorded, `stalled` that somebody must
    act, `hopeless` that waiting cannot help, `waits` what it is charged to if it waits too long
    while it holds its nodes, and since when (seconds since the epoch). `succeeded` is the job's own
    word, which is no evidence; `evidence` is what pods say of a failure that left no last word.
    `verify`: how far the re-hashing of an artifact is whose last word was lost. `idle`: somebody
    else suspended its job, which is in no queue.

    `pods` are the running times by UID, of pods that are there and of those that are remembered
    (`gone_pods`); `never_ran` are those whose container could not start. `bad_nodes` are nodes
    whose own device failed, with what was wrong. `contact` says whether rank 0 answers when it is
    asked for its progress; None on a laptop.
    """

    live: bool
    started: bool
    word: LastWord | None = None
    progress: Progress | None = None
    checkpoint_step: int = 0
    macs: int = 0
    gpu_seconds: float = 0.0
    uid: str | None = None
    held: bool = False
    queued: bool = False
    waiting: str = ""
    stalled: str = ""
    running: bool = False
    waits: tuple[FailureClass, float] | None = None
    hopeless: tuple[FailureClass, str] | None = None
    succeeded: bool = False
    evidence: tuple[FailureClass, str] | None = None
    verify: LastWord | Literal["Pending", "Unanswered"] | None = None
    pods: Mapping[str, PodTime] = field(default_factory=dict)
    never_ran: frozenset[str] = frozenset()
    gone_pods: frozenset[str] = frozenset()
    bad_nodes: Mapping[str, str] = field(default_factory=dict)
    contact: Contact | None = None
    idle: bool = False

    @property
    def there(self) -> bool:
        """Something runs, or would."""
        return self.live or self.held or self.queued or self.idle


@dataclass(frozen=True)
class Observed:
    """Live reads. `live` names every attempt of this chain that has a process, pod or unfinished
    job, wanted or not.

    `interrupted`: stop what runs and start nothing (Ctrl-C). `inputs`: by input digest, what is
    known of earlier work, to say which field a miss is owed to. `retry`: a new value renews budgets
    once. `highest_number`: the highest attempt number the world remembers for a stage's name or an
    input digest; a lost status must not make a name again.

    Of a cluster: `records`: a last word becomes an artifact by being recorded. `obstacle`: why
    nothing can be launched, `stuck`: a pod that does not go though its time is over; both begin
    with their reason. `strays`: unfinished jobs, by UID, that no intent and no UID in the status
    names. `spent_jobs`: finished jobs that need not be kept. `claim_missing`: the chain's own claim
    is still to be made. `loading`: who still fills the claim of data, beginning with its reason,
    and whether somebody must act. `share`: who holds an input digest on a claim that chains share:
    "" nobody, "Mine", or a name; None where nothing is shared. `shares`: the digests of shares this
    chain holds. `outdated`: the attempt's job would be made otherwise today. `price`: of a GPU
    hour.
    """

    status: ChainStatus
    artifact: Callable[[str], Artifact | Damage | None]
    attempt: Callable[[str], Seen]
    live: frozenset[str] = frozenset()
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fingerprint: str | None = None
    retry: str | None = None
    interrupted: bool = False
    backoff_seconds: float = 10.0
    poll_seconds: float = 0.5
    highest_number: Callable[[str, str], int] = lambda stage, digest: 0
    records: bool = False
    obstacle: str = ""
    stuck: str = ""
    strays: Mapping[str, str] = field(default_factory=dict)
    spent_jobs: Mapping[str, str] = field(default_factory=dict)
    claim_missing: bool = False
    loading: Callable[[], tuple[str, bool]] = lambda: ("", False)
    share: Callable[[str], str | None] = lambda digest: None
    outdated: Callable[[Launch], bool] = lambda launch: False
    shares: frozenset[str] = frozenset()
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
