"""What a chain will cost before it runs: epochs, samples, MACs, GPU hours and money, against
training each model alone.

Two conventions. `analytic` counts what the trainer will really do (`modelchain.plan.macs`, samples
in whole batches, the captions of the spec), in the ledger's terms. `paper` takes Table G's cells as
printed and charges every sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from itertools import pairwise
from math import floor
from typing import Literal

from modelchain.api.spec import ChainSpec, ModelChain, Record, Stage
from modelchain.api.zoo import MODELS
from modelchain.errors import InputError
from modelchain.plan import macs
from modelchain.plan.pools import NodePool

Convention = Literal["analytic", "paper"]

# Epochs of the last stage over those of the second: 15 / 24, of the paper's ViT chain on CC3M. Its
# rule names no ratio, and its other chains have 12 / 24 and 15 / 21.
END_RATIO = Fraction(5, 8)
REACHED = Fraction(99, 100)  # the part of the target ratio that whole epochs must reach

# Milliseconds a sample on one A100: these three and Swin's A100_MS, fitted to the 21 different GPU
# hours of the paper's Table 2 (ViT-B in the chain on CC3M as 56, which its sums need; 54 is
# printed). Mean error on printed cells 3.76 %, largest 10.2 %.
A100_BASE, A100_PER_GMAC, A100_TEACHER = 1.301071, 0.02061039, 0.468171
MS_PER_HOUR = 3_600_000


class Amount(Record):
    """MACs; hours of one GPU; money as a decimal string in the pool's currency. None: not known."""

    macs: int
    gpu_hours: float | None
    cost: str | None


class IndividualPlan(Record):
    """The same model trained alone for `baselineEpochs`, without a teacher."""

    epochs: int
    macs: int
    gpu_hours: float | None
    cost: str | None


class StagePlan(Record):
    """One stage. `macs_per_sample` holds the student's training and, where one pulls, the teacher's
    forward pass.
    """

    name: str
    model: str
    epochs: int
    samples: int
    macs_per_sample: int | float
    macs: int
    gpu_hours: float | None
    cost: str | None
    individual: IndividualPlan


class Plan(Record):
    """`acceleration` is the MACs of training each model alone over those of the chain."""

    chain: str
    convention: Convention
    stages: list[StagePlan]
    total: Amount
    individual: Amount
    acceleration: float

    def to_json(self) -> str:
        """What `plan -o json` prints."""
        return self.model_dump_json(by_alias=True, indent=2)


