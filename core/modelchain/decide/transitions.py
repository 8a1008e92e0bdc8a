"""Every change of the status of a stage or of an attempt, each as a function with a name.

A status is immutable, so each function returns a changed copy. So fields that belong together are
always changed together. Elsewhere only `ledger` and `conditions` make such copies: they fill in
figures and shorten texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from modelchain.api.contracts import FailureClass, Progress
from modelchain.api.messages import shortened
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import (
    MOST_DIGESTS,
    MOST_ROUNDS,
    ArtifactRef,
    AttemptStatus,
    GateStatus,
    Planned,
    Spent,
    SpentAt,
    StageLedger,
    StageStatus,
    State,
    Total,
    Unmeasured,
)
from modelchain.api.uses import Resumed
from modelchain.decide.ledger import (
    KEPT_ATTEMPTS,
    MESSAGE_LENGTH,
    added,
    end_of_queue,
    plus,
    spent_on,
    timestamp,
    total_of,
    with_open,
)
from modelchain.decide.observed import Artifact, Seen
from modelchain.decide.settle import all_settled, moved, settled
from modelchain.decide.verdict import Verdict
from modelchain.gate.relaxation import Schedule

# A stage, or a removed one.
Ledger = TypeVar("Ledger", bound=StageLedger)

# -- a stage and its inputs -----------------------------------------------------------------------


def planned(stage: StageStatus, schedule: Schedule, *, macs: int, frozen: bool) -> StageStatus:
    """A stage at the beginning of a pass, with the plan's figures.

    It is not stalled until the pass finds a reason, so that a stall ends when its reason is gone.
    """
    return scheduled(stage, schedule).changed(planned_macs=macs, frozen=frozen, stalled=False)


def foreseen(stage: StageStatus, plan: Planned, alone: Planned) -> StageStatus:
    """A stage that was never launched, with the plan of now. A finished one keeps what it has."""
    keeps = stage.state is State.SUCCEEDED and stage.plan is not None
    return stage if stage.attempt_count or keeps else stage.changed(plan=plan, alone=alone)


def scheduled(stage: StageStatus, schedule: Schedule) -> StageStatus:
    """The stage with these epochs. A later round replaces the inputs of its last training."""
    digest = stage.last_digest
    if digest and schedule.round > stage.round and digest not in stage.replaced:
        stage = stage.changed(replaced=[*stage.replaced, digest][-MOST_ROUNDS:])
    return stage.changed(
        epochs=schedule.epochs, round=schedule.round, first_epochs=schedule.first_epochs
    )


def fixed(stage: StageStatus, schedule: Schedule) -> StageStatus:
    """The stage with these epochs, which a later plan does not change."""
    return scheduled(stage, schedule).changed(frozen=True)


def inheriting(stage: StageStatus, ended: float) -> StageStatus:
    """The stage follows directly on its predecessor, whose trainer ended at this time."""
    return stage.changed(inherits_at=ended)


def renewed(stage: StageStatus) -> StageStatus:
    """A stage that is asked for again: by an edit, a retry, or the command typed again."""
    return without_reason(stage).changed(
        cache=None,
        retries=0,
        disruptions=0,
        not_before=None,
        state=State.PENDING if stage.state is State.FAILED else stage.state,
    )


def of_inputs(stage: StageStatus, digest: str) -> StageStatus:
    """The stage with this input digest. What was known of other inputs is dropped."""
    if stage.input_digest != digest:
        stage = stage.changed(input_digest=digest, cache=None, results={}, gate=None)
    # While a stage waits for an earlier one, it has no input digest. If it then gets the one of its
    # last attempt again, it keeps its budgets and its checkpoint.
    if not stage.attempts or stage.attempts[-1].input_digest != digest:
        stage = stage.changed(
            retries=0, disruptions=0, checkpoint_step=0, not_before=None, artifact=None
        )
    return stage


def missed(stage: StageStatus) -> StageStatus:
    """A stage for whose inputs no artifact exists."""
    return stage.changed(cache="Miss", artifact=None, results={}, gate=None)


# -- a finished stage and its baseline ------------------------------------------------------------


def judged(stage: StageStatus, found: GateStatus | None) -> StageStatus:
    """The finished stage with the gate's verdict; None without a gate."""
    return stage.changed(gate=found)


def relaxed(stage: StageStatus, reason: Reason) -> StageStatus:
    """The stage missed its baseline, and gets more epochs in the next pass."""
    return explained(idle(stage), reason)


