"""Which of the predecessor's `old` layers each of the student's `new` layers takes (paper Figure A
d to f). None: the layer keeps its own initialisation.
"""

from __future__ import annotations


def constant(old: int, new: int) -> list[int | None]:
    """Constant insertion (d): the first layers are the predecessor's."""
    return [layer if layer < old else None for layer in range(new)]


def interval(old: int, new: int) -> list[int | None]:
    """Interval insertion (e): the predecessor's layers, evenly spaced."""
    places = {-(-layer * new // old): layer for layer in range(old)}  # rounded up
    return [places.get(layer) for layer in range(new)]


def duplicate(old: int, new: int) -> list[int | None]:
    """Duplicate insertion (f): as `interval`, and each layer in between takes the one before it.

    Swin's layers with plain and with shifted windows, which alternate, are treated alike: 6 -> 18
    layers takes each of them three times in a row.
    """
    return [layer * old // new for layer in range(new)]


DEPTH = {"Duplicate": duplicate, "Constant": constant, "Interval": interval}
