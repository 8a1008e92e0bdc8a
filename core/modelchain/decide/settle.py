"""Settles the work of an attempt: which part of it a checkpoint or the artifact has kept. Pure.

Rank 0's last word settles it. Where that was lost, the next trainer knows: the checkpoint from
which it resumes says who wrote it, and what that one had done by then.
"""

from __future__ import annotations

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.status import AttemptStatus, PodTime, Spent, State, Unsettled, storable
from modelchain.api.uses import Resumed, Uses
from modelchain.decide.split import Start, starts, used
from modelchain.plan.prices import milliseconds

# These end an attempt because it has never taken a step.
_NEVER_STEPPED = (FailureClass.START_DEADLINE, FailureClass.IMAGE, FailureClass.INIT)


def at_its_end(
    attempt: AttemptStatus,
    state: State,
    failure: FailureClass | None,
    now: float,
    end: float,
    word: LastWord | None,
) -> AttemptStatus:
    """The attempt, which is closed, with its work settled as far as that is known.

    Args:
        attempt: accounted until `now`.
        state: its last one.
        failure: how it failed, if it did.
        now: seconds since the epoch.
        end: when its last pod ended.
        word: rank 0's last word, if it left one.
    """
    known = starts(attempt.pods)
    if not known:
        return _without_pods(attempt, state, word)
    *earlier, newest = known
    attempt = _without_word(attempt, earlier)
    before = sum((used(start, now).settled for start in earlier), attempt.gone.gpu_milliseconds)
    uses, first = used(newest, now), newest.first
    if first is None or first.started is None or first.over:
        return _with(attempt, before + uses.settled, None)
    told = min(uses.unsaved, first.told.unsaved * newest.rate)
    if state is State.SUCCEEDED:
        uses = _moved(uses, "productive", told).settled
        return _with(attempt, before + uses, None)
    if failure in _NEVER_STEPPED and first.told.total == first.told.startup:
        return _with(attempt, before + _moved(uses, "startup", uses.unsaved), None)
    if failure is FailureClass.STALL_DEADLINE and attempt.stepped_at is not None:
        stalled = (milliseconds(end) - milliseconds(attempt.stepped_at)) * newest.rate
        more = max(0, min(uses.unsaved - told, stalled - uses.stalled))
        uses = _moved(uses, "stalled", more)
    return _with(attempt, before + uses, _unsettled(newest, first))


def _without_word(attempt: AttemptStatus, earlier: list[Start]) -> AttemptStatus:
    """The attempt, with the MACs lost of earlier starts that left no last word."""
    firsts = (start.first for start in earlier)
    lost = (max(0, f.macs - f.saved_macs) for f in firsts if f is not None and not f.over)
    return attempt.changed(lost_macs=storable(attempt.lost_macs + sum(lost)))


def _unsettled(start: Start, first: PodTime) -> Unsettled:
    return Unsettled(
        pod=start.uid,
        gpus=start.rate,
        told=first.told,
        macs=first.macs,
        saved_macs=first.saved_macs,
    )


def _moved(uses: Uses, use: str, time: int) -> Uses:
    """The uses, of which so much was unsaved and has this use."""
    return uses.model_copy(update={use: getattr(uses, use) + time, "unsaved": uses.unsaved - time})


def _without_pods(attempt: AttemptStatus, state: State, word: LastWord | None) -> AttemptStatus:
    """An attempt on a laptop. Without a last word only its MACs are known."""
    told = attempt.gpu_milliseconds.total or (word is not None and word.milliseconds.total)
    if told or not attempt.macs or state is State.SUCCEEDED:
        return _with(attempt, attempt.gpu_milliseconds.settled, None)
    return _with(attempt, attempt.gpu_milliseconds, Unsettled(macs=attempt.macs))


def _with(attempt: AttemptStatus, uses: Uses, unsettled: Unsettled | None) -> AttemptStatus:
    return attempt.changed(
        gpu_seconds=uses.total / 1000, gpu_milliseconds=uses, unsettled=unsettled
    )


def settled(attempt: AttemptStatus, resumed: Resumed | None) -> AttemptStatus:
    """The closed attempt, once it is known which part of its work was kept.

    Args:
        resumed: the checkpoint from which a later attempt began; None if no attempt follows.
    """
    known = attempt.unsettled
    if known is None:
        return attempt
    kept = known
    if resumed is not None and (resumed.attempt, resumed.pod) == (attempt.name, known.pod):
        kept = known.model_copy(
            update={
                "told": resumed.milliseconds,
                "macs": max(known.macs, resumed.macs),
                "saved_macs": max(known.saved_macs, resumed.saved_macs),
            }
        )
    more = {
        use: max(0, getattr(kept.told, use) - getattr(known.told, use)) * known.gpus
        for use in ("startup", "productive", "evaluating")
    }
    uses, left = dict(attempt.gpu_milliseconds), attempt.gpu_milliseconds.unsaved
    for use, time in more.items():
        uses[use] += min(left, time)
        left -= min(left, time)
    lost = attempt.lost_macs + max(0, kept.macs - kept.saved_macs)
    return attempt.changed(
        gpu_milliseconds=Uses(**uses | {"unsaved": 0, "lost": uses["lost"] + left}),
        macs=storable(attempt.macs + kept.macs - known.macs),
        lost_macs=storable(lost),
        unsettled=None,
    )


def moved(spent: Spent, before: AttemptStatus, after: AttemptStatus) -> Spent:
    """The ledger that has the attempt as it was before, with what was settled since."""
    uses = {
        use: time + getattr(after.gpu_milliseconds, use) - getattr(before.gpu_milliseconds, use)
        for use, time in spent.gpu_milliseconds
    }
    return spent.model_copy(
        update={
            "macs": storable(spent.macs + after.macs - before.macs),
            "lost_macs": storable(spent.lost_macs + after.lost_macs - before.lost_macs),
            "gpu_milliseconds": Uses(**uses),
        }
    )


def all_settled(spent: Spent) -> Spent:
    """The ledger, of which nothing is still to be settled."""
    return spent.model_copy(update={"gpu_milliseconds": spent.gpu_milliseconds.settled})
