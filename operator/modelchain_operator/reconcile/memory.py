"""What the operator remembers between two passes. Losing all of it costs reads, never a wrong
step.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from modelchain.api.contracts import LiveProgress
from modelchain.api.reasons import Reason
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import is_deleting, label, uid
from modelchain_operator.runners import pods as podread
from modelchain_operator.runners.template import CHAIN_UID

MAX_PODS = 4096
MOST_IGNORED = 100
CACHED_SECONDS = 60.0  # a missed watch event heals within it


class Cache:
    """Objects by key, for at most a minute, without `managedFields`, which are half of a small
    object.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, tuple[float, Object]] = {}

    def get(self, key: Any) -> Object | None:
        when, value = self._kept.get(key, (0.0, None))
        return value if value is not None and time.monotonic() - when < CACHED_SECONDS else None

    def put(self, key: Any, value: Object) -> None:
        if len(self._kept) > MAX_PODS:
            self._kept.clear()
        value["metadata"].pop("managedFields", None)
        self._kept[key] = (time.monotonic(), value)

    def drop(self, key: Any) -> None:
        self._kept.pop(key, None)


@dataclass(frozen=True)
class Asked:
    """What came of asking a rank 0 for its progress.

    Times are in seconds: `at` by the monotonic clock, the others since the epoch. `ignored`: when
    connections were accepted and stayed unanswered, since it last answered.
    """

    at: float = float("-inf")
    answer: LiveProgress | None = None
    answered: float | None = None
    silent: float | None = None
    ignored: tuple[float, ...] = ()


@dataclass
class Memory:
    """`pods`: terminated states by pod UID; of a pod that is deleted with its job, a watch event
    alone has the last word.
    """

    pods: OrderedDict[str, Object] = field(default_factory=OrderedDict)
    artifacts: Cache = field(default_factory=Cache)  # by namespace and input digest
    claims: Cache = field(default_factory=Cache)  # by namespace and name
    progress: dict[str, Asked] = field(default_factory=dict)  # by rank 0's pod UID
    going: dict[str, float] = field(
        default_factory=dict
    )  # by pod UID, since when it is known to be deleted
    clock: Callable[[], float] = time.time
    refused: dict[tuple[str, str], Reason] = field(
        default_factory=dict
    )  # why, by namespace and name of a job or record
    _of: dict[str, dict[str, None]] = field(
        default_factory=dict, init=False
    )  # UIDs of pods by that of their chain

    def __post_init__(self) -> None:
        for key, pod in self.pods.items():
            self._of.setdefault(label(pod, CHAIN_UID), {})[key] = None

    def asks(self, pod_uid: str) -> None:
        """Rank 0 is asked for its progress now; what it said before stays."""
        if len(self.progress) > MAX_PODS:
            self.progress.clear()
        self.progress[pod_uid] = replace(self.progress.get(pod_uid, Asked()), at=time.monotonic())

    def told(self, pod_uid: str, answer: LiveProgress) -> None:
        """What rank 0 said of its progress, now."""
        self.progress[pod_uid] = Asked(time.monotonic(), answer, self.clock())

    def unheard(self, pod_uid: str, *, accepted: bool) -> None:
        """Rank 0 said nothing, though it may have `accepted` the connection."""
        before, now = self.progress.get(pod_uid, Asked()), self.clock()
        ignored = before.ignored
        if accepted:  # the first is kept: it says for how long
            ignored = (*ignored[:1], *ignored[1:][-MOST_IGNORED:], now)
        silent = now if before.silent is None else before.silent
        self.progress[pod_uid] = replace(before, silent=silent, ignored=ignored)

    def goes(self, pod: Object) -> None:
        """If it is being deleted: since now, unless that was known before."""
        if is_deleting(pod):
            if len(self.going) > MAX_PODS:
                self.going.clear()
            self.going.setdefault(uid(pod), self.clock())

    def refuse(self, key: tuple[str, str], why: Reason) -> None:
        """An object of that namespace and name may not be made, or not be released."""
        if len(self.refused) > MAX_PODS:
            self.refused.clear()
        self.refused[key] = why

    def remember(self, pod: Object) -> None:
        self.goes(pod)
        kept = podread.remember(pod)
        if kept is None:
            return
        self.pods[uid(pod)] = kept
        self.pods.move_to_end(uid(pod))
        self._of.setdefault(label(kept, CHAIN_UID), {})[uid(pod)] = None
        while len(self.pods) > MAX_PODS:
            oldest, pod = self.pods.popitem(last=False)
            of_chain = self._of[label(pod, CHAIN_UID)]
            del of_chain[oldest]
            if not of_chain:
                del self._of[label(pod, CHAIN_UID)]

    def pods_of(self, chain_uid: str) -> list[Object]:
        return [self.pods[pod] for pod in self._of.get(chain_uid, ())]
