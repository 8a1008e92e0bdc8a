"""`decide`: single situations, an exhaustive search of small worlds, and random histories of larger
ones.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import exploration
import pytest
from exploration import explore
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulation import MAX_DISRUPTIONS, MAX_RETRIES, World
from sweeps import Dice

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.status import ChainStatus, StageStatus, State
from modelchain.decide.decide import decide
from modelchain.decide.observed import Launch, RecordArtifact, Stop
from modelchain.plan.plan import plan

F = FailureClass
PERMANENT = [f for f in F if f.permanent]
DISRUPTIONS = [f for f in F if f.disruption]
RETRIED = [f for f in F if not f.permanent and not f.disruption]
# Steps after which a chain of three stages without further faults must be at rest.
LONGEST_CALM = 80


def settle(world: World) -> World:
    return exploration.settle(world, LONGEST_CALM)


def until_live(world: World) -> World:
    for _ in range(20):
        if world.live() is not None:
            return world
        world.step()
    raise AssertionError("nothing was launched")


def until_live_in(world: World, stage: str) -> World:
    for _ in range(40):
        name = world.live()
        if name is not None and world.trainers[name].stage == stage:
            return world
        world.calm_step()
    raise AssertionError(f"{stage} was not launched")


def rest(world: World) -> World:
    """Take steps of `decide` until nothing changes, while the world stands still."""
    for _ in range(20):
        decision = world.step()
        if not decision.write and decision.action is None:
            return world
    raise AssertionError("`decide` does not stop writing")


def states(world: World) -> list[str]:
    return [str(stage.state) for stage in world.status.stages]


def launched(world: World) -> list[str]:
    return list(world.trainers)


# Single situations.


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("cluster", [True, False])
def test_an_undisturbed_chain(stages: int, cluster: bool) -> None:
    world = settle(World(stages, cluster=cluster))
    assert launched(world) == [f"family-{name}-a1" for name in "abc"[:stages]]
    assert states(world) == ["Succeeded"] * stages
    assert [s.cache for s in world.status.stages] == ["Miss"] * stages
    assert [s.reason for s in world.status.stages] == ["Miss: never trained"] * stages
    assert [s.results for s in world.status.stages] == [{"top1": "91.50"}] * stages
    planned = plan(world.chain(), "analytic", {})
    for stage, asked in zip(world.status.stages, planned.stages, strict=True):
        assert stage.macs == stage.planned_macs == asked.macs
    assert world.status.total.macs == planned.total.macs
    assert (
        world.status.condition("Complete").message == f"{stages} of {stages} stages have finished"
    )  # type: ignore[union-attr]


def test_the_states_of_a_chain_in_order() -> None:
    world, seen = World(2), []
    while True:
        if states(world) not in seen:
            seen.append(states(world))
        if not world.calm_step():
            break
    assert seen == [
        [],
        ["Starting", "Pending"],
        ["Running", "Pending"],
        ["Verifying", "Pending"],
        ["Succeeded", "Starting"],
        ["Succeeded", "Running"],
        ["Succeeded", "Verifying"],
        ["Succeeded", "Succeeded"],
    ] or seen == [
        [],
        ["Starting", "Pending"],
        ["Verifying", "Pending"],
        ["Succeeded", "Starting"],
        ["Succeeded", "Verifying"],
        ["Succeeded", "Succeeded"],
    ]


def test_a_command_that_is_run_again_hits_every_stage() -> None:
    world = settle(World(3))
    world.restart()
    settle(world)
    assert len(launched(world)) == 3
    assert [(s.cache, s.reason) for s in world.status.stages] == [
        ("Hit", "unchanged since it was trained")
    ] * 3
    assert world.status.total.macs == plan(world.chain(), "analytic", {}).total.macs, (
        "nothing was spent again"
    )


@pytest.mark.parametrize(
    ("path", "value", "again", "reason"),
    [
        ("spec.stages[1].rerun", "x", "bc", "Miss: rerun changed"),
        ("spec.stages[1].epochs", 21, "bc", "Miss: epochs changed"),
        (
            "spec.transfer.distillation.alpha",
            "400",
            "bc",
            "Miss: transfer.distillation.alpha changed",
        ),
        ("spec.stages[0].modelConfig.embed_dim", 64, "abc", "Miss: predecessor changed"),
        ("metadata.labels", None, "", "unchanged since it was trained"),
        ("spec.runner.image", "x@sha256:00", "", "unchanged since it was trained"),
    ],
)
@pytest.mark.parametrize("cluster", [True, False])
def test_an_edit_retrains_what_it_must(
    path: str, value: Any, again: str, reason: str, cluster: bool
) -> None:
    world = settle(World(3, cluster=cluster))
    world.edit(**({} if value is None else {path: value}))
    settle(world)
    assert launched(world)[3:] == [f"family-{name}-a2" for name in again]
    assert [s.cache for s in world.status.stages] == [
        "Miss" if name in again else "Hit" for name in "abc"
    ]
    assert world.status.stages[1].reason == reason
    world.edits.clear()
    world.edit()
    settle(world)
    assert len(launched(world)) == 3 + len(again), "after the revert the old artifacts are hits"
    assert [s.cache for s in world.status.stages] == ["Hit"] * 3


def test_an_edit_of_a_later_stage_leaves_the_running_one_alone() -> None:
    world = until_live(World(3))
    world.edit(**{"spec.stages[2].rerun": "x"})
    settle(world)
    assert launched(world) == ["family-a-a1", "family-b-a1", "family-c-a1"]
    assert not any(t.asked_to_stop for t in world.trainers.values())


def test_an_edit_of_the_running_stage_stops_the_attempt_and_after_a_revert_it_resumes() -> None:
    world = until_live_in(World(2), "b")
    world.train()
    world.edit(**{"spec.stages[1].rerun": "x"})
    steps = [world.step() for _ in range(3)]
    assert isinstance(steps[-1].action, Stop)
    world.edits.clear()
    world.end(F.PREEMPTED)
    world.edit()
    settle(world)
    assert [t.digest == world.status.stages[1].input_digest for t in world.trainers.values()] == [
        False,
        True,
        True,
    ]
    assert world.trainers["family-b-a2"].began_at == 1, "from the newest checkpoint"


def test_an_edit_of_an_earlier_stage_stops_the_running_one_first() -> None:
    world = until_live_in(World(3), "b")
    world.edit(**{"spec.stages[0].rerun": "x"})
    for _ in range(4):
        world.step()
    assert world.trainers["family-b-a1"].asked_to_stop
    assert (
        states(world)[0] == "Pending"
        and "waits for an earlier attempt" in world.status.stages[0].reason
    )
    settle(world)
    assert launched(world) == [
        "family-a-a1",
        "family-b-a1",
        "family-a-a2",
        "family-b-a2",
        "family-c-a1",
    ]


@pytest.mark.parametrize("failure", list(F))
def test_which_budget_each_failure_charges(failure: F) -> None:
    world = until_live(World(1))
    world.train()
    world.end(failure)
    decision = world.step()
    stage = world.status.stages[0]
    assert stage.attempts[0].failure is failure and stage.attempts[0].state is State.FAILED
    if failure.permanent:
        assert stage.state is State.FAILED and stage.reason == f"{failure}: as it was told"
        assert world.step().again is None
    else:
        assert (stage.retries, stage.disruptions) == ((0, 1) if failure.disruption else (1, 0))
        assert stage.state is State.PENDING and decision.write
        until_live(world)


@pytest.mark.parametrize("failure", [*RETRIED, *DISRUPTIONS, *PERMANENT])
@pytest.mark.parametrize("newer", [True, False])
def test_budgets_end_and_a_new_retry_token_renews_them_once(failure: F, newer: bool) -> None:
    world = World(2)
    for _ in range(2):
        attempts = 0
        while not world.ended():
            until_live(world)
            attempts += 1
            world.train(checkpoint=newer)
            world.end(failure)
            rest(world)
        allowed = (
            0
            if failure.permanent
            else MAX_DISRUPTIONS
            if failure.disruption and newer
            else MAX_RETRIES
        )
        assert attempts == allowed + 1
        assert states(world) == ["Failed", "Pending"]
        world.check_rest()
        world.ask_again()
    settle(world)
    assert world.status.is_true("Complete")
    assert world.status.stages[0].retried == ({failure: 2 * allowed} if allowed else {}), (
        "counts by cause stay when budgets are renewed"
    )


def test_an_attempt_killed_without_a_last_word_is_a_disruption() -> None:
    world = until_live(World(1))
    world.train()
    world.end(word=False)
    world.step()
    stage = world.status.stages[0]
    assert (stage.retries, stage.disruptions, stage.attempts[0].failure) == (0, 1, F.KILLED)
    assert stage.macs == 10, "the last report counts as what it spent"


@pytest.mark.parametrize("cluster", [True, False])
@pytest.mark.parametrize("killed", range(1, MAX_DISRUPTIONS + 1))
def test_unreported_work_of_killed_attempts_is_counted_once_the_stage_succeeds(
    killed: int, cluster: bool
) -> None:
    world = World(2, cluster=cluster)
    for _ in range(killed):
        until_live(world).train()
        world.step()  # the trainer reports 10
        world.end(word=False)  # it did much more, with checkpoints, but never reported it
        world.step()
    last = until_live(world).live()
    assert last is not None
    world.trainers[last] = replace(world.trainers[last], macs=7)  # it had little left to do
    world.forgetful = True  # the ledger may differ: trainers did more than they reported
    world.artifacts[world.trainers[last].digest] = "whole"
    world.end()
    while world.status.stages[0].state is not State.SUCCEEDED:
        world.step()
    stage = world.status.stages[0]
    assert [a.macs for a in stage.attempts] == [10] * killed + [stage.planned_macs - 10 * killed]
    assert stage.macs == stage.planned_macs == stage.spent.macs == stage.trained.macs


@pytest.mark.parametrize("cluster", [True, False])
@pytest.mark.parametrize("evicted", [1, 12], ids=["listed", "no longer listed"])
@pytest.mark.parametrize("meanwhile", ["hit", "trained", "stopping"])
def test_spending_at_inputs_that_an_edit_brings_back_is_counted_once(
    meanwhile: str, evicted: int, cluster: bool
) -> None:
    """Attempts at the inputs A have done the whole work and left no artifact. After an edit to B
    and back, the attempt that finishes A must not be charged with that work again.
    """
    there = ("spec.stages[0].epochs", 21)
    world = World(1, cluster=cluster)
    world.edits["spec.retry.maxDisruptions"] = 50
    if meanwhile == "hit":
        world.edit(**dict([there]))
        settle(world)
        world.toggle(*there)
    first = until_live(world).live()
    assert first is not None
    world.trainers[first] = replace(world.trainers[first], macs=10**15)
    for _ in range(evicted - 1):
        world.step()
        world.end(F.PREEMPTED)
        until_live(world).train()
    world.step()
    if meanwhile == "stopping":  # the attempt at A is still open when the edit is taken back
        world.toggle(*there)
        world.step()
        world.toggle(*there)
        world.end(F.PREEMPTED)
    else:
        world.end(F.PREEMPTED)
        world.edit(suspend=True, **dict([there]))
        rest(world)
        world.edit(suspend=False)
        settle(world) if meanwhile == "hit" else rest(until_live(world))
        world.toggle(*there)
    settle(world)
    stage = world.status.stages[0]
    at_a = [t.macs for t in world.trainers.values() if t.digest == stage.input_digest]
    assert stage.trained.macs == sum(at_a) < 2 * 10**15
    assert stage.macs == sum(t.macs for t in world.trainers.values())


def test_a_record_counts_the_work_of_a_chain_that_was_deleted() -> None:
    """All that is known of that work is that the stage is trained. The record counts the planned
    MACs, as whole steps of equal MACs.
    """
    world = until_live(World(1, cluster=True))
    name, steps = world.live(), 1000
    assert name is not None
    world.train()
    word = LastWord(result="Succeeded", artifact_digest="0" * 64, steps=steps, macs=3)
    world.trainers[name] = replace(world.trainers[name], live=False, word=word)
    for _ in range(3):
        decision = decide(world.chain(), replace(world.observed(), records=True), world.now)
        world.status = decision.status
    (stage,) = world.status.stages
    assert isinstance(decision.action, RecordArtifact)
    assert decision.action.spent.macs == stage.planned_macs // steps * steps


def test_the_work_of_another_chain_is_not_counted() -> None:
    world = until_live(World(1))
    name = world.live()
    assert name is not None
    world.train()  # from another chain's checkpoint to the end
    world.artifacts[world.trainers[name].digest] = "whole"
    world.end()
    while not world.status.is_true("Complete"):
        world.step()
    assert world.status.total.macs == 10


def test_a_reported_success_without_an_artifact() -> None:
    world = until_live(World(1))
    world.end()
    world.step()
    assert world.status.stages[0].attempts[0].failure is F.NO_ARTIFACT
    settle(world)


def test_an_attempt_that_dies_after_its_artifact_is_complete_succeeds() -> None:
    world = until_live(World(1))
    world.train()
    world.make_artifact()
    world.end(word=False)
    settle(world)
    assert (
        launched(world) == ["family-a-a1"]
        and world.status.stages[0].attempts[0].state is State.SUCCEEDED
    )


def test_a_successor_waits_until_its_predecessors_process_has_ended() -> None:
    world = until_live(World(2))
    world.make_artifact()
    for _ in range(3):
        decision = world.step()
        assert decision.action is None
    assert states(world) == ["Verifying", "Pending"]
    world.end()
    settle(world)


def test_the_back_off_doubles_up_to_a_limit() -> None:
    world = World(1, backoff=8.0)
    world.edits["spec.retry.maxRetries"] = 9
    waits = []
    for _ in range(9):
        until_live(world)
        world.end(F.ERROR)
        rest(world)
        wait = world.step().again
        assert wait is not None
        waits.append(wait)
        world.now += wait
    assert waits == [8, 16, 32, 64, 128, 256, 512, 512, 512]


@pytest.mark.parametrize("failure", DISRUPTIONS)
def test_disruptions_without_a_newer_checkpoint_are_spaced_as_retries_are(failure: F) -> None:
    """While DNS is away, for example, all init containers fail at once."""
    world = World(1, backoff=8.0)
    world.edits |= {"spec.retry.maxRetries": 9, "spec.retry.maxDisruptions": 50}
    waits = []
    for newer in (False, False, True, False, False):
        until_live(world)
        if newer:
            world.train()
        world.end(failure)
        rest(world)
        wait = world.step().again if world.live() is None else 0.0
        assert wait is not None
        waits.append(wait)
        world.now += wait
    assert waits == [8, 16, 0, 32, 64]


@pytest.mark.parametrize("how", ["suspend", "interrupt"])
@pytest.mark.parametrize("cluster", [True, False])
def test_a_stopped_stage_charges_no_budget_and_resumes(how: str, cluster: bool) -> None:
    world = until_live_in(World(2, cluster=cluster), "b")
    for n in range(1, 6):
        until_live(world)
        if how == "suspend":
            world.edit(suspend=True)
        else:
            world.interrupt()
        settle(world)
        assert world.status.is_true("Suspended") and states(world) == ["Succeeded", "Suspended"]
        stage = world.status.stages[1]
        assert (stage.retries, stage.disruptions, stage.attempts[-1].state) == (
            0,
            0,
            State.SUSPENDED,
        )
        assert stage.attempts[-1].name == f"family-b-a{n}"
        if how == "suspend":
            world.edit(suspend=False)
        else:
            world.restart()
    settle(world)
    assert world.status.is_true("Complete")
    assert world.status.stages[1].reason == "Miss: never trained", (
        "the reason to train, not to stop"
    )


def test_an_attempt_may_finish_while_it_is_being_stopped() -> None:
    world = until_live(World(2))
    world.train()
    world.interrupt()
    world.step()
    assert world.status.stages[0].reason.startswith("stopping: ")
    world.make_artifact()
    settle(world)
    assert (
        states(world) == ["Succeeded", "Suspended"]
        and world.status.stages[0].reason == "Miss: never trained"
    )


def test_a_chain_that_is_suspended_from_the_start() -> None:
    world = settle(World(2, suspend=True))
    assert launched(world) == [] and states(world) == ["Suspended", "Pending"]


def test_a_suspension_between_intent_and_launch() -> None:
    world = World(1)
    world.step()
    assert world.status.stages[0].state is State.STARTING and not world.trainers
    world.edit(suspend=True)
    settle(world)
    assert launched(world) == [] and states(world) == ["Suspended"]
    world.edit(suspend=False)
    settle(world)
    assert launched(world) == ["family-a-a1"]


def test_an_intent_superseded_before_its_launch_is_not_launched() -> None:
    world = World(1)
    world.step()
    world.edit(**{"spec.stages[0].rerun": "x"})
    settle(world)
    assert launched(world) == ["family-a-a2"] and world.status.stages[0].attempt_count == 2


def test_a_crash_half_way_through_a_launch() -> None:
    world = World(1)
    world.step()
    decision = world.copy().step()
    assert isinstance(decision.action, Launch)
    world.tear_launch(decision)
    settle(world)
    assert launched(world) == ["family-a-a1", "family-a-a2"]
    assert world.status.stages[0].attempts[0].failure is F.KILLED


def test_a_damaged_artifact_is_never_used_and_never_trained_over() -> None:
    world = settle(World(2))
    world.hurt(0, "damaged")
    world.restart()
    settle(world)
    assert len(launched(world)) == 2
    assert states(world) == ["Failed", "Pending"]
    assert world.status.stages[0].reason == "CorruptArtifact: a byte is flipped"
    world.hurt(0, "whole")
    world.restart()
    settle(world)
    assert len(launched(world)) == 2 and world.status.is_true("Complete")


def test_a_stage_that_was_pending_still_reports_what_changed() -> None:
    """It does so even if its status has no attempt, as after a lost status."""
    world = settle(World(2))
    world.lose_status()
    world.restart()
    settle(world)
    assert len(launched(world)) == 2 and not any(s.attempts for s in world.status.stages)
    world.edit(**{"spec.stages[0].rerun": "once more"})
    settle(world)
    assert [s.reason for s in world.status.stages] == [
        "Miss: rerun changed",
        "Miss: predecessor changed",
    ]


def test_a_hit_whose_artifact_vanishes_is_not_reported_as_edited() -> None:
    world = settle(World(1))
    world.lose_status()
    world.restart()
    settle(world)
    world.hurt(0, None)
    world.restart()
    settle(world)
    assert world.status.stages[0].reason == "Miss: its artifact is gone"


@pytest.mark.parametrize("stage", [0, 1])
def test_a_finished_chain_starts_work_only_when_asked(stage: int) -> None:
    """If an artifact vanishes, a finished chain reports that and trains nothing by itself."""
    world = settle(World(2))
    world.hurt(stage, None)
    settle(world)
    assert len(launched(world)) == 2 and states(world)[stage] == "Failed"
    assert "run again" in world.status.stages[stage].reason
    world.restart()
    settle(world)
    assert len(launched(world)) == 3, "retraining gives the same bytes, so the successor is a hit"
    assert world.status.is_true("Complete")
    assert (world.status.stages[stage].cache, world.status.stages[stage].reason) == (
        "Miss",
        "Miss: its artifact is gone",
    )


def test_a_failed_chain_does_not_retry_because_an_earlier_artifact_vanished() -> None:
    world = until_live_in(World(2), "b")
    world.end(F.USER_ERROR)
    rest(world)
    world.hurt(0, None)
    settle(world)
    world.artifacts[world.trainers["family-a-a1"].digest] = "whole"
    settle(world)
    assert len(launched(world)) == 2 and states(world) == ["Succeeded", "Failed"]
    assert world.status.stages[1].reason.startswith("UserError")


def test_a_predecessor_whose_artifact_vanished_is_trained_first() -> None:
    world = until_live_in(World(3), "b")
    world.hurt(0, None)
    settle(world)
    assert launched(world) == [
        "family-a-a1",
        "family-b-a1",
        "family-a-a2",
        "family-b-a2",
        "family-c-a1",
    ]


def test_after_a_lost_status_no_name_is_reused() -> None:
    world = until_live_in(World(2), "b")
    world.lose_status()
    settle(world)
    assert launched(world) == ["family-a-a1", "family-b-a1", "family-b-a2"]
    assert [a.name for a in world.status.stages[1].attempts] == ["family-b-a2"], (
        "an old last word is never read as a new attempt's"
    )
    assert world.status.stages[0].macs == 1000, (
        "all that is known of earlier work is the artifact's own record"
    )


def test_a_stage_that_was_dropped_and_comes_back() -> None:
    world = until_live_in(World(2), "b")
    world.drop_last_stage()
    settle(world)
    assert [s.name for s in world.status.stages] == ["a"] and world.status.is_true("Complete")
    world.drop_last_stage()
    settle(world)
    assert launched(world) == ["family-a-a1", "family-b-a1", "family-b-a2"]


def test_a_renamed_stage_is_not_retrained() -> None:
    world = settle(World(2))
    world.edit(**{"spec.stages[0].name": "tiny"})
    settle(world)
    assert len(launched(world)) == 2 and [s.cache for s in world.status.stages] == ["Hit", "Hit"]


def test_the_history_is_bounded_and_the_ledger_loses_nothing() -> None:
    world = World(1)
    world.edits["spec.retry.maxDisruptions"] = 50
    for _ in range(25):
        until_live(world)
        world.train()
        world.end(F.PREEMPTED)
        rest(world)
    stage = world.status.stages[0]
    assert len(stage.attempts) == 10 and stage.attempt_count == 26 and stage.macs == 250
    assert stage.retried == {F.PREEMPTED: 25}


def test_a_stage_fails_after_999_attempts() -> None:
    stage = StageStatus(name="a", attempt_count=999)
    world = World(1, status=ChainStatus(stages=[stage]))
    settle(world)
    assert states(world) == ["Failed"] and "999 attempts" in world.status.stages[0].reason


def test_allocated_epochs_stay_as_they_were_at_the_first_launch() -> None:
    free = {"spec.stages[1].epochs": None, "spec.allocation.targetAcceleration": "1.5"}
    world = World(2)
    world.edits |= free
    until_live(world)
    before = world.status.stages[1].epochs
    assert not world.status.stages[1].frozen
    world.edit(**{"spec.allocation.targetAcceleration": "1.2"})
    settle(world)
    after = world.status.stages[1].epochs
    assert before is not None and after is not None and after > before, (
        "the stage was not launched yet, so its epochs are allocated anew"
    )
    assert world.status.stages[1].frozen
    world.edit(**{"spec.allocation.targetAcceleration": "1.5"})
    settle(world)
    assert world.status.stages[1].epochs == after and len(launched(world)) == 2


def test_allocated_epochs_are_frozen_while_the_stage_still_trains() -> None:
    world = World(2)
    world.edits |= {"spec.stages[1].epochs": None, "spec.allocation.targetAcceleration": "1.5"}
    until_live_in(world, "b")
    world.edit(**{"spec.allocation.targetAcceleration": "1.2"})
    settle(world)
    assert launched(world) == ["family-a-a1", "family-b-a1"]


# Everything that can happen, in small worlds.

Event = Callable[[World], object]


def faults(world: World) -> Iterator[Event]:
    """Everything that may fail or be requested at this moment."""
    if world.live() is not None:
        yield lambda w: w.end(word=False)
        yield lambda w: (w.train(), w.end(word=False))[-1]
        yield lambda w: w.end(F.PREEMPTED)
        yield lambda w: (w.train(), w.end(F.PREEMPTED))[-1]
        yield lambda w: (w.train(), w.end(F.ERROR))[-1]
        yield lambda w: w.end(F.USER_ERROR)
        yield lambda w: w.end()
        yield lambda w: (w.make_artifact(), w.end(word=False))[-1]
    yield World.restart
    yield World.ask_again
    yield lambda w: w.edit(suspend=not w.suspend)
    yield World.interrupt
    for stage in range(world.stages):
        yield lambda w, i=stage: w.toggle(f"spec.stages[{i}].rerun", "x")  # type: ignore[misc]
        if (
            stage < len(world.status.stages)
            and (world.status.stages[stage].input_digest or "") in world.artifacts
        ):
            yield lambda w, i=stage: w.hurt(i, None)  # type: ignore[misc]
            yield lambda w, i=stage: w.hurt(i, "damaged")  # type: ignore[misc]
    yield World.lose_status
    if world.stages > 1:
        yield World.drop_last_stage


def least(whole: int, part: int) -> float:
    """How many a sample of one in `part` has at least, but for one seed in many thousands."""
    return whole / part - (4 * math.sqrt(whole / part) if part > 1 else 0)


@pytest.mark.parametrize("cluster", [True, False], ids=["cluster", "local"])
@pytest.mark.parametrize(("stages", "budget"), [(1, 2), (2, 1), (3, 1)])
def test_explored_exhaustively(stages: int, budget: int, cluster: bool) -> None:
    dice = Dice(f"{budget} faults in {stages} stages, cluster: {cluster}", 8)
    found, ends = explore(World(stages, cluster=cluster), faults, budget, LONGEST_CALM, dice)
    part = dice.one_in**budget
    assert found > least(1000, part) and ends > least(100, part)


def test_two_faults_in_two_stages_explored_exhaustively() -> None:
    dice = Dice("2 faults in 2 stages", 20)
    found, ends = explore(World(2), faults, 2, LONGEST_CALM, dice)
    part = dice.one_in**2
    assert found > least(50_000, part) and ends > least(5000, part)


# Random histories in larger worlds.


@settings(max_examples=60, deadline=None)
@example(seed=137267, stages=1, cluster=False, backoff=0.0, trouble=15)
@given(
    seed=st.integers(0, 2**32),
    stages=st.integers(1, 3),
    cluster=st.booleans(),
    backoff=st.sampled_from([0.0, 5.0]),
    trouble=st.integers(0, 30),
)
def test_long_random_histories(
    seed: int, stages: int, cluster: bool, backoff: float, trouble: int
) -> None:
    world, chance = World(stages, cluster=cluster, backoff=backoff), random.Random(seed)
    other_edits = [
        ("spec.stages[0].epochs", 21),
        ("spec.stages[0].modelConfig.embed_dim", 48),
        ("spec.transfer.distillation.alpha", "400"),
        ("spec.retry.maxRetries", 0),
        ("spec.runner.queueName", "other"),
    ]
    while trouble:
        world.now += chance.choice([0, 0, 1, 30])
        happens = list(faults(world))
        match chance.randrange(8):
            case 0:
                chance.choice(happens)(world)
                trouble -= 1
            case 1:
                path, value = chance.choice(other_edits)
                world.toggle(path, value)
                trouble -= 1
            case 2 if world.live() is not None:
                world.train(checkpoint=chance.random() < 0.5)
            case 3 if world.live() is not None:
                world.end(chance.choice(list(F)), word=chance.random() < 0.8)
                trouble -= 1
            case 4:
                decision = world.copy().step()
                if isinstance(decision.action, Launch):
                    world.tear_launch(decision)
                trouble -= 1
            case 5 | 6:
                assert world.copy().step() == world.step(), "`decide` is deterministic"
            case _:
                if not world.calm_step():
                    world.check_rest()
                    trouble -= 1
    settle(world)
    if not world.status.is_true("Complete"):
        world.artifacts = dict.fromkeys(world.artifacts, "whole")
        world.restart()
        world.ask_again()
        world.edit(suspend=False)
        settle(world)
    assert world.status.is_true("Complete"), "a retry without further faults completes the chain"
