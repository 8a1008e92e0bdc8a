"""What attempts have spent.

An open attempt is accounted for by its pods. When it is closed, its sum is added to the stage's
ledger, once. So the status may drop old attempts without losing what they spent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from math import floor

from modelchain.api.contracts import FailureClass
from modelchain.api.messages import shortened
from modelchain.api.status import (
    AttemptStatus,
    ExpenseFields,
    Expenses,
    PodTime,
    Spent,
    StageStatus,
    State,
    Total,
    storable,
)
from modelchain.api.uses import NOT_USED, Uses
from modelchain.decide.money import with_cost
from modelchain.decide.observed import Artifact, Seen
from modelchain.decide.podtimes import known_pods, same_pods, told_macs
from modelchain.decide.settle import at_its_end
from modelchain.decide.split import Start, divided, gpu_time, starts, used
from modelchain.plan.prices import milliseconds, total_cost

# Attempts of a stage that stay in the status.
KEPT_ATTEMPTS = 10
# Characters of an attempt's message.
MESSAGE_LENGTH = 512
# Pods of one attempt that are listed: as many as the largest gang has, and the CRD allows.
MAX_PODS = 256
# An open attempt is accounted after so many seconds, so that this happens at least once a minute.
ACCOUNT_SECONDS = 55.0


def timestamp(now: float) -> str:
    """RFC 3339 in UTC, whole seconds, as Kubernetes writes times."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds(written: str) -> float:
    """A `timestamp` in seconds since the epoch."""
    return datetime.fromisoformat(written).timestamp()


def account(attempt: AttemptStatus, seen: Seen, now: float) -> AttemptStatus:
    """The open attempt with what its pods have spent until `now` (seconds since the epoch).

    All times are computed anew from those that are known now, so a wrong one is corrected later. A
    pod stays listed after it is gone, so that it does not count twice if it appears again. Only if
    there are too many pods are the gone ones summed up in `gone` and no longer listed.
    """
    known = known_pods(attempt, seen, now)
    pods, summed_up = _listed(known, seen)
    gone = _with_gone(attempt.gone, summed_up, now)
    if not pods and gone == Spent():
        after = _alone(attempt, seen)
    else:
        spent = total_of([gone, *(_of_start(start, now) for start in starts(pods))])
        after = attempt.changed(
            macs=spent.macs,
            lost_macs=spent.lost_macs,
            gpu_seconds=spent.gpu_seconds,
            gpu_milliseconds=spent.gpu_milliseconds,
            pods=pods,
            gone=gone,
            accounted_at=float(floor(now)),
            estimated=attempt.estimated or any(pod.estimated for pod in known.values()),
        )
        after = with_cost(after, attempt, seen.prices, list(summed_up.values()), now)
    return after.changed(
        # A last word that had to be shortened may lack figures that were seen before.
        macs=max(attempt.macs, after.macs, told_macs(seen)),
        checkpoint_step=max(attempt.checkpoint_step, seen.checkpoint_step),
    )


def _of_start(start: Start, now: float) -> Expenses:
    """The MACs and the GPU time of one start. MACs are lost once it is known that they are."""
    first = start.first
    macs, saved = (first.macs, first.saved_macs) if first is not None else (0, 0)
    lost = max(0, macs - saved) if first is not None and first.over else 0
    return Expenses(macs=macs, lost_macs=lost, gpu_milliseconds=used(start, now))


def _with_gone(gone: Spent, summed_up: Mapping[str, PodTime], now: float) -> Spent:
    """What was spent by pods that are no longer listed, with these. Their work is settled."""
    if not summed_up:
        return gone
    over = {uid: pod.model_copy(update={"over": True}) for uid, pod in summed_up.items()}
    figures = added([gone, *(_of_start(start, now) for start in starts(over))])
    seconds = gone.seconds + _seconds(summed_up.values(), now)
    return gone.model_copy(update={**figures, "seconds": seconds})


