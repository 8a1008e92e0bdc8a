"""Without Helm, and without Go to build it, this level is skipped. With CI set that is
a failure.
"""

from __future__ import annotations

import contextlib

import pytest
from build import Unavailable
from generate import helm


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build Helm before the first test's time limit runs, and show its progress."""
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with contextlib.suppress(Unavailable), capture.global_and_fixture_disabled():
        helm("version")


@pytest.fixture(autouse=True, scope="session")
def _helm() -> None:
    try:
        helm("version")
    except Unavailable as reason:
        pytest.skip(str(reason))
