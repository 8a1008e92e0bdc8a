"""Judges an attempt: which budget its end charges, whether a deadline has passed, why it is needed.

A disruption (an end that is not the work's fault) charges `maxDisruptions`, a failure `maxRetries`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.faults import LAUNCH_FAILURE
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import Deadlines, Retry
from modelchain.api.status import AttemptStatus, StageStatus, State
from modelchain.decide.ledger import running_seconds
from modelchain.decide.observed import Contact, Seen
from modelchain.identity.digest import differing_fields

# After so many unanswered connections a trainer counts as standing still.
IGNORED = 10
# For so long a silent trainer is not reported. It takes a minute or two to load before it answers.
SILENT_SECONDS = 300


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended, and what its stage has left of its budgets."""

    failure: FailureClass
    message: str
    # The attempt was asked to stop, so it charges no budget.
    stopped: bool
    checkpoint_step: int
    retries: int
    disruptions: int
    # Why the stage is not tried again, if it is not.
    final: str | None = None
    # The attempt left a newer checkpoint than the one before it.
    advanced: bool = False
    # The attempt charges a retry, so the next one waits. Without a wait, a stage that fails at once
    # would use up its retries in seconds.
    pays_retry: bool = False


def judge(
    limits: Retry, stage: StageStatus, attempt: AttemptStatus, seen: Seen, stopping: bool
) -> Verdict:
    """The verdict on an attempt that ended and left no valid artifact.

    A disruption that brought no newer checkpoint charges a retry as well: otherwise the stage could
    be disrupted for ever. An attempt that we stopped charges no budget, nor does one whose end may
    be a consequence of pods that were refused.

    Args:
        limits: the budgets in the spec.
        stage: the stage before this attempt is charged.
        attempt: the attempt that ended.
        seen: what was read of the attempt.
        stopping: nothing of the chain may run, so the attempt was asked to stop.
    """
    failure, message = _cause(attempt, seen)
    if failure is FailureClass.HARDWARE and _fails_again(stage, attempt, seen):
        failure = FailureClass.ERROR
        message += "; this has happened before, so it counts as the program's fault"
    checkpoint = max(stage.checkpoint_step, _newest_checkpoint(attempt, seen))
    advanced = checkpoint > stage.checkpoint_step
    stopped = attempt.ending is None and (stopping or attempt.state is State.SUSPENDED)
    if failure.disruption and (stopped or attempt.parts_refused):
        return Verdict(failure, message, stopped, checkpoint, stage.retries, stage.disruptions)
    pays_retry = not (failure.disruption and advanced)
    disruptions, retries = stage.disruptions + failure.disruption, stage.retries + pays_retry
    final = None
    if failure.permanent:
        final = message
    elif failure.disruption and disruptions > limits.max_disruptions:
        final = f"{message}; {_spent(limits.max_disruptions, 'disruption', 'maxDisruptions')}"
    elif pays_retry and retries > limits.max_retries:
        final = f"{message}; {_spent(limits.max_retries, 'retry', 'maxRetries')}"
    return Verdict(
        failure, message, False, checkpoint, retries, disruptions, final, advanced, pays_retry
    )


def _fails_again(stage: StageStatus, attempt: AttemptStatus, seen: Seen) -> bool:
    """Whether this attempt and an earlier one both ended with CUDA's "unspecified launch failure".

    CUDA does not know its cause. The first such failure is blamed on the device. A second one is
    blamed on the program, which fails on every node.
    """
    before = any(a.fault == LAUNCH_FAILURE for a in stage.attempts if a.name != attempt.name)
    return before and LAUNCH_FAILURE in seen.bad_nodes.values()


def _newest_checkpoint(attempt: AttemptStatus, seen: Seen) -> int:
    """The step of the newest checkpoint that any source tells of."""
    told = seen.word.checkpoint_step if seen.word else None
    return max(seen.checkpoint_step, attempt.checkpoint_step, told or 0)


def _spent(limit: int, unit: str, field: str) -> str:
    """What is said of a budget that is used up."""
    if limit == 1:
        return f"1 {unit} is allowed (spec.retry.{field})"
    units = f"{unit.removesuffix('y')}ies" if unit.endswith("y") else f"{unit}s"
    return f"{limit} {units} are allowed (spec.retry.{field})"


def _cause(attempt: AttemptStatus, seen: Seen) -> tuple[FailureClass, str]:
    """Why an attempt ended: the deadline it was ended for, else its last word, else what its pods
    tell.
    """
    word = seen.verify if isinstance(seen.verify, LastWord) else seen.word
    if attempt.ending is not None:
        return attempt.ending, attempt.message
    if word is not None and word.result == "Succeeded":
        return FailureClass.NO_ARTIFACT, "reported success, but left no artifact"
    if word is not None and word.failure is FailureClass.PREEMPTED and seen.evidence is not None:
        return word.failure, seen.evidence[1]  # the trainer knows only that it was told to stop
    if word is not None:
        return word.failure or FailureClass.ERROR, word.message
    return seen.evidence or (FailureClass.KILLED, "died without a last word")


@dataclass(frozen=True)
class Due:
    """A deadline, and how the attempt then ends."""

    # When the deadline passes, in seconds since the epoch.
    at: float
    # The attempt is seen not to progress. Missing information is no evidence of that.
    evident: bool
    failure: FailureClass
    message: str


