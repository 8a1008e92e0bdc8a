"""`modelchain status`: shows a chain's status, in one form for a local root and for a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from modelchain.api.status import ChainStatus
from modelchain.cli.options import NEEDS_OPERATOR, Context, Kubeconfig, Namespace, Output
from modelchain.errors import InputError
from modelchain.io.load import status_of
from modelchain.io.table import console, stages_table
from modelchain.local.root import parse_status, read_object

ReadChain = Callable[[str, str | None, Path | None, str | None], dict[str, Any]]


def status(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A chain on a cluster.", show_default=False)
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="The root of a local run.", show_default=False)
    ] = None,
    namespace: Namespace = None,
    output: Output = "table",
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Show how far a chain is: NAME on a cluster, or the chain in --root. Exits 0 if it could read
    the status.

    Example: [bold]modelchain status --root runs/quickstart -o json[/bold]
    """
    if (name is None) == (root is None):
        raise InputError("name one chain: NAME for one on a cluster, or --root DIR for a local one")
    if root is not None and (namespace or kubeconfig or context):
        raise InputError("a local root has no namespace, kubeconfig or context; leave them out")
    if root is not None:
        shown, parsed = _read_root(root)
    else:
        assert name is not None
        stored = _cluster_reader()(name, namespace, kubeconfig, context)
        shown, parsed = name, status_of(stored)
    if output == "json":
        typer.echo(json.dumps(parsed.model_dump(mode="json", by_alias=True), indent=1))
        return
    console().print(stages_table(shown, parsed))


def _read_root(root: Path) -> tuple[str, ChainStatus]:
    """The name and status of the chain in a local root."""
    file = root / "status.json"
    if not file.is_file():
        raise InputError("holds no chain; `modelchain run -f FILE --root DIR` makes one", file=root)
    stored = read_object(file)
    return stored["metadata"]["name"], parse_status(stored, file)


def _cluster_reader() -> ReadChain:
    """The function that reads a chain's status on a cluster.

    It is the operator's. Core knows no Kubernetes, so it finds the function by its entry point.
    """
    for entry in entry_points(group="modelchain.cluster"):
        try:
            read: ReadChain = entry.load()
            return read
        except ImportError:  # the entry point is always registered, its packages are optional
            continue
    raise InputError(NEEDS_OPERATOR)
