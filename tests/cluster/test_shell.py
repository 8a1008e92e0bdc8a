"""kopf and the service around it on a real API server, as a process of its own; the controller only
writes down.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from controlplane import ControlPlane, free_ports

ROOT = Path(__file__).parents[2]

# {kubeconfig, namespaces, port, mode}; every call of the controller is a line on standard output
PROGRAM = """
import asyncio, json, sys, threading
from pathlib import Path
from modelchain_operator.watch import service
from modelchain_operator.api.kube import Resource, Unavailable, connect
from modelchain_operator.runners.registry import RUNNERS
from modelchain_operator.watch.leader import Leader

given = json.loads(sys.argv[1])
RUNNERS["PyTorchJob"].resource = Resource("shell.test", "v1", "latecomers")
service.DISCOVERY = 1.0

def say(*words):
    print(json.dumps(words), flush=True)

class Controller:
    async def reconcile(self, key):
        say("look", *key)
    def remember(self, pod):
        say("pod", pod["metadata"]["name"])
    def artifact_changed(self, record):
        say("artifact", record["metadata"]["name"])
    def claim_changed(self, claim, uid):
        say("claim", *claim)
        return False

async def deaf(*args):
    await asyncio.Event().wait()

async def crash(self):
    await asyncio.sleep(4)
    raise RuntimeError("a part failed")

async def unanswered(self, everything):
    raise Unavailable("no")

async def hangs(self, everything):
    await asyncio.Event().wait()

if given["mode"] == "deaf":
    service.watch, service.RESYNC = deaf, 1.0
if given["mode"] == "crash":
    service.Service._resync = crash
if given["mode"] == "unanswered":
    service.Service._list, service.RESYNC = unanswered, 0.5
if given["mode"] == "hangs":
    service.Service._list, service.RESYNC = hangs, 0.5

async def main():
    async with connect(Path(given["kubeconfig"])) as kube:
        leader = Leader(kube, "default", "shell-test")
        health = f"http://127.0.0.1:{given['port']}/healthz"
        await service.Service(kube, Controller(), given["namespaces"], leader, health).run()

