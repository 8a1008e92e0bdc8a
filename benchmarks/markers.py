"""Where a benchmark's table stands in a page."""

from __future__ import annotations


def between(page: str, script: str, table: str) -> str:
    """`page` with `table` between the markers `<!-- script -->` and `<!-- end -->`, instead of what stood there."""
    begin, end = f"<!-- {script} -->", "<!-- end -->"
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
