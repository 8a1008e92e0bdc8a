"""What rank 0 of a trainer does at each moment, by the monotonic clock, for Prometheus.

The uses of time (`uses.py`) say what became of the work. These say what the process was doing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from modelchain_trainer.uses import began

Activity = Literal["startup", "step", "data", "checkpoint", "evaluation", "export"]
ACTIVITIES: tuple[Activity, ...] = (
    "startup",
    "step",
    "data",
    "checkpoint",
    "evaluation",
    "export",
)


@dataclass(frozen=True)
class _Moment:
    """What has been done since when, and the time of all that was over by then."""

    activity: Activity
    since: float
    over: Mapping[Activity, float]

    def until(self, now: float) -> dict[Activity, float]:
        """Seconds of each activity."""
        last = self.over[self.activity] + max(0.0, now - self.since)
        return {**self.over, self.activity: last}


@dataclass
class Activities:
    """One activity at each moment: startup until the first step is done, and later a step, unless
    something else is said.

    Another thread may read `seconds` at any time.
    """

    now: Callable[[], float] = time.monotonic
    began: float = field(default_factory=began)
    _at: _Moment = field(init=False)

    def __post_init__(self) -> None:
        self._at = _Moment("startup", self.began, dict.fromkeys(ACTIVITIES, 0.0))

    @property
    def seconds(self) -> dict[Activity, float]:
        """Seconds of each activity until now. They sum up to the time since the process began."""
        return self._at.until(self.now())

    def stepped(self) -> None:
        """A step is done: the startup is over."""
        if self._at.activity == "startup":
            self.begins("step")

    def begins(self, activity: Activity) -> None:
        """From now on it does this."""
        now = self.now()
        self._at = _Moment(activity, now, self._at.until(now))

    @contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """What is done inside is this activity. Before the first step it belongs to the startup."""
        before = self._at.activity
        if before != "startup":
            self.begins(activity)
        try:
            yield
        finally:
            if before != "startup":
                self.begins(before)
