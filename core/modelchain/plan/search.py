"""Which models a chain could have, and what each choice would cost in MACs.

Rule 1 of the paper (section 3.1.2) chooses the smallest model, and rule 2 those in between. Both
weigh cost against accuracy. MACs can be counted beforehand, so this is what the search does: it
lays out every chain that rule 2 allows, with epochs by rule 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR
from fractions import Fraction
from itertools import groupby, pairwise
from math import floor

from modelchain.api.modelconfig import ModelConfig
from modelchain.api.spec import ChainSpec, ModelChain, Stage, WrittenModel
from modelchain.api.zoo import MODELS
from modelchain.errors import InputError
from modelchain.plan.allocate import REACHED, allocate, digits, on_line, possible_targets
from modelchain.plan.check import mismatch
from modelchain.plan.expansion import follows_rule_2, size
from modelchain.plan.macs import parameters
from modelchain.plan.plan import (
    Convention,
    ModelMacs,
    macs_per_sample,
    model_macs,
    samples_per_epoch,
)

MOST_MODELS = 11
# Epochs of the second model over `baselineEpochs`: 24 / 128, in both of the paper's chains on CC3M.
SECOND = Fraction(3, 16)
TARGET = "spec.allocation.targetAcceleration"
CANNOT_KNOW = (
    "The search counts MACs. It cannot know whether a chain loses accuracy on your data. A gate"
    " finds out: with `spec.gate` each stage is compared with the same model trained alone, and a"
    " stage that misses stops the chain or trains for more epochs."
)


class Design(WrittenModel):
    """A chain that the search has weighed."""

    # Smallest first. A model of Table G has its name, an inline one that of its stage.
    models: list[str]
    epochs: list[int]
    macs: int
    # The MACs of training each model alone, divided by those of the chain.
    acceleration: float
    # The MACs of the chain, divided by those of training its largest model alone.
    of_largest_alone: float


class Search(WrittenModel):
    """What `plan --search` has found."""

    chain: str
    convention: Convention
    # The models that a design may have, smallest first. The last is in every design.
    models: list[str]
    largest_alone_macs: int
    # How epochs were allocated: for this target, or else so that the second model gets these.
    target_acceleration: str | None
    second_epochs: int | None
    end_ratio: str
    # How many designs were compared, and those that are left, by smallest model and by MACs.
    compared: int
    frontier: list[Design]
    # The design of the chain's file, if it ends in the same model.
    file: Design | None
    cannot_know: str = CANNOT_KNOW

    def to_json(self) -> str:
        """What `plan --search -o json` prints."""
        return self.model_dump_json(by_alias=True, indent=2)


@dataclass(frozen=True)
class _Model:
    name: str
    config: ModelConfig
    macs: ModelMacs


@dataclass(frozen=True)
class _Premise:
    """What the search takes as given for every design."""

    spec: ChainSpec
    samples: int
    # The epochs in the chain's file, by a model and its predecessor.
    given: Mapping[tuple[str | None, str], int]
    target: Fraction | None
    second: int


Chain = tuple[_Model, ...]


def search(
    chain: ModelChain, convention: Convention, largest: str | None, keep: Sequence[str]
) -> Search:
    """Every chain that ends in one model, and of these the ones worth choosing from.

    Args:
        chain: the data, the recipe and the inline models that a design may have. Where a model
            follows the same one as in this chain, it keeps the epochs that are given.
        convention: how MACs are counted.
        largest: the model in which every design ends. Default: the chain's last.
        keep: models that every design must have.

    Raises:
        InputError: a name is not known, a model does not fit, or no design is possible.
    """
    spec = chain.spec
    names = [name_of(stage) for stage in spec.stages]
    models = _models(spec, convention, largest or names[-1], keep)
    premise = _premise(spec, convention)
    designs = _designs(premise, models, keep)
    by_name = {model.name: model for model in models}
    same_end = names[-1] == models[-1].name and by_name.keys() >= set(names)
    return Search(
        chain=chain.metadata.name,
        convention=convention,
        models=list(by_name),
        largest_alone_macs=_alone(premise, models[-1]),
        target_acceleration=spec.allocation.target_acceleration,
        second_epochs=premise.second if premise.target is None else None,
        end_ratio=spec.allocation.end_ratio,
        compared=len(designs),
        frontier=_frontier(designs, list(by_name), by_second=premise.target is not None),
        file=_weigh(premise, tuple(by_name[name] for name in names)) if same_end else None,
    )


def name_of(stage: Stage) -> str:
    """The name of a stage's model in the search."""
    same = (name for name, model in MODELS.items() if model.config == stage.config)
    return stage.model or next(same, stage.name)


