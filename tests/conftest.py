"""For every level: where things are, skips that are seen, and sweeps that are sampled.

On CI a skip is a failure: nothing is missing there. What a sample leaves out is deselected, not
skipped, and counted.
"""

from __future__ import annotations

import gc
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import produced
import prometheus
import pytest
import sweeps
from build import Unavailable

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real image-caption shards beside the checkout (Flickr8k, Fashion-MNIST, COCO-mini)."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real shards are not here: ../shared/data")
    return folder


@pytest.fixture(scope="session")
def promtool() -> Path:
    """The real `promtool`."""
    return _program("promtool")


@pytest.fixture(scope="session")
def prometheus_server() -> Path:
    """The real `prometheus`."""
    return _program("prometheus")


def _program(name: str) -> Path:
    try:
        return prometheus.program(name)
    except Unavailable as reason:
        pytest.skip(str(reason))


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # while packages and tests are loaded, which leaves hardly any garbage
    sweeps.seed()  # before the workers of pytest-xdist start: they inherit it
    config.pluginmanager.register(produced)


def pytest_collection_finish() -> None:
    """Garbage is looked for in what tests make, and not in what was loaded for all of them."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries complain about objects that are left at the end


@pytest.hookimpl(trylast=True)  # after -k, which may ask for one case
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    swept: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sweep"):
            swept[item.nodeid.partition("[")[0]].append(item)
    kept: set[pytest.Item] = set()
    for name, cases in swept.items():
        mark = cases[0].get_closest_marker("sweep")
        assert mark is not None
        kept.update(sweeps.sample(name, cases, *mark.args))
    dropped = [item for cases in swept.values() for item in cases if item not in kept]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


_skipped: list[str] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        _skipped.append(f"{item.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    told = getattr(session.config, "workeroutput", None)
    if told is not None:  # a worker of pytest-xdist; the next function is the controller's
        told.update(skipped=_skipped, left=dict(sweeps.left))
    elif _skipped and os.environ.get("CI"):
        for line in _skipped:
            print(f"\nskipped on CI: {line}")
        session.exitstatus = 1


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker has ended. All of them leave the same cases, or one of them what it sampled."""
    told = getattr(node, "workeroutput", {})
    _skipped.extend(told.get("skipped", []))
    sweeps.left |= Counter(told.get("left", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    left = sweeps.left.total()
    if not left or hasattr(config, "workerinput"):
        return
    tests = " ".join(config.args)
    line = f"[sweep] {tests}: {left} cases are left to `make test-all`; SEED={sweeps.seed()}"
    terminalreporter.write_line(line)
    if summary := os.environ.get("SUMMARY"):
        with Path(summary).open("a") as lines:
            lines.write(line + "\n")
