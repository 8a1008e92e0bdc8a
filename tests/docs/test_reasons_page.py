"""docs/reasons.md has a row for every code, made from the enum."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import reasons_table
from modelchain.api.reasons import Code


def test_the_table_is_that_of_the_enum() -> None:
    page = reasons_table.PAGE.read_text()
    assert page == reasons_table.with_table(page), "run benchmarks/reasons_table.py --write"
    assert all(f"| `{code}` |" in page for code in Code)
