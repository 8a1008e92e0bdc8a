"""How the GPU time of an attempt was used. Pure.

Pods say for how long GPUs were held, by the clocks of the cluster. The trainer says how it has used
its time, by its own clock. Here the first is divided as the second says. What the trainer did not
tell is not settled while it may still tell it, and lost afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import floor

from modelchain.api.status import PodTime
from modelchain.api.uses import NOT_USED, Uses
from modelchain.plan.prices import milliseconds

# The uses after the first step, in the order in which they are given the GPU time that there is.
_AFTER = ("productive", "evaluating", "lost", "stalled", "unsaved")


@dataclass(frozen=True)
class Start:
    """The pods of one start of an attempt's job: a queue may evict an attempt and start it again.

    `uid` is that of rank 0's pod; empty if it is not known.
    """

    uid: str
    pods: tuple[PodTime, ...]

    @property
    def first(self) -> PodTime | None:
        return next((pod for pod in self.pods if pod.first), None)

    @property
    def rate(self) -> int:
        """GPUs of all its pods."""
        return sum(pod.gpus for pod in self.pods)


def starts(pods: Mapping[str, PodTime]) -> list[Start]:
    """The starts of an attempt, the newest at the end.

    A pod belongs to the first start whose rank 0 ended after the pod began, for all pods of a start
    have ended before the next one.
    """
    firsts = sorted(((p.begins, uid, p) for uid, p in pods.items() if p.first), key=_moment)
    members: dict[str, list[PodTime]] = {uid: [first] for _, uid, first in firsts} or {"": []}
    newest = next(reversed(members))
    for pod in pods.values():
        if not pod.first:
            of = (uid for _, uid, f in firsts if f.finished is None or f.finished > pod.begins)
            members[next(of, newest)].append(pod)
    return [Start(uid, tuple(found)) for uid, found in members.items() if found]


def _moment(first: tuple[float, str, PodTime]) -> tuple[float, str]:
    return first[:2]


def held(pod: PodTime, now: float) -> tuple[int, int]:
    """Since when and until when the pod holds its GPUs, in milliseconds since the epoch.

    A kubelet reports whole seconds. `floor` keeps a running pod from counting more than its end
    will say, since no figure may fall.
    """
    begins = milliseconds(pod.begins)
    return begins, max(begins, milliseconds(floor(now) if pod.finished is None else pod.finished))


def gpu_time(pods: Iterable[PodTime], now: float) -> int:
    """For how long GPUs were held, in milliseconds, summed over all of them."""
    times = ((held(pod, now), pod.gpus) for pod in pods)
    return sum((end - begins) * gpus for (begins, end), gpus in times)


def used(start: Start, now: float) -> Uses:
    """How the GPU time of one start was used. It sums up to the time that its pods held GPUs."""
    whole, first = gpu_time(start.pods, now), start.first
    told = first.told if first is not None else NOT_USED
    over = first is not None and first.over
    if over and told.total == told.startup:  # it never came to a step
        return Uses(startup=whole)
    startup = _startup(start, told, now)
    return divided(told, start.rate, whole - startup, over=over) + Uses(startup=startup)


def _startup(start: Start, told: Uses, now: float) -> int:
    """The GPU time before the first step: until the trainer told of it, and in any case until the
    containers ran.
    """
    first, stepped = start.first, 0
    if first is not None and first.started is not None and told.startup:
        stepped = milliseconds(first.started) + told.startup
    time = 0
    for pod in start.pods:
        begins, end = held(pod, now)
        ran = end if pod.started is None else milliseconds(pod.started)
        time += (max(begins, min(end, max(stepped, ran))) - begins) * pod.gpus
    return time


def divided(told: Uses, rate: int, time: int, *, over: bool) -> Uses:
    """GPU time after the first step, divided as the trainer has told.

    Args:
        told: what the trainer has told, of one clock.
        rate: the GPUs for which it spoke.
        time: the GPU time that there is. If more was told, the last uses are cut.
        over: the trainer can tell no more, so what is left is lost.
    """
    parts, left = dict.fromkeys(_AFTER, 0), time
    for use in _AFTER:
        parts[use] = min(left, getattr(told, use) * rate)
        left -= parts[use]
    parts["unsaved"] += left
    found = Uses(**parts)
    return found.settled if over else found
