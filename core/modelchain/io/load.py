"""Reading spec files: from YAML to a checked ModelChain, or one line for each thing
that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from modelchain.api.spec import DECIMAL, ModelChain
from modelchain.api.status import ChainStatus
from modelchain.errors import InputError, Problem, WorkError
from modelchain.plan.check import check

M = TypeVar("M", bound=BaseModel)

MAX_BYTES = 1 << 20
MAX_NODES = 100_000


# What PyYAML raises where a value does not fit its tag, as `!!int ""`.
_TAG_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


def load_yaml(path: Path, kind: str | None = None) -> Any:
    """The YAML document of `path`, or of several documents the one of `kind`. Its size is bounded,
    also after aliases expand.
    """
    raw = _read(path)
    try:
        documents = _documents(raw.decode(), path)
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (byte {error.start})", file=path) from error
    except yaml.YAMLError as error:
        raise InputError(f"is not valid YAML: {_yaml_message(error)}", file=path) from error
    except _TAG_ERRORS as error:
        raise InputError(
            f"is not valid YAML: a value does not fit its tag ({error})", file=path
        ) from error
    except RecursionError as error:
        raise InputError("is nested too deeply", file=path) from error
    return _the_one(documents, kind, path)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from error
    if len(raw) > MAX_BYTES:
        raise InputError(f"is larger than {MAX_BYTES} bytes", file=path)
    return raw


def _documents(text: str, path: Path) -> list[Any]:
    loader = yaml.SafeLoader(text)
    found = []
    while loader.check_node():
        node = loader.get_node()
        assert node is not None
        _check_nodes(node, path)
        found.append(loader.construct_document(node))
    return found


def _the_one(documents: list[Any], kind: str | None, path: Path) -> Any:
    """The only document that is not empty, or the only one of this kind."""
    found = [document for document in documents if document is not None]
    if not found:
        raise InputError("is empty", file=path)
    if len(found) == 1:
        return found[0]
    of_kind = [d for d in found if isinstance(d, dict) and kind and d.get("kind") == kind]
    if len(of_kind) != 1:
        raise InputError(
            f"holds {len(documents)} documents; keep one {kind or 'of them'} in a file", file=path
        )
    return of_kind[0]


def load_model(kind: type[M], path: Path) -> M:
    """A file as the given type, or an InputError with the file and field of every problem."""
    return parse(kind, load_yaml(path, kind.__name__), str(path))


def load_chain(path: Path) -> ModelChain:
    """A spec file, checked by `modelchain.plan.check`. What needs the data is checked by `run`."""
    chain = load_model(ModelChain, path)
    check(chain, str(path))
    return chain


def parse(kind: type[M], value: Any, file: str) -> M:
    """Validate `value`. Pydantic's errors become problems with a field path and a
    readable message.
    """
    if not isinstance(value, dict):
        raise InputError(f"holds a {_type_name(value)}, not a {kind.__name__} object", file=file)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise InputError(
            *(Problem(_message(e), file, _field(e["loc"])) for e in error.errors(include_url=False))
        ) from error


def _field(loc: tuple[int | str, ...]) -> str:
    out = ""
    for part in loc:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else part
    return out


# Kinds of pydantic's errors. Ours come from the validators of the API types and are whole
# sentences.
_OUR_ERRORS = {"model", "evaluation", "storage", "budget", "vision", "text", "range"}
_TYPE_ERRORS = {
    "int_type",
    "int_from_float",
    "float_type",
    "bool_type",
    "string_type",
    "list_type",
    "model_type",
    "dict_type",
}


def _message(error: ErrorDetails) -> str:
    kind, value = error["type"], error["input"]
    if kind in _OUR_ERRORS:
        return error["msg"]
    if kind == "extra_forbidden":
        return "unknown field; check its spelling and place (this version acts on no such field)"
    if kind == "missing":
        return "required, but not given"
    got = _short(value)
    if kind == "string_pattern_mismatch":
        return f"{got} does not have the form {_form(error['ctx']['pattern'])}"
    if kind in _TYPE_ERRORS:
        got = f"{_type_name(value)} {got}"
    if kind == "string_type" and isinstance(value, int | float):
        return f"must be a text, so put it in quotes (got {got})"
    return f"{error['msg'].removeprefix('Input ').removeprefix('Value error, ')} (got {got})"


def _form(pattern: str) -> str:
    """A pattern, in words where it is hard to read."""
    if pattern == DECIMAL:
        return (
            "of a decimal: digits without a sign, such as 0.5 or 1e-3, and at most 12 before the"
            " point"
        )
    return pattern


def _type_name(value: Any) -> str:
    names = {
        "dict": "mapping",
        "list": "list",
        "str": "text",
        "int": "number",
        "float": "number",
        "bool": "boolean",
    }
    return "nothing" if value is None else names.get(type(value).__name__, type(value).__name__)


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer too long to print
        return "a number too long to show"
    return text if len(text) <= 60 else text[:57] + "..."


def _yaml_message(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        return (
            f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
            if mark
            else error.problem
        )
    return str(error)


def _check_nodes(root: yaml.Node, path: Path) -> None:
    """Checks before anything is built: no key is given twice, which PyYAML allows, and aliases
    expand to a bounded size.
    """
    sizes: dict[int, int] = {}
    open_: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_:
            raise InputError("an alias refers to itself", file=path)
        if id(node) not in sizes:
            open_.add(id(node))
            children: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
                children = [n for pair in node.value for n in pair]
            elif isinstance(node, yaml.SequenceNode):
                children = node.value
            sizes[id(node)] = 1 + sum(size(child) for child in children)
            open_.discard(id(node))
        return sizes[id(node)]

    if size(root) > MAX_NODES:
        raise InputError(f"its aliases expand to more than {MAX_NODES} values", file=path)


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            name = repr(key.value) if isinstance(key, yaml.ScalarNode) else "of this mapping"
            raise yaml.constructor.ConstructorError(
                None, None, f"key {name} is not a text", key.start_mark
            )
        if key.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key.value!r} is given twice", key.start_mark
            )
        seen.add(key.value)


def spec_of(chain: Mapping[str, Any], name: str) -> ModelChain:
    """The spec of a chain that was read from a cluster. Raises InputError, which says `name`."""
    return parse(ModelChain, {key: value for key, value in chain.items() if key != "status"}, name)


def status_of(chain: Mapping[str, Any]) -> ChainStatus:
    """The status of a chain that was read from a cluster. Raises WorkError if another version wrote
    it.
    """
    try:
        return ChainStatus.model_validate_json(json.dumps(chain.get("status") or {}))
    except ValidationError as error:
        name = chain["metadata"]["name"]
        raise WorkError(
            f"the status of {name} was written by another version; use the operator's version"
        ) from error