def _models(
    spec: ChainSpec, convention: Convention, largest: str, keep: Sequence[str]
) -> list[_Model]:
    """The models that a design may have, smallest first."""
    known = _known(spec)
    _check_names(known, largest, keep)
    end = known[largest].config
    found = {n: s for n, s in known.items() if n == largest or not mismatch(s.config, end)}
    if len(found) > MOST_MODELS:
        raise InputError(
            f"{len(found)} models can be in a chain up to {largest}, and the search takes at most"
            f" {MOST_MODELS}: leave out some stages that have a modelConfig",
            field="spec.stages",
        )
    places = {stage.name: index for index, stage in enumerate(spec.stages)}
    models = [
        _Model(name, stage.config, model_macs(spec, places.get(stage.name, 0), stage, convention))
        for name, stage in found.items()
    ]
    return sorted(models, key=lambda m: (m.name == largest, size(m.config), parameters(m.config)))


def _known(spec: ChainSpec) -> dict[str, Stage]:
    """By the model's name, a stage for each model of Table G and each inline one."""
    stages = {name_of(stage): stage for stage in spec.stages}
    return stages | {name: Stage(name=name.lower(), model=name) for name in MODELS}


def _check_names(known: Mapping[str, Stage], largest: str, keep: Sequence[str]) -> None:
    for option, name in [("--largest", largest), *(("--keep", name) for name in keep)]:
        if name not in known:
            raise InputError(f"{option} {name}: no such model; there are {', '.join(known)}")
    for name in keep:
        why = mismatch(known[name].config, known[largest].config)
        if why and name != largest:
            raise InputError(f"--keep {name}: {largest} cannot be grown from it: {'; '.join(why)}")


def _premise(spec: ChainSpec, convention: Convention) -> _Premise:
    target = spec.allocation.target_acceleration
    names: list[str | None] = [None, *map(name_of, spec.stages)]
    return _Premise(
        spec,
        samples_per_epoch(spec, convention),
        {
            (predecessor, name_of(stage)): stage.epochs
            for predecessor, stage in zip(names, spec.stages, strict=False)
            if stage.epochs is not None
        },
        None if target is None else Fraction(target),
        _second_epochs(spec),
    )


def _second_epochs(spec: ChainSpec) -> int:
    """Epochs of the second model where no target is given."""
    baseline = spec.recipe.baseline_epochs
    given = spec.stages[1].epochs if len(spec.stages) > 1 else None
    return min(baseline, given or max(1, floor(SECOND * baseline + Fraction(1, 2))))


def _designs(premise: _Premise, models: Sequence[_Model], keep: Sequence[str]) -> list[Design]:
    """Every design that has the models to keep and reaches the target, if there is one."""
    chains = [c for c in _chains(models) if {model.name for model in c}.issuperset(keep)]
    if not chains:
        raise InputError(
            f"--keep {','.join(keep)}: no chain with these models grows 2 to 4 times from model to"
            f" model up to {models[-1].name}; give a model in between as a stage with a modelConfig"
        )
    least = float((premise.target or 0) * REACHED)
    weighed = [(c, design) for c in chains if (design := _weigh(premise, c)) is not None]
    reaching = [(c, design) for c, design in weighed if design.acceleration >= least]
    if not reaching:
        raise InputError(_impossible(premise, chains), field=TARGET)
    designs = [design for c, design in reaching if not _rises(premise, c, design.epochs)]
    if not designs:
        raise InputError(_increasing(premise, chains), field=TARGET)
    return designs


def _rises(premise: _Premise, models: Chain, epochs: Sequence[int]) -> bool:
    """Whether epochs increase along the chain, although those of the file do not."""
    given = [e for e in _question(premise, models)[2] if e is not None]
    return not _falls(epochs) and _falls(given)


def _falls(epochs: Sequence[int]) -> bool:
    return all(before >= after for before, after in pairwise(epochs))


