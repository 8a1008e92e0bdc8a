"""Passes of the operator against an API server in memory: a launch, and what prevents it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from memorykube import MOMENT, MemoryKube, chain

from modelchain.api.reasons import Code
from modelchain.io.load import status_of
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import CHAINS, CLAIMS, Object
from modelchain_operator.reconcile.controller import Controller
from modelchain_operator.runners.pytorchjob import PyTorchJob

NOW = 1_767_225_700.0


def reconciled(*jobs: Object) -> tuple[Code | None, list[str]]:
    """The code of the first stage after a few passes, and the names of the jobs that exist."""

    async def main() -> tuple[Code | None, list[str]]:
        kube = MemoryKube(lambda status: None)
        kube.put(CHAINS, chain())
        kube.put(CLAIMS, {"metadata": {"name": "artifacts", "namespace": "team"}})
        for job in jobs:
            kube.put(PyTorchJob.resource, job)
        events: Any = SimpleNamespace(tell=lambda *_: None)
        api: Any = kube
        controller = Controller(api, events, PoolFile(), clock=lambda: NOW)
        for _ in range(3):
            await controller.reconcile(("team", "vit"))
        status = status_of(await kube.get(CHAINS, "team", "vit"))
        names = [job["metadata"]["name"] for job in await kube.list(PyTorchJob.resource)]
        return status.stages[0].code, names

    return asyncio.run(main())


def named_like_the_first_attempt(**meta: Any) -> Object:
    return {
        "kind": "PyTorchJob",
        "metadata": {"name": "vit-vit-t-a1", "namespace": "team", "labels": {}, **meta},
        "spec": {"runPolicy": {"suspend": True}},
    }


def test_a_chain_is_launched() -> None:
    assert reconciled() == (Code.MISS, ["vit-vit-t-a1"])


def test_a_job_of_the_attempts_name_is_being_deleted() -> None:
    going = named_like_the_first_attempt(deletionTimestamp=MOMENT)
    assert reconciled(going) == (Code.NAME_GOING, ["vit-vit-t-a1"])


def test_a_job_of_the_attempts_name_is_not_ours() -> None:
    """The next attempt takes the next number. Somebody else's job is left alone."""
    foreign = named_like_the_first_attempt()
    assert reconciled(foreign) == (Code.MISS, ["vit-vit-t-a1", "vit-vit-t-a2"])
