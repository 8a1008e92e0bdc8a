"""What the owner of a chain reads while a metric of a finished stage is missing: `explain`, `get`
and `retry`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import podshapes
import pytest
from test_cluster_cli import printed, retry
from test_gates import finish, gated
from test_measuring import ASKS_BOTH, ASKS_FOOD, FOOD, STOPPED, Measuring, edited

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.errors import InputError
from modelchain_operator.api.kube import ARTIFACTS, CHAINS, EVENTS, JOBS, PODS, Forbidden, Object
from modelchain_operator.cli import commands, listing
from modelchain_operator.explain.explain import Explanation, explain
from modelchain_operator.explain.read import Situation

QUOTA = "exceeded quota: few, requested: count/jobs.batch=1"
LOOK = "modelchain explain family -n team"
RETRY = "modelchain retry family -n team"
WRONG = LastWord(result="Failed", failure=FailureClass.DATA, message="no picture")


@dataclass(frozen=True)
class Read:
    """What the owner reads. JOB stands for the name of the evaluation Job."""

    found: Explanation
    # The columns `state` and `why`.
    get: tuple[str, str]
    # What `modelchain retry` prints, or why it refuses.
    retry: str

    @property
    def evidence(self) -> list[str]:
        return [f"{line.object}: {line.message}" for line in self.found.evidence]


def read(lab: Measuring, monkeypatch: pytest.MonkeyPatch) -> Read:
    def kept(kind: Any, name: str) -> list[Object]:
        made = {"metadata": {"creationTimestamp": podshapes.at(0)}}
        objects = (lab.get(kind, name) for name in lab.names(kind))
        return [{"kind": name, **o, "metadata": made["metadata"] | o["metadata"]} for o in objects]

    (chain,) = kept(CHAINS, "ModelChain")
    pods, jobs = kept(PODS, "Pod"), kept(JOBS, "Job")
    jobs = [job for job in jobs if job["metadata"]["name"] in lab.measuring]
    seen = Situation(chain, lab.now, cpu_jobs=jobs, pods=pods, events=kept(EVENTS, "Event"))
    row = listing.row(chain, lab.now)
    return Read(explain(seen), (row.state, row.why), _retry(chain, monkeypatch))


def _retry(chain: Object, monkeypatch: pytest.MonkeyPatch) -> str:
    try:
        return retry(monkeypatch, chain)
    except InputError as error:
        return str(error)


def measuring() -> Measuring:
    lab = edited()
    lab.pod(code=None)
    return lab


def failed() -> Measuring:
    lab = edited()
    lab.fail(WRONG)
    return lab


def late() -> Measuring:
    lab = edited()
    lab.pod(STOPPED, code=75)
    ended = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded"}
    lab.kube.put(JOBS, lab.job | {"status": {"conditions": [ended]}})
    return lab


def refused(verb: str, plural: str) -> Measuring:
    lab = Measuring()
    lab.train("family", FOOD, **ASKS_FOOD)
    lab.kube.refuse[verb, plural] = Forbidden(QUOTA, code=403)
    lab.apply(**ASKS_BOTH)
    lab.passes(count=2)
    if verb == "status":
        lab.measure(cars=7.0)
        lab.passes(count=2)
    return lab


def unscheduled() -> Measuring:
    lab = edited()
    lab.kube.put(PODS, lab.pod(code=None) | {"status": podshapes.unschedulable()["status"]})
    return lab


def suspended() -> Measuring:
    lab = Measuring()
    lab.train("family", FOOD, **ASKS_FOOD)
    lab.apply(**ASKS_BOTH, **{"spec.suspend": True})
    return lab


def unasked() -> Measuring:
    """Another operator finds that the record's metric is that of another evaluation."""
    lab = Measuring()
    lab.train("family", FOOD, **ASKS_FOOD)
    (record,) = lab.records()
    lab.kube.put(ARTIFACTS, record | {"spec": record["spec"] | {"evaluations": {"food": "0" * 16}}})
    lab.restart()
    return lab


