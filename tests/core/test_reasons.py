"""The codes of reasons: they are complete, the same everywhere, and never parsed from a message."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import produced
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelchain.api.contracts import FailureClass
from modelchain.api.messages import one_line
from modelchain.api.reasons import Code, Reason, filled, known
from modelchain.api.status import (
    AttemptFields,
    AttemptStatus,
    ChainStatus,
    LedgerFields,
    StageFields,
    StageLedger,
    StageStatus,
    State,
)
from modelchain.decide.transitions import explained
from modelchain.decide.verdict import why_missed

ROOT = Path(__file__).parents[2]
SOURCES = [*ROOT.glob("core/**/*.py"), *ROOT.glob("operator/**/*.py")]
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=60)


def test_every_failure_class_has_a_code() -> None:
    assert all(Code(failure) == failure.value for failure in FailureClass)


@pytest.mark.parametrize("state", State)
def test_every_state_has_a_code_and_an_event(state: State) -> None:
    assert Code(f"Stage{state}")
    assert state is State.SUCCEEDED or Code(state) == state.value


@pytest.mark.parametrize("code", Code)
def test_every_code_has_a_valid_name_a_meaning_and_an_action(code: Code) -> None:
    assert re.fullmatch(r"[A-Z][A-Za-z]{2,39}", code), "valid as the reason of a condition"
    assert code.meaning[0].isupper() and code.action
    assert not code.meaning.endswith(".") and not code.action.endswith(".")
    assert set(re.findall(r"\{(\w+)\}", code.command)) <= {"chain", "namespace", "subject"}


@pytest.mark.parametrize("code", Code)
def test_every_code_is_produced_by_a_test(code: Code) -> None:
    """Each test that the list names fails if it does not produce its codes."""
    assert any(code in codes.split() for codes in produced.TESTS.values())


def test_what_counts_as_produced() -> None:
    with produced.watched() as seen:
        Reason(Code.BLOCKED)
        why_missed(StageStatus(name="a"), "d", {}, {}, there=False)
    assert seen == {Code.MISS}


REASONS = st.builds(
    Reason,
    code=st.sampled_from(list(Code)),
    subject=st.just("s"),
    message=TEXT.filter(bool),
    next_command=TEXT,
    shown=st.sampled_from(["", "see", "look"]),
    stops_first=st.booleans(),
    never_trained=st.booleans(),
)


@given(REASONS)
def test_the_parts_of_a_stored_reason(reason: Reason) -> None:
    """The status keeps the parts, so that no code has to take the sentence apart."""
    stage = explained(StageStatus(name="a"), reason)
    stored = StageStatus.model_validate_json(stage.model_dump_json(by_alias=True))
    assert stored.reason == one_line(reason.text) and stored.code is reason.code
    assert stored.cause == one_line(reason.message) or not one_line(reason.message)
    ends = f"; {reason.shown}: {reason.next}" if reason.shown else ""
    assert stage.without_command + ends == reason.text
    assert (stored.stops_first, stored.never_trained) == (
        reason.stops_first,
        reason.never_trained,
    )


@given(REASONS)
def test_a_bare_reason_is_shown_whole(reason: Reason) -> None:
    stage = explained(StageStatus(name="a"), replace(reason, bare=True))
    assert stage.cause == stage.without_command == stage.reason


def test_next_commands() -> None:
    failed = Reason(Code.DATA_FAILED, "pack", "job pack has failed")
    assert filled(failed.next, "vit", "team") == "kubectl logs job/pack -n team"
    assert (
        filled(Reason(Code.INVALID_SPEC).next, "vit", "team") == "kubectl edit mchain vit -n team"
    )
    assert filled(Reason(Code.INVALID_SPEC).next, "vit", None) == "", "a laptop has no cluster"
    assert Reason(Code.NAME_TAKEN, next_command="kubectl get x").next == "kubectl get x"


def test_a_code_of_another_version_is_no_error() -> None:
    assert known("SomethingNew") is None and known("") is None
    stored = {"stages": [{"name": "a", "reason": "x", "reasonCode": "SomethingNew"}]}
    assert ChainStatus.model_validate_json(json.dumps(stored)).stages[0].code is None


def test_a_status_without_codes_is_read() -> None:
    """The version before codes wrote such a status."""
    attempt = {"name": "c-a-a1", "number": 1, "inputDigest": "d", "state": "Failed"}
    stage = {"name": "a", "state": "Failed", "reason": "Error: it broke; 3 retries are allowed"}
    stored = {"stages": [{**stage, "attempts": [{**attempt, "failure": "Error"}]}]}
    found = ChainStatus.model_validate_json(json.dumps(stored)).stages[0]
    assert found.code is Code.ERROR and found.reason == stage["reason"]


@pytest.mark.parametrize(
    ("fields", "model", "fixed"),
    [
        (StageFields, StageStatus, {"name"}),
        (LedgerFields, StageLedger, {"name"}),
        (AttemptFields, AttemptStatus, {"name", "number", "input_digest", "runner"}),
    ],
)
def test_fields_that_change_have_the_types_of_the_status(
    fields: type, model: type[StageLedger] | type[AttemptStatus], fixed: set[str]
) -> None:
    typed, stored = get_type_hints(fields), get_type_hints(model)
    names = set(model.model_fields)
    assert set(typed) == names - fixed
    for name, kind in typed.items():
        assert kind == stored[name], name


# Patterns of code that once parsed messages.
OLD_HELPERS = {
    "a reason constant from a sentence": r"\bconstant\(",
    "a reason's beginning": r"reason\.(startswith|partition|removeprefix|removesuffix|split)\(",
    "commands cut from a sentence": r"without_commands|NEXT_COMMAND",
    "the next command from a sentence": r"after_stall|RETRY_HELPS|partition\(\"has failed",
    "what pods wait for": r"\"image\" in|in found\.waiting|kind_of\(|cannot be pulled\" in",
    "a sentence's end": r"removesuffix\(\"; tries again|_STOPS",
    "a sentence's message": r"without_code\(|(?<!def )without_command\(|NEVER_TRAINED",
    "a comparison of messages": r"\b(message|cause) [!=]= ",
}


@pytest.mark.parametrize("name", OLD_HELPERS)
def test_no_code_parses_messages(name: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in SOURCES
        for line in path.read_text().splitlines()
        if re.search(OLD_HELPERS[name], line)
    ]
    assert found == []


def test_a_status_is_changed_by_name_and_type() -> None:
    """`decide` never changes a stage or an attempt with `model_copy`, which checks no types."""
    for path in ROOT.glob("core/modelchain/decide/*.py"):
        for line in path.read_text().splitlines():
            assert not re.search(r"\b(stage|attempt|final|over|longest)\.model_copy\(", line), line
