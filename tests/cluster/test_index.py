"""The index Job on a real control plane: its pods are refused, evicted, wrong or deleted, and two
chains share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import plays
import pytest
from controlplane import ControlPlane
from kubelet import Kubelet
from playedpod import Pod
from plays import Play
from recorder import Recorder
from rig import Object, Operator, Space, chain, fresh_namespace

from modelchain.api.contracts import FailureClass

OF_INDEX = "modelchain.dev/role=index"
WRONG = "spec.data.train.samples: is 1000000, but the shards hold 9"


def stopped() -> Play:
    """The pod is told to stop, and says so."""

    async def play(pod: Pod) -> None:
        await pod.start(0)
        await pod.exit(75, pod.failure(FailureClass.PREEMPTED, "stopped"))

    return play


@dataclass
class World:
    """A namespace with a claim `results`, and what the pods of index Jobs do, by chain."""

    space: Space
    kubelet: Kubelet
    scripts: dict[str, list[Play]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        async def play(pod: Pod) -> None:
            script = self.scripts.get(str(pod.chain)) or [plays.index()]
            await (script.pop(0) if len(script) > 1 else script[0])(pod)

        self.kubelet.index = play

    def apply(self, name: str, *script: Play, **changes: object) -> None:
        """A chain of one stage. Its index Job's pods play this script, the last play for ever."""
        self.scripts[name] = list(script)
        seed = {"spec.recipe.seed": sum(map(ord, name))}
        self.space.apply(chain(name, 1, **(seed | changes)))

    def job(self, name: str) -> Object:
        """The index Job that this chain has made."""
        found = self.space.list("jobs", f"{OF_INDEX},modelchain.dev/chain={name}")
        return next(iter(found))

    def pods(self, name: str) -> list[Object]:
        return self.space.list("pods", f"{OF_INDEX},modelchain.dev/chain={name}")

    def indexing(self, name: str) -> Object:
        """The stage, once its data is indexed by a Job whose pod runs."""

        def seen() -> Object | None:
            phases = [pod["status"].get("phase") for pod in self.pods(name)]
            stage = self.space.stage("a", name)
            return stage if stage.get("state") == "Indexing" and phases == ["Running"] else None

        return self.space.wait(seen, f"the data of {name} is being indexed")


@pytest.fixture(scope="module")
def world(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with (
        fresh_namespace(control_plane) as namespace,
        Kubelet(control_plane.kubeconfig, 2) as kubelet,
        Operator(control_plane.kubeconfig, tmp_path_factory.mktemp("index"), (namespace,)),
        Recorder(control_plane.etcd) as recorder,
    ):
        space = Space(control_plane, namespace)
        Space(control_plane, namespace, data="results")
        yield World(space, kubelet)
        recorder.verify()


def test_wrong_data_fails_the_stage_at_once_and_a_retry_reads_it_again(world: World) -> None:
    wrong = plays.index_failed(FailureClass.USER_ERROR, WRONG, code=2)
    world.apply("wrong", wrong, plays.index())
    stage = world.space.until("Failed", "wrong")["stages"][0]
    assert stage["reason"] == f"UserError: {WRONG}" and stage["attempts"] == []
    assert len(world.pods("wrong")) == 1, "Kubernetes does not try it again"
    before = world.job("wrong")["metadata"]["uid"]
    world.space.patch("wrong", annotations={"modelchain.dev/retry": "1"})
    stage = world.space.until("Complete", "wrong")["stages"][0]
    assert world.job("wrong")["metadata"]["uid"] != before
    assert len(stage["attempts"]) == 1 and stage["retries"] == 0


def test_a_stop_counts_as_no_failure(world: World) -> None:
    """It is tried again, and Kubernetes does not count it. It waits longer before each next try."""
    world.apply("stopped", stopped(), plays.index())
    stage = world.space.until("Complete", "stopped")["stages"][0]
    assert len(stage["attempts"]) == 1
    assert not world.job("stopped")["status"].get("failed")


def test_a_suspended_chain_uses_nothing_and_goes_on(world: World) -> None:
    world.apply("paused", plays.hang(), plays.index())
    world.indexing("paused")
    assert not [name for name in world.space.names("pytorchjobs") if name.startswith("paused-")]
    world.space.patch("paused", {"suspend": True})
    world.space.until("Suspended", "paused")
    world.space.wait(lambda: not world.pods("paused"), "its pod has ended")
    assert world.space.list("jobs", f"{OF_INDEX},modelchain.dev/chain=paused") == []
    world.space.patch("paused", {"suspend": False})
    world.space.until("Complete", "paused")


def test_data_that_no_pod_can_mount_is_told_and_an_edit_mends_it(world: World) -> None:
    world.apply("lost", **{"spec.data.volume": {"claimName": "nowhere"}})
    stage = world.space.wait(
        lambda: (
            found
            if "Unschedulable" in (found := world.space.stage("a", "lost")).get("reason", "")
            else None
        ),
        "it says that no node fits",
    )
    assert stage["state"] == "Indexing" and "nowhere" in stage["reason"]
    before = world.job("lost")["metadata"]["name"]
    world.space.patch("lost", {"data": {"volume": {"claimName": "data"}}})
    world.space.until("Complete", "lost")
    assert world.job("lost")["metadata"]["name"] != before


def test_two_chains_on_one_claim_share_the_job(world: World) -> None:
    """The chain that made it is deleted meanwhile, and the other one makes its own."""
    results = {"spec.storage": {"claimName": "results"}}
    world.apply("first", plays.hang(), **results)
    world.indexing("first")
    world.apply("second", **results)
    name = world.job("first")["metadata"]["name"]
    said = f"job {name} of chain first indexes and checks the same data"
    world.space.wait(lambda: world.space.stage("a", "second").get("reason") == said, "it waits")
    world.space.kubectl("delete", "mchain", "first")
    world.space.until("Complete", "second", 90)
    assert world.job("second")["metadata"]["name"] == name
    world.space.wait(lambda: not world.pods("first"), "no pod of the first is left")


def test_a_finished_job_stays_and_goes_with_its_chain(world: World) -> None:
    world.apply("done")
    world.space.until("Complete", "done")
    assert world.job("done")["status"]["conditions"]
    world.space.kubectl("delete", "mchain", "done")
    world.space.wait(
        lambda: not world.space.list("jobs", f"{OF_INDEX},modelchain.dev/chain=done"), "it is gone"
    )
