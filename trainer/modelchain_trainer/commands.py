"""The trainer's commands `modelchain evaluate` and `modelchain export`, which pyproject.toml names
as entry points.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table


def evaluate(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact's folder.")],
    file: Annotated[
        Path,
        typer.Option("-f", "--file", help="The file whose evaluations to run.", show_default=False),
    ],
    data: Annotated[
        Path | None, typer.Option("--data", help="The folder that stands for mountPath.")
    ] = None,
    output: Annotated[
        Literal["table", "json"], typer.Option("-o", "--output", help="What to print.")
    ] = "table",
) -> None:
    """Re-hash a finished model and measure it again, with the evaluations of a spec.

    Example: [bold]modelchain evaluate runs/q/<digest>/artifact -f examples/quickstart.yaml --data
    runs/digits[/bold]
    """
    from modelchain.api.contracts import EvaluationTask
    from modelchain.errors import InputError
    from modelchain.io.load import load_chain
    from modelchain.io.paths import DataFolder
    from modelchain_trainer.evaluate import measure

    chain = load_chain(file)
    if not chain.spec.evaluation:
        raise InputError("asks for no evaluation", file=file, field="spec.evaluation")
    with tempfile.TemporaryDirectory(prefix="modelchain-") as index:
        request = DataFolder(chain, data, file).request(Path(index), train=False)
        metrics = measure(EvaluationTask(artifact=str(artifact), data=request)).metrics
    if output == "json":
        typer.echo(json.dumps(metrics, indent=1))
        return
    table = Table("metric", "percent")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)


def export(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact's folder.")],
    to: Annotated[Path, typer.Option("--to", help="The new folder.", show_default=False)],
    layout: Annotated[
        Literal["timm", "transformers"], typer.Option("--as", help="Whose files to write.")
    ] = "timm",
) -> None:
    """Re-hash a finished model and write its vision tower alone, for timm or for transformers.

    Example: [bold]modelchain export runs/q/<digest>/artifact --to tower[/bold]
    """
    from modelchain_trainer.export import export as work

    work(artifact, to, layout)
