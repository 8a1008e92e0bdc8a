"""`modelchain plan --against` names the stages that then retrain, and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import modelchain
from exploration import settle
from simulation import World, weights_of
from specs import DELETE, MINIMAL, with_changes
from sweeps import sample

from modelchain.api.spec import ModelChain
from modelchain.decide.change import (
    TRAINS,
    Before,
    Effect,
    StageChange,
    as_found_by,
    changes,
    finished,
)
from modelchain.decide.observed import Artifact
from modelchain.errors import InputError
from modelchain.io.load import parse

GATE = {"spec.gate.metric": "top1", "spec.gate.train": ("c",), "spec.gate.onMiss": "Continue"}
# Edits, each by paths of the spec.
EDITS: list[dict[str, Any]] = [
    {},
    {"spec.recipe.seed": 7},
    {"spec.recipe.weightDecay": "0.3"},
    {"spec.recipe.warmupSteps.first": 40},
    {"spec.recipe.warmupSteps.successors": 20},
    {"spec.recipe.microBatchSize": 64},
    {"spec.recipe.baselineEpochs": 40},
    {"spec.transfer.distillation.alpha": "3"},
    {"spec.transfer.width": "Released"},
    {"spec.data.train.samples": 90_000},
    {"spec.data.train.captionsPerSample": 2},
    {"spec.stages[0].rerun": "again"},
    {"spec.stages[1].rerun": "again"},
    {"spec.stages[2].rerun": "again"},
    {"spec.stages[0].epochs": 24},
    {"spec.stages[1].epochs": 24},
    {"spec.stages[2].epochs": 24},
    {"spec.stages[2].name": "renamed", "spec.gate.train": ("renamed",)},
    {"spec.gate": DELETE},
    {"spec.gate.tolerance": "5"},
    {"spec.gate.train": ("b", "c")},
    {"spec.evaluation[0].name": "another", "spec.gate.metric": "another"},
    {"spec.retry.maxRetries": 9},
    {"spec.retry.maxDisruptions": 7},
    {"stages": 4},
    {"stages": 2, "spec.gate.train": ("b",)},
]


def world() -> World:
    return World(3, cluster=True, edits=dict(GATE))


def edited(chain: World, edit: Mapping[str, Any]) -> World:
    paths = {path: value for path, value in edit.items() if path != "stages"}
    chain.stages = edit.get("stages", chain.stages)
    gone = [path for path in chain.edits if not _exists(path, chain.stages)]
    for path in gone:
        del chain.edits[path]
    paths = {path: value for path, value in paths.items() if _exists(path, chain.stages)}
    chain.edit(**paths)
    return chain


def _exists(path: str, stages: int) -> bool:
    """Whether a path is that of a stage of the chain, or of none."""
    return not any(path.startswith(f"spec.stages[{index}]") for index in range(stages, 4))


def before(chain: World) -> Before:
    whole = [digest for digest in chain.artifacts if chain.artifact_is_whole(digest)]
    artifacts = {d: Artifact(weights_of(d), f"{d}/artifact", 1, metrics={}) for d in whole}
    rows = chain.status
    names = frozenset(stage.name for stage in rows.stages)
    alone = frozenset(row.name for row in rows.baselines)
    return Before(rows, artifacts, chain.inputs, names, alone)


def trains(found: list[StageChange]) -> set[tuple[str, bool]]:
    return {(change.stage, change.alone) for change in found if change.effect in TRAINS}


def pairs() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every edit, and every two edits after each other, of which some are drawn."""
    return [(first, second) for first in EDITS for second in EDITS]


def _paths(edits: tuple[dict[str, Any], dict[str, Any]]) -> str:
    first, second = (" ".join(sorted(edit)) for edit in edits)
    return f"{first}, {second}"


@pytest.mark.parametrize("edits", sample("edits of a chain", pairs(), 16), ids=_paths)
def test_what_is_named_is_what_trains(edits: tuple[dict[str, Any], dict[str, Any]]) -> None:
    first, second = edits
    chain = settle(edited(settle(world(), 300), first), 300)
    known, done, old = before(chain), set(chain.trainers), chain.chain()
    edited(chain, second)
    named = trains(changes(chain.chain(), known))
    by_file = trains(changes(chain.chain(), finished(old)))
    settle(chain, 300)
    launched = {(t.stage, t.alone) for n, t in chain.trainers.items() if n not in done}
    assert named == launched
    # A file does not tell what was trained before the edits, which may be hits again.
    assert by_file >= launched


def test_a_stage_that_is_still_to_train_is_not_retrained() -> None:
    chain = world()
    while "family-b-a1" not in chain.trainers:
        chain.calm_step()
    found = changes(chain.chain(), before(chain))
    assert [(c.stage, c.alone, c.effect) for c in found] == [
        ("a", False, Effect.HIT),
        ("b", False, Effect.AS_BEFORE),
        ("c", True, Effect.AS_BEFORE),
        ("c", False, Effect.AS_BEFORE),
    ]
    edited(chain, {"spec.transfer.distillation.alpha": "3"})
    found = changes(chain.chain(), before(chain))
    assert [c.effect for c in found if not c.alone] == [
        Effect.HIT,
        Effect.RETRAINS,
        Effect.AS_BEFORE,
    ]


def test_reasons_name_the_first_cause() -> None:
    chain = settle(world(), 300)
    known = before(chain)
    edited(chain, {"spec.stages[0].rerun": "again", "spec.stages[2].rerun": "again"})
    assert {c.stage: c.why for c in changes(chain.chain(), known) if not c.alone} == {
        "a": "rerun changed",
        "b": "its predecessor is trained again",
        "c": "rerun changed",
    }


