"""Columns of cells as lines of text, in a width. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

GAP = 2


@dataclass(frozen=True)
class Column:
    """A column of a table. A column without any text is left out."""

    heading: str
    cells: Sequence[Text | str]
    right: bool = False
    # If there is no room for all, the columns with the highest number go first; 0 always stays.
    spare: int = 0

    @property
    def width(self) -> int:
        return max(cell_len(self.heading), *(cell_len(str(cell)) for cell in self.cells))

    @property
    def empty(self) -> bool:
        return not any(str(cell) for cell in self.cells)


def rows(columns: Sequence[Column]) -> list[Text]:
    """The line of headings, and one for each row. Columns without any text are left out."""
    shown = [_padded(column) for column in columns if not column.empty]
    found = [Text(" " * GAP).join(row) for row in zip(*shown, strict=True)]
    for line in found:
        line.rstrip()
    return found


def width_of(columns: Sequence[Column]) -> int:
    """The characters of a row."""
    shown = [column.width for column in columns if not column.empty]
    return sum(shown) + GAP * (len(shown) - 1) if shown else 0


def fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """The columns for which there is room."""
    kept = list(columns)
    while width_of(kept) > width:
        least = max(kept, key=lambda column: column.spare)
        if not least.spare:
            break
        kept.remove(least)
    return kept


def _padded(column: Column) -> list[Text]:
    """The heading and the cells, all as wide as the column."""
    made = [Text(column.heading, style="bold")]
    made += [cell.copy() if isinstance(cell, Text) else Text(cell) for cell in column.cells]
    for text in made:
        missing = column.width - text.cell_len
        if column.right:
            text.pad_left(missing)
        else:
            text.pad_right(missing)
    return made
