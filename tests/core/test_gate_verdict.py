"""The gate's verdict on one finished stage, and how epochs grow after a miss."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelchain.api.spec import Gate
from modelchain.api.status import GateVerdict
from modelchain.gate.verdict import judged, recorded, standard_error, within_error

PERCENT = st.decimals(0, 100, places=2)


def gate(**fields: Any) -> Gate:
    return Gate.model_validate({"metric": "top1", **fields})


@pytest.mark.parametrize(
    ("fields", "metrics", "alone", "verdict"),
    [
        ({"baseline": {"b": "30.16"}}, {"top1": 29.66}, {}, GateVerdict.PASSED),
        ({"baseline": {"b": "30.16"}}, {"top1": 29.65}, {}, GateVerdict.MISSED),
        ({"baseline": {"b": "30.16"}}, {"top1": 31.0}, {}, GateVerdict.PASSED),
        ({"baseline": {"b": "30.16"}, "tolerance": "0"}, {"top1": 30.16}, {}, GateVerdict.PASSED),
        ({"baseline": {"b": "30.16"}}, {"r1": 99.0}, {}, GateVerdict.UNMEASURED),
        ({"baseline": {"b": "30.16"}}, {}, {"top1": 1.0}, GateVerdict.UNMEASURED),
        ({"baseline": {"c": "30.16"}}, {"top1": 1.0}, {}, GateVerdict.UNGATED),
        ({"train": ["c"]}, {"top1": 1.0}, {"top1": 90.0}, GateVerdict.UNGATED),
        ({"train": ["b"]}, {"top1": 90.0}, {}, GateVerdict.UNMEASURED),
        ({"train": ["b"]}, {"top1": 90.0}, {"r1": 1.0}, GateVerdict.UNMEASURED),
        ({"train": ["b"]}, {"top1": 90.0}, {"top1": 90.51}, GateVerdict.MISSED),
        ({"train": ["b"]}, {"top1": 90.0}, {"top1": 90.5}, GateVerdict.PASSED),
    ],
)
def test_verdicts(
    fields: dict[str, Any],
    metrics: dict[str, float],
    alone: dict[str, float],
    verdict: GateVerdict,
) -> None:
    assert judged(gate(**fields), "b", metrics, alone).verdict is verdict


def test_a_verdict_tells_its_figures() -> None:
    found = judged(gate(baseline={"b": "30.16"}), "b", {"top1": 29.1}, {}, samples=50_000)
    assert found.model_dump() == {
        "verdict": "Missed",
        "metric": "top1",
        "result": "29.10",
        "baseline": "30.16",
        "difference": "-1.06",
        "standard_error": "0.20",
    }


def test_verdicts_compare_what_users_see() -> None:
    """As floats, 1.1 - 0.2 is more than 0.9, and a stage would miss by nothing."""
    found = judged(gate(baseline={"b": "1.1"}, tolerance="0.2"), "b", {"top1": 0.9}, {})
    assert 1.1 - 0.2 > 0.9 and found.verdict is GateVerdict.PASSED
    rounded = judged(gate(baseline={"b": "30"}, tolerance="0"), "b", {"top1": 29.996}, {})
    assert rounded.verdict is GateVerdict.PASSED and rounded.difference == "0.00"


@given(PERCENT, PERCENT, PERCENT)
def test_the_verdict_is_one_comparison(
    result: Decimal, baseline: Decimal, tolerance: Decimal
) -> None:
    asked = gate(baseline={"b": f"{baseline:f}"}, tolerance=f"{tolerance:f}")
    found = judged(asked, "b", {"top1": float(result)}, {})
    assert (found.verdict is GateVerdict.MISSED) == (result < baseline - tolerance)
    assert Decimal(found.difference or "") == result - baseline


@given(PERCENT, PERCENT, PERCENT)
def test_a_larger_tolerance_never_turns_a_pass_into_a_miss(
    result: Decimal, baseline: Decimal, tolerance: Decimal
) -> None:
    verdicts = [
        judged(
            gate(baseline={"b": f"{baseline:f}"}, tolerance=f"{at:f}"),
            "b",
            {"top1": float(result)},
            {},
        ).verdict
        for at in (tolerance, tolerance + 1)
    ]
    assert verdicts != [GateVerdict.PASSED, GateVerdict.MISSED]


def test_the_standard_error_of_a_proportion() -> None:
    assert standard_error(Decimal(50), 10_000) == Decimal("0.50")
    assert standard_error(Decimal(0), 100) == standard_error(Decimal(100), 100) == 0


@pytest.mark.parametrize(
    ("result", "within"), [(29.7, False), (29.65, True), (29.47, True), (29.45, False)]
)
def test_a_miss_within_the_standard_error(result: float, within: bool) -> None:
    """The stage passes from 29.66 on, and the standard error is 0.20."""
    asked = gate(baseline={"b": "30.16"})
    assert within_error(asked, judged(asked, "b", {"top1": result}, {}, 50_000)) is within
    assert not within_error(asked, judged(asked, "b", {"top1": result}, {}))


def test_metrics_are_recorded_with_two_places() -> None:
    assert str(recorded(29.1)) == "29.10" and str(recorded(29.994)) == "29.99"
