"""The table of docs/gitops.md: what GitOps tools say of a chain in each phase.

`.venv/bin/python tests/gitops/phase_table.py --write` writes it, from what the tools' own code
answers.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[1] / name) for name in ("operator", "core", "cluster")]
import phases  # noqa: F401
import stalls  # noqa: F401
from playing import PHASES, REPOSITORY
from verdicts import Verdict, ask

PAGE = REPOSITORY / "docs" / "gitops.md"
BEGIN, END = "<!-- phases -->\n", "<!-- end -->"
HEAD = (
    "| phase | conditions that are true | kstatus | Argo CD | Flux, running | Flux, complete |\n"
    "|---|---|---|---|---|---|\n"
)
# The longest message of Argo CD that is shown whole, in characters.
LONGEST = 110
Object = dict[str, Any]


def made() -> dict[str, Object]:
    """A chain in each phase."""
    return {name: make() for name, make in PHASES.items()}


def table(chains: Mapping[str, Object], verdicts: Mapping[str, Verdict]) -> str:
    return HEAD + "".join(_row(name, chains[name], verdicts[name]) for name in chains)


def _row(name: str, chain: Object, verdict: Verdict) -> str:
    cells = (
        name,
        conditions(chain),
        verdict.kstatus,
        f"{verdict.health}: {_cut(verdict.message)}",
        verdict.flux["running"],
        verdict.flux["complete"],
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def conditions(chain: Object) -> str:
    """The conditions that are true, with the reason of the one that says what the chain does."""
    true = [c for c in chain["status"].get("conditions") or [] if c["status"] == "True"]
    said = ("Stalled", "Reconciling")
    shown = [f"{c['type']} ({c['reason']})" if c["type"] in said else c["type"] for c in true]
    return ", ".join(shown) or "none"


def _cut(message: str) -> str:
    return message if len(message) <= LONGEST else message[: LONGEST - 2].rstrip() + " …"


def with_table(page: str, text: str) -> str:
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    found = re.subn(pattern, lambda _: BEGIN + text + END, page, flags=re.S)
    assert found[1] == 1, "the page has not exactly one place for the table"
    return found[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    chains = made()
    text = table(chains, ask(chains))
    if parser.parse_args().write:
        PAGE.write_text(with_table(PAGE.read_text(), text))
    else:
        print(text, end="")
