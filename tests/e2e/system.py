"""ModelChain installed in a cluster, and what the tests type and read there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from build import program, training_operator_source
from controlplane import Cluster, KubectlError
from images import TRAINER

Object = dict[str, Any]
T = TypeVar("T")

HERE = Path(__file__).parent
NAMESPACE, HOME = "train", "modelchain-system"
EXAMPLE = HERE.parents[1] / "examples/quickstart-cluster.yaml"
CHART = HERE.parents[1] / "charts/modelchain"


def install(cluster: Cluster, operator: str, trainer: str, folder: Path) -> System:
    """training-operator from its own manifests, our chart by Helm, and a namespace under the
    restricted standard.
    """
    cluster.kubectl(
        "delete", "namespace", NAMESPACE, "--ignore-not-found"
    )  # of a run that was killed
    for name in (HOME, NAMESPACE):
        space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        cluster.kubectl("apply", "-f", "-", input=json.dumps(space))
    cluster.kubectl(
        "label",
        "namespace",
        NAMESPACE,
        "pod-security.kubernetes.io/enforce=restricted",
        "--overwrite",
    )
    cluster.kubectl(
        "apply",
        "--server-side",
        "-k",
        str(training_operator_source() / "manifests/overlays/standalone"),
    )
    system = System(cluster, folder, operator, trainer)
    system.helm("upgrade", "--install", "modelchain", str(CHART), *system.values(), "--wait")
    for command in _patches():
        cluster.kubectl(*command[1:])
    cluster.kubectl(
        "rollout", "status", "deployment/training-operator", "-n", "kubeflow", "--timeout=180s"
    )
    return system


def _patches() -> list[list[str]]:
    """The chart's README says how training-operator is given our init container; what it says is
    typed here.
    """
    blocks = re.findall(
        r"^```sh\n(kubectl patch .*?)^```$", (CHART / "README.md").read_text(), re.M | re.S
    )
    assert len(blocks) == 1
    return [shlex.split(block) for block in blocks]


class System:
    """kubectl and Helm on one cluster; `trainer` is the image that chains get by default, by its
    digest.
    """

    def __init__(self, cluster: Cluster, folder: Path, operator: str, trainer: str):
        self.cluster, self.trainer = cluster, trainer
        repository, _, tag = operator.rpartition(":")
        image = {"repository": repository, "tag": tag, "pullPolicy": "IfNotPresent"}
        self._values = folder / "values.yaml"
        self._values.write_text(yaml.safe_dump({"image": image, "defaults": {"image": trainer}}))

    def uninstall(self) -> None:
        """Remove what was installed into a given cluster, except training-operator and our CRDs."""
        self.cluster.kubectl("delete", "namespace", NAMESPACE)
        self.helm("uninstall", "modelchain", "--wait")
        self.cluster.kubectl("delete", "namespace", HOME)

    def example(self) -> str:
        """The quickstart for a cluster, its Job with the image that this cluster has."""
        return EXAMPLE.read_text().replace(TRAINER, self.trainer)

    def values(self) -> list[str]:
        return ["--values", str(HERE / "values.yaml"), "--values", str(self._values)]

    def helm(self, *words: str) -> str:
        command = [
            str(program("helm")),
            "--namespace",
            HOME,
            "--kubeconfig",
            str(self.cluster.kubeconfig),
            *words,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kubectl(self, *words: str, input: str | None = None) -> str:
        return self.cluster.kubectl(f"--namespace={NAMESPACE}", *words, input=input)

    def apply(self, *things: Object) -> None:
        whole = {
            "apiVersion": "v1",
            "kind": "List",
            "items": things,
        }  # as JSON: "1e-3" unquoted would be a number
        self.kubectl("apply", "-f", "-", input=json.dumps(whole))

    def get(self, kind: str, name: str) -> Object:
        found: Object = json.loads(self.kubectl("get", kind, name, "-o", "json"))
        return found

    def list(self, kind: str, selector: str = "") -> list[Object]:
        found: list[Object] = json.loads(
            self.kubectl("get", kind, "-o", "json", f"--selector={selector}")
        )["items"]
        return found

    def status(self, chain: str) -> Object:
        return dict(self.get("mchain", chain).get("status") or {})

    def stage(self, chain: str, stage: str) -> Object:
        return next((s for s in self.status(chain).get("stages", []) if s["name"] == stage), {})

    def pods(self, chain: str, stage: str = "") -> list[Object]:
        """Running trainers."""
        selector = f"modelchain.dev/role=train,modelchain.dev/chain={chain}" + (
            f",modelchain.dev/stage={stage}" if stage else ""
        )
        return [pod for pod in self.list("pods", selector) if pod["status"]["phase"] == "Running"]

    def until(self, chain: str, condition: str, seconds: float) -> Object:
        """The status once a condition is true."""

        def true() -> Object | None:
            status = self.status(chain)
            held = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
            return status if condition in held else None

        return self.wait(true, f"{chain} is {condition}", seconds)

    def trains(self, chain: str, stage: str, steps: int = 1, seconds: float = 240) -> Object:
        """Wait until a stage's attempt has taken so many steps; its running pod of rank 0."""

        def stepped() -> Object | None:
            progress = self.stage(chain, stage).get("progress") or {}
            pods = [pod for pod in self.pods(chain, stage) if "master" in pod["metadata"]["name"]]
            return pods[0] if progress.get("step", 0) >= steps and pods else None

        return self.wait(stepped, f"stage {stage} of {chain} has taken {steps} steps", seconds)

    def wait(self, what: Callable[[], T | None], name: str, seconds: float) -> T:
        """Until `what` is truthy; fails with the state of things."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if found := what():
                    return found
            except (KubectlError, KeyError):
                pass
            time.sleep(1)
        raise AssertionError(f"not within {seconds:.0f} s: {name}\n{self.state()}")

    def state(self) -> str:
        """Everything that helps to see why something did not come."""
        said = []
        for words in (
            ("get", "mchain,sart,pytorchjobs,jobs,pods,pvc,events", "-o", "wide"),
            ("get", "mchain", "-o", "yaml"),
            ("logs", "-l", "modelchain.dev/role=train", "--tail=40", "--prefix"),
            ("get", "pods", "-A", "-o", "wide"),
            (
                "logs",
                "-n",
                HOME,
                "-l",
                "app.kubernetes.io/name=modelchain",
                "--tail=40",
                "--prefix",
            ),
        ):
            try:
                ours = () if {"-n", "-A"} & set(words) else (f"--namespace={NAMESPACE}",)
                said.append(self.cluster.kubectl(*words, *ours))
            except KubectlError as error:
                said.append(str(error))
        return "\n".join(said)[-25_000:]

    def metrics(self, namespace: str, pod: str) -> str:
        """What a pod's /metrics answers, through the API server."""
        return self.cluster.kubectl(
            "get", "--raw", f"/api/v1/namespaces/{namespace}/pods/{pod}:9090/proxy/metrics"
        )


def chain(name: str, stages: int = 1, epochs: int = 4, **spec: Any) -> Object:
    """The quickstart's chain under another name, cut to its first stages; `spec` is merged into its
    spec.
    """
    made: Object = next(
        d for d in yaml.safe_load_all(EXAMPLE.read_text()) if d["kind"] == "ModelChain"
    )
    made["metadata"]["name"] = name
    body = made["spec"]
    body["stages"] = [
        stage | {"epochs": epochs, "rerun": name} for stage in body["stages"][:stages]
    ]
    body["checkpoint"] = {"everySeconds": 2}
    body.update(spec)
    return made
