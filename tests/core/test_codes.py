"""The codes that `decide` gives stages beside their reasons, and the codes of conditions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pricelist import per_hour
from specs import MINIMAL, with_changes

from modelchain.api.contracts import FailureClass
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus, StageStatus, State
from modelchain.decide import transitions
from modelchain.decide.conditions import completed
from modelchain.decide.decide import decide
from modelchain.decide.observed import Artifact, Damage, Observed, Seen
from modelchain.decide.verdict import Verdict

CHAIN = ModelChain.model_validate(MINIMAL)
NOW = 1000.0


def after(status: ChainStatus, **seen: Any) -> ChainStatus:
    """The status that `decide` writes for what it observes."""
    absent = Seen(live=False, started=False)
    defaults: dict[str, Any] = {"artifact": lambda d: None, "attempt": lambda name: absent}
    return decide(CHAIN, Observed(status=status, **defaults | seen), NOW).status


def codes(status: ChainStatus) -> list[Code | None]:
    return [stage.code for stage in status.stages]


def test_the_codes_of_a_new_chain() -> None:
    assert codes(after(ChainStatus())) == [Code.MISS, Code.WAITS_FOR_STAGE]


def test_the_code_of_a_hit() -> None:
    found = Artifact("w", "d/artifact", macs=1, metrics={})
    assert codes(after(ChainStatus(), artifact=lambda d: found)) == [Code.UNCHANGED] * 2


def test_the_code_of_an_interrupted_command() -> None:
    status = after(ChainStatus(), interrupted=True)
    assert codes(status)[0] is Code.INTERRUPTED and status.stages[0].state is State.SUSPENDED


@pytest.mark.parametrize(("interrupted", "code"), [(True, Code.INTERRUPTED), (False, Code.RESUMES)])
def test_the_codes_of_an_attempt_that_is_stopped(interrupted: bool, code: Code) -> None:
    status = after(ChainStatus())
    name = status.stages[0].attempts[0].name
    running = {"attempt": lambda _: Seen(live=True, started=True), "live": frozenset({name})}
    stopping = after(status, interrupted=True, **running)
    assert codes(stopping)[0] is Code.STOPPING
    gone = {"attempt": lambda _: Seen(live=False, started=True)}
    assert codes(after(stopping, interrupted=interrupted, **gone))[0] is code


@pytest.mark.parametrize("failure", FailureClass)
def test_the_code_of_a_failure(failure: FailureClass) -> None:
    """The class of the last attempt is the code of the stage, whether it is tried again or not."""
    status = after(ChainStatus())
    stage = status.stages[0]
    verdict = Verdict(failure, "why", False, 0, retries=1, disruptions=1)
    for final in (None, "why"):
        judged = transitions.after(
            stage, stage.attempts[0], replace(verdict, final=final), NOW, 1.0, None
        )
        assert judged.code == failure.value


def test_the_code_of_a_corrupt_artifact() -> None:
    damage = Damage(Reason(Code.BLOCKED, message="weights have another hash"))
    found = after(ChainStatus(), artifact=lambda d: damage)
    assert codes(found)[0] is Code.CORRUPT_ARTIFACT


CONDITIONS: dict[str, tuple[list[tuple[State, Reason]], set[Code]]] = {
    "not begun": (
        [(State.PENDING, Reason(Code.TAKES_SHARE))],
        {Code.PENDING, Code.IN_PROGRESS, Code.NOT_SUSPENDED, Code.NO_FAILURE},
    ),
    "complete": (
        [(State.SUCCEEDED, Reason(Code.MISS))],
        {Code.ALL_STAGES_FINISHED, Code.COMPLETE, Code.PLANNED, Code.NO_FAILURE},
    ),
    "failed": (
        [(State.SUCCEEDED, Reason(Code.MISS)), (State.FAILED, Reason(Code.DATA))],
        {Code.DATA, Code.STAGE_FAILED, Code.FAILED},
    ),
    "suspended": (
        [(State.SUCCEEDED, Reason(Code.MISS)), (State.SUSPENDED, Reason(Code.SUSPENDED))],
        {Code.STOPPED, Code.IN_PROGRESS},
    ),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions_carry_codes(name: str) -> None:
    told, expected = CONDITIONS[name]
    stages = [
        StageStatus(name="ab"[i], state=state, reason=reason.text or "x", reason_code=reason.code)
        for i, (state, reason) in enumerate(told)
    ]
    found = completed(CHAIN, ChainStatus(), stages, None, NOW)
    reasons = {condition.reason for condition in found.conditions}
    assert expected <= reasons and all(Code(reason) for reason in reasons)


def test_a_stall_without_a_code_of_its_own() -> None:
    stage = StageStatus(name="a", state=State.PENDING, reason="x", stalled=True)
    stalled = completed(CHAIN, ChainStatus(), [stage], None, NOW).condition("Stalled")
    assert stalled is not None and stalled.reason == Code.BLOCKED


OLD = Path(__file__).with_name("status-without-codes.json")


def test_a_status_of_the_version_before_goes_on() -> None:
    """It has no codes, no next commands and no runner. Its running attempt is neither launched
    again nor stopped; only what is new is written.
    """
    old = ChainStatus.model_validate_json(OLD.read_text())
    running = old.stages[1].attempts[-1]
    first = old.stages[0]
    assert running.runner is None and first.artifact is not None and first.input_digest is not None
    made = Artifact(first.artifact.digest, first.artifact.path, first.macs, {"top1": 30.0})
    seen = Seen(
        live=True,
        started=True,
        uid=running.uid,
        running=True,
        progress=old.stages[1].progress,
        macs=running.macs,
        pods=running.pods,
        prices=per_hour("2.21"),
    )
    observed = Observed(
        status=old,
        artifact={first.input_digest: made}.get,
        attempt=lambda name: seen,
        live=frozenset({running.name}),
        records=True,
    )
    meta = {"name": "vit", "namespace": "team", "generation": old.observed_generation}
    spec = with_changes({"metadata": meta})
    decision = decide(ModelChain.model_validate(spec), observed, NOW)
    assert [stage.attempts for stage in decision.status.stages] == [s.attempts for s in old.stages]
    assert decision.action is None and codes(decision.status) == [Code.MISS, Code.MISS]
    assert [stage.reason for stage in decision.status.stages] == [s.reason for s in old.stages]
    again = decide(ModelChain.model_validate(spec), replace(observed, status=decision.status), NOW)
    assert again.status == decision.status