def held_by_the_gate(stage: StageStatus, reason: Reason) -> StageStatus:
    """The stage, and later ones with it, wait for a person. If it has an artifact, it keeps it."""
    return explained(stage.changed(stalled=True), reason)


def dropped(baseline: StageStatus, attempts: list[AttemptStatus]) -> StageStatus:
    """A baseline that the gate asks for no longer. What it has spent stays in the status."""
    done = baseline.state is State.SUCCEEDED
    return without_reason(booked(baseline, attempts)).changed(
        state=State.SUCCEEDED if done else State.PENDING,
        stalled=False,
        progress=None,
        not_before=None,
    )


# -- what a stage does ----------------------------------------------------------------------------


def explained(stage: StageStatus, reason: Reason) -> StageStatus:
    """The stage with this reason for its state."""
    return stage.changed(
        reason=reason.text,
        reason_code=reason.code,
        next=reason.next,
        message="" if reason.bare else reason.message,
        stops_first=reason.stops_first,
        never_trained=reason.never_trained,
    )


def without_reason(stage: StageStatus) -> StageStatus:
    """The stage with nothing said of its state."""
    return as_told_before(stage, StageStatus(name=stage.name, stalled=stage.stalled))


def waiting(stage: StageStatus, reason: Reason) -> StageStatus:
    return explained(idle(stage), reason)


def idle(stage: StageStatus) -> StageStatus:
    """The stage does nothing. Its reason stays; the caller may set another."""
    return stage.changed(state=State.PENDING, progress=None)


def not_launched(stage: StageStatus, reason: Reason) -> StageStatus:
    """The stage has an intent, which is not launched while nothing of the chain may run."""
    return explained(stage.changed(state=State.SUSPENDED), reason)


def indexing(stage: StageStatus, reason: Reason) -> StageStatus:
    """The stage's data is indexed before its first attempt."""
    return explained(stage.changed(state=State.INDEXING, progress=None), reason)


def waiting_for_another_chain(stage: StageStatus, reason: Reason) -> StageStatus:
    return explained(stage.changed(state=State.QUEUED, cache=None, progress=None), reason)


def stalled(stage: StageStatus, reason: Reason) -> StageStatus:
    """The stage waits until a person acts. A state that says that it has ended would be wrong."""
    state = State.PENDING if stage.state in (State.SUCCEEDED, State.FAILED) else stage.state
    return explained(stage.changed(state=state, stalled=True), reason)


def as_told_before(stage: StageStatus, before: StageStatus) -> StageStatus:
    """The stage with the reason that it had before, whatever it does now."""
    return stage.changed(
        reason=before.reason,
        reason_code=before.reason_code,
        next=before.next,
        message=before.message,
        stops_first=before.stops_first,
        never_trained=before.never_trained,
        stalled=before.stalled,
    )


def starting(stage: StageStatus, reason: Reason) -> StageStatus:
    return explained(stage.changed(state=State.STARTING), reason)


def stopping(stage: StageStatus, attempt: AttemptStatus, state: State, why: str) -> StageStatus:
    """The stage's attempt was asked to stop and has not ended yet."""
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
        gate=None,
        progress=None,
        inherits_at=None,
    )
    if stage.state is State.FAILED:  # it stays failed, with its own reason
        return stage
    return explained(stage.changed(state=State.PENDING), reason)


def failed(stage: StageStatus, reason: Reason, attempts: list[AttemptStatus]) -> StageStatus:
    stage = booked(stage, attempts)
    stage = stage.changed(state=State.FAILED, progress=None, inherits_at=None)
    return explained(stage, reason)


def finished(
    stage: StageStatus,
    found: Artifact,
    metrics: Mapping[str, float],
    reason: Reason,
    attempts: list[AttemptStatus],
    *,
    frozen: bool,
    leaving: bool,
) -> StageStatus:
    """The stage with its artifact. `leaving`: the trainer that made it has not exited yet.

    If the stage has not trained these inputs itself, it shows what their training has cost.
    """
    booked_stage = work_settled(booked(_with_reused(at_inputs(stage), found), attempts))
    return explained(
        booked_stage.changed(
            state=State.VERIFYING if leaving else State.SUCCEEDED,
            cache=stage.cache or "Hit",
            frozen=frozen,
            artifact=ArtifactRef(
                path=found.path, digest=found.digest, trainer_math=found.trainer_math
            ),
            results={name: f"{value:.2f}" for name, value in metrics.items()},
            progress=None,
            not_before=None,
            inherits_at=None,
        ),
        reason,
    )


