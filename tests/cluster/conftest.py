"""A cluster for the session: the one of MODELCHAIN_TEST_KUBECONFIG, or a control plane of our
own.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from build import Unavailable, find_or_build
from controlplane import CRDS, Cluster, ControlPlane, new_directory

LONGEST = [
    *("two_operators", "life", "cases", "failures", "faults", "crashes", "idle", "commands"),
    *("scale", "rbac", "docs", "kueue", "shell", "refused", "controlplane"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that the workers end at about the same time."""
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build what is missing before the first test's time limit runs, and show its progress."""
    needs_programs = any("cluster" in getattr(item, "fixturenames", ()) for item in session.items)
    if needs_programs and not _given_kubeconfig() and not session.config.option.collectonly:
        capture = session.config.pluginmanager.getplugin("capturemanager")
        try:
            with capture.global_and_fixture_disabled():
                find_or_build()
        except Unavailable:
            pass  # the fixture skips with the reason


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Any cluster with our CRDs; what needs etcd, restarts or other users asks for
    `control_plane`.
    """
    given = _given_kubeconfig()
    if given:
        kubectl = shutil.which("kubectl")
        if not kubectl:
            pytest.skip("MODELCHAIN_TEST_KUBECONFIG needs kubectl in PATH")
        cluster = Cluster(Path(given), Path(kubectl))
        if any(CRDS.glob("*.yaml")):
            cluster.kubectl("apply", "-f", str(CRDS))
        yield cluster
        return
    try:
        find_or_build()
    except Unavailable as reason:
        pytest.skip(str(reason))
    control_plane = ControlPlane(new_directory()).start()
    yield control_plane
    control_plane.stop()


@pytest.fixture(scope="session")
def control_plane(cluster: Cluster) -> ControlPlane:
    """The session's own control plane."""
    if not isinstance(cluster, ControlPlane):
        pytest.skip(
            "needs a control plane of its own: etcd, restarts and users; MODELCHAIN_TEST_KUBECONFIG"
            " is set"
        )
    return cluster


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """The name of a fresh namespace in which pods can be created."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.create_namespace(name)
    yield name
    cluster.delete_namespace(name)


def _given_kubeconfig() -> str | None:
    return os.environ.get("MODELCHAIN_TEST_KUBECONFIG")
