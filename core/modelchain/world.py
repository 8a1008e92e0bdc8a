"""What `decide` sees and says: live reads in, one step out. Filled by the local runner and by the operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelchain.contracts import LastWord, Progress
from modelchain.status import AttemptStatus, ChainStatus


@dataclass(frozen=True)
class Artifact:
    """A finished stage's record, re-hashed and found whole."""

    digest: str
    path: str
    macs: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Damage:
    """An artifact that is there and does not match its manifest: it is never used and never overwritten."""

    message: str


@dataclass(frozen=True)
class Seen:
    """What is seen of one attempt."""

    live: bool
    started: bool
    word: LastWord | None = None
    progress: Progress | None = None
    checkpoint_step: int = 0
    macs: int = 0
    gpu_seconds: float = 0.0


@dataclass(frozen=True)
class Observed:
    """Live reads. `live` names every attempt of this chain that has a process or pod, wanted or not.

    `interrupted`: stop what runs and start nothing (Ctrl-C). `inputs`: by input digest, what is known of earlier work,
    to say which field a miss is owed to. `retry`: a new value renews budgets once. `highest_number`: the highest
    attempt number the world remembers for a stage's name or an input digest; a lost status must not make a name again.
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
    highest_number: Callable[[str, str], int] = lambda stage, digest: 0


@dataclass(frozen=True)
class Launch:
    """Start this attempt, whose intent the status already holds."""

    stage: int
    attempt: AttemptStatus
    inputs: Mapping[str, Any]
    predecessor: Artifact | None


@dataclass(frozen=True)
class Stop:
    """End this attempt: checkpoint first, then exit. No budget is charged."""

    attempt: str
    why: str


@dataclass(frozen=True)
class Step:
    """Write `status` if `write`, else take `action`. `again`: seconds until the next look, None when at rest."""

    status: ChainStatus
    write: bool
    action: Launch | Stop | None = None
    again: float | None = None
