"""Data and a finished chain that the tests of the local runner share."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from harness import Chain, one_stage


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


RENAMED = ["unshare", "--uts", "sh", "-c", 'hostname nosuchhost.invalid && exec "$@"', "sh"]


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> tuple[Chain, bool]:
    """Its first stage, trained by two processes; and whether the host's name did not resolve, which
    needs root.
    """
    chain = one_stage(Chain(tmp_path_factory.mktemp("ranks"), digits), processesPerNode=2)
    try:
        renamed = not subprocess.run([*RENAMED, "true"], capture_output=True).returncode
    except FileNotFoundError:
        renamed = False
    command = [*(RENAMED if renamed else []), *chain.command()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return chain, renamed