asyncio.run(main())
"""


class Program:
    """The running process; `wait_for` reads what it says."""

    def __init__(self, process: subprocess.Popen[str], said: Path):
        self.process = process
        self._said = said

    def said(self) -> list[list[str]]:
        return [
            json.loads(line) for line in self._said.read_text().splitlines() if line.endswith("]")
        ]

    def wait_for(self, *words: str, seconds: float = 15, after: int = 0) -> None:
        wait(
            lambda: [*words] in self.said()[after:],
            seconds,
            f"{words} not in {self.said()[after:]}",
        )


def wait(done: Callable[[], Any], seconds: float, why: str) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, why
        time.sleep(0.05)


@contextmanager
def running(
    control_plane: ControlPlane, tmp_path: Path, *namespaces: str, mode: str = "", port: int = 0
) -> Iterator[Program]:
    given = {
        "kubeconfig": str(control_plane.kubeconfig),
        "namespaces": namespaces,
        "port": port,
        "mode": mode,
    }
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(given)],
            stdout=stdout,
            stderr=stderr,
            text=True,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(ROOT / "operator"), str(ROOT / "core")])},
        )
    try:
        yield Program(process, out)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{err.read_text()[-4000:]}") from error
    finally:
        process.kill()
        process.wait()


def apply(control_plane: ControlPlane, *objects: dict[str, Any]) -> None:
    control_plane.kubectl(
        "apply", "-f", "-", input="\n---\n".join(json.dumps(thing) for thing in objects)
    )


def chain(namespace: str, name: str) -> dict[str, Any]:
    document = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    return document | {"metadata": {"name": name, "namespace": namespace}}


def labelled(obj: dict[str, Any], namespace: str, name: str, of: str) -> dict[str, Any]:
    labels = {"modelchain.dev/chain": of, "modelchain.dev/chain-uid": "0"}
    return obj | {"metadata": {"name": name, "namespace": namespace, "labels": labels}}


POD_SPEC = {"containers": [{"name": "pytorch", "image": "none"}], "restartPolicy": "Never"}
POD = {"apiVersion": "v1", "kind": "Pod", "spec": POD_SPEC}
JOB = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "spec": {"suspend": True, "template": {"spec": POD_SPEC}},
}
SCHEMA = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
LATE = {"apiVersion": "shell.test/v1", "kind": "Latecomer"}
LATE_CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "latecomers.shell.test"},
    "spec": {
        "group": "shell.test",
        "scope": "Namespaced",
        "names": {"plural": "latecomers", "kind": "Latecomer"},
        "versions": [{"name": "v1", "served": True, "storage": True, "schema": SCHEMA}],
    },
}


@pytest.mark.parametrize("namespaced", [False, True])
def test_events_wake_the_chain(
    control_plane: ControlPlane, namespace: str, tmp_path: Path, namespaced: bool
) -> None:
    apply(control_plane, chain(namespace, "before"), chain("default", "elsewhere"))
    with running(control_plane, tmp_path, *([namespace] if namespaced else [])) as program:
        program.wait_for("look", namespace, "before", seconds=30)
        apply(control_plane, chain(namespace, "later"))
        program.wait_for("look", namespace, "later")
        bare = POD | {"metadata": {"name": "bare", "namespace": namespace}}
        apply(control_plane, bare, labelled(POD, namespace, "ours", of="by-pod"))
        program.wait_for("pod", "ours")
        program.wait_for("look", namespace, "by-pod")
        apply(control_plane, labelled(JOB, namespace, "verify", of="by-job"))
        program.wait_for("look", namespace, "by-job")
        time.sleep(1)
        seen = len(program.said())
        control_plane.kubectl("delete", "mchain", "later", f"--namespace={namespace}")
        program.wait_for("look", namespace, "later", after=seen)
        assert ["pod", "bare"] not in program.said()
        assert (["look", "default", "elsewhere"] in program.said()) is not namespaced


def test_a_kind_installed_later_is_watched(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    apply(control_plane, chain(namespace, "waits"))
    with running(control_plane, tmp_path, namespace) as program:
        program.wait_for("look", namespace, "waits", seconds=30)
        time.sleep(2)
        seen = len(program.said())
        apply(control_plane, LATE_CRD)
        try:
            program.wait_for("look", namespace, "waits", after=seen, seconds=30)
            apply(control_plane, labelled(LATE, namespace, "job", of="by-runner"))
            program.wait_for("look", namespace, "by-runner", seconds=30)
        finally:
            control_plane.kubectl("delete", "crd", "latecomers.shell.test")


def test_what_no_event_told_of_is_found(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    with running(control_plane, tmp_path, mode="deaf") as program:
        apply(control_plane, chain(namespace, "unseen"))
        program.wait_for("look", namespace, "unseen", seconds=30)
        seen = len(program.said())
        control_plane.kubectl("delete", "mchain", "unseen", f"--namespace={namespace}")
        program.wait_for("look", namespace, "unseen", after=seen)


def test_the_api_server_goes_and_comes_back(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    apply(control_plane, chain(namespace, "before"))
    with running(control_plane, tmp_path) as program:
        program.wait_for("look", namespace, "before", seconds=30)
        control_plane.restart("kube-apiserver")
        apply(control_plane, chain(namespace, "after"))
        program.wait_for("look", namespace, "after", seconds=60)
        assert program.process.poll() is None


def test_sigterm_ends_it_and_gives_the_lease_back(
    control_plane: ControlPlane, namespace: str, tmp_path: Path, unused_tcp_port: int
) -> None:
    apply(control_plane, chain(namespace, "a"))
    with running(control_plane, tmp_path, port=unused_tcp_port) as program:
        program.wait_for("look", namespace, "a", seconds=30)
        wait(lambda: health(unused_tcp_port) == 200, 30, "no health")
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(30) == 0
    lease = json.loads(
        control_plane.kubectl("get", "lease", "modelchain-operator", "-n=default", "-o=json")
    )
    assert not lease["spec"].get("holderIdentity")


def test_a_part_that_fails_ends_the_process(control_plane: ControlPlane, tmp_path: Path) -> None:
    with running(control_plane, tmp_path, mode="crash") as program:
        assert program.process.wait(30) == 1


def test_a_list_that_hangs_fails_the_probe(
    control_plane: ControlPlane, tmp_path: Path, unused_tcp_port: int
) -> None:
    with running(control_plane, tmp_path, mode="hangs", port=unused_tcp_port):
        wait(lambda: health(unused_tcp_port) == 500, 30, "still alive")


def test_an_api_server_that_is_away_fails_no_probe(
    control_plane: ControlPlane, tmp_path: Path, unused_tcp_port: int
) -> None:
    with running(control_plane, tmp_path, mode="unanswered", port=unused_tcp_port):
        wait(lambda: health(unused_tcp_port) == 200, 30, "no health")
        time.sleep(4)  # longer than three times RESYNC
        assert health(unused_tcp_port) == 200


def health(port: int) -> int | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.fixture
def unused_tcp_port() -> int:
    return free_ports(1)[0]
