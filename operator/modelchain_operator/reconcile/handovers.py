"""How long hand-overs from stage to stage took that this process has written to a status."""

from __future__ import annotations

from prometheus_client import Histogram

from modelchain.api.status import StageStatus

# The upper bounds of the histogram, in seconds.
BUCKETS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


def histogram() -> Histogram:
    """An empty one: it begins with the process."""
    return Histogram(
        "modelchain_operator_transition_duration_seconds",
        "How long hand-overs took that this process has seen: from the end of the predecessor's"
        " trainer to the job of its successor",
        buckets=BUCKETS,
        registry=None,
    )


def observe(seen: Histogram, before: StageStatus, after: StageStatus) -> None:
    """Count the hand-over to a stage, if the status that was just written is the first to say how
    long it took.
    """
    taken = after.transition_seconds
    if taken is not None and taken != before.transition_seconds:
        seen.observe(taken)
