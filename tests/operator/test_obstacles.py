"""What must be there before a chain launches anything: its data, its claim, the kind of job."""

from __future__ import annotations

import pytest
from lab import NAMESPACE, Lab

from modelchain.api.reasons import Code
from modelchain_operator.api.kube import CLAIMS, JOBS, NotFound, Object, Resource
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS


def nothing_is_launched(lab: Lab, code: Code, *, stalled: bool = True) -> str:
    """What the first stage says after a few passes."""
    lab.apply()
    lab.passes(count=3)
    stage = lab.stage()
    assert (stage.code, stage.stalled) == (code, stalled)
    assert not lab.names(PYTORCHJOBS)
    return stage.message


@pytest.mark.parametrize(
    ("condition", "code", "stalled"),
    [("Failed", Code.DATA_FAILED, True), ("Suspended", Code.DATA_LOADING, False)],
)
def test_the_job_that_fills_the_data(condition: str, code: Code, stalled: bool) -> None:
    lab = Lab()
    meta = {"name": "pack", "namespace": NAMESPACE, "labels": {"modelchain.dev/fills": "data"}}
    status = {"conditions": [{"type": condition, "status": "True"}]}
    lab.kube.put(JOBS, {"metadata": meta, "status": status})
    assert "job pack" in nothing_is_launched(lab, code, stalled=stalled)


def test_a_claim_of_another_chain_is_not_taken() -> None:
    lab = Lab()
    labels = {"modelchain.dev/chain": "another"}
    meta = {"name": "family-artifacts", "namespace": NAMESPACE, "labels": labels}
    lab.kube.put(CLAIMS, {"metadata": meta})
    assert "claim family-artifacts was not made for" in nothing_is_launched(lab, Code.CLAIM_TAKEN)


def test_a_kind_of_job_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab()
    found = lab.kube.list

    async def listed(resource: Resource, *rest: str, **more: str) -> list[Object]:
        if resource == PYTORCHJOBS:
            raise NotFound("the server could not find the requested resource", code=404)
        return await found(resource, *rest, **more)

    monkeypatch.setattr(lab.kube, "list", listed)
    assert "PyTorchJob is not installed" in nothing_is_launched(lab, Code.RUNNER_MISSING)
