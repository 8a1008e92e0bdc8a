"""Ranks that tests start as processes are forked from one that has loaded torch once: to load it
takes a process five seconds of a core.
"""

from __future__ import annotations

import multiprocessing


def pytest_configure() -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["modelchain_trainer.train"])
