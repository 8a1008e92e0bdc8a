"""`modelchain run`: a chain on this machine, driven by the same `decide` as on a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modelchain.api.contracts import DataRequest
from modelchain.api.reasons import Code
from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus, State
from modelchain.cli.options import FileOption
from modelchain.errors import EXIT_INTERRUPTED, InputError, WorkError
from modelchain.io.load import load_chain
from modelchain.io.paths import DataFolder
from modelchain.io.stop import listen
from modelchain.io.table import console as make_console
from modelchain.io.table import report_table, rows, stages_table
from modelchain.local.drive import INTERRUPTED, as_ctrl_c, drive, prepare
from modelchain.local.launch import STOPS, TrainerProcess, processes_for
from modelchain.local.lock import RootLock
from modelchain.local.root import Root
from modelchain.local.world import LocalWorld
from modelchain.plan.check import check_epochs
from modelchain.plan.plan import plan

INDEX = "index"


def run(
    file: FileOption,
    root: Annotated[
        Path,
        typer.Option(
            "--root", help="Folder for artifacts and status, of one chain.", show_default=False
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="The folder that stands for data.volume.mountPath."),
    ] = None,
    alone: Annotated[
        str | None,
        typer.Option(
            "--alone", metavar="STAGE", help="Train this stage's model alone, as a baseline."
        ),
    ] = None,
) -> None:
    """Train a chain on this machine, or resume it.

    Ctrl-C writes a checkpoint first. Run the same command to resume, also after a crash or an edit
    of the file: stages whose inputs did not change are not trained again.

    Example: [bold]modelchain run -f examples/quickstart.yaml --root runs/quickstart --data
    runs/digits[/bold]
    """
    console = make_console(stderr=True)
    chain, store = load_chain(file), Root(root.absolute())
    _check_is_stage(chain, alone, file)
    request = _checked(chain, store, root, data, file)
    root.mkdir(parents=True, exist_ok=True)
    listen(STOPS, as_ctrl_c)  # once a trainer runs, `drive` stops that first
    if chain.spec.budget is not None:
        console.print("spec.budget is for clusters; here it limits nothing", style="yellow")
    status, interrupted = _train(chain, store, request, alone, console)
    if (done := _baseline(status, alone)) is not None:
        make_console().print(stages_table(chain.metadata.name, done))
    else:
        _conclude(chain, store, status, interrupted, console)


def _checked(
    chain: ModelChain, store: Root, root: Path, data: Path | None, file: Path
) -> DataRequest:
    """The data that the trainer is to read, after all checks that come before the first write.

    Raises:
        InputError: the spec, the root or the data cannot be used.
    """
    folder = DataFolder(chain, data, file)
    request = folder.request(store.path / INDEX)
    check_epochs(chain, str(file), store.read_status(chain).frozen_epochs)
    _check_processes(chain, file)
    if root.exists() and not root.is_dir():
        raise InputError("is not a folder", file=root)
    if root.resolve().is_relative_to(folder.folder.resolve()):
        raise InputError(
            f"lies in the data folder {folder.folder}, where nothing is ever written", file=root
        )
    return request


def _train(
    chain: ModelChain, store: Root, request: DataRequest, alone: str | None, console: Console
) -> tuple[ChainStatus, bool]:
    """Drive the chain to its end; returns the status, and whether it was interrupted."""
    lock = RootLock.acquire(store.path, lambda text: console.print(text, style="yellow"))
    try:
        status = store.read_status(chain)
        fingerprint = prepare(request, store, console)
        world = LocalWorld(chain, store, TrainerProcess(lock), request, fingerprint, alone)
        status = drive(chain, world, status, console)
        # The gate may have waited for what is measured here, and then the chain goes on.
        while not world.interrupted and world.evaluate_added(status, console.print):
            status = drive(chain, world, status, console)
    finally:
        lock.release()
    return status, world.interrupted


def _check_is_stage(chain: ModelChain, name: str | None, file: Path) -> None:
    """Raise InputError if a stage is named that the chain does not have."""
    names = [stage.name for stage in chain.spec.stages]
    if name is not None and name not in names:
        message = f"--alone {name}: no such stage; there are {', '.join(names)}"
        raise InputError(message, file=file, field="spec.stages")


def _baseline(status: ChainStatus, name: str | None) -> ChainStatus | None:
    """The status with only the baseline that was asked for; None if that has not finished."""
    done = [row for row in status.baselines if row.name == name and row.done]
    return ChainStatus(baselines=done) if done else None


def _check_processes(chain: ModelChain, file: Path) -> None:
    """Raise InputError if the processes of a stage, by default one for each GPU, cannot share a
    batch evenly.
    """
    recipe = chain.spec.recipe
    for index, stage in enumerate(chain.spec.stages):
        processes = processes_for(stage.resources.processes_per_node)
        for what in (recipe.global_batch_size, recipe.micro_batch_size or recipe.global_batch_size):
            if what % processes:
                message = (
                    f"a batch of {what} cannot be shared by {processes} processes; set"
                    " processesPerNode"
                )
                raise InputError(
                    message, file=file, field=f"spec.stages[{index}].resources.processesPerNode"
                )


def _conclude(
    chain: ModelChain, store: Root, status: ChainStatus, interrupted: bool, console: Console
) -> None:
    """Report how the run ended, on the last line and by the exit code."""
    if status.is_true("Complete"):
        found = {s.name: store.results(s.input_digest) for s in status.stages if s.input_digest}
        results = {name: result for name, result in found.items() if result is not None}
        make_console().print(
            report_table(plan(chain, "analytic", {}, status.epochs), status, results)
        )
        return
    console.print(stages_table(chain.metadata.name, status))
    failures = ((label, s) for label, s in rows(status) if s.state is State.FAILED)
    label, failed = next(failures, ("", None))
    if failed is not None:
        attempts = [a for a in failed.attempts if a.failure is not None]
        logs = f" (logs: {store.attempt_directory(attempts[-1])}/logs)" if attempts else ""
        user_error = failed.code is Code.USER_ERROR
        error = f"stage {label}: {failed.reason}{'' if user_error else logs}"
        raise InputError(error) if user_error else WorkError(error)
    finished = [s for s in status.stages if s.state is State.SUCCEEDED or s.stalled]
    held = next((s for s in finished if not s.done), None)
    if held is not None:
        raise WorkError(f"stage {held.name}: {held.reason}")
    if interrupted:
        print(INTERRUPTED, file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED)
    reason = next((s.reason for _, s in rows(status) if s.state is State.SUSPENDED), "stopped")
    print(f"modelchain: {reason}", file=sys.stderr)
