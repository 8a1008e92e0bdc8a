"""The status of a chain: the ledger, the same shape on a cluster and on a laptop (DESIGN section 11)."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from modelchain.contracts import FailureClass, Progress
from modelchain.spec import Record


class State(StrEnum):
    PENDING = "Pending"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    VERIFYING = "Verifying"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUSPENDED = "Suspended"


class AttemptStatus(Record):
    """One launch of a stage. Immutable in name and digest; a retry is another attempt."""

    name: str
    number: int
    input_digest: str
    state: State
    failure: FailureClass | None = None
    message: str = ""
    started_at: str | None = None
    finished_at: str | None = None
    gpu_seconds: float = 0.0
    macs: int = 0


class ArtifactRef(Record):
    """`path` is relative to the root, `digest` the SHA-256 of the weights."""

    path: str
    digest: str


class StageStatus(Record):
    name: str
    state: State = State.PENDING
    reason: str = ""
    input_digest: str | None = None
    last_digest: str | None = None  # that it was last finished or launched with, kept while it waits
    cache: Literal["Hit", "Miss"] | None = None
    epochs: int | None = None
    frozen: bool = False
    attempts: list[AttemptStatus] = []
    attempt_count: int = 0
    retries: int = 0
    disruptions: int = 0
    checkpoint_step: int = 0
    not_before: float | None = None
    progress: Progress | None = None
    results: dict[str, str] = {}
    macs: int = 0
    gpu_seconds: float = 0.0
    cost: str | None = None
    artifact: ArtifactRef | None = None


class Condition(Record):
    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str
    last_transition_time: str


class Total(Record):
    macs: int = 0
    gpu_seconds: float = 0.0
    cost: str | None = None


class ChainStatus(Record):
    observed_generation: int = -1
    conditions: list[Condition] = []
    stages: list[StageStatus] = []
    total: Total = Total()
    retry: str | None = None

    @property
    def epochs(self) -> dict[str, int]:
        """Of every stage whose epochs are settled, by name."""
        return {s.name: s.epochs for s in self.stages if s.epochs is not None}

    @property
    def frozen_epochs(self) -> dict[str, int]:
        """By stage, allocated epochs that a launch has fixed (RULES section 1)."""
        return {s.name: s.epochs for s in self.stages if s.frozen and s.epochs is not None}

    def condition(self, kind: str) -> Condition | None:
        return next((c for c in self.conditions if c.type == kind), None)

    def is_true(self, kind: str) -> bool:
        found = self.condition(kind)
        return found is not None and found.status == "True"
