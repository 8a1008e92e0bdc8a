"""What must hold between the fields of a spec. It is checked before the first stage, and problems
name the field at fault.

Neighbours are compared because a predecessor's weights are inserted into its successor: no size may
shrink, and what the growth cannot change must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import lru_cache
from pathlib import PurePosixPath

from modelchain.api import messages
from modelchain.api.modelconfig import ModelConfig
from modelchain.api.spec import ChainSpec, Gate, ModelChain
from modelchain.errors import InputError, Problem
from modelchain.identity.shards import expand
from modelchain.plan.plan import plan


def check(chain: ModelChain, file: str | None = None) -> None:
    """Raise InputError with every problem between fields of the spec."""
    problems: list[Problem] = []

    def report(field: str, message: str) -> None:
        problems.append(Problem(message, file, field))

    spec = chain.spec
    _names(spec, report)
    _decimals(spec, report)
    _paths(spec, report)
    _neighbours(spec, report)
    _recipe(spec, report)
    _gate(spec, report)
    if problems:
        raise InputError(*problems)


Report = Callable[[str, str], None]
DECIMAL_BOUNDS = {
    "spec.recipe.learningRate": ("1e-12", "10"),
    "spec.recipe.weightDecay": ("0", "10"),
    "spec.transfer.distillation.alpha": ("0", "1e9"),
    "spec.allocation.targetAcceleration": ("1", "1e6"),
    "spec.allocation.endRatio": ("0.01", "1"),
    "spec.gate.tolerance": ("0", "100"),
    "spec.gate.relaxation.factor": ("1", "100"),
    "spec.budget.cost": ("0", "1e12"),
    "spec.budget.gpuHours": ("0", "1e12"),
}
# Of the metric of a model trained alone, in percent.
BASELINE_BOUNDS = ("0", "100")


def _names(spec: ChainSpec, report: Report) -> None:
    for kind, names in (
        ("stages", [s.name for s in spec.stages]),
        ("evaluation", [e.name for e in spec.evaluation]),
    ):
        for index, name in enumerate(names):
            if name in names[:index]:
                report(f"spec.{kind}[{index}].name", f"{name!r} is used twice; names must differ")


def _decimals(spec: ChainSpec, report: Report) -> None:
    given = {
        "spec.recipe.learningRate": spec.recipe.learning_rate,
        "spec.recipe.weightDecay": spec.recipe.weight_decay,
        "spec.transfer.distillation.alpha": spec.transfer.distillation.alpha,
        "spec.allocation.targetAcceleration": spec.allocation.target_acceleration,
        "spec.allocation.endRatio": spec.allocation.end_ratio,
        "spec.gate.tolerance": spec.gate.tolerance if spec.gate else None,
        "spec.gate.relaxation.factor": spec.gate.relaxation.factor if spec.gate else None,
        "spec.budget.cost": spec.budget.cost if spec.budget else None,
        "spec.budget.gpuHours": spec.budget.gpu_hours if spec.budget else None,
    }
    for field, (low, high) in DECIMAL_BOUNDS.items():
        text = given[field]
        if text is not None and not _between(low, text, high):
            report(field, messages.RANGE.format(low=low, high=high, text=text))


def _between(low: str, text: str, high: str) -> bool:
    return Decimal(low) <= Decimal(text) <= Decimal(high)


def _paths(spec: ChainSpec, report: Report) -> None:
    mount = spec.data.volume.mount_path
    if ".." in PurePosixPath(mount).parts:
        report("spec.data.volume.mountPath", messages.DOTS)
        return
    for field, path in _paths_of(spec):
        for message in _path_problems(path, mount, is_pattern=field.endswith("shards")):
            report(field, message)


def _paths_of(spec: ChainSpec) -> Iterator[tuple[str, str]]:
    """Every path of the spec, with its field."""
    yield "spec.data.train.shards", spec.data.train.shards
    for index, evaluation in enumerate(spec.evaluation):
        where = f"spec.evaluation[{index}]"
        yield f"{where}.shards", evaluation.shards
        for field, path in evaluation.list_files.items():
            yield f"{where}.{field}", path


@lru_cache(maxsize=1024)  # the operator checks a chain in every pass over it
def _path_problems(path: str, mount: str, is_pattern: bool) -> tuple[str, ...]:
    """What is wrong with a path. A pattern may name 100,000 files, so this may take a second."""
    return tuple(_problems_of(path, mount, is_pattern))


def _problems_of(path: str, mount: str, is_pattern: bool) -> Iterator[str]:
    if "pipe:" in path:
        yield messages.PIPE
        return
    if not path.startswith(mount.removesuffix("/") + "/"):
        yield messages.OUTSIDE.format(path=path, mount=mount)
        return
    try:
        names = expand(path) if is_pattern else [path]
    except InputError as error:
        yield error.problems[0].message
        return
    plain = mount.removesuffix("/") + "/"
    # Most names need no closer look, which would take a second for 100,000 of them.
    odd = (n for n in names if "/." in n or n.endswith("/") or not n.startswith(plain))
    if misplaced := next(filter(None, (_misplaced(name, mount) for name in odd)), None):
        yield misplaced
    if len(set(names)) != len(names):
        yield messages.TWICE


def _misplaced(name: str, mount: str) -> str | None:
    """Why a file does not lie below the mount; None if it does."""
    path = PurePosixPath(name)
    if ".." in path.parts:
        return messages.DOTS
    if PurePosixPath(mount) not in path.parents:
        return messages.OUTSIDE.format(path=name, mount=mount)
    return None


def _neighbours(spec: ChainSpec, report: Report) -> None:
    for index in range(1, len(spec.stages)):
        before, after = spec.stages[index - 1], spec.stages[index]
        for why in mismatch(before.config, after.config):
            report(
                f"spec.stages[{index}]",
                messages.NEIGHBOURS.format(after=after.name, before=before.name, mismatch=why),
            )


def mismatch(before: ModelConfig, after: ModelConfig) -> list[str]:
    """Why `after` cannot be grown from `before`; empty if it can. No tower may shrink, one must
    grow, and the rest must be equal.
    """
    if after.vision_cfg.family is not before.vision_cfg.family:
        return [messages.OTHER_FAMILY]
    equal = zip(_equal(before), _equal(after), strict=True)
    sizes = list(zip(_sizes(before), _sizes(after), strict=True))
    problems = [
        messages.EQUAL.format(name=name, x=_spelled(x), y=_spelled(y))
        for (name, x), (_, y) in equal
        if x != y
    ]
    problems += [
        messages.SHRINKS.format(name=name, x=x, y=y) for (name, x), (_, y) in sizes if y < x
    ]
    if not problems and all(x == y for x, y in sizes):
        problems.append(messages.NO_GROWTH)
    return problems


def _equal(config: ModelConfig) -> list[tuple[str, float]]:
    """By name, what must be equal along a chain."""
    vision, text = config.vision_cfg, config.text_cfg
    return [
        ("vision image_size", vision.image_size),
        ("text head width", text.head_width),
        ("text context_length", text.context_length),
        ("text vocab_size", text.vocab_size),
        ("text mlp_ratio", text.mlp_ratio),
        ("quick_gelu", config.quick_gelu),
        *((f"vision {name}", getattr(vision, name)) for name in vision.family.EQUAL),
    ]


def _sizes(config: ModelConfig) -> list[tuple[str, int]]:
    """By name, what may grow along a chain and may not shrink."""
    vision, text = config.vision_cfg.shape, config.text_cfg
    return [
        ("vision width", vision.width),
        ("vision heads", vision.heads),
        *(("vision depth", depth) for depth in vision.depths),
        ("text width", text.width),
        ("text heads", text.heads),
        ("text depth", text.layers),
    ]


def _spelled(value: bool | float) -> str:
    """Spelled as in YAML, and as by CEL's `string()`."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if value == int(value) else str(value)


