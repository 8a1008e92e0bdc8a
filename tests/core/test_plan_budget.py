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


def planned(
    folder: Path, *words: str, pools: dict[str, Any] | None = POOLS, **changes: Any
) -> tuple[int, str, str]:
    on = {"spec.runner": RUNNER, "spec.storage": STORAGE, "spec.data.volume": {"claimName": "d"}}
    chain = with_changes({**on, **changes}, MINIMAL)
    (folder / "chain.yaml").write_text(yaml.safe_dump(chain))
    (folder / "pools.yaml").write_text(yaml.safe_dump(pools))
    known = [] if pools is None else ["--pools", "pools.yaml"]
    done = modelchain("plan", "-f", "chain.yaml", *known, *words, folder=folder)
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
        unit = "EUR" if field == "cost" else "GPU hours"
        assert (f"{needed:,.2f} {unit}, and" in err) is bool(expected)


def test_a_script_sees_why_a_plan_does_not_fit(tmp_path: Path) -> None:
    """The sum of the chain and of the baselines is what the message says."""
    gate = {
        "spec.gate": {"metric": "top1", "train": ["vit-s"]},
        "spec.evaluation": [{"name": "top1", "kind": "Retrieval", "shards": "/data/val.tar"}],
    }
    code, out, err = planned(
        tmp_path, "--budget", "-o", "json", **gate, **{"spec.budget": {"cost": "1"}}
    )
    document = json.loads(out)
    [baseline] = document["baselines"]
    alone = document["stages"][1]["individual"]
    assert code == 1 and baseline == {"name": "vit-s", **alone}
    needed = Decimal(document["total"]["cost"]) + Decimal(baseline["cost"])
    assert f"the plan needs {needed:,.2f} EUR" in err


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


def _pool(gpu: str = "A100", **prices: Any) -> dict[str, Any]:
    return {"nodePools": {"lab": {"gpu": gpu, "gpusPerNode": 8, **prices}}}


_PRICE = {"perGpuHour": "2.50", "currency": "EUR", "source": "a contract"}
LATER = [{**_PRICE, "validFrom": "9999-12-31"}, {**_PRICE, "validFrom": "9998-02-01"}]
LOCAL = {"spec.runner": {"kind": "Local", "nodePool": "lab"}}
UNNAMED = {"spec.runner": {key: value for key, value in RUNNER.items() if key != "nodePool"}}
CAUSES: dict[str, tuple[dict[str, Any] | None, dict[str, Any], str]] = {
    "a price to come": (
        _pool(prices=LATER),
        {},
        "no price: the first one of node pool lab holds from 9998-02-01 on",
    ),
    "an empty list": (_pool(prices=[]), {}, "no price: node pool lab has none"),
    "a pool that is not in the file": (
        _pool(),
        {"spec.runner": {**RUNNER, "nodePool": "v100"}},
        "no price: v100 is no node pool that the plan knows; it knows lab",
    ),
    "another GPU": (
        _pool("H200", price=_PRICE),
        {},
        "no GPU hours of this runner's node pool: they are known only for A100, and lab has H200",
    ),
    "a laptop": (_pool(price=_PRICE), LOCAL, "no price: spec.runner.kind is Local, which has no"),
    "no pool": (_pool(price=_PRICE), UNNAMED, "no price: spec.runner.nodePool is not given"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_true_cause_of_an_unknown_cost(name: str, tmp_path: Path) -> None:
    pools, changes, told = CAUSES[name]
    budget = {"spec.budget": {"cost": "1"}}
    code, _, err = planned(tmp_path, "--budget", pools=pools, **budget, **changes)
    assert code == 2 and f"spec.budget.cost: the plan knows {told}" in err
    assert "--pools" not in err, "it was given"


def test_without_a_file_of_pools_it_is_asked_for(tmp_path: Path) -> None:
    budget = {"spec.budget": {"cost": "1"}}
    for name in ("lab", "a100-80gb"):
        on = {"spec.runner": {**RUNNER, "nodePool": name}}
        code, _, err = planned(tmp_path, "--budget", pools=None, **budget, **on)
        assert code == 2 and err.endswith("; name the node pools with --pools\n")
    code, _, err = planned(tmp_path, "--budget", pools=None, **budget, **LOCAL)
    assert code == 2 and "--pools" not in err


def test_it_goes_with_a_plan_alone(tmp_path: Path) -> None:
    code, _, err = planned(tmp_path, "--budget", "--against", "chain.yaml")
    assert code == 2 and "leave out --against" in err
