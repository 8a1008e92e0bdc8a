"""Shard patterns in brace notation, expanded as by webdataset, with a bound on the
number of paths.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import PurePosixPath

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from modelchain.api.messages import DEEP_BRACES, MANY_FILES, NUL, UNBALANCED
from modelchain.errors import InputError

MAX_SHARDS = 100_000
MAX_DEPTH = 20
_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?")


def expand(pattern: str) -> list[str]:
    """The paths a pattern such as `/data/train-{00000..00331}.tar` names, in order.

    Raises:
        InputError: unbalanced braces, a NUL, or more than MAX_SHARDS paths.
    """
    if "\0" in pattern:
        raise InputError(NUL)
    if _count(pattern) > MAX_SHARDS:
        raise InputError(MANY_FILES.format(limit=MAX_SHARDS))
    try:
        return list(braceexpand(pattern, escape=False))
    except UnbalancedBracesError as error:
        raise InputError(UNBALANCED.format(pattern=pattern)) from error


def paths(files: str | list[str]) -> list[str]:
    """The paths of a pattern, or the items of a list."""
    return expand(files) if isinstance(files, str) else files


def base_names(pattern: str) -> list[str]:
    """The part of the shards that is hashed: their names in order, without folders."""
    lasts = ((name, name.rpartition("/")[2]) for name in expand(pattern))
    # A path may end in "/" or "/.", which is no part of its name.
    return [PurePosixPath(name).name if last in ("", ".") else last for name, last in lasts]


def _count(pattern: str) -> int:
    """How many paths a pattern names. They are not made, since braceexpand makes all paths of
    nested braces at once.

    Innermost groups are replaced by their count, between NULs, until no group is left. The count of
    a text is then the product of the numbers in it.
    """

    def weight(text: str) -> int:
        return prod(int(number) for number in text.split("\0")[1::2])

    def replace(group: re.Match[str]) -> str:
        body = group[1]
        if match := _RANGE.fullmatch(body):
            low, high, step = (int(n or 1) for n in match.groups())
            number = abs(high - low) // (step or 1) + 1
        elif _LETTERS.fullmatch(body):
            number = len(list(braceexpand(group[0], escape=False)))
        else:
            number = sum(weight(part) for part in body.split(","))
        return f"\0{number}\0"  # stands for the group from here on

    for _ in range(MAX_DEPTH):
        counted = _INNERMOST.sub(replace, pattern)
        if counted == pattern:
            return weight(pattern)
        pattern = counted
    raise InputError(DEEP_BRACES.format(limit=MAX_DEPTH))
