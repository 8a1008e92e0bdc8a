"""The loop of a local chain: check the data once, then repeat: observe, decide, write or act."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType

import typer
from rich.console import Console
from rich.live import Live

from modelchain.api.contracts import DataAnswer, DataRequest, IndexTask
from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus
from modelchain.decide.decide import decide
from modelchain.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, Problem, WorkError
from modelchain.io.files import write_atomic
from modelchain.io.stop import listen
from modelchain.io.table import rows, stages_table
from modelchain.local.launch import STOPS
from modelchain.local.root import Root
from modelchain.local.world import LocalWorld

INTERRUPTED = "modelchain: interrupted; run the same command to resume"
POLL_SECONDS = 0.5


def prepare(request: DataRequest, store: Root, console: Console) -> str:
    """Index and check all data in a process of the data room. Returns the training data's
    fingerprint.
    """
    asked = store.path / ".index-task.json"
    write_atomic(asked, IndexTask(data=request).model_dump_json(by_alias=True).encode())
    console.print("checking the data", style="dim")
    # Under the guard it ends with this process. In a session of its own it gets no Ctrl-C, which
    # this process handles.
    guard = [sys.executable, "-m", "modelchain.io.guard", os.devnull]
    command = [*guard, sys.executable, "-m", "modelchain_data", str(asked)]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False, start_new_session=True
        )
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    asked.unlink(missing_ok=True)
    try:
        answer = DataAnswer.model_validate_json(done.stdout)
    except ValueError as error:
        raise WorkError(
            f"the check of the data ended with exit code {done.returncode} and no answer"
        ) from error
    if answer.problems:
        if done.returncode == EXIT_BAD_INPUT:
            raise InputError(*(Problem(problem) for problem in answer.problems))
        raise WorkError("\n".join(answer.problems))
    for note in answer.notes:
        console.print(note, style="yellow")
    assert answer.fingerprint is not None
    return answer.fingerprint


def drive(
    chain: ModelChain, world: LocalWorld, status: ChainStatus, console: Console
) -> ChainStatus:
    """Observe, decide, and write or act, until nothing is left to do."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        _hung_up(number)
        world.interrupted = True

    handlers = listen(STOPS, interrupt)
    printed: dict[str, str] = {}
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                decision = decide(chain, world.observe(status), time.time())
                if decision.write:
                    world.root.write_status(chain, decision.status)
                    status = decision.status
                elif decision.action is not None:
                    world.act(decision)
                if console.is_terminal:
                    live.update(stages_table(chain.metadata.name, status), refresh=True)
                else:
                    printed = _print_changes(status, printed)
                if decision.again is None:
                    return status
                if decision.again:
                    time.sleep(min(decision.again, POLL_SECONDS))
    finally:
        for sig, handler in handlers.items():
            signal.signal(sig, handler)


def as_ctrl_c(number: int, _frame: FrameType | None) -> None:
    _hung_up(number)
    raise KeyboardInterrupt


def _hung_up(number: int) -> None:
    """After SIGHUP the terminal is gone. Send output to nowhere, since a failing write would end
    this process before its trainer has stopped.
    """
    if number == signal.SIGHUP:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            if not _writable(stream):
                os.dup2(nowhere, stream)
        os.close(nowhere)


def _writable(stream: int) -> bool:
    try:
        os.write(stream, b"")
    except OSError:
        return False
    return True


def _print_changes(status: ChainStatus, before: dict[str, str]) -> dict[str, str]:
    """Without a terminal: one line whenever a stage's state, reason or tenth of progress changes.

    Returns what was last printed of each stage, but for the time left, which always changes.
    """
    said = {}
    for name, stage in rows(status):
        at, left = stage.progress, ""
        line = f"{name}: {stage.state}"
        if at is not None:
            line += f" {10 * (10 * at.step // at.steps)} %"
            left = f", {at.eta_seconds:.0f} s left"
        why = f" ({stage.reason})" if stage.reason else ""
        said[name] = line + why
        if before.get(name) != said[name]:
            print(line + left + why, file=sys.stderr, flush=True)
    return said
