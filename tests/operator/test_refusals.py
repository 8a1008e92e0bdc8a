"""What the API server refuses, for every kind of write: told in its words, and tried again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from lab import NAMESPACE, Lab, success
from stored import violations

from modelchain.api.reasons import Code
from modelchain.crd import definitions
from modelchain.decide.refusals import PASSING
from modelchain_operator.api.kube import CHAINS, LEASES, Ambiguous, ApiError, Forbidden, Invalid
from modelchain_operator.api.refusals import is_refusal, next_command
from modelchain_operator.explain.explain import explain
from modelchain_operator.explain.read import Situation
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS

SCHEMA = definitions()["modelchains.yaml"]["spec"]["versions"][0]["schema"]["openAPIV3Schema"][
    "properties"
]["status"]
SAID = "POST /x: 403 exceeded quota: few, requested: 1, used: 9, limited: 9"
QUOTA = Forbidden(SAID, code=403)


def nothing(lab: Lab) -> None:
    """Refused from the beginning."""


def launched(lab: Lab) -> None:
    lab.passes()


def ended(lab: Lab) -> None:
    lab.passes()
    lab.kube.refuse.clear()
    lab.end("family-a-a1", success())


def ended_without_a_word(lab: Lab) -> None:
    lab.passes()
    lab.end("family-a-a1")


def suspended(lab: Lab) -> None:
    lab.passes()
    lab.apply(**{"spec.suspend": True})


@dataclass(frozen=True)
class Case:
    """A kind of write, what happens before it is due, and the code of its refusal."""

    verb: str
    kind: str
    before: Callable[[Lab], None]
    code: Code
    shared: bool = False
    changes: dict[str, Any] = field(default_factory=dict)


CASES = {
    "claim": Case("create", "persistentvolumeclaims", nothing, Code.CLAIM_REFUSED),
    "share": Case("create", "leases", nothing, Code.SHARE_REFUSED, shared=True),
    "launch": Case("create", "pytorchjobs", nothing, Code.LAUNCH_REFUSED),
    "release into a queue": Case(
        "patch",
        "pytorchjobs",
        nothing,
        Code.RELEASE_REFUSED,
        changes={"spec.runner.queueName": "vision"},
    ),
    "release without a queue": Case("patch", "pytorchjobs", nothing, Code.QUEUE_REQUIRED),
    "record": Case("create", "stageartifacts", ended, Code.RECORD_REFUSED),
    "index Job": Case("create", "jobs", nothing, Code.INDEX_REFUSED),
    "verify Job": Case("create", "jobs", ended_without_a_word, Code.VERIFY_REFUSED),
    "stop": Case("delete", "pytorchjobs", suspended, Code.DELETE_REFUSED),
}
each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def refused(case: Case, error: ApiError = QUOTA) -> Lab:
    """A lab after three passes in which this write was refused, over more than a minute."""
    lab = Lab()
    changes = dict(case.changes)
    if case.shared:
        lab.claim("shared")
        changes["spec.storage"] = {"claimName": "shared"}
    lab.apply(**changes)
    case.before(lab)
    lab.kube.refuse[case.verb, case.kind] = error
    for _ in range(3):
        lab.passes()
        lab.now += 40
    lab.passes()
    return lab


def explained(lab: Lab) -> Any:
    jobs = [lab.get(PYTORCHJOBS, name) for name in lab.names(PYTORCHJOBS)]
    chain = lab.get(CHAINS, "family")
    return explain(Situation(chain=chain, now=lab.now, jobs=jobs))


@each
def test_the_status_has_the_servers_words(case: Case) -> None:
    lab = refused(case)
    stage, stalled = lab.stage(), lab.status().condition("Stalled")
    assert stage.stalled and stage.code is case.code and SAID in stage.message
    assert stalled is not None and stalled.status == "True" and SAID in stalled.message
    assert stalled.reason == case.code
    warned = [event for event in lab.events.told if event[0] == "Warning"]
    # A refusal that may pass is told at once, and again when a person has to act.
    told = [case.code, "StageStalled"] if case.code in PASSING else ["StageStalled"]
    assert [event[1] for event in warned] == told, "once each, however often it is tried"
    assert all(SAID in event[2] for event in warned)


@each
def test_explain_has_the_servers_words(case: Case) -> None:
    found = explained(refused(case))
    assert found.reason == case.code and SAID in found.cause
    quota = f"kubectl describe resourcequota -n {NAMESPACE}"
    assert found.next == quota or case.code is Code.QUEUE_REQUIRED


@each
def test_a_refusal_writes_no_status_again_and_again(case: Case) -> None:
    lab = refused(case)
    before = len(lab.statuses)
    for n in range(5):
        # Each answer names another port, as that of a webhook that is away does.
        lab.kube.refuse[case.verb, case.kind] = Forbidden(SAID.replace("9", f"{n}"), code=403)
        lab.passes()
    assert len(lab.statuses) == before


@each
def test_the_chain_goes_on_once_the_write_is_accepted(case: Case) -> None:
    lab = refused(case)
    lab.kube.refuse.clear()
    lab.passes(count=2)
    assert not lab.stage().stalled and lab.stage().code is not case.code
    assert lab.status().condition("Stalled") is None


@each
def test_a_restarted_operator_says_the_same(case: Case) -> None:
    lab = refused(case)
    lab.restart()
    before = len(lab.statuses)
    lab.passes(count=3)
    assert len(lab.statuses) == before and SAID in lab.stage().message


@each
def test_an_answer_of_any_length_is_cut(case: Case) -> None:
    lab = refused(
        case, Invalid("POST /x: 422 begins " + "and goes on " * 50_000 + "ends", code=422)
    )
    status = lab.get(CHAINS, "family")["status"]
    assert not list(violations(status, SCHEMA)) and len(json.dumps(status)) < 60_000
    assert lab.stage().message.endswith("ends") and "422 begins" in lab.stage().message
    assert all(len(message) <= 5000 for _, _, message in lab.events.told)


def test_a_refused_launch_is_no_stall_for_a_minute() -> None:
    """A webhook that starts again, or a quota that is freed."""
    lab = Lab()
    lab.apply()
    error = Ambiguous('POST /x: 500 failed calling webhook "policy": refused', code=500)
    lab.kube.refuse["create", "pytorchjobs"] = error
    lab.passes(count=2)
    assert not lab.stage().stalled and lab.stage().code is Code.LAUNCH_REFUSED
    assert lab.status().is_true("Reconciling")
    found = explained(lab)
    assert found.reason == Code.LAUNCH_REFUSED and "failed calling webhook" in found.cause
    assert found.next == "kubectl get pods -n kubeflow"
    lab.now += 61
    lab.passes()
    assert lab.stage().stalled


def test_what_cannot_be_tidied_up_is_an_event() -> None:
    """The chain goes on, so its status says nothing. A Lease that stays blocks other chains."""
    lab = Lab()
    lab.claim("shared")
    lab.apply(**{"spec.storage": {"claimName": "shared"}})
    lab.passes()
    lab.finish("family-a-a1")
    lab.kube.refuse["delete", "leases"] = QUOTA
    lab.passes(count=3)
    assert lab.status().is_true("Complete") and lab.names(LEASES)
    assert {event[:2] for event in lab.events.told if event[0] == "Warning"} == {
        ("Warning", "ShareRefused")
    }
    lab.kube.refuse.clear()
    lab.passes()
    assert not lab.names(LEASES)


def test_a_refused_status_is_an_event() -> None:
    lab = Lab()
    lab.apply()
    lab.kube.refuse["status", "modelchains"] = Invalid("PUT /x: 422 status is too long", code=422)
    lab.passes()
    [event] = lab.events.told
    assert event == ("Warning", Code.STATUS_REFUSED, "PUT /x: 422 status is too long")


def test_a_refused_delete_does_not_revive_a_failed_stage() -> None:
    lab = Lab()
    lab.apply(**{"spec.retry": {"maxRetries": 0}})
    lab.passes()
    stray = lab.get(PYTORCHJOBS, "family-a-a1")
    lab.end("family-a-a1", code=1)
    lab.passes(count=2)
    assert lab.status().is_true("Failed")
    meta = {**stray["metadata"], "name": "stray", "uid": "stray"}
    lab.kube.put(PYTORCHJOBS, {**stray, "metadata": meta, "status": {}})
    lab.kube.refuse["delete", "pytorchjobs"] = QUOTA
    lab.passes(count=3)
    assert lab.status().is_true("Failed") and lab.names(PYTORCHJOBS) == ["family-a-a1", "stray"]


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ('500 Internal error occurred: failed calling webhook "policy": refused', True),
        ('400 admission webhook "policy" denied the request', True),
        ("500 etcdserver: request timed out", False),
    ],
)
def test_a_name_in_the_answer_makes_no_refusal(answer: str, refused: bool) -> None:
    where = "POST /apis/batch/v1/namespaces/webhook-team/jobs/webhook-a-a1"
    assert is_refusal(Ambiguous(f"{where}: {answer}", code=500)) == refused


@pytest.mark.parametrize(
    ("answer", "command"),
    [
        ('pods "maximum-vit-a-a1" is forbidden: denied by policy X', ""),
        (
            "maximum cpu usage per Container is 1, but limit is 2",
            "kubectl describe limitrange -n t",
        ),
        ("minimum memory usage per Pod is 1Gi", "kubectl describe limitrange -n t"),
    ],
)
def test_a_name_in_the_answer_names_no_limit(answer: str, command: str) -> None:
    assert next_command(answer, "t") == command
