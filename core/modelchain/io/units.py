"""Counts and ages with units."""

from __future__ import annotations


def human(value: float) -> str:
    """A count with a unit: 1.2e13 is "12.00 T"."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 1000:
            return f"{value:.2f} {unit}".rstrip() if unit else f"{value:.0f}"
        value /= 1000
    return f"{value:.3g} Z"


def age(seconds: float) -> str:
    """An age as `kubectl` prints it: 45s, 12m, 3h, 2d; at least two of a unit."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"
