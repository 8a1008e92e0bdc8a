"""A control plane with Flux's own controllers, built from source. Without Go these tests are
skipped. `make gitops` runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from build import find_or_build
from controllers import Begin, Flux, Synced
from controlplane import ControlPlane, new_directory
from golang import Unavailable
from kubelet import Kubelet
from programs import KUSTOMIZE, SOURCE, program
from repository import Repository
from rig import Operator, Space, fresh_namespace


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build before the first test's time limit runs, and show the progress."""
    capture = session.config.pluginmanager.getplugin("capturemanager")
    try:
        with capture.global_and_fixture_disabled():
            _build()
    except Unavailable:
        pass  # the fixture skips with the reason


def _build() -> None:
    find_or_build()
    for name in (SOURCE, KUSTOMIZE):
        program(name)


@pytest.fixture(scope="session")
def control_plane() -> Iterator[ControlPlane]:
    try:
        _build()
    except Unavailable as reason:
        pytest.skip(str(reason))
    control_plane = ControlPlane(new_directory()).start()
    yield control_plane
    control_plane.stop()


@pytest.fixture(scope="session")
def flux(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flux]:
    flux = Flux(control_plane, tmp_path_factory.mktemp("flux")).start()
    yield flux
    flux.stop()


@pytest.fixture
def kubelet(control_plane: ControlPlane) -> Iterator[Kubelet]:
    with Kubelet(control_plane.kubeconfig) as kubelet:
        yield kubelet


@pytest.fixture
def begin(flux: Flux, kubelet: Kubelet, tmp_path: Path) -> Iterator[Begin]:
    """Flux and the operator serve a new namespace, by a profile; its repository has no commit."""
    repository = Repository(tmp_path)
    cluster = flux.control_plane
    with (
        fresh_namespace(cluster) as namespace,
        Operator(cluster.kubeconfig, tmp_path, (namespace,)),
    ):
        yield lambda profile: Synced(flux, Space(cluster, namespace), repository, profile)
    repository.stop()
