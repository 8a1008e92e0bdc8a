"""`Turn` and `Outcome`: what each stage is given in a pass, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

from modelchain.api.contracts import FailureClass
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import ModelChain
from modelchain.api.status import (
    AttemptStatus,
    AvoidedNode,
    RelaxationRound,
    StageLedger,
    StageStatus,
    State,
)
from modelchain.decide import transitions
from modelchain.decide.ledger import account_if_due, closed
from modelchain.decide.observed import Action, Artifact, Observed
from modelchain.plan.plan import Plan

UNKNOWN_MISS = Reason(Code.MISS)


@dataclass(frozen=True)
class Hold:
    """Why later stages may not be launched, although an earlier one has finished."""

    reason: Reason
    # What runs already is stopped, too.
    stops: bool


@dataclass(frozen=True)
class Turn:
    """One stage's turn in a pass: what is known of the chain and of the stages before it."""

    chain: ModelChain
    index: int
    observed: Observed
    # Seconds since the epoch.
    now: float
    # All stages had finished, or one had failed, and no edit or retry has come since.
    finished: bool
    # A retry was asked for, and no pass has acted on it yet.
    retried: bool
    # Why nothing may run: the chain is suspended, or the command was interrupted.
    stopping: Reason | None
    # With the epochs that the stages have now, and the hours and prices of the chain's pool.
    plan: Plan
    avoid: tuple[AvoidedNode, ...]
    # The predecessor's artifact; None for the first stage.
    predecessor: Artifact | None = None
    # When the predecessor's trainer ended, if it is this pass that has found that out.
    handed_over: float | None = None
    # The stage's model is trained alone, as a baseline.
    alone: bool = False
    # Why nothing may be launched after the stages before; None if it may.
    held: Hold | None = None
    # Why no artifact of the stage's inputs exists.
    miss: Reason = UNKNOWN_MISS


@dataclass(frozen=True)
class Outcome:
    """What became of one stage, and what is due for it."""

    stage: StageStatus
    action: Action | None = None
    # Seconds until the stage needs another pass; None if an event will cause one.
    again: float | None = None
    # Attempts that may go on; all others are stopped.
    wanted: frozenset[str] = frozenset()
    # Input digests that stay reserved for this chain; all others are released.
    shares: frozenset[str] = frozenset()
    # The avoided nodes, where they have changed.
    avoid: tuple[AvoidedNode, ...] | None = None
    # The stage's artifact once the stage has finished. Then its successor has its turn.
    artifact: Artifact | None = None
    # The names of evaluation Jobs that are still needed; all others are deleted.
    jobs: frozenset[str] = frozenset()
    # When the trainer ended, if it is this pass that has found that out.
    handed_over: float | None = None
    # Why no later stage may be launched, although this one has finished; None if they may.
    holds: Hold | None = None
    # It is that of a baseline.
    alone: bool = False
    # The round of relaxation that the stage begins, as it missed its baseline.
    begins: RelaxationRound | None = None


def unnumbered(turn: Turn, stage: StageLedger) -> str:
    """The name of the stage's attempts without their number."""
    return f"{turn.chain.metadata.name}-{stage.name}-{'b' if turn.alone else 'a'}"


def stalled(
    turn: Turn,
    stage: StageStatus,
    reason: Reason,
    *,
    wanted: frozenset[str] = frozenset(),
) -> Outcome:
    """The stage waits until a person acts. It is polled, since what they do may send no event."""
    stage = transitions.stalled(stage, reason)
    return Outcome(stage, again=turn.observed.poll_seconds, wanted=wanted)


def failed(turn: Turn, stage: StageStatus, failure: FailureClass, message: str) -> Outcome:
    """The stage has failed without an attempt that could be judged."""
    reason = Reason(Code(failure), stage.name, message)
    return Outcome(transitions.failed(stage, reason, settled(turn, stage)))


def settled(turn: Turn, stage: StageLedger) -> list[AttemptStatus]:
    """The attempts of a stage that does not need them any more, for example after an edit.

    Those that have ended are closed as superseded, which charges no budget. Those that still run
    are marked as stopping.
    """
    attempts = []
    for attempt in stage.attempts:
        if attempt.finished_at is None:
            attempt = _settled(turn, attempt)
        attempts.append(attempt)
    return attempts


def _settled(turn: Turn, attempt: AttemptStatus) -> AttemptStatus:
    seen = turn.observed.attempt(attempt.name)
    if attempt.uid is None and seen.uid is not None:
        # First the UID must be in the status. If the job were stopped now and the operator died,
        # the attempt would look like an intent, and its job would be made again.
        return transitions.with_job(attempt, seen)
    if not seen.there:
        return closed(attempt, seen, turn.now, State.SUSPENDED, message="superseded")
    attempt = account_if_due(attempt, seen, turn.now)
    # It stays stopped, even if an edit asks for its inputs again before it has ended.
    return transitions.stopped(attempt) if seen.started else attempt
