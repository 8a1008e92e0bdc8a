"""`modelchain run`: the whole chain on this machine, driven by the same `decide` as on a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from modelchain.cli.files import write_atomic
from modelchain.cli.load import load_chain
from modelchain.cli.local.launch import STOPS, Trainer, processes_for
from modelchain.cli.local.lock import RootLock
from modelchain.cli.local.root import Root
from modelchain.cli.local.table import console as make_console
from modelchain.cli.local.table import report_table, stages_table
from modelchain.cli.local.world import LocalWorld
from modelchain.cli.paths import DataFolder
from modelchain.cli.stop import listen
from modelchain.cli.validate import FileOption, check_epochs
from modelchain.contracts import DataAnswer, DataRequest
from modelchain.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, InputError, Problem, WorkError
from modelchain.plan import plan
from modelchain.reconcile import decide
from modelchain.spec import ModelChain
from modelchain.status import ChainStatus, State

CACHE = "cache"
INTERRUPTED = "modelchain: interrupted; the same command goes on"
POLL_SECONDS = 0.5


def run(
    file: FileOption,
    root: Annotated[
        Path, typer.Option("--root", help="Where artifacts and status go; one chain a root.", show_default=False)
    ],
    data: Annotated[
        Path | None, typer.Option("--data", help="The folder that stands for data.volume.mountPath.")
    ] = None,
    alone: Annotated[
        str | None, typer.Option("--alone", metavar="STAGE", help="Train this stage's model alone, as a baseline.")
    ] = None,
) -> None:
    """Train a chain on this machine, or go on where it stopped.

    Ctrl-C checkpoints first. The same command goes on after it, after a crash and after an edit of the file: stages
    whose inputs did not change are not trained again.

    Example: [bold]modelchain run -f examples/quickstart.yaml --root runs/quickstart --data runs/digits[/bold]
    """
    console = make_console(stderr=True)
    chain = load_chain(file)
    status_name = "status.json"
    if alone is not None:
        chain, status_name = _alone(chain, alone, file), f"status-alone-{alone}.json"
    store = Root(root.absolute(), status_name)
    folder = DataFolder(chain, data, file)
    request = folder.request(store.path / CACHE)
    check_epochs(chain, file, store.read_status(chain.metadata.name).frozen_epochs)  # before anything is written
    _check_processes(chain, file)
    if root.exists() and not root.is_dir():
        raise InputError("is not a folder", file=root)
    if root.resolve().is_relative_to(folder.folder.resolve()):
        raise InputError(f"lies in the data folder {folder.folder}, where nothing is ever written", file=root)
    root.mkdir(parents=True, exist_ok=True)
    listen(STOPS, _as_ctrl_c)  # until there is a trainer to stop first
    lock = RootLock.acquire(store.path, lambda text: console.print(text, style="yellow"))
    try:
        status = store.read_status(chain.metadata.name)
        fingerprint = _prepare(request, store, console)
        world = LocalWorld(chain, store, Trainer(lock), request, fingerprint)
        status = _drive(chain, world, status, console)
        if not world.interrupted and world.evaluate_added(status, console.print):
            status = _drive(chain, world, status, console)
    finally:
        lock.release()
    _conclude(chain, store, status, world.interrupted, console)


def _alone(chain: ModelChain, name: str, file: Path) -> ModelChain:
    """The baseline run of one model: random initialisation, baselineEpochs, no distillation."""
    for stage in chain.spec.stages:
        if stage.name == name:
            one = stage.model_copy(update={"epochs": chain.spec.recipe.baseline_epochs})
            return chain.model_copy(update={"spec": chain.spec.model_copy(update={"stages": [one]})})
    names = ", ".join(stage.name for stage in chain.spec.stages)
    raise InputError(f"--alone {name}: no such stage; there are {names}", file=file, field="spec.stages")


def _check_processes(chain: ModelChain, file: Path) -> None:
    """On this machine a stage's processes may default to its GPUs: they must share the batch evenly, too."""
    recipe = chain.spec.recipe
    for index, stage in enumerate(chain.spec.stages):
        processes = processes_for(stage.resources.processes_per_node)
        for what in (recipe.global_batch_size, recipe.micro_batch_size or recipe.global_batch_size):
            if what % processes:
                message = f"a batch of {what} cannot be shared by {processes} processes; set processesPerNode"
                raise InputError(message, file=file, field=f"spec.stages[{index}].resources.processesPerNode")


