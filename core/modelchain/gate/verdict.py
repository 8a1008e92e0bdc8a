"""Whether a finished stage is as accurate as the same model trained alone.

The verdict follows from the spec and the recorded metrics alone. So a chain whose status was lost,
or that was deleted and applied again, gets the same verdicts without training anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from modelchain.api.spec import Gate
from modelchain.api.status import GateStatus, GateVerdict

CENT = Decimal("0.01")


def recorded(metric: float) -> Decimal:
    """A metric as records and tables hold it. Verdicts compare these values, which users see."""
    return Decimal(f"{metric:.2f}")


def judged(
    gate: Gate,
    stage: str,
    metrics: Mapping[str, float],
    alone: Mapping[str, float],
    samples: int | None = None,
) -> GateStatus:
    """The verdict on a finished stage.

    Args:
        gate: the spec's gate.
        stage: the stage's name.
        metrics: what was measured of the stage's model, by the name of the evaluation.
        alone: what was measured of the same model trained alone here. It is empty while that
            training has not finished.
        samples: pictures of a top-1 evaluation; None if unknown, or for another kind of metric.
    """
    result = metrics.get(gate.metric)
    shown = None if result is None else str(recorded(result))
    if stage not in gate.baseline and stage not in gate.train:
        return GateStatus(verdict=GateVerdict.UNGATED, metric=gate.metric, result=shown)
    baseline = _baseline(gate, stage, alone)
    if baseline is None or result is None:
        known = None if baseline is None else str(baseline)
        return GateStatus(
            verdict=GateVerdict.UNMEASURED, metric=gate.metric, result=shown, baseline=known
        )
    difference = recorded(result) - baseline
    missed = difference < -Decimal(gate.tolerance)
    return GateStatus(
        verdict=GateVerdict.MISSED if missed else GateVerdict.PASSED,
        metric=gate.metric,
        result=shown,
        baseline=str(baseline),
        difference=f"{difference:f}",
        standard_error=None if samples is None else str(standard_error(recorded(result), samples)),
    )


def _baseline(gate: Gate, stage: str, alone: Mapping[str, float]) -> Decimal | None:
    """The metric of the same model trained alone: as the spec gives it, or as measured here."""
    if stage in gate.baseline:
        return Decimal(gate.baseline[stage])
    return recorded(alone[gate.metric]) if gate.metric in alone else None


def in_words(gate: Gate, found: GateStatus) -> str:
    """A verdict of passed or missed as a sentence about the stage."""
    assert found.difference is not None
    points = Decimal(found.difference)
    less = "less" if points < 0 else "more"
    error = f", standard error {found.standard_error}" if found.standard_error else ""
    return (
        f"{found.metric} is {found.result}{error}, and {found.baseline} if the model is trained"
        f" alone: {abs(points)} points {less}, where {gate.tolerance} less are allowed"
    )


def standard_error(percent: Decimal, samples: int) -> Decimal:
    """The standard error of a top-1 accuracy that was measured on so many pictures, in points."""
    return (percent * (100 - percent) / samples).sqrt().quantize(CENT)


def within_error(gate: Gate, found: GateStatus) -> bool:
    """Whether a stage missed by less than the standard error of its own accuracy.

    Then other pictures of the same kind might have let it pass.
    """
    if found.difference is None or found.standard_error is None:
        return False
    short = -Decimal(gate.tolerance) - Decimal(found.difference)
    return 0 < short < Decimal(found.standard_error)