def _with_reused(stage: StageStatus, found: Artifact) -> StageStatus:
    """The stage with what the artifact that it has found has cost, counted once."""
    digest, cost = found.input_digest, spent_on(found)
    listed = {a.input_digest for a in stage.attempts} | {at.input_digest for at in stage.reused}
    here = stage.last_digest == digest and stage.trained != Spent()
    if cost == Spent() or here or digest in listed:
        return stage
    return stage.changed(reused=_bounded([*stage.reused, SpentAt(input_digest=digest, spent=cost)]))


def _bounded(reused: list[SpentAt]) -> list[SpentAt]:
    """As many entries as a status may hold. If there are more, the oldest ones are summed up."""
    over = reused[: max(1, len(reused) - MOST_DIGESTS + 1)]
    if len(over) < 2:
        return reused
    total = Spent(**added(at.spent for at in over))
    return [SpentAt(input_digest=over[-1].input_digest, spent=total), *reused[len(over) :]]


def unmeasured(stage: StageStatus, told: Sequence[tuple[str, Reason]]) -> StageStatus:
    """The stage with the evaluations whose metrics are not known, each with the reason why not."""
    entries = [
        Unmeasured(
            evaluation=name,
            reason_code=reason.code,
            reason=shortened(reason.message, MESSAGE_LENGTH),
            next=reason.next if reason.message else "",
        )
        for name, reason in told
    ]
    return stage.changed(unmeasured=entries)


# -- a stage and its attempts ---------------------------------------------------------------------


def with_attempts(stage: Ledger, attempts: Sequence[AttemptStatus]) -> Ledger:
    """The stage with these attempts, and with the figures that follow from them."""
    reused = [at.spent for at in stage.reused]
    spent = added([*with_open(stage.spent, attempts), *reused])
    stage = stage.changed(attempts=list(attempts), **spent)
    return stage.changed(relaxed=_relaxed(stage))


def _relaxed(stage: StageLedger) -> Total | None:
    """What was spent at inputs that rounds of relaxation have replaced; None before any round."""
    if not stage.replaced:
        return None
    last = SpentAt(input_digest=stage.last_digest or "", spent=stage.trained)
    at_digests = [last, *stage.trained_before, *stage.reused]
    closed = [at.spent for at in at_digests if at.input_digest in stage.replaced]
    open_ = (a for a in stage.attempts if a.finished_at is None)
    return total_of([*closed, *(a for a in open_ if a.input_digest in stage.replaced)])


def progressed(stage: StageStatus, progress: Progress | None) -> StageStatus:
    """The stage with its attempt's progress. If that is not known, the earlier one stays."""
    return stage.changed(progress=progress or stage.progress)


def with_newest(stage: StageStatus, attempt: AttemptStatus) -> StageStatus:
    """The stage with its newest attempt replaced by this one."""
    return with_attempts(stage, [*stage.attempts[:-1], attempt])


def booked(stage: Ledger, attempts: Sequence[AttemptStatus]) -> Ledger:
    """The stage with these attempts. What the newly closed ones have spent is added to its ledger.

    An attempt is newly closed if the stage still has it as open, so it is added only once.
    """
    was_open = {a.name for a in stage.attempts if a.finished_at is None}
    over = [a for a in attempts if a.finished_at is not None and a.name in was_open]
    at_these = [a for a in over if a.input_digest == stage.last_digest]
    before = [a for a in over if a.input_digest != stage.last_digest]
    stage = stage.changed(
        spent=plus(stage.spent, over),
        trained=plus(stage.trained, at_these),
        trained_before=_with_spending(stage, before),
    )
    return with_attempts(stage, attempts[-KEPT_ATTEMPTS:])


def resumed(stage: Ledger, by: AttemptStatus, checkpoint: Resumed | None) -> Ledger:
    """The stage, once one of its attempts has told from which checkpoint it began.

    Work of earlier attempts at the same inputs was kept by this checkpoint, or is lost.

    Args:
        by: that attempt.
        checkpoint: None if it has an artifact, so that no attempt will follow.
    """
    earlier = (a for a in stage.attempts if a.input_digest == by.input_digest)
    for attempt in earlier:
        if attempt.unsettled is not None and attempt.name != by.name:
            stage = _settled(stage, attempt, settled(attempt, checkpoint))
    return stage


