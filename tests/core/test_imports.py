"""The rooms' walls: operator -> core <- data <- trainer, nothing heavy in core, no I/O in core
outside its cli.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE, DATA, TRAINER, OPERATOR = (ROOT / room for room in ("core", "data", "trainer", "operator"))
BENCH = ROOT / "benchmarks" / "modelchain_bench"
CLI = CORE / "modelchain" / "cli"

HEAVY = {"torch", "torchvision", "open_clip", "timm", "webdataset", "safetensors", "numpy"}
NOT_CORES = {
    "modelchain_data",
    "modelchain_trainer",
    "modelchain_bench",
    "modelchain_operator",
    "prometheus_client",
}
NOT_OPERATORS = {"modelchain_data", "modelchain_trainer", "modelchain_bench", "pickle"} | HEAVY
CLUSTER = {"kopf", "kubernetes"}
IO_MODULES = {
    "asyncio",
    "ctypes",
    "glob",
    "http",
    "io",
    "logging",
    "mmap",
    "multiprocessing",
    "os",
    "pickle",
    "random",
    "select",
    "shelve",
    "shutil",
    "signal",
    "socket",
    "sqlite3",
    "ssl",
    "subprocess",
    "sys",
    "tempfile",
    "threading",
    "time",
    "urllib",
    "yaml",
}
IO_CALLS = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}
PURE_PATHS = {"PurePosixPath", "PurePath"}


def files(*folders: Path) -> list[Path]:
    return sorted(file for folder in folders for file in folder.rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[str, list[str]]]:
    """Every module imported anywhere in a file, also inside functions, and the names taken from
    it.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((alias.name, []) for alias in node.names)
            case ast.ImportFrom():
                assert node.level == 0, "imports are absolute"
                yield node.module or "", [alias.name for alias in node.names]
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__")
            ):
                assert isinstance(node.args[0], ast.Constant), "an import that cannot be read"
                yield str(node.args[0].value), []


def forbidden(file: Path, packages: set[str]) -> list[str]:
    tree = ast.parse(file.read_text())
    return [module for module, _ in imports(tree) if module.split(".")[0] in packages]


def _name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_the_rooms_are_there() -> None:
    assert len(files(CORE)) > 15 and len(files(DATA)) > 3 and len(files(TRAINER)) > 5


@pytest.mark.parametrize("file", files(CORE), ids=_name)
def test_core_imports_no_other_room_and_nothing_heavy(file: Path) -> None:
    assert forbidden(file, NOT_CORES | HEAVY | CLUSTER) == []


@pytest.mark.parametrize("file", files(DATA), ids=_name)
def test_data_imports_core_alone(file: Path) -> None:
    assert (
        forbidden(
            file,
            {
                "modelchain_trainer",
                "modelchain_bench",
                "modelchain_operator",
                "pickle",
                "prometheus_client",
            }
            | CLUSTER,
        )
        == []
    )


@pytest.mark.parametrize("file", files(TRAINER), ids=_name)
def test_the_trainer_imports_data_and_core_alone(file: Path) -> None:
    assert forbidden(file, {"modelchain_bench", "modelchain_operator", "pickle"} | CLUSTER) == []


def test_the_operator_imports_core_alone() -> None:
    assert {
        _name(file): found for file in files(OPERATOR) if (found := forbidden(file, NOT_OPERATORS))
    } == {}


@pytest.mark.parametrize("file", [f for f in files(CORE) if CLI not in f.parents], ids=_name)
def test_core_does_no_io(file: Path) -> None:
    """Below cli/ is I/O; all else is a pure function of its arguments, the time included."""
    tree = ast.parse(file.read_text())
    for module, names in imports(tree):
        if module == "pathlib":
            # `Path` names a file in an error message's type; that it opens none is seen below.
            assert set(names) <= PURE_PATHS | {"Path"}, f"{module}: {names}"
        else:
            assert module.split(".")[0] not in IO_MODULES, module
        assert not module.startswith("modelchain.cli"), "cli imports core, not the other way"
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)):
                assert name not in IO_CALLS | {"Path"}, f"line {node.lineno}: {name}()"
            case ast.Attribute(
                attr="now" | "utcnow" | "today", value=ast.Name(id="datetime" | "date")
            ):
                pytest.fail(f"line {node.lineno}: the time is an argument")
            case ast.Attribute(
                attr="open"
                | "exists"
                | "is_file"
                | "is_dir"
                | "iterdir"
                | "glob"
                | "rglob"
                | "mkdir"
                | "unlink"
            ):
                pytest.fail(f"line {node.lineno}: .{node.attr}")
            case ast.Attribute(
                attr="read_text"
                | "read_bytes"
                | "write_text"
                | "write_bytes"
                | "stat"
                | "rename"
                | "resolve"
            ):
                pytest.fail(f"line {node.lineno}: .{node.attr}")


def test_operator_does_not_shadow_the_standard_library() -> None:
    assert not [room for room in (OPERATOR, CORE, DATA, TRAINER) if (room / "__init__.py").exists()]


@pytest.mark.parametrize("file", files(CORE, DATA, TRAINER, OPERATOR, BENCH), ids=_name)
def test_no_file_is_long(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


def test_the_trainer_is_small() -> None:
    """Its core is what trains and tells of it; each method of growth is a page to read beside its
    paper.
    """
    lines = {file: file.read_text().count("\n") for file in files(TRAINER)}
    growth = {file: count for file, count in lines.items() if file.parent.name == "growth"}
    assert sum(lines.values()) - sum(growth.values()) <= 2000
    assert max(growth.values()) <= 200
    assert len((BENCH / "stock.py").read_text().splitlines()) < 80


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import torch.nn", "torch"),
        ("def f():\n    from kopf import on", "kopf"),
        (
            "if x:\n    import importlib\n    importlib.import_module('kubernetes.client')",
            "kubernetes",
        ),
    ],
)
def test_the_walls_themselves(source: str, module: str) -> None:
    found = [name.split(".")[0] for name, _ in imports(ast.parse(source))]
    assert module in found
