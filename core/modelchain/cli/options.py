"""Options of several commands, and the message where the operator's packages are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from modelchain.cli.complete import complete_chains

FileOption = Annotated[
    Path, typer.Option("-f", "--file", help="The ModelChain's YAML file.", show_default=False)
]

# Options that every command on a cluster takes.
Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="The chain's name.",
        show_default=False,
        autocompletion=complete_chains,
    ),
]
NameOrAll = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME",
        help="One chain alone.",
        show_default=False,
        autocompletion=complete_chains,
    ),
]
# A chain on a cluster, or the one in a local root: one of the two is given.
NameOrRoot = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME",
        help="A chain on a cluster.",
        show_default=False,
        autocompletion=complete_chains,
    ),
]
RootOrName = Annotated[
    Path | None, typer.Option("--root", help="The root of a local run.", show_default=False)
]
Namespace = Annotated[
    str | None,
    typer.Option("-n", "--namespace", help="Default: the context's own.", show_default=False),
]
Kubeconfig = Annotated[
    Path | None, typer.Option(help="Default: $KUBECONFIG, else ~/.kube/config.", show_default=False)
]
Context = Annotated[
    str | None, typer.Option(help="A context of the kubeconfig.", show_default=False)
]
Output = Annotated[
    Literal["table", "json"],
    typer.Option("-o", "--output", help="A table, or one JSON document on stdout."),
]
