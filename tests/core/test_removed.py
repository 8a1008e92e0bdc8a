"""A stage that is removed from the spec, or renamed, keeps what it has spent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from simulation import World, chain_of
from specs import DELETE
from test_reconcile import launched, rest, settle, until_live, until_live_in

from modelchain.api.contracts import FailureClass as F
from modelchain.api.status import (
    MOST_REMOVED,
    AttemptStatus,
    ChainStatus,
    Spent,
    SpentAt,
    StageLedger,
    StageStatus,
    State,
)
from modelchain.api.uses import Uses
from modelchain.decide.decide import decide
from modelchain.decide.observed import Artifact, Observed, Seen

GONE = Seen(live=False, started=True)
LAST = "spec.stages[1]"


def removed(world: World) -> dict[str, StageLedger]:
    return {stage.name: stage for stage in world.status.removed}


@pytest.mark.parametrize("cluster", [True, False])
def test_what_a_removed_stage_has_spent_stays(cluster: bool) -> None:
    world = settle(World(2, cluster=cluster))
    before = world.status
    world.edit(**{LAST: DELETE})
    settle(world)
    assert world.status.total == before.total and world.status.is_true("Complete")
    kept, spent = removed(world)["b"], before.stages[1]
    assert (kept.macs, kept.spent, kept.trained) == (spent.macs, spent.spent, spent.trained) != 0
    assert kept.attempts == spent.attempts and kept.attempt_count == 1


def test_a_stage_removed_while_it_runs_is_accounted_until_it_has_ended() -> None:
    world = until_live_in(World(2, cluster=True), "b")
    world.train()
    world.edit(**{LAST: DELETE})
    world.step()
    assert removed(world)["b"].attempts[-1].finished_at is None
    world.step()
    assert world.trainers["family-b-a1"].asked_to_stop, "no stage wants it any more"
    world.train()  # it takes its last steps
    world.end(F.PREEMPTED)
    settle(world)
    kept = removed(world)["b"]
    assert kept.attempts[-1].state is State.SUSPENDED and kept.spent.macs == kept.macs == 20
    assert world.status.total.macs == sum(t.macs for t in world.trainers.values())


@pytest.mark.parametrize("moment", ["complete", "b runs"])
def test_a_name_that_returns_takes_its_spending_back(moment: str) -> None:
    world = settle(World(2)) if moment == "complete" else until_live_in(World(2), "b")
    if moment != "complete":
        world.train()
    world.drop_last_stage()
    settle(world)
    assert list(removed(world)) == ["b"]
    gone = world.status.total.macs
    world.drop_last_stage()
    settle(world)
    assert not removed(world) and world.status.is_true("Complete")
    stage = world.status.stages[1]
    again = [] if moment == "complete" else ["family-b-a2"]
    assert launched(world) == ["family-a-a1", "family-b-a1", *again], "numbers never come back"
    assert stage.attempt_count == 1 + len(again)
    assert stage.trained.macs == sum(t.macs for t in world.trainers.values() if t.stage == "b")
    assert world.status.total.macs >= gone and (world.status.total.macs == gone) == (not again)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("cluster", [True, False])
def test_a_renamed_stage_hits_and_counts_nothing_twice(stage: int, cluster: bool) -> None:
    """The record of the artifact says what it had cost, which the removed stage has spent."""
    world = settle(World(2, cluster=cluster))
    before, old = world.status.total, world.status.stages[stage].name
    world.edit(**{f"spec.stages[{stage}].name": "new"})
    settle(world)
    assert len(launched(world)) == 2 and world.status.stages[stage].cache == "Hit"
    assert world.status.total == before and list(removed(world)) == [old]
    assert world.status.stages[stage].macs == 0 and removed(world)[old].macs > 0
    world.edit(**{f"spec.stages[{stage}].name": old})
    settle(world)
    assert world.status.total == before and not removed(world) and len(launched(world)) == 2


def test_a_renamed_stage_keeps_the_epochs_that_were_allocated_to_it() -> None:
    """The plan would allocate it others: it is the only one whose epochs are not fixed, and has to
    make up for the rounding of all others.
    """
    world = World(4)
    world.edits = {f"spec.stages[{n}].epochs": None for n in (1, 2, 3)}
    world.edits["spec.allocation.targetAcceleration"] = "1.37"
    settle(world)
    epochs = [stage.epochs for stage in world.status.stages]
    for stage in (1, 2, 3):
        world.edit(**{f"spec.stages[{stage}].name": f"new-{stage}"})
        settle(world)
        assert [s.epochs for s in world.status.stages] == epochs
    assert len(launched(world)) == 4 and all(s.frozen for s in world.status.stages[1:])


def spent(name: str, macs: int, **more: Any) -> StageLedger:
    attempt = AttemptStatus(
        name=f"family-{name}-a1",
        number=1,
        input_digest=name * 8,
        state=State.SUCCEEDED,
        finished_at="2026-01-01T00:00:00Z",
    )
    cost: dict[str, Any] = {"macs": macs, "gpu_seconds": float(macs), "cost": "0.10"}
    cost["gpu_milliseconds"] = Uses(lost=1000 * macs)
    known = {**cost, "attempts": [attempt], "attempt_count": 1, **more}
    return StageLedger(name=name, spent=Spent(**cost, seconds=1.0), **known)


FOUND = Artifact("0" * 64, "", 7, {}, gpu_milliseconds=Uses(productive=3000), cost="0.25")


def at_rest(
    removed: list[StageLedger],
    found: Artifact | None = FOUND,
    seen: Seen = GONE,
    before: ChainStatus | None = None,
    **edits: Any,
) -> ChainStatus:
    """The status of a chain of one stage, which finds this artifact."""
    chain = chain_of(1, tuple(edits.items()), suspend=False, generation=1)
    status = (before or ChainStatus()).model_copy(update={"removed": removed})
    for _ in range(9):
        observed = Observed(
            status=status,
            artifact=lambda digest: found and replace(found, path=f"{digest}/artifact"),
            attempt=lambda name: seen,
            records=True,
        )
        step = decide(chain, observed, 1.7e9)
        if not step.write:
            return status
        status = step.status
    raise AssertionError("`decide` does not stop writing")


def test_of_many_removed_stages_the_oldest_become_one_sum() -> None:
    """One whose attempt has not ended yet keeps its name."""
    running = spent("x0", 1).attempts[0].changed(finished_at=None, state=State.SUSPENDED)
    old = [spent("x0", 1, attempts=[running]), *(spent(f"x{n}", 2**n) for n in range(1, 20))]
    there = Seen(live=True, started=True)
    status = at_rest([spent("", 2**20), *old], found=None, seen=there)
    first, *named = status.removed
    assert [s.name for s in named] == ["x0", *(f"x{n}" for n in range(5, 20))]
    assert len(named) == MOST_REMOVED and first.name == ""
    assert first.macs == first.gpu_seconds == 2**20 + sum(2**n for n in range(1, 5))
    assert first.cost == "0.50"
    assert status.total.macs == 2**20 + sum(2**n for n in range(20))


def test_a_record_counts_unless_this_chain_has_spent_it() -> None:
    assert at_rest([]).total.macs == 7, "an earlier chain of this name has spent it"
    assert at_rest([], replace(FOUND, own=True)).total.macs == 0


@pytest.mark.parametrize("place", ["last", "before", "attempt"])
def test_a_record_counts_once_whatever_stage_has_found_it_before(place: str) -> None:
    digest = at_rest([]).stages[0].input_digest
    assert digest is not None
    match place:
        case "last":
            old = spent("b", 7, last_digest=digest)
        case "before":
            at = SpentAt(input_digest=digest, spent=Spent(macs=7))
            old = spent("b", 7, trained_before=[at])
        case _:
            one = spent("b", 7).attempts[0].model_copy(update={"input_digest": digest})
            old = spent("b", 7, attempts=[one])
    status = at_rest([old])
    assert status.stages[0].macs == 0 and status.total.macs == 7


def test_what_a_removed_stage_had_found_stays_in_the_total() -> None:
    first = at_rest([])
    renamed = at_rest([], before=first, **{"spec.stages[0].name": "new"})
    assert renamed.total == first.total and renamed.stages[0].macs == 0
    assert [(s.name, s.macs, s.gpu_seconds, s.cost) for s in renamed.removed] == [
        ("a", 7, 3.0, "0.25")
    ]
    back = at_rest(renamed.removed, before=renamed)
    assert back.total == first.total and not back.removed


def test_a_chain_that_is_applied_again_with_another_name_of_a_stage() -> None:
    """Its records name the stage as it was. What it had cost is counted with the new name."""
    digest = at_rest([]).stages[0].input_digest
    known = StageStatus(name="b", epochs=20, frozen=True, last_digest=digest)
    status = at_rest([], before=ChainStatus(stages=[known]))
    assert status.total.macs == status.stages[0].macs == 7


def test_a_stage_that_was_never_launched_leaves_nothing_behind() -> None:
    world = until_live(World(2))
    world.drop_last_stage()
    rest(world)
    assert world.status.removed == []
