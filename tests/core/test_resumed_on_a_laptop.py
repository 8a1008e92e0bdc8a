"""What a laptop's ledger says of attempts that were interrupted and resumed. Nothing there has GPU
time, pods, or a chance to be asked before it ends.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulation import World

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.uses import Resumed, Uses

KEPT, DONE = 300, 400
TIMES = Uses(startup=1000, productive=2000)


def interrupted(word: bool) -> World:
    """The first attempt wrote a checkpoint after 300 MACs and was ended after 400."""
    world = World(1)
    while world.live() is None:
        world.calm_step()
    name = world.live() or ""
    world.train()
    said = LastWord(
        result="Failed",
        failure=FailureClass.PREEMPTED,
        checkpoint_step=1,
        macs=DONE,
        saved_macs=KEPT,
        milliseconds=TIMES,
    )
    world.trainers[name] = replace(
        world.trainers[name], live=False, macs=DONE, word=said if word else None
    )
    world.restart()
    while world.live() is None:
        world.calm_step()
    return world


def ends(world: World, resumed: Resumed) -> int:
    """The next attempt leaves the artifact; the MACs that the stage counts as lost."""
    name = world.live() or ""
    world.train()
    world.make_artifact()
    trainer = world.trainers[name]
    said = LastWord(
        result="Succeeded",
        macs=trainer.macs,
        saved_macs=trainer.macs,
        milliseconds=TIMES,
        resumed=resumed,
    )
    world.trainers[name] = replace(trainer, live=False, word=said)
    while world.calm_step():
        pass
    (stage,) = world.status.stages
    assert [a.unsettled for a in stage.attempts] == [None, None] and stage.done
    return stage.lost_macs


@pytest.mark.parametrize("word", [True, False], ids=["with a last word", "killed"])
def test_only_what_no_checkpoint_has_kept_is_lost(word: bool) -> None:
    world = interrupted(word)
    (first,) = (a.name for a in world.status.stages[0].attempts[:1])
    kept = Resumed(attempt=first, macs=KEPT, saved_macs=KEPT, milliseconds=TIMES)
    assert ends(world, kept) == DONE - KEPT


def test_a_checkpoint_that_was_not_used_has_kept_nothing() -> None:
    assert ends(interrupted(word=False), Resumed()) == DONE
