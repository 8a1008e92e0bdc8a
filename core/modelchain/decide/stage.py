"""One stage in a pass: finished, waiting for an earlier stage, or to be trained. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from modelchain.api.contracts import FailureClass
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import AttemptStatus, StageStatus, State
from modelchain.decide import transitions
from modelchain.decide.attempt import after_resume, follow
from modelchain.decide.budget import planned, planned_alone
from modelchain.decide.ledger import account_if_due, closed, ended, whole
from modelchain.decide.measure import results
from modelchain.decide.observed import Artifact, Damage, Launch, Seen
from modelchain.decide.outcome import Outcome, Turn, failed, settled, stalled, unnumbered
from modelchain.decide.removed import counted_once, renamed_from
from modelchain.decide.verdict import why_missed
from modelchain.decide.waits import first_wait
from modelchain.gate.relaxation import Schedule
from modelchain.identity.digest import digest_of, stage_inputs

# With three digits for the number, a pod's name still fits into 63 characters.
MAX_ATTEMPTS = 999
# How soon to make another pass while a trainer that has finished its artifact still exits.
LEAVING_SECONDS = 0.2


def behind(turn: Turn, stage: StageStatus, blocked: str) -> Outcome:
    """A stage that waits for the earlier stage `blocked`."""
    return Outcome(transitions.behind(stage, waits_for(blocked), settled(turn, stage)))


def waits_for(stage: str) -> Reason:
    return Reason(Code.WAITS_FOR_STAGE, stage, f"waits for stage {stage}")


@dataclass(frozen=True)
class LookedUp:
    """What a stage is trained from, and what exists of it."""

    # With its epochs and input digest.
    stage: StageStatus
    inputs: Mapping[str, Any]
    found: Artifact | Damage | None
    # Why there is no artifact, if there is none.
    miss: Reason


def look_up(turn: Turn, stage: StageStatus) -> LookedUp:
    """The present inputs of a stage whose predecessors have all finished, and their artifact."""
    stage = _with_epochs(turn, stage)
    assert stage.epochs is not None
    inputs = _inputs(turn, stage.epochs)
    digest = digest_of(inputs)
    found = turn.observed.artifact(digest)
    # Before `of_inputs`, which drops what the miss is compared with.
    miss = _miss(turn, stage, digest, inputs, there=isinstance(found, Artifact))
    return LookedUp(transitions.of_inputs(stage, digest), inputs, found, miss)


def advance(turn: Turn, stage: StageStatus) -> Outcome:
    """The outcome of a stage whose predecessors have all finished."""
    looked_up = look_up(turn, stage)
    stage, found = looked_up.stage, looked_up.found
    turn = replace(turn, miss=looked_up.miss)
    if turn.handed_over is not None:
        stage = transitions.inheriting(stage, turn.handed_over)
    if isinstance(found, Artifact):
        return _finish(turn, stage, found)
    # Otherwise what was found is `Damage`, and must not be overwritten.
    if found is not None and found.stalls:
        return stalled(turn, stage, found.reason)
    if found is not None:
        return failed(turn, stage, FailureClass.CORRUPT_ARTIFACT, found.reason.message)
    if turn.held is not None and (turn.held.stops or not _runs(turn, stage)):
        return Outcome(transitions.behind(stage, turn.held.reason, settled(turn, stage)))
    return _train(turn, transitions.missed(stage), looked_up.inputs)


def _inputs(turn: Turn, epochs: int) -> dict[str, Any]:
    return stage_inputs(
        turn.chain.spec,
        turn.index,
        epochs=epochs,
        fingerprint=turn.observed.fingerprint,
        predecessor=turn.predecessor.digest if turn.predecessor else None,
    )


def _freezes(turn: Turn) -> bool:
    """Whether a launch fixes the stage's epochs, because the plan has allocated them."""
    return turn.chain.spec.stages[turn.index].epochs is None and not turn.alone


