"""Data and a finished chain that the tests of the local runner share."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import Chain, InPieces, TwoRanks, train_by_two_ranks, train_in_pieces


@contextmanager
def once(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """A folder that all workers of pytest-xdist share, and whether it is still to be filled; the
    others wait meanwhile.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / f"{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / name, os.fstat(lock.fileno()).st_size == 0
        lock.write("filled")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as shards: real pictures, real labels, held-out ones apart."""
    from modelchain_data.pack import pack

    with once(tmp_path_factory, "digits") as (folder, empty):
        if empty:
            pack("digits", folder, on_progress=lambda *_: None)
    return folder


@pytest.fixture
def chain(tmp_path: Path, digits: Path) -> Chain:
    return Chain(tmp_path, digits)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Chain:
    """A chain that ran to its end undisturbed; tests copy its root before they touch it."""
    with once(tmp_path_factory, "finished") as (folder, empty):
        chain = Chain(folder, digits)
        if empty:
            folder.mkdir(exist_ok=True)
            done = chain.run()
            assert done.returncode == 0, done.stderr
    return chain


@pytest.fixture
def half_finished(finished: Chain, chain: Chain) -> Chain:
    """A chain whose first stage is trained already, and whose second was never trained."""
    artifact = finished.artifact(1)
    second = artifact.relative_to(finished.root).parts[0]
    shutil.copytree(finished.root, chain.root, ignore=shutil.ignore_patterns(second))
    (chain.root / "status.json").unlink()
    return chain


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> TwoRanks:
    return train_by_two_ranks(Chain(tmp_path_factory.mktemp("ranks"), digits))


@pytest.fixture(scope="session")
def in_pieces(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> InPieces:
    return train_in_pieces(Chain(tmp_path_factory.mktemp("pieces"), digits))
