"""The pages that are typed on a cluster: on a control plane by test_docs.py here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ON_A_CLUSTER = ("install", "first-chain", "node-pools", "failures", "security")
PROGRAMS = ("kubectl", "helm", "modelchain-operator")  # whose commands only a cluster can judge


def text(page: str) -> str:
    return (REPOSITORY / ("README.md" if page == "README" else f"docs/{page}.md")).read_text()


def commands(page: str, *, after: str = "", before: str = "") -> list[str]:
    """The lines of the page's `sh` blocks; from the heading `after` on, up to the heading
    `before`.
    """
    here = text(page)
    start = here.index(f"\n## {after}\n") if after else 0
    end = here.index(f"\n## {before}\n") if before else len(here)
    blocks = re.findall(r"^```sh\n(.*?)^```$", here[start:end], re.M | re.S)
    return [
        line for block in blocks for line in block.splitlines() if shlex.split(line, comments=True)
    ]


def yaml_blocks(page: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```$", text(page), re.M | re.S)


def failure_rows() -> dict[str, list[str]]:
    """By class, the other cells of its row in failures.md. A class with two rows is an error."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text("failures"), re.M)
    found = {name: cells.split(" | ") for name, cells in rows}
    assert len(found) == len(rows)
    return found


def advised(cells: list[str]) -> list[str]:
    """The commands in a row of failures.md."""
    return re.findall(r"`((?:kubectl|modelchain) [^`]+)`", " ".join(cells))