def _recipe(spec: ChainSpec, report: Report) -> None:
    recipe, train = spec.recipe, spec.data.train
    batch = recipe.global_batch_size
    if batch > train.samples:
        report(
            "spec.recipe.globalBatchSize",
            messages.LARGE_BATCH.format(batch=batch, samples=train.samples),
        )
        return
    micro = recipe.micro_batch_size
    if micro is not None and batch % micro:
        report("spec.recipe.microBatchSize", messages.MICRO_BATCH.format(micro=micro, batch=batch))
    for index, stage in enumerate(spec.stages):
        ranks = stage.resources.nodes * (stage.resources.processes_per_node or 1)
        for name, size in (("globalBatchSize", batch), ("microBatchSize", micro)):
            if size is not None and size % ranks:
                why = messages.RANKS.format(stage=stage.name, name=name, batch=size, ranks=ranks)
                report(f"spec.stages[{index}].resources", why)
                break
        epochs = stage.epochs or (recipe.baseline_epochs if index == 0 else None)
        if epochs is None:
            continue  # the plan allocates them; see `check_epochs`
        if too_long := warmup_too_long(spec, index, epochs):
            report(*too_long)


def _gate(spec: ChainSpec, report: Report) -> None:
    gate = spec.gate
    if gate is None:
        return
    if all(e.name != gate.metric for e in spec.evaluation):
        report("spec.gate.metric", messages.GATE_METRIC.format(metric=gate.metric))
    _baselines(spec, gate, report)
    if gate.on_miss == "Relax":
        for message in _not_relaxable(spec, gate):
            report("spec.gate.onMiss", message)


