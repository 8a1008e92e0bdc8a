"""CEL for paths: they lie under the mount, run no shell and climb nowhere; and as much of brace
notation as regular expressions can check.

CEL's cost is bounded, so nested braces and files named twice are left to `modelchain.plan.check`.
Nothing is refused here that it allows.
"""

from __future__ import annotations

from modelchain.api import messages
from modelchain.api.spec import BUILT_IN_CLASS_NAMES, BUILT_IN_TEMPLATES
from modelchain.cel import Rule, quoted, rule
from modelchain.identity.shards import MAX_DEPTH, MAX_SHARDS

# A component `..`, as it stands or as an alternative of braces behind a slash.
_CLIMBS = quoted(r"/\.\.(/|$)|/\{[^{}]*,\.\.(/|\}(/|$))|/\{\.\./[^{}]*,|/\{\.\.,[^{}]*\}(/|$)")
_RANGE = quoted(r"\{\d{1,6}\.\.\d{1,6}\}")
_FLAT = quoted(r"^[^{}]*(\{[^{}]*\}[^{}]*)*$")  # no braces within braces: all of them multiply
_ENDLESS = quoted(r"\{0*\d{1,5}\.\.[1-9]\d{6,}\}")
_SEVENTEEN_CHOICES = quoted(r"(\{[^{}]*,[^{}]*\}[^{},]*){17}")  # 2^17 files
_DEEP = quoted(r"(\{[^}]*)" + f"{{{MAX_DEPTH + 1}}}")

_MOUNT = "self.data.volume.mountPath"
_FOLDER = f"({_MOUNT}.endsWith('/') ? {_MOUNT} : {_MOUNT} + '/')"


def _path(path: str) -> list[Rule]:
    return [
        rule(path, "!self.contains('pipe:')", messages.PIPE),
        rule(path, f"!self.matches({_CLIMBS})", messages.DOTS),
    ]


def _shards(path: str, many: str) -> list[Rule]:
    return [
        *_path(path),
        rule(path, "!self.contains('\\u0000')", messages.NUL),
        rule(
            path,
            "self.split('{').size() == self.split('}').size()",
            messages.UNBALANCED,
            {"pattern": "self"},
        ),
        rule(path, many, messages.MANY_FILES, {"limit": quoted(str(MAX_SHARDS))}),
        rule(
            path, f"!self.matches({_DEEP})", messages.DEEP_BRACES, {"limit": quoted(str(MAX_DEPTH))}
        ),
    ]


_COUNTABLE = f"!self.matches({_ENDLESS}) && !self.matches({_SEVENTEEN_CHOICES})"


def _countable() -> str:
    """CEL: the pattern is countable, and its first three ranges of numbers give at most MAX_SHARDS
    paths.

    The API server's estimate of its cost allows it once, for the training data.
    """
    lengths = (
        f"self.findAll({_RANGE}, 3).map(r, int(r.find('\\\\d+}}').replace('}}', '')) -"
        " int(r.find('\\\\d+')) + 1)"
    )
    product = " * ".join(f"(n.size() > {i} ? n[{i}] : 1)" for i in range(3))
    return (
        f"{_COUNTABLE} && (!self.matches({_FLAT}) || [{lengths}].all(n, {product} <= {MAX_SHARDS}))"
    )


def _inside(items: str, value: str, blame: str) -> Rule:
    """For all of `items` (each is e), `value` lies under the mount."""
    under = f"({value}.startsWith({_FOLDER}) && {value} != {_FOLDER})"
    values = {"path": f"{items}.filter(e, !{under}).map(e, {value})[0]", "mount": _MOUNT}
    return rule("spec", f"{items}.all(e, {under})", messages.OUTSIDE, values, blame)


def _lists(name: str, built_in: str) -> Rule:
    given = (
        f"(has(self.evaluation) ? self.evaluation.filter(e, has(e.{name}) && e.{name} !="
        f" {quoted(built_in)}) : [])"
    )
    return _inside(given, f"e.{name}", ".evaluation")


RULES: list[Rule] = [
    *_shards("spec.data.train.shards", _countable()),
    *_shards("spec.evaluation[].shards", _COUNTABLE),
    *_path("spec.evaluation[].classNames"),
    *_path("spec.evaluation[].templates"),
    rule("spec.data.volume.mountPath", f"!self.matches({_CLIMBS})", messages.DOTS),
    _inside("[self.data.train]", "e.shards", ".data.train.shards"),
    _inside("(has(self.evaluation) ? self.evaluation : [])", "e.shards", ".evaluation"),
    _lists("classNames", BUILT_IN_CLASS_NAMES),
    _lists("templates", BUILT_IN_TEMPLATES),
]
