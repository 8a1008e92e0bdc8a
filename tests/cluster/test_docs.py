"""The pages on clusters, typed as printed: on a real control plane, where pods are played.

Differently from what is printed only what needs a node: see `Typist.type`. The pods of the
operator's Deployment are played; a process with the Deployment's arguments, configuration and
rights does the work.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pages
import pytest
import yaml
from build import TRAINING_OPERATOR_VERSION, find_or_build, program, training_operator_source
from controlplane import ControlPlane, free_ports
from kubelet import Kubelet
from pages import REPOSITORY, commands
from playedpod import Pod
from plays import Play, hang
from rig import Space

HOME = "modelchain-system"
USER = f"system:serviceaccount:{HOME}:modelchain-operator"
GROUPS = ["system:serviceaccounts", f"system:serviceaccounts:{HOME}", "system:authenticated"]
GPU = {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
OVERLAY = r"'github\.com/kubeflow/trainer\.git/(manifests/overlays/standalone)\?ref=(.*)'"


def script(pod: Pod) -> Play | None:
    """What is no trainer and no Job runs until it is deleted."""
    return (
        hang()
        if pod.labels.get("app.kubernetes.io/name") == "modelchain" or pod.name == "artifacts"
        else None
    )


class Typist:
    """Types lines in a checkout, with `kubectl`, `helm` and `modelchain` in the PATH."""

    def __init__(self, control_plane: ControlPlane, directory: Path):
        self.control_plane, self.directory = control_plane, directory
        self.checkout, tools = directory / "checkout", directory / "bin"
        self.checkout.mkdir()
        tools.mkdir()
        for there in REPOSITORY.iterdir():
            (self.checkout / there.name).symlink_to(there)
        (values,) = (block for block in pages.yaml_blocks("install") if "nodePools" in block)
        (self.checkout / "my-values.yaml").write_text(values)
        (tools / "kubectl").symlink_to(find_or_build().paths["kubectl"])
        (tools / "helm").symlink_to(program("helm"))
        self.environment = os.environ | {
            "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "KUBECONFIG": str(control_plane.kubeconfig),
            "KUBE_EDITOR": "true",
            "COLUMNS": "120",
            **{
                f"HELM_{kind}_HOME": str(directory / "helm") for kind in ("CACHE", "CONFIG", "DATA")
            },
        }
        self.operators: list[subprocess.Popen[bytes]] = []
        self.typed: list[str] = []

    def type(self, *lines: str) -> None:
        for line in lines:
            self.typed.append(line)
            if line.startswith(("docker ", "buildah ", "modelchain plan ")):
                continue  # by tests/docs
            if line.startswith("modelchain-operator "):
                self.start(
                    [*shlex.split(line), "--metrics-port=0"]
                )  # played pods have 9090 on this machine
            elif "-n kubeflow" in line or line.startswith("kubectl logs "):
                continue  # training-operator is a process here; there are no logs of played pods
            elif "--watch" in line:
                assert self.first_words(line)
            elif line.startswith("kubectl cp "):
                words = self.run(line.replace("kubectl cp", "echo", 1)).split()
                assert (
                    re.fullmatch(r"vision/artifacts:/artifacts/[0-9a-f]{64}/artifact", words[0])
                    and len(words) == 2
                )
            elif overlay := re.search(OVERLAY, line):
                folder, version = overlay.groups()
                assert version == TRAINING_OPERATOR_VERSION
                here = f"{training_operator_source() / folder} --dry-run=server --force-conflicts"
                self.run(re.sub(OVERLAY, here, line))
            else:
                # CRDs that were applied by hand, as the chart's README says
                owned = " --take-ownership" if "--install" in line else ""
                self.run(line + owned)
                if "--install" in line:
                    self.start_deployed()

    def run(self, line: str) -> str:
        done = subprocess.run(
            line,
            shell=True,
            cwd=self.checkout,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        return done.stdout

    def first_words(self, line: str) -> str:
        """Of a command that does not end by itself."""
        with pytest.raises(subprocess.TimeoutExpired) as ended:
            subprocess.run(
                shlex.split(line),
                cwd=self.checkout,
                env=self.environment,
                capture_output=True,
                timeout=12,
            )
        return (ended.value.stdout or b"").decode()

    def start(self, words: list[str], **environment: str) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", *words]
        self.operators.append(
            subprocess.Popen(command, cwd=self.checkout, env=self.environment | environment)
        )

    def start_deployed(self) -> None:
        """An operator as the Deployment's pods would start it, by the account that the chart has
        made.
        """
        where = ("modelchain-operator", f"--namespace={HOME}", "-o", "json")
        (container,) = json.loads(self.control_plane.kubectl("get", "deployment", *where))["spec"][
            "template"
        ]["spec"]["containers"]
        (settings,) = json.loads(self.control_plane.kubectl("get", "configmap", *where))[
            "data"
        ].values()
        file = self.directory / "config.yaml"
        file.write_text(settings)
        (port,) = free_ports(1)
        ours = {"--config": str(file), "--liveness-port": str(port), "--metrics-port": "0"}
        given = dict(word.partition("=")[::2] for word in container["args"])
        assert given.keys() >= ours.keys()
        words = [f"{name}={value}" for name, value in (given | ours).items()]
        kubeconfig = self.control_plane.kubeconfig_for(USER, GROUPS)
        self.start(
            ["modelchain-operator", *words, f"--kubeconfig={kubeconfig}"], POD_NAMESPACE=HOME
        )

    def stop(self) -> None:
        for operator in self.operators:
            operator.kill()
            operator.wait()
        self.operators.clear()

    @property
    def healthy(self) -> bool:
        return all(operator.poll() is None for operator in self.operators)


@pytest.fixture
def typist(control_plane: ControlPlane, tmp_path: Path) -> Iterator[Typist]:
    namespaces = ("delete", "namespace", "vision", "language", HOME, "--ignore-not-found")
    control_plane.kubectl(*namespaces, "--timeout=60s")  # of earlier tests
    typist = Typist(control_plane, tmp_path)
    yield typist
    typist.stop()
    control_plane.kubectl(*namespaces, "--wait=false")
    roles = [
        f"-f{REPOSITORY / 'operator' / 'rbac' / name}" for name in ("account.yaml", "cluster.yaml")
    ]
    control_plane.kubectl("delete", *roles, "--ignore-not-found", "--wait=false")


@pytest.mark.timeout(600)
def test_the_pages(control_plane: ControlPlane, typist: Typist) -> None:
    with Kubelet(control_plane.kubeconfig, count=4, labels=GPU, script=script):
        typist.type(*commands("install", before="Some namespaces only"))
        typist.type(*commands("first-chain", before="Your own chain"))
        space = Space(control_plane, "vision", data="datasets")
        typist.type(*commands("first-chain", after="Your own chain"))
        assert space.states("vit-cc3m") == ["Succeeded"] * 4
        typist.type(*commands("node-pools"), *commands("failures"), *commands("security"))
        advice(space, typist)
        assert typist.healthy
        manifests(space, *pages.ON_A_CLUSTER, "own-data")
        typist.stop()
        typist.type(*commands("install", after="Some namespaces only"))
        assert typist.healthy
    known = {line for page in pages.ON_A_CLUSTER for line in commands(page)}
    assert known == set(typist.typed)
    ours = [
        line for line in commands("README") if line.startswith(pages.PROGRAMS) or " -n " in line
    ]
    assert ours and not set(ours) - known, "the README's commands are those of the pages"


def advice(space: Space, typist: Typist) -> None:
    """The commands that the page gives for each class."""
    names = {
        "NAME": "vit-cc3m",
        "NS": "vision",
        "CLAIM": "vit-cc3m-artifacts",
        "POD": space.names("pods")[0],
    }
    rows = pages.failure_rows().values()
    advised = dict.fromkeys(command for cells in rows for command in pages.advised(cells))
    for command in advised:
        if command.startswith("kubectl ") and not command.startswith("kubectl logs "):
            typist.run(" ".join(names.get(word, word) for word in command.split()))


def manifests(space: Space, *names: str) -> None:
    """Objects that a page shows are taken by the API server."""
    for block in (block for name in names for block in pages.yaml_blocks(name)):
        if (
            isinstance(thing := yaml.safe_load(block), dict)
            and thing.get("kind", "ModelChain") != "ModelChain"
        ):
            space.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", input=block)