def _settled(stage: Ledger, before: AttemptStatus, after: AttemptStatus) -> Ledger:
    """The stage with a closed attempt whose work is settled now, also in its ledger."""
    attempts = [after if a.name == after.name else a for a in stage.attempts]
    digest = before.input_digest
    if digest == stage.last_digest:
        stage = stage.changed(trained=moved(stage.trained, before, after))
    earlier = [
        at.model_copy(update={"spent": moved(at.spent, before, after)})
        if at.input_digest == digest
        else at
        for at in stage.trained_before
    ]
    spent = moved(stage.spent, before, after)
    return with_attempts(stage.changed(spent=spent, trained_before=earlier), attempts)


def work_settled(stage: Ledger) -> Ledger:
    """The stage that has finished, or is summed up with others. What was not settled is lost."""
    for attempt in stage.attempts:
        if attempt.unsettled is not None:
            stage = _settled(stage, attempt, settled(attempt, None))
    earlier = [
        at.model_copy(update={"spent": all_settled(at.spent)}) for at in stage.trained_before
    ]
    stage = stage.changed(
        spent=all_settled(stage.spent),
        trained=all_settled(stage.trained),
        trained_before=earlier,
    )
    return with_attempts(stage, stage.attempts)


def at_inputs(stage: StageStatus) -> StageStatus:
    """The stage as it is launched, followed or finished at its present input digest.

    Only then does `trained` begin to count for this digest. What was spent at the digest before is
    kept, because an edit may be taken back.
    """
    digest = stage.input_digest
    if stage.last_digest == digest:
        return stage
    before = {known.input_digest: known.spent for known in stage.trained_before}
    if stage.last_digest is not None and stage.trained != Spent():
        before[stage.last_digest] = stage.trained
    # A status of an older version has no sum, but may still list the attempts.
    listed = [a for a in stage.attempts if a.finished_at and a.input_digest == digest]
    trained = before.pop(digest or "", plus(Spent(), listed))
    return stage.changed(last_digest=digest, trained=trained, trained_before=_newest(stage, before))


def _with_spending(stage: StageLedger, over: Sequence[AttemptStatus]) -> list[SpentAt]:
    """What was spent at earlier input digests, with these attempts added."""
    spent = {known.input_digest: known.spent for known in stage.trained_before}
    for attempt in over:
        known = spent.pop(attempt.input_digest, Spent())
        spent[attempt.input_digest] = plus(known, [attempt])
    return _newest(stage, spent)


def _newest(stage: StageLedger, spent: Mapping[str, Spent]) -> list[SpentAt]:
    """As many entries as a status may hold. Those of rounds of relaxation are dropped last."""
    oldest = sorted(spent, key=lambda digest: digest in stage.replaced)
    dropped = oldest[: max(0, len(spent) - MOST_DIGESTS)]
    kept = (digest for digest in spent if digest not in dropped)
    return [SpentAt(input_digest=digest, spent=spent[digest]) for digest in kept]


def numbered_after(stage: StageStatus, number: int) -> StageStatus:
    """The stage whose next attempt gets a number above this one."""
    return stage.changed(attempt_count=max(stage.attempt_count, number))


def intended(
    stage: StageStatus, intent: AttemptStatus, reason: Reason, *, frozen: bool
) -> StageStatus:
    """The stage with the intent of a new attempt."""
    stage = booked(at_inputs(stage), [*stage.attempts, intent])
    return explained(
        stage.changed(
            state=State.STARTING,
            attempt_count=intent.number,
            frozen=frozen,
            not_before=None,
            progress=None,
        ),
        reason,
    )


def with_plan(stage: StageStatus, plan: Planned, alone: Planned | None) -> StageStatus:
    """The stage with the plan of its first launch."""
    return stage if stage.plan is not None else stage.changed(plan=plan, alone=alone)


