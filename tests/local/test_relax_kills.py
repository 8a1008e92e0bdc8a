"""The quickstart's chain with a target that it cannot reach: everything is killed at any moment,
and the same command reaches the same end. The trainer is played; see played.py.
"""

from __future__ import annotations

import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from played import PICTURES, Killed, Moments, run
from sweeps import sample

from modelchain.api.contracts import Task
from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus, GateVerdict

REPOSITORY = Path(__file__).parents[2]
METRIC = "digits-top1"


def quickstart(**gate: Any) -> ModelChain:
    """The quickstart with a gate; a target allocates the epochs of its successors."""
    chain = yaml.safe_load((REPOSITORY / "examples" / "quickstart.yaml").read_text())
    for stage in chain["spec"]["stages"][1:]:
        del stage["epochs"]
    chain["spec"]["allocation"] = {"targetAcceleration": "2.65"}
    gate = {"metric": METRIC, "train": ["medium", "large"], "onMiss": "Relax", **gate}
    chain["spec"]["gate"] = {"relaxation": {"factor": "1.5", "maxRounds": 8}, **gate}
    return ModelChain.model_validate(chain)


def accuracy(task: Task) -> float:
    """Medium needs 9 epochs to be as good as alone. Large never is, whatever is spent on it."""
    points = {"small": 96.3, "medium": 96.6, "large": 97.5}[task.stage]
    if task.predecessor is None:
        return points
    return points - (2.0 if task.stage == "large" else max(0, 9 - task.inputs["epochs"]) / 2)


def end(status: ChainStatus) -> dict[str, Any]:
    """What must not depend on what happened on the way."""
    stages = [
        stage.model_dump(
            include={"name", "epochs", "round", "first_epochs", "results", "gate", "artifact"}
        )
        for stage in (*status.stages, *status.baselines)
    ]
    stalled = status.condition("Stalled")
    return {
        "stages": stages,
        "rounds": [one.model_dump() for one in status.rounds],
        "reason": stalled and stalled.reason,
    }


def by_hand(root: Path, digest: str | None) -> Decimal:
    """The accuracy that the trainer wrote into the artifact of these inputs."""
    results = json.loads((root / str(digest) / "artifact" / "results.json").read_text())
    return Decimal(f"{results['final']['metrics'][METRIC]:.2f}")


def check_verdicts(chain: ModelChain, root: Path, status: ChainStatus) -> None:
    """A verdict follows from two files and the tolerance."""
    assert chain.spec.gate is not None
    alone = {row.name: by_hand(root, row.input_digest) for row in status.baselines}
    for stage in status.stages[1:]:
        difference = by_hand(root, stage.input_digest) - alone[stage.name]
        missed = difference < -Decimal(chain.spec.gate.tolerance)
        assert stage.gate is not None and stage.gate.difference == f"{difference}"
        assert (stage.gate.verdict is GateVerdict.MISSED) == missed
        share = float(stage.gate.result or 0) / 100
        error = 100 * (share * (1 - share) / PICTURES) ** 0.5
        assert stage.gate.standard_error == f"{error:.2f}"


def undisturbed(root: Path) -> tuple[ChainStatus, Counter[str], int]:
    """The end, how often each model was trained, and the number of moments."""
    moments, trained = Moments(), Counter[str]()
    return run(quickstart(), root, moments, accuracy, trained), trained, moments.count


def test_a_target_that_cannot_be_reached(tmp_path: Path) -> None:
    """Medium relaxes once, large until it has all of baselineEpochs; then a person decides."""
    status, trained, _ = undisturbed(tmp_path)
    check_verdicts(quickstart(), tmp_path, status)
    small, medium, large = status.stages
    assert [str(s.gate.verdict) for s in (small, medium, large) if s.gate] == [
        "Ungated",
        "Passed",
        "Missed",
    ]
    assert (small.epochs, medium.epochs, large.epochs) == (18, 9, 18)
    assert [(one.stage, one.epochs) for one in status.rounds] == [
        ("medium", 9),
        ("large", 9),
        ("large", 14),
        ("large", 18),
    ]
    assert end(status)["reason"] == "GateMissed" and "differ" not in large.reason
    assert set(trained.values()) == {1}
    assert len(trained) == 1 + 2 + 2 + 4, (
        "small; medium twice and alone; large four times and alone"
    )
    spent = sum(stage.macs for stage in status.stages)
    assert status.total.macs == spent, "the schedules that missed are in the ledger"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("lost", [False, True], ids=["status kept", "status lost"])
def test_killed_at_any_moment_it_reaches_the_same_end(
    tmp_path_factory: pytest.TempPathFactory, lost: bool
) -> None:
    """A moment is before and after each write, each action, and each step of a trainer."""
    status, models, count = undisturbed(tmp_path_factory.mktemp("undisturbed"))
    expected = end(status)
    assert count > 100
    for moment in sample(f"all is killed, lost: {lost}", list(range(1, count + 1)), 6):
        root, trained = tmp_path_factory.mktemp("killed"), Counter[str]()
        with pytest.raises(Killed):
            run(quickstart(), root, Moments(moment), accuracy, trained)
        if lost:
            (root / "status.json").unlink(missing_ok=True)
        status = run(quickstart(), root, Moments(), accuracy, trained)
        assert end(status) == expected, f"killed at moment {moment} of {count}"
        assert trained == models, "the same models, each of them once"
        check_verdicts(quickstart(), root, status)


@pytest.mark.timeout(3600)
def test_killed_at_many_moments_it_reaches_the_same_end(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Every command is killed a little later than the one before, until one is not."""
    status, models, _ = undisturbed(tmp_path_factory.mktemp("undisturbed"))
    for last in sample("all is killed again and again", list(range(6, 26)), 2):
        root, trained = tmp_path_factory.mktemp("killed"), Counter[str]()
        for more in range(100):
            try:
                done = run(quickstart(), root, Moments(last + more), accuracy, trained)
                break
            except Killed:
                continue
        assert end(done) == end(status) and trained == models


def test_another_gate_goes_on_without_training(tmp_path: Path) -> None:
    status, trained, _ = undisturbed(tmp_path)
    models = trained.copy()
    for gate in ({"tolerance": "2"}, {"onMiss": "Continue"}):
        accepted = run(quickstart(**gate), tmp_path, Moments(), accuracy, trained)
        assert accepted.is_true("Complete") and trained == models
        assert [s.artifact for s in accepted.stages] == [s.artifact for s in status.stages]
    refused = run(quickstart(tolerance="1.99"), tmp_path, Moments(), accuracy, trained)
    assert end(refused)["reason"] == "GateMissed" and trained == models


@pytest.mark.parametrize("first", ["alone", "chain"])
def test_alone_and_in_the_chain_it_is_one_training(tmp_path: Path, first: str) -> None:
    models = undisturbed(tmp_path / "other")[1]
    trained = Counter[str]()
    for only in ["large", None] if first == "alone" else [None, "large"]:
        status = run(quickstart(), tmp_path / "root", Moments(), accuracy, trained, only)
    assert trained == models and len(status.baselines) == 2
