"""What a pass does with the open attempt of a stage: it launches, releases, watches or judges it.

The order of `CHECKS` is the launch protocol. A job's UID is written to the status before anything
is decided about the job, and a request to stop comes before all that would start something. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import MOST_SOURCES, AttemptStatus, StageStatus, State
from modelchain.decide import transitions
from modelchain.decide.budget import for_the_budget, used_up
from modelchain.decide.ledger import account, closed, due, least, plus, until_due, whole
from modelchain.decide.nodes import avoided, nodes_avoided, without_faults
from modelchain.decide.observed import Launch, RecordArtifact, Release, Seen, Verify
from modelchain.decide.outcome import Outcome, Turn, stalled
from modelchain.decide.podtimes import resumed_from
from modelchain.decide.verdict import deadline, judge, progress_unknown
from modelchain.decide.waits import for_the_claim, for_the_share

Check = Callable[[Turn, StageStatus, Launch, Seen], Outcome | None]


def follow(turn: Turn, stage: StageStatus, launch: Launch) -> Outcome:
    """The outcome of `launch.attempt`, the stage's newest attempt, whose inputs are the stage's."""
    seen = turn.observed.attempt(launch.attempt.name)
    stage = after_resume(stage, launch.attempt, seen)
    if seen.there and not _unknown_job(launch.attempt, seen):
        stage = accounted(stage, seen, turn.now)
        launch = replace(launch, attempt=stage.attempts[-1])
    answers = (check(turn, stage, launch, seen) for check in CHECKS)
    outcome = next(answer for answer in answers if answer is not None)
    if seen.there and (soon := until_due(launch.attempt, seen, turn.now)) is not None:
        outcome = replace(outcome, again=min(soon, outcome.again or soon))
    if seen.started:  # the attempt keeps its share until it has been judged
        return replace(outcome, shares=outcome.shares | {launch.attempt.input_digest})
    return outcome


def after_resume(stage: StageStatus, attempt: AttemptStatus, seen: Seen) -> StageStatus:
    """The stage with earlier attempts settled, once this one has told from where it began."""
    checkpoint = resumed_from(seen)
    return stage if checkpoint is None else transitions.resumed(stage, attempt, checkpoint)


def _unknown_job(attempt: AttemptStatus, seen: Seen) -> bool:
    """Whether the attempt has a job whose UID is not in the status yet."""
    return attempt.uid is None and seen.uid is not None


def _asked_to_stop(attempt: AttemptStatus) -> bool:
    return attempt.ending is not None or attempt.state is State.SUSPENDED


def _identify(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """Write the job's UID to the status, before anything else.

    Without its UID the attempt is an intent. If the job were stopped first, the next pass would
    find its name free and make the job again.
    """
    if not _unknown_job(launch.attempt, seen):
        return None
    stage = transitions.identified(stage, launch.attempt, seen, turn.now)
    return Outcome(stage, again=turn.observed.poll_seconds, wanted=_only(launch))


def _trained(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """The trainers have ended, and the job or a sidecar goes on. What the trainers left counts now.

    The job stays until that is recorded or the attempt is closed; see `decide.lingering`.
    """
    if not seen.trained:
        return None
    if seen.stalled is not None:
        return stalled(turn, stage, seen.stalled, wanted=_only(launch))
    return replace(_end(turn, stage, launch, seen), wanted=_only(launch))


# -- stopping --------------------------------------------------------------------------------------


def _stop_for_retry(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """A retry replaces a job that another client has suspended."""
    if not (seen.idle and turn.retried) or _asked_to_stop(launch.attempt):
        return None
    return _stop(turn, stage, launch.attempt, stage.state, "it was asked for again")


def _stop_on_request(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """The chain is suspended, or the attempt was asked to stop earlier and has not ended yet.

    The outcome does not name the attempt as wanted, so `decide` stops it.
    """
    attempt = launch.attempt
    asked = _asked_to_stop(attempt)
    if not seen.there or not (turn.stopping or asked):
        return None
    why = turn.stopping.text if turn.stopping else attempt.message or "it was asked to"
    stopped = attempt if asked else transitions.stopped(attempt)
    stage = transitions.stopping(stage, stopped, State.RUNNING, why)
    if turn.observed.stuck is not None:
        return stalled(turn, stage, turn.observed.stuck)
    return Outcome(stage, again=turn.observed.poll_seconds)


def _stop_for_the_budget(
    turn: Turn, stage: StageStatus, launch: Launch, seen: Seen
) -> Outcome | None:
    """The budget is spent. The attempt stops as for a suspension, at a checkpoint."""
    why = used_up(turn, stage, launch, seen) if seen.there else None
    if why is None:
        return None
    return _stop(turn, stage, launch.attempt, stage.state, why.message)


def _stop_outdated(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """A job that would be made differently today is replaced if not all of its pods have run."""
    attempt = launch.attempt
    pods = [*attempt.pods.values(), *seen.pods.values()]
    has_run = seen.running or any(pod.started is not None for pod in pods)
    incomplete = seen.stalled is not None and seen.stalled.code is Code.PODS_FORBIDDEN
    replaceable = seen.idle or (seen.there and seen.started and (incomplete or not has_run))
    if not replaceable or not turn.observed.outdated(launch):
        return None
    return _stop(turn, stage, attempt, State.STARTING, "what its job was made from changed")


def _stop(
    turn: Turn, stage: StageStatus, attempt: AttemptStatus, state: State, why: str
) -> Outcome:
    """Mark the attempt as asked to stop. A later decision stops it, as it is not wanted."""
    stage = transitions.stopping(stage, transitions.stopped(attempt, why), state, why)
    return Outcome(stage, again=turn.observed.poll_seconds)


# -- waiting and running ---------------------------------------------------------------------------


def _stall(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """A person has to act before the attempt can go on."""
    reason = seen.stalled or (turn.observed.stuck if seen.there else None)
    if reason is None:
        return None
    if seen.there and reason.code is Code.PODS_FORBIDDEN:
        stage = transitions.with_newest(stage, transitions.parts_refused(launch.attempt))
    return stalled(turn, stage, reason, wanted=_only(launch))


def _renumber(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """Close an intent whose name something else has. The next intent has the next number.

    Chains `a` with stage `b-c` and `a-b` with stage `c` give their attempts the same names.
    """
    attempt = launch.attempt
    if seen.taken is None or turn.stopping is not None or _asked_to_stop(attempt):
        return None
    over = closed(attempt, seen, turn.now, State.SUSPENDED, message=seen.taken.message)
    stage = transitions.booked(stage, [*stage.attempts[:-1], over])
    digests = frozenset({attempt.input_digest})
    return Outcome(transitions.waiting(stage, seen.taken), again=0.0, shares=digests)


def _launch(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """Launch an intent, which is an attempt without a job."""
    if seen.started:
        return None
    if _asked_to_stop(launch.attempt):  # if its job still appears later, it is a stray
        return _judged(turn, stage, launch.attempt, seen)
    if turn.stopping is not None:
        return Outcome(transitions.not_launched(stage, turn.stopping))
    wanted = _only(launch)
    if turn.observed.obstacle is not None and not seen.there:
        return stalled(turn, transitions.idle(stage), turn.observed.obstacle, wanted=wanted)
    for wait in (for_the_budget, for_the_claim, for_the_share):
        if (waiting := wait(turn, stage)) is not None:
            return replace(waiting, wanted=wanted)
    # If an earlier job of this name still exists, wait for its end.
    return Outcome(
        transitions.starting(stage, seen.waiting or turn.miss),
        action=None if seen.there else launch,
        again=turn.observed.poll_seconds,
        wanted=wanted,
        shares=frozenset({launch.attempt.input_digest}),
    )


def _release(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """Release the job, whose UID is in the status by now."""
    if not (seen.there and seen.unreleased):
        return None
    return Outcome(
        transitions.starting(stage, turn.miss),
        action=Release(launch.attempt),
        again=turn.observed.poll_seconds,
        wanted=_only(launch),
    )


def _watch(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """Watch a released job, which waits in a queue, starts or runs."""
    if not seen.there:
        return None
    state, reason = _doing(turn, seen)
    progress = seen.progress or (stage.progress if seen.running else None)
    attempt = transitions.at_work(launch.attempt, queued=seen.queued, now=turn.now)
    again = turn.observed.poll_seconds
    # The seconds until a deadline passes; or, if one has passed, how the attempt is to end.
    late = deadline(turn.chain.spec.deadlines, stage, attempt, seen, turn.now)
    if isinstance(late, float):
        again = min(again or late, late)
    elif late is not None:
        attempt = transitions.ending(attempt, *late)
    stage = transitions.watched(stage, attempt, state, reason, progress)
    return Outcome(stage, again=again, wanted=_only(launch))


def _doing(turn: Turn, seen: Seen) -> tuple[State, Reason]:
    """What a released attempt does, and why."""
    if seen.queued:
        return State.QUEUED, nodes_avoided(turn.avoid, seen.waiting or turn.miss)
    if seen.waiting is not None:
        return State.STARTING, seen.waiting
    unheard = progress_unknown(turn.chain.spec.deadlines, seen, turn.now)
    if unheard is not None:
        return State.RUNNING, unheard
    return (State.RUNNING if seen.progress else State.STARTING), turn.miss


def _only(launch: Launch) -> frozenset[str]:
    """The attempt as the only one that is wanted."""
    return frozenset({launch.attempt.name})


# -- the end ---------------------------------------------------------------------------------------


def _end(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome:
    """The attempt has ended and no artifact is recorded: record one, verify it, or judge.

    On a laptop nothing has to be recorded: an artifact that is found counts by itself.
    """
    attempt, word = launch.attempt, seen.word
    succeeded = word.result == "Succeeded" if word else seen.succeeded
    if not (turn.observed.records and succeeded):
        return _judged(turn, stage, attempt, seen)
    answer = word or (seen.verify if isinstance(seen.verify, LastWord) else None)
    if answer is None:
        return _verify(turn, stage, launch, seen)
    if answer.result == "Succeeded":
        return _record(turn, stage, launch, seen, answer)
    return _judged(turn, stage, attempt, seen)


def _record(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen, word: LastWord) -> Outcome:
    """Record the artifact, with what all attempts at its inputs have spent.

    If the chain was deleted and applied again, its earlier attempts are not in the status. Their
    work is at least counted in MACs: by the last word, and by the steps that the weights took.
    """
    attempt = launch.attempt
    stage = transitions.resumed(stage, attempt, None)
    final = whole(stage, closed(attempt, seen, turn.now, State.SUCCEEDED))
    total = plus(stage.trained, [final])
    macs = max(total.macs, word.macs, least(stage, word.steps))
    here = [a for a in stage.attempts[:-1] if a.input_digest == attempt.input_digest]
    sources = dict.fromkeys(source for a in [*here, final] for source in a.price_sources)
    spent = total.model_copy(update={"macs": macs})
    record = RecordArtifact(launch, word, spent, tuple(sources)[-MOST_SOURCES:])
    stage = transitions.verifying(stage, attempt)
    return Outcome(stage, action=record, again=turn.observed.poll_seconds)


def _verify(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome:
    """The last word was lost, so a Job hashes the artifact again before anything is trained."""
    attempt = launch.attempt
    stage = transitions.verifying(stage, attempt)
    if seen.verify == "Unanswered":
        message = (
            f"{attempt.name} ended without a last word, and {attempt.name}-verify could not say"
            " whether its artifact is whole; nothing is trained again before that is known"
        )
        return stalled(turn, stage, Reason(Code.VERIFY_UNANSWERED, attempt.name, message))
    message = "its last word was lost; its artifact is re-hashed"
    stage = transitions.explained(stage, Reason(Code.VERIFIES, attempt.name, message))
    if seen.verify is None and turn.observed.obstacle is not None:
        return stalled(turn, stage, turn.observed.obstacle)
    action = Verify(launch) if seen.verify is None else None
    return Outcome(stage, action=action, again=turn.observed.poll_seconds)


def _judged(turn: Turn, stage: StageStatus, attempt: AttemptStatus, seen: Seen) -> Outcome:
    """The attempt left no artifact: close it, charge a budget, and resume, retry or give up."""
    verdict = judge(turn.chain.spec.retry, stage, attempt, seen, turn.stopping is not None)
    state = State.SUSPENDED if verdict.stopped else State.FAILED
    over = closed(attempt, seen, turn.now, state, verdict.failure, verdict.message)
    avoid = list(turn.avoid)
    if verdict.advanced:  # work has progressed, so the devices in general are not to blame
        avoid = without_faults(avoid)
    if verdict.failure is FailureClass.HARDWARE and not verdict.stopped:
        avoid = avoided(avoid, seen.bad_nodes, turn.now)
    backoff = turn.observed.backoff_seconds
    stage = transitions.after(stage, over, verdict, turn.now, backoff, turn.stopping)
    return Outcome(stage, again=turn.observed.poll_seconds, avoid=tuple(avoid))


# They are made in this order, and the first one that returns an outcome counts.
CHECKS: tuple[Check, ...] = (
    _identify,
    _trained,
    _stop_for_retry,
    _stop_on_request,
    _stop_for_the_budget,
    _stop_outdated,
    _stall,
    _renumber,
    _launch,
    _release,
    _watch,
    _end,
)


# -- accounting ------------------------------------------------------------------------------------


def accounted(stage: StageStatus, seen: Seen, now: float) -> StageStatus:
    """The stage with the spending and the step of its newest attempt, if a step or a pod is new, or
    a minute is over.

    This comes before the checks, so that the step is kept whatever they decide. Otherwise the step
    would still be new in the next pass. Every pass would then write the spending, which grows with
    time, and never get to an action.

    Args:
        seen: what is seen of that attempt.
        now: seconds since the epoch.
    """
    attempt = stage.attempts[-1]
    stepped = _stepped(stage, attempt, seen)
    if not stepped and not due(attempt, seen, now):
        return stage
    attempt = account(attempt, seen, now)
    # A resumed attempt reports its checkpoint's step before it has taken a step of its own. That
    # must not count as progress.
    if stepped and seen.macs > 0:
        attempt = transitions.stepped(attempt, now)
    return transitions.with_newest(transitions.progressed(stage, seen.progress), attempt)


def _stepped(stage: StageStatus, attempt: AttemptStatus, seen: Seen) -> bool:
    """Whether the attempt is at another step than the status says, or has taken its first one."""
    step = stage.progress.step if stage.progress else None
    first = attempt.stepped_at is None and seen.macs > 0
    return seen.progress is not None and (step != seen.progress.step or first)
