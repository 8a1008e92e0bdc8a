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
    end_ratio: Fraction,
) -> list[int]:
    """Whole epochs for every stage.

    The epochs of the free stages lie on a line. It falls from the second stage to the last, which
    has `end_ratio` of the second's epochs, and together with the fixed epochs it reaches `target`
    exactly. Rounded to whole epochs, at least 1, they reach 0.99 x target, never increase along the
    chain, and stay within one epoch of the line, unless that has less than one for some stage.

    Args:
        costs: the MACs of one epoch of each stage in the chain.
        individual: the MACs of training each model alone, in the same unit.
        fixed: the epochs of each stage that are given; None for the free stages, whose epochs are
            allocated. The first stage is never free.
        target: how many times fewer MACs the chain shall take than `individual`.
        baseline_epochs: the most epochs that a free stage may get.
        end_ratio: above 0 and at most 1.

    Raises:
        InputError: even one epoch for every free stage takes too many MACs for the target, or the
            target is so low that a stage would get more than `baseline_epochs`.
    """
    given, weight = _given(costs, fixed), _weights(fixed, end_ratio)
    slope = sum(weight[i] * costs[i] for i in weight)
    _check_target(target, *possible_targets(costs, individual, fixed, baseline_epochs, end_ratio))
    # The second stage's epochs for which the chain takes exactly individual / target MACs.
    second = (individual / target - given) / slope
    line = {i: second * weight[i] for i in weight}

    def reaches(epochs: Epochs) -> bool:
        spent = given + sum(e * costs[i] for i, e in epochs.items())
        return individual >= REACHED * target * spent

    epochs = _whole(line, reaches)
    return [epochs[i] if e is None else e for i, e in enumerate(fixed)]


def on_line(fixed: Sequence[int | None], second: int, end_ratio: Fraction) -> list[int]:
    """Whole epochs for every stage where there is no target: those of the line which has `second`
    epochs at the second stage, rounded.

    Unless the fixed epochs increase along the chain, those of all stages do not: a free stage gets
    at most the epochs of its predecessor, and at least those of the next fixed stage. The other
    arguments are those of `allocate`.
    """
    epochs: list[int] = []
    weight = _weights(fixed, end_ratio)
    for i, given in enumerate(fixed):
        if given is None:
            least = next((e for e in fixed[i:] if e is not None), 1)
            given = min(max(_rounded(second * weight[i]), least), epochs[-1])
        epochs.append(given)
    return epochs


def target_for(
    costs: Sequence[Fraction],
    individual: Fraction,
    fixed: Sequence[int | None],
    second: Fraction,
    end_ratio: Fraction,
) -> Fraction:
    """The target for which the line has `second` epochs at the second stage. The other arguments
    are those of `allocate`.
    """
    line = sum(second * at * costs[i] for i, at in _weights(fixed, end_ratio).items())
    return individual / (_given(costs, fixed) + line)


def possible_targets(
    costs: Sequence[Fraction],
    individual: Fraction,
    fixed: Sequence[int | None],
    baseline_epochs: int,
    end_ratio: Fraction,
) -> tuple[Fraction, Fraction]:
    """The target for which a free stage gets `baseline_epochs`, and the ratio with one epoch for
    every free stage. Without free stages both are the chain's ratio. The arguments are those of
    `allocate`.
    """
    first = next(iter(_weights(fixed, end_ratio).values()), Fraction(1))
    smallest = target_for(costs, individual, fixed, baseline_epochs / first, end_ratio)
    return smallest, individual / _given(costs, [1 if e is None else e for e in fixed])


def _given(costs: Sequence[Fraction], fixed: Sequence[int | None]) -> Fraction:
    """The MACs of the stages whose epochs are given."""
    return sum((e * c for e, c in zip(fixed, costs, strict=True) if e is not None), Fraction(0))


def _weights(fixed: Sequence[int | None], end_ratio: Fraction) -> dict[int, Fraction]:
    """By free stage, its epochs on the line over those of the second stage."""
    fall = (1 - end_ratio) / max(len(fixed) - 2, 1)
    return {i: 1 - fall * (i - 1) for i, e in enumerate(fixed) if e is None}


def _whole(line: Mapping[int, Fraction], reaches: Callable[[Epochs], bool]) -> Epochs:
    """The line's epochs rounded to whole ones, and lowered until the target is reached.

    Lowering may do more than is needed, so epochs are then given back as far as the target allows.
    """
    rounded = {i: _rounded(at) for i, at in line.items()}
    epochs = dict(rounded)
    while not reaches(epochs):
        # Take an epoch from the stage where rounding has added most. There may be none, if the
        # line has less than the one epoch that a stage needs: then the others pay for it.
        several = [i for i in line if epochs[i] > 1]
        epochs[max(several, key=lambda i: (epochs[i] - line[i], i))] -= 1

    def can_give_back(i: int) -> bool:
        more = epochs | {i: epochs[i] + 1}
        falling = all(more[a] >= more[b] for a, b in pairwise(line))
        return epochs[i] < rounded[i] and falling and reaches(more)

    while takers := [i for i in line if can_give_back(i)]:
        epochs[max(takers, key=lambda i: line[i] - epochs[i])] += 1
    return epochs


def _rounded(epochs: Fraction) -> int:
    return max(1, floor(epochs + Fraction(1, 2)))


def _check_target(target: Fraction, smallest: Fraction, largest: Fraction) -> None:
    field = "spec.allocation.targetAcceleration"
    low, high = digits(smallest, ROUND_CEILING), digits(largest, ROUND_FLOOR)
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


def digits(ratio: Fraction, rounding: str) -> str:
    """Four digits of a limit, rounded to the side on which the printed ratio is accepted."""
    numbers = Decimal(ratio.numerator), Decimal(ratio.denominator)
    return f"{Context(prec=4, rounding=rounding).divide(*numbers):f}"
