"""What attempts have spent. It is kept for each pod, and added to the stage once, when the attempt
closes; so the status may forget old attempts and loses no spending.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from math import floor

from modelchain.api.contracts import FailureClass
from modelchain.api.messages import shortened
from modelchain.api.status import AttemptStatus, PodTime, Spent, StageStatus, State, Total
from modelchain.decide.observed import Seen

KEPT_ATTEMPTS = 10
MESSAGE_LENGTH = 512
MAX_PODS = 256  # listed of one attempt: the largest gang, and as many keys as the CRD allows
CENT = Decimal("0.01")


def timestamp(now: float) -> str:
    """RFC 3339 in UTC, whole seconds, as Kubernetes writes times."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def account(attempt: AttemptStatus, seen: Seen, now: float, price: str | None) -> AttemptStatus:
    """The open attempt with what its pods have spent until `now` (seconds since the epoch).

    A pod that vanished without an end is taken to have run until now. Everything is computed again
    from the times that are known now, so a wrong time is corrected later. Pods stay listed after
    they are gone: one that appears again then counts once. If there are too many, those that are
    gone are summed up in `gone`.
    """
    left = {
        uid: _ended(pod, now)
        for uid, pod in _believed(attempt, seen).items()
        if uid not in seen.pods
    }
    pods, over = _listed({**left, **seen.pods}, seen)
    gone = Spent(
        gpu_seconds=attempt.gone.gpu_seconds + _gpu_seconds(over, now),
        seconds=attempt.gone.seconds + _seconds(over, now),
    )
    word = seen.word
    gpu_seconds = gone.gpu_seconds + _gpu_seconds(pods.values(), now)
    if not pods and not gone.seconds:  # without pods (a laptop) the attempt's own figures count
        gpu_seconds = max(seen.gpu_seconds, word.gpu_seconds if word else 0.0)
    return attempt.changed(
        pods=pods,
        gone=gone,
        gpu_seconds=round(gpu_seconds, 3),
        cost=attempt.cost if price is None else money(gpu_seconds, price),
        # A last word that had to be brief may hold less than what was seen before it.
        macs=max(attempt.macs, seen.macs, word.macs if word else 0),
        checkpoint_step=max(attempt.checkpoint_step, seen.checkpoint_step),
    )


def _listed(pods: dict[str, PodTime], seen: Seen) -> tuple[dict[str, PodTime], list[PodTime]]:
    """The pods to list, and those to sum up: if there are too many, all that are gone.

    No gang has more pods than may be listed. If more exist all the same, the oldest are left out
    and not summed up, because the next pass reads them again and they would count twice.
    """
    if len(pods) <= MAX_PODS:
        return pods, []
    there = {uid: pod for uid, pod in seen.pods.items() if uid not in seen.gone_pods}
    over = [pod for uid, pod in pods.items() if uid not in there]
    return dict(sorted(there.items(), key=lambda item: item[1].started)[-MAX_PODS:]), over


def running_seconds(attempt: AttemptStatus, now: float) -> float:
    """Seconds that rank 0 has run, over all pods of the attempt; time in a queue is not counted."""
    return attempt.gone.seconds + _seconds(attempt.pods.values(), now)


def ended(attempt: AttemptStatus, seen: Seen, now: float) -> float:
    """When the attempt's last pod ended, but not later than now; without pods, now."""
    pods = {**attempt.pods, **seen.pods}.values()
    return min(now, max((pod.finished for pod in pods if pod.finished is not None), default=now))


def closed(
    attempt: AttemptStatus,
    seen: Seen,
    now: float,
    price: str | None,
    state: State,
    failure: FailureClass | None = None,
    message: str = "",
) -> AttemptStatus:
    """The attempt in its final form: it has ended, and its spending does not change any more."""
    final = account(attempt, seen, now, price)
    node, fault = None, ""
    if failure is FailureClass.HARDWARE:
        node, fault = next(iter(seen.bad_nodes.items()), (None, ""))
    return final.changed(
        state=state,
        failure=failure,
        message=shortened(message, MESSAGE_LENGTH),
        finished_at=timestamp(now),
        gone=Spent(seconds=running_seconds(final, now)),
        pods={},
        ending=None,
        stepped_at=None,
        node=node,
        fault=fault,
    )


def least(stage: StageStatus, steps: int | None) -> int:
    """The least MACs of a finished stage, as its trainer counts them: a whole number each step."""
    return stage.planned_macs // (steps or 1) * (steps or 1)


def whole(stage: StageStatus, final: AttemptStatus) -> AttemptStatus:
    """The attempt that finished a stage, with MACs that no trainer could report.

    An earlier attempt may have been killed some time after it last told its progress, and this one
    resumed from its checkpoint. Together they have done at least the whole stage once.
    """
    if not any(
        a.name != final.name and a.input_digest == final.input_digest for a in stage.attempts
    ):
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
    )


def open_spending(spent: Spent, attempts: Iterable[AttemptStatus]) -> Total:
    """A stage's figures: the ledger, and what the open attempt has spent so far."""
    running = [a for a in attempts if a.finished_at is None]
    return Total(
        macs=spent.macs + sum(a.macs for a in running),
        gpu_seconds=spent.gpu_seconds + sum(a.gpu_seconds for a in running),
        cost=total_cost([spent.cost, *(a.cost for a in running)]),
    )


def money(gpu_seconds: float, price_per_hour: str | None) -> str | None:
    """GPU time in money, to the cent; None without a price."""
    if price_per_hour is None:
        return None
    return str(
        (Decimal(gpu_seconds) * Decimal(price_per_hour) / 3600).quantize(CENT, ROUND_HALF_UP)
    )


def total_cost(costs: Iterable[str | None]) -> str | None:
    """The sum of those that are known; None if none is."""
    known = [Decimal(cost) for cost in costs if cost is not None]
    return str(sum(known, Decimal(0)).quantize(CENT)) if known else None


def _gpu_seconds(pods: Iterable[PodTime], now: float) -> float:
    return sum(_length(pod, now) * pod.gpus for pod in pods)


def _seconds(pods: Iterable[PodTime], now: float) -> float:
    return sum(_length(pod, now) for pod in pods if pod.first)


def _length(pod: PodTime, now: float) -> float:
    # A kubelet tells whole seconds: so counted, what runs never has more than its end will say.
    return max(0.0, (floor(now) if pod.finished is None else pod.finished) - pod.started)


def _ended(pod: PodTime, now: float) -> PodTime:
    return pod if pod.finished is not None else pod.model_copy(update={"finished": now})


def _believed(attempt: AttemptStatus, seen: Seen) -> Mapping[str, PodTime]:
    """The attempt's pods, without those that never ran, as is known by now."""
    return {
        uid: pod
        for uid, pod in attempt.pods.items()
        if uid not in seen.never_ran and pod.started > 0
    }


def same_pods(attempt: AttemptStatus, seen: Seen) -> bool:
    """Whether no pod has started, ended or vanished since the attempt was last accounted for, and
    no time was corrected.
    """
    known = _believed(attempt, seen)
    vanished = [pod for uid, pod in known.items() if uid not in seen.pods]
    same = seen.pods.items() <= known.items() and len(known) == len(attempt.pods)
    return same and all(pod.finished is not None for pod in vanished)
