"""Writes CEL: rules, literals, and messages that the server formats when a rule fails."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

# The indexes of a chain's stages after the first. A CEL rule iterates over this list, since CEL's
# comprehensions give the items of a list and not their indexes.
FIRST_TO_LAST = f"[{', '.join(str(i) for i in range(1, 32))}]"


def quoted(text: str) -> str:
    """A text as a CEL literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def literal(value: str | float | Sequence[str | float] | Mapping[str, Sequence[float]]) -> str:
    """A text, a number, a list or a map of lists as a CEL literal."""
    match value:
        case str():
            return quoted(value)
        case int() | float():
            return repr(value)
        case Mapping():
            return "{" + ", ".join(f"{quoted(k)}: {literal(v)}" for k, v in value.items()) + "}"
        case _:
            return f"[{', '.join(literal(v) for v in value)}]"


def given(at: str, kind: type[BaseModel], name: str) -> str:
    """CEL for the field `name` of the object at `at`, or for the field's default, if it has one.

    A rule has to fill in the default, since our CRD has no defaults inside lists.
    """
    default = kind.model_fields[name].default
    return f"{at}.{name}" if default is None else f"(has({at}.{name}) ? {at}.{name} : {default})"


def whole_product(width: str, ratio: str) -> str:
    """CEL: whether the product of an integer and a double is whole."""
    return f"double({width}) * {ratio} == double(int(double({width}) * {ratio}))"


def sentence(template: str, **values: str) -> str:
    """CEL for the text of `template`, in which each {name} is replaced by a value.

    `values` has, by name, the CEL expression that gives the value. The text is made with `format`:
    the server cannot bound the length of concatenated texts, and would refuse the rule as too
    costly.
    """
    names = re.findall(r"\{(\w+)\}", template)
    pattern = re.sub(r"\{\w+\}", "%s", template.replace("%", "%%"))
    return f"{quoted(pattern)}.format([{', '.join(values[name] for name in names)}])"


@dataclass(frozen=True)
class Rule:
    """One rule on the schema at `path`."""

    path: str
    # CEL that is true for a valid object.
    rule: str
    # The message if `expression` fails or is empty.
    message: str
    # CEL that makes the message.
    expression: str = ""
    # The field below `path` that the server names as wrong.
    field: str = ""

    def validation(self) -> dict[str, str]:
        """The rule as an entry of x-kubernetes-validations."""
        entry = {"rule": self.rule, "message": self.message}
        entry |= {"messageExpression": self.expression} if self.expression else {}
        return entry | ({"fieldPath": self.field} if self.field else {})


def rule(
    path: str, test: str, message: str, values: Mapping[str, str] | None = None, field: str = ""
) -> Rule:
    """A rule whose message is a template. `values` has CEL for each name in braces."""
    plain = re.sub(r"\{\w+\}", "...", message)
    return Rule(path, test, plain, sentence(message, **values) if values else "", field)
