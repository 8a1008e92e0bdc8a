"""`modelchain plan --budget`: whether a plan fits into the budget."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import modelchain
from specs import MINIMAL, with_changes

POOLS = {
    "nodePools": {
        "lab": {
            "gpu": "A100",
            "gpusPerNode": 8,
            "price": {"perGpuHour": "2.50", "currency": "EUR", "source": "a contract"},
        },
        "other": {"gpu": "H200", "gpusPerNode": 8},
    }
}
RUNNER = {"kind": "PyTorchJob", "nodePool": "lab", "image": f"lab/trainer@sha256:{'0' * 64}"}
STORAGE = {"claimTemplate": {"size": "1Gi"}}


def planned(folder: Path, *words: str, **changes: Any) -> tuple[int, str, str]:
    on = {"spec.runner": RUNNER, "spec.storage": STORAGE, "spec.data.volume": {"claimName": "d"}}
    chain = with_changes({**on, **changes}, MINIMAL)
    (folder / "chain.yaml").write_text(yaml.safe_dump(chain))
    (folder / "pools.yaml").write_text(yaml.safe_dump(POOLS))
    command = ["plan", "-f", "chain.yaml", "--pools", "pools.yaml", *words]
    done = modelchain(*command, folder=folder)
    return done.returncode, done.stdout, done.stderr


def total(folder: Path) -> tuple[Decimal, Decimal]:
    """GPU hours and cost of the chain, by its plan."""
    code, out, err = planned(folder, "-o", "json")
    assert code == 0, err
    amount = json.loads(out)["total"]
    return Decimal(str(amount["gpuHours"])), Decimal(amount["cost"])


@pytest.mark.parametrize("field", ["gpuHours", "cost"])
def test_at_the_limit_and_beyond_it(field: str, tmp_path: Path) -> None:
    needed = total(tmp_path)[field == "cost"]
    for limit, expected in ((needed + 1, 0), (needed / 2, 1)):
        budget = {"spec.budget": {field: f"{limit:.6f}"}}
        code, out, err = planned(tmp_path, "--budget", **budget)
        assert code == expected, err
        assert "vit-s" in out, "the plan is shown in any case"
        assert (f"spec.budget.{field} allows" in err) is bool(expected)


def test_baselines_count(tmp_path: Path) -> None:
    hours, _ = total(tmp_path)
    budget = {"spec.budget": {"gpuHours": f"{hours + 1:.6f}"}}
    gate = {
        "spec.gate": {"metric": "top1", "train": ["vit-s"]},
        "spec.evaluation": [{"name": "top1", "kind": "Retrieval", "shards": "/data/val.tar"}],
    }
    assert planned(tmp_path, "--budget", **budget)[0] == 0
    assert planned(tmp_path, "--budget", **budget, **gate)[0] == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "spec.budget: is not given"),
        (
            {"spec.budget": {"cost": "1"}, "spec.runner": {**RUNNER, "nodePool": "other"}},
            "spec.budget.cost: the plan knows no price",
        ),
        (
            {"spec.budget": {"gpuHours": "1"}, "spec.runner": {**RUNNER, "nodePool": "other"}},
            "spec.budget.gpuHours: the plan knows no GPU hours",
        ),
    ],
)
def test_what_a_plan_cannot_tell(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    code, _, err = planned(tmp_path, "--budget", **changes)
    assert code == 2 and told in err and err.count("\n") == 1


def test_it_goes_with_a_plan_alone(tmp_path: Path) -> None:
    code, _, err = planned(tmp_path, "--budget", "--against", "chain.yaml")
    assert code == 2 and "leave out --against" in err
