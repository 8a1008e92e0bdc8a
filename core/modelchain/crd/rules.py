"""What must hold between fields, in CEL: the rules of `modelchain.plan.check` and of the types'
validators, with the same messages.

CEL cannot expand nested braces. The server refuses nearly all specs that `check` refuses, and never
refuses one that `check` allows.
"""

from __future__ import annotations

from collections.abc import Mapping

from modelchain.api import messages
from modelchain.api.zoo import MODELS
from modelchain.cel import FIRST_TO_LAST, Rule, quoted, rule
from modelchain.crd import paths, shapes
from modelchain.plan.check import BASELINE_BOUNDS, DECIMAL_BOUNDS

_STAGE = "spec.stages[]"
_BATCH, _TRAIN = "self.recipe.globalBatchSize", "self.data.train"
_NAMES = f"[{', '.join(quoted(name) for name in MODELS)}]"

_OBJECT = [
    rule(
        "",
        "self.metadata.name.size() <= 24 &&"
        " self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
        messages.CHAIN_NAME,
        {"name": "self.metadata.name"},
        ".metadata.name",
    ),
]

_STAGES = [
    rule(_STAGE, "has(self.model) != has(self.modelConfig)", messages.ONE_MODEL),
    rule(
        _STAGE,
        f"!has(self.model) || self.model in {_NAMES}",
        messages.UNKNOWN_MODEL,
        {"name": "self.model", "known": quoted(", ".join(MODELS))},
    ),
    *(
        rule(f"{_STAGE}.modelConfig.{tower}", test, message, values)
        for tower, test, message, values in shapes.TOWERS
    ),
    *(Rule("spec.stages", *rest) for rest in shapes.NEIGHBOURS),
]

_RANKS = (
    "(has(s.resources) ? (has(s.resources.nodes) ? s.resources.nodes : 1)"
    " * (has(s.resources.processesPerNode) ? s.resources.processesPerNode : 1) : 1)"
)


def _divides(name: str, size: str) -> Rule:
    """The ranks of every stage divide `size`."""
    first = f"self.stages.filter(s, {size} % {_RANKS} != 0)"
    values = {
        "stage": f"{first}[0].name",
        "name": quoted(name),
        "batch": size,
        "ranks": f"{first}.map(s, {_RANKS})[0]",
    }
    given = "!has(self.recipe.microBatchSize) || " if name == "microBatchSize" else ""
    return rule(
        "spec",
        f"{given}self.stages.all(s, {size} % {_RANKS} == 0)",
        messages.RANKS,
        values,
        ".stages",
    )


def _warm_up(kind: str, indices: str, epochs: str, given: str) -> Rule:
    """Each stage of these indices whose epochs are given trains longer than it warms up."""
    steps = f"{epochs} * ({_TRAIN}.samples / {_BATCH})"
    warmup = f"self.recipe.warmupSteps.{kind}"
    long = f"{indices}.filter(i, i < self.stages.size() && {given} && {warmup} >= {steps})"
    values = {
        "warmup": warmup,
        "stage": f"self.stages[{long}[0]].name",
        "steps": f"{long}.map(i, {steps})[0]",
        "epochs": f"{long}.map(i, {epochs})[0]",
    }
    enough = f"{_BATCH} > {_TRAIN}.samples || {long}.size() == 0"
    return rule("spec", enough, messages.WARM_UP, values, f".recipe.warmupSteps.{kind}")


_EPOCHS = "self.stages[i].epochs"
_RECIPE = [
    rule(
        "spec",
        f"{_BATCH} <= {_TRAIN}.samples",
        messages.LARGE_BATCH,
        {"batch": _BATCH, "samples": f"{_TRAIN}.samples"},
        ".recipe.globalBatchSize",
    ),
    rule(
        "spec.recipe",
        "!has(self.microBatchSize) || self.globalBatchSize % self.microBatchSize == 0",
        messages.MICRO_BATCH,
        {"micro": "self.microBatchSize", "batch": "self.globalBatchSize"},
        ".microBatchSize",
    ),
    _divides("globalBatchSize", _BATCH),
    _divides("microBatchSize", "self.recipe.microBatchSize"),
    _warm_up("first", "[0]", f"(has({_EPOCHS}) ? {_EPOCHS} : self.recipe.baselineEpochs)", "true"),
    _warm_up("successors", FIRST_TO_LAST, _EPOCHS, f"has({_EPOCHS})"),
    rule(
        "spec",
        f"has(self.allocation.targetAcceleration) || {FIRST_TO_LAST}.all(i, i >= self.stages.size()"
        f" || has({_EPOCHS}))",
        messages.NO_EPOCHS,
        {
            "stage": (
                f"self.stages[{FIRST_TO_LAST}.filter(i, i < self.stages.size() &&"
                f" !has({_EPOCHS}))[0]].name"
            )
        },
        ".allocation.targetAcceleration",
    ),
    *(
        rule(
            path,
            f"double(self) >= {float(low)!r} && double(self) <= {float(high)!r}",
            messages.RANGE,
            {"low": quoted(low), "high": quoted(high), "text": "self"},
        )
        for path, (low, high) in DECIMAL_BOUNDS.items()
    ),
]