def _alone(attempt: AttemptStatus, seen: Seen) -> AttemptStatus:
    """An attempt without pods, as on a laptop. The trainer's own figures count."""
    word = seen.word
    if word is None:
        return attempt
    told, time = word.milliseconds, milliseconds(word.gpu_seconds)
    gpus = round(time / told.total) if told.total else 0
    startup = min(time, told.startup * gpus)
    uses = divided(told, gpus, time - startup, over=True) + Uses(startup=startup)
    return attempt.changed(
        gpu_seconds=uses.total / 1000,
        gpu_milliseconds=uses,
        lost_macs=max(0, word.macs - word.saved_macs) if told.total else 0,
    )


def account_if_due(attempt: AttemptStatus, seen: Seen, now: float) -> AttemptStatus:
    return account(attempt, seen, now) if due(attempt, seen, now) else attempt


def due(attempt: AttemptStatus, seen: Seen, now: float) -> bool:
    """Whether there is something to account for: a pod is new or has ended, a time was corrected,
    or pods have run for nearly a minute since the last time.
    """
    return not same_pods(attempt, seen) or _unaccounted(attempt, seen, now) >= ACCOUNT_SECONDS


def until_due(attempt: AttemptStatus, seen: Seen, now: float) -> float | None:
    """The seconds until there is something to account for; None while no pod holds a GPU."""
    if not _rate(seen.pods.values()):
        return None
    return max(1.0, ACCOUNT_SECONDS - _unaccounted(attempt, seen, now))


def _unaccounted(attempt: AttemptStatus, seen: Seen, now: float) -> float:
    """The seconds for which pods have held GPUs since the attempt was last accounted."""
    rate = _rate(seen.pods.values())
    known = attempt.gone.gpu_milliseconds.total + gpu_time(attempt.pods.values(), now)
    return abs(known - attempt.gpu_milliseconds.total) / 1000 / rate if rate else 0.0


def _rate(pods: Iterable[PodTime]) -> int:
    """The GPUs of the pods that hold some: so many GPU seconds are spent in each second."""
    return sum(pod.gpus for pod in pods if pod.finished is None)


def _listed(pods: dict[str, PodTime], seen: Seen) -> tuple[dict[str, PodTime], dict[str, PodTime]]:
    """The pods to list, and those to sum up: if there are too many, all that are gone.

    No gang has more pods than may be listed. If more exist all the same, the oldest are left out
    and not summed up, because the next pass reads them again and they would count twice.
    """
    if len(pods) <= MAX_PODS:
        return pods, {}
    there = {uid: pods[uid] for uid in seen.pods if uid not in seen.gone_pods}
    over = {uid: pod for uid, pod in pods.items() if uid not in there}
    return dict(sorted(there.items(), key=lambda item: item[1].begins)[-MAX_PODS:]), over


def running_seconds(attempt: AttemptStatus, now: float) -> float:
    """Seconds that the attempt has run: those of rank 0's pods.

    Time in a queue does not count, nor does time in which parts of its job were refused.
    """
    since = attempt.counts_from or (now if attempt.parts_refused else 0.0)
    pods = (
        pod.model_copy(update={"started": max(pod.started, since)})
        for pod in attempt.pods.values()
        if pod.started is not None
    )
    return attempt.gone.seconds + _seconds(pods, now)


def ended(attempt: AttemptStatus, seen: Seen, now: float) -> float:
    """When the attempt's last pod ended; now, if no pod's end is known.

    A node's clock may be ahead, so the end is at most now.
    """
    pods = {**attempt.pods, **seen.pods}.values()
    return min(now, max((pod.finished for pod in pods if pod.finished is not None), default=now))


