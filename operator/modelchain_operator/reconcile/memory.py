"""What the operator remembers between two passes.

If all of it is lost, more has to be read again. No decision becomes wrong.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from modelchain.api.contracts import LiveProgress
from modelchain.api.reasons import Reason
from modelchain.decide.observed import Action, Refusal, subject_of
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import is_deleting, label, uid
from modelchain_operator.runners import pods as podread
from modelchain_operator.runners.template import CHAIN_UID

MAX_PODS = 4096
MOST_IGNORED = 100
# After a missed watch event a cached object is out of date for at most this long.
CACHED_SECONDS = 60.0


class Cache:
    """Objects by key, each for at most a minute.

    They are kept without `managedFields`, which make up half of a small object.
    """

    def __init__(self) -> None:
        # By key, when the object was put here, and the object.
        self._kept: dict[Any, tuple[float, Object]] = {}

    def get(self, key: Any) -> Object | None:
        when, value = self._kept.get(key, (0.0, None))
        return value if value is not None and time.monotonic() - when < CACHED_SECONDS else None

    def last(self, key: Any) -> Object | None:
        """The object as it was last put here, however long ago."""
        return self._kept.get(key, (0.0, None))[1]

    def put(self, key: Any, value: Object) -> None:
        if len(self._kept) > MAX_PODS:
            self._kept.clear()
        value["metadata"].pop("managedFields", None)
        self._kept[key] = (time.monotonic(), value)

    def drop(self, key: Any) -> None:
        self._kept.pop(key, None)


@dataclass(frozen=True)
class Asked:
    """What came of asking one rank 0 for its progress. All times but `at` are since the epoch."""

    # When rank 0 was last asked, in seconds of the monotonic clock.
    at: float = float("-inf")
    # The last answer, and when it came.
    answer: LiveProgress | None = None
    answered: float | None = None
    # Since when rank 0 has not answered; None while it does.
    silent: float | None = None
    # When rank 0 accepted a connection and did not answer, since its last answer.
    ignored: tuple[float, ...] = ()


@dataclass
class Memory:
    """All that one operator process remembers."""

    # By pod UID, pods whose container has terminated. If a pod is deleted with its job, only its
    # last watch event carries the last word.
    pods: OrderedDict[str, Object] = field(default_factory=OrderedDict)
    # By namespace and input digest.
    artifacts: Cache = field(default_factory=Cache)
    # By namespace and name.
    claims: Cache = field(default_factory=Cache)
    # By name.
    nodes: Cache = field(default_factory=Cache)
    # By the UID of rank 0's pod.
    progress: dict[str, Asked] = field(default_factory=dict)
    # By pod UID, since when this process has known that the pod is being deleted.
    deleting_since: dict[str, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.time
    # By chain UID, kind of action and its subject: why the action was refused when last tried.
    refused: dict[tuple[str, str, str], Refusal] = field(default_factory=dict)
    # By chain UID and generation, why no job can be made of a spec; None if one can.
    buildable: dict[tuple[str, int | None], Reason | None] = field(default_factory=dict)
    # The index Jobs that have ended well, by namespace and name. A dict serves as an ordered set.
    indexed: dict[tuple[str, str], None] = field(default_factory=dict)
    # By chain UID, the UIDs of its pods in `pods`. A dict serves as an ordered set.
    _of: dict[str, dict[str, None]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for key, pod in self.pods.items():
            self._of.setdefault(label(pod, CHAIN_UID), {})[key] = None

    def note_question(self, pod_uid: str) -> None:
        """Note that rank 0 is asked for its progress now. Its last answer stays."""
        if len(self.progress) > MAX_PODS:
            self.progress.clear()
        self.progress[pod_uid] = replace(self.progress.get(pod_uid, Asked()), at=time.monotonic())

    def note_answer(self, pod_uid: str, answer: LiveProgress) -> None:
        """Note that rank 0 has answered now."""
        self.progress[pod_uid] = Asked(time.monotonic(), answer, self.clock())

    def note_silence(self, pod_uid: str, *, accepted: bool) -> None:
        """Note that rank 0 has not answered now, and whether it `accepted` the connection."""
        before, now = self.progress.get(pod_uid, Asked()), self.clock()
        ignored = before.ignored
        if accepted:
            # The first one is always kept, since it tells for how long rank 0 has not answered.
            ignored = (*ignored[:1], *ignored[1:][-MOST_IGNORED:], now)
        silent = now if before.silent is None else before.silent
        self.progress[pod_uid] = replace(before, silent=silent, ignored=ignored)

    def note_deletion(self, pod: Object) -> None:
        """If the pod is being deleted, note since when this process has known that."""
        if is_deleting(pod):
            if len(self.deleting_since) > MAX_PODS:
                self.deleting_since.clear()
            self.deleting_since.setdefault(uid(pod), self.clock())

    def refuse(self, chain_uid: str, action: Action, why: Reason) -> bool:
        """Note why an action of a chain was refused. Returns whether that is news.

        An answer that differs from the one before in numbers only, such as a port, is no news. The
        status keeps its sentence then.
        """
        if len(self.refused) > MAX_PODS:
            self.refused.clear()
        before = self.refusal(chain_uid, action)
        if before is not None and _without_numbers(before.reason) == _without_numbers(why):
            return False
        since = self.clock() if before is None else before.since
        self.refused[_key(chain_uid, action)] = Refusal(why, since)
        return True

    def refusal(self, chain_uid: str, action: Action) -> Refusal | None:
        """Why an action of a chain was refused when it was last tried; None if it was not."""
        return self.refused.get(_key(chain_uid, action))

    def accepted(self, chain_uid: str, action: Action) -> None:
        """Note that an action was carried out, so that an earlier refusal no longer counts."""
        self.refused.pop(_key(chain_uid, action), None)

    def note_buildable(self, spec: tuple[str, int | None], why: Reason | None) -> None:
        """Note why no job can be made of a spec, by chain UID and generation."""
        if len(self.buildable) > MAX_PODS:
            self.buildable.clear()
        self.buildable[spec] = why

    def note_indexed(self, job: tuple[str, str]) -> None:
        """Note that an index Job has ended well, by its namespace and name."""
        if len(self.indexed) > MAX_PODS:
            self.indexed.clear()
        self.indexed[job] = None

    def remember(self, pod: Object) -> bool:
        """Keep what a pod tells of its end. Above the limit, the oldest pods are forgotten.

        Returns whether it tells of its end, and has not done so before.
        """
        self.note_deletion(pod)
        kept = podread.remember(pod)
        if kept is None:
            return False
        news = uid(pod) not in self.pods
        self.pods[uid(pod)] = kept
        self.pods.move_to_end(uid(pod))
        self._of.setdefault(label(kept, CHAIN_UID), {})[uid(pod)] = None
        while len(self.pods) > MAX_PODS:
            oldest, pod = self.pods.popitem(last=False)
            of_chain = self._of[label(pod, CHAIN_UID)]
            del of_chain[oldest]
            if not of_chain:
                del self._of[label(pod, CHAIN_UID)]
        return news

    def pods_of(self, chain_uid: str) -> list[Object]:
        """The remembered pods of a chain."""
        return [self.pods[pod] for pod in self._of.get(chain_uid, ())]


def _key(chain_uid: str, action: Action) -> tuple[str, str, str]:
    return chain_uid, type(action).__name__, subject_of(action)


def _without_numbers(reason: Reason) -> str:
    return re.sub(r"\d+", "", reason.text)
