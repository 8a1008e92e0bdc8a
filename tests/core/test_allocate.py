"""Epochs by the paper's rule 3, rounded to whole epochs: properties for any chain and target, and
the epochs for the paper's three targets.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import floor

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from modelchain.api.zoo import MODELS
from modelchain.errors import InputError
from modelchain.plan.allocate import allocate, target_for

FIELD = "spec.allocation.targetAcceleration"
Chain = tuple[list[Fraction], Fraction, list[int | None], int]
DEFAULT = Fraction(5, 8)  # endRatio


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """The cost of an epoch of each stage, the cost of training all models alone, the given epochs
    (None: to be allocated) and the baseline epochs. At least one stage has free epochs.
    """
    count = draw(st.integers(2, 9))
    baseline = draw(st.integers(1, 300))
    alone = [
        Fraction(n) for n in draw(st.lists(st.integers(1, 10**6), min_size=count, max_size=count))
    ]
    teacher = [Fraction(0)] + [cost / 3 for cost in alone[:-1]]
    fixed: list[int | None] = [draw(st.integers(1, 300))]
    fixed += draw(
        st.lists(
            st.none() | st.none() | st.integers(1, 300), min_size=count - 1, max_size=count - 1
        )
    )
    assume(None in fixed)
    return (
        [a + t for a, t in zip(alone, teacher, strict=True)],
        baseline * sum(alone),
        fixed,
        baseline,
    )


# Targets as parts of the largest possible ratio. Up to 1/0.99 of it a target can be reached.
parts = st.fractions(min_value=Fraction(1, 20), max_value=Fraction(21, 20), max_denominator=1000)
end_ratios = st.just(DEFAULT) | st.fractions(Fraction(1, 100), 1, max_denominator=1000)


def _spent(costs: list[Fraction], epochs: list[int]) -> Fraction:
    return sum((e * c for e, c in zip(epochs, costs, strict=True)), Fraction(0))


def _free(fixed: list[int | None]) -> list[int]:
    return [i for i, e in enumerate(fixed) if e is None]


def _largest(costs: list[Fraction], individual: Fraction, fixed: list[int | None]) -> Fraction:
    return individual / _spent(costs, [1 if e is None else e for e in fixed])


def _line(
    costs: list[Fraction],
    individual: Fraction,
    fixed: list[int | None],
    target: Fraction,
    end_ratio: Fraction,
) -> dict[int, Fraction]:
    """The line of docs/plan.md, written without the implementation: epochs fall linearly from the
    second stage to `end_ratio` of its epochs at the last stage.
    """
    n = len(costs)
    weights = {
        p: Fraction(1) if n == 2 else 1 - (1 - end_ratio) * Fraction(p - 2, n - 2)
        for p in range(2, n + 1)
    }
    left = individual / target - _spent(costs, [e or 0 for e in fixed])
    second = left / sum(weights[i + 1] * costs[i] for i in _free(fixed))
    return {i: second * weights[i + 1] for i in _free(fixed)}


@settings(max_examples=400)
@given(chains(), parts, end_ratios)
def test_allocation(chain: Chain, part: Fraction, end_ratio: Fraction) -> None:
    costs, individual, fixed, baseline = chain
    target = part * _largest(costs, individual, fixed)
    needed = Fraction(99, 100) * target
    line = _line(costs, individual, fixed, target, end_ratio)
    free = _free(fixed)
    impossible = needed > _largest(costs, individual, fixed)
    too_low = line[free[0]] > baseline
    try:
        epochs = allocate(costs, individual, fixed, target, baseline, end_ratio)
    except InputError as error:
        assert error.problems[0].field == FIELD
        assert impossible or too_low
        return
    assert not impossible and not too_low

    def ratio(epochs: list[int]) -> Fraction:
        return individual / _spent(costs, epochs)

    assert all(isinstance(e, int) and e >= 1 for e in epochs)
    assert all(given in (None, e) for given, e in zip(fixed, epochs, strict=True))
    assert ratio(epochs) >= needed
    assert all(epochs[a] >= epochs[b] for a, b in pairwise(free))
    # Where the given stages push the line below 0, one epoch is the minimum. A steep line may have
    # less than one epoch at its end and many before it; then these pay for the one.
    if end_ratio >= Fraction(1, 2) or min(line.values()) >= 1:
        assert all(abs(epochs[i] - max(line[i], Fraction(0))) <= 1 for i in free)
    for i in free:
        rounded = max(1, floor(line[i] + Fraction(1, 2)))
        assert epochs[i] <= rounded
        if epochs[i] < rounded:
            more = [e + (j == i) for j, e in enumerate(epochs)]
            assert ratio(more) < needed or any(more[a] < more[b] for a, b in pairwise(free))
    if (
        ratio(
            [
                max(1, floor(line[i] + Fraction(1, 2))) if i in line else e
                for i, e in enumerate(epochs)
            ]
        )
        >= needed
    ):
        assert all(epochs[i] == max(1, floor(line[i] + Fraction(1, 2))) for i in free)


def _refusal(chain: Chain, target: Fraction) -> str | None:
    costs, individual, fixed, baseline = chain
    try:
        allocate(costs, individual, fixed, target, baseline, DEFAULT)
    except InputError as error:
        return str(error)
    return None


def _named(message: str) -> Fraction:
    """The ratio that a refusal offers, which is the second number in its message."""
    return Fraction([word for word in message.split() if word[0].isdigit()][1])


@given(chains(), st.integers(1, 300), end_ratios)
def test_the_target_for_a_line_is_that_lines(
    chain: Chain, second: int, end_ratio: Fraction
) -> None:
    costs, individual, fixed, _ = chain
    target = target_for(costs, individual, fixed, Fraction(second), end_ratio)
    weights = _line(costs, individual, fixed, target, end_ratio)
    if 1 in weights:
        assert weights[1] == second
    if fixed[-1] is None:
        assert weights[len(fixed) - 1] == second * (1 if len(fixed) == 2 else end_ratio)


@given(chains())
def test_the_ratio_that_a_refusal_names_is_accepted(chain: Chain) -> None:
    too_high, too_low = _refusal(chain, Fraction(10**9)), _refusal(chain, Fraction(1, 10**9))
    assert too_high is not None and too_low is not None
    if "give every stage its epochs" in too_low:
        return  # with so few baseline epochs no target fits
    assert "largest" in too_high and "smallest" in too_low
    assert _refusal(chain, _named(too_low)) is None
    # Where the free stages hardly cost anything, rounding to four digits can make the largest ratio
    # smaller than the smallest.
    assert _named(too_high) < _named(too_low) or _refusal(chain, _named(too_high)) is None


def _paper(names: str, baseline: int) -> tuple[list[Fraction], Fraction]:
    cells = [MODELS[name].paper for name in names.split()]
    alone = [Fraction(cell.training) for cell in cells]
    teacher = [Fraction(0)] + [Fraction(cell.forward) for cell in cells[:-1]]
    return [a + t for a, t in zip(alone, teacher, strict=True)], baseline * sum(alone)


VIT4 = "ViT-T-16 ViT-S-16 ViT-B-16 ViT-L-16"
VIT7 = "ViT-T-16 ViT-C-16 ViT-S-16 ViT-M-16 ViT-B-16 ViT-XB-16 ViT-L-16"
MERGED = "ViT-S-16 ViT-M-16 ViT-B-16 ViT-L-16"
SWIN = "Swin-T Swin-S Swin-B Swin-L"


@pytest.mark.parametrize(
    ("names", "baseline", "target", "end_ratio", "epochs"),
    [
        # facts.json, rule3: 128/23/19/15 gives 5.614, below 0.99 x 5.68. The last stage was rounded
        # up most, so it loses an epoch.
        (VIT4, 128, "5.68", DEFAULT, [128, 23, 19, 14]),
        # 64/23/18/14 gives 2.849 at once.
        (MERGED, 64, "2.84", DEFAULT, [64, 23, 18, 14]),
        # 128/20/17/13 gives 5.1671, just below 0.99 x 5.22 = 5.1678. The third stage was rounded up
        # most, so it loses an epoch.
        (SWIN, 128, "5.22", DEFAULT, [128, 20, 16, 13]),
        # With the ratio of each chain's own schedule (21, 17, 15 and 24, 16, 12 epochs) the lines
        # come nearer to it: 20.67, 17.72, 14.76, of which the second stage loses an epoch, and
        # 23.2, 17.4, 11.6.
        (MERGED, 64, "2.84", Fraction(15, 21), [64, 20, 18, 15]),
        (SWIN, 128, "5.22", Fraction(12, 24), [128, 23, 17, 12]),
        # On CC3M the paper's chain of seven lies on a line that its target gives exactly.
        (VIT7, 128, "7.09", Fraction(9, 24), [128, 24, 21, 18, 15, 12, 9]),
    ],
)
def test_the_epochs_for_the_papers_targets(
    names: str, baseline: int, target: str, end_ratio: Fraction, epochs: list[int]
) -> None:
    costs, individual = _paper(names, baseline)
    fixed = [baseline, *[None] * (len(costs) - 1)]
    assert allocate(costs, individual, fixed, Fraction(target), baseline, end_ratio) == epochs


def test_an_impossible_target_names_the_largest_ratio_rounded_down() -> None:
    costs, individual = _paper(VIT4, 128)
    # 128 x 473.6 / (128 x 17.57 + 49.47 + 120.71 + 341.2) = 21.9614
    with pytest.raises(InputError, match=r"21\.96 times cheaper") as error:
        allocate(costs, individual, [128, None, None, None], Fraction(23), 128, DEFAULT)
    assert error.value.problems[0].field == FIELD


def test_a_target_too_low_names_the_smallest_ratio() -> None:
    costs, individual = _paper(VIT4, 128)
    with pytest.raises(InputError, match="smallest sensible") as error:
        allocate(costs, individual, [128, None, None, None], Fraction(1), 128, DEFAULT)
    smallest = Fraction(str(error.value).split()[-1])
    assert allocate(costs, individual, [128, None, None, None], smallest, 128, DEFAULT)[1] <= 128


def test_the_second_of_two_stages_gets_the_rest_of_the_budget() -> None:
    # Training both alone costs 100 x (1 + 4) = 500. The chain may cost 500 / 2.5 = 200, of which
    # the first stage takes 100: the second gets (200 - 100) / 5 = 20 epochs.
    assert allocate(
        [Fraction(1), Fraction(5)], Fraction(500), [100, None], Fraction(5, 2), 100, DEFAULT
    ) == [100, 20]


def test_a_steep_line_that_ends_below_one_epoch_still_reaches_the_target() -> None:
    # The line gives 2 and 0.2 epochs. The second of these needs one, so the first gives one up.
    costs = [Fraction(cost) for cost in (1, 10, 10)]
    assert allocate(costs, Fraction(96), [8, None, None], Fraction(96, 30), 8, Fraction(1, 10)) == [
        8,
        1,
        1,
    ]


def test_an_epoch_is_not_added_where_epochs_would_rise_along_the_chain() -> None:
    # The line gives 1.85, 1.51 and 1.16 epochs, rounded 2, 2 and 1. To reach the target both twos
    # lose an epoch. The target allows it back at the cheap third stage, but then epochs would rise.
    costs = [Fraction(cost) for cost in (3, 50, 2, 2)]
    fixed = [4, None, None, None]
    assert allocate(costs, Fraction(228), fixed, Fraction(114, 55), 4, DEFAULT) == [4, 1, 1, 1]
