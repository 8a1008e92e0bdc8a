"""The pods of an attempt: for how long they held GPUs, and what rank 0 told of its work. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from modelchain.api.contracts import LastWord
from modelchain.api.status import AttemptStatus, PodTime, storable
from modelchain.api.uses import NOT_USED, Resumed, Uses
from modelchain.decide.observed import Seen


def known_pods(attempt: AttemptStatus, seen: Seen, now: float) -> dict[str, PodTime]:
    """All pods of the attempt, by UID.

    One that vanished without an end ended at the latest moment at which it was accounted.
    """
    believed = _believed(attempt)
    last = now if attempt.accounted_at is None else attempt.accounted_at
    vanished = {uid: _ended(pod, last) for uid, pod in believed.items() if uid not in seen.pods}
    return _told({**vanished, **_there(believed, seen)}, seen)


def _there(known: Mapping[str, PodTime], seen: Seen) -> dict[str, PodTime]:
    """The pods that are seen. What rank 0 told before stays, as it tells only while it is asked, or
    once it has ended.
    """
    return {uid: _with_told(pod, known.get(uid, pod)) for uid, pod in seen.pods.items()}


def _with_told(pod: PodTime, other: PodTime) -> PodTime:
    """The pod with what another account of the same pod tells, where that tells more."""
    if pod == other:
        return pod
    newest = max(pod, other, key=lambda told: (told.over, told.told.total))
    return pod.model_copy(
        update={
            "macs": storable(max(pod.macs, other.macs)),
            "saved_macs": storable(max(pod.saved_macs, other.saved_macs)),
            "told": newest.told,
            "over": newest.over,
            "capacity": pod.capacity or other.capacity,
        }
    )


def _told(pods: dict[str, PodTime], seen: Seen) -> dict[str, PodTime]:
    """The pods, with what the newest rank 0 tells of its work, and of the work that it resumes.

    A queue may evict the attempt and start it again. Each rank 0 counts from its own start.
    """
    firsts = sorted((pod.begins, uid) for uid, pod in pods.items() if pod.first)
    if not firsts:
        return pods
    newest = firsts.pop()[1]
    word = seen.verify if isinstance(seen.verify, LastWord) else None
    told = PodTime(
        macs=max(told_macs(seen), word.saved_macs if word else 0),
        saved_macs=word.saved_macs if word else seen.saved_macs,
        told=word.milliseconds if word else seen.told,
        over=word is not None and word.milliseconds != NOT_USED,
    )
    pods = {**pods, newest: _with_told(pods[newest], told)}
    resumed = resumed_from(seen)
    if resumed is not None:
        pods |= {uid: _resumed(pods[uid], uid, resumed) for _, uid in firsts}
    return pods


def resumed_from(seen: Seen) -> Resumed | None:
    """The checkpoint that the attempt began from; None if it has not told yet."""
    return seen.resumed or (seen.word.resumed if seen.word else None)


def _resumed(pod: PodTime, uid: str, resumed: Resumed) -> PodTime:
    """An earlier rank 0 of the same attempt, once the newest has told which work it resumes."""
    if pod.over:
        return pod
    if resumed.pod != uid:
        return pod.model_copy(update={"over": True})
    kept = PodTime(macs=resumed.macs, saved_macs=resumed.saved_macs, over=True)
    told = at_least(pod.told, resumed.milliseconds)
    return _with_told(pod, kept.model_copy(update={"told": told}))


def at_least(told: Uses, other: Uses) -> Uses:
    """The larger of both times, for each use."""
    return Uses(**{use: max(time, getattr(other, use)) for use, time in told})


def told_macs(seen: Seen) -> int:
    return max(seen.macs, seen.word.macs if seen.word else 0)


def _ended(pod: PodTime, last: float) -> PodTime:
    """The pod with an end: its own, or the latest moment at which it was accounted."""
    if pod.finished is not None:
        return pod
    finished = max(last, pod.begins, pod.started or 0.0)
    return pod.model_copy(update={"finished": finished, "estimated": True})


def _believed(attempt: AttemptStatus) -> Mapping[str, PodTime]:
    """The pods in the status. An older version may have taken 1970 for a start."""
    return {uid: pod for uid, pod in attempt.pods.items() if pod.begins > 0}


def same_pods(attempt: AttemptStatus, seen: Seen) -> bool:
    """Whether the pods are as the status has them: then there is nothing new to account for.

    It is false if a pod has started, ended or vanished, or if a time was corrected.
    """
    known = _believed(attempt)
    vanished = [pod for uid, pod in known.items() if uid not in seen.pods]
    there = _there(known, seen)
    same = there.items() <= known.items() and len(known) == len(attempt.pods)
    return same and all(pod.finished is not None for pod in vanished)
