"""A work queue of keys: each key at most once at a time, bursts become one pass, failures wait
longer each time.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from prometheus_client import Histogram

from modelchain_operator.api.kube import ApiError

K = TypeVar("K", bound=Hashable)

log = logging.getLogger(__name__)

DEBOUNCE = 0.5  # seconds a burst of events is given to become one pass
BACKOFF_MIN, BACKOFF_MAX = 1.0, 60.0  # seconds; between them each failure doubles the wait
HANDLER_TIMEOUT = 120.0  # seconds
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, HANDLER_TIMEOUT)  # seconds


@dataclass
class _Entry:
    timer: asyncio.TimerHandle | None = None  # the next pass, while none is under way
    busy: bool = False  # in the hands of a worker, or waiting for one
    again: float | None = None  # when the next pass is due, if asked for while busy
    first: bool = False  # goes before others that are due
    not_before: float = 0.0  # the end of the back-off
    failures: int = 0  # in a row


class WorkQueue(Generic[K]):
    """Calls `reconcile(key)` for keys that were added; it answers in how many seconds the next
    pass is due, or None for no other.

    All times are the running loop's, so `WorkQueue` is made inside it, and `add` is called from it.
    Keys with nothing due are forgotten. `gate`, when given, holds all work back while it is clear;
    keys are kept meanwhile. `counts`: passes, failures, and requests that fell together with an
    earlier one (coalesced). `seconds`: how long passes took.
    """

    def __init__(
        self,
        reconcile: Callable[[K], Awaitable[float | None]],
        *,
        workers: int = 16,
        gate: asyncio.Event | None = None,
    ):
        self.reconcile = reconcile
        self.workers = workers
        self.gate = gate
        self.counts: Counter[str] = Counter()
        self.seconds = Histogram(
            "modelchain_operator_reconcile_duration_seconds",
            "How long a pass over a chain took; result: ok or failed",
            ["result"],
            buckets=BUCKETS,
            registry=None,
        )
        self._loop = asyncio.get_running_loop()
        self._entries: dict[K, _Entry] = {}
        self._ready: asyncio.PriorityQueue[tuple[bool, int, K]] = asyncio.PriorityQueue()
        self._turn = itertools.count()

    def __len__(self) -> int:
        """Keys that are due, waiting or in a pass."""
        return len(self._entries)

    @property
    def depth(self) -> int:
        """Keys that are due and wait for a worker."""
        return self._ready.qsize()

    def add(self, key: K, after: float = 0.0, first: bool = False) -> None:
        """Reconcile `key` in `after` seconds, never sooner than the debounce or the key's back-off;
        the earliest wins.

        When more keys are due than there are workers, those added as `first` go before the others.
        """
        entry = self._entries.setdefault(key, _Entry())
        entry.first |= first
        due = max(self._loop.time() + max(after, DEBOUNCE), entry.not_before)
        if entry.busy:
            self.counts["coalesced"] += entry.again is not None
            entry.again = due if entry.again is None else min(entry.again, due)
            return
        if entry.timer:
            self.counts["coalesced"] += 1
            if entry.timer.when() <= due:
                return
            entry.timer.cancel()
        entry.timer = self._loop.call_at(due, self._make_ready, key, entry)

    async def run(self) -> None:
        """Work until cancelled. An exception of `reconcile` is logged and tried again, never
        raised.
        """
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.workers):
                tasks.create_task(self._work())

    def _make_ready(self, key: K, entry: _Entry) -> None:
        entry.timer, entry.busy = None, True
        self._ready.put_nowait((not entry.first, next(self._turn), key))

    async def _work(self) -> None:
        while True:
            *_, key = await self._ready.get()
            if self.gate:
                await self.gate.wait()
            entry = self._entries[key]
            entry.again, entry.first = (
                None,
                False,
            )  # what was asked for until now is answered by this pass
            after = await self._pass(key, entry)
            entry.busy = False
            if entry.again is not None:
                self.add(key, entry.again - self._loop.time())
            if after is not None:
                self.add(key, after)
            if entry.timer is None:
                del self._entries[key]

    async def _pass(self, key: K, entry: _Entry) -> float | None:
        self.counts["passes"] += 1
        start, result = self._loop.time(), "failed"
        try:
            async with asyncio.timeout(HANDLER_TIMEOUT):
                after = await self.reconcile(key)
            result = "ok"
        except Exception as error:
            self.counts["failures"] += 1
            entry.failures += 1
            pause = min(
                BACKOFF_MAX, BACKOFF_MIN * 2.0 ** min(entry.failures - 1, 10)
            ) * random.uniform(0.75, 1.25)
            pause = min(max(pause, BACKOFF_MIN), BACKOFF_MAX)
            if isinstance(error, ApiError):
                pause = max(pause, error.retry_after or 0.0)
                log.warning("%s: %s; again in %.0f s", key, error, pause)
            elif isinstance(error, TimeoutError):
                log.error("%s: not done after %.0f s; again in %.0f s", key, HANDLER_TIMEOUT, pause)
            else:
                log.exception("%s: failed; again in %.0f s", key, pause)
            entry.not_before = self._loop.time() + pause
            return pause
        finally:
            self.seconds.labels(result).observe(self._loop.time() - start)
        entry.failures, entry.not_before = 0, 0.0
        return after
