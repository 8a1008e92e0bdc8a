"""How an API server stores a status: what becomes of its numbers, and the bounds of its CRD."""

from __future__ import annotations

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
    """The bounds of the CRD that a value breaks."""
    sizes = {"maxLength": str, "maxItems": list, "maxProperties": dict}
    for name, kind in sizes.items():
        if name in schema and isinstance(value, kind) and len(value) > schema[name]:
            yield f"{path}: {name} is {schema[name]}, and it has {len(value)}"
    if "maximum" in schema and isinstance(value, int | float) and value > schema["maximum"]:
        yield f"{path}: {value} is more than {schema['maximum']}"
    if isinstance(value, dict):
        for key, inner in value.items():
            found = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if isinstance(found, dict):
                yield from violations(inner, found, f"{path}.{key}")
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from violations(inner, schema["items"], f"{path}[{index}]")
