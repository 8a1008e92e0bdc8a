"""The place of a benchmark's table in a page."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def between(page: str, script: str, table: str) -> str:
    """`page` with its text between the markers `<!-- script -->` and `<!-- end -->` replaced by
    `table`.

    Markers that are missing are appended with the table.
    """
    begin, end = f"<!-- {script} -->", "<!-- end -->"
    before, found, rest = page.partition(begin)
    after = rest.partition(end)[2] if found else "\n"
    return f"{before}{begin}\n{table}\n{end}{after}"


def print_or_write(
    description: str, page: Path, table: Callable[[], str], with_table: Callable[[str], str]
) -> None:
    """A table script's command line: print `table`, or put it into `page` with `--write`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--write", action="store_true", help=f"put the table into {page.name}")
    if parser.parse_args().write:
        page.write_text(with_table(page.read_text()))
    else:
        print(table())
