"""What a pass along the chain gives each stage, and what each stage gives back."""

from __future__ import annotations

from dataclasses import dataclass

from modelchain.api.contracts import FailureClass
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import ModelChain
from modelchain.api.status import AttemptStatus, AvoidedNode, StageStatus, State
from modelchain.decide import transitions
from modelchain.decide.ledger import closed
from modelchain.decide.observed import Action, Artifact, Observed

UNKNOWN_MISS = Reason(Code.MISS)


@dataclass(frozen=True)
class Turn:
    """One stage's turn in a pass: what is known of the chain and of the stages before it."""

    chain: ModelChain
    index: int
    observed: Observed
    # Seconds since the epoch.
    now: float
    # All stages had finished, or one had failed, and nothing was asked for since.
    finished: bool
    # A retry was asked for that no pass has answered yet.
    retried: bool
    # Why nothing may run: the chain is suspended, or the command was interrupted.
    stopping: Reason | None
    avoid: tuple[AvoidedNode, ...]
    # The predecessor's artifact, and when its trainer ended, if this pass has found that out.
    predecessor: Artifact | None = None
    handed_over: float | None = None
    # Why the stage has no artifact of its inputs.
    miss: Reason = UNKNOWN_MISS


@dataclass(frozen=True)
class Outcome:
    """What became of one stage, and what is due for it."""

    stage: StageStatus
    action: Action | None = None
    # Seconds until it must be looked at again; None if an event will tell.
    again: float | None = None
    # Attempts that may go on; all others are stopped.
    wanted: frozenset[str] = frozenset()
    # Input digests that stay reserved for this chain; all others are released.
    shares: frozenset[str] = frozenset()
    # The avoided nodes, where they have changed.
    avoid: tuple[AvoidedNode, ...] | None = None
    # Its artifact, once the stage has finished: then its successor has its turn.
    artifact: Artifact | None = None
    # When the trainer ended that made the artifact, if this pass has found that out.
    handed_over: float | None = None


def stalled(
    turn: Turn,
    stage: StageStatus,
    reason: Reason,
    *,
    wanted: frozenset[str] = frozenset(),
    shares: frozenset[str] = frozenset(),
) -> Outcome:
    """The stage waits for a person. It is looked at again, since no event tells of the mending."""
    stage = transitions.stalled(stage, reason)
    return Outcome(stage, again=turn.observed.poll_seconds, wanted=wanted, shares=shares)


def failed(turn: Turn, stage: StageStatus, failure: FailureClass, message: str) -> Outcome:
    reason = Reason(Code(failure), stage.name, message)
    return Outcome(transitions.failed(stage, reason, settled(turn, stage)))


def settled(turn: Turn, stage: StageStatus) -> list[AttemptStatus]:
    """The attempts of a stage that goes another way: those that have gone are closed as superseded,
    which charges no retry budget, and those that still run are marked as stopping.
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
        # Before anything is decided about it: a job that is stopped without this frees its name.
        return attempt.changed(uid=seen.uid)
    if not seen.there:
        price = turn.observed.price
        return closed(attempt, seen, turn.now, price, State.SUSPENDED, message="superseded")
    # Also if its inputs are asked for again before it has gone.
    return transitions.stopped(attempt) if seen.started else attempt
