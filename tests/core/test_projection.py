"""What a training will still take, by hand: from its own work, from that of the stage before it, or
from the plan alone.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelchain.api.status import AttemptStatus, Planned, Spent, StageStatus, State
from modelchain.api.uses import Uses
from modelchain.gate.budget import UNKNOWN, Bill
from modelchain.gate.projection import Rate, expected_rate, rate, remaining

PLAN = Planned(macs=1000, gpu_seconds=500.0, cost="1.00")
NO_HOURS = Planned(macs=1000)


def spent(macs: int, lost_macs: int, **seconds: int) -> dict[str, Any]:
    uses = Uses(**{use: 1000 * time for use, time in seconds.items()})
    return {
        "macs": macs,
        "lost_macs": lost_macs,
        "gpu_milliseconds": uses,
        "gpu_seconds": uses.total / 1000,
    }


def stage(*, trained: dict[str, Any] | None = None, **more: Any) -> StageStatus:
    known = Spent(**trained) if trained else Spent()
    return StageStatus(name="s", spent=known, trained=known, last_digest="d", **more)


def test_a_stage_without_work_has_no_rate() -> None:
    assert rate(stage()) is None
    assert rate(stage(trained=spent(0, 0, startup=100, lost=50))) is None


def test_start_up_stalls_and_losses_do_not_count() -> None:
    done = spent(300, 100, startup=70, productive=350, evaluating=50, stalled=900, lost=600)
    assert rate(stage(trained=done, plan=PLAN)) == Rate(Decimal(2), Decimal("0.5"))


def test_what_is_not_settled_counts_as_work() -> None:
    """Of a stage that runs, no checkpoint may have been written yet."""
    going = AttemptStatus(
        name="s-a2",
        number=2,
        input_digest="d",
        state=State.RUNNING,
        **spent(100, 0, startup=20, unsaved=100),
    )
    before = spent(100, 0, productive=300)
    assert rate(stage(trained=before, attempts=[going])) == Rate(Decimal(2), None)
    other = going.changed(finished_at="2026-01-01T00:00:00Z")
    assert rate(stage(trained=before, attempts=[other])) == Rate(Decimal(3), None)


def test_a_stage_that_was_found_tells_what_its_record_says() -> None:
    found = StageStatus(name="s", state=State.SUCCEEDED, **spent(100, 0, productive=100))
    assert rate(found) == Rate(Decimal(1), None)


@pytest.mark.parametrize(
    ("plan", "own", "before", "expected"),
    [
        (PLAN, None, None, Decimal("0.5")),
        (NO_HOURS, None, None, None),
        # The stage before took three times as long as planned.
        (PLAN, None, Rate(Decimal("0.3"), Decimal("0.1")), Decimal("1.5")),
        (NO_HOURS, None, Rate(Decimal("0.3"), Decimal("0.1")), Decimal("0.3")),
        (PLAN, None, Rate(Decimal("0.3"), None), Decimal("0.3")),
        (PLAN, Rate(Decimal(7), Decimal(1)), Rate(Decimal("0.3"), Decimal("0.1")), Decimal(7)),
    ],
)
def test_the_rate_of_what_is_left(
    plan: Planned, own: Rate | None, before: Rate | None, expected: Decimal | None
) -> None:
    assert expected_rate(plan, own, before) == expected


@pytest.mark.parametrize(
    ("done", "rate", "hour", "expected"),
    [
        (Fraction(0), Decimal("3.6"), Decimal(2), Bill(Decimal(3600), Decimal(2))),
        (Fraction(3, 4), Decimal("3.6"), Decimal(2), Bill(Decimal(900), Decimal("0.5"))),
        (Fraction(1), Decimal("3.6"), Decimal(2), Bill(Decimal(0), Decimal(0))),
        (Fraction(1, 2), Decimal("3.6"), None, Bill(Decimal(1800), None)),
        (Fraction(1, 2), None, Decimal(2), UNKNOWN),
    ],
)
def test_what_is_left(
    done: Fraction, rate: Decimal | None, hour: Decimal | None, expected: Bill
) -> None:
    assert remaining(PLAN, done, rate, hour) == expected


@given(st.fractions(0, 1), st.fractions(0, 1), st.decimals(0, 10**6, places=3))
def test_with_more_done_less_is_left(one: Fraction, other: Fraction, rate: Decimal) -> None:
    more, less = sorted((one, other), reverse=True)
    left = [remaining(PLAN, done, rate, Decimal(1)) for done in (more, less)]
    assert left[0].gpu_seconds is not None and left[1].gpu_seconds is not None
    assert 0 <= left[0].gpu_seconds <= left[1].gpu_seconds
