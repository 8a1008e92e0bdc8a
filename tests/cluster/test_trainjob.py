"""Chains whose attempts are TrainJobs, on the real CRDs of Trainer and JobSet. Both controllers are
played (see `trainer`); the API server, the Job controller and the garbage collector are real. The
operator has the rights of operator/rbac.
"""

from __future__ import annotations

import json
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import plays
import pytest
from controlplane import ControlPlane, KubectlError
from kubelet import Kubelet
from playedpod import Pod
from plays import Play
from proxy import FaultProxy
from recorder import Recorder
from rig import Object, Operator, Space, chain, fresh_namespace
from test_rbac import GROUPS, RBAC, TRAINER, USER, used
from trainer import trainer_on

sys.path.append(str(Path(__file__).parents[1] / "operator"))

from jobrequests import generated, of_examples, request

from modelchain_operator.runners.trainjob import TrainJob

RUNNER = TrainJob()
NOW = "2026-09-01T00:00:00Z"
KINDS = ("trainjobs", "trainingruntimes", "jobsets")


class World:
    """A namespace with an operator; `scripts` has a chain's script for its pods."""

    def __init__(self, space: Space, kubelet: Kubelet, recorder: Recorder, proxy: FaultProxy):
        self.space, self.kubelet, self.recorder, self.proxy = space, kubelet, recorder, proxy
        self.scripts: dict[str, Callable[[Pod], Play | None]] = {}
        kubelet.script = lambda pod: self.scripts.get(str(pod.chain), lambda pod: None)(pod)

    def apply(self, name: str, stages: int = 2, kind: str = "TrainJob", **changes: Any) -> None:
        """A chain whose inputs no other chain has."""
        seed = {"spec.recipe.seed": zlib.crc32(name.encode()) % 1000}
        self.space.apply(chain(name, stages, **(seed | {"spec.runner.kind": kind} | changes)))

    def steps(self, name: str, stage: str) -> int:
        """How many steps a stage's trainer has taken."""
        return int((self.space.stage(stage, name).get("progress") or {}).get("step", 0))

    def names(self, kind: str, name: str) -> list[str]:
        found = self.space.list(kind, f"modelchain.dev/chain={name}")
        return sorted(thing["metadata"]["name"] for thing in found)


@pytest.fixture(scope="module")
def installed(control_plane: ControlPlane) -> Iterator[ControlPlane]:
    with trainer_on(control_plane):
        yield control_plane


@pytest.fixture(scope="module")
def world(installed: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("trainjob")
    for file in ("account", "cluster"):
        installed.kubectl("apply", "-f", str(RBAC / f"{file}.yaml"))
    account = installed.kubeconfig_for(USER, GROUPS)
    with (
        fresh_namespace(installed) as namespace,
        Kubelet(installed.kubeconfig, 3) as kubelet,
        FaultProxy(account) as proxy,
        Operator(proxy.kubeconfig(directory / "proxy"), directory, (namespace,)),
        Recorder(installed.etcd) as recorder,
    ):
        yield World(Space(installed, namespace), kubelet, recorder, proxy)
    installed.kubectl("delete", "-f", str(RBAC / "cluster.yaml"), "--ignore-not-found")


@pytest.fixture(autouse=True)
def _promises(world: World) -> Iterator[None]:
    yield
    world.recorder.verify()


# -- the objects -----------------------------------------------------------------------------------


def both(asked: Any) -> list[Object]:
    made = RUNNER.runtime(asked)
    assert made is not None
    return [made, RUNNER.build(asked)]


def test_both_objects_are_accepted(installed: ControlPlane, namespace: str) -> None:
    asked = [*of_examples(), *(generated(seed) for seed in range(30))]
    items = [thing for one in asked for thing in both(replace(one, namespace=namespace))]
    manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    made = installed.kubectl("create", "--dry-run=server", "-o", "name", "-f", "-", input=manifest)
    assert len(made.splitlines()) == len(items)


@pytest.mark.parametrize("queue", [None, "vision"])
def test_a_release_is_of_the_job_that_was_read(
    installed: ControlPlane, namespace: str, queue: str | None
) -> None:
    asked = request(namespace=namespace, chain_uid=str(uuid.uuid4()))
    for thing in both(asked):
        del thing["metadata"]["ownerReferences"]  # its chain is not there
        installed.kubectl("create", "-f", "-", input=json.dumps(thing))
    job = ("trainjobs.trainer.kubeflow.org", asked.name, "-n", namespace, "-o", "json")
    installed.kubectl("wait", "--for=condition=Suspended", *job[:4], "--timeout=60s")
    released = json.loads(installed.kubectl("get", *job))
    stale = released["metadata"] | {"resourceVersion": "1"}
    with pytest.raises(KubectlError, match="modified"):
        other = json.dumps(RUNNER.release(released | {"metadata": stale}, queue, NOW))
        installed.kubectl("patch", *job, "--type=merge", "-p", other)
    for _ in range(1 if queue else 2):  # without a queue its label goes first
        assert not RUNNER.state(released).released
        patch = json.dumps(RUNNER.release(released, queue, NOW))
        released = json.loads(installed.kubectl("patch", *job, "--type=merge", "-p", patch))
    state = RUNNER.state(released)
    assert state.released and state.suspended == (queue is not None) and state.queue == queue


# -- the life of a chain ---------------------------------------------------------------------------


def test_two_stages_the_second_on_two_nodes(world: World) -> None:
    world.scripts["two"] = lambda pod: plays.usual(2.0)
    world.apply("two", **{"spec.stages[1].resources": {"nodes": 2}, "spec.runner.nodePool": "a100"})
    status = world.space.until("Complete", "two")
    assert [s["state"] for s in status["stages"]] == ["Succeeded"] * 2
    assert [a["runner"] for s in status["stages"] for a in s["attempts"]] == ["TrainJob"] * 2
    assert all(s["gpuSeconds"] > 0 for s in status["stages"])
    for kind in KINDS:
        assert world.names(kind, "two") == ["two-a-a1", "two-b-a1"]
    pods = world.space.list("pod", "modelchain.dev/stage=b,modelchain.dev/role=train")
    ranks = {pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] for pod in pods}
    assert ranks == {"0", "1"}
    assert world.names("pytorchjobs", "two") == []