def plan(
    chain: ModelChain,
    convention: Convention,
    pools: Mapping[str, NodePool],
    frozen: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of a checked chain.

    `frozen` holds the epochs that stages, by name, were launched with; they stand in for epochs the
    spec leaves out. Raises InputError when the convention has no numbers for a model or the target
    acceleration cannot be met.
    """
    spec = chain.spec
    pulled = spec.transfer.distillation.pulls
    alone, chained = _macs_per_sample(spec, convention)
    epochs = _epochs(spec, alone, chained, frozen or {})
    per_epoch = _samples_per_epoch(spec, convention)
    pool = None if spec.runner.kind == "Local" else pools.get(spec.runner.node_pool or "")
    stages = []
    for i, stage in enumerate(spec.stages):
        more, baseline = stage.config.vision_cfg.family.A100_MS, spec.recipe.baseline_epochs
        individual = _amount(baseline * per_epoch, alone[i], pool, more)
        if pulled and i > 0:
            more += A100_TEACHER
        own = _amount(epochs[i] * per_epoch, chained[i], pool, more)
        stages.append(
            StagePlan(
                name=stage.name,
                model=stage.model or "inline",
                epochs=epochs[i],
                samples=epochs[i] * per_epoch,
                macs_per_sample=(
                    chained[i].numerator if chained[i].denominator == 1 else float(chained[i])
                ),
                individual=IndividualPlan(epochs=baseline, **dict(individual)),
                **dict(own),
            )
        )
    total, individually = _sum(stages), _sum([stage.individual for stage in stages])
    return Plan(
        chain=chain.metadata.name,
        convention=convention,
        stages=stages,
        total=total,
        individual=individually,
        acceleration=individually.macs / total.macs,
    )


def allocate(
    costs: Sequence[Fraction],
    individual: Fraction,
    fixed: Sequence[int | None],
    target: Fraction,
    baseline_epochs: int,
) -> list[int]:
    """Whole epochs for every stage, by the paper's rule 3 (section 3.1.2), made exact by choices of
    ours.

    The rule's premise, that the first pair is trained and loses nothing, else the target is
    relaxed, is not tried here.

    `costs`: MACs of one epoch of each stage in the chain. `individual`: MACs of training each model
    alone, in the same unit. `fixed`: epochs that are given; None is to be found, never for the
    first stage. The free stages lie on a line that falls from the second stage to 0.625 of it at
    the last and spends what `target` leaves; rounded, they reach 0.99 x target, never increase
    along the chain, and stay within one epoch of the line (at least 1). Raises InputError for a
    target that one epoch for every free stage misses, or that asks for more than `baseline_epochs`.
    """
    free = [i for i, e in enumerate(fixed) if e is None]
    given = sum((e * c for e, c in zip(fixed, costs, strict=True) if e is not None), Fraction(0))
    fall = (1 - END_RATIO) / max(len(costs) - 2, 1)
    weight = {i: 1 - fall * (i - 1) for i in free}
    slope = sum(weight[i] * costs[i] for i in free)
    _check_target(
        target,
        smallest=individual / (given + baseline_epochs / weight[free[0]] * slope),
        largest=individual / (given + sum(costs[i] for i in free)),
    )
    second = (individual / target - given) / slope
    line = {i: second * weight[i] for i in free}
    rounded = {i: max(1, floor(line[i] + Fraction(1, 2))) for i in free}
    epochs = dict(rounded)

    def reaches(epochs: Mapping[int, int]) -> bool:
        return individual >= REACHED * target * (
            given + sum(e * costs[i] for i, e in epochs.items())
        )

    while not reaches(epochs):
        above = [i for i in free if epochs[i] > line[i] and epochs[i] > 1]
        epochs[max(above, key=lambda i: (epochs[i] - line[i], i))] -= 1

    def can_give_back(i: int) -> bool:
        more = epochs | {i: epochs[i] + 1}
        falling = all(more[a] >= more[b] for a, b in pairwise(free))
        return epochs[i] < rounded[i] and falling and reaches(more)

    while takers := [i for i in free if can_give_back(i)]:
        epochs[max(takers, key=lambda i: line[i] - epochs[i])] += 1
    return [epochs[i] if e is None else e for i, e in enumerate(fixed)]


def _check_target(target: Fraction, smallest: Fraction, largest: Fraction) -> None:
    field = "spec.allocation.targetAcceleration"
    low, high = _digits(smallest, ROUND_CEILING), _digits(largest, ROUND_FLOOR)
    if smallest * REACHED > largest:
        raise InputError(
            "no target suits so few baselineEpochs: give every stage its epochs", field=field
        )
    if target * REACHED > largest:
        raise InputError(
            f"{float(target):g} cannot be reached: with one epoch for every stage left to the plan"
            f" the chain is {high} times cheaper, the largest possible acceleration",
            field=field,
        )
    if target < smallest:
        raise InputError(
            f"{float(target):g} is too low: a stage would train longer than baselineEpochs; the"
            f" smallest sensible target is {low}",
            field=field,
        )


def _epochs(
    spec: ChainSpec,
    alone: Sequence[Fraction],
    chained: Sequence[Fraction],
    frozen: Mapping[str, int],
) -> list[int]:
    """Given in the spec, else frozen by an earlier launch, else baselineEpochs (the first stage) or
    allocated.
    """
    baseline = spec.recipe.baseline_epochs
    fixed = [
        frozen.get(stage.name) if stage.epochs is None else stage.epochs for stage in spec.stages
    ]
    fixed[0] = baseline if fixed[0] is None else fixed[0]
    if None not in fixed:
        return [e for e in fixed if e is not None]
    text = spec.allocation.target_acceleration
    if text is None or not Decimal(text):
        missing = spec.stages[fixed.index(None)].name
        raise InputError(
            f"stage {missing} has no epochs: give them, or a target acceleration to allocate"
            " them by",
            field="spec.allocation.targetAcceleration",
        )
    # Samples an epoch are the same for all stages, so MACs a sample will do.
    return allocate(chained, baseline * sum(alone, Fraction(0)), fixed, Fraction(text), baseline)


def _macs_per_sample(
    spec: ChainSpec, convention: Convention
) -> tuple[list[Fraction], list[Fraction]]:
    """Of each stage: training the model alone; training it in the chain, with the forward pass of a
    predecessor that pulls it.
    """
    captions, batch = spec.data.train.captions_per_sample, spec.recipe.global_batch_size
    if convention == "paper":
        cells = [_table_g(i, stage) for i, stage in enumerate(spec.stages)]
    else:
        configs = [stage.config for stage in spec.stages]
        cells = [
            (macs.training_macs(c, captions, batch), Fraction(macs.forward_macs(c, captions)))
            for c in configs
        ]
    alone = [training for training, _ in cells]
    teacher = [Fraction(0)] + [
        forward * spec.transfer.distillation.pulls for _, forward in cells[:-1]
    ]
    return alone, [a + t for a, t in zip(alone, teacher, strict=True)]


def _table_g(index: int, stage: Stage) -> tuple[Fraction, Fraction]:
    if stage.model is None:
        raise InputError(
            f"stage {stage.name} has an inline model, which Table G does not list: use --convention"
            " analytic",
            field=f"spec.stages[{index}].modelConfig",
        )
    cells = MODELS[stage.model].paper
    return Fraction(cells.training) * 10**9, Fraction(cells.forward) * 10**9


def _samples_per_epoch(spec: ChainSpec, convention: Convention) -> int:
    samples, batch = spec.data.train.samples, spec.recipe.global_batch_size
    if convention == "paper":
        return samples
    if batch > samples:
        raise InputError(
            f"{batch} is more than data.train.samples ({samples}): an epoch would have no step",
            field="spec.recipe.globalBatchSize",
        )
    return samples // batch * batch


def _amount(samples: int, per_sample: Fraction, pool: NodePool | None, more_ms: float) -> Amount:
    hours = cost = None
    if pool is not None and pool.gpu == "A100":
        ms = A100_BASE + A100_PER_GMAC * float(per_sample) / 1e9 + more_ms
        hours = samples * ms / MS_PER_HOUR
        if pool.price is not None:
            cost = f"{Decimal(hours) * Decimal(pool.price.per_gpu_hour):.2f}"
    # Whole: the update's fraction of a step comes in whole batches, and Table G's cells have two
    # decimals.
    return Amount(macs=int(samples * per_sample), gpu_hours=hours, cost=cost)


def _sum(parts: Sequence[StagePlan | IndividualPlan]) -> Amount:
    hours = [part.gpu_hours for part in parts if part.gpu_hours is not None]
    costs = [Decimal(part.cost) for part in parts if part.cost is not None]
    return Amount(
        macs=sum(part.macs for part in parts),
        gpu_hours=sum(hours) if len(hours) == len(parts) else None,
        cost=str(sum(costs)) if len(costs) == len(parts) else None,
    )


def _digits(ratio: Fraction, rounding: str) -> str:
    """Four digits, rounded so that the ratio named is itself accepted."""
    numbers = Decimal(ratio.numerator), Decimal(ratio.denominator)
    return f"{Context(prec=4, rounding=rounding).divide(*numbers):f}"
