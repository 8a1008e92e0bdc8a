"""Which of the predecessor's `old` layers each of the student's `new` layers takes (paper Figure A
d to f).

None: the layer keeps its own initialisation.
"""

from __future__ import annotations


def constant(old: int, new: int) -> list[int | None]:
    """Constant insertion (d): the first layers are the predecessor's."""
    return [layer if layer < old else None for layer in range(new)]


def interval(old: int, new: int) -> list[int | None]:
    """Interval insertion (e): the predecessor's layers, spread evenly."""
    places = {-(-layer * new // old): layer for layer in range(old)}
    return [places.get(layer) for layer in range(new)]


def duplicate(old: int, new: int) -> list[int | None]:
    """Duplicate insertion (f): as `interval`, and layers between take the one before them.

    Not told apart: Swin's plain and shifted windows, which alternate; 6 -> 18 layers takes each
    three times in a row.
    """
    return [layer * old // new for layer in range(new)]


DEPTH = {"Duplicate": duplicate, "Constant": constant, "Interval": interval}
