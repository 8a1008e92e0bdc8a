"""`python benchmarks/reasons_table.py --write`: docs/reasons.md's table, from the enum of codes."""

from __future__ import annotations

from pathlib import Path

from markers import between, print_or_write
from modelchain.api.reasons import Code

PAGE = Path(__file__).parents[1] / "docs" / "reasons.md"


def table() -> str:
    """One row a code: what it means, what to do, and the command to type next."""
    rows = ["| code | meaning | what to do | next command |", "|---|---|---|---|"]
    for code in Code:
        command = code.command.replace("{chain}", "CHAIN").replace("{namespace}", "NS")
        command = command.replace("{subject}", "NAME")
        rows.append(
            f"| `{code}` | {code.meaning} | {code.action} | {f'`{command}`' if command else ''} |"
        )
    return "\n".join(rows)


def with_table(page: str) -> str:
    return between(page, "reasons_table.py", table())


if __name__ == "__main__":
    print_or_write(__doc__, PAGE, table, with_table)
