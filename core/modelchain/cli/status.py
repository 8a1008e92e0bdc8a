"""`modelchain status`: the object's status, the same shape for a local root and for a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from modelchain.cli.local.root import parse_status, read_object
from modelchain.cli.local.table import console, stages_table
from modelchain.errors import InputError


def status(
    root: Annotated[Path, typer.Option("--root", help="The root of a local run.", show_default=False)],
    output: Annotated[
        Literal["table", "json"], typer.Option("-o", "--output", help="A table, or one JSON document on stdout.")
    ] = "table",
) -> None:
    """Show how far a chain is. Exits 0 whenever it could read the status, whatever the status says.

    Example: [bold]modelchain status --root runs/quickstart -o json[/bold]
    """
    file, alone = root / "status.json", sorted(root.glob("status-alone-*.json"))
    if not file.is_file() and len(alone) == 1:
        file = alone[0]
    if not file.is_file():
        raise InputError("holds no chain; `modelchain run -f FILE --root DIR` makes one", file=root)
    stored = read_object(file)
    parsed = parse_status(stored, file)
    if output == "json":
        typer.echo(json.dumps(parsed.model_dump(mode="json", by_alias=True), indent=1))
        return
    console().print(stages_table(stored["metadata"]["name"], parsed))
