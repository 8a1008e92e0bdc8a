"""`modelchain plan`: what a chain will cost, before it runs."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from modelchain.api.spec import ModelChain
from modelchain.cli.options import FileOption
from modelchain.errors import InputError
from modelchain.io.load import load_chain, load_model
from modelchain.plan import plan as planning
from modelchain.plan.pools import DEFAULT_POOLS, PoolFile, Price


def plan(
    file: FileOption,
    output: Annotated[
        Literal["table", "json"], typer.Option("-o", "--output", help="What to print.")
    ] = "table",
    convention: Annotated[
        planning.Convention,
        typer.Option(
            help=(
                "How MACs are counted: as the trainer spends them, or as the paper's Table G prints"
                " them."
            )
        ),
    ] = "analytic",
    pools: Annotated[
        Path | None,
        typer.Option(
            help="The operator's node-pool file: GPUs and prices. Default: A100 pools, no prices."
        ),
    ] = None,
) -> None:
    """Show what a chain will cost, stage by stage, against training each model alone.

    Epochs, MACs, GPU hours and money. Nothing is trained and no data is read.

    Example: modelchain plan -f examples/vit-cc3m.yaml --convention paper
    """
    chain = load_chain(file)
    known = load_model(PoolFile, pools).node_pools if pools else DEFAULT_POOLS
    try:
        result = planning.plan(chain, convention, known)
    except InputError as error:
        raise error.in_file(file) from error
    if output == "json":
        typer.echo(result.to_json())
        return
    pool = known.get(chain.spec.runner.node_pool or "")
    _print(result, pool.price if pool else None, _what_run_does(chain, result))


def _what_run_does(chain: ModelChain, shown: planning.Plan) -> str | None:
    """The epochs that `run` will allocate, if another convention than its own is shown."""
    if shown.convention == "analytic" or all(stage.epochs for stage in chain.spec.stages[1:]):
        return None
    try:
        epochs = [stage.epochs for stage in planning.plan(chain, "analytic", {}).stages]
    except InputError as error:
        return f"`run` allocates epochs by the analytic convention, and would refuse: {error}"
    same = epochs == [stage.epochs for stage in shown.stages]
    listed = "the same epochs" if same else "epochs " + ", ".join(map(str, epochs))
    return f"`run` allocates epochs by the analytic convention: {listed}"


def _print(result: planning.Plan, price: Price | None, note: str | None) -> None:
    price = price if result.total.cost else None
    # Wider than any terminal: a long line is better than a number that is cut.
    console = Console(width=250, markup=False, highlight=False, emoji=False)
    console.print(_table(result, price))
    if price:
        console.print(
            f"{price.per_gpu_hour} {price.currency} per GPU hour: {price.source}", soft_wrap=True
        )
    if note:
        console.print(note, soft_wrap=True)
    console.print(_in_words(result), soft_wrap=True)


def _table(result: planning.Plan, price: Price | None) -> Table:
    columns = _columns(result, price)
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"{result.chain}, {result.convention} MACs"
    )
    for heading in columns:
        table.add_column(
            heading, justify="left" if heading in ("stage", "model") else "right", no_wrap=True
        )
    last_stage = len(result.stages) - 1
    for index, row in enumerate(zip(*columns.values(), strict=True)):
        table.add_row(*row, end_section=index == last_stage)
    return table


def _columns(result: planning.Plan, price: Price | None) -> dict[str, list[str]]:
    """By heading, a cell for each stage, for the chain, and for each model trained alone."""
    stages, total = result.stages, result.total
    spent = accumulate(stage.macs for stage in stages)
    alone = accumulate(stage.individual.macs for stage in stages)
    amounts: list[planning.StagePlan | planning.Amount] = [*stages, total, result.individual]
    columns = {
        "stage": [*(stage.name for stage in stages), "chain", "each alone"],
        "model": [*(stage.model for stage in stages), "", ""],
        "epochs": [*(str(stage.epochs) for stage in stages), "", ""],
        "samples": [*(_count(stage.samples) for stage in stages), "", ""],
        "MACs": [_scientific(amount.macs) for amount in amounts],
        "share": [*(f"{stage.macs / total.macs:.1%}" for stage in stages), "", ""],
    }
    if total.gpu_hours is not None:
        columns["GPU\nhours"] = [f"{amount.gpu_hours:,.1f}" for amount in amounts]
    if price:
        columns[f"cost\n{price.currency}"] = [amount.cost or "" for amount in amounts]
    columns |= {
        "alone:\nMACs": [*(_scientific(stage.individual.macs) for stage in stages), "", ""],
        "\nratio": [*(f"{stage.individual.macs / stage.macs:.2f}" for stage in stages), "", ""],
        "ratio\nso far": [*(f"{a / s:.2f}" for a, s in zip(alone, spent, strict=True)), "", ""],
    }
    return columns


def _in_words(result: planning.Plan) -> str:
    power = _power(result.total.macs)
    chain, alone = (
        f"{macs / 10**power:.3g}e{power}" for macs in (result.total.macs, result.individual.macs)
    )
    ratio = result.acceleration
    verdict = f"{ratio:.2f} times less" if ratio >= 1 else f"{1 / ratio:.2f} times more"
    return f"this chain costs {chain} MACs; training each alone {alone}: {verdict}"


def _power(macs: int) -> int:
    return int(f"{macs:.2e}".split("e")[1])


def _scientific(macs: int) -> str:
    return f"{macs:.2e}".replace("e+", "e")


def _count(samples: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if samples >= size:
            return f"{samples / size:.1f} {unit}"
    return str(samples)
