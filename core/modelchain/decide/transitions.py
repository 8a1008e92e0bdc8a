"""Every way in which the status of a stage or of an attempt changes, by name.

The status is immutable: each function returns a changed copy. Nothing else copies one, so that the
fields which belong together change together.
"""

from __future__ import annotations

from collections.abc import Sequence

from modelchain.api.contracts import FailureClass, Progress
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import (
    ArtifactRef,
    AttemptStatus,
    Spent,
    StageStatus,
    State,
)
from modelchain.decide.ledger import KEPT_ATTEMPTS, open_spending, plus, timestamp
from modelchain.decide.observed import Artifact
from modelchain.decide.verdict import Verdict

# -- a stage and its inputs -----------------------------------------------------------------------


def planned(stage: StageStatus, *, epochs: int, macs: int, frozen: bool) -> StageStatus:
    """A stage at the beginning of a pass: the plan's figures, and no stall before one is found."""
    return stage.changed(epochs=epochs, planned_macs=macs, frozen=frozen, stalled=False)


def renewed(stage: StageStatus) -> StageStatus:
    """A stage that is asked for again: by an edit, a retry, or the command typed again."""
    return stage.changed(
        cache=None,
        reason="",
        reason_code="",
        next="",
        retries=0,
        disruptions=0,
        not_before=None,
        state=State.PENDING if stage.state is State.FAILED else stage.state,
    )


def of_inputs(stage: StageStatus, digest: str) -> StageStatus:
    """The stage with this input digest; what was known of other inputs does not hold for it."""
    if stage.input_digest != digest:
        stage = stage.changed(input_digest=digest, cache=None, results={})
    if not stage.attempts or stage.attempts[-1].input_digest != digest:
        stage = stage.changed(
            retries=0, disruptions=0, checkpoint_step=0, not_before=None, artifact=None
        )
    return stage


def missed(stage: StageStatus) -> StageStatus:
    """There is no artifact of its inputs."""
    return stage.changed(cache="Miss", artifact=None, results={})


# -- what a stage does ----------------------------------------------------------------------------


def explained(stage: StageStatus, reason: Reason) -> StageStatus:
    return stage.changed(reason=reason.text, reason_code=reason.code, next=reason.next)


def waiting(stage: StageStatus, reason: Reason) -> StageStatus:
    return explained(idle(stage), reason)


def idle(stage: StageStatus) -> StageStatus:
    """The stage does nothing; what is said of it stays, or is said next."""
    return stage.changed(state=State.PENDING, progress=None)


def waiting_for_another_chain(stage: StageStatus, reason: Reason) -> StageStatus:
    return explained(stage.changed(state=State.QUEUED, cache=None, progress=None), reason)


def stalled(stage: StageStatus, reason: Reason) -> StageStatus:
    """The stage waits for a person."""
    state = State.PENDING if stage.state in (State.SUCCEEDED, State.FAILED) else stage.state
    return explained(stage.changed(state=state, stalled=True), reason)


def starting(stage: StageStatus, reason: Reason, *, stalled: bool = False) -> StageStatus:
    return explained(stage.changed(state=State.STARTING, stalled=stalled), reason)


def stopping(stage: StageStatus, attempt: AttemptStatus, state: State, why: str) -> StageStatus:
    """The stage's attempt was asked to stop, and still exists."""
    reason = Reason(Code.STOPPING, attempt.name, f"stopping: {why}")
    return explained(with_newest(stage, attempt).changed(state=state), reason)


def suspended(stage: StageStatus, reason: Reason) -> StageStatus:
    return explained(stage.changed(state=State.SUSPENDED, progress=None, inherits_at=None), reason)


def behind(stage: StageStatus, reason: Reason, attempts: list[AttemptStatus]) -> StageStatus:
    """A stage that waits for an earlier one, with its attempts as they are now."""
    stage = booked(stage, attempts)
    stage = stage.changed(
        input_digest=None,
        cache=None,
        artifact=None,
        results={},
        progress=None,
        inherits_at=None,
    )
    if stage.state is State.FAILED:
        return stage
    return explained(stage.changed(state=State.PENDING), reason)


def failed(stage: StageStatus, reason: Reason, attempts: list[AttemptStatus]) -> StageStatus:
    stage = booked(stage, attempts)
    stage = stage.changed(state=State.FAILED, progress=None, inherits_at=None)
    return explained(stage, reason)


def finished(
    stage: StageStatus,
    found: Artifact,
    reason: Reason,
    attempts: list[AttemptStatus],
    *,
    frozen: bool,
    leaving: bool,
) -> StageStatus:
    """The stage of this artifact. `leaving`: the trainer that made it has not exited yet.

    Without an attempt of its own, a stage shows what its record says was spent.
    """
    trained_before = stage.trained if stage.last_digest == stage.input_digest else Spent()
    booked_stage = booked(stage, attempts)
    if stage.last_digest != stage.input_digest:
        booked_stage = booked_stage.changed(trained=trained_before)
    if not stage.attempts:
        booked_stage = booked_stage.changed(
            macs=found.macs, gpu_seconds=found.gpu_seconds, cost=found.cost
        )
    return explained(
        booked_stage.changed(
            state=State.VERIFYING if leaving else State.SUCCEEDED,
            cache=stage.cache or "Hit",
            last_digest=stage.input_digest,
            frozen=frozen,
            artifact=ArtifactRef(
                path=found.path, digest=found.digest, trainer_math=found.trainer_math
            ),
            results={name: f"{value:.2f}" for name, value in found.metrics.items()},
            progress=None,
            not_before=None,
            inherits_at=None,
        ),
        reason,
    )


