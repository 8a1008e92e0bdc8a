"""Every change of a status that `decide` makes has a name in `transitions`."""

from __future__ import annotations

import ast
from pathlib import Path

DECIDE = Path(__file__).parents[2] / "core" / "modelchain" / "decide"
# They fill in figures and shorten texts, which is no change of what a stage or an attempt does.
OTHERS = {"ledger.py", "money.py", "settle.py", "conditions.py"}


def changes(tree: ast.Module) -> list[int]:
    """The lines that make a changed copy of a stage or an attempt."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "changed"
    ]


def test_only_transitions_change_a_stage_or_an_attempt() -> None:
    found = {file.name for file in DECIDE.glob("*.py") if changes(ast.parse(file.read_text()))}
    assert found - OTHERS == {"transitions.py"}


def test_what_counts_as_a_change() -> None:
    assert changes(ast.parse("x = stage.changed(a=1)\ny = changed(x)\nz = f(x).changed()\n")) == [
        1,
        3,
    ]
