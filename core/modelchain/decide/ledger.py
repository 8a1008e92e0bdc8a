"""What attempts have spent.

An open attempt is accounted for by its pods. When it is closed, its sum is added to the stage's
ledger, once. So the status may drop old attempts without losing what they spent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import floor

from modelchain.api.contracts import FailureClass
from modelchain.api.messages import shortened
from modelchain.api.status import (
    MOST_SOURCES,
    AttemptStatus,
    PodTime,
    Priced,
    Spent,
    StageLedger,
    StageStatus,
    State,
    Total,
    storable,
)
from modelchain.decide.observed import Seen
from modelchain.plan.prices import Bill, Held, Prices, kept, milliseconds, total_cost

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

    A pod that vanished without an end is taken to have run until now. All times are computed anew
    from those that are known now, so a wrong one is corrected later. A pod stays listed after it is
    gone, so that it does not count twice if it appears again. Only if there are too many pods are
    the gone ones summed up in `gone` and no longer listed.
    """
    believed = _believed(attempt, seen)
    vanished = {uid: _ended(pod, now) for uid, pod in believed.items() if uid not in seen.pods}
    pods, summed_up = _listed(_told({**vanished, **_there(believed, seen)}, seen), seen)
    gone = Spent(
        macs=attempt.gone.macs + sum(pod.macs for pod in summed_up),
        gpu_seconds=attempt.gone.gpu_seconds + _gpu_seconds(summed_up, now),
        seconds=attempt.gone.seconds + _seconds(summed_up, now),
    )
    attempt = _with_cost(attempt.changed(pods=pods, gone=gone), seen, summed_up, now)
    macs = gone.macs + sum(pod.macs for pod in pods.values())
    return attempt.changed(
        # A last word that had to be shortened may lack figures that were seen before.
        macs=max(attempt.macs, macs, _told_macs(seen)),
        checkpoint_step=max(attempt.checkpoint_step, seen.checkpoint_step),
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
    """The seconds for which pods have run since the attempt was last accounted."""
    rate = _rate(seen.pods.values())
    more = attempt.gone.gpu_seconds + _gpu_seconds(attempt.pods.values(), now) - attempt.gpu_seconds
    return abs(more) / rate if rate else 0.0


def _rate(pods: Iterable[PodTime]) -> int:
    """The GPUs of the pods that run: so many GPU seconds are spent in each second."""
    return sum(pod.gpus for pod in pods if pod.finished is None)


def _there(known: Mapping[str, PodTime], seen: Seen) -> dict[str, PodTime]:
    """The pods that are seen. A pod tells its MACs only while it is asked, or once it has ended."""
    return {uid: _with_macs(pod, known.get(uid, pod).macs) for uid, pod in seen.pods.items()}


def _told(pods: dict[str, PodTime], seen: Seen) -> dict[str, PodTime]:
    """The pods, with the MACs that the newest rank 0 tells of, or the last word.

    A queue may evict the attempt and start it again. Each rank 0 counts from its own start.
    """
    first = [uid for uid, pod in pods.items() if pod.first]
    if not first:
        return pods
    newest = max(first, key=lambda uid: pods[uid].started)
    return {**pods, newest: _with_macs(pods[newest], _told_macs(seen))}


def _told_macs(seen: Seen) -> int:
    return max(seen.macs, seen.word.macs if seen.word else 0)


def _with_macs(pod: PodTime, macs: int) -> PodTime:
    """The pod with so many MACs, if it had fewer, in the form in which they are stored."""
    return pod.model_copy(update={"macs": storable(max(pod.macs, macs))})


def _with_cost(
    attempt: AttemptStatus, seen: Seen, summed_up: list[PodTime], now: float
) -> AttemptStatus:
    """The attempt with its GPU time and what it costs."""
    if not attempt.pods and not attempt.gone.seconds:
        # There are no pods on a laptop, so the trainer's own figures count.
        told = max(seen.gpu_seconds, seen.word.gpu_seconds if seen.word else 0.0)
        return attempt.changed(gpu_seconds=round(told, 3))
    gpu_seconds = attempt.gone.gpu_seconds + _gpu_seconds(attempt.pods.values(), now)
    money = _priced(attempt, seen, summed_up, now)
    unpriced = max(0, milliseconds(gpu_seconds) - money.milliseconds)
    return attempt.changed(
        gpu_seconds=round(gpu_seconds, 3),
        cost=money.cost,
        unpriced_seconds=unpriced / 1000,
        price_sources=money.sources,
        priced=money.before,
        accounted_at=float(floor(now)),
    )


def _priced(attempt: AttemptStatus, seen: Seen, summed_up: list[PodTime], now: float) -> _Money:
    """What the attempt's time has cost.

    Time that was accounted at earlier prices keeps its cost, and so does that of pods that are
    summed up now.
    """
    before, prices = _spent_before(attempt, seen.prices, now), seen.prices
    since = milliseconds(before.since)
    over = prices.bill(_held(summed_up, now), since)
    before = before.model_copy(
        update={
            "cost": _added(before.cost, over, prices),
            "milliseconds": before.milliseconds + over.priced,
        }
    )
    bill = prices.bill(_held(attempt.pods.values(), now), since)
    sources = dict.fromkeys([*attempt.price_sources, *over.sources, *bill.sources])
    return _Money(
        before,
        _added(before.cost, bill, prices),
        before.milliseconds + bill.priced,
        list(sources)[-MOST_SOURCES:],
    )


@dataclass(frozen=True)
class _Money:
    """What an attempt has cost, and how many milliseconds of its GPU time had a price."""

    before: Priced
    cost: str | None
    milliseconds: int
    sources: list[str]


def _spent_before(attempt: AttemptStatus, prices: Prices, now: float) -> Priced:
    """What was spent before the present prices held. New prices hold from now on."""
    known = attempt.priced
    if known is not None and known.prices == prices.name:
        return known
    if known is None and attempt.cost is None:
        return Priced(prices=prices.name, since=0.0)
    # An older version did not write until when it had computed the cost.
    since = floor(now) if attempt.accounted_at is None else attempt.accounted_at
    had_price = milliseconds(attempt.gpu_seconds) - milliseconds(attempt.unpriced_seconds)
    return Priced(prices=prices.name, since=since, cost=attempt.cost, milliseconds=had_price)


def _held(pods: Iterable[PodTime], now: float) -> Iterator[Held]:
    for pod in pods:
        end = floor(now) if pod.finished is None else pod.finished
        start, end = milliseconds(pod.started), milliseconds(end)
        yield Held(start, max(start, end), pod.gpus, pod.capacity)


def _added(cost: str | None, bill: Bill, prices: Prices) -> str | None:
    """A cost with a bill added. Without any price there is none."""
    return total_cost([cost, kept(bill.cost)]) if prices.entries else cost


def _listed(pods: dict[str, PodTime], seen: Seen) -> tuple[dict[str, PodTime], list[PodTime]]:
    """The pods to list, and those to sum up: if there are too many, all that are gone.

    No gang has more pods than may be listed. If more exist all the same, the oldest are left out
    and not summed up, because the next pass reads them again and they would count twice.
    """
    if len(pods) <= MAX_PODS:
        return pods, []
    there = {uid: pods[uid] for uid in seen.pods if uid not in seen.gone_pods}
    over = [pod for uid, pod in pods.items() if uid not in there]
    return dict(sorted(there.items(), key=lambda item: item[1].started)[-MAX_PODS:]), over


def running_seconds(attempt: AttemptStatus, now: float) -> float:
    """Seconds that the attempt has run: those of rank 0's pods.

    Time in a queue does not count, nor does time in which parts of its job were refused.
    """
    since = attempt.counts_from or (now if attempt.parts_refused else 0.0)
    pods = (
        pod.model_copy(update={"started": max(pod.started, since)}) for pod in attempt.pods.values()
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
    return final.changed(
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
    return Spent(
        macs=spent.macs + sum(a.macs for a in more),
        gpu_seconds=spent.gpu_seconds + sum(a.gpu_seconds for a in more),
        seconds=spent.seconds + sum(a.gone.seconds for a in more),
        cost=total_cost([spent.cost, *(a.cost for a in more)]),
        unpriced_seconds=_sum([spent.unpriced_seconds, *(a.unpriced_seconds for a in more)]),
    )


def open_spending(spent: Spent, attempts: Iterable[AttemptStatus]) -> Total:
    """A stage's figures: the ledger, and what the open attempt has spent so far."""
    running = [a for a in attempts if a.finished_at is None]
    return Total(
        macs=spent.macs + sum(a.macs for a in running),
        gpu_seconds=spent.gpu_seconds + sum(a.gpu_seconds for a in running),
        cost=total_cost([spent.cost, *(a.cost for a in running)]),
        unpriced_seconds=_sum([spent.unpriced_seconds, *(a.unpriced_seconds for a in running)]),
    )


def total_of(ledgers: Sequence[StageLedger]) -> Total:
    """What stages have spent together, removed ones included."""
    return Total(
        macs=sum(ledger.macs for ledger in ledgers),
        gpu_seconds=sum(ledger.gpu_seconds for ledger in ledgers),
        cost=total_cost(ledger.cost for ledger in ledgers),
        unpriced_seconds=_sum(ledger.unpriced_seconds for ledger in ledgers),
    )


def _sum(seconds: Iterable[float]) -> float:
    """Seconds of three decimals, added without a remainder."""
    return round(sum(seconds), 3)


def _gpu_seconds(pods: Iterable[PodTime], now: float) -> float:
    return sum(_length(pod, now) * pod.gpus for pod in pods)


def _seconds(pods: Iterable[PodTime], now: float) -> float:
    return sum(_length(pod, now) for pod in pods if pod.first)


def _length(pod: PodTime, now: float) -> float:
    """The seconds that a pod has run.

    A kubelet reports whole seconds. `floor` keeps a running pod from counting more than its end
    will say, since no figure may fall.
    """
    return max(0.0, (floor(now) if pod.finished is None else pod.finished) - pod.started)


def _ended(pod: PodTime, now: float) -> PodTime:
    """The pod with an end: its own, or now."""
    return pod if pod.finished is not None else pod.model_copy(update={"finished": now})


def _believed(attempt: AttemptStatus, seen: Seen) -> Mapping[str, PodTime]:
    """The pods in the status, without those that are known by now never to have run."""
    return {
        uid: pod
        for uid, pod in attempt.pods.items()
        if uid not in seen.never_ran and pod.started > 0
    }


def same_pods(attempt: AttemptStatus, seen: Seen) -> bool:
    """Whether the pods are as the status has them: then there is nothing new to account for.

    It is false if a pod has started, ended or vanished, or if a time was corrected.
    """
    known = _believed(attempt, seen)
    vanished = [pod for uid, pod in known.items() if uid not in seen.pods]
    there = _there(known, seen)
    same = there.items() <= known.items() and len(known) == len(attempt.pods)
    return same and all(pod.finished is not None for pod in vanished)
