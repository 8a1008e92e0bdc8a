"""Which room may import which: operator -> core <- data <- trainer <- bench. The same for the
layers inside core. Core imports nothing heavy, and does I/O in its io, local and cli folders only.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE, DATA, TRAINER, OPERATOR = (ROOT / room for room in ("core", "data", "trainer", "operator"))
BENCH = ROOT / "benchmarks" / "modelchain_bench"
PACKAGE = CORE / "modelchain"
OPERATOR_PACKAGE = OPERATOR / "modelchain_operator"

# Core's folders, lowest first. A file imports from its own folder and from lower layers.
# `errors` and `cel` are single files that every folder may use.
LAYERS: list[set[str]] = [
    {"errors", "cel"},
    {"families"},
    {"api"},
    {"identity"},
    {"plan", "gate"},
    {"decide"},
    {"report"},
    {"crd", "io"},
    {"local"},
    {"cli"},
]
WITH_IO = {"io", "local", "cli"}
# The operator's folders, lowest first. `__main__` is the single file that starts the operator.
OPERATOR_LAYERS: list[set[str]] = [
    {"api"},
    {"runners"},
    {"reconcile"},
    {"watch"},
    {"explain"},
    {"cli", "__main__"},
]

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
    """Every module imported anywhere in a file, also inside functions, with the names taken from
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
                assert isinstance(node.args[0], ast.Constant), "an import by a computed name"
                yield str(node.args[0].value), []


def imported(file: Path) -> Iterator[str]:
    """Everything a file imports, by its full name: `from a.b import c` is a.b.c."""
    for module, names in imports(ast.parse(file.read_text())):
        yield from (f"{module}.{name}" for name in names) if names else [module]


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


def _folder(name: str, package: str = "modelchain") -> str | None:
    """The folder of a package, or its single file, that an imported name belongs to."""
    first, _, rest = name.partition(".")
    return rest.split(".")[0] if first == package else None


def _folder_of(file: Path, package: Path = PACKAGE) -> str:
    return file.relative_to(package).parts[0].removesuffix(".py")


def _layer(folder: str, layers: list[set[str]] = LAYERS) -> int:
    [layer] = [index for index, folders in enumerate(layers) if folder in folders]
    return layer


def imports_upwards(file: Path, package: Path, layers: list[set[str]]) -> list[str]:
    """What a file imports from its package, but from another folder that is no lower layer."""
    own = _folder_of(file, package)
    return [
        name
        for name in imported(file)
        if (folder := _folder(name, package.name)) is not None
        and folder != own
        and _layer(folder, layers) >= _layer(own, layers)
    ]


def _in_folders(package: Path) -> list[Path]:
    """All files of a package but its own `__init__.py`, which is empty."""
    return [file for file in files(package) if file != package / "__init__.py"]


@pytest.mark.parametrize("file", _in_folders(PACKAGE), ids=_name)
def test_core_imports_from_lower_layers_alone(file: Path) -> None:
    assert imports_upwards(file, PACKAGE, LAYERS) == []


@pytest.mark.parametrize("file", _in_folders(OPERATOR_PACKAGE), ids=_name)
def test_the_operator_imports_from_lower_layers_alone(file: Path) -> None:
    assert imports_upwards(file, OPERATOR_PACKAGE, OPERATOR_LAYERS) == []


@pytest.mark.parametrize("package", [PACKAGE, OPERATOR_PACKAGE], ids=_name)
def test_a_package_itself_is_empty(package: Path) -> None:
    assert not (package / "__init__.py").read_text()


@pytest.mark.parametrize("file", files(CORE, DATA, TRAINER, OPERATOR, BENCH), ids=_name)
def test_only_command_lines_import_a_command_line(file: Path) -> None:
    if "cli" not in file.parts:
        assert [name for name in imported(file) if "cli" in name.split(".")] == []


PURE = [file for file in files(CORE) if _folder_of(file) not in WITH_IO]


@pytest.mark.parametrize("file", PURE, ids=_name)
def test_core_does_no_io(file: Path) -> None:
    """Outside io, local and cli, core is pure: functions get even the time as an argument."""
    tree = ast.parse(file.read_text())
    for module, names in imports(tree):
        if module == "pathlib":
            # `Path` may be imported for type annotations. The loop below shows that no file is
            # opened.
            assert set(names) <= PURE_PATHS | {"Path"}, f"{module}: {names}"
        else:
            assert module.split(".")[0] not in IO_MODULES, module
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
def test_imports_are_found_anywhere_in_a_file(source: str, module: str) -> None:
    found = [name.split(".")[0] for name, _ in imports(ast.parse(source))]
    assert module in found


def test_the_page_tells_the_layers() -> None:
    """Each layer of docs/architecture.md. Not `errors` and `cel`, which every layer may use, and
    not the file that starts the operator.
    """
    page = (ROOT / "docs" / "architecture.md").read_text()
    told = re.findall(r"`(cli -> [^`]+)`", page)
    of_core, of_operator = ([set(one.split(", ")) for one in t.split(" -> ")] for t in told)
    assert of_core == list(reversed(LAYERS[1:]))
    assert of_operator == [layer - {"__main__"} for layer in reversed(OPERATOR_LAYERS)]


def test_the_layers(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("from modelchain import cli\nfrom modelchain.io.files import fsync, verify\n")
    assert list(imported(file)) == [
        "modelchain.cli",
        "modelchain.io.files.fsync",
        "modelchain.io.files.verify",
    ]
    assert [_folder(name) for name in imported(file)] == ["cli", "io", "io"]
    assert _layer("families") < _layer("api") < _layer("io") < _layer("cli")
    for package, layers in ((PACKAGE, LAYERS), (OPERATOR_PACKAGE, OPERATOR_LAYERS)):
        folders = {_folder_of(file, package) for file in _in_folders(package)}
        assert folders == {folder for layer in layers for folder in layer}


def test_imports_from_a_higher_layer_are_found(tmp_path: Path) -> None:
    package = tmp_path / "modelchain"
    file = package / "plan" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text("from modelchain.api import spec\nfrom modelchain.cli.app import main\n")
    assert imports_upwards(file, package, LAYERS) == ["modelchain.cli.app.main"]
