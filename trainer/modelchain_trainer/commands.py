"""The trainer's commands: `modelchain pack` and `modelchain evaluate`, found by the entry points of pyproject.toml."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def pack(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Tars, a folder of them, a caption table, or `digits`.")],
    to: Annotated[Path, typer.Option("--to", help="The new folder of shards.", show_default=False)],
    size: Annotated[int, typer.Option(help="Shrink pictures to this short side.", min=1)] = 256,
) -> None:
    """Make shards: pictures shrunk once, captions checked, the fingerprint printed for `data.train.fingerprint`.

    SRC may be a tab-separated caption table as DreamLIP publishes it for CC3M and CC12M, or scikit-learn's digits.

    Example: [bold]modelchain pack digits --to runs/digits[/bold]
    """
    from modelchain_trainer.data.pack import pack as work

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(f"packing {source}", total=None)
        splits = work(source, to, size=size, on_progress=lambda done: progress.update(bar, completed=done))
    for split in splits:
        skipped = f", {split.skipped} unusable left out" if split.skipped else ""
        typer.echo(f"{split.name}: {split.samples} samples{skipped}, shards {split.shards}, fingerprint {split.fingerprint}")


def evaluate(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact's folder.")],
    file: Annotated[Path, typer.Option("-f", "--file", help="The file whose evaluations to run.", show_default=False)],
    data: Annotated[Path | None, typer.Option("--data", help="The folder that stands for data.volume.mountPath.")] = None,
    output: Annotated[Literal["table", "json"], typer.Option("-o", "--output", help="What to print.")] = "table",
) -> None:
    """Re-hash a finished model and measure it again, with the evaluations of a spec.

    Example: [bold]modelchain evaluate runs/quickstart/<digest>/artifact -f examples/quickstart.yaml --data runs/digits[/bold]
    """
    from modelchain.cli.load import load_chain
    from modelchain.cli.paths import DataFolder
    from modelchain_trainer.evaluate import measure

    chain = load_chain(file)
    with tempfile.TemporaryDirectory(prefix="modelchain-") as cache:
        metrics = measure(artifact, DataFolder(chain, data, file).request(Path(cache), train=False))
    if output == "json":
        typer.echo(json.dumps(metrics, indent=1))
        return
    table = Table("metric", "percent")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.2f}")
    Console().print(table)
