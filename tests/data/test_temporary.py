"""A packing that is stopped leaves nothing behind. What a killed one leaves, the next start
removes.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from making import pairs, tar_of

from modelchain_data.temporary import MARK, temporary_folder

COMMAND = [sys.executable, "-c", "from modelchain.cli.app import main; main()", "pack"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar that takes a second to pack."""
    return tar_of(
        tmp_path_factory.mktemp("src") / "train-0.tar", pairs(*(f"{i:05d}" for i in range(4000)))
    )


@pytest.fixture
def started(source: Path, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two packings to the same target, both stopped in the middle (SIGSTOP)."""
    both = []
    for count in (1, 2):
        both.append(
            subprocess.Popen(
                [*COMMAND, source, "--to", tmp_path / "out"], stderr=subprocess.PIPE, text=True
            )
        )
        deadline = time.monotonic() + 100
        while len(list(tmp_path.glob(".out-*/new/*.tar"))) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        both[-1].send_signal(signal.SIGSTOP)
    yield both
    for process in both:
        process.kill()
        process.wait()


@pytest.mark.sweep(1)
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_it_as_ctrl_c_does(
    started: list[subprocess.Popen[str]], tmp_path: Path, sig: int
) -> None:
    first, second = started
    assert (
        len(list(tmp_path.glob(".out-*"))) == 2
    )  # the second one has left the first one's folder alone
    first.send_signal(sig)
    first.send_signal(signal.SIGHUP)  # services send two
    first.send_signal(signal.SIGCONT)
    said = first.communicate(timeout=60)[1]
    assert (first.returncode, said.strip().splitlines()[-1]) == (
        130,
        "modelchain: interrupted; nothing is left behind",
    )
    assert len(list(tmp_path.glob(".out-*"))) == 1 and "Traceback" not in said
    second.send_signal(sig)
    second.send_signal(signal.SIGCONT)
    second.communicate(timeout=60)
    assert second.returncode == 130 and not list(tmp_path.iterdir())


def test_what_a_killed_one_left_goes_at_the_next_start(
    started: list[subprocess.Popen[str]], source: Path, tmp_path: Path
) -> None:
    first, second = started
    first.kill()
    first.wait()
    foreign = [tmp_path / ".out-mine" / "new", tmp_path / ".other"]
    for folder in foreign:
        folder.mkdir(parents=True)
    few = tar_of(tmp_path / "few" / "train-0.tar", pairs("a"))
    done = subprocess.run(
        [*COMMAND, few, "--to", tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "1 samples" in done.stdout
    [alive] = [path.parent for path in tmp_path.glob(f".*/{MARK}")]
    assert second.poll() is None and alive.exists() and all(folder.exists() for folder in foreign)
    second.send_signal(signal.SIGCONT)
    said = second.communicate(timeout=100)[1]
    assert second.returncode == 2 and "exists and holds something else" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other", ".out-mine", "few", "out"]


def test_a_signal_while_it_cleans_up_does_not_stop_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def interrupted(path: Path, **options: object) -> None:
        calls.append(path)
        if len(calls) < 3:
            raise KeyboardInterrupt
        [entry.unlink() for entry in path.iterdir()]

    monkeypatch.setattr("modelchain_data.temporary.shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), temporary_folder(tmp_path, "x"):
        pass
    assert len(calls) == 3


def test_without_locks_folders_work_and_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("No locks available")

    monkeypatch.setattr("modelchain_data.temporary.fcntl.flock", no_locks)
    with temporary_folder(tmp_path, "x") as one, temporary_folder(tmp_path, "x"):
        assert one.exists() and not (one / MARK).exists()
    assert not list(tmp_path.iterdir())