# CEL on a spec with a gate. Its lists are short, and a missing one is as good as an empty one.
_GATE = "self.gate"
_BASELINE = f"(has({_GATE}.baseline) ? {_GATE}.baseline : {{}})"
_TRAINED = f"(has({_GATE}.train) ? {_GATE}.train : [])"
_GIVEN = f"{FIRST_TO_LAST}.filter(i, i < self.stages.size() && has({_EPOCHS}))"


def _gate(test: str, message: str, field: str, values: Mapping[str, str] | None = None) -> Rule:
    """A rule for specs that have a gate."""
    return rule("spec", f"!has({_GATE}) || {test}", message, values, f".gate.{field}")


def _successors(names: str, field: str) -> list[Rule]:
    """All of these names are those of stages after the first."""
    first = "self.stages[0].name"
    unknown = f"{names}.filter(n, !self.stages.exists(s, s.name == n))"
    return [
        _gate(f"!({first} in {names})", messages.FIRST_STAGE, field, {"name": first}),
        _gate(f"{unknown}.size() == 0", messages.NO_STAGE, field, {"name": f"{unknown}[0]"}),
    ]


def _relax(test: str, message: str, values: Mapping[str, str] | None = None) -> Rule:
    return _gate(f"{_GATE}.onMiss != 'Relax' || {test}", message, "onMiss", values)


_HIGH = float(BASELINE_BOUNDS[1])
_WRONG = f"self.baseline.filter(n, double(self.baseline[n]) > {_HIGH!r})"
_GATES = [
    _gate(
        f"(has(self.evaluation) && self.evaluation.exists(e, e.name == {_GATE}.metric))",
        messages.GATE_METRIC,
        "metric",
        {"metric": f"{_GATE}.metric"},
    ),
    *_successors(_BASELINE, "baseline"),
    *_successors(_TRAINED, "train"),
    rule(
        "spec.gate",
        f"!has(self.baseline) || {_WRONG}.size() == 0",
        messages.BASELINE_RANGE,
        {
            "name": f"{_WRONG}[0]",
            "low": quoted(BASELINE_BOUNDS[0]),
            "high": quoted(BASELINE_BOUNDS[1]),
            "text": f"self.baseline[{_WRONG}[0]]",
        },
        ".baseline",
    ),
    _gate(f"{_TRAINED}.all(n, {_TRAINED}.exists_one(m, m == n))", messages.TWICE_TRAINED, "train"),
    _gate(f"!{_TRAINED}.exists(n, n in {_BASELINE})", messages.BOTH_BASELINES, "train"),
    _relax("has(self.allocation.targetAcceleration)", messages.RELAX_TARGET),
    _relax(f"{_BASELINE}.size() + {_TRAINED}.size() > 0", messages.RELAX_BASELINE),
    _relax(
        f"{_GIVEN}.size() == 0",
        messages.RELAX_EPOCHS,
        {"stage": f"self.stages[{_GIVEN}[0]].name"},
    ),
    rule("spec.budget", "has(self.cost) || has(self.gpuHours)", messages.NO_LIMIT),
]

_REST = [
    rule(
        "spec.evaluation[]",
        "self.kind != 'ZeroShot' || (has(self.classNames) && has(self.templates))",
        messages.ZERO_SHOT,
    ),
    rule(
        "spec.evaluation[]",
        "self.kind != 'Retrieval' || (!has(self.classNames) && !has(self.templates))",
        messages.RETRIEVAL,
    ),
    rule("spec.storage", "has(self.claimTemplate) != has(self.claimName)", messages.ONE_CLAIM),
    rule(
        "spec",
        "!has(oldSelf.storage) || (has(self.storage) && has(self.storage.claimName) =="
        " has(oldSelf.storage.claimName) && (!has(self.storage.claimName) || self.storage.claimName"
        " == oldSelf.storage.claimName) && has(self.storage.claimTemplate) =="
        " has(oldSelf.storage.claimTemplate) && (!has(self.storage.claimTemplate) ||"
        " self.storage.claimTemplate == oldSelf.storage.claimTemplate))",
        messages.STORAGE,
        field=".storage",
    ),
    rule(
        "spec.runner",
        "self.kind == 'Local' || !has(self.image) || self.image.matches('^[^@"
        " ]+@sha256:[0-9a-f]{64}$')",
        messages.IMAGE,
        {"image": "self.image"},
        ".image",
    ),
]

CHAIN: list[Rule] = [*_OBJECT, *_STAGES, *_RECIPE, *_GATES, *paths.RULES, *_REST]
ARTIFACT: list[Rule] = [
    rule(
        "", "self.spec == oldSelf.spec", messages.ARTIFACT, {"name": "self.metadata.name"}, ".spec"
    ),
    # At the root, since a rule at the metrics would not see that all of them are removed.
    rule(
        "",
        "!has(oldSelf.status) || !has(oldSelf.status.metrics) || (has(self.status) &&"
        " has(self.status.metrics) && oldSelf.status.metrics.all(key, key in self.status.metrics &&"
        " self.status.metrics[key] == oldSelf.status.metrics[key]))",
        messages.METRICS,
        {"name": "self.metadata.name"},
        ".status.metrics",
    ),
]
