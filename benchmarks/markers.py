"""The place of a benchmark's table in a page."""

from __future__ import annotations


def between(page: str, script: str, table: str) -> str:
    """`page` with its text between the markers `<!-- script -->` and `<!-- end -->` replaced by
    `table`.

    Markers that are missing are appended with the table.
    """
    begin, end = f"<!-- {script} -->", "<!-- end -->"
    before, found, rest = page.partition(begin)
    after = rest.partition(end)[2] if found else "\n"
    return f"{before}{begin}\n{table}\n{end}{after}"
