"""`modelchain cost`: what a chain has spent and on what, will take, and saves."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer

from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus, Expenses
from modelchain.cli.options import Context, Kubeconfig, NameOrRoot, Namespace, RootOrName
from modelchain.cli.stored import read_begun
from modelchain.cli.tables import print_table, print_text
from modelchain.gate.budget import SECONDS_PER_HOUR
from modelchain.gate.outlook import Outlook, Taken, added, with_removed
from modelchain.plan.plan import plan
from modelchain.plan.prices import shown
from modelchain.report.cost import (
    PARTS,
    ledgers,
    outlook_columns,
    outlooks_of,
    units,
    use_columns,
)
from modelchain.report.relaxation import relaxation_lines


def cost(
    name: NameOrRoot = None,
    root: RootOrName = None,
    output: Annotated[
        Literal["table", "json", "csv"], typer.Option("-o", "--output", help="What to print.")
    ] = "table",
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Show what a chain has spent, by stage, attempt and use, against its plan.

    What it will have taken, and what each model would have taken alone, are computed from what was
    measured so far.

    Example: modelchain cost vit-cc3m -n vision -o csv
    """
    chain, status = read_begun(name, root, namespace, kubeconfig, context)
    stages = outlooks_of(plan(chain, "analytic", {}, status.epochs), status)
    found = with_removed(stages, status)
    rows = list(ledgers(status))
    if output == "json":
        typer.echo(json.dumps(_document(chain, status, found, rows), indent=2))
    elif output == "csv":
        _write_csv(found, rows)
    else:
        _print(chain, status, found, rows)


def _print(
    chain: ModelChain,
    status: ChainStatus,
    found: Sequence[Outlook],
    rows: Sequence[tuple[str, str, Expenses]],
) -> None:
    """A table for each unit that is known, and one of the uses of GPU time."""
    name, ends = chain.metadata.name, [len(found) - 1]
    for title, unit, estimates in units(name, status):
        columns = outlook_columns(found, unit, estimates)
        print_table(title, columns, ("stage", "state"), ends, markdown=False)
    if any(ledger.gpu_seconds for _, _, ledger in rows):
        print_table(f"{name}, GPU hours by use", use_columns(rows), ("",), [], markdown=False)
        if any(outlook.estimated for outlook in found):
            print_text("~ estimated: at the rate of the chain's own stages")
    if status.total.unpriced_seconds:
        hours = status.total.unpriced_seconds / SECONDS_PER_HOUR
        print_text(f"{hours:,.1f} GPU hours had no price")
    for line in relaxation_lines(status):
        print_text(line)


def _document(
    chain: ModelChain,
    status: ChainStatus,
    found: Sequence[Outlook],
    rows: Sequence[tuple[str, str, Expenses]],
) -> dict[str, Any]:
    stages = [
        {
            "stage": one.name,
            "state": str(one.state),
            "estimated": one.estimated,
            **{part: _plain(getattr(one, part)) for part in PARTS},
        }
        for one in found
        if one.state is not None
    ]
    total = {part: _plain(added([getattr(one, part) for one in found])) for part in PARTS}
    return {
        "chain": chain.metadata.name,
        "currency": status.currency or None,
        "stages": stages,
        "total": total,
        "relaxation": _relaxation(status),
        "ledgers": [{"kind": kind, "name": name, **_spent(of)} for kind, name, of in rows],
    }


def _relaxation(status: ChainStatus) -> dict[str, Any] | None:
    """The rounds, what was spent on models that they have replaced, and the acceleration."""
    of = status.relaxation
    if of is None:
        return None
    return {
        "round": of.round,
        "spent": None if of.spent is None else _spent(of.spent),
        "acceleration": of.acceleration and of.acceleration.model_dump(),
    }


def _plain(of: Taken) -> dict[str, Any]:
    seconds = None if of.gpu_seconds is None else round(float(of.gpu_seconds), 3)
    cost = None if of.cost is None else shown(str(of.cost))
    return {"macs": of.macs, "gpuSeconds": seconds, "cost": cost}


def _spent(of: Expenses) -> dict[str, Any]:
    return {
        "macs": of.macs,
        "lostMacs": of.lost_macs,
        "gpuSeconds": of.gpu_seconds,
        **{f"{use}Milliseconds": time for use, time in of.gpu_milliseconds},
        "queueSeconds": of.queue_seconds,
        "cost": of.cost,
        "unpricedSeconds": of.unpriced_seconds,
    }


def _write_csv(found: Sequence[Outlook], rows: Sequence[tuple[str, str, Expenses]]) -> None:
    """A line for each ledger and attempt; the outlook stands with its stage."""
    outlook = {one.name: one for one in found}
    figures = ("macs", "gpuSeconds", "cost")
    names = [f"{part}{figure[0].upper()}{figure[1:]}" for part in PARTS for figure in figures]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["kind", "name", *_spent(Expenses()), *names, "estimated"])
    for kind, name, of in rows:
        one = outlook.get(name) if kind == "stage" else None
        parts: list[object] = [""] * (len(names) + 1)
        if one is not None:
            plain = [_plain(getattr(one, part)) for part in PARTS]
            parts = [*(p[figure] for p in plain for figure in figures), one.estimated]
        writer.writerow([kind, name, *_spent(of).values(), *parts])
