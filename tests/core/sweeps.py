"""Sweeps: many cases of one kind. `make test` tries a sample of them, `make test-all` all.

A parametrized test with the mark `sweep(n)` keeps n of its cases; the others are deselected
(tests/conftest.py). A test that finds its cases while it runs takes them from `sample` or `Dice`.
All of them use one seed, which is printed; set the environment variable SEED to repeat a run.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

ALL = "MODELCHAIN_SWEEPS"  # "all": nothing is sampled
left: Counter[str] = Counter()  # cases left to `make test-all`, by test


def everything() -> bool:
    return os.environ.get(ALL) == "all"


def seed() -> int:
    """The seed of this run. It is drawn once, and child processes inherit it."""
    return int(os.environ.setdefault("SEED", str(random.randrange(10**6))))


def chance(name: str) -> random.Random:
    """A stream of random numbers of its own for each name."""
    return random.Random(f"{seed()} {name}")


def sample(name: str, cases: Sequence[T], count: int) -> list[T]:
    """`count` of the cases in a random order; all of them if nothing is sampled."""
    kept = len(cases) if everything() else min(count, len(cases))
    left[name] += len(cases) - kept
    return chance(name).sample(cases, kept)


class Dice:
    """Keeps about one case in `one_in`; all of them if nothing is sampled (`one_in` is 1 then)."""

    def __init__(self, name: str, one_in: int):
        self.one_in = 1 if everything() else one_in
        self._name, self._chance = name, chance(name)

    def keep(self, case: object) -> bool:
        kept = self._chance.randrange(self.one_in) == 0
        left[self._name] += not kept
        return kept
