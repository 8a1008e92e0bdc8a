"""Limits for hand-written files: the length of functions, and of lines of prose and scripts."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("core", "data", "trainer", "operator", "benchmarks", "charts")
LONGEST, MEDIAN = 40, 10
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [*sorted((ROOT / ".ci").iterdir()), ROOT / "Makefile", ROOT / "Dockerfile"]
WIDTH = 100


class Function(NamedTuple):
    where: str
    lines: int  # from `def` to the last line, docstring included
    reason: str  # from a comment `# long: <reason>` on the line of its `def`


def functions(source: str, name: str) -> Iterator[Function]:
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            reason = lines[node.lineno - 1].partition("# long:")[2].strip()
            length = node.end_lineno - node.lineno + 1
            yield Function(f"{name}:{node.lineno} {node.name}", length, reason)


def _all_functions(room: str) -> list[Function]:
    files = sorted((ROOT / room).rglob("*.py"))
    return [f for file in files for f in functions(file.read_text(), str(file.relative_to(ROOT)))]


@pytest.mark.parametrize("room", ROOMS)
def test_no_function_is_long_without_a_reason(room: str) -> None:
    found = _all_functions(room)
    assert found
    assert [f.where for f in found if f.lines > LONGEST and not f.reason] == []
    assert [f.where for f in found if f.reason and f.lines <= LONGEST] == []


def test_most_functions_are_short() -> None:
    assert median(f.lines for room in ROOMS for f in _all_functions(room)) <= MEDIAN


def test_the_measure_of_functions() -> None:
    source = "@cache\ndef f(  # long: a table\n    x,\n):\n    return x\n\n\ndef g(): ...\n"
    assert list(functions(source, "a.py")) == [("a.py:2 f", 4, "a table"), ("a.py:8 g", 1, "")]


def long_lines(page: str) -> list[int]:
    """Numbers of the lines of prose that are too long. Tables, code blocks, generated text between
    markers, and the targets of links do not count.
    """
    found, in_code, made = [], False, False
    for number, line in enumerate(page.splitlines(), 1):
        if line.startswith("<!-- "):
            made = line != "<!-- end -->"
        elif line.lstrip().startswith("```"):
            in_code = not in_code
        elif not in_code and not made and not line.lstrip().startswith("|"):
            shown = re.sub(r"\]\([^)]*\)|<?https?://[^\s>]*>?", "]", line)
            if len(shown) > WIDTH:
                found.append(number)
    return found


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_prose_are_short(page: Path) -> None:
    assert long_lines(page.read_text()) == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_lines_of_scripts_are_short(script: Path) -> None:
    lines = enumerate(script.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line.expandtabs(8)) > WIDTH] == []


def test_the_measure_of_prose() -> None:
    long = "word " * 30
    page = f"{long}\n| {long} |\n```\n{long}\n```\n[page]({'x' * 100})\n  {long}\n"
    assert long_lines(page) == [1, 7]


def trees(*rooms: str) -> Iterator[tuple[str, ast.Module]]:
    for room in rooms:
        for file in sorted((ROOT / room).rglob("*.py")):
            yield str(file.relative_to(ROOT)), ast.parse(file.read_text())


def test_the_name_of_a_class_means_one_thing() -> None:
    defined: dict[str, list[str]] = {}
    for file, tree in trees(*ROOMS):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                defined.setdefault(node.name, []).append(file)
    assert len(defined) > 100
    assert {name: files for name, files in defined.items() if len(files) > 1} == {}


def packings(tree: ast.Module) -> list[int]:
    """Lines on which three or more names get their values from one tuple that is written out."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and isinstance(node.targets[0], ast.Tuple)
        and len(node.targets[0].elts) > 2
    ]


def test_names_get_their_values_on_lines_of_their_own() -> None:
    found = {file: lines for file, tree in trees(*ROOMS) if (lines := packings(tree))}
    assert found == {}


def test_the_measure_of_packings() -> None:
    source = "a, b = 1, 2\na, b, c = 1, 2, 3\nself.a, b, c = x\nself.a, b, c = (\n    1, 2, 3\n)\n"
    assert packings(ast.parse(source)) == [2, 4]