def _baselines(spec: ChainSpec, gate: Gate, report: Report) -> None:
    """Each baseline is that of one successor, and is either given or trained."""
    low, high = BASELINE_BOUNDS
    for name, text in gate.baseline.items():
        if not _between(low, text, high):
            values = {"name": name, "low": low, "high": high, "text": text}
            report("spec.gate.baseline", messages.BASELINE_RANGE.format(**values))
    first, *successors = (stage.name for stage in spec.stages)
    for field, names in (("baseline", list(gate.baseline)), ("train", gate.train)):
        for name in dict.fromkeys(names):
            if name not in successors:
                message = messages.FIRST_STAGE if name == first else messages.NO_STAGE
                report(f"spec.gate.{field}", message.format(name=name))
    if len(set(gate.train)) < len(gate.train):
        report("spec.gate.train", messages.TWICE_TRAINED)
    if set(gate.train) & set(gate.baseline):
        report("spec.gate.train", messages.BOTH_BASELINES)


def gates_nothing(spec: ChainSpec, file: str) -> Problem | None:
    """A warning of a gate that compares no stage with anything."""
    if spec.gate is None or spec.gate.baseline or spec.gate.train:
        return None
    return Problem(messages.NO_BASELINE, file, "spec.gate")


def _not_relaxable(spec: ChainSpec, gate: Gate) -> Iterator[str]:
    """Why the epochs of this chain cannot be relaxed."""
    if spec.allocation.target_acceleration is None:
        yield messages.RELAX_TARGET
    if not gate.baseline and not gate.train:
        yield messages.RELAX_BASELINE
    given = next((stage.name for stage in spec.stages[1:] if stage.epochs is not None), None)
    if given is not None:
        yield messages.RELAX_EPOCHS.format(stage=given)


def warmup_too_long(spec: ChainSpec, index: int, epochs: int) -> tuple[str, str] | None:
    """If stage `index` cannot warm up within its steps, the field at fault and why."""
    steps = epochs * (spec.data.train.samples // spec.recipe.global_batch_size)
    field, warmup = "first", spec.recipe.warmup_steps.first
    if index > 0:
        field, warmup = "successors", spec.recipe.warmup_steps.successors
    if warmup < steps:
        return None
    stage = spec.stages[index].name
    message = messages.WARM_UP.format(warmup=warmup, stage=stage, steps=steps, epochs=epochs)
    return f"spec.recipe.warmupSteps.{field}", message


def check_epochs(chain: ModelChain, file: str, frozen: dict[str, int]) -> None:
    """Raise InputError if no epochs can be allocated, or a stage is shorter than its warm-up."""
    try:
        planned = enumerate(plan(chain, "analytic", {}, frozen).stages)
    except InputError as error:
        raise error.in_file(file) from error
    found = [warmup_too_long(chain.spec, index, stage.epochs) for index, stage in planned]
    problems = [Problem(message, file, field) for field, message in filter(None, found)]
    if problems:
        raise InputError(*problems)