def identified(stage: StageStatus, attempt: AttemptStatus, seen: Seen, now: float) -> StageStatus:
    """The stage whose attempt has a job, as it is seen now.

    If the predecessor's trainer has just ended, the time since then is kept as the duration of the
    transition between the two stages.
    """
    if stage.inherits_at is not None:
        taken = round(max(0.0, now - stage.inherits_at), 3)
        stage = stage.changed(inherits_at=None, transition_seconds=taken)
    return with_newest(stage, with_job(attempt, seen))


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
    """The stage of a released attempt, which waits in a queue, starts or runs."""
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
        closed: that attempt in its final form.
        now: seconds since the epoch.
        backoff: seconds before the first retry. They double with each further one, to at most 64
            times as many.
        stopping: why nothing may run; None if the chain may run.
    """
    stage = booked(stage, [*stage.attempts[:-1], closed]).changed(
        progress=None,
        checkpoint_step=verdict.checkpoint_step,
        retries=verdict.retries,
        disruptions=verdict.disruptions,
    )
    if verdict.stopped:
        resumes = Reason(Code.RESUMES, message="resumes from its newest checkpoint")
        state = State.SUSPENDED if stopping else State.PENDING
        return explained(stage.changed(state=state), stopping or resumes)
    code = Code(verdict.failure)
    if verdict.final is not None:
        reason = Reason(code, closed.name, verdict.final)
        return explained(stage.changed(state=State.FAILED), reason)
    waits = verdict.pays_retry or closed.parts_refused
    wait = backoff * 2 ** min(max(verdict.retries - 1, 0), 6) if waits else 0.0
    known = stage.retried.get(verdict.failure, 0)
    stage = stage.changed(
        state=State.PENDING,
        not_before=now + wait,
        retried={**stage.retried, verdict.failure: known + 1},
    )
    return explained(stage, Reason(code, closed.name, f"{verdict.message}; tries again"))


# -- a stage that leaves the spec -----------------------------------------------------------------


def removed(stage: StageStatus) -> StageLedger:
    """What is kept of a stage that is no longer in the spec: its ledger and its newest attempt."""
    fields = {name: getattr(stage, name) for name in StageLedger.model_fields}
    newest = [
        without_texts(attempt) if attempt.finished_at else attempt
        for attempt in stage.attempts[-1:]
    ]
    return StageLedger(**fields).changed(attempts=newest)


def without_texts(attempt: AttemptStatus) -> AttemptStatus:
    """A closed attempt without its texts. The record names the sources of prices, too."""
    return attempt.changed(message="", price_sources=[])


def returned(ledger: StageLedger) -> StageStatus:
    """The stage whose name is in the spec again, with what it spent before."""
    return StageStatus(**{name: getattr(ledger, name) for name in StageLedger.model_fields})


def summed(ledgers: Sequence[StageLedger]) -> StageLedger:
    """The sum of removed stages, which has no name."""
    total = total_of(ledgers)
    settled = {"gpu_milliseconds": total.gpu_milliseconds.settled}
    relaxed = [ledger.relaxed for ledger in ledgers if ledger.relaxed is not None]
    summed_up = StageLedger(name="", **dict(total) | settled)
    return summed_up.changed(relaxed=total_of(relaxed) if relaxed else None)


# -- an attempt -----------------------------------------------------------------------------------


def with_job(attempt: AttemptStatus, seen: Seen) -> AttemptStatus:
    """The attempt with its job. It is known by the job's UID from now on.

    Its pods run in the pool that the job was made for, so an edit of the spec does not change that.
    """
    return attempt.changed(uid=seen.uid, pool=seen.pool)


def stopped(attempt: AttemptStatus, message: str | None = None) -> AttemptStatus:
    """The attempt after it was asked to stop. Its end charges no budget."""
    if message is None:
        return attempt.changed(state=State.SUSPENDED)
    return attempt.changed(state=State.SUSPENDED, message=message)


def parts_refused(attempt: AttemptStatus) -> AttemptStatus:
    """The attempt while pods or Services of its job are refused."""
    return attempt.changed(parts_refused=True, counts_from=None)


def parts_accepted(attempt: AttemptStatus, now: float) -> AttemptStatus:
    """The attempt while nothing of its job is refused. Keeps when the last refusal ended."""
    since = now if attempt.parts_refused and attempt.counts_from is None else attempt.counts_from
    return attempt.changed(counts_from=since)


def stepped(attempt: AttemptStatus, now: float) -> AttemptStatus:
    """The attempt after a step of its own. Refusals before that step do not count any more."""
    return parts_accepted(attempt, now).changed(stepped_at=now, parts_refused=False)


def ending(attempt: AttemptStatus, deadline: FailureClass, message: str) -> AttemptStatus:
    """The attempt after it has passed a deadline, for which it is ended."""
    return attempt.changed(ending=deadline, message=message)


def at_work(attempt: AttemptStatus, *, queued: bool, now: float) -> AttemptStatus:
    """A released attempt. Its start is the moment at which it first leaves its queue."""
    attempt = parts_accepted(attempt, now)
    if queued:
        since = now if attempt.queued_at is None else attempt.queued_at
        return attempt.changed(state=State.QUEUED, queued_at=since)
    started = attempt.started_at or timestamp(now)
    return end_of_queue(attempt, now).changed(state=State.RUNNING, started_at=started)
