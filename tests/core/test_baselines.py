"""`gate.train`: models that are trained alone, once, before the verdict on their stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import exploration
import pytest
from exploration import explore
from simulation import World
from specs import DELETE
from sweeps import Dice, sample

from modelchain.api.contracts import FailureClass
from modelchain.api.reasons import Code
from modelchain.api.spec import ModelChain
from modelchain.api.status import State
from modelchain.identity.digest import digest_of, stage_inputs

GATE = {"spec.gate.metric": "top1", "spec.gate.train": ("b", "c")}


def measured(inputs: Mapping[str, Any]) -> dict[str, float]:
    """A model trained alone reaches 60, and a stage of the chain 59.8."""
    return {"top1": 59.8 if "predecessor" in inputs else 60.0}


def world(stages: int = 3, cluster: bool = True, **edits: Any) -> World:
    return World(stages, cluster=cluster, edits={**GATE, **edits}, metrics_of=measured)


def settle(chain: World) -> World:
    return exploration.settle(chain, 200)


def until(chain: World, name: str) -> World:
    for _ in range(200):
        if chain.live() == f"family-{name}":
            return chain
        chain.calm_step()
    raise AssertionError(f"{name} was not launched")


def trained(chain: World) -> list[str]:
    return [name.removeprefix("family-") for name in chain.trainers]


def verdicts(chain: World) -> list[str]:
    return [str(s.gate.verdict) if s.gate else "" for s in chain.status.stages]


@pytest.mark.parametrize("cluster", [True, False])
def test_a_baseline_runs_before_its_own_stage(cluster: bool) -> None:
    chain = settle(world(cluster=cluster))
    assert trained(chain) == ["a-a1", "b-b1", "b-a1", "c-b1", "c-a1"]
    assert chain.status.is_true("Complete")
    assert verdicts(chain) == ["Ungated", "Passed", "Passed"]
    gate = chain.status.stages[1].gate
    assert gate is not None and (gate.baseline, gate.difference) == ("60.00", "-0.20")
    rows = chain.status.baselines
    assert [row.name for row in rows] == ["b", "c"]
    assert [row.state for row in rows] == [State.SUCCEEDED] * 2
    assert [row.epochs for row in rows] == [32, 32] and not any(row.frozen for row in rows)


def test_a_baseline_has_a_ledger_of_its_own() -> None:
    chain = settle(world())
    for row in chain.status.baselines:
        [mine] = [t.macs for t in chain.trainers.values() if t.alone and t.stage == row.name]
        assert row.macs == row.spent.macs == mine > 0
    of_the_chain = sum(t.macs for t in chain.trainers.values() if not t.alone)
    assert chain.status.total.macs == of_the_chain


def test_a_baseline_has_the_digest_of_a_chain_with_this_model_alone() -> None:
    chain = settle(world())
    for index, row in zip((1, 2), chain.status.baselines, strict=True):
        body = chain.chain().model_dump(mode="json", by_alias=True, exclude_unset=True)
        body["spec"]["stages"] = [body["spec"]["stages"][index]]
        alone = ModelChain.model_validate(body).spec
        inputs = stage_inputs(alone, 0, epochs=32, fingerprint=None, predecessor=None)
        assert row.input_digest == digest_of(inputs)


def test_while_a_baseline_trains_its_stage_says_so() -> None:
    chain = until(world(), "b-b1")
    chain.step()
    stage = chain.status.stages[1]
    assert stage.code is Code.WAITS_FOR_BASELINE and stage.state is State.PENDING
    reconciling = chain.status.condition("Reconciling")
    assert reconciling is not None and reconciling.reason == Code.WAITS_FOR_BASELINE
    assert chain.status.baselines[0].state in (State.STARTING, State.RUNNING)


def test_a_baseline_that_exists_is_not_trained_again() -> None:
    chain = settle(world())
    chain.lose_status()
    settle(chain)
    assert len(chain.trainers) == 5 and verdicts(chain) == ["Ungated", "Passed", "Passed"]
    assert [row.cache for row in chain.status.baselines] == ["Hit", "Hit"]
    assert [stage.epochs for stage in chain.status.stages] == [20, 20, 20]


@pytest.mark.parametrize("miss", ["Stop", "Continue"])
def test_two_baselines_that_are_due_at_once(miss: str) -> None:
    """After an edit of a finished chain. The world asserts that one attempt runs at a time."""
    chain = settle(world(**{"spec.gate.onMiss": miss}))
    chain.edit(**{"spec.recipe.baselineEpochs": 40})
    settle(chain)
    assert trained(chain)[-2:] == ["b-b2", "c-b2"]
    assert chain.status.is_true("Complete")
    chain.edit(**{"spec.recipe.baselineEpochs": 48, "spec.stages[2].rerun": "again"})
    settle(chain)
    assert trained(chain)[-3:] == ["b-b3", "c-b3", "c-a2"]
    assert chain.status.is_true("Complete")


def test_a_baseline_that_is_added_stops_nothing() -> None:
    """The stage that runs goes on; then the baseline runs, and then the next stage."""
    chain = until(world(**{"spec.gate.train": ("c",)}), "b-a1")
    chain.train()
    chain.edit(**{"spec.gate.train": ("b", "c")})
    settle(chain)
    assert trained(chain) == ["a-a1", "b-a1", "b-b1", "c-b1", "c-a1"]
    assert not any(trainer.asked_to_stop for trainer in chain.trainers.values())
    assert chain.status.is_true("Complete")


def test_a_baseline_that_is_added_to_a_finished_chain() -> None:
    chain = settle(world(**{"spec.gate.train": ()}))
    assert verdicts(chain) == ["Ungated"] * 3
    chain.edit(**{"spec.gate.train": ("c",)})
    settle(chain)
    assert trained(chain) == ["a-a1", "b-a1", "c-a1", "c-b1"]
    assert chain.status.is_true("Complete") and verdicts(chain)[2] == "Passed"


def test_a_baseline_resumes_after_disruptions() -> None:
    """Also one of a chain whose stages have all finished."""
    chain = settle(world(**{"spec.gate.train": ()}))
    chain.edit(**{"spec.gate.train": ("c",)})
    until(chain, "c-b1").train()
    chain.end(FailureClass.PREEMPTED)
    settle(chain)
    assert trained(chain)[3:] == ["c-b1", "c-b2"] and chain.trainers["family-c-b2"].began_at == 1
    assert chain.status.is_true("Complete")


def test_a_baseline_that_fails_holds_its_stage() -> None:
    chain = until(world(), "b-b1")
    chain.end(FailureClass.USER_ERROR)
    for _ in range(20):
        chain.calm_step()
    assert trained(chain) == ["a-a1", "b-b1"]
    stalled = chain.status.condition("Stalled")
    assert stalled is not None and stalled.reason == Code.BASELINE_FAILED
    assert chain.status.baselines[0].state is State.FAILED
    chain.ask_again()
    assert settle(chain).status.is_true("Complete")
    assert trained(chain) == ["a-a1", "b-b1", "b-b2", "b-a1", "c-b1", "c-a1"]


def test_a_given_accuracy_ends_a_baseline_that_failed() -> None:
    chain = until(world(), "b-b1")
    chain.end(FailureClass.USER_ERROR)
    for _ in range(20):
        chain.calm_step()
    chain.edit(**{"spec.gate.train": ("c",), "spec.gate.baseline.b": "60"})
    settle(chain)
    assert trained(chain) == ["a-a1", "b-b1", "b-a1", "c-b1", "c-a1"]
    assert verdicts(chain) == ["Ungated", "Passed", "Passed"]


def test_a_baseline_that_is_not_asked_for_any_more_stops() -> None:
    chain = until(world(), "b-b1")
    chain.train()
    chain.edit(**{"spec.gate": DELETE})
    settle(chain)
    assert chain.trainers["family-b-b1"].asked_to_stop
    assert trained(chain) == ["a-a1", "b-b1", "b-a1", "c-a1"]
    [row] = chain.status.baselines
    assert row.macs == chain.trainers["family-b-b1"].macs, "what it spent stays"


def test_a_chain_is_suspended_while_a_baseline_trains() -> None:
    chain = until(world(), "b-b1")
    chain.train()
    chain.edit(suspend=True)
    settle(chain)
    assert chain.trainers["family-b-b1"].asked_to_stop and chain.status.is_true("Suspended")
    chain.edit(suspend=False)
    settle(chain)
    assert trained(chain) == ["a-a1", "b-b1", "b-b2", "b-a1", "c-b1", "c-a1"]


def _edits(chain: World) -> Iterator[Callable[[World], object]]:
    yield lambda w: w.toggle("spec.gate", DELETE)
    for stages in ((), ("b",), ("b", "c")):
        yield lambda w, s=stages: w.edit(**{"spec.gate.train": s})
    yield lambda w: w.toggle("spec.stages[0].rerun", "again")
    yield lambda w: w.edit(suspend=not w.suspend)
    yield World.lose_status
    yield World.restart
    if chain.live() is not None:
        yield World.train
        yield World.end
        yield lambda w: w.end(FailureClass.PREEMPTED)
        yield lambda w: w.end(word=False)


@pytest.mark.parametrize("cluster", [True, False])
def test_edits_at_every_moment(cluster: bool) -> None:
    """The world asserts at every launch that one attempt runs at a time, and in which order."""
    dice = Dice(f"edits of baselines, cluster: {cluster}", 16)
    found, rests = explore(world(cluster=cluster), _edits, 1, longest_calm=120, dice=dice)
    assert found > 50 and rests > 1


@pytest.mark.parametrize("cluster", [True, False])
def test_the_same_end_after_a_loss_at_any_moment(cluster: bool) -> None:
    count, chain = 0, world(cluster=cluster)
    while chain.calm_step():
        count += 1
    for moment in sample("the status is lost while baselines train", list(range(count)), 4):
        chain = world(cluster=cluster)
        for _ in range(moment):
            chain.calm_step()
        chain.lose_status()
        settle(chain)
        assert chain.status.is_true("Complete")
        assert verdicts(chain) == ["Ungated", "Passed", "Passed"]


# `run --alone STAGE`: this baseline and nothing else.


def run_alone(chain: World, stage: str) -> World:
    """The command runs until nothing is left to do, and then the user starts a run of the chain."""
    chain.only = stage
    chain.restart()
    for _ in range(100):
        if not chain.calm_step():
            break
    assert not chain.observed().live
    chain.only = None
    chain.restart()
    return chain


@pytest.mark.parametrize("edits", [GATE, {}], ids=["gate", "no gate"])
def test_a_baseline_alone_is_what_the_gate_trains(edits: dict[str, Any]) -> None:
    """It trains before the chain. The chain then finds it, also if its gate is added later."""
    chain = run_alone(World(3, edits=dict(edits), metrics_of=measured), "c")
    assert trained(chain) == ["c-b1"]
    [row] = [row for row in chain.status.baselines if row.name == "c"]
    assert row.state is State.SUCCEEDED
    chain.edit(**GATE)
    assert trained(settle(chain)) == ["c-b1", "a-a1", "b-b1", "b-a1", "c-a1"]
    assert verdicts(chain) == ["Ungated", "Passed", "Passed"]


def test_a_baseline_alone_in_the_root_of_a_finished_chain() -> None:
    chain = settle(World(3, edits={}, metrics_of=measured))
    done = chain.status.stages
    run_alone(chain, "b")
    assert trained(chain)[3:] == ["b-b1"]
    assert [s.artifact for s in chain.status.stages] == [s.artifact for s in done]
    settle(chain)
    assert len(chain.trainers) == 4 and chain.status.is_true("Complete")
    assert [row.name for row in chain.status.baselines] == ["b"], "what it spent stays"


def test_a_baseline_alone_resumes_also_in_the_root_of_a_finished_chain() -> None:
    """A finished chain starts no work unasked, but this was asked for."""
    chain = settle(World(3, edits={}, metrics_of=measured))
    chain.only = "b"
    chain.restart()
    until(chain, "b-b1")
    chain.train()
    chain.end(FailureClass.PREEMPTED)
    run_alone(chain, "b")
    assert trained(chain)[3:] == ["b-b1", "b-b2"]
    assert chain.status.baselines[0].state is State.SUCCEEDED


def test_the_first_stage_alone_is_the_first_stage() -> None:
    chain = run_alone(World(2, edits={"spec.stages[0].epochs": DELETE}), "a")
    assert trained(settle(chain)) == ["a-b1", "b-a1"]


def test_a_baseline_alone_stops_nothing_for_good() -> None:
    """A run was killed while stage b trained. Its attempt resumes after the baseline."""
    chain = world(cluster=False, **{"spec.gate.train": ("b",)})
    until(chain, "b-a1")
    chain.train()
    chain.end(word=False)
    run_alone(chain, "c")
    assert trained(chain) == ["a-a1", "b-b1", "b-a1", "c-b1"]
    assert chain.status.stages[1].attempts[-1].failure is None, "no budget is charged"
    assert trained(settle(chain))[4:] == ["b-a2", "c-a1"]
    assert chain.trainers["family-b-a2"].began_at == 1


@pytest.mark.parametrize("stage", ["a", "b", "c"])
def test_a_baseline_alone_at_every_moment(stage: str) -> None:
    """Whatever the chain has done before, the same end follows, and nothing is trained twice."""
    count, chain = 0, world(cluster=False)
    while chain.calm_step():
        count += 1
    for moment in sample(f"{stage} is trained alone", list(range(count)), 6):
        chain = world(cluster=False)
        for _ in range(moment):
            chain.calm_step()
        if chain.live() is not None:
            chain.end(word=False)
        run_alone(chain, stage)
        assert chain.status.baselines or stage == "a"
        settle(chain)
        assert verdicts(chain) == ["Ungated", "Passed", "Passed"]
        done = [t.digest for t in chain.trainers.values() if t.word and not t.word.failure]
        assert len(done) == len(set(done)), "nothing is trained twice"


def test_the_first_model_alone_is_the_first_stage_and_is_counted_once() -> None:
    all_epochs = {"spec.stages[0].epochs": 32}
    chain = settle(World(2, edits=all_epochs, metrics_of=measured))
    run_alone(chain, "a")
    (row,) = chain.status.baselines
    assert row.state is State.SUCCEEDED and trained(chain) == ["a-a1", "b-a1"]
    assert row.macs == 0 and chain.status.stages[0].macs > 0