def files(folder: Path, **edit: Any) -> tuple[str, str]:
    """The names of two files: a chain, and the same after an edit."""
    for name, chain in (("old.yaml", MINIMAL), ("new.yaml", with_changes(edit))):
        (folder / name).write_text(yaml.safe_dump(chain))
        parse(ModelChain, chain, name)
    return "new.yaml", "old.yaml"


def test_a_document_for_comments(tmp_path: Path) -> None:
    new, old = files(tmp_path, **{"spec.stages[1].epochs": 21})
    words = ("plan", "-f", new, "--against", old, "-o")
    told = json.loads(modelchain(*words, "json", folder=tmp_path).stdout)
    assert [(s["stage"], s["effect"], s["why"]) for s in told["stages"]] == [
        ("vit-t", "Hit", "its artifact exists"),
        ("vit-s", "Retrains", "epochs changed"),
    ]
    assert told["trains"]["macs"] == told["stages"][1]["macs"] > 10**15
    page = modelchain(*words, "markdown", folder=tmp_path)
    assert page.returncode == 0
    assert "|vit-s |Retrains |" in page.stdout and "trains 1 of 2 models" in page.stdout


POOLS = """
nodePools:
  a100-40gb:
    gpu: A100
    gpusPerNode: 8
    price: {perGpuHour: "2.50", currency: EUR, source: contract}
"""


@pytest.mark.parametrize(("output", "title"), [("table", "EUR"), ("markdown", "cost EUR")])
def test_money_has_its_currency(output: str, title: str, tmp_path: Path) -> None:
    (tmp_path / "pools.yaml").write_text(POOLS)
    pool = {"spec.runner.nodePool": "a100-40gb"}
    new, old = files(tmp_path, **pool, **{"spec.stages[1].epochs": 21})
    words = ("plan", "-f", new, "--against", old, "--pools", "pools.yaml", "-o", output)
    page = modelchain(*words, folder=tmp_path).stdout
    *rows, total = page.strip().splitlines()
    assert any(title in row for row in rows) and "cost" in page, page
    assert re.search(r"GPU hours, [0-9.,]+ EUR$", total), total


def test_a_removed_stage_is_named(tmp_path: Path) -> None:
    new, old = files(tmp_path, **{"spec.stages[1]": DELETE})
    words = ("plan", "-f", new, "--against", old, "-o")
    told = modelchain(*words, "markdown", folder=tmp_path)
    assert told.returncode == 3
    assert "\nremoved from the chain: vit-s; their artifacts stay\n" in told.stdout
    assert json.loads(modelchain(*words, "json", folder=tmp_path).stdout)["removed"] == ["vit-s"]


def test_nothing_to_do_is_3(tmp_path: Path) -> None:
    new, old = files(tmp_path, **{"spec.retry.maxRetries": 7})
    done = modelchain("plan", "-f", new, "--against", old, folder=tmp_path)
    assert done.returncode == 3 and "the edit trains nothing" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--against", "absent.yaml"], "absent.yaml: cannot be read"),
        (["--against", "/tmp"], "/tmp: cannot be read: Is a directory"),
        (["--against", "./"], ".: cannot be read: Is a directory"),
        (["--against", "."], ".: cannot be read: Is a directory"),
        (["--against", "./absent"], "absent: cannot be read: No such file"),
        (["--against", "-"], "--against reads no standard input; give a file"),
        (["--against", "old.yaml", "--search"], "leave out --search"),
        (["-n", "vision"], "a plan reads no cluster"),
        (["--against", "Not A Name", "--kubeconfig", "absent"], "absent"),
    ],
)
def test_wrong_words(words: list[str], told: str, tmp_path: Path) -> None:
    new, _ = files(tmp_path)
    done = modelchain("plan", "-f", new, *words, folder=tmp_path)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1


SHARED = {"spec.storage": {"claimName": "models"}}
OWN = {"spec.storage": {"claimTemplate": {"size": "1Ti"}}}


def found(after: dict[str, Any], before: dict[str, Any]) -> set[Effect]:
    """The effects on a chain of which the file of before was edited so."""
    new, old = (parse(ModelChain, with_changes(edit), "a file") for edit in (after, before))
    return {one.effect for one in changes(new, as_found_by(new, old, finished(old)))}


@pytest.mark.parametrize(
    ("after", "before", "effect"),
    [
        (OWN, OWN, Effect.HIT),
        ({"spec.storage": {**OWN["spec.storage"], "retain": False}}, OWN, Effect.HIT),
        ({"metadata.name": "other", **OWN}, OWN, Effect.NEW),
        ({"metadata.name": "other", **SHARED}, SHARED, Effect.HIT),
        ({"metadata.name": "other", **SHARED}, OWN, Effect.NEW),
        ({"metadata.namespace": "b", **SHARED}, {"metadata.namespace": "a", **SHARED}, Effect.NEW),
        ({"metadata.namespace": "b", **OWN}, OWN, Effect.HIT),
    ],
)
def test_a_chain_finds_what_lies_on_its_claim(
    after: dict[str, Any], before: dict[str, Any], effect: Effect
) -> None:
    """Another name or namespace is another chain, with a claim of its own if it makes one."""
    assert found(after, before) == {effect}


@pytest.mark.parametrize(
    "after", [OWN, {}, {"spec.storage": {"claimName": "others"}}], ids=["own", "none", "another"]
)
def test_an_edit_that_the_api_server_refuses(after: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cannot change once set"):
        found(after, SHARED)
