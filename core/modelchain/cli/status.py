"""`modelchain status`: shows a chain's status, in one form for a local root and for a cluster."""

from __future__ import annotations

import json

import typer

from modelchain.cli.options import Context, Kubeconfig, NameOrRoot, Namespace, Output, RootOrName
from modelchain.cli.stored import read_stored
from modelchain.io.table import console, stages_table


def status(
    name: NameOrRoot = None,
    root: RootOrName = None,
    namespace: Namespace = None,
    output: Output = "table",
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Show how far a chain is: NAME on a cluster, or the chain in --root. Exits 0 if it could read
    the status.

    Example: [bold]modelchain status --root runs/quickstart -o json[/bold]
    """
    stored, parsed = read_stored(name, root, namespace, kubeconfig, context)
    if output == "json":
        typer.echo(json.dumps(parsed.model_dump(mode="json", by_alias=True), indent=1))
        return
    console().print(stages_table(stored["metadata"]["name"], parsed))
