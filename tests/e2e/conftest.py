"""A cluster in which pods really train, with training-operator and our chart: one for the
session.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY / "tests" / "cluster")]

import images  # noqa: E402
import machine  # noqa: E402
from controlplane import Cluster  # noqa: E402
from lab import Lab, alone  # noqa: E402
from system import System, install  # noqa: E402

KUBECONFIG = "MODELCHAIN_TEST_KUBECONFIG"
IMAGES = ("MODELCHAIN_OPERATOR_IMAGE", "MODELCHAIN_TRAINER_IMAGE")


@pytest.fixture(scope="session")
def cluster() -> Iterator[tuple[Cluster, str, str]]:
    """A cluster, and the operator's and the trainer's image in it; the trainer's by digest."""
    if given := os.environ.get(KUBECONFIG):
        kubectl = shutil.which("kubectl")
        if not kubectl or not all(os.environ.get(name) for name in IMAGES):
            pytest.fail(
                f"{KUBECONFIG} needs kubectl in PATH and images the cluster can pull in"
                f" {' and '.join(IMAGES)}"
            )
        yield Cluster(Path(given), Path(kubectl)), os.environ[IMAGES[0]], os.environ[IMAGES[1]]
        return
    if wants := machine.wants():
        pytest.skip("; ".join(wants))
    if packages := machine.missing_packages():
        pytest.skip(f"needs {', '.join(packages)}, which `make e2e` installs")
    with alone(machine.cache()):
        buildah = images.build(machine.cache())
        lab = Lab(machine.cache() / "node").start()
        try:
            images.load(buildah, lab)
            yield lab, images.OPERATOR, images.by_digest(lab, images.TRAINER)
        finally:
            lab.stop()


@pytest.fixture(scope="session")
def lab(cluster: tuple[Cluster, str, str]) -> Lab:
    """Our own node, for what must not be done to a given cluster."""
    if not isinstance(cluster[0], Lab):
        pytest.skip(f"needs a node of its own; {KUBECONFIG} is set")
    return cluster[0]


@pytest.fixture(scope="session")
def system(
    cluster: tuple[Cluster, str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    """training-operator from its own manifests, our chart by Helm, and a namespace under the
    restricted standard.
    """
    system = install(*cluster, tmp_path_factory.mktemp("system"))
    yield system
    if not isinstance(cluster[0], Lab):
        system.uninstall()
