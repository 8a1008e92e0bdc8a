"""What Argo CD's own triggers and our template send about an Application with chains."""

from __future__ import annotations

from typing import Any

import pytest
from playing import Family, complete
from podshapes import word
from verdicts import ask, notices

Object = dict[str, Any]
OTHER = {"kind": "ConfigMap", "name": "x"}


def app(*chains: Object) -> Object:
    """An Application of these chains, as Argo CD writes its status."""
    found = ask({str(number): chain for number, chain in enumerate(chains)})
    resources = [
        {"kind": "ModelChain", "health": {"status": one.health, "message": one.message}}
        for one in found.values()
    ]
    return {"status": {"resources": [OTHER, *resources]}}


def failed() -> Object:
    return Family().trains().ends(word("Failed", "UserError", "no such shard")).shown


@pytest.mark.parametrize(
    ("chains", "triggers"),
    [
        ([Family().trains().shown], set()),
        ([complete().shown], {"chains-are-complete"}),
        ([complete().shown, Family().trains().shown], set()),
        ([complete().shown, failed()], {"chain-needs-a-person"}),
        ([], set()),
    ],
    ids=["trains", "complete", "one of two is complete", "one of two has failed", "no chain"],
)
def test_when_something_is_sent(chains: list[Object], triggers: set[str]) -> None:
    assert set(notices({"app": app(*chains)})["app"]) == triggers


def test_what_is_sent() -> None:
    sent = notices({"app": app(complete().shown, failed())})["app"]
    lines = sent["chain-needs-a-person"].split("\n")
    assert lines[0] == "Healthy: 2 of 2 stages have finished; spent 120.00 USD"
    assert lines[1].startswith(
        "Degraded: stage vit-t: UserError: no such shard; next: kubectl edit"
    )
    assert lines[1].endswith("; spent 20.17 USD")