# -- a stage and its attempts ---------------------------------------------------------------------


def with_attempts(stage: StageStatus, attempts: Sequence[AttemptStatus]) -> StageStatus:
    """The stage with these attempts; its figures are the ledger and what the open one has spent."""
    running = open_spending(stage.spent, attempts)
    return stage.changed(
        attempts=list(attempts),
        macs=running.macs,
        gpu_seconds=running.gpu_seconds,
        cost=running.cost,
    )


def with_newest(stage: StageStatus, attempt: AttemptStatus) -> StageStatus:
    return with_attempts(stage, [*stage.attempts[:-1], attempt])


def booked(stage: StageStatus, attempts: Sequence[AttemptStatus]) -> StageStatus:
    """The stage with these attempts; those that were closed in this pass enter its ledger, once."""
    was_open = {a.name for a in stage.attempts if a.finished_at is None}
    over = [a for a in attempts if a.finished_at is not None and a.name in was_open]
    stage = stage.changed(
        spent=plus(stage.spent, over),
        trained=plus(stage.trained, [a for a in over if a.input_digest == stage.last_digest]),
    )
    return with_attempts(stage, attempts[-KEPT_ATTEMPTS:])


def intended(
    stage: StageStatus, intent: AttemptStatus, reason: Reason, *, frozen: bool
) -> StageStatus:
    """The stage with the intent of a new attempt."""
    before = [a for a in stage.attempts if a.input_digest == intent.input_digest]
    same_inputs = intent.input_digest == stage.last_digest
    trained = stage.trained if same_inputs else plus(Spent(), before)
    stage = booked(stage, [*stage.attempts, intent]).changed(trained=trained)
    return explained(
        stage.changed(
            state=State.STARTING,
            attempt_count=intent.number,
            last_digest=intent.input_digest,
            frozen=frozen,
            not_before=None,
            progress=None,
        ),
        reason,
    )


def identified(stage: StageStatus, attempt: AttemptStatus, uid: str, now: float) -> StageStatus:
    """The attempt has a job, and is known by its UID from now on.

    The time since the predecessor's trainer ended is the transition of the stage, in seconds.
    """
    if stage.inherits_at is not None:
        taken = round(max(0.0, now - stage.inherits_at), 3)
        stage = stage.changed(inherits_at=None, transition_seconds=taken)
    return with_newest(stage, attempt.changed(uid=uid))


def verifying(stage: StageStatus, attempt: AttemptStatus) -> StageStatus:
    """The attempt has ended, and its artifact is not recorded yet."""
    stage = with_newest(stage, attempt.changed(state=State.VERIFYING))
    return stage.changed(state=State.VERIFYING, progress=None)


def watched(
    stage: StageStatus,
    attempt: AttemptStatus,
    state: State,
    reason: Reason,
    progress: Progress | None,
) -> StageStatus:
    """A released attempt: in a queue, starting or running."""
    stage = with_newest(stage, attempt)
    return explained(stage.changed(state=state, progress=progress), reason)


def after(
    stage: StageStatus,
    closed: AttemptStatus,
    verdict: Verdict,
    now: float,
    backoff: float,
    stopping: Reason | None,
) -> StageStatus:
    """The stage after its newest attempt was judged: it resumes, waits, is retried or has failed.

    Args:
        closed: that attempt, closed.
        now: seconds since the epoch.
        backoff: seconds until the first retry; doubled for each one more, up to 64 times.
        stopping: why nothing may run, if so.
    """
    stage = booked(stage, [*stage.attempts[:-1], closed]).changed(
        progress=None,
        checkpoint_step=verdict.checkpoint_step,
        retries=verdict.retries,
        disruptions=verdict.disruptions,
    )
    if verdict.stopped:
        resumes = Reason(Code.RESUMES, message="goes on from its newest checkpoint")
        state = State.SUSPENDED if stopping else State.PENDING
        return explained(stage.changed(state=state), stopping or resumes)
    code = Code(verdict.failure)
    if verdict.final is not None:
        reason = Reason(code, closed.name, verdict.final)
        return explained(stage.changed(state=State.FAILED), reason)
    wait = backoff * 2 ** min(verdict.retries - 1, 6) if verdict.pays_retry else 0.0
    known = stage.retried.get(verdict.failure, 0)
    stage = stage.changed(
        state=State.PENDING,
        not_before=now + wait,
        retried={**stage.retried, verdict.failure: known + 1},
    )
    return explained(stage, Reason(code, closed.name, f"{verdict.message}; tries again"))


# -- an attempt -----------------------------------------------------------------------------------


def stopped(attempt: AttemptStatus, message: str | None = None) -> AttemptStatus:
    """The attempt is asked to stop; no budget is charged for its end."""
    if message is None:
        return attempt.changed(state=State.SUSPENDED)
    return attempt.changed(state=State.SUSPENDED, message=message)


def ending(attempt: AttemptStatus, deadline: FailureClass, message: str) -> AttemptStatus:
    """The attempt is ended, since it has passed a deadline."""
    return attempt.changed(ending=deadline, message=message)


def at_work(attempt: AttemptStatus, *, queued: bool, now: float) -> AttemptStatus:
    """A released attempt; it starts when it first leaves its queue."""
    started = attempt.started_at or (None if queued else timestamp(now))
    state = State.QUEUED if queued else State.RUNNING
    return attempt.changed(state=state, started_at=started)
