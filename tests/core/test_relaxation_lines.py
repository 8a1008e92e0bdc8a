"""What is told of rounds of relaxation, on a page and in a terminal."""

from __future__ import annotations

import pytest

from modelchain.api.status import Acceleration, ChainStatus, RelaxationStatus, Total
from modelchain.report.relaxation import relaxation_lines

ACCELERATION = Acceleration(requested="5", relaxed="4.210", achieved="3.900")
SPENT = Total(macs=31 * 10**18, gpu_seconds=433_800.0, cost="1234567.8901")


def test_a_chain_that_was_never_relaxed() -> None:
    assert list(relaxation_lines(ChainStatus())) == []


@pytest.mark.parametrize(
    ("relaxation", "told"),
    [
        (
            RelaxationStatus(round=2, rounds=[], spent=SPENT, acceleration=ACCELERATION),
            [
                "The gate has begun 2 rounds of relaxation. What was spent includes 3.10e19 MACs,"
                " 120.5 GPU hours, 1,234,567.89 USD on models that they have replaced.",
                "Acceleration: 5 requested, 4.210 planned with the epochs of all rounds, 3.900"
                " achieved.",
            ],
        ),
        (
            RelaxationStatus(round=1, rounds=[], acceleration=Acceleration(relaxed="4.210")),
            [
                "The gate has begun 1 round of relaxation.",
                "Acceleration: 4.210 planned with the epochs of all rounds.",
            ],
        ),
    ],
    ids=["finished", "of an older version, not finished"],
)
def test_rounds_and_what_they_have_cost(relaxation: RelaxationStatus, told: list[str]) -> None:
    status = ChainStatus(currency="USD", relaxation=relaxation)
    assert list(relaxation_lines(status)) == told
