"""state.py and hyperparameters.py: what a checkpoint's state.json and a task's inputs mean."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny

from modelchain.identity.digest import stage_inputs
from modelchain_trainer.hyperparameters import Hyperparameters, TransferInputs
from modelchain_trainer.state import Counters, TrainState

# Written by a trainer in which the state was a dict. Such checkpoints lie on volumes.
OLD = """
{"step": 5, "seconds": 0.33, "initial": {"loss": 4.25, "metrics": {"top1": 16.5}},
 "counters": {"skippedBatches": 1, "replacedPictures": 2, "scarceCaptions": 3},
 "finalLoss": 3.04, "skips": 0}
"""


def test_an_old_checkpoints_state_is_read_and_written_with_the_same_keys() -> None:
    state = TrainState.from_json(json.loads(OLD))
    assert state == TrainState(
        step=5,
        seconds=0.33,
        initial_loss=4.25,
        initial_metrics={"top1": 16.5},
        final_loss=3.04,
        counters=Counters(skipped_batches=1, replaced_pictures=2, scarce_captions=3),
    )
    assert state.to_json() == json.loads(OLD)


@pytest.mark.parametrize(
    ("document", "state"),
    [
        ({"step": 0, "seconds": 0.0, "initial": None}, TrainState()),
        # Without evaluations there are no metrics, but they have been measured.
        (
            {"step": 2, "seconds": 1.5, "initial": {"loss": None, "metrics": {}}, "skips": 2},
            TrainState(step=2, seconds=1.5, initial_metrics={}, skips=2),
        ),
    ],
)
def test_fields_that_an_older_trainer_did_not_write(
    document: dict[str, Any], state: TrainState
) -> None:
    assert TrainState.from_json(document) == state
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_skipped_batches_in_a_row_are_counted_and_give_no_loss() -> None:
    state = TrainState()
    seen = []
    for loss, skipped in [(1.0, True), (2.0, False), (3.0, True), (4.0, True), (5.0, False)]:
        state.count(loss, skipped)
        seen.append((state.skips, state.initial_loss, state.final_loss))
    assert seen == [(1, None, None), (0, 2.0, 2.0), (1, 2.0, 2.0), (2, 2.0, 2.0), (0, 2.0, 5.0)]
    assert state.counters.skipped_batches == 3


def test_hyperparameters_are_those_of_the_inputs() -> None:
    chain = tiny.spec(seed=7, weightDecay="0.05", precision="bf16")
    known = {"epochs": tiny.EPOCHS, "fingerprint": None}
    first = Hyperparameters.of(stage_inputs(chain.spec, 0, predecessor=None, **known))
    assert first == Hyperparameters(
        model_config=chain.spec.stages[0].config.resolved(),
        samples=tiny.SAMPLES,
        epochs=tiny.EPOCHS,
        global_batch_size=tiny.BATCH,
        captions_per_sample=2,
        learning_rate=1e-3,
        warmup_steps=3,
        weight_decay=0.05,
        precision="bf16",
        seed=7,
    )
    assert (first.steps_per_epoch, first.steps) == (tiny.STEPS_PER_EPOCH, tiny.STEPS)
    assert (first.image_size, first.context_length, first.alpha) == (16, 12, 0.0)
    second = Hyperparameters.of(stage_inputs(chain.spec, 1, predecessor="ab" * 32, **known))
    assert second.transfer == TransferInputs(width="Insert", depth="Duplicate", alpha=500.0)
    assert (second.alpha, second.warmup_steps) == (500.0, 2)