def _prepare(request: DataRequest, store: Root, console: Console) -> str:
    """Have the trainer index and check all data before the first stage; returns the training data's fingerprint."""
    asked = store.path / ".data-request.json"
    write_atomic(asked, request.model_dump_json(by_alias=True).encode())
    console.print("checking the data", style="dim")
    guard = [sys.executable, "-m", "modelchain.cli.local.guard", os.devnull]  # it ends with us, whatever ends us
    command = [*guard, sys.executable, "-m", "modelchain_data", str(asked)]
    try:  # in a session of its own, so that Ctrl-C is ours to handle
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, start_new_session=True)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    asked.unlink(missing_ok=True)
    try:
        answer = DataAnswer.model_validate_json(done.stdout)
    except ValueError as error:
        raise WorkError(f"the check of the data ended with exit code {done.returncode} and no answer") from error
    if answer.problems:
        if done.returncode == EXIT_BAD_INPUT:
            raise InputError(*(Problem(problem) for problem in answer.problems))
        raise WorkError("\n".join(answer.problems))
    for note in answer.notes:
        console.print(note, style="yellow")
    assert answer.fingerprint is not None
    return answer.fingerprint


def _drive(chain: ModelChain, world: LocalWorld, status: ChainStatus, console: Console) -> ChainStatus:
    """Decide, write or act, and look again, until nothing is left to do."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        _hung_up(number)
        world.interrupted = True

    handlers = listen(STOPS, interrupt)
    printed = ""
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                step = decide(chain, world.observe(status), time.time())
                if step.write:
                    world.root.write_status(chain, step.status)
                    status = step.status
                elif step.action is not None:
                    world.act(step)
                if console.is_terminal:
                    live.update(stages_table(chain.metadata.name, status), refresh=True)
                else:
                    printed = _print_changes(status, printed)
                if step.again is None:
                    return status
                if step.again:
                    time.sleep(min(step.again, POLL_SECONDS))
    finally:
        for sig, handler in handlers.items():
            signal.signal(sig, handler)


def _as_ctrl_c(number: int, _frame: FrameType | None) -> None:
    _hung_up(number)
    raise KeyboardInterrupt


def _hung_up(number: int) -> None:
    """The terminal has gone: a line written to it would be an error, and end what is to end in peace."""
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


def _print_changes(status: ChainStatus, before: str) -> str:
    """Without a terminal: one line whenever a stage's state or tenth of progress changes."""
    lines = []
    for stage in status.stages:
        at = stage.progress
        share = f" {10 * (10 * at.step // at.steps)} %, {at.eta_seconds:.0f} s left" if at else ""
        lines.append(f"{stage.name}: {stage.state}{share}{f' ({stage.reason})' if stage.reason else ''}")
    known = before.splitlines()
    for line in lines:
        if line not in known and not (" s left" in line and line.split(",")[0] in {k.split(",")[0] for k in known}):
            print(line, file=sys.stderr, flush=True)
    return "\n".join(lines)


def _conclude(chain: ModelChain, store: Root, status: ChainStatus, interrupted: bool, console: Console) -> None:
    """Say how it ended, on the last line and in the exit code."""
    if status.is_true("Complete"):
        found = {s.name: store.results(s.input_digest) for s in status.stages if s.input_digest}
        results = {name: result for name, result in found.items() if result is not None}
        make_console().print(report_table(plan(chain, "analytic", {}, status.epochs), status, results))
        return
    console.print(stages_table(chain.metadata.name, status))
    failed = next((s for s in status.stages if s.state is State.FAILED), None)
    if failed is not None:
        attempts = [a for a in failed.attempts if a.failure is not None]
        logs = f" (logs: {store.attempt_directory(attempts[-1])}/logs)" if attempts else ""
        user_error = failed.reason.startswith("UserError: ")
        error = f"stage {failed.name}: {failed.reason}{'' if user_error else logs}"
        raise InputError(error) if user_error else WorkError(error)
    if interrupted:
        print(INTERRUPTED, file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED)
    reason = next((s.reason for s in status.stages if s.state is State.SUSPENDED), "stopped")
    print(f"modelchain: {reason}", file=sys.stderr)
