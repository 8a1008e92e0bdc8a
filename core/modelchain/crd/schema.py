"""From pydantic's JSON schema to a structural schema, as API servers require it: without
references, and with bounds on everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]

MAX_TEXT = 4096
MAX_ITEMS = 1024
MAX_KEYS = 256
MAX_INT = 2**53
# Up to 1e24, beyond any integer of an API server.
LARGE = ("macs", "lostMacs", "savedMacs", "plannedMacs")
KEPT = (
    "description",
    "type",
    "enum",
    "pattern",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minimum",
    "maximum",
)


def structural(model: type[BaseModel], *, nullable: bool) -> Schema:
    """The structural schema of an API type.

    nullable: whether optional fields may be null. A server drops nulls where they are not allowed.
    That is what a user means by null in a spec; a status must be kept as it was written.
    """
    whole = model.model_json_schema(by_alias=True, mode="validation")
    return _convert(whole, whole.get("$defs", {}), nullable, in_list=False)


def nodes(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Every schema within a schema, by its path: `spec.stages[].name`, `status.results{}`."""
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{name}" if path else name)
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if "additionalProperties" in schema:
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


def _convert(
    source: Schema, defs: dict[str, Schema], nullable: bool, *, in_list: bool, name: str = ""
) -> Schema:
    source, optional = _resolve(source, defs)
    out = _kept(source)
    if optional and nullable:
        out["nullable"] = True
        out.pop("enum", None)  # an API server counts null as no member of any enum
    match out.get("type"):
        case "object":
            out |= _object(source, defs, nullable, in_list)
        case "array":
            out.setdefault("maxItems", MAX_ITEMS)
            out["items"] = _convert(source["items"], defs, nullable, in_list=True)
        case "string" if "enum" not in out:
            out.setdefault("maxLength", MAX_TEXT)
        case "integer" if name in LARGE:
            out["type"] = "number"
        case "integer":
            out = {"format": "int64", **out}
            out.setdefault("maximum", MAX_INT)
        case None:
            return {"x-kubernetes-preserve-unknown-fields": True}
    default = source.get("default")
    if default not in (None, []) and not nullable and not in_list:
        out["default"] = _without_nulls(default)
    return out


def _kept(source: Schema) -> Schema:
    """The keys that are copied, spelled as in OpenAPI 3.0."""
    out = {key: source[key] for key in KEPT if key in source}
    if "description" in out:
        out["description"] = out["description"].split("\n\n")[0].replace("\n", " ")
    if "const" in source:
        out["enum"] = [source["const"]]
    if "exclusiveMinimum" in source:
        out |= {"minimum": source["exclusiveMinimum"], "exclusiveMinimum": True}
    return out


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return value


def _object(source: Schema, defs: dict[str, Schema], nullable: bool, in_list: bool) -> Schema:
    out: Schema = {}
    if properties := source.get("properties"):
        out["properties"] = {
            key: _convert(inner, defs, nullable, in_list=in_list, name=key)
            for key, inner in properties.items()
        }
        if required := source.get("required"):
            out["required"] = required
    elif isinstance(values := source.get("additionalProperties"), dict):
        out |= {
            "maxProperties": source.get("maxProperties", MAX_KEYS),
            "additionalProperties": _convert(values, defs, nullable, in_list=in_list),
        }
    else:
        out["x-kubernetes-preserve-unknown-fields"] = True
    return out


def _resolve(source: Schema, defs: dict[str, Schema]) -> tuple[Schema, bool]:
    """The schema without `$ref` and without `anyOf` null, and whether null was allowed. Keys beside
    them are kept.
    """
    optional = False
    if "anyOf" in source:
        choices = [choice for choice in source["anyOf"] if choice != {"type": "null"}]
        assert len(choices) == 1, f"a structural schema has no unions: {source}"
        optional = len(choices) < len(source["anyOf"])
        source = choices[0] | {key: value for key, value in source.items() if key != "anyOf"}
    if "$ref" in source:
        inner = defs[source["$ref"].rsplit("/", 1)[1]]
        source = inner | {key: value for key, value in source.items() if key != "$ref"}
    return source, optional
