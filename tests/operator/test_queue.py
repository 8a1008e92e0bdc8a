"""The work queue: one pass for a burst of events, one pass at a time per key, back-off, fairness,
and no memory of keys that are done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
import travel

from modelchain_operator.api.kube import Throttled
from modelchain_operator.watch.queue import WorkQueue

Passes = list[tuple[str, float]]


async def watch(
    queue: WorkQueue[str],
    passes: Passes,
    seconds: float,
    script: Callable[[], Awaitable[None]] | None = None,
) -> Passes:
    """Run the queue for so many seconds and return its passes with their times."""
    task = asyncio.create_task(queue.run())
    if script:
        await script()
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return passes


def recorder(
    passes: Passes, answer: Callable[[str], float | None] = lambda key: None, takes: float = 0.0
):
    async def reconcile(key: str) -> float | None:
        passes.append((key, round(travel.now(), 2)))
        await asyncio.sleep(takes)
        return answer(key)

    return reconcile


def test_a_burst_of_events_gives_one_pass_after_the_debounce() -> None:
    async def main() -> None:
        passes: Passes = []
        queue: WorkQueue[str] = WorkQueue(recorder(passes))

        async def burst() -> None:
            for _ in range(9):
                queue.add("a")
                await asyncio.sleep(0.01)

        assert await watch(queue, passes, 10, burst) == [("a", 0.5)]
        assert (len(queue), queue.counts) == (0, {"passes": 1, "coalesced": 8})

    travel.run(main())


def test_events_during_a_pass_give_one_more_pass_and_never_two_at_once() -> None:
    async def main() -> None:
        passes: Passes = []
        queue: WorkQueue[str] = WorkQueue(recorder(passes, takes=3.0))

        async def script() -> None:
            queue.add("a")
            await asyncio.sleep(1)  # the pass runs from 0.5 to 3.5
            queue.add("a")
            queue.add("a")

        assert await watch(queue, passes, 20, script) == [("a", 0.5), ("a", 4.0)]

    travel.run(main())


def test_the_earlier_request_wins_and_then_the_delay_that_the_pass_returned() -> None:
    async def main() -> None:
        passes: Passes = []
        queue: WorkQueue[str] = WorkQueue(recorder(passes, lambda key: 30.0))

        async def script() -> None:
            queue.add("a", 100)
            await asyncio.sleep(1)
            queue.add("a", 5)
            queue.add("a", 50)

        assert await watch(queue, passes, 69, script) == [("a", 6.0), ("a", 36.0), ("a", 66.0)]

    travel.run(main())


def test_failures_wait_longer_each_time_and_events_do_not_shorten_that() -> None:
    async def main() -> None:
        passes: Passes = []

        def fail(key: str) -> float | None:
            raise ValueError("poison")

        queue: WorkQueue[str] = WorkQueue(recorder(passes, fail))

        async def script() -> None:
            for _ in range(6000):
                queue.add("a")
                await asyncio.sleep(0.1)

        times = [time for _, time in await watch(queue, passes, 0, script)]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert all(1 <= gap <= 60.1 for gap in gaps)
        assert all(gap >= 45 for gap in gaps[6:])
        assert 12 < len(passes) < 22

    travel.run(main())


def test_a_success_ends_the_backoff() -> None:
    async def main() -> None:
        passes: Passes = []

        def fail_twice(key: str) -> float | None:
            if len(passes) < 3:
                raise ValueError("poison")
            return None

        queue: WorkQueue[str] = WorkQueue(recorder(passes, fail_twice))

        async def script() -> None:
            queue.add("a")
            await asyncio.sleep(60)
            queue.add("a")

        await watch(queue, passes, 5, script)
        assert (len(passes), passes[3], len(queue)) == (4, ("a", 60.5), 0)

    travel.run(main())


def test_the_queue_waits_as_long_as_retry_after_says() -> None:
    async def main() -> None:
        passes: Passes = []

        def busy(key: str) -> float | None:
            if len(passes) < 2:
                raise Throttled("429", retry_after=17)
            return None

        queue: WorkQueue[str] = WorkQueue(recorder(passes, busy))
        queue.add("a")
        assert await watch(queue, passes, 60) == [("a", 0.5), ("a", 17.5)]

    travel.run(main())


def test_a_pass_that_hangs_is_cancelled_and_other_keys_go_on() -> None:
    async def main() -> None:
        passes: Passes = []

        async def reconcile(key: str) -> float | None:
            passes.append((key, round(travel.now(), 1)))
            if key == "stuck":
                await asyncio.Event().wait()
            return 10.0

        queue: WorkQueue[str] = WorkQueue(reconcile, workers=2)
        queue.add("stuck")
        queue.add("good")
        await watch(queue, passes, 130)
        assert len([key for key, _ in passes if key == "good"]) == 13
        stuck = [time for key, time in passes if key == "stuck"]
        assert stuck[0] == 0.5 and 121 <= stuck[1] <= 122

    travel.run(main())


def test_keys_that_always_fail_do_not_starve_others() -> None:
    async def main() -> None:
        passes: Passes = []

        def answer(key: str) -> float | None:
            if key.startswith("bad"):
                raise ValueError(key)
            return 1.0

        queue: WorkQueue[str] = WorkQueue(recorder(passes, answer, takes=0.01), workers=2)
        for number in range(20):
            queue.add(f"bad{number}")
        queue.add("good")
        await watch(queue, passes, 60)
        assert len([key for key, _ in passes if key == "good"]) > 50

    travel.run(main())


def test_a_key_added_first_goes_before_keys_that_are_due() -> None:
    async def main() -> None:
        passes: Passes = []
        queue: WorkQueue[str] = WorkQueue(recorder(passes, takes=2.0), workers=1)
        for key in "abc":
            queue.add(key)
        queue.add("d", first=True)

        async def script() -> None:
            await asyncio.sleep(1)
            queue.add("e", first=True)
            queue.add("d")

        await watch(queue, passes, 20, script)
        keys = [key for key, _ in passes]
        assert keys[:2] == ["d", "e"] and set(keys[2:5]) == {*"abc"} and keys[5:] == ["d"]

    travel.run(main())


def test_no_pass_runs_while_the_gate_is_closed() -> None:
    async def main() -> None:
        passes: Passes = []
        gate = asyncio.Event()
        queue: WorkQueue[str] = WorkQueue(recorder(passes), gate=gate)

        async def script() -> None:
            queue.add("a")
            queue.add("b")
            await asyncio.sleep(30)
            queue.add("a")
            assert not passes
            gate.set()

        assert await watch(queue, passes, 10, script) == [("a", 30.0), ("b", 30.0)]

    travel.run(main())


def test_cancelling_the_queue_cancels_running_passes() -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def reconcile(key: str) -> float | None:
            try:
                await asyncio.sleep(1000)
            finally:
                ended.set()
            return None

        queue: WorkQueue[str] = WorkQueue(reconcile)
        queue.add("a")
        task = asyncio.create_task(queue.run())
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    travel.run(main())
