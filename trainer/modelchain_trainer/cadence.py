"""What is due after a step: a pure function of what the loop knows then."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

# Batches in a row whose loss or gradients are not finite, before all ranks go back to a checkpoint.
SKIPS = 3
READ_SECONDS = 1.0  # the host reads the losses, and a line is printed, this often


class Action(Enum):
    """What the loop does before its next step."""

    CONTINUE = auto()  # nothing
    SAVE = auto()  # write a checkpoint beside the training
    FINISH = auto()  # write a checkpoint and leave the loop: that was the last step
    STOP = auto()  # wait for a checkpoint of this very step, then end the attempt
    GO_BACK = auto()  # to the newest checkpoint: too many batches in a row were skipped


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What the loop knows after a step, before the losses since the last reading are read."""

    step: int  # steps done
    saved_step: int  # the step whose checkpoint was begun last, or that the loop began at
    since_saved: float  # seconds since then
    since_read: float  # seconds since the losses were read
    saving: bool  # whether that checkpoint is still being written
    stop_agreed: bool  # all ranks know that one of them was asked to stop
    astray: bool  # all ranks know that one of them has counted SKIPS skipped batches in a row


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """The rhythm of a stage's checkpoints, readings and ends."""

    steps: int
    steps_per_epoch: int
    checkpoint_seconds: float

    def read_due(self, moment: Moment) -> bool:
        """Whether to read the losses now, which makes the host wait for the device.

        Always before a checkpoint, so that no checkpoint follows a loss that has not been read; and
        before any rank acts on `astray`, so that all ranks count the same skipped batches.
        """
        return (
            self._save_due(moment)
            or moment.astray
            or moment.step == 1
            or moment.since_read >= READ_SECONDS
        )

    def decide(self, moment: Moment, skips: int) -> Action:
        """What to do, once `read_due` has been answered; `skips` is TrainState's."""
        last = moment.step == self.steps
        # A stage shorter than SKIPS steps must not end in skipped batches alone.
        if (moment.astray or last) and skips >= min(SKIPS, self.steps):
            return Action.GO_BACK
        if moment.stop_agreed:
            return Action.STOP
        if last:
            return Action.FINISH
        # After a skipped batch the weights are unchanged and may be the cause, so no checkpoint is
        # written to go back to.
        if self._save_due(moment) and not skips:
            return Action.SAVE
        return Action.CONTINUE

    def _save_due(self, moment: Moment) -> bool:
        if moment.stop_agreed or moment.step == self.steps:
            return True
        # A checkpoint that is still being written delays the next one; training does not wait.
        epoch_ended = self._epochs(moment.step) > self._epochs(moment.saved_step)
        return not moment.saving and (epoch_ended or moment.since_saved >= self.checkpoint_seconds)

    def _epochs(self, step: int) -> int:
        """Epochs that have ended after so many steps."""
        return step // self.steps_per_epoch
