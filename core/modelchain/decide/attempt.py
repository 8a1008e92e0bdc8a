"""The attempt that the status names, in a pass: launched, released, watched, or judged. Pure.

The order of the checks is the protocol. A job's UID is written before any decision about it, and a
request to stop comes before everything that would start something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import AttemptStatus, StageStatus, State
from modelchain.decide import transitions
from modelchain.decide.ledger import account, closed, least, plus, same_pods, whole
from modelchain.decide.nodes import avoided, nodes_avoided, without_faults
from modelchain.decide.observed import Launch, RecordArtifact, Release, Seen, Verify
from modelchain.decide.outcome import Outcome, Turn, stalled
from modelchain.decide.verdict import deadline, judge, progress_unknown
from modelchain.decide.waits import for_the_share

Check = Callable[[Turn, StageStatus, Launch, Seen], Outcome | None]


def follow(turn: Turn, stage: StageStatus, launch: Launch) -> Outcome:
    """What becomes of `launch.attempt`: the stage's newest one, whose inputs are the stage's."""
    seen = turn.observed.attempt(launch.attempt.name)
    if seen.there and not _unknown_job(launch.attempt, seen):
        stage = accounted(stage, seen, turn.now, turn.observed.price)
        launch = replace(launch, attempt=stage.attempts[-1])
    answers = (check(turn, stage, launch, seen) for check in CHECKS)
    outcome = next(answer for answer in answers if answer is not None)
    if seen.started:  # its inputs stay reserved until it has been judged
        return replace(outcome, shares=outcome.shares | {launch.attempt.input_digest})
    return outcome


def _unknown_job(attempt: AttemptStatus, seen: Seen) -> bool:
    """It has a job whose UID the status does not hold yet."""
    return attempt.uid is None and seen.uid is not None


def _asked_to_stop(attempt: AttemptStatus) -> bool:
    return attempt.ending is not None or attempt.state is State.SUSPENDED


def _identify(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """A job that was stopped before its UID is known would free its name, and be made again."""
    if not _unknown_job(launch.attempt, seen) or seen.uid is None:
        return None
    stage = transitions.identified(stage, launch.attempt, seen.uid, turn.now)
    return Outcome(stage, again=turn.observed.poll_seconds, wanted=_only(launch))


# -- stopping --------------------------------------------------------------------------------------


def _stop_for_retry(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """A retry replaces a job that someone else has suspended."""
    if not (seen.idle and turn.retried) or _asked_to_stop(launch.attempt):
        return None
    return _stop(turn, stage, launch.attempt, stage.state, "it was asked for again")


def _stop_on_request(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
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


def _stop_outdated(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """Before a pod has run, a job is replaced if it would be made differently today."""
    attempt = launch.attempt
    has_run = seen.running or attempt.pods or seen.pods
    replaceable = seen.idle or (seen.there and seen.started and not has_run)
    if not replaceable or not turn.observed.outdated(launch):
        return None
    return _stop(turn, stage, attempt, State.STARTING, "what its job was made from changed")


def _stop(
    turn: Turn, stage: StageStatus, attempt: AttemptStatus, state: State, why: str
) -> Outcome:
    stage = transitions.stopping(stage, transitions.stopped(attempt, why), state, why)
    return Outcome(stage, again=turn.observed.poll_seconds)


# -- waiting and running ---------------------------------------------------------------------------


def _stall(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    reason = seen.stalled or (turn.observed.stuck if seen.there else None)
    return None if reason is None else stalled(turn, stage, reason, wanted=_only(launch))


def _launch(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """An intent: no job of it was ever made, as far as anyone knows."""
    if seen.started:
        return None
    if _asked_to_stop(launch.attempt):  # a job of it that still appears is a stray
        return _judged(turn, stage, launch.attempt, seen)
    if turn.stopping is not None:
        return Outcome(transitions.explained(stage.changed(state=State.SUSPENDED), turn.stopping))
    wanted = _only(launch)
    if turn.observed.obstacle is not None and not seen.there:
        return stalled(turn, transitions.idle(stage), turn.observed.obstacle, wanted=wanted)
    if (waiting := for_the_share(turn, stage)) is not None:
        return replace(waiting, wanted=wanted)
    blocked = seen.waiting is not None and not seen.there
    return Outcome(
        transitions.starting(stage, seen.waiting or turn.miss, stalled=blocked),
        action=None if seen.there else launch,  # the name is free once its last owner is gone
        again=turn.observed.poll_seconds,
        wanted=wanted,
        shares=frozenset({launch.attempt.input_digest}),
    )


def _release(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    if not (seen.there and seen.unreleased):
        return None
    refused = seen.waiting is not None
    return Outcome(
        transitions.starting(stage, seen.waiting or turn.miss, stalled=refused),
        action=Release(launch.attempt),
        again=turn.observed.poll_seconds,
        wanted=_only(launch),
    )


def _watch(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """It was released: it waits in a queue, starts or runs."""
    if not seen.there:
        return None
    state, reason = _doing(turn, seen)
    progress = seen.progress or (stage.progress if seen.running else None)
    attempt = transitions.at_work(launch.attempt, queued=seen.queued, now=turn.now)
    again = turn.observed.poll_seconds
    late = deadline(turn.chain.spec.deadlines, stage, attempt, seen, turn.now)
    if isinstance(late, float):
        again = min(again or late, late)
    elif late is not None:
        attempt = transitions.ending(attempt, *late)
    stage = transitions.watched(stage, attempt, state, reason, progress)
    return Outcome(stage, again=again, wanted=_only(launch))


def _doing(turn: Turn, seen: Seen) -> tuple[State, Reason]:
    if seen.queued:
        return State.QUEUED, nodes_avoided(turn.avoid, seen.waiting or turn.miss)
    if seen.waiting is not None:
        return State.STARTING, seen.waiting
    unheard = progress_unknown(turn.chain.spec.deadlines, seen, turn.now)
    if unheard is not None:
        return State.RUNNING, unheard
    return (State.RUNNING if seen.progress else State.STARTING), turn.miss


def _only(launch: Launch) -> frozenset[str]:
    return frozenset({launch.attempt.name})


# -- the end ---------------------------------------------------------------------------------------


def _end(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome | None:
    """It has gone, and no artifact is recorded: record it, ask for its last word, or judge it."""
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
    """What all attempts at these inputs have spent is recorded with the artifact.

    Attempts of a chain that was deleted meanwhile are known by the work alone.
    """
    attempt = launch.attempt
    final = whole(stage, account(attempt, seen, turn.now, turn.observed.price))
    total = plus(stage.trained, [final])
    macs = max(total.macs, word.macs, least(stage, word.steps))
    record = RecordArtifact(launch, word, total.model_copy(update={"macs": macs}))
    if seen.waiting is not None:
        outcome = stalled(turn, transitions.verifying(stage, attempt), seen.waiting)
    elif stage.code is Code.RECORD_REFUSED:
        stage = transitions.verifying(stage, attempt).changed(stalled=True)
        outcome = Outcome(stage, again=turn.observed.poll_seconds)
    else:
        outcome = Outcome(stage, again=turn.observed.poll_seconds)
    return replace(outcome, action=record)


def _verify(turn: Turn, stage: StageStatus, launch: Launch, seen: Seen) -> Outcome:
    """Its last word was lost: a Job hashes the artifact again, before anything is trained."""
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
    """It left no artifact: close it, charge the right retry budget, and retry, wait or give up."""
    verdict = judge(turn.chain.spec.retry, stage, attempt, seen, turn.stopping is not None)
    state = State.SUSPENDED if verdict.stopped else State.FAILED
    price = turn.observed.price
    over = closed(attempt, seen, turn.now, price, state, verdict.failure, verdict.message)
    avoid = list(turn.avoid)
    if verdict.advanced:
        avoid = without_faults(avoid)
    if verdict.failure is FailureClass.HARDWARE and not verdict.stopped:
        avoid = avoided(avoid, seen.bad_nodes, turn.now)
    backoff = turn.observed.backoff_seconds
    stage = transitions.after(stage, over, verdict, turn.now, backoff, turn.stopping)
    return Outcome(stage, again=turn.observed.poll_seconds, avoid=tuple(avoid))


# In this order; the first that has an answer counts.
CHECKS: tuple[Check, ...] = (
    _identify,
    _stop_for_retry,
    _stop_on_request,
    _stop_outdated,
    _stall,
    _launch,
    _release,
    _watch,
    _end,
)


# -- accounting ------------------------------------------------------------------------------------


def accounted(stage: StageStatus, seen: Seen, now: float, price: str | None) -> StageStatus:
    """The stage with what its newest attempt has spent and its step, if a step or a pod is new.

    The step is kept whatever else happens to the attempt. Otherwise it would be new again in the
    next pass, and since time goes on, every pass would write what was spent and do nothing else.

    Args:
        seen: of that attempt, whose job or pods exist.
        now: seconds since the epoch.
        price: of a GPU hour.
    """
    attempt = stage.attempts[-1]
    stepped = _stepped(stage, attempt, seen)
    if not stepped and same_pods(attempt, seen):
        return stage
    attempt = account(attempt, seen, now, price)
    if stepped and seen.macs > 0:  # a resumed attempt tells its step before it takes the next one
        attempt = attempt.changed(stepped_at=now)
    stage = stage.changed(progress=seen.progress or stage.progress)
    return transitions.with_newest(stage, attempt)


def _stepped(stage: StageStatus, attempt: AttemptStatus, seen: Seen) -> bool:
    """Its step is another one than the status holds, or it is its first."""
    step = stage.progress.step if stage.progress else None
    first = attempt.stepped_at is None and seen.macs > 0
    return seen.progress is not None and (step != seen.progress.step or first)
