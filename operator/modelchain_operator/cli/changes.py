"""Follows objects as they change: listed once, then told by a watch."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, TypeVar

from modelchain_operator.api.kube import Gone, Kube, Object, Resource, Throttled, Unavailable
from modelchain_operator.api.objects import uid

T = TypeVar("T")

# Seconds before a watch that ended at once is begun again; doubled each time, up to LONGEST_PAUSE.
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0
# A watch that has lived for so many seconds has worked, even if it had nothing to tell.
LIVED = 30.0


async def changes(
    kube: Kube, resource: Resource, namespace: str | None, selector: str = "", fields: str = ""
) -> AsyncIterator[list[Object]]:
    """The objects of a kind now, and again after each change, without end.

    They are listed once. If the watch is too far behind, they are listed again. If its stream ends
    or breaks, another one goes on from the last version that was seen.

    Raises any `ApiError` of the first list. Later, one that another try may mend is not raised.
    """
    what = (resource, namespace)
    objects, version = await kube.list_at(*what, selector, fields)
    known = {uid(one): one for one in objects}
    yield list(known.values())
    pauses = _pauses()
    while True:
        began, wait = time.monotonic(), 0.0
        try:
            if not version:
                objects, version = await kube.list_at(*what, selector, fields)
                known = {uid(one): one for one in objects}
                yield list(known.values())
            async for kind, one in kube.watch(*what, version, selector, fields):
                pauses, version = _pauses(), one["metadata"]["resourceVersion"]
                if kind != "BOOKMARK":
                    _take(known, kind, one)
                    yield list(known.values())
        except Gone:
            version = ""
        except (Throttled, Unavailable) as error:
            wait = error.retry_after or 0.0
        if time.monotonic() - began > LIVED:
            pauses = _pauses()
        await asyncio.sleep(max(next(pauses), wait))


def _take(known: dict[str, Object], kind: str, one: Object) -> None:
    """Enter an event into the objects that are known, by UID."""
    if kind == "DELETED":
        known.pop(uid(one), None)
    else:
        known[uid(one)] = one


def _pauses() -> Iterator[float]:
    """The pauses between two streams, in seconds, each shortened by a random part."""
    doubled = (FIRST_PAUSE * 2.0**n for n in range(16))
    always = itertools.chain(doubled, itertools.repeat(LONGEST_PAUSE))
    return (min(pause, LONGEST_PAUSE) * random.uniform(0.5, 1.0) for pause in always)


class Feeds:
    """Streams that are read side by side, until the `async with` block is left."""

    def __init__(self) -> None:
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, stream: AsyncIterator[T], take: Callable[[T], None]) -> None:
        """Call `take` with everything that the stream yields."""

        async def read() -> None:
            async for one in stream:
                take(one)
                self.tell()

        self.run(read())

    def tell(self) -> None:
        """There is news."""
        self._news.set()

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine beside the streams. Its end is news."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self.tell())
        self._tasks.add(task)

    async def wait(self, seconds: float | None = None) -> None:
        """Until there is news, or for so many seconds at most.

        Raises the error of a stream that has failed.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return
        self._news.clear()
        for task in [task for task in self._tasks if task.done()]:
            self._tasks.discard(task)
            task.result()

    async def __aenter__(self) -> Feeds:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
