"""`modelchain validate`: check a spec file."""

from __future__ import annotations

import typer

from modelchain.cli.options import FileOption
from modelchain.io.load import load_chain
from modelchain.plan.check import check_epochs, gates_nothing
from modelchain.plan.expansion import warnings


def validate(file: FileOption) -> None:
    """Check a spec: every field, the chain's shapes, its epochs. Reads no data.

    Warns of a stage that is not 2 to 4 times as large as its predecessor, and of a gate without a
    baseline.

    Example: [bold]modelchain validate -f examples/vit-cc3m.yaml[/bold]
    """
    chain = load_chain(file)
    check_epochs(chain, str(file), {})
    names = ", ".join(stage.name for stage in chain.spec.stages)
    typer.echo(f"{file}: valid; chain {chain.metadata.name} with stages {names}")
    found = [*warnings(chain.spec, str(file)), gates_nothing(chain.spec, str(file))]
    for warning in filter(None, found):
        typer.echo(f"modelchain: warning: {warning}", err=True)
