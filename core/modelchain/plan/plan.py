"""The plan of a chain: what it will cost, compared with training each model alone.

The costs are epochs, samples, MACs, GPU hours and money. There are two conventions to count MACs.
`analytic` counts what the trainer will do, as the ledger does: with `modelchain.plan.macs`, in
whole batches, with the spec's captions. `paper` takes the MACs that Table G prints, and counts
every sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from modelchain.api import messages
from modelchain.api.spec import ChainSpec, ModelChain, Stage, WrittenModel
from modelchain.api.status import Capacity
from modelchain.api.zoo import MODELS
from modelchain.errors import InputError
from modelchain.plan.allocate import allocate
from modelchain.plan.macs import forward_macs, training_macs
from modelchain.plan.pools import NodePool
from modelchain.plan.prices import Price, kept, total_cost
from modelchain.plan.unknown import why_no_hours, why_no_pool

Convention = Literal["analytic", "paper"]

# Milliseconds for one sample on one A100. These three and Swin's A100_MS are fitted to the 21
# different GPU hours of the paper's Table 2. For ViT-B in the chain on CC3M, 56 is used: the table
# prints 54, but its sums need 56. Compared with the printed hours, the mean error is 3.76 %, and
# the largest 10.2 %.
A100_BASE = 1.301071
A100_PER_GMAC = 0.02061039
A100_TEACHER = 0.468171
MS_PER_HOUR = 3_600_000
# A moment after every price has begun to hold.
NEWEST = 10**18


class Amount(WrittenModel):
    """MACs, hours of one GPU, and money. None means that it is not known."""

    macs: int
    gpu_hours: float | None
    # A decimal, in the pool's currency.
    cost: str | None


class IndividualPlan(WrittenModel):
    """The same model trained alone for `baselineEpochs`, without a teacher."""

    epochs: int
    macs: int
    gpu_hours: float | None
    cost: str | None


class StagePlan(WrittenModel):
    """The plan of one stage."""

    name: str
    model: str
    epochs: int
    samples: int
    # The MACs of the student's training and, with distillation, of the teacher's forward pass.
    macs_per_sample: int | float
    macs: int
    gpu_hours: float | None
    cost: str | None
    individual: IndividualPlan


class BaselinePlan(WrittenModel):
    """What the gate trains alone, beside the chain: the `individual` of the stage of this name."""

    name: str
    epochs: int
    macs: int
    gpu_hours: float | None
    cost: str | None


class Plan(WrittenModel):
    """The plan of a chain."""

    chain: str
    convention: Convention
    stages: list[StagePlan]
    # The sum over the stages, and the sum over the same models trained alone.
    total: Amount
    individual: Amount
    # The MACs of training each model alone, divided by those of the chain.
    acceleration: float
    # Part of neither sum.
    baselines: list[BaselinePlan]

    def to_json(self) -> str:
        """What `plan -o json` prints."""
        return self.model_dump_json(by_alias=True, indent=2)


def plan(
    chain: ModelChain,
    convention: Convention,
    pools: Mapping[str, NodePool],
    frozen: Mapping[str, int] | None = None,
    now: int = NEWEST,
) -> Plan:
    """The plan of a checked chain.

    Args:
        chain: the chain.
        convention: how MACs are counted.
        pools: the node pools that are known, by name.
        frozen: by stage, the epochs that it was launched with. They are used where the spec gives
            none.
        now: the moment whose prices count, in milliseconds since the epoch.

    Raises:
        InputError: the convention has no numbers for a model, or the target acceleration cannot be
            reached.
    """
    spec = chain.spec
    models = [model_macs(spec, i, stage, convention) for i, stage in enumerate(spec.stages)]
    per_sample = macs_per_sample(spec, models)
    epochs = _epochs(spec, per_sample, frozen or {})
    samples, hour = samples_per_epoch(spec, convention), _hour(spec, pools, now)
    stages = [
        _stage_plan(spec, index, epochs[index], samples, macs, hour)
        for index, macs in enumerate(per_sample)
    ]
    total, individually = summed(stages), summed([stage.individual for stage in stages])
    return Plan(
        chain=chain.metadata.name,
        convention=convention,
        stages=stages,
        total=total,
        individual=individually,
        acceleration=individually.macs / total.macs,
        baselines=_baselines(spec, stages),
    )


def _baselines(spec: ChainSpec, stages: Sequence[StagePlan]) -> list[BaselinePlan]:
    trained = spec.gate.train if spec.gate else []
    return [
        BaselinePlan(name=stage.name, **dict(stage.individual))
        for stage in stages
        if stage.name in trained
    ]


@dataclass(frozen=True)
class ModelMacs:
    """The MACs of a model for one sample."""

    # Training the model alone: forward pass, backward pass and update.
    training: Fraction
    forward: Fraction


@dataclass(frozen=True)
class _Hour:
    """What is known of an hour of the pool's GPU."""

    # How many samples it trains on; that is only fitted to A100.
    known: bool
    price: str | None


def _hour(spec: ChainSpec, pools: Mapping[str, NodePool], now: int) -> _Hour:
    price = price_of(spec, pools, now)
    return _Hour(
        known=why_no_hours(spec.runner, pools) is None,
        price=price[0].per_gpu_hour if price else None,
    )


