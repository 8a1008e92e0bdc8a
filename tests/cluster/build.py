"""The control plane's programs: those of KUBEBUILDER_ASSETS, and the rest built once from the Go
module proxy.

`python tests/cluster/build.py` builds what is missing (about 6 minutes on 2 cores) and prints the
cache directory.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import golang
from golang import Unavailable, cache, go, is_installed, locked

TOOLS = Path(__file__).parent / "tools"
TRAINING_OPERATOR = "github.com/kubeflow/training-operator"
TRAINING_OPERATOR_VERSION = "v1.9.4"

_VERSION = {"gitVersion": "v1.34.4", "gitMajor": "1", "gitMinor": "34", "gitTreeState": "clean"}
_LINK = " ".join(
    [
        "-s -w",
        *(f"-X k8s.io/component-base/version.{name}={value}" for name, value in _VERSION.items()),
    ]
)
_CONTROL_PLANE = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    "training-operator.v1": (
        f"{TRAINING_OPERATOR}/cmd/training-operator.v1@{TRAINING_OPERATOR_VERSION}"
    ),
}
_OTHERS = {  # the node of tests/e2e, and Helm
    "kubelet": "k8s.io/kubernetes/cmd/kubelet",
    "kube-proxy": "k8s.io/kubernetes/cmd/kube-proxy",
    "coredns": "github.com/coredns/coredns@v1.12.4",
    "helm": "helm.sh/helm/v4/cmd/helm@v4.2.4",
    "pause": "./pause",
}
NODE = tuple(_OTHERS)
_PACKAGES = _CONTROL_PLANE | _OTHERS
_MANIFESTS = ("crds/kubeflow.org_pytorchjobs.yaml", "rbac/role.yaml", "webhook/manifests.yaml")


@dataclass(frozen=True)
class Programs:
    """Where each program is, and training-operator's manifests: `crds/`, `rbac/`, `webhook/` as in
    its repository.
    """

    paths: dict[str, Path]
    manifests: Path


def find_or_build() -> Programs:
    """Every program and manifest, built first where it is missing. Raises `Unavailable`."""
    assets = Path(os.environ.get("KUBEBUILDER_ASSETS", "/nonexistent"))
    given = {name: assets / name for name in _CONTROL_PLANE if (assets / name).is_file()}
    folder = _cache()
    built = {name: folder / name for name in _CONTROL_PLANE if name not in given}
    manifests = [folder / "manifests" / name for name in _MANIFESTS]
    if not all(path.is_file() for path in [*built.values(), *manifests]):
        if not is_installed():
            raise Unavailable(
                f"the control plane needs {', '.join(built)}: install Go >= 1.24"
                " (https://go.dev/dl) and run `python tests/cluster/build.py`. `setup-envtest use`"
                " with KUBEBUILDER_ASSETS saves building etcd, kube-apiserver and kubectl;"
                " MODELCHAIN_TEST_KUBECONFIG=<file> runs the tests on a cluster of yours"
            )
        with locked(folder):
            for name, path in built.items():
                if not path.is_file():
                    golang.build(TOOLS, _PACKAGES[name], path, _LINK)
            for path in manifests:
                if not path.is_file():
                    _copy_manifest(path, path.relative_to(folder / "manifests"))
    return Programs({**given, **built}, folder / "manifests")


def program(name: str) -> Path:
    """One program of the pinned version, built first where it is missing. Raises `Unavailable`."""
    path = _cache() / name
    if not path.is_file():
        if not is_installed():
            raise Unavailable(
                f"{name} is built from source: install Go >= 1.24 (https://go.dev/dl)"
            )
        with locked(path.parent):
            if not path.is_file():
                golang.build(TOOLS, _PACKAGES[name], path, _LINK)
    return path


def training_operator_source() -> Path:
    """training-operator's module, with its `manifests/` as in its repository. Read-only. Raises
    `Unavailable`.
    """
    if not is_installed():
        raise Unavailable(
            "training-operator's manifests come with its source: install Go >= 1.24"
            " (https://go.dev/dl)"
        )
    module = json.loads(
        go(TOOLS, "mod", "download", "-json", f"{TRAINING_OPERATOR}@{TRAINING_OPERATOR_VERSION}")
    )
    return Path(module["Dir"])


def _cache() -> Path:
    pinned = (TOOLS / "go.mod").read_bytes() + (TOOLS / "go.sum").read_bytes()
    return cache("control-plane", pinned + "".join(_PACKAGES.values()).encode())


def _copy_manifest(path: Path, name: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    shutil.copyfile(training_operator_source() / "manifests/base" / name, partial)
    partial.rename(path)


if __name__ == "__main__":
    try:
        find_or_build()
        program("helm")
        print(_cache())
    except Unavailable as reason:  # the tests skip for the same reason, which fails them on CI
        print(reason, file=sys.stderr)
