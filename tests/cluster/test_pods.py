"""Pods that others change or refuse: sidecars that a webhook adds, and parts of jobs that the API
server does not let a controller create. All chains run side by side.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack

import plays
import pytest
from controlplane import ControlPlane
from injector import Injector
from kubelet import Kubelet
from playedpod import Pod
from plays import Play
from recorder import Recorder
from rig import CONFIG, Object, Operator, Space, apply_all, chain, fresh_namespace

from modelchain.api.contracts import FailureClass

POOL = {"gpu": "CPU", "gpusPerNode": 0, "graceSeconds": 30}
SETTINGS = CONFIG | {
    "nodePools": {
        "cpu": POOL,
        "small": POOL | {"cpu": "2", "memory": "2Gi"},
        "invalid": POOL | {"extraResources": {"rdma": "1"}},
    }
}
LIMITS = {"startSeconds": 8, "stallSeconds": 8, "stageSeconds": 20}
GRACE = 60.0
SIGTERM = 143


def beside(code: int = 0, *, share: float = 1.0, word: bool = True) -> Play:
    """The trainer ends, and its sidecar does not."""

    async def play(pod: Pod) -> None:
        await pod.start()
        done = await pod.train(1, until=share)
        if code:
            done = pod.failure(FailureClass.NON_FINITE, "the loss is nan")
        await pod.exit_beside_a_sidecar(code, done if word else None)

    return play


def after_a_native_sidecar() -> Play:
    """The trainer fails. Then its sidecar is stopped, and leaves with a code of its own."""

    async def play(pod: Pod) -> None:
        await pod.start()
        await pod.train(1, until=0.5)
        ended = {"exitCode": SIGTERM, "reason": "Error", "startedAt": pod._since}
        pod._init_states[0] = {"terminated": ended | {"finishedAt": pod._since}}
        await pod.exit(1, pod.failure(FailureClass.NON_FINITE, "the loss is nan"))

    return play


FIRST: dict[str, Play] = {
    "good": beside(),
    "bad": beside(1, share=0.5),
    "silent": beside(word=False),
    "native": after_a_native_sidecar(),
    "floor": plays.lost_message(),
}


def script(pod: Pod) -> Play | None:
    return FIRST.get(str(pod.chain)) if pod.attempt == 1 and pod.role == "train" else None


class World:
    """A namespace for each kind of trouble, and the chains in it."""

    def __init__(self, plane: ControlPlane, stack: ExitStack):
        self.plane = plane
        names = ("mesh", "quota", "services", "floor", "invalid", "away")
        self.spaces = {
            name: Space(plane, stack.enter_context(fresh_namespace(plane))) for name in names
        }
        mesh, away = self.spaces["mesh"].namespace, self.spaces["away"].namespace
        stack.enter_context(Injector(plane, mesh, native=("native",)))
        self.away = stack.enter_context(Injector(plane, away, native=("away",)))

    def begin(self) -> None:
        self.away.down()
        self._quota("quota", pods="1")
        self._quota("services", services="0")
        floor = {"type": "Container", "min": {"cpu": "1", "memory": "1Gi"}}
        limits = {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "floor"}}
        self.spaces["floor"].apply(limits | {"spec": {"limits": [floor]}})
        self._apply("mesh", "good", 2)
        for name in ("bad", "silent", "native"):
            self._apply("mesh", name)
        two = {"spec.stages[0].resources": {"nodes": 2}}
        self._apply("quota", "gang", **two)
        self._apply("services", "alone")
        self._apply("floor", "floor", **{"spec.runner.nodePool": "small"})
        self._apply("invalid", "invalid", **{"spec.runner.nodePool": "invalid"})
        self._apply("away", "away")

    def _quota(self, space: str, **hard: str) -> None:
        quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few"}}
        found = self.spaces[space]
        found.apply(quota | {"spec": {"hard": hard}})
        found.wait(
            lambda: found.get("quota", "few").get("status", {}).get("hard"), "it is in force"
        )

    def _apply(self, space: str, name: str, stages: int = 1, **changes: Object) -> None:
        seed = {"spec.recipe.seed": len(name) * 1000 + ord(name[0]), "spec.deadlines": LIMITS}
        apply_all(self.spaces[space], [chain(name, stages, **(seed | changes))])

    def refused(self, space: str, name: str) -> Object:
        """The stage, once it is said that the API server refuses parts of its job."""
        found = self.spaces[space]
        stalled = found.until("Stalled", name)["conditions"][0]
        assert stalled["reason"] == "PodsForbidden", stalled

        def warned() -> bool:
            news = [e for e in found.list("events") if e["involvedObject"]["name"] == name]
            return any(e["type"] == "Warning" and e["reason"] == "StageStalled" for e in news)

        found.wait(warned, "an event that warns, which comes after the status")
        return found.stage("a", name)

    def complete(self, space: str, name: str, timeout: float = 120) -> Object:
        return dict(self.spaces[space].until("Complete", name, timeout)["stages"][0])


def charged(stage: Object) -> tuple[int, int, int]:
    return len(stage["attempts"]), stage["retries"], stage["disruptions"]


@pytest.fixture(scope="module")
def world(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        stack.enter_context(Kubelet(control_plane.kubeconfig, 4, script=script))
        recorder = stack.enter_context(Recorder(control_plane.etcd))
        world = World(control_plane, stack)
        namespaces = tuple(space.namespace for space in world.spaces.values())
        directory = tmp_path_factory.mktemp("pods")
        stack.enter_context(
            Operator(control_plane.kubeconfig, directory, namespaces, settings=SETTINGS)
        )
        world.begin()
        yield world
        recorder.verify()


# -- sidecars --------------------------------------------------------------------------------------


def test_stages_beside_a_sidecar(world: World) -> None:
    """The record and the verdict come at once. The pod is gone before the next attempt begins; the
    recorder checks that.
    """
    space = world.spaces["mesh"]
    for name, state in (("good", "Succeeded"), ("silent", "Succeeded"), ("bad", "Pending")):
        stage = space.wait(
            lambda name=name, state=state: (
                found
                if (found := space.stage("a", name)).get("state") == state and found["attempts"]
                else None
            ),
            f"{name} has ended",
        )
        assert stage["attempts"][0]["finishedAt"] and len(stage["attempts"]) == 1
        pod = space.get("pod", f"{name}-a-a1-master-0")
        assert [c["name"] for c in pod["spec"]["containers"]] == ["pytorch", "istio-proxy"]
        assert pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
    assert "NonFinite: " in space.stage("a", "bad")["reason"]
    verified = space.get("job", "silent-a-a1-verify")
    assert json.dumps(verified["metadata"]["labels"])


# -- parts that are refused ------------------------------------------------------------------------


def test_some_pods_of_a_gang_that_a_quota_refuses(world: World) -> None:
    stage = world.refused("quota", "gang")
    assert "exceeded quota: few, requested: pods=1, used: pods=1" in stage["reason"]
    assert stage["next"] == f"kubectl describe resourcequota -n {world.spaces['quota'].namespace}"
    time.sleep(LIMITS["startSeconds"])
    assert charged(world.spaces["quota"].stage("a", "gang")) == (1, 0, 0)
    world.spaces["quota"].kubectl("delete", "quota", "few")
    assert charged(world.complete("quota", "gang")) == (1, 0, 0)


def test_pods_whose_webhook_is_down(world: World) -> None:
    stage = world.refused("away", "away")
    assert "failed calling webhook" in stage["reason"] and "connection refused" in stage["reason"]
    assert stage["next"].startswith("kubectl get mutatingwebhookconfigurations")
    world.away.up()
    assert charged(world.complete("away", "away")) == (1, 0, 0)


def test_pods_that_are_invalid(world: World) -> None:
    """An edit that names another pool mends it: the attempt is made again."""
    stage = world.refused("invalid", "invalid")
    assert "rdma" in stage["reason"] and "is invalid" in stage["reason"]
    world.spaces["invalid"].patch("invalid", {"runner": {"nodePool": "cpu"}})
    attempts, *bill = charged(world.complete("invalid", "invalid"))
    assert (attempts, bill) == (2, [0, 0])


def test_a_verify_job_under_a_limit_range(world: World) -> None:
    """The range admits the trainers, and so it admits the Job that takes their resources."""
    assert charged(world.complete("floor", "floor")) == (1, 0, 0)


def test_services_that_a_quota_refuses(world: World) -> None:
    """One node needs none. The job never ends by itself, and is deleted."""
    space = world.spaces["services"]
    assert charged(world.complete("services", "alone")) == (1, 0, 0)
    space.wait(lambda: space.list("pytorchjobs") == [], "the job is deleted", GRACE + 30)


# -- after the minute ------------------------------------------------------------------------------


def test_a_minute_later_their_jobs_are_deleted(world: World) -> None:
    """The next stage of one runs, and another attempt of the other."""
    space = world.spaces["mesh"]
    for name in ("good", "silent", "bad"):
        stages = space.until("Complete", name, 2 * GRACE + 60)["stages"]
        first = stages[0]["attempts"][0]
        space.wait(
            lambda uid=first["uid"]: (
                uid not in {job["metadata"]["uid"] for job in space.list("pytorchjobs")}
            ),
            f"{name}'s job is deleted",
            GRACE + 30,
        )
        assert stages[0]["disruptions"] == 0
        failures = [a.get("failure") for a in stages[0]["attempts"]]
        assert failures == (["NonFinite", None] if name == "bad" else [None])


def test_a_native_sidecars_exit_code(world: World) -> None:
    stage = world.complete("mesh", "native")
    assert [a.get("failure") for a in stage["attempts"]] == ["NonFinite", None]
    assert (stage["retries"], stage["disruptions"]) == (1, 0)
