"""The operator as a process on the control plane, and chains small enough to see many through."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import forked
from controlplane import Cluster, KubectlError, free_ports
from specs import MINIMAL, config, inline, with_changes

Object = dict[str, Any]
T = TypeVar("T")

IMAGE = "example.com/trainer@sha256:" + "0" * 64
PATIENCE = 60.0


def chain(name: str = "family", stages: int = 3, **changes: Any) -> Object:
    """A ModelChain of tiny models; `changes` by path, as in `specs.with_changes`, with `__` for a
    dot.
    """
    shapes = (config(vision={"layers": 2 + i}) for i in range(stages))
    cluster = {
        "metadata.name": name,
        "spec.runner": {"image": IMAGE, "nodePool": "cpu"},
        "spec.storage": {"claimTemplate": {"size": "1Gi"}},
        "spec.data.volume": {"claimName": "data"},
    }
    changed = cluster | {k.replace("__", "."): v for k, v in changes.items()}
    return with_changes(inline(*shapes, **changed), MINIMAL)


CONFIG: Object = {
    "nodePools": {
        "cpu": {"gpu": "CPU", "gpusPerNode": 0, "graceSeconds": 30},
        # No node has this label, so trainers find none. An index Job may run on any node.
        "nowhere": {"gpu": "CPU", "gpusPerNode": 0, "nodeSelector": {"zone": "nowhere"}},
        "a100": {
            "gpu": "A100",
            "gpusPerNode": 8,
            "price": {"perGpuHour": "3.6", "currency": "USD", "source": "made up for the tests"},
        },
    },
    "progressSeconds": 5,
}


@contextmanager
def fresh_namespace(cluster: Cluster) -> Iterator[str]:
    """As the fixture `namespace`, for more than one test or more than one namespace."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.create_namespace(name)
    yield name
    cluster.delete_namespace(name)


def apply_all(space: Space, things: list[Object]) -> None:
    """Many objects in one call."""
    space.apply({"apiVersion": "v1", "kind": "List", "items": things})


forked.preload("modelchain_operator.__main__")


class Operator:
    """A `modelchain-operator` process. `start` starts it again after `kill`. `program` is what
    Python is told to run.
    """

    def __init__(
        self,
        kubeconfig: Path,
        directory: Path,
        namespaces: tuple[str, ...] = (),
        *,
        leader_election: bool = False,
        settings: Mapping[str, Any] = CONFIG,
        name: str = "operator",
        program: Sequence[str] = ("-m", "modelchain_operator"),
    ):
        self.log = directory / f"{name}.log"
        file = directory / f"{name}.json"
        file.write_text(json.dumps(settings))
        self.program, self.environment = program, {"POD_NAMESPACE": "default"}
        self.arguments = [
            f"--config={file}",
            f"--kubeconfig={kubeconfig}",
            "--leader-election" if leader_election else "--no-leader-election",
            "--verbose",
            *(f"--namespace={namespace}" for namespace in namespaces),
        ]
        self.process: forked.Program | None = None

    def __enter__(self) -> Operator:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """With free ports for probes and metrics."""
        self.port, self.metrics_port = free_ports(2)
        ports = [f"--liveness-port={self.port}", f"--metrics-port={self.metrics_port}"]
        arguments = [*self.arguments, *ports]
        self.process = forked.Program(self.program, arguments, self.log, self.environment)

    def kill(self) -> None:
        """SIGKILL, now."""
        if self.process is not None:
            self.process.kill()

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(30)
        assert code is not None, "it goes on after SIGTERM"
        return code

    def alive(self) -> bool:
        return self.process is not None and self.process.alive()

    def said(self) -> str:
        return self.log.read_text(errors="replace")


