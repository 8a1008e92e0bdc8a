"""What kstatus, Argo CD and Flux say of a chain in each phase, by their own code."""

from __future__ import annotations

from typing import Any

import phase_table
import pytest
from playing import PHASES
from verdicts import Verdict, ask

from modelchain.api.reasons import Code

UNSEEN = ("InProgress", "Progressing", "InProgress", "InProgress")
NOT_LAUNCHED = UNSEEN
ON_ITS_WAY = ("InProgress", "Progressing", "Current", "InProgress")
NEEDS_A_PERSON = ("Failed", "Degraded", "Failed", "Failed")
COMPLETE = ("Current", "Healthy", "Current", "Current")
BEFORE_ITS_LAUNCH = (
    "its claim is made",
    "its data is packed",
    "its data is indexed",
    "another chain trains the same stage",
)
OTHERS = {
    "suspended": ("Current", "Suspended", "Current", "InProgress"),
    "complete": COMPLETE,
    "complete, a metric could not be measured": COMPLETE,
    "complete, then suspended": COMPLETE,
    "failed, a retry is asked for": ON_ITS_WAY,
    # Argo CD and kstatus see that it is deleted; Flux's expressions see the conditions.
    "being deleted": ("Terminating", "Progressing", "Current", "InProgress"),
}


@pytest.fixture(scope="module")
def chains() -> dict[str, Any]:
    return phase_table.made()


@pytest.fixture(scope="module")
def verdicts(chains: dict[str, Any]) -> dict[str, Verdict]:
    return ask(chains)


def expected(phase: str) -> tuple[str, str, str, str]:
    if phase in OTHERS:
        return OTHERS[phase]
    if phase.startswith(("failed:", "stalled:")):
        return NEEDS_A_PERSON
    return UNSEEN if "not seen" in phase or phase in BEFORE_ITS_LAUNCH else ON_ITS_WAY


@pytest.mark.parametrize("phase", PHASES)
def test_all_tools_agree(phase: str, verdicts: dict[str, Verdict]) -> None:
    found = verdicts[phase]
    said = (found.kstatus, found.health, found.flux["running"], found.flux["complete"])
    assert said == expected(phase), found.message


@pytest.mark.parametrize("phase", PHASES)
def test_argo_shows_the_message_of_the_condition(
    phase: str, chains: dict[str, Any], verdicts: dict[str, Verdict]
) -> None:
    """For a chain at rest, with what it has spent: that message changes no more."""
    chain, verdict = chains[phase], verdicts[phase]
    status = chain["status"]
    if "not seen" in phase:
        assert verdict.message.startswith("waits for the operator to see ")
        return
    if phase == "being deleted":
        return
    kind = {"Degraded": "Stalled", "Healthy": "Ready", "Suspended": "Suspended"}
    true = {c["type"]: c["message"] for c in status["conditions"] if c["status"] == "True"}
    message = true[kind.get(verdict.health, "Reconciling")]
    cost = status.get("summary", {}).get("cost")
    if verdict.health == "Progressing":
        summary = status["summary"]
        at = ", ".join(filter(None, [f"stage {summary['stage']}", summary["progress"]]))
        assert verdict.message == f"{at}; {message}"
    else:
        spent = f"; spent {cost} {status['currency']}" if cost else ""
        assert verdict.message == message + spent


def test_each_stall_is_of_the_kind_that_it_says(chains: dict[str, Any]) -> None:
    for phase, chain in chains.items():
        if phase.startswith("stalled: "):
            [stalled] = [c for c in chain["status"]["conditions"] if c["type"] == "Stalled"]
            assert phase.removeprefix("stalled: ").split(",")[0] == stalled["reason"]


def test_every_reason_for_which_a_person_has_to_act_has_a_phase() -> None:
    codes = list(Code)
    first, last = codes.index(Code.INVALID_SPEC), codes.index(Code.BLOCKED)
    shown = {phase.removeprefix("stalled: ") for phase in PHASES}
    assert [code for code in codes[first:last] if code not in shown] == []


def test_the_table_of_the_page_is_current(
    chains: dict[str, Any], verdicts: dict[str, Verdict]
) -> None:
    page = phase_table.PAGE.read_text()
    text = phase_table.table(chains, verdicts)
    assert page == phase_table.with_table(page, text), "run tests/gitops/phase_table.py --write"
