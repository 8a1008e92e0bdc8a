"""docs/reasons.md has a row for every code, made from the enum. docs/failures.md has one for every
class of failure, with the command of its code.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import reasons_table
from modelchain.api.contracts import FailureClass
from modelchain.api.reasons import Code, filled

FAILURES = Path(__file__).parents[2] / "docs" / "failures.md"


def test_the_table_is_that_of_the_enum() -> None:
    page = reasons_table.PAGE.read_text()
    assert page == reasons_table.with_table(page), "run benchmarks/reasons_table.py --write"
    assert all(f"| `{code}` |" in page for code in Code)


def test_failures_give_the_commands_of_the_enum() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| `([^`]+)` \|$", FAILURES.read_text(), re.M)
    assert dict(rows) == {
        str(failure): filled(Code(failure).command, "NAME", "NS") for failure in FailureClass
    }