def _with_epochs(turn: Turn, stage: StageStatus) -> StageStatus:
    """The stage with its epochs: those it had under another name, if it was renamed.

    The plan would allocate it others, since other stages have epochs that a launch has fixed.
    """
    if not _freezes(turn) or stage.frozen or stage.attempts:
        return stage
    before = renamed_from(
        turn.observed.status, stage, lambda epochs: digest_of(_inputs(turn, epochs))
    )
    if before is None or before.epochs is None:
        return stage
    schedule = Schedule(before.epochs, before.round, before.first_epochs)
    if stage.epochs is not None and stage.round > before.round:  # a round began right before
        schedule = Schedule(stage.epochs, stage.round, schedule.first)
    return transitions.fixed(stage, schedule)


def _miss(
    turn: Turn, stage: StageStatus, digest: str, inputs: Mapping[str, Any], *, there: bool
) -> Reason:
    """Why there is no artifact of these inputs.

    The answer is found once, when the inputs are new, and is kept in the status. It compares them
    with the inputs of the attempt before, which may no longer be known later.
    """
    if stage.input_digest == digest and stage.code is Code.MISS and stage.message:
        first = stage.never_trained
        return Reason(Code.MISS, stage.name, stage.message, never_trained=first)
    if stage.input_digest == digest and _says_why_missed(stage):
        return Reason(Code.MISS, stage.name, stage.reason, bare=True)
    return why_missed(stage, digest, inputs, turn.observed.inputs, there=there)


def _says_why_missed(stage: StageStatus) -> bool:
    """Whether an older version, which stored no message, said why the stage is or was trained."""
    if not stage.reason_code:
        return stage.state is State.SUCCEEDED and stage.cache == "Miss"
    return stage.code is Code.MISS and stage.state is not State.PENDING


# -- a stage with an artifact ----------------------------------------------------------------------


def _finish(turn: Turn, stage: StageStatus, found: Artifact) -> Outcome:
    """The artifact of the stage's inputs exists. A trainer that still runs may exit by itself."""
    conflict = _conflict(turn, stage, found)
    if conflict is not None:
        return stalled(turn, stage, conflict)
    for attempt, seen in _makers(turn, stage):
        stage = after_resume(stage, attempt, seen)
    handed_over = _handed_over(turn, stage)
    leaving = _leaving(turn, stage)
    unchanged = Reason(Code.UNCHANGED, stage.name, "unchanged since it was trained")
    stage = transitions.finished(
        stage,
        counted_once(turn.observed.status, stage, found, alone=turn.alone),
        results(turn.chain.spec.evaluation, found),
        turn.miss if stage.cache == "Miss" else unchanged,
        [_closed(turn, stage, attempt) for attempt in stage.attempts],
        frozen=_freezes(turn),
        leaving=bool(leaving),
    )
    if leaving:
        again = min(LEAVING_SECONDS, turn.observed.poll_seconds)
        return Outcome(stage, again=again, wanted=leaving)
    return Outcome(stage, artifact=found, handed_over=handed_over)


def _makers(turn: Turn, stage: StageStatus) -> Iterator[tuple[AttemptStatus, Seen]]:
    """The stage's open attempts at its present inputs, each with what is seen of it.

    One of them made the artifact, unless the artifact was a hit.
    """
    for attempt in stage.attempts:
        if attempt.finished_at is None and attempt.input_digest == stage.input_digest:
            yield attempt, turn.observed.attempt(attempt.name)


def _conflict(turn: Turn, stage: StageStatus, found: Artifact) -> Reason | None:
    """Why a person must decide: an attempt made other weights than those that are recorded."""
    for attempt, seen in _makers(turn, stage):
        made = seen.word.left if seen.word else None
        if not seen.may_train and made not in (None, found.digest):
            return Reason(
                Code.DIGEST_CONFLICT,
                attempt.name,
                f"attempt {attempt.name} made weights {made}, but {found.digest} are recorded for"
                " the same inputs; keep those, or delete the record to train again",
            )
    return None


