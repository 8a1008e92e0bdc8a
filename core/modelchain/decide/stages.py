"""What becomes of one stage: behind another one, while its attempt runs, and after one that left
nothing. Pure.
"""

from __future__ import annotations

from typing import Any

from modelchain.api.status import AttemptStatus, StageStatus, State
from modelchain.decide.ledger import account, booked, same_pods, shown
from modelchain.decide.observed import Seen
from modelchain.decide.verdict import Verdict


def behind(stage: StageStatus, blocked: str, attempts: list[AttemptStatus]) -> StageStatus:
    """A stage that waits for the stage `blocked`, with its attempts as they are now."""
    failed = stage.state is State.FAILED
    update: dict[str, Any] = {
        "state": State.FAILED if failed else State.PENDING,
        "reason": stage.reason if failed else f"waits for stage {blocked}",
        "input_digest": None,
        "cache": None,
        "artifact": None,
        "results": {},
        "progress": None,
        "inherits_at": None,
    }
    return stage.model_copy(update={**update, **booked(stage, attempts)})


def accounted(stage: StageStatus, seen: Seen, now: float, price: str | None) -> StageStatus:
    """The stage with what its newest attempt has spent, if a step or a pod is new, and with that
    step.

    The step is kept whatever else happens to the attempt: otherwise it is new again at the next
    look, and since time goes on, every look would write what was spent, and nothing would ever be
    done.

    Args:
        seen: of that attempt, whose job or pods are there.
        now: seconds since the epoch.
        price: of a GPU hour.
    """
    attempt = stage.attempts[-1]
    stepped = _stepped(stage, attempt, seen)
    if not stepped and same_pods(attempt, seen):
        return stage
    attempt = account(attempt, seen, now, price)
    if stepped and seen.macs > 0:  # a resumed attempt says its step before it takes the next
        attempt = attempt.model_copy(update={"stepped_at": now})
    attempts = [*stage.attempts[:-1], attempt]
    progress = seen.progress or stage.progress
    return stage.model_copy(
        update={"progress": progress, "attempts": attempts, **shown(stage.spent, attempts)}
    )


def _stepped(stage: StageStatus, attempt: AttemptStatus, seen: Seen) -> bool:
    """Its step is another than the one that is written, or it is its first."""
    step = stage.progress.step if stage.progress else None
    first = attempt.stepped_at is None and seen.macs > 0
    return seen.progress is not None and (step != seen.progress.step or first)


def after(
    stage: StageStatus,
    closed: AttemptStatus,
    verdict: Verdict,
    now: float,
    backoff: float,
    stopping: str | None,
) -> StageStatus:
    """The stage after its newest attempt was judged: it goes on, waits, tries again or has failed.

    Args:
        closed: that attempt, closed.
        now: seconds since the epoch.
        backoff: seconds until the first retry; doubled for each one more, up to 64 times.
        stopping: why nothing may run, if so.
    """
    stage = stage.model_copy(
        update={
            **booked(stage, [*stage.attempts[:-1], closed]),
            "progress": None,
            "checkpoint_step": verdict.checkpoint_step,
            "retries": verdict.retries,
            "disruptions": verdict.disruptions,
        }
    )
    update: dict[str, Any]
    if verdict.stopped:
        update = {
            "state": State.SUSPENDED if stopping else State.PENDING,
            "reason": stopping or "goes on from its newest checkpoint",
        }
    elif verdict.final is not None:
        update = {"state": State.FAILED, "reason": f"{verdict.failure}: {verdict.final}"}
    else:
        wait = backoff * 2 ** min(verdict.retries - 1, 6) if verdict.pays_retry else 0.0
        update = {
            "state": State.PENDING,
            "reason": f"{verdict.failure}: {verdict.message}; tries again",
            "not_before": now + wait,
            "retried": {
                **stage.retried,
                verdict.failure: stage.retried.get(verdict.failure, 0) + 1,
            },
        }
    return stage.model_copy(update=update)
