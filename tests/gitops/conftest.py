"""Without Go, the tools' programs cannot be built, and the tests that need them are skipped. With
CI set that is a failure.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest
from golang import Unavailable
from programs import VERDICTS, program

sys.path.append(str(Path(__file__).parents[1] / "operator"))  # whose chains are played here


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build before the first test's time limit runs, and show the progress."""
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with contextlib.suppress(Unavailable), capture.global_and_fixture_disabled():
        program(VERDICTS)


@pytest.fixture(autouse=True, scope="session")
def _verdicts() -> None:
    try:
        program(VERDICTS)
    except Unavailable as reason:
        pytest.skip(str(reason))