WAITS_FOR_NONE = "family has nothing to try again: stage a, evaluation cars: "
CASES: dict[str, tuple[Callable[[], Measuring], str, str, str, str]] = {
    "measuring": (
        measuring,
        "job JOB measures it",
        "kubectl logs -f job/JOB -n team",
        "job/JOB: measures on the finished artifact",
        f"{WAITS_FOR_NONE}job JOB measures it; look: {LOOK}",
    ),
    "failed": (
        failed,
        "job JOB failed: Data: no picture",
        RETRY,
        "job/JOB: has failed: x",
        f"evaluation cars of stage a of family is measured again at once; look: {LOOK}",
    ),
    "late": (
        late,
        "job JOB was ended: it had not ended after 86400 s; raise evaluating.deadlineSeconds of the"
        " node pool, then retry",
        RETRY,
        "job/JOB: has failed: DeadlineExceeded",
        f"evaluation cars of stage a of family is measured again at once; look: {LOOK}",
    ),
    "refused": (
        lambda: refused("create", JOBS.plural),
        QUOTA,
        "kubectl describe resourcequota -n team",
        "",
        "a retry does not help family: MeasureRefused has to be corrected, and then it goes on by"
        f" itself; look: {LOOK}",
    ),
    "measured, not recorded": (
        lambda: refused("status", ARTIFACTS.plural),
        f"it was measured, and cannot be recorded: {QUOTA}",
        "kubectl describe resourcequota -n team",
        "job/JOB: has measured",
        "a retry does not help family: MeasureRefused has to be corrected, and then it goes on by"
        f" itself; look: {LOOK}",
    ),
    "unscheduled": (
        unscheduled,
        "JOB-x waits: 0/3 nodes are available",
        "kubectl describe pod JOB-x -n team",
        "job/JOB: is to measure",
        "a retry does not help family: Unschedulable has to be corrected, and then it goes on by"
        f" itself; look: {LOOK}",
    ),
    "suspended": (
        suspended,
        "spec.suspend is true; set it to false to go on",
        "modelchain resume family -n team",
        "",
        f"{WAITS_FOR_NONE}spec.suspend is true; set it to false to go on; look: {LOOK}",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_read(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, why, then, evidence, retries = CASES[case]
    lab = make()
    lab.passes(count=2)
    (job,) = lab.measuring or ["none"]
    why, then, evidence, retries = (
        text.replace("JOB", job) for text in (why, then, evidence, retries)
    )
    seen = read(lab, monkeypatch)
    assert seen.found.state == "Chain family is complete, and one metric is missing."
    assert seen.found.cause == f"Stage a, evaluation cars: {why}."
    assert seen.found.next == then and seen.found.reason == lab.entry.reason_code
    assert seen.get == ("Complete", f"stage a, evaluation cars: {why}")
    assert seen.retry == retries
    assert [line for line in seen.evidence if line.startswith("job/")] == [evidence] * bool(
        evidence
    )
    assert "stage a: food 61.00 %, 0.2 GPU hours" in seen.evidence, "what is known is shown"


def test_one_that_nothing_has_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = unasked()
    lab.passes(count=2)
    seen = read(lab, monkeypatch)
    assert (seen.found.reason, seen.found.next) == ("Unmeasured", RETRY)
    assert (
        seen.get[1] == "stage a, evaluation food: the chain had ended before; a retry measures it"
    )
    assert seen.retry.startswith("evaluation food of stage a of family is measured again at once;")


def test_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one for which a person has to act comes first. A retry is for all that have failed."""
    lab = Measuring()
    lab.train("family", **{"spec.evaluation": []})
    lab.apply(**ASKS_BOTH)
    lab.passes(count=2)
    lab.fail(WRONG)
    lab.passes(count=2)
    seen = read(lab, monkeypatch)
    assert seen.found.state == "Chain family is complete, and 2 metrics are missing."
    assert "evaluation food: job" in seen.found.cause and "no picture" in seen.get[1]
    assert seen.retry.startswith("evaluation food of stage a")
    (first,) = {line for line in seen.evidence if "has failed" in line}
    (job,) = (name for name in lab.measuring if name not in first)
    lab.drop(JOBS, first.split("/")[1].split(":")[0])
    lab.fail(WRONG)
    assert job in lab.measuring
    lab.passes(count=2)
    said = read(lab, monkeypatch).retry
    assert said == f"each of 2 missing metrics of family is measured again at once; look: {LOOK}"


def test_none_is_missing_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = measuring()
    lab.measure(cars=7.0)
    lab.passes(count=2)
    seen = read(lab, monkeypatch)
    assert seen.found.reason == "Complete" and seen.get == ("Complete", "")
    assert "cars 7.00 %" in seen.found.cause
    assert seen.retry.startswith("family has nothing to try again: no stage has failed or stalled;")


def test_one_that_the_gate_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain is not complete: its next stage waits for the metric."""
    lab = Measuring()
    gated(lab)
    finish(lab, "a-a1", 40)
    lab.finish("family-b-a1")
    lab.passes(count=3)
    seen = read(lab, monkeypatch)
    assert seen.found.reason == "GateUnmeasured" and seen.found.state.endswith(
        "Stage b (2 of 3) of chain family has finished and is to be measured."
    )
    assert "is not measured" in seen.get[1] and seen.retry.startswith("family has nothing")
    lab.fail(WRONG)
    lab.passes(count=2)
    seen = read(lab, monkeypatch)
    assert (seen.found.reason, seen.found.next) == ("MeasureFailed", RETRY)
    assert "failed: Data: no picture" in seen.found.cause and "no picture" in seen.get[1]
    assert seen.get[0] == "Stalled"
    assert seen.retry == (
        f"evaluation top1 of stage b of family is measured again at once; look: {LOOK}"
    )


@pytest.mark.parametrize(
    ("suspend", "said"),
    [
        (True, "family is complete, so no metric is measured; its spec.suspend is true now"),
        (
            False,
            "family is complete, so the missing metrics are measured; its spec.suspend is"
            " false now",
        ),
    ],
)
def test_what_a_suspension_says(suspend: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = measuring() if suspend else suspended()
    lab.passes(count=2)
    chain = lab.get(CHAINS, "family")
    command = commands.suspend if suspend else commands.resume
    assert printed(monkeypatch, chain, command) == said
    assert chain["spec"]["suspend"] is suspend
