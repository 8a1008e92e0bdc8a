"""Allocates epochs to the stages that give none, from a target acceleration.

This is rule 3 of the paper (section 3.1.2). Where the rule is not exact, the choices are ours. The
rule also has the first pair of stages tried, and lowers the target if that loses accuracy. We do
not try it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from itertools import pairwise
from math import floor

from modelchain.errors import InputError

# Epochs of the last stage over those of the second: 15 / 24, from the paper's ViT chain on CC3M.
# The paper's rule names no ratio, and its other chains have 12 / 24 and 15 / 21.
END_RATIO = Fraction(5, 8)
# Whole epochs must reach this part of the target.
REACHED = Fraction(99, 100)

# By the stage's place in the chain.
Epochs = dict[int, int]


def allocate(  # long: its contract takes half of it
    costs: Sequence[Fraction],
    individual: Fraction,
    fixed: Sequence[int | None],
    target: Fraction,
    baseline_epochs: int,
) -> list[int]:
    """Whole epochs for every stage.

    The epochs of the free stages lie on a line. It falls from the second stage to the last, which
    has 0.625 of the second's epochs, and together with the fixed epochs it reaches `target`
    exactly. Rounded to whole epochs, at least 1, they reach 0.99 x target, never increase along the
    chain, and stay within one epoch of the line.

    Args:
        costs: the MACs of one epoch of each stage in the chain.
        individual: the MACs of training each model alone, in the same unit.
        fixed: the epochs of each stage that are given; None for the free stages, whose epochs are
            allocated. The first stage is never free.
        target: how many times fewer MACs the chain shall take than `individual`.
        baseline_epochs: the most epochs that a free stage may get.

    Raises:
        InputError: even one epoch for every free stage takes too many MACs for the target, or the
            target is so low that a stage would get more than `baseline_epochs`.
    """
    free = [i for i, e in enumerate(fixed) if e is None]
    given = sum((e * c for e, c in zip(fixed, costs, strict=True) if e is not None), Fraction(0))
    fall = (1 - END_RATIO) / max(len(costs) - 2, 1)
    weight = {i: 1 - fall * (i - 1) for i in free}
    # The MACs of all free stages for each epoch of the second stage.
    slope = sum(weight[i] * costs[i] for i in free)
    _check_target(
        target,
        smallest=individual / (given + baseline_epochs / weight[free[0]] * slope),
        largest=individual / (given + sum(costs[i] for i in free)),
    )
    # The second stage's epochs for which the chain takes exactly individual / target MACs.
    second = (individual / target - given) / slope
    line = {i: second * weight[i] for i in free}

    def reaches(epochs: Epochs) -> bool:
        spent = given + sum(e * costs[i] for i, e in epochs.items())
        return individual >= REACHED * target * spent

    epochs = _whole(line, reaches)
    return [epochs[i] if e is None else e for i, e in enumerate(fixed)]


def _whole(line: Mapping[int, Fraction], reaches: Callable[[Epochs], bool]) -> Epochs:
    """The line's epochs rounded to whole ones, and lowered until the target is reached.

    Lowering may do more than is needed, so epochs are then given back as far as the target allows.
    """
    rounded = {i: max(1, floor(at + Fraction(1, 2))) for i, at in line.items()}
    epochs = dict(rounded)
    while not reaches(epochs):
        # Take an epoch from the stage where rounding has added most.
        above = [i for i in line if epochs[i] > line[i] and epochs[i] > 1]
        epochs[max(above, key=lambda i: (epochs[i] - line[i], i))] -= 1

    def can_give_back(i: int) -> bool:
        more = epochs | {i: epochs[i] + 1}
        falling = all(more[a] >= more[b] for a, b in pairwise(line))
        return epochs[i] < rounded[i] and falling and reaches(more)

    while takers := [i for i in line if can_give_back(i)]:
        epochs[max(takers, key=lambda i: line[i] - epochs[i])] += 1
    return epochs


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


def _digits(ratio: Fraction, rounding: str) -> str:
    """Four digits of a limit, rounded to the side on which the printed ratio is accepted."""
    numbers = Decimal(ratio.numerator), Decimal(ratio.denominator)
    return f"{Context(prec=4, rounding=rounding).divide(*numbers):f}"