def test_suspend_and_resume(world: World) -> None:
    space = world.space
    world.scripts["pause"] = lambda pod: (
        plays.stall() if (pod.stage, pod.attempt) == ("b", 1) else None
    )
    world.apply("pause")
    space.wait(lambda: world.steps("pause", "b"), "b runs")
    space.patch("pause", {"suspend": True})
    stage = space.until("Suspended", "pause")["stages"][1]
    assert (stage["state"], stage["retries"], stage["disruptions"]) == ("Suspended", 0, 0)
    gone = lambda: not {*world.names("trainjobs", "pause")} & {"pause-b-a1"}  # noqa: E731
    space.wait(gone, "its job is gone")
    space.wait(
        lambda: "pause-b-a1" not in world.names("trainingruntimes", "pause"), "its runtime is gone"
    )
    space.patch("pause", {"suspend": False})
    stage = space.until("Complete", "pause")["stages"][1]
    assert [a["state"] for a in stage["attempts"]] == ["Suspended", "Succeeded"]
    assert world.kubelet.trained[stage["inputDigest"]] == ["pause-b-a1", "pause-b-a2"]
    assert world.names("trainjobs", "pause") == ["pause-a-a1", "pause-b-a2"]


def test_a_failure_is_told_by_its_last_word_and_tried_again(world: World) -> None:
    world.scripts["fails"] = lambda pod: (
        plays.preempt() if (pod.stage, pod.attempt) == ("a", 1) else None
    )
    world.apply("fails", 1)
    [stage] = world.space.until("Complete", "fails")["stages"]
    first, second = stage["attempts"]
    assert (first["failure"], first["state"], second["state"]) == (
        "Preempted",
        "Failed",
        "Succeeded",
    )
    assert stage["disruptions"] == 1


def test_a_job_that_a_user_deletes_is_launched_anew_after_its_pods_are_gone(world: World) -> None:
    """In the background: first the TrainJob is gone, then its JobSet, its Job and its pods."""
    space = world.space
    world.scripts["gone"] = lambda pod: plays.stall() if pod.attempt == 1 else None
    world.apply("gone", 1)
    space.wait(lambda: world.steps("gone", "a"), "a runs")
    space.kubectl("delete", "trainjob", "gone-a-a1", "--cascade=background")
    [stage] = space.until("Complete", "gone")["stages"]
    assert [a["name"] for a in stage["attempts"]] == ["gone-a-a1", "gone-a-a2"]


def test_auto_takes_pytorchjob_while_both_are_installed(world: World) -> None:
    world.apply("auto", 1, kind="Auto")
    [stage] = world.space.until("Complete", "auto")["stages"]
    assert [a["runner"] for a in stage["attempts"]] == ["PyTorchJob"]
    assert world.names("trainjobs", "auto") == []


def test_a_deleted_chain_leaves_nothing(world: World) -> None:
    space = world.space
    world.scripts["short"] = lambda pod: plays.stall() if pod.stage == "b" else None
    world.apply("short")
    space.wait(lambda: world.steps("short", "b"), "b runs")
    space.kubectl("delete", "mchain", "short")
    for kind in (*KINDS, "pytorchjobs", "jobs", "pods"):
        space.wait(lambda kind=kind: not world.names(kind, "short"), f"no {kind}")


def test_the_rights_are_enough_and_all_are_needed(world: World) -> None:
    """Comes last: the tests before it have used the rights."""
    own = [r for r in world.proxy.log if r.namespace in ("", world.space.namespace)]
    assert not [str(r) for r in own if r.status in (401, 403)]
    assert used(own) >= TRAINER
