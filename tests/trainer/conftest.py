"""Trainers and ranks that tests start as processes are forked from one that has loaded torch once.
A few tests start one as users do; the local level starts all so.
"""

from __future__ import annotations

import forked
import pytest

# These tests wait for processes, while those of the other files compute. So they come first, and
# two workers end at about the same time.
FIRST = ("test_watchdog", "test_pod", "test_devices")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else 9)


def pytest_configure() -> None:
    forked.preload("modelchain_trainer.train", "tiny")
