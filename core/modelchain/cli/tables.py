"""The tables of `plan`: for a terminal, or as Markdown for a page or a comment."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

from rich.box import MARKDOWN, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def print_table(
    title: str,
    columns: Mapping[str, Sequence[str]],
    left: Container[str],
    ends: Container[int],
    markdown: bool,
) -> None:
    """Print columns of cells, by heading.

    Args:
        title: stands above the table.
        columns: the cells; a heading may have several lines.
        left: the headings of columns with text, which starts on the left.
        ends: the rows after which a section ends, which Markdown does not show.
        markdown: whether to print Markdown.
    """
    table = Table(box=MARKDOWN if markdown else SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in columns:
        shown = heading.replace("-\n", "-").replace("\n", " ").strip() if markdown else heading
        table.add_column(shown, justify="left" if heading in left else "right", no_wrap=True)
    for index, row in enumerate(zip(*columns.values(), strict=True)):
        table.add_row(*row, end_section=index in ends and not markdown)
    if markdown:
        print_text(f"**{title}**")
    else:
        table.title = title
    _console().print(table)


def print_text(text: str) -> None:
    """Print a text with no line breaks but its own."""
    _console().print(text, soft_wrap=True)


def _console() -> Console:
    # Wider than any terminal: a long line is better than a number that is cut.
    return Console(width=250, markup=False, highlight=False, emoji=False)
