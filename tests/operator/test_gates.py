"""The gate on a cluster: events, records that carry rounds, and baselines as jobs of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, success
from rich.console import Console
from specs import DELETE

from modelchain.api.reasons import Code
from modelchain.api.status import State
from modelchain_operator.api.kube import CHAINS, JOBS, Object
from modelchain_operator.cli.listing import gated_family
from modelchain_operator.reconcile.figures import figures
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS
from modelchain_operator.runners.template import ROLE

EVALUATION = {"name": "top1", "kind": "Retrieval", "shards": "/data/val.tar"}


def gated(lab: Lab, stages: str = "abc", **gate: Any) -> Lab:
    """A chain of which every stage has to reach 50 % or what `gate` says."""
    whole = {"metric": "top1", "baseline": dict.fromkeys(stages[1:], "50"), **gate}
    lab.apply(stages=stages, **{"spec.evaluation": [EVALUATION], "spec.gate": whole})
    lab.passes()
    return lab


def finish(lab: Lab, job: str, percent: float) -> None:
    """The job ends well, with all MACs that its stage takes."""
    macs = lab.stage(index="abc".index(job[0])).planned_macs
    said = {"metrics": {"top1": percent}, "artifact_digest": _hex(job), "macs": macs}
    word = success().model_copy(update=said)
    lab.end(f"family-{job}", word)
    lab.passes(count=2)


def _hex(text: str) -> str:
    return text.encode().hex().ljust(64, "0")


def jobs(lab: Lab) -> list[str]:
    return [name.removeprefix("family-") for name in lab.names(PYTORCHJOBS)]


def verdicts(lab: Lab) -> list[str]:
    return [str(s.gate.verdict) if s.gate else "" for s in lab.status().stages]


def told(lab: Lab, code: Code) -> list[str]:
    return [text for _, reason, text in lab.events.told if reason == code]


def delete(lab: Lab) -> None:
    """The chain and its jobs are deleted, and the operator is started again."""
    lab.drop(CHAINS, "family")
    for job in lab.names(PYTORCHJOBS):
        lab.drop(PYTORCHJOBS, job)
    lab.restart()


def test_a_miss_is_told_and_holds_the_chain() -> None:
    lab = gated(Lab())
    finish(lab, "a-a1", 40)
    finish(lab, "b-a1", 48.5)
    assert jobs(lab) == ["a-a1", "b-a1"] and verdicts(lab) == ["Ungated", "Missed", ""]
    assert told(lab, Code.GATE_MISSED) == [
        "stage b missed its baseline: top1 is 48.50, and 50 if the model is trained alone: 1.50"
        " points less, where 0.5 less are allowed"
    ]
    assert len(told(lab, Code.STAGE_STALLED)) == 1
    lab.restart()
    lab.passes(count=3)
    assert len(told(lab, Code.GATE_MISSED)) == 1 and jobs(lab) == ["a-a1", "b-a1"]
    lab.apply(
        stages="abc",
        **{
            "spec.evaluation": [EVALUATION],
            "spec.gate": {"metric": "top1", "tolerance": "1.5", "baseline": {"b": "50"}},
        },
    )
    lab.passes(count=2)
    assert jobs(lab) == ["a-a1", "b-a1", "c-a1"]


def test_a_miss_that_holds_nothing_is_told() -> None:
    lab = gated(Lab(), onMiss="Continue")
    finish(lab, "a-a1", 40)
    finish(lab, "b-a1", 48.5)
    finish(lab, "c-a1", 51)
    assert lab.status().is_true("Complete") and verdicts(lab) == ["Ungated", "Missed", "Passed"]
    assert len(told(lab, Code.GATE_MISSED)) == 1
    assert any("stage b was trained" in text for text in told(lab, Code.STAGE_SUCCEEDED))
    assert lab.status().summary.gate == "1 Passed, 1 Missed"


def test_a_chain_that_is_applied_again_gets_the_same_verdict() -> None:
    lab = gated(Lab())
    finish(lab, "a-a1", 40)
    finish(lab, "b-a1", 48.5)
    delete(lab)
    lab.apply(
        stages="abc",
        uid="another",
        **{
            "spec.evaluation": [EVALUATION],
            "spec.gate": {"metric": "top1", "baseline": {"b": "50", "c": "50"}},
        },
    )
    lab.passes(count=3)
    assert jobs(lab) == [] and verdicts(lab) == ["Ungated", "Missed", ""]


def test_an_unmeasured_stage_is_measured_before_the_next_one_trains() -> None:
    """Without a gate, an evaluation that was added waits until all stages have been trained."""
    lab = gated(Lab())
    finish(lab, "a-a1", 40)
    lab.end("family-b-a1", success())  # its last word has no metric
    lab.passes(count=3)
    assert verdicts(lab) == ["Ungated", "Unmeasured", ""]
    assert lab.stage(index=1).code is Code.GATE_UNMEASURED
    [job] = [name for name in lab.names(JOBS) if "-eval-" in name]
    assert job.startswith("family-b-eval-"), "of stage a nothing is compared"
    assert jobs(lab) == ["a-a1", "b-a1"]


RELAX: dict[str, Any] = {
    "spec.evaluation": [EVALUATION],
    "spec.stages[1].epochs": DELETE,
    "spec.stages[2].epochs": DELETE,
    "spec.allocation": {"targetAcceleration": "1.5"},
    "spec.gate": {"metric": "top1", "baseline": {"b": "50", "c": "50"}, "onMiss": "Relax"},
}


def rounds(lab: Lab) -> list[tuple[str, int]]:
    return [(one.stage, one.epochs) for one in lab.status().rounds]


def test_a_round_is_told_and_recorded() -> None:
    lab = Lab()
    lab.apply(stages="abc", **RELAX)
    lab.passes()
    finish(lab, "a-a1", 40)
    first = lab.stage(index=1).epochs
    assert first is not None
    finish(lab, "b-a1", 48.5)
    [text] = told(lab, Code.GATE_RELAXED)
    assert "round 1 trains it" in text and jobs(lab) == ["a-a1", "b-a1", "b-a2"]
    finish(lab, "b-a2", 51)
    relaxed = lab.stage(index=1).epochs
    assert rounds(lab) == [("b", relaxed)]
    spec = {r["spec"]["attempt"]: r["spec"] for r in lab.records()}
    assert "round" not in spec["family-b-a1"] and "firstEpochs" not in spec["family-b-a1"]
    known = spec["family-b-a2"]
    assert (known["epochs"], known["round"], known["firstEpochs"]) == (relaxed, 1, first)


def test_a_chain_that_is_applied_again_goes_on_in_its_round() -> None:
    """Its last stage was never trained, and still gets the epochs of the round."""
    lab = Lab()
    lab.apply(stages="abc", **RELAX)
    lab.passes()
    finish(lab, "a-a1", 40)
    finish(lab, "b-a1", 48.5)
    finish(lab, "b-a2", 51)
    before, epochs = rounds(lab), [stage.epochs for stage in lab.status().stages]
    total, relaxed = lab.status().total, lab.status().relaxation
    delete(lab)
    lab.apply(stages="abc", uid="another", **RELAX)
    lab.passes(count=3)
    assert [stage.epochs for stage in lab.status().stages] == epochs
    assert rounds(lab) == before and jobs(lab) == ["c-a1"]
    after = lab.status()
    assert relaxed is not None and after.relaxation is not None and after.total == total
    assert relaxed.spent == after.relaxation.spent == after.stages[1].relaxed
    b = {r["spec"]["attempt"]: int(r["spec"]["macs"]) for r in lab.records()}
    assert relaxed.spent is not None and relaxed.spent.macs == b["family-b-a1"] > 0


def test_a_baseline_is_a_job_of_its_own() -> None:
    lab = gated(Lab(), stages="ab", baseline={}, train=["b"])
    finish(lab, "a-a1", 40)
    assert jobs(lab) == ["a-a1", "b-b1"]
    made = lab.get(PYTORCHJOBS, "family-b-b1")
    pod = made["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["metadata"]
    for meta in (made["metadata"], pod):
        assert meta["labels"][ROLE] == "baseline"
        assert meta["labels"]["modelchain.dev/stage"] == "b"
    stage = lab.stage(index=1)
    assert stage.state is State.PENDING and stage.code is Code.WAITS_FOR_BASELINE
    finish(lab, "b-b1", 50)
    assert jobs(lab) == ["a-a1", "b-a1", "b-b1"]
    finish(lab, "b-a1", 49.8)
    assert lab.status().is_true("Complete") and verdicts(lab) == ["Ungated", "Passed"]
    [record] = [r for r in lab.records() if r["spec"]["attempt"] == "family-b-b1"]
    assert "predecessor" not in record["spec"] and record["spec"]["epochs"] == 32
    assert any(
        text.startswith("baseline b was trained") for text in told(lab, Code.STAGE_SUCCEEDED)
    )


def test_a_baseline_is_trained_once_for_all_chains_on_a_claim() -> None:
    lab = Lab()
    lab.claim("shared")
    shared = {"spec.storage": {"claimName": "shared"}, "spec.evaluation": [EVALUATION]}
    gate = {"spec.gate": {"metric": "top1", "train": ["b"]}}
    lab.apply(stages="ab", **shared, **gate)
    lab.passes(count=2)
    finish(lab, "a-a1", 40)
    finish(lab, "b-b1", 50)
    finish(lab, "b-a1", 49.8)
    assert lab.status().is_true("Complete")
    lab.apply("two", stages="ab", **shared, **gate)
    lab.passes("two", count=3)
    assert lab.status("two").is_true("Complete"), lab.status("two").stages
    assert not [name for name in lab.names(PYTORCHJOBS) if name.startswith("two-")]


def test_a_chain_that_is_applied_again_keeps_its_stages_apart_from_its_baselines() -> None:
    """The baseline's record has the stage's name, and its epochs are not the stage's."""
    lab = Lab()
    edits = RELAX | {"spec.gate": {"metric": "top1", "train": ["b"]}}
    lab.apply(stages="abc", **edits)
    lab.passes()
    finish(lab, "a-a1", 40)
    finish(lab, "b-b1", 50)
    epochs = [stage.epochs for stage in lab.status().stages]
    delete(lab)
    lab.apply(stages="abc", uid="another", **edits)
    lab.passes(count=3)
    assert [stage.epochs for stage in lab.status().stages] == epochs
    assert jobs(lab) == ["b-a1"]


