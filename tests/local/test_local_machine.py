"""`modelchain run` from a closed terminal, with a trainer that hangs, and on hidden GPUs."""

from __future__ import annotations

import json
import os
import pty
import signal
from pathlib import Path

import pytest
from harness import Chain, one_stage, wait_until

from modelchain.local import launch


def test_a_closed_terminal_is_as_ctrl_c(chain: Chain) -> None:
    """The kernel's SIGHUP, and a terminal that takes no more words: the stage checkpoints, the
    status is true.
    """
    one_stage(chain)
    chain.spec["spec"]["stages"][0]["epochs"] = 400
    chain.spec["spec"]["recipe"]["baselineEpochs"] = 400
    command = chain.command()
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(command[0], command)
    wait_until(lambda: (drained(terminal), chain.step("one") > 3)[1])
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert not chain.processes()
    [word] = [
        json.loads(path.read_text()) for path in chain.root.glob("*/local-a1/termination.json")
    ]
    assert word["class"] == "Preempted" and word["checkpointStep"] == word["step"] > 0
    assert chain.status()["stages"][0]["state"] == "Suspended"


def drained(terminal: int) -> None:
    """Writing to a terminal that is not read blocks the writer."""
    os.set_blocking(terminal, False)
    try:
        while os.read(terminal, 65536):
            pass
    except (BlockingIOError, OSError):
        pass


def rank_of(chain: Chain) -> int:
    """The process that trains: its watchdog looks alike, and is its child."""
    alike = [
        pid
        for pid in chain.processes()
        if b"modelchain_trainer"
        in (words := Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
        and b"torch.distributed.run" not in words
    ]
    parents = {
        pid: int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        for pid in alike
    }
    [rank] = [pid for pid, parent in parents.items() if parent not in alike]
    return rank


def test_a_trainer_that_hangs_is_ended_from_inside_and_tried_again(chain: Chain) -> None:
    one_stage(chain)
    chain.spec["spec"]["stages"][0]["epochs"] = 6
    chain.spec["spec"]["recipe"]["baselineEpochs"] = 6
    chain.spec["spec"]["deadlines"] = {"stallSeconds": 8}
    runner = chain.start()
    wait_until(lambda: chain.step("one") > 3)
    os.kill(rank_of(chain), signal.SIGSTOP)
    _, err = runner.communicate(timeout=150)
    assert runner.returncode == 0, err
    words = [
        json.loads(path.read_text())
        for path in sorted(chain.root.glob("*/local-a*/termination.json"))
    ]
    assert [word.get("class") for word in words] == ["StallDeadline", None]
    log = "".join(path.read_text() for path in chain.root.glob("*/local-a1/logs/**/combined.log"))
    assert "StallDeadline: no new step for 8 s" in log and " in _loop\n" in log


def test_a_sighup_while_the_data_is_checked(chain: Chain) -> None:
    runner = chain.start()
    wait_until(chain.checks_data)
    os.kill(runner.pid, signal.SIGHUP)
    _, err = runner.communicate(timeout=30)
    assert runner.returncode == 130 and "Traceback" not in err and "interrupted" in err
    assert not chain.processes()


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 3), ("", 0), ("-1", 0), ("0", 1), ("0,2", 2), ("0,-1,2", 1), ("GPU-1f,MIG-2a", 2)],
)
def test_gpus_that_are_hidden_are_not_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\nfor i in 0 1 2; do echo \"GPU $i: NVIDIA H100\"; echo '  MIG 1g.10gb'; done\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    launch.gpus.cache_clear()
    assert launch.gpus() == count
    monkeypatch.undo()
    launch.gpus.cache_clear()
