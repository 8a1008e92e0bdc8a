"""Where a benchmark's table stands in a page."""

from __future__ import annotations


def between(page: str, script: str, table: str) -> str:
    """`page` with `table` between the markers `<!-- script -->` and `<!-- end -->`, instead of what
    stood there.

    Without such a marker both are appended.
    """
    begin, end = f"<!-- {script} -->", "<!-- end -->"
    before, found, rest = page.partition(begin)
    after = rest.partition(end)[2] if found else "\n"
    return f"{before}{begin}\n{table}\n{end}{after}"
