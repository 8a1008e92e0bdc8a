"""What the command line refuses before any process is started, and stops while the data is
checked.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from harness import MODELCHAIN, Chain, wait_until


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert "Traceback" not in done.stderr and not done.stdout
    return [line for line in done.stderr.splitlines() if line.startswith("modelchain: ")]


@pytest.mark.parametrize(
    ("root", "words"),
    [
        ("file", "is not a folder"),
        ("file/below", "Not a directory"),
        ("data/below", "where nothing is ever written"),
        ("data", "where nothing is ever written"),
    ],
)
def test_a_root_that_cannot_be_one(chain: Chain, root: str, words: str) -> None:
    (chain.folder / "file").touch()
    (chain.folder / "data").symlink_to(chain.data)
    before = sorted(chain.data.rglob("*"))
    chain.root = chain.folder / root
    done = chain.run()
    assert done.returncode == 2
    assert [words in line for line in said(done)] == [True]
    assert sorted(chain.data.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [["plan", "-o", "yaml", "-f", "x"], ["nosuch"], ["run", "-f", "x"], ["status", "--rot", "x"]],
)
def test_a_wrong_call_is_one_line(words: list[str]) -> None:
    done = subprocess.run([MODELCHAIN, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(said(done)) == len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_the_data_is_checked(chain: Chain, sig: signal.Signals) -> None:
    runner = chain.start()
    wait_until(chain.checks_data)
    os.killpg(runner.pid, sig)
    _, err = runner.communicate(timeout=30)
    assert runner.returncode == 130 and "Traceback" not in err and "interrupted" in err
    assert not chain.processes()


def test_a_message_names_the_file(chain: Chain, tmp_path: Path) -> None:
    del chain.spec["spec"]["stages"][1]["epochs"]
    done = chain.run()
    assert done.returncode == 2
    assert said(done)[0].startswith(
        f"modelchain: {chain.file}: spec.allocation.targetAcceleration: "
    )