def closed(
    attempt: AttemptStatus,
    seen: Seen,
    now: float,
    state: State,
    failure: FailureClass | None = None,
    message: str = "",
) -> AttemptStatus:
    """The attempt in its final form. It has ended, and its spending does not change any more."""
    final = account(attempt, seen, now)
    node, fault = None, ""
    if failure is FailureClass.HARDWARE:
        node, fault = next(iter(seen.bad_nodes.items()), (None, ""))
    final = end_of_queue(final, now)
    end = ended(final, seen, now)
    return at_its_end(final, state, failure, now, end, seen.word).changed(
        state=state,
        failure=failure,
        message=shortened(message, MESSAGE_LENGTH),
        finished_at=timestamp(now),
        gone=Spent(seconds=running_seconds(final, now)),  # so that the pods need not be kept
        pods={},
        priced=None,
        accounted_at=None,
        ending=None,
        stepped_at=None,
        node=node,
        fault=fault,
    )


def end_of_queue(attempt: AttemptStatus, now: float) -> AttemptStatus:
    """The attempt when it waits no longer in a queue or for the scheduler."""
    if attempt.queued_at is None:
        return attempt
    waited = round(attempt.queue_seconds + max(0.0, now - attempt.queued_at), 3)
    return attempt.changed(queue_seconds=waited, queued_at=None)


def spent_on(found: Artifact) -> Spent:
    """What the training of an artifact has cost."""
    return Spent(
        macs=found.macs,
        lost_macs=found.lost_macs,
        gpu_seconds=found.gpu_milliseconds.total / 1000,
        gpu_milliseconds=found.gpu_milliseconds,
        queue_seconds=found.queue_seconds,
        cost=found.cost,
        unpriced_seconds=found.unpriced_seconds,
    )


def least(stage: StageStatus, steps: int | None) -> int:
    """The MACs that a finished stage took at least.

    A trainer counts a whole number of MACs for each step, so the division drops a remainder.
    """
    return stage.planned_macs // (steps or 1) * (steps or 1)


def whole(stage: StageStatus, final: AttemptStatus) -> AttemptStatus:
    """The attempt that finished a stage, with the MACs that no trainer could report.

    An earlier attempt may have been killed after its last report, and this one resumed from its
    checkpoint. Together they have done the whole stage at least once. What the reports lack of that
    is added here.
    """
    others = (a.input_digest for a in stage.attempts if a.name != final.name)
    if stage.trained == Spent() and final.input_digest not in others:
        return final
    return final.changed(macs=max(final.macs, stage.planned_macs - stage.trained.macs))


def plus(spent: Spent, attempts: Iterable[AttemptStatus]) -> Spent:
    """The spending with these attempts added."""
    more = list(attempts)
    seconds = spent.seconds + sum(a.gone.seconds for a in more)
    return spent.model_copy(update={**added([spent, *more]), "seconds": seconds})


def with_open(spent: Spent, attempts: Iterable[AttemptStatus]) -> list[Expenses]:
    """What a stage shows: its ledger, and what the open attempt has spent so far."""
    return [spent, *(a for a in attempts if a.finished_at is None)]


def total_of(parts: Iterable[Expenses]) -> Total:
    """What was spent together, such as by all stages, removed ones included."""
    return Total(**added(parts))


def added(parts: Iterable[Expenses]) -> ExpenseFields:
    """The sum of all amounts."""
    parts = list(parts)
    uses = sum((part.gpu_milliseconds for part in parts), NOT_USED)
    return ExpenseFields(
        macs=storable(sum(part.macs for part in parts)),
        lost_macs=storable(sum(part.lost_macs for part in parts)),
        gpu_seconds=uses.total / 1000,
        gpu_milliseconds=uses,
        queue_seconds=_sum(part.queue_seconds for part in parts),
        cost=total_cost(part.cost for part in parts),
        unpriced_seconds=_sum(part.unpriced_seconds for part in parts),
    )


def _sum(seconds: Iterable[float]) -> float:
    """Seconds of three decimals, added without a remainder."""
    return round(sum(seconds), 3)


def _seconds(pods: Iterable[PodTime], now: float) -> float:
    return sum(_length(pod, now) for pod in pods if pod.first)


def _length(pod: PodTime, now: float) -> float:
    """The seconds for which a pod has run, by the same clock as `held`."""
    if pod.started is None:
        return 0.0
    return max(0.0, (floor(now) if pod.finished is None else pod.finished) - pod.started)
