"""What growth has done, for results.json and for the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KINDS = ("inserted", "duplicated", "new")
REST = "all else"  # parameters outside of stacks of layers


@dataclass(frozen=True)
class GrowthReport:
    """Where the student's elements came from; the three counts add up to all its parameters."""

    method: dict[str, str]
    inserted: int  # from the predecessor, each of its elements once
    duplicated: int  # from the predecessor again: copies in width, layers taken before
    new: int  # the student's own initialisation, or zeros
    # The same three counts for each stack of layers, and REST.
    stacks: Mapping[str, Counter[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As in `results.json`: `{method: {width, depth}, inserted, duplicated, new}`."""
        return {
            "method": self.method,
            "inserted": self.inserted,
            "duplicated": self.duplicated,
            "new": self.new,
        }

    def lines(self, predecessor: str, cosines: Mapping[str, Sequence[float]]) -> Iterator[str]:
        """A table to print, with a row for each stack; `cosines` are `agreement`'s."""
        yield (
            f"grown from {predecessor} by {self.method['width']} in width and"
            f" {self.method['depth']} in depth:"
        )
        stacks = {stack: counts for stack, counts in self.stacks.items() if stack != REST}
        together = Counter({kind: getattr(self, kind) for kind in KINDS})
        rows = {**stacks, REST: self.stacks[REST], "together": together}
        width = max(map(len, rows))
        heads = "".join(f"{kind:>14}" for kind in KINDS)
        yield f"{'':{width}}{heads}  cosine with the output of each layer of {predecessor}"
        for name, counts in rows.items():
            numbers = "".join(f"{counts[kind]:>14,}" for kind in KINDS)
            alike = " ".join(f"{cosine:.2f}" for cosine in cosines.get(name, ()))
            yield f"{name:{width}}{numbers}" + f"  {alike}".rstrip()