@pytest.mark.parametrize("lost", [False, True], ids=["kept", "lost"])
def test_numbers_of_baselines_are_their_own(lost: bool) -> None:
    lab = gated(Lab(), stages="ab", baseline={}, train=["b"])
    finish(lab, "a-a1", 40)
    if lost:
        lab.kube.put(CHAINS, lab.get(CHAINS, "family") | {"status": {}})
        lab.restart()
        lab.passes(count=3)
        assert jobs(lab) == ["a-a1", "b-b2"], "what no status names is deleted"
    else:
        lab.end("family-b-b1", None, code=1)
        lab.passes(count=3)
        lab.now += 60
        lab.passes(count=3)
        assert jobs(lab) == ["a-a1", "b-b1", "b-b2"]


def test_get_and_explain_show_each_model_beside_the_same_model_alone() -> None:
    lab = gated(Lab(), stages="abc", baseline={"c": "50"}, train=["b"], onMiss="Continue")
    finish(lab, "a-a1", 40)
    finish(lab, "b-b1", 50)
    finish(lab, "b-a1", 48.5)
    family = gated_family(lab.get(CHAINS, "family"))
    console = Console(width=200, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(family)
    text = console.export_text()
    [b] = [line.split() for line in text.splitlines() if line.split()[:1] == ["b"]]
    assert b[:8] == ["b", "Succeeded", "20", "32", "48.50", "50.00", "-1.50", "Missed"]
    assert "times less" in text and "together" in text
    lab.apply(stages="abc")
    assert gated_family(lab.get(CHAINS, "family")) is None, "other chains have no such table"


def test_figures_of_the_gate() -> None:
    lab = gated(Lab(), stages="abc", baseline={"c": "50"}, train=["b"])
    finish(lab, "a-a1", 40)
    finish(lab, "b-b1", 50)
    finish(lab, "b-a1", 48.5)
    thing: Object = lab.get(CHAINS, "family")
    thing["metadata"]["resourceVersion"] = "7"
    known = figures(thing)
    assert [(stage.verdict, stage.difference) for stage in known.stages] == [
        ("Ungated", None),
        ("Missed", -1.5),
        ("", None),
    ]
    assert [row.name for row in known.baselines] == ["b alone"]
    assert known.baselines[0].trained and not known.baselines[0].reused