def _chains(models: Sequence[_Model]) -> Iterator[Chain]:
    """Every chain of these models up to the last, in which each follows rule 2."""
    before = {
        after.name: [
            model
            for model in models
            if not mismatch(model.config, after.config)
            and follows_rule_2(model.config, after.config)
        ]
        for after in models
    }

    def ending_in(model: _Model) -> Iterator[Chain]:
        yield (model,)
        for predecessor in before[model.name]:
            for chain in ending_in(predecessor):
                yield (*chain, model)

    return ending_in(models[-1])


def _weigh(premise: _Premise, models: Chain) -> Design | None:
    """The design of these models, or None if no epochs can be allocated."""
    costs, individual, fixed = _question(premise, models)
    try:
        epochs = _epochs(premise, costs, individual, fixed)
    except InputError:
        return None
    spent = sum(e * cost for e, cost in zip(epochs, costs, strict=True))
    macs = int(premise.samples * spent)
    return Design(
        models=[model.name for model in models],
        epochs=epochs,
        macs=macs,
        acceleration=float(individual / spent),
        of_largest_alone=macs / _alone(premise, models[-1]),
    )


def _question(
    premise: _Premise, models: Chain
) -> tuple[list[Fraction], Fraction, list[int | None]]:
    """The first three arguments of `allocate`."""
    baseline = premise.spec.recipe.baseline_epochs
    per_sample = macs_per_sample(premise.spec, [model.macs for model in models])
    names = [model.name for model in models]
    fixed = [premise.given.get((None, names[0]), baseline)]
    return (
        [stage.chained for stage in per_sample],
        baseline * sum((stage.alone for stage in per_sample), Fraction(0)),
        [*fixed, *(premise.given.get(pair) for pair in pairwise(names))],
    )


def _epochs(
    premise: _Premise,
    costs: Sequence[Fraction],
    individual: Fraction,
    fixed: Sequence[int | None],
) -> list[int]:
    if None not in fixed:
        return [e for e in fixed if e is not None]
    end_ratio = Fraction(premise.spec.allocation.end_ratio)
    if premise.target is None:
        return on_line(fixed, fixed[1] or premise.second, end_ratio)
    baseline = premise.spec.recipe.baseline_epochs
    return allocate(costs, individual, fixed, premise.target, baseline, end_ratio)


def _alone(premise: _Premise, model: _Model) -> int:
    """The MACs of training this model alone."""
    return int(premise.samples * premise.spec.recipe.baseline_epochs * model.macs.training)


def _impossible(premise: _Premise, chains: Sequence[Chain]) -> str:
    """Why no design reaches the target, and the targets that designs can reach."""
    baseline = premise.spec.recipe.baseline_epochs
    end_ratio = Fraction(premise.spec.allocation.end_ratio)
    limits = [possible_targets(*_question(premise, chain), baseline, end_ratio) for chain in chains]
    smallest, largest = min(low for low, _ in limits), max(high for _, high in limits)
    target, end = premise.spec.allocation.target_acceleration, chains[0][-1].name
    if largest < 1:  # and no spec may ask for less than 1
        return (
            f"no chain up to {end} can take fewer MACs than training each model alone; leave out"
            " the target"
        )
    low, high = digits(max(smallest, Fraction(1)), ROUND_CEILING), digits(largest, ROUND_FLOOR)
    return f"no chain up to {end} can reach {target}; give a target from {low} to {high}"


def _increasing(premise: _Premise, chains: Sequence[Chain]) -> str:
    target, end = premise.spec.allocation.target_acceleration, chains[0][-1].name
    return (
        f"no chain up to {end} reaches {target} without more epochs for a model than for the one"
        " before it; leave the epochs of more stages to the plan"
    )


def _frontier(designs: Sequence[Design], models: Sequence[str], by_second: bool) -> list[Design]:
    """For each smallest model the designs that no other one dominates, by MACs.

    A design dominates another if it takes no more MACs and accelerates no less. With a target all
    designs accelerate alike. Then it has to give its second model no fewer epochs, since that is
    what the first pair is tested with.
    """

    def gain(design: Design) -> float:
        return design.epochs[:2][-1] if by_second else design.acceleration

    order = sorted(designs, key=lambda d: (models.index(d.models[0]), d.macs, -gain(d)))
    found: list[Design] = []
    for _, group in groupby(order, key=lambda design: design.models[0]):
        best = 0.0
        for design in group:
            if gain(design) > best:
                found.append(design)
                best = gain(design)
    return found
