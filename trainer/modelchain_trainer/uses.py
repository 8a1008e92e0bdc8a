"""How a trainer's process has used its time and its steps, by the monotonic clock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from modelchain.api.uses import Resumed, Uses
from modelchain.io import watchdog


def began() -> float:
    """When torchrun began, which has started this process; without torchrun, when this process
    loaded its first module. In seconds of the monotonic clock.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return watchdog.BEGAN
    try:
        fields = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # not on Linux
        return watchdog.BEGAN
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


@dataclass(frozen=True)
class Work:
    """Seconds of stepping, and steps."""

    seconds: float = 0.0
    steps: int = 0

    def __sub__(self, other: Work) -> Work:
        return Work(self.seconds - other.seconds, self.steps - other.steps)

    def __add__(self, other: Work) -> Work:
        return Work(self.seconds + other.seconds, self.steps + other.steps)


@dataclass
class Timekeeper:
    """What a process has done since it began.

    Its time is startup until its first step is done, then stepping or evaluating. The work of its
    steps is kept once a checkpoint after them is complete. Work that was gone back over is lost.
    """

    now: Callable[[], float] = time.monotonic
    began: float = field(default_factory=began)
    startup: float | None = None  # None until the first step is done
    evaluating: float = 0.0
    lost: Work = Work()
    kept: Work = Work()
    _steps: int = 0
    _ended: float | None = None  # when the work of steps was over, or an evaluation began
    _paused: float = 0.0  # the time of evaluations, of which none is stepping
    _saves: dict[int, Work] = field(default_factory=dict)

    def stepped(self) -> None:
        self._steps += 1
        if self.startup is None:
            self.startup = self.now() - self.began

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """What is done inside is an evaluation; before the first step it belongs to the startup."""
        self._ended = self.now()
        try:
            yield
        finally:
            if self.startup is not None:
                self._paused += self.now() - self._ended
            self._ended = None

    def ends(self) -> None:
        """No step follows: the rest is evaluation and export."""
        if self.startup is None:
            self.startup = self.now() - self.began
        self._ended = self.now()

    def saves(self, step: int) -> None:
        """A checkpoint of this step has begun."""
        self._saves[step] = self._done() - self.lost

    def saved(self, checkpoint_step: int, step: int) -> None:
        """The newest complete checkpoint is of `checkpoint_step`, and the state is that of `step`.

        If both are the same, all work is kept.
        """
        if checkpoint_step == step:
            self.kept = self._done() - self.lost
        elif checkpoint_step in self._saves:
            # Some work after a checkpoint may be kept already, such as the wait for its end.
            self.kept = max(self.kept, self._saves[checkpoint_step], key=lambda work: work.seconds)

    def went_back(self) -> None:
        """The state is that of the newest complete checkpoint again.

        A checkpoint that was begun before and is not complete holds work that is lost now.
        """
        self.lost = self._done() - self.kept
        self._saves.clear()

    def _done(self) -> Work:
        if self.startup is None:
            return Work()
        until = self.now() if self._ended is None else self._ended
        return Work(until - self.began - self.startup - self._paused, self._steps)

    @property
    def uses(self) -> Uses:
        """The time until now, by its use."""
        now = self.now()
        if self.startup is None:
            return Uses(startup=_ms(now - self.began))
        inside = 0.0 if self._ended is None else now - self._ended
        return Uses(
            startup=_ms(self.startup),
            productive=_ms(self.kept.seconds),
            evaluating=_ms(self._paused + inside),
            lost=_ms(self.lost.seconds),
            unsaved=_ms((self._done() - self.kept - self.lost).seconds),
        )

    def written(self, attempt: str, macs_per_step: int) -> Resumed:
        """What a checkpoint of this moment, or the artifact, says of this process."""
        kept = replace(self, kept=self._done() - self.lost)
        return Resumed(
            attempt=attempt,
            pod=os.environ.get("MODELCHAIN_POD_UID", ""),
            milliseconds=kept.uses,
            macs=self._steps * macs_per_step,
            saved_macs=kept.kept.steps * macs_per_step,
        )


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))
