"""A work queue of keys.

No key is worked on twice at a time, a burst of events becomes one pass, and a key that fails waits
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

# All times are in seconds.

# How long a key waits before its pass, so that a burst of events becomes one pass.
DEBOUNCE = 0.5
# The wait after the first failure, and the longest. Each failure in a row doubles the wait.
BACKOFF_MIN, BACKOFF_MAX = 1.0, 60.0
# A pass that takes longer is cancelled and counts as failed.
HANDLER_TIMEOUT = 120.0
# The upper bounds of the histogram of durations.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, HANDLER_TIMEOUT)


@dataclass
class _Entry:
    """One key in the queue."""

    # Fires when the next pass is due. None while the key is busy.
    timer: asyncio.TimerHandle | None = None
    # A worker has the key, or the key is due and waits for a worker.
    busy: bool = False
    # When the next pass is due, if one was asked for while the key was busy.
    again: float | None = None
    # The key goes before others that are due.
    first: bool = False
    # When the back-off ends.
    not_before: float = 0.0
    # Failures in a row.
    failures: int = 0


class WorkQueue(Generic[K]):
    """Calls `reconcile(key)` for every key that is added.

    `reconcile` returns the seconds until the key's next pass is due, or None. A key for which none
    is due is forgotten. While `gate` is clear, no pass is begun, but keys are kept.

    All times are those of the running event loop. So a queue is made in a running loop, and `add`
    is called from that loop's thread.
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
        # Passes, failures, and requests that were merged with an earlier one ("coalesced").
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
        # Keys that are due. `False` sorts first, then the key that has been due for longest.
        self._ready: asyncio.PriorityQueue[tuple[bool, int, K]] = asyncio.PriorityQueue()
        self._turn = itertools.count()

    def __len__(self) -> int:
        """The number of keys that wait for their time or a worker, or are in a pass."""
        return len(self._entries)

    @property
    def depth(self) -> int:
        """The number of keys that are due and wait for a worker."""
        return self._ready.qsize()

    def add(self, key: K, after: float = 0.0, first: bool = False) -> None:
        """Reconcile `key` in `after` seconds, but not before its debounce and back-off are over.

        If the key is added several times, the earliest time counts. When more keys are due than
        there are workers, those that were added as `first` go before the others.
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
        """Work until cancelled. If `reconcile` raises, log it and try the key again later."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.workers):
                tasks.create_task(self._work())

    def _make_ready(self, key: K, entry: _Entry) -> None:
        entry.timer, entry.busy = None, True
        self._ready.put_nowait((not entry.first, next(self._turn), key))

    async def _work(self) -> None:
        """One worker: it takes one key after the other, for ever."""
        while True:
            *_, key = await self._ready.get()
            if self.gate:
                await self.gate.wait()
            entry = self._entries[key]
            # This pass answers every request that came before it.
            entry.again, entry.first = None, False
            after = await self._pass(key, entry)
            entry.busy = False
            if entry.again is not None:
                self.add(key, entry.again - self._loop.time())
            if after is not None:
                self.add(key, after)
            if entry.timer is None:
                del self._entries[key]

    async def _pass(self, key: K, entry: _Entry) -> float | None:
        """Call `reconcile` once. Returns the seconds until the next pass, or None."""
        self.counts["passes"] += 1
        start, result = self._loop.time(), "failed"
        try:
            async with asyncio.timeout(HANDLER_TIMEOUT):
                after = await self.reconcile(key)
            result = "ok"
        except Exception as error:
            self.counts["failures"] += 1
            entry.failures += 1
            pause = min(BACKOFF_MAX, BACKOFF_MIN * 2.0 ** min(entry.failures - 1, 10))
            # Some jitter, so that keys which failed together do not come back together.
            pause = min(max(pause * random.uniform(0.75, 1.25), BACKOFF_MIN), BACKOFF_MAX)
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
