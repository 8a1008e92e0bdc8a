"""What an attempt tells while it trains: its journal, its lines in the log, the metrics it serves,
and the numbers of its last word. Nothing here steers the training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from modelchain.api.contracts import LiveProgress, Task
from modelchain.api.uses import NOT_USED, Resumed
from modelchain.io import watchdog
from modelchain_trainer.growth import GrowthReport
from modelchain_trainer.hyperparameters import Hyperparameters
from modelchain_trainer.journal import Journal, StepNumbers
from modelchain_trainer.metrics import Meter
from modelchain_trainer.state import AttemptWork, TrainState
from modelchain_trainer.uses import Timekeeper


class Reporter:
    """The voice of one rank; on all ranks but 0 `say` is silent and `journal` is inactive."""

    def __init__(
        self,
        task: Task,
        journal: Journal,
        meter: Meter,
        last_word: dict[str, Any],
        say: Callable[[str], None],
        gpus: int,
    ):
        self.task = task
        self.hyper = Hyperparameters.of(task.inputs)
        self.journal = journal
        self.meter = meter
        self.last_word = last_word  # fields of a failure's LastWord, kept up to date
        self.say = say
        self.gpus = gpus  # of all ranks together; 0 on a CPU
        self.started = time.monotonic()
        self.keeper = Timekeeper()
        self.resumed: Resumed | None = None  # None until a checkpoint was looked for

    def seconds(self) -> float:
        """Of this attempt, until now."""
        return round(time.monotonic() - self.started, 3)

    def spent(self, checkpoint_step: int, step: int) -> dict[str, Any]:
        """Fields of a LastWord: what this attempt has spent until now, and what of it is kept. That
        only rank 0 knows.
        """
        self.keeper.saved(checkpoint_step, step)
        uses, first = self.keeper.uses, self.journal.active
        return {
            "seconds": self.seconds(),
            "gpu_seconds": uses.total / 1000 * self.gpus,
            "milliseconds": uses if first else NOT_USED,
            "saved_macs": self.keeper.kept.steps * self.task.macs_per_step if first else 0,
            "resumed": self.resumed if first else None,
        }

    def written(self) -> Resumed:
        """What a checkpoint that is written now, or the artifact, says of this attempt."""
        return self.keeper.written(self.task.attempt, self.task.macs_per_step)

    def macs(self, work: AttemptWork) -> int:
        """Multiply-accumulates this attempt has spent."""
        return work.steps * self.task.macs_per_step

    def progress(
        self, state: TrainState, work: AttemptWork, checkpoint_step: int, rate: float = 0.0
    ) -> LiveProgress:
        """Bring the served progress up to date, and the last word, so that it is true whenever the
        end comes. `rate` is in steps a second.
        """
        macs, so_far = self.macs(work), self.spent(checkpoint_step, state.step)
        self.last_word |= {
            "step": state.step,
            "macs": macs,
            "checkpoint_step": checkpoint_step or None,
            **so_far,
        }
        watchdog.tell(self.last_word)
        live = LiveProgress(
            attempt=self.task.attempt,
            step=state.step,
            steps=self.hyper.steps,
            macs=macs,
            saved_macs=so_far["saved_macs"],
            milliseconds=so_far["milliseconds"],
            resumed=self.resumed,
            checkpoint_step=checkpoint_step,
            samples_per_second=rate * self.hyper.global_batch_size,
            eta_seconds=(self.hyper.steps - state.step) / rate if rate else 0.0,
        )
        self.meter.live = live
        self.meter.samples = work.samples
        return live

    def steps(
        self,
        numbers: Sequence[StepNumbers],
        state: TrainState,
        work: AttemptWork,
        live: LiveProgress,
        has_teacher: bool,
    ) -> None:
        """Write an entry for each of these steps, and one line for all of them. `state` and `work`
        are those after the last of them.
        """
        entries = [
            {
                **one.entry(has_teacher),
                "steps": self.hyper.steps,
                "macs": self.macs(work) - (state.step - one.step) * self.task.macs_per_step,
                "etaSeconds": live.eta_seconds,
                "samplesPerSecond": live.samples_per_second,
            }
            for one in numbers
        ]
        self.journal.write(*entries)
        self.meter.last = entries[-1]
        self.meter.skipped += sum(one.skipped for one in numbers)
        self.say(self._line(state, live))

    def _line(self, state: TrainState, live: LiveProgress) -> str:
        epoch = state.step / self.hyper.steps_per_epoch
        loss = "not finite, skipped" if state.skips else f"{state.final_loss:.4f}"
        left = timedelta(seconds=round(live.eta_seconds))
        return (
            f"{self.task.stage} step {state.step}/{self.hyper.steps} epoch {epoch:.1f} loss {loss}"
            f" {live.samples_per_second:.0f} samples/s, {left} left"
        )

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.journal.write({"event": "evaluation", "step": step, "metrics": metrics})

    def growth(
        self, grown: GrowthReport, predecessor: str, cosines: Mapping[str, Sequence[float]]
    ) -> None:
        """What was inherited, and how alike the layers are before the first step."""
        for line in grown.lines(predecessor, cosines):
            self.say(line)
        about = {**grown.to_dict(), "stacks": grown.stacks, "cosines": cosines}
        self.journal.write({"event": "growth", "step": 0, **about})

    def went_back(self, step: int, bad_from: int, bad_to: int) -> None:
        """To the checkpoint of `step`, after steps `bad_from` to `bad_to` were skipped."""
        steps = {"nonFiniteFrom": bad_from, "nonFiniteTo": bad_to}
        self.journal.write({"event": "wentBack", "step": step, **steps})
