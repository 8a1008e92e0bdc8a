"""Flux's own controllers as processes on the control plane, and a repository that they apply."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from controlplane import ControlPlane, free_ports
from programs import KUSTOMIZE, NOTIFICATION, SOURCE, crds_of, program
from repository import Repository
from rig import Space

Object = dict[str, Any]
PROFILES = Path(__file__).parents[2] / "deploy" / "gitops" / "flux"
KUSTOMIZATION = "/apis/kustomize.toolkit.fluxcd.io/v1/namespaces/{}/kustomizations/vision-families"
# How often Flux applies what has not changed.
INTERVAL = 5


class Flux:
    """source-controller and kustomize-controller."""

    def __init__(self, control_plane: ControlPlane, folder: Path) -> None:
        self.control_plane, self.folder = control_plane, folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> Flux:
        kubectl = self.control_plane.kubectl
        for name in (SOURCE, KUSTOMIZE, NOTIFICATION):
            kubectl("apply", "--server-side", "-f", str(crds_of(name)))
        kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=60s")
        kubectl("create", "namespace", "flux-system")
        [port] = free_ports(1)
        (self.folder / "storage").mkdir()
        where = f"127.0.0.1:{port}"
        storage = [f"--storage-path={self.folder}/storage", f"--storage-addr={where}"]
        self._run(SOURCE, *storage, f"--storage-adv-addr={where}")
        self._run(KUSTOMIZE, "--feature-gates=CancelHealthCheckOnNewRevision=true")
        return self

    def _run(self, name: str, *options: str) -> None:
        metrics, health = (f"127.0.0.1:{port}" for port in free_ports(2))
        listens = [f"--metrics-addr={metrics}", f"--health-addr={health}"]
        words = [str(program(name)), *listens, "--enable-leader-election=false", *options]
        environment = {
            "KUBECONFIG": str(self.control_plane.kubeconfig),
            "RUNTIME_NAMESPACE": "flux-system",
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
        }
        with self.log(name).open("wb") as log:
            command = ["setpriv", "--pdeathsig", "KILL", *words]
            process = subprocess.Popen(
                command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
            )
        self._processes.append(process)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(30)


class Synced:
    """What Flux makes of a repository in one namespace, by one of our profiles."""

    def __init__(self, flux: Flux, space: Space, repository: Repository, profile: str) -> None:
        self.flux, self.space, self.repository = flux, space, repository
        source = {
            "apiVersion": "source.toolkit.fluxcd.io/v1",
            "kind": "GitRepository",
            "metadata": {"name": "families"},
            "spec": {"interval": "2s", "url": repository.url, "ref": {"branch": "main"}},
        }
        _apply(space, source)
        thing = yaml.safe_load((PROFILES / f"{profile}.yaml").read_text())
        thing["metadata"].pop("namespace")
        thing["spec"] |= {
            "interval": f"{INTERVAL}s",
            "retryInterval": "3s",
            "targetNamespace": space.namespace,
        }
        _apply(space, thing)

    @property
    def status(self) -> Object:
        path = KUSTOMIZATION.format(self.space.namespace)
        return dict(self.space.cluster.read(path).get("status") or {})

    @property
    def ready(self) -> Object:
        """Its condition `Ready`."""
        found = self.status.get("conditions", [])
        return next((one for one in found if one["type"] == "Ready"), {})

    def is_ready(self, commit: str) -> bool:
        """Flux has applied the commit, and all that it waits for is there."""
        applied = str(self.status.get("lastAppliedRevision"))
        return applied.endswith(commit) and self.ready.get("status") == "True"

    def until_ready(self, commit: str, timeout: float = 150) -> None:
        try:
            self.space.wait(lambda: self.is_ready(commit), "Flux is ready", timeout)
        except AssertionError as error:
            raise AssertionError(f"{self.ready}\n{error}") from None

    def attempts(self) -> list[int]:
        """Of each stage, how often it was launched."""
        return [stage["attemptCount"] for stage in self.space.status()["stages"]]

    def passes(self) -> int:
        """How often Flux has applied this namespace."""
        log = self.flux.log(KUSTOMIZE).read_text()
        return sum(
            "server-side apply" in line and self.space.namespace in line
            for line in log.splitlines()
        )


def _apply(space: Space, thing: Object) -> None:
    space.kubectl("apply", "-f", "-", input=json.dumps(thing))


# Begins to serve a new namespace by a profile.
Begin = Callable[[str], Synced]
