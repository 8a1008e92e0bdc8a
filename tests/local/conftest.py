"""Data and a finished chain that the tests of the local runner share."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Chain, InPieces, TwoRanks, train_by_two_ranks, train_in_pieces


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as shards: real pictures, real labels, held-out ones apart."""
    from modelchain_data.pack import pack

    folder = tmp_path_factory.mktemp("data") / "digits"
    pack("digits", folder, on_progress=lambda *_: None)
    return folder


@pytest.fixture
def chain(tmp_path: Path, digits: Path) -> Chain:
    return Chain(tmp_path, digits)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Chain:
    """A chain that ran to its end undisturbed; tests copy its root before they touch it."""
    chain = Chain(tmp_path_factory.mktemp("finished"), digits)
    done = chain.run()
    assert done.returncode == 0, done.stderr
    return chain


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> TwoRanks:
    return train_by_two_ranks(Chain(tmp_path_factory.mktemp("ranks"), digits))


@pytest.fixture(scope="session")
def in_pieces(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> InPieces:
    return train_in_pieces(Chain(tmp_path_factory.mktemp("pieces"), digits))