def _handed_over(turn: Turn, stage: StageStatus) -> float | None:
    """When the trainer ended that made the artifact. None unless this pass sees it first."""
    over = [pair for pair in _makers(turn, stage) if pair[1].started and not pair[1].may_train]
    return ended(*over[-1], turn.now) if over else None


def _leaving(turn: Turn, stage: StageStatus) -> frozenset[str]:
    """The attempts whose trainer has not exited yet."""
    return frozenset(
        attempt.name for attempt, seen in _makers(turn, stage) if seen.live and seen.may_train
    )


def _closed(turn: Turn, stage: StageStatus, attempt: AttemptStatus) -> AttemptStatus:
    """The attempt, closed if it has ended. The one that made the artifact has succeeded."""
    seen = turn.observed.attempt(attempt.name)
    if attempt.finished_at is not None:
        return attempt
    if seen.may_train:
        attempt = account_if_due(attempt, seen, turn.now)
        # One at other inputs is stopped. The status says so before its job is deleted.
        superseded = attempt.input_digest != stage.input_digest and attempt.uid is not None
        return transitions.stopped(attempt) if superseded else attempt
    made_it = attempt.input_digest == stage.input_digest and seen.started
    state = State.SUCCEEDED if made_it else State.SUSPENDED
    over = closed(attempt, seen, turn.now, state)
    return whole(stage, over) if made_it else over


# -- a stage without an artifact -------------------------------------------------------------------


def _train(turn: Turn, stage: StageStatus, inputs: Mapping[str, Any]) -> Outcome:
    """Follow the open attempt at these inputs. Without one, intend one once nothing prevents it."""
    if (last := _open_attempt(stage)) is not None:
        avoid = tuple(known.node for known in turn.avoid)
        stage = transitions.at_inputs(stage)
        launch = Launch(turn.index, last, inputs, turn.predecessor, avoid, turn.alone)
        return follow(turn, stage, launch)
    stage = transitions.booked(stage, settled(turn, stage))
    if stage.state is State.FAILED:  # until an edit or a retry
        return Outcome(stage)
    waiting = first_wait(turn, stage)
    return waiting if waiting is not None else _intend(turn, stage)


def _open_attempt(stage: StageStatus) -> AttemptStatus | None:
    """The stage's attempt at its present inputs that has not ended, if there is one."""
    last = stage.attempts[-1] if stage.attempts else None
    if last is None or last.finished_at is not None or last.input_digest != stage.input_digest:
        return None
    return last


def _runs(turn: Turn, stage: StageStatus) -> bool:
    """Whether an attempt at the stage's present inputs was launched and has not ended."""
    attempt = _open_attempt(stage)
    return attempt is not None and turn.observed.attempt(attempt.name).started


def _intend(turn: Turn, stage: StageStatus) -> Outcome:
    """The intent of a new attempt. Once it is in the status, a later decision launches it."""
    digest = stage.input_digest
    assert digest is not None
    name = unnumbered(turn, stage)
    number = 1 + max(stage.attempt_count, turn.observed.highest_number(name, digest))
    if number > MAX_ATTEMPTS:
        message = f"{MAX_ATTEMPTS} attempts were made; rename the stage to go on"
        return failed(turn, stage, FailureClass.ERROR, message)
    intent = AttemptStatus(
        name=f"{name}{number}",
        number=number,
        input_digest=digest,
        runner=turn.chain.spec.runner.kind if turn.observed.records else "Local",
        state=State.PENDING,
    )
    return Outcome(
        transitions.intended(
            transitions.with_plan(stage, planned(turn), planned_alone(turn)),
            intent,
            turn.miss,
            frozen=_freezes(turn),
        ),
        again=0.0,
        wanted=frozenset({intent.name}),
        shares=frozenset({digest}),
    )
