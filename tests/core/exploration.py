"""Every order of a few faults, at every moment of a small world: what holds in it is asserted by
the world itself.

In `make test` only some of the faults happen, chosen by a seed; see sweeps.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

from sweeps import Dice


class Explorable(Protocol):
    def copy(self) -> Any: ...
    def key(self) -> bytes:
        """Equal for worlds from which the same follows."""

    def calm_step(self) -> bool:
        """What happens next if nothing is in the way; False at rest."""

    def check_rest(self) -> None: ...


W = TypeVar("W", bound=Explorable)


def explore(
    start: W,
    faults: Callable[[W], Iterable[Callable[[W], object]]],
    budget: int,
    longest_calm: int,
    dice: Dice,
    told: Callable[[W], AbstractContextManager[object]] = nullcontext,
) -> tuple[int, int]:
    """From every state that up to `budget` faults lead to, an undisturbed world comes to rest as it
    should.

    Args:
        faults: all that may go wrong in a world, each to be done to a copy of it.
        longest_calm: steps within which an undisturbed world comes to rest.
        dice: choose the faults that happen.
        told: held around all that happens to a world, to say how a promise was broken.

    Returns:
        How many states and how many ends there were.
    """
    calm: dict[bytes, bytes | None] = {}
    seen = {start.key(): budget}
    queue = deque([(start, budget)])
    while queue:
        world, left = queue.popleft()
        key = world.key()
        following: list[tuple[W, int]] = []
        after = world.copy()
        with told(after):
            if after.calm_step():
                calm[key] = after.key()
                following.append((after, left))
            else:
                after.check_rest()
                calm[key] = None
        if left:
            for happen in filter(dice.keep, faults(world)):
                other = world.copy()
                with told(other):
                    happen(other)
                following.append((other, left - 1))
        for other, rest in following:
            if seen.get(other.key(), -1) < rest:
                seen[other.key()] = rest
                queue.append((other, rest))
    for key in calm:
        at: bytes | None = key
        for _ in range(longest_calm):
            if at is None:
                break
            at = calm[at]
        assert at is None, "it does not end"
    return len(calm), sum(following is None for following in calm.values())
