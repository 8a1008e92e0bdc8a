"""Shard patterns in brace notation, expanded as webdataset does, with a bound on what they may expand to."""

from __future__ import annotations

import itertools
import re
from pathlib import PurePosixPath

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from modelchain.errors import InputError

MAX_SHARDS = 100_000
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")


def expand(pattern: str) -> list[str]:
    """The paths a pattern such as `/data/train-{00000..00331}.tar` names, in order.

    Raises:
        InputError: unbalanced braces, or more than MAX_SHARDS paths.
    """
    for low, high in _RANGE.findall(pattern):  # the expander holds a whole range in memory
        if len(low) > 9 or len(high) > 9 or abs(int(high) - int(low)) >= MAX_SHARDS:
            raise InputError(f"the range {low}..{high} is too long; at most {MAX_SHARDS} files are allowed")
    try:
        names = list(itertools.islice(braceexpand(pattern, escape=False), MAX_SHARDS + 1))
    except UnbalancedBracesError as error:
        raise InputError(f"unbalanced braces in {pattern!r}") from error
    if len(names) > MAX_SHARDS:
        raise InputError(f"the pattern names more than {MAX_SHARDS} files")
    return names


def base_names(pattern: str) -> list[str]:
    """What of the shards goes into the input digest: their names in order, without any folder."""
    return [PurePosixPath(name).name for name in expand(pattern)]
