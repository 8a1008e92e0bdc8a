"""An exhaustive search: a few faults, in every order, at every moment of a small world. The world
itself asserts what must be true.

`make test` tries only some of the faults, chosen by a seed; see sweeps.py.
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
        """Equal for worlds that behave alike from here on."""

    def calm_step(self) -> bool:
        """What happens next without a fault; False once nothing changes any more."""

    def check_rest(self) -> None: ...


W = TypeVar("W", bound=Explorable)


def settle(world: W, longest_calm: int) -> W:
    """Without further faults the world comes to rest, in time and for a stated reason."""
    for _ in range(longest_calm):
        if not world.calm_step():
            world.check_rest()
            return world
    raise AssertionError("the world does not come to rest")


def explore(
    start: W,
    faults: Callable[[W], Iterable[Callable[[W], object]]],
    budget: int,
    longest_calm: int,
    dice: Dice,
    told: Callable[[W], AbstractContextManager[object]] = nullcontext,
) -> tuple[int, int]:
    """Checks that a world comes to rest from every state that up to `budget` faults lead to.

    Args:
        faults: the faults possible in a world, each a function that is applied to a copy of it.
        longest_calm: steps after which a world without further faults must have come to rest.
        dice: choose the faults that happen.
        told: a context around every change of a world, which says how a promise was broken.

    Returns:
        The number of states, and the number of states at rest.
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
        assert at is None, "the world does not come to rest"
    return len(calm), sum(following is None for following in calm.values())