def deadline(
    limits: Deadlines, stage: StageStatus, attempt: AttemptStatus, seen: Seen, now: float
) -> tuple[FailureClass, str] | float | None:
    """The deadline that has passed and its message, or the seconds until the next one.

    None without a deadline. Time in a queue never counts: the start counts from the first running
    pod. A deadline for a step has passed only if the trainer is seen to stand still after it.
    """
    if seen.hopeless is not None:
        return seen.hopeless
    dues = list(_dues(limits, stage, attempt, seen, now))
    for due in dues:
        if due.at <= now and due.evident:
            return due.failure, due.message
    return min((due.at - now for due in dues if due.at > now), default=None)


def _dues(
    limits: Deadlines, stage: StageStatus, attempt: AttemptStatus, seen: Seen, now: float
) -> Iterator[Due]:
    began = min((pod.started for pod in seen.pods.values() if pod.finished is None), default=None)
    counts_from = attempt.counts_from or 0.0
    if began is None:
        if seen.waits is not None:
            failure, since = seen.waits[0], max(seen.waits[1], counts_from)
            waited = f"given up after {limits.start_seconds} s (spec.deadlines.startSeconds)"
            why = seen.waiting.text if seen.waiting else ""
            yield Due(since + limits.start_seconds, True, failure, f"{why}; {waited}")
        return
    yield _next_step(limits, stage, attempt, seen, max(began, counts_from))
    if limits.stage_seconds is not None:
        left = limits.stage_seconds - stage.spent.seconds - running_seconds(attempt, now)
        message = (
            f"the stage has run for {limits.stage_seconds} s; raise spec.deadlines.stageSeconds to"
            " go on"
        )
        yield Due(now + left, True, FailureClass.STAGE_DEADLINE, message)


def _next_step(
    limits: Deadlines, stage: StageStatus, attempt: AttemptStatus, seen: Seen, began: float
) -> Due:
    """The deadline of the attempt's next step, or of its first one since `began`."""
    stepped = attempt.stepped_at
    if stepped is None or stepped < began:
        at = began + limits.start_seconds
        message = f"no first step within {limits.start_seconds} s (spec.deadlines.startSeconds)"
        if seen.waiting:
            return Due(at, True, FailureClass.START_DEADLINE, f"{message}: {seen.waiting.text}")
        evident = _stands_still(seen.contact, at, limits)
        return Due(at, evident, FailureClass.START_DEADLINE, message)
    at, step = stepped + limits.stall_seconds, stage.progress.step if stage.progress else 0
    message = f"no step after {step} for {limits.stall_seconds} s (spec.deadlines.stallSeconds)"
    evident = _stands_still(seen.contact, at, limits)
    return Due(at, evident, FailureClass.STALL_DEADLINE, message)


def _stands_still(contact: Contact | None, due: float, limits: Deadlines) -> bool:
    """Whether rank 0 is seen to stand still.

    Rank 0 must have answered once. Then it stands still in two cases: it has answered after `due`
    and told of no new step, or it accepts connections and does not answer them any more. A
    connection that is refused or times out tells nothing of the trainer.
    """
    if contact is None or contact.answered is None:
        return False
    ignores = contact.ignored >= IGNORED and contact.ignored_for >= limits.stall_seconds
    return contact.answered >= due or ignores


def progress_unknown(limits: Deadlines, seen: Seen, now: float) -> Reason | None:
    """The reason of a running trainer that does not tell its progress; None while it does."""
    contact = seen.contact
    if not seen.running or contact is None or contact.silent is None:
        return None
    if now - contact.silent < min(SILENT_SECONDS, limits.stall_seconds):
        return None
    return Reason(
        Code.PROGRESS_UNKNOWN,
        contact.address,
        f"rank 0 does not tell its progress at {contact.address}; look for a NetworkPolicy, a"
        " service mesh or a firewall that closes this port to the operator. The attempt goes on,"
        " and the trainer's own watchdog ends it if it hangs",
    )


def why_missed(
    stage: StageStatus,
    digest: str,
    inputs: Mapping[str, Any],
    known_inputs: Mapping[str, Mapping[str, Any]],
    *,
    there: bool,
) -> Reason:
    """The reason of a miss: which inputs of the stage have changed.

    They are compared with the newest other inputs that the stage has had.

    Args:
        stage: as its status says.
        digest: the stage's present input digest.
        inputs: the stage's present inputs.
        known_inputs: by input digest, the inputs of earlier work.
        there: the stage has been trained since, so its artifact is not gone.
    """
    mine = [a for a in stage.attempts if a.input_digest == digest]
    trained = any(a.state is State.SUCCEEDED for a in mine)
    if not there and (trained or (not mine and stage.last_digest == digest)):
        return Reason(Code.MISS, stage.name, "its artifact is gone")
    known = [*(a.input_digest for a in stage.attempts), stage.last_digest]
    before = next((d for d in reversed(known) if d not in (digest, None)), None)
    if before is None:
        return Reason(Code.MISS, stage.name, "never trained", never_trained=True)
    old = known_inputs.get(before)
    changed = ", ".join(differing_fields(old, inputs)) if old else "its inputs"
    return Reason(Code.MISS, stage.name, f"{changed} changed")
