"""cadence.py: what is due after a step, as a table."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from modelchain_trainer.cadence import READ_SECONDS, SKIPS, Action, Cadence, Moment

# Twelve steps in three epochs; the loop began at step 4, and it is step 6.
CADENCE = Cadence(steps=12, steps_per_epoch=4, checkpoint_seconds=60)
QUIET: dict[str, Any] = {
    "step": 6,
    "saved_step": 4,
    "since_saved": 5.0,
    "since_read": 0.1,
    "saving": False,
    "stop_agreed": False,
    "astray": False,
}


def moment(**changes: Any) -> Moment:
    return Moment(**{**QUIET, **changes})


@pytest.mark.parametrize(
    ("changes", "skips", "read", "action"),
    [
        # In the midst of an epoch.
        ({}, 0, False, Action.CONTINUE),
        ({"since_read": READ_SECONDS}, 0, True, Action.CONTINUE),
        ({"step": 1, "saved_step": 0}, 0, True, Action.CONTINUE),
        # A checkpoint is due: by time, by the end of an epoch, or by one that ended while the
        # checkpoint before was being written.
        ({"since_saved": 60.0}, 0, True, Action.SAVE),
        ({"step": 8}, 0, True, Action.SAVE),
        ({"step": 8, "saved_step": 3}, 0, True, Action.SAVE),
        ({"step": 9, "saved_step": 7}, 0, True, Action.SAVE),
        ({"step": 9, "saved_step": 8}, 0, False, Action.CONTINUE),
        # Training waits neither for a slow disk nor saves after a skipped batch.
        ({"since_saved": 60.0, "saving": True}, 0, False, Action.CONTINUE),
        ({"step": 8, "saving": True}, 0, False, Action.CONTINUE),
        ({"step": 8}, 1, True, Action.CONTINUE),
        # The last step, and a stop, are saved whatever else is going on.
        ({"step": 12}, 0, True, Action.FINISH),
        ({"step": 12, "saving": True}, 2, True, Action.FINISH),
        ({"stop_agreed": True}, 0, True, Action.STOP),
        ({"stop_agreed": True, "saving": True}, 2, True, Action.STOP),
        ({"step": 12, "stop_agreed": True}, 0, True, Action.STOP),
        # Too many skipped batches in a row come first; this rank may have counted fewer, before
        # it has read the losses.
        ({"astray": True}, SKIPS, True, Action.GO_BACK),
        ({"astray": True, "stop_agreed": True}, SKIPS, True, Action.GO_BACK),
        ({"astray": True}, SKIPS - 1, True, Action.CONTINUE),
        ({}, SKIPS, False, Action.CONTINUE),  # until all ranks know of it
        ({"step": 12}, SKIPS, True, Action.GO_BACK),
    ],
)
def test_what_is_due(changes: dict[str, Any], skips: int, read: bool, action: Action) -> None:
    assert CADENCE.read_due(moment(**changes)) is read
    assert CADENCE.decide(moment(**changes), skips) is action


def test_a_stage_shorter_than_the_limit_does_not_end_in_skipped_batches_alone() -> None:
    short = Cadence(steps=2, steps_per_epoch=1, checkpoint_seconds=60)
    assert short.decide(moment(step=2, saved_step=1), skips=2) is Action.GO_BACK
    assert short.decide(moment(step=2, saved_step=1), skips=1) is Action.FINISH


def test_nothing_is_decided_on_losses_that_have_not_been_read() -> None:
    """Whatever the loop knows, every action but CONTINUE follows a reading."""
    choices = {
        "step": [1, 6, 8, 9, 12],
        "saved_step": [0, 4, 8],
        "since_saved": [0.0, 60.0],
        "since_read": [0.0, 1.0],
        "saving": [False, True],
        "stop_agreed": [False, True],
        "astray": [False, True],
    }
    for values in product(*choices.values()):
        at = Moment(**dict(zip(choices, values, strict=True)))
        for skips in range(SKIPS + 1):
            assert CADENCE.decide(at, skips) is Action.CONTINUE or CADENCE.read_due(at)
