"""The actions that Argo CD offers for a chain in each phase: those of the command line."""

from __future__ import annotations

import copy
from typing import Any

import phase_table
import pytest
from playing import PHASES, Family
from podshapes import word
from verdicts import Verdict, ask

from modelchain.errors import InputError
from modelchain_operator.api.kube import CHAINS
from modelchain_operator.cli.commands import _to_retry
from modelchain_operator.reconcile.snapshot import RETRY

Object = dict[str, Any]


@pytest.fixture(scope="module")
def chains() -> dict[str, Object]:
    return phase_table.made()


@pytest.fixture(scope="module")
def verdicts(chains: dict[str, Object]) -> dict[str, Verdict]:
    return ask(chains)


def retry_helps(chain: Object) -> bool:
    """Whether the command line would retry."""
    try:
        _to_retry(chain, "")
    except InputError:
        return False
    return True


@pytest.mark.parametrize("phase", PHASES)
def test_what_is_offered(
    phase: str, chains: dict[str, Object], verdicts: dict[str, Verdict]
) -> None:
    chain, offered = chains[phase], verdicts[phase].offered
    suspended = chain["spec"].get("suspend") is True
    complete = verdicts[phase].health == "Healthy"
    assert {name for name, after in offered.items() if after} == {
        name
        for name, useful in {
            "suspend": not suspended and not complete,
            "resume": suspended,
            "retry": phase != "stalled: StatusUnreadable" and retry_helps(chain),
        }.items()
        if useful
    }
    assert offered.keys() == {"suspend", "resume", "retry"}


@pytest.mark.parametrize("phase", PHASES)
def test_an_action_changes_one_field(
    phase: str, chains: dict[str, Object], verdicts: dict[str, Verdict]
) -> None:
    for name, after in verdicts[phase].offered.items():
        if after is None:
            continue
        expected = copy.deepcopy(chains[phase])
        if name == "retry":
            asked = after["metadata"]["annotations"][RETRY]
            expected["metadata"].setdefault("annotations", {})[RETRY] = asked
        else:
            expected["spec"]["suspend"] = name == "suspend"
        assert after["spec"] == expected["spec"] and after["metadata"] == expected["metadata"]


def act(life: Family, action: str) -> None:
    """A person chooses the action in Argo CD."""
    after = ask({"chain": life.shown})["chain"].offered[action]
    assert after is not None
    if action != "retry":
        after["metadata"]["generation"] += 1
    life.kube.put(CHAINS, after)
    life.look(10)


def test_a_retry_makes_an_attempt() -> None:
    life = Family().trains().ends(word("Failed", "UserError", "no such shard"))
    assert life.jobs == ["vit-vit-t-a1"]
    act(life, "retry")
    assert life.jobs == ["vit-vit-t-a1", "vit-vit-t-a2"]


def test_suspend_and_resume() -> None:
    life = Family().trains()
    act(life, "suspend")
    life.goes()
    assert life.jobs == [] and life.status.is_true("Suspended")
    act(life, "resume")
    assert life.jobs == ["vit-vit-t-a2"]


@pytest.mark.parametrize(
    ("git", "action", "reverted"),
    [
        ({}, "suspend", False),
        ({"suspend": False}, "suspend", True),
        ({}, "retry", False),
        ({"suspend": False}, "retry", False),
        ({"suspend": True}, "resume", True),
    ],
)
def test_what_a_self_heal_reverts(git: Object, action: str, reverted: bool) -> None:
    """Argo CD compares what Git says, and leaves alone what Git does not mention."""
    life = Family().trains()
    if action == "retry":
        life.ends(word("Failed", "UserError", "no such shard"))
    life.edit(2, **{"spec.suspend": git.get("suspend", False)})
    live = life.shown
    manifest = {key: live[key] for key in ("apiVersion", "kind")}
    manifest["metadata"] = {key: live["metadata"][key] for key in ("name", "namespace")}
    manifest["spec"] = {k: v for k, v in live["spec"].items() if k != "suspend"} | git
    after = ask({"chain": live})["chain"].offered[action]
    assert after is not None
    found = ask({"before": live, "after": after}, {"before": manifest, "after": manifest})
    assert (found["before"].differs, found["after"].differs) == (False, reverted)