# Where the API server has what the tests read, by kubectl's singular words.
PATHS = {
    "mchain": "/apis/modelchain.dev/v1alpha1/namespaces/{}/modelchains",
    "sart": "/apis/modelchain.dev/v1alpha1/namespaces/{}/stageartifacts",
    "pytorchjob": "/apis/kubeflow.org/v1/namespaces/{}/pytorchjobs",
    "job": "/apis/batch/v1/namespaces/{}/jobs",
    "lease": "/apis/coordination.k8s.io/v1/namespaces/{}/leases",
    "pod": "/api/v1/namespaces/{}/pods",
    "pvc": "/api/v1/namespaces/{}/persistentvolumeclaims",
    "event": "/api/v1/namespaces/{}/events",
    "quota": "/api/v1/namespaces/{}/resourcequotas",
}


class Space:
    """One namespace with a claim of data, and what is seen in it."""

    def __init__(self, cluster: Cluster, namespace: str, data: str = "data"):
        self.cluster, self.namespace = cluster, namespace
        claim = {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": data},
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "resources": {"requests": {"storage": "1Gi"}},
            },
        }
        self.apply(claim)

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        return self.cluster.kubectl(*arguments, f"--namespace={self.namespace}", input=input)

    def apply(self, thing: Object) -> None:
        self.cluster.apply(self.namespace, thing)

    def get(self, kind: str, name: str) -> Object:
        """Raises `KubectlError` if it is not there."""
        return self.cluster.read(f"{self._path(kind)}/{name}")

    def list(self, kind: str, selector: str = "") -> list[Object]:
        found: list[Object] = self.cluster.read(self._path(kind), labelSelector=selector)["items"]
        return found

    def _path(self, kind: str) -> str:
        return PATHS[kind.removesuffix("s")].format(self.namespace)

    def names(self, kind: str) -> list[str]:
        return sorted(item["metadata"]["name"] for item in self.list(kind))

    def patch(
        self,
        name: str,
        spec: Object | None = None,
        annotations: Mapping[str, str | None] | None = None,
    ) -> None:
        body = {"spec": spec or {}, "metadata": {"annotations": annotations or {}}}
        self.cluster.edit_chain(self.namespace, name, body)

    def status(self, name: str = "family") -> Object:
        return dict(self.get("mchain", name).get("status") or {})

    def stage(self, stage: str, name: str = "family") -> Object:
        return next((s for s in self.status(name).get("stages", []) if s["name"] == stage), {})

    def states(self, name: str = "family") -> list[str]:
        return [s["state"] for s in self.status(name).get("stages", [])]

    def condition(self, kind: str, name: str = "family") -> Object | None:
        return next((c for c in self.status(name).get("conditions", []) if c["type"] == kind), None)

    def version(self, name: str = "family") -> str:
        """It changes with each write."""
        return str(self.get("mchain", name)["metadata"]["resourceVersion"])

    def at_rest(self, name: str = "family", seconds: float = 2.0) -> str:
        """Wait until a chain has not been written for some seconds; its version then. What is
        written late, on a busy machine, belongs to what was done before.
        """

        def still() -> str | None:
            before = self.version(name)
            time.sleep(seconds)
            return before if before == self.version(name) else None

        return self.wait(still, f"no more writes of {name}")

    def until(self, kind: str, name: str = "family", timeout: float = PATIENCE) -> Object:
        """Wait for a condition to be true; the status then."""

        def true() -> Object | None:
            found = self.condition(kind, name)
            return self.status(name) if found and found["status"] == "True" else None

        return self.wait(true, f"condition {kind} of {name}", timeout)

    def wait(self, what: Callable[[], T | None], name: str, timeout: float = PATIENCE) -> T:
        """Until `what` is truthy; fails with the state of things."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                if found := what():
                    return found
            except (KubectlError, StopIteration):
                pass
            time.sleep(0.25)
        state = self.kubectl("get", "mchain,sart,pytorchjobs,jobs,pods,events", "-o", "wide")
        raise AssertionError(
            f"{name}: not within {timeout:.0f} s\n{state}\n{json.dumps(self._stati(), indent=1)}"
        )

    def _stati(self) -> list[Any]:
        return [item.get("status") for item in self.list("mchain")]
