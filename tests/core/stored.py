"""How an API server stores a status: what becomes of its numbers, and the bounds of its CRD."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any


def through_a_server(value: Any) -> Any:
    """The value after an API server stored it: integers beyond 64 bits become floats."""
    if isinstance(value, dict):
        return {key: through_a_server(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [through_a_server(inner) for inner in value]
    return float(value) if isinstance(value, int) and not -(2**63) <= value < 2**63 else value


def violations(value: Any, schema: dict[str, Any], path: str = "status") -> Iterator[str]:
    """Why an API server would refuse a value, or drop a part of it, by the schema of its CRD."""
    if value is None:
        if not schema.get("nullable"):
            yield f"{path}: may not be null"
        return
    yield from _wrong_kind(value, schema, path)
    yield from _out_of_bounds(value, schema, path)
    if isinstance(value, dict):
        yield from _wrong_keys(value, schema, path)
        for key, inner in value.items():
            found = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if isinstance(found, dict):
                yield from violations(inner, found, f"{path}.{key}")
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from violations(inner, schema["items"], f"{path}[{index}]")


KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}


def _wrong_kind(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    kind = schema.get("type")
    right = kind is None or isinstance(value, KINDS[kind])
    if not right or (isinstance(value, bool) and kind in ("integer", "number")):
        yield f"{path}: {value!r} is no {kind}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is none of {schema['enum']}"


def _out_of_bounds(value: Any, schema: dict[str, Any], path: str) -> Iterator[str]:
    sizes = {"maxLength": str, "maxItems": list, "maxProperties": dict}
    for name, kind in sizes.items():
        if name in schema and isinstance(value, kind) and len(value) > schema[name]:
            yield f"{path}: {name} is {schema[name]}, and it has {len(value)}"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{path}: {value!r} does not match {schema['pattern']}"
    if "maximum" in schema and isinstance(value, int | float) and value > schema["maximum"]:
        yield f"{path}: {value} is more than {schema['maximum']}"
    if "minimum" in schema and isinstance(value, int | float) and value < schema["minimum"]:
        yield f"{path}: {value} is less than {schema['minimum']}"


def _wrong_keys(value: dict[str, Any], schema: dict[str, Any], path: str) -> Iterator[str]:
    for key in schema.get("required", ()):
        if key not in value:
            yield f"{path}: {key} is required"
    open_ = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    for key in value:
        if not open_ and key not in schema.get("properties", {}):
            yield f"{path}: the server drops {key}"
