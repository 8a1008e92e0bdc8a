"""An attempt runs in the node pool that its job was made for, and costs that pool's price, whatever
the spec and the configuration say later.
"""

from __future__ import annotations

from typing import Any

import podshapes
import pytest
from lab import Lab
from memorykube import IMAGE
from podshapes import made_for
from specs import with_changes

from modelchain.api.status import AttemptStatus, State
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import CHAINS, PODS
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS

FIRST, SECOND = "family-a-a1", "family-a-a2"
GPUS = 8


def pool(price: str, resource: str = "nvidia.com/gpu") -> dict[str, Any]:
    """A pool in which a GPU second costs so many dollars."""
    per_hour = str(3600 * int(price))
    cost = {"perGpuHour": per_hour, "currency": "USD", "source": "for the tests"}
    return {"gpu": "A100", "gpusPerNode": GPUS, "gpuResource": resource, "price": cost}


POOLS = {"cheap": pool("1"), "dear": pool("5"), "other-gpus": pool("3", "amd.com/gpu")}


def configured(default: str = "cheap", **changes: Any) -> PoolFile:
    body = {"nodePools": POOLS, "defaults": {"nodePool": default}}
    return PoolFile.model_validate(with_changes(changes, body))


async def _unheard(pods: object) -> None:
    """No trainer can be asked."""


class Chain:
    """A chain of one stage whose first attempt has run for 100 s in the pool `cheap`."""

    def __init__(self, named: str | None = "cheap"):
        self.lab = Lab(configured())
        self.restart()
        self.edit(named)
        self.lab.passes(count=2)
        self.run(FIRST)
        self.look(100)
        assert self.attempt(FIRST).cost == f"{100 * GPUS}.00"

    def restart(self, pools: PoolFile | None = None) -> None:
        """Another process of the operator, perhaps of another configuration."""
        self.lab.pools = pools or self.lab.pools
        self.lab.restart()
        self.lab.controller.reader.progress = _unheard  # type: ignore[method-assign]

    def edit(self, named: str | None) -> None:
        runner = {"spec.runner.nodePool": named} if named else {"spec.runner": {"image": IMAGE}}
        self.lab.apply(**runner)

    def run(self, job: str) -> None:
        """The job's pod starts now."""
        began = self.lab.now - podshapes.T0
        pod = podshapes.running(start=began, created=began)
        pod["metadata"]["uid"] = f"{job}-pod"
        self.lab.kube.put(PODS, made_for(self.lab.get(PYTORCHJOBS, job), pod))

    def look(self, seconds: float) -> None:
        self.lab.now += seconds
        self.lab.passes(count=3)

    def attempt(self, name: str) -> AttemptStatus:
        return self.lab.status().attempts[name][1]


@pytest.mark.parametrize("named", ["dear", "other-gpus", "nothing-of-ours"])
def test_an_edit_of_the_pool_leaves_a_running_attempt_where_it_is(named: str) -> None:
    chain = Chain()
    chain.edit(named)
    chain.look(100)
    attempt = chain.attempt(FIRST)
    assert attempt.state is State.RUNNING and chain.lab.names(PYTORCHJOBS) == [FIRST]
    assert (attempt.gpu_seconds, attempt.cost) == (200 * GPUS, f"{200 * GPUS}.00")


def test_another_default_pool_leaves_a_running_attempt_where_it_is() -> None:
    chain = Chain(named=None)
    chain.restart(configured("dear"))
    chain.look(100)
    attempt = chain.attempt(FIRST)
    assert (attempt.pool, attempt.cost) == ("cheap", f"{200 * GPUS}.00")


def test_the_next_attempt_runs_in_the_pool_of_the_spec() -> None:
    chain = Chain()
    chain.edit("dear")
    chain.look(100)
    chain.lab.drop(PYTORCHJOBS, FIRST)
    chain.lab.drop(PODS, f"{FIRST}-master-0")
    chain.look(0)
    first = chain.attempt(FIRST)
    assert first.finished_at is not None and first.cost == f"{200 * GPUS}.00"
    chain.look(60)
    chain.run(SECOND)
    chain.look(100)
    second = chain.attempt(SECOND)
    assert (second.pool, second.cost) == ("dear", f"{5 * 100 * GPUS}.00")


def test_a_pod_that_outlives_its_job_stays_in_its_pool() -> None:
    chain = Chain()
    chain.edit("dear")
    chain.lab.drop(PYTORCHJOBS, FIRST)
    chain.look(100)
    assert chain.attempt(FIRST).cost == f"{200 * GPUS}.00"


def test_a_pool_that_leaves_the_configuration_has_no_price() -> None:
    """Its GPU time is counted on. What was spent before keeps its price."""
    chain = Chain()
    chain.restart(configured("dear", nodePools={"dear": POOLS["dear"]}))
    chain.look(100)
    attempt = chain.attempt(FIRST)
    assert attempt.state is State.RUNNING
    assert (attempt.gpu_seconds, attempt.cost) == (200 * GPUS, f"{100 * GPUS}.00")


def test_a_new_price_of_the_pool_counts_from_now_on() -> None:
    chain = Chain()
    chain.restart(configured(**{"nodePools.cheap": pool("2")}))
    chain.look(100)
    assert chain.attempt(FIRST).cost == f"{300 * GPUS}.00"


def test_an_attempt_of_a_status_that_names_no_pool_runs_in_that_of_the_spec() -> None:
    """An older version wrote neither the status nor the job's annotation."""
    chain = Chain()
    stored = chain.lab.kube.objects[CHAINS.plural, "family"]
    del stored["status"]["stages"][0]["attempts"][0]["pool"]
    del chain.lab.get(PYTORCHJOBS, FIRST)["metadata"]["annotations"]["modelchain.dev/node-pool"]
    chain.look(100)
    assert chain.attempt(FIRST).cost == f"{200 * GPUS}.00"
