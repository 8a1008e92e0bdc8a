"""The data room's command `modelchain pack`, found by the entry points of pyproject.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress


def pack(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Tars, a folder of them, a caption table, or `digits`.")],
    to: Annotated[Path, typer.Option("--to", help="The new folder of shards.", show_default=False)],
    size: Annotated[int, typer.Option(help="Shrink pictures to this short side.", min=1)] = 256,
) -> None:
    """Make shards: pictures shrunk and captions tokenised once, the fingerprint printed for `data.train.fingerprint`.

    SRC may be a tab-separated caption table as DreamLIP publishes it for CC3M and CC12M, or the word digits.

    Example: [bold]modelchain pack digits --to runs/digits[/bold]
    """
    from modelchain_data.pack import pack as work

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(f"packing {source}", total=None)

        def indexing(done: int, shards: int) -> None:
            progress.update(bar, description=f"indexing shard {done} of {shards}")

        def packing(done: int) -> None:
            progress.update(bar, description=f"packing {source}", completed=done)

        splits = work(source, to, size=size, on_progress=packing, on_index=indexing)
    for split in splits:
        skipped = f", {split.skipped} unusable left out" if split.skipped else ""
        counts = f"{split.samples} samples{skipped}"
        typer.echo(f"{split.name}: {counts}, shards {split.shards}, fingerprint {split.fingerprint}")