def price_of(
    spec: ChainSpec, pools: Mapping[str, NodePool], now: int
) -> tuple[Price, Capacity | None] | None:
    """The price by which the chain's hours are planned, and the capacity that it is for; None if
    there is none. The arguments are those of `plan`.
    """
    if why_no_pool(spec.runner, pools) is not None:
        return None
    return pools[spec.runner.node_pool or ""].price_list.planned(now)


@dataclass(frozen=True)
class PerSample:
    """The MACs of training on one sample."""

    # If the model is trained alone.
    alone: Fraction
    # As a stage of the chain: with the forward pass of the teacher, if there is one.
    chained: Fraction


def _stage_plan(
    spec: ChainSpec,
    index: int,
    epochs: int,
    samples: int,
    per_sample: PerSample,
    hour: _Hour,
) -> StagePlan:
    """The plan of one stage, which has `samples` samples in each epoch."""
    stage, baseline = spec.stages[index], spec.recipe.baseline_epochs
    extra_ms = stage.config.vision_cfg.family.A100_MS
    individual = _amount(baseline * samples, per_sample.alone, hour, extra_ms)
    if index > 0 and spec.transfer.distillation.pulls:
        extra_ms += A100_TEACHER
    own = _amount(epochs * samples, per_sample.chained, hour, extra_ms)
    macs = per_sample.chained
    return StagePlan(
        name=stage.name,
        model=stage.model or "inline",
        epochs=epochs,
        samples=epochs * samples,
        macs_per_sample=macs.numerator if macs.denominator == 1 else float(macs),
        individual=IndividualPlan(epochs=baseline, **dict(individual)),
        **dict(own),
    )


def _epochs(
    spec: ChainSpec, per_sample: Sequence[PerSample], frozen: Mapping[str, int]
) -> list[int]:
    """The epochs of each stage.

    They are given in the spec, or else those of an earlier launch. If there are neither, the first
    stage gets baselineEpochs, and the others are allocated.
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
            messages.NO_EPOCHS.format(stage=missing), field="spec.allocation.targetAcceleration"
        )
    # All stages have the same number of samples in an epoch, so the allocation may compare the MACs
    # of one sample.
    chained = [stage.chained for stage in per_sample]
    individual = baseline * sum((stage.alone for stage in per_sample), Fraction(0))
    end_ratio = Fraction(spec.allocation.end_ratio)
    return allocate(chained, individual, fixed, Fraction(text), baseline, end_ratio)


def macs_per_sample(spec: ChainSpec, models: Sequence[ModelMacs]) -> list[PerSample]:
    """What each stage of a chain of these models costs. A successor pays for the forward pass of
    its predecessor, if that is its teacher.
    """
    pulls = spec.transfer.distillation.pulls
    teachers = [Fraction(0), *(model.forward * pulls for model in models[:-1])]
    return [
        PerSample(model.training, model.training + teacher)
        for model, teacher in zip(models, teachers, strict=True)
    ]


def model_macs(spec: ChainSpec, index: int, stage: Stage, convention: Convention) -> ModelMacs:
    """The MACs of the model of a stage, which is the stage of this index in the spec.

    Raises:
        InputError: the model is inline, and the convention has only those of Table G.
    """
    if convention == "paper":
        return _table_g(index, stage)
    captions, batch = spec.data.train.captions_per_sample, spec.recipe.global_batch_size
    training = training_macs(stage.config, captions, batch)
    return ModelMacs(training, Fraction(forward_macs(stage.config, captions)))


def _table_g(index: int, stage: Stage) -> ModelMacs:
    """The MACs as Table G prints them. Raises InputError for an inline model."""
    if stage.model is None:
        raise InputError(
            f"stage {stage.name} has an inline model, which Table G does not list: use --convention"
            " analytic",
            field=f"spec.stages[{index}].modelConfig",
        )
    cells = MODELS[stage.model].paper
    return ModelMacs(Fraction(cells.training) * 10**9, Fraction(cells.forward) * 10**9)


def samples_per_epoch(spec: ChainSpec, convention: Convention) -> int:
    """The samples that a stage sees in one epoch."""
    samples, batch = spec.data.train.samples, spec.recipe.global_batch_size
    if convention == "paper":
        return samples
    if batch > samples:
        raise InputError(
            f"{batch} is more than data.train.samples ({samples}): an epoch would have no step",
            field="spec.recipe.globalBatchSize",
        )
    return samples // batch * batch


def _amount(samples: int, per_sample: Fraction, hour: _Hour, extra_ms: float) -> Amount:
    hours = cost = None
    if hour.known:
        ms = A100_BASE + A100_PER_GMAC * float(per_sample) / 1e9 + extra_ms
        hours = samples * ms / MS_PER_HOUR
        if hour.price is not None:
            cost = kept(Decimal(hours) * Decimal(hour.price))
    # `int` cuts nothing off. With `analytic`, a sample's part of an update is a fraction of a
    # batch, and samples come in whole batches. With `paper`, Table G's cells have two decimals.
    return Amount(macs=int(samples * per_sample), gpu_hours=hours, cost=cost)


def summed(parts: Sequence[StagePlan | IndividualPlan | BaselinePlan]) -> Amount:
    """The sum. Hours or money that are not known of one part are not known of all."""
    hours = [part.gpu_hours for part in parts if part.gpu_hours is not None]
    costs = [part.cost for part in parts if part.cost is not None]
    return Amount(
        macs=sum(part.macs for part in parts),
        gpu_hours=sum(hours) if len(hours) == len(parts) else None,
        cost=total_cost(costs) if len(costs) == len(parts) else None,
    )
