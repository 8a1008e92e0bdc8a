"""What must hold between the fields of a spec: checked before the first stage, with the field that is at fault.

The neighbours' rule is RULES section 3: a predecessor's weights are inserted into its successor, so nothing may shrink.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

from modelchain.errors import InputError, Problem
from modelchain.modelconfig import ModelConfig
from modelchain.shards import expand
from modelchain.spec import ChainSpec, ModelChain


def check(chain: ModelChain, file: str | None = None) -> None:
    """Raise InputError with every problem of the spec that one field alone cannot show."""
    problems: list[Problem] = []

    def report(field: str, message: str) -> None:
        problems.append(Problem(message, file, field))

    spec = chain.spec
    _names(spec, report)
    _decimals(spec, report)
    _paths(spec, report)
    _neighbours(spec, report)
    _recipe(spec, report)
    if problems:
        raise InputError(*problems)


Report = Callable[[str, str], None]


def _names(spec: ChainSpec, report: Report) -> None:
    for kind, names in (("stages", [s.name for s in spec.stages]), ("evaluation", [e.name for e in spec.evaluation])):
        for index, name in enumerate(names):
            if name in names[:index]:
                report(f"spec.{kind}[{index}].name", f"{name!r} is used twice; names must differ")


def _decimals(spec: ChainSpec, report: Report) -> None:
    bounds: list[tuple[str, str | None, Decimal, Decimal]] = [
        ("spec.recipe.learningRate", spec.recipe.learning_rate, Decimal("1e-12"), Decimal(10)),
        ("spec.recipe.weightDecay", spec.recipe.weight_decay, Decimal(0), Decimal(10)),
        ("spec.transfer.distillation.alpha", spec.transfer.distillation.alpha, Decimal(0), Decimal("1e9")),
        ("spec.allocation.targetAcceleration", spec.allocation.target_acceleration, Decimal(1), Decimal("1e6")),
    ]
    for field, text, low, high in bounds:
        if text is not None and not low <= Decimal(text) <= high:
            report(field, f"must lie between {low} and {high} (got {text})")


def _paths(spec: ChainSpec, report: Report) -> None:
    mount = spec.data.volume.mount_path
    paths = [("spec.data.train.shards", spec.data.train.shards)]
    for index, evaluation in enumerate(spec.evaluation):
        where = f"spec.evaluation[{index}]"
        paths.append((f"{where}.shards", evaluation.shards))
        paths += [(f"{where}.{field}", path) for field, path in evaluation.list_files.items()]
    if ".." in PurePosixPath(mount).parts:
        report("spec.data.volume.mountPath", "'..' is not allowed in a path")
        return
    for field, path in paths:
        if "pipe:" in path:
            report(field, "'pipe:' runs a shell and is not allowed; give paths of files")
            continue
        try:
            names = expand(path) if field.endswith("shards") else [path]
        except InputError as error:
            report(field, error.problems[0].message)
            continue
        for name in names:
            if ".." in PurePosixPath(name).parts:
                report(field, "'..' is not allowed in a path")
            elif PurePosixPath(mount) not in PurePosixPath(name).parents:
                report(field, f"{name} does not lie under spec.data.volume.mountPath {mount}")
            else:
                continue
            break
        if len(set(names)) != len(names):
            report(field, "the pattern names a file twice")


def _neighbours(spec: ChainSpec, report: Report) -> None:
    for index in range(1, len(spec.stages)):
        before, after = spec.stages[index - 1], spec.stages[index]
        pair = f"stage {after.name!r} after {before.name!r}"
        for message in mismatch(before.config, after.config):
            report(f"spec.stages[{index}]", f"{pair}: {message}")


def mismatch(before: ModelConfig, after: ModelConfig) -> list[str]:
    """Why `after` cannot be grown from `before`, if so: no tower may shrink, one must grow, the rest must be equal."""
    b, a = before.vision_cfg, after.vision_cfg
    bt, at = before.text_cfg, after.text_cfg
    if a.is_swin != b.is_swin:
        return ["a ViT and a Swin tower cannot be neighbours"]
    equal: list[tuple[str, Any, Any]] = [
        ("vision image_size", b.image_size, a.image_size),
        ("text head width", bt.head_width, at.head_width),
        ("text context_length", bt.context_length, at.context_length),
        ("text vocab_size", bt.vocab_size, at.vocab_size),
        ("text mlp_ratio", bt.mlp_ratio, at.mlp_ratio),
        ("quick_gelu", before.quick_gelu, after.quick_gelu),
    ]
    if not a.is_swin:
        equal += [
            ("vision head_width", b.head_width, a.head_width),
            ("vision patch_size", b.patch_size, a.patch_size),
            ("vision mlp_ratio", b.mlp_ratio, a.mlp_ratio),
        ]
    problems = [f"{name} must be equal along the chain ({x} then {y})" for name, x, y in equal if x != y]
    sizes: list[tuple[str, int, int]] = [
        ("vision width", b.base_width, a.base_width),
        ("vision heads", b.heads, a.heads),
        *(("vision depth", x, y) for x, y in zip(b.depths, a.depths, strict=True)),
        ("text width", bt.width, at.width),
        ("text heads", bt.heads, at.heads),
        ("text depth", bt.layers, at.layers),
    ]
    problems += [f"{name} shrinks ({x} then {y}); stages go from small to large" for name, x, y in sizes if y < x]
    if not problems and all(x == y for _, x, y in sizes):
        problems.append("no tower grows in width or depth; each stage must be larger than its predecessor")
    return problems


def _recipe(spec: ChainSpec, report: Report) -> None:
    recipe, train = spec.recipe, spec.data.train
    batch = recipe.global_batch_size
    if batch > train.samples:
        report("spec.recipe.globalBatchSize", f"{batch} is more than the {train.samples} samples of data.train")
        return
    micro = recipe.micro_batch_size
    if micro is not None and batch % micro:
        report("spec.recipe.microBatchSize", f"{micro} does not divide globalBatchSize {batch}")
    for index, stage in enumerate(spec.stages):
        ranks = stage.resources.nodes * (stage.resources.processes_per_node or 1)
        if batch % ranks:
            report(f"spec.stages[{index}].resources", f"globalBatchSize {batch} is not divisible by {ranks} processes")
        elif micro is not None and micro % ranks:
            report(f"spec.stages[{index}].resources", f"microBatchSize {micro} is not divisible by {ranks} processes")
        epochs = stage.epochs or (recipe.baseline_epochs if index == 0 else None)
        if epochs is None:
            continue  # allocated by the plan; `validate.check_epochs` looks at it then
        if too_long := warmup_too_long(spec, index, epochs):
            report(*too_long)


def warmup_too_long(spec: ChainSpec, index: int, epochs: int) -> tuple[str, str] | None:
    """If stage `index` cannot warm up within its steps (RULES section 4), the field at fault and why."""
    steps = epochs * (spec.data.train.samples // spec.recipe.global_batch_size)
    field, warmup = "first", spec.recipe.warmup_steps.first
    if index > 0:
        field, warmup = "successors", spec.recipe.warmup_steps.successors
    if warmup < steps:
        return None
    stage = spec.stages[index].name
    message = f"{warmup} steps of warm-up, but stage {stage!r} trains only {steps} steps ({epochs} epochs)"
    return f"spec.recipe.warmupSteps.{field}", message
