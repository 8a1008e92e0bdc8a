"""The queue: one look for a burst, one at a time for a key, back-off, fairness, nothing kept of
what is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
import travel

from modelchain_operator.api.kube import Throttled
from modelchain_operator.watch.queue import WorkQueue

Looks = list[tuple[str, float]]


async def watch(
    queue: WorkQueue[str],
    looks: Looks,
    seconds: float,
    script: Callable[[], Awaitable[None]] | None = None,
) -> Looks:
    """Run the queue for so long and return the looks with their times."""
    task = asyncio.create_task(queue.run())
    if script:
        await script()
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return looks


def recorder(
    looks: Looks, answer: Callable[[str], float | None] = lambda key: None, takes: float = 0.0
):
    async def reconcile(key: str) -> float | None:
        looks.append((key, round(travel.now(), 2)))
        await asyncio.sleep(takes)
        return answer(key)

    return reconcile


def test_a_burst_is_one_look_after_the_debounce() -> None:
    async def main() -> None:
        looks: Looks = []
        queue: WorkQueue[str] = WorkQueue(recorder(looks))

        async def burst() -> None:
            for _ in range(9):
                queue.add("a")
                await asyncio.sleep(0.01)

        assert await watch(queue, looks, 10, burst) == [("a", 0.5)]
        assert (len(queue), queue.counts) == (0, {"passes": 1, "coalesced": 8})

    travel.run(main())


def test_events_during_a_look_are_one_more_look_and_never_two_at_once() -> None:
    async def main() -> None:
        looks: Looks = []
        queue: WorkQueue[str] = WorkQueue(recorder(looks, takes=3.0))

        async def script() -> None:
            queue.add("a")
            await asyncio.sleep(1)  # the look runs from 0.5 to 3.5
            queue.add("a")
            queue.add("a")

        assert await watch(queue, looks, 20, script) == [("a", 0.5), ("a", 4.0)]

    travel.run(main())


def test_the_answer_and_the_earlier_request_win() -> None:
    async def main() -> None:
        looks: Looks = []
        queue: WorkQueue[str] = WorkQueue(recorder(looks, lambda key: 30.0))

        async def script() -> None:
            queue.add("a", 100)
            await asyncio.sleep(1)
            queue.add("a", 5)
            queue.add("a", 50)

        assert await watch(queue, looks, 69, script) == [("a", 6.0), ("a", 36.0), ("a", 66.0)]

    travel.run(main())


def test_failures_wait_longer_each_time_and_events_do_not_shorten_that() -> None:
    async def main() -> None:
        looks: Looks = []

        def fail(key: str) -> float | None:
            raise ValueError("poison")

        queue: WorkQueue[str] = WorkQueue(recorder(looks, fail))

        async def script() -> None:
            for _ in range(6000):
                queue.add("a")
                await asyncio.sleep(0.1)

        times = [time for _, time in await watch(queue, looks, 0, script)]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert all(1 <= gap <= 60.1 for gap in gaps)
        assert all(gap >= 45 for gap in gaps[6:])
        assert 12 < len(looks) < 22

    travel.run(main())


def test_a_success_ends_the_backoff() -> None:
    async def main() -> None:
        looks: Looks = []

        def fail_twice(key: str) -> float | None:
            if len(looks) < 3:
                raise ValueError("poison")
            return None

        queue: WorkQueue[str] = WorkQueue(recorder(looks, fail_twice))

        async def script() -> None:
            queue.add("a")
            await asyncio.sleep(60)
            queue.add("a")

        await watch(queue, looks, 5, script)
        assert (len(looks), looks[3], len(queue)) == (4, ("a", 60.5), 0)

    travel.run(main())


def test_retry_after_is_obeyed() -> None:
    async def main() -> None:
        looks: Looks = []

        def busy(key: str) -> float | None:
            if len(looks) < 2:
                raise Throttled("429", retry_after=17)
            return None

        queue: WorkQueue[str] = WorkQueue(recorder(looks, busy))
        queue.add("a")
        assert await watch(queue, looks, 60) == [("a", 0.5), ("a", 17.5)]

    travel.run(main())


def test_a_stalled_handler_is_cut_and_others_go_on() -> None:
    async def main() -> None:
        looks: Looks = []

        async def reconcile(key: str) -> float | None:
            looks.append((key, round(travel.now(), 1)))
            if key == "stuck":
                await asyncio.Event().wait()
            return 10.0

        queue: WorkQueue[str] = WorkQueue(reconcile, workers=2)
        queue.add("stuck")
        queue.add("good")
        await watch(queue, looks, 130)
        assert len([key for key, _ in looks if key == "good"]) == 13
        stuck = [time for key, time in looks if key == "stuck"]
        assert stuck[0] == 0.5 and 121 <= stuck[1] <= 122

    travel.run(main())


def test_poisoned_keys_do_not_starve_others() -> None:
    async def main() -> None:
        looks: Looks = []

        def answer(key: str) -> float | None:
            if key.startswith("bad"):
                raise ValueError(key)
            return 1.0

        queue: WorkQueue[str] = WorkQueue(recorder(looks, answer, takes=0.01), workers=2)
        for number in range(20):
            queue.add(f"bad{number}")
        queue.add("good")
        await watch(queue, looks, 60)
        assert len([key for key, _ in looks if key == "good"]) > 50

    travel.run(main())


def test_what_comes_first_goes_before_what_is_due_already() -> None:
    async def main() -> None:
        looks: Looks = []
        queue: WorkQueue[str] = WorkQueue(recorder(looks, takes=2.0), workers=1)
        for key in "abc":
            queue.add(key)
        queue.add("d", first=True)

        async def script() -> None:
            await asyncio.sleep(1)
            queue.add("e", first=True)
            queue.add("d")

        await watch(queue, looks, 20, script)
        keys = [key for key, _ in looks]
        assert keys[:2] == ["d", "e"] and set(keys[2:5]) == {*"abc"} and keys[5:] == ["d"]

    travel.run(main())


def test_nothing_is_done_while_the_gate_is_closed() -> None:
    async def main() -> None:
        looks: Looks = []
        gate = asyncio.Event()
        queue: WorkQueue[str] = WorkQueue(recorder(looks), gate=gate)

        async def script() -> None:
            queue.add("a")
            queue.add("b")
            await asyncio.sleep(30)
            queue.add("a")
            assert not looks
            gate.set()

        assert await watch(queue, looks, 10, script) == [("a", 30.0), ("b", 30.0)]

    travel.run(main())


def test_cancelling_ends_the_work_under_way() -> None:
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
