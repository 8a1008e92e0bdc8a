"""`modelchain cost`: what a chain has spent and on what, will take, and saves."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus, Expenses, StageLedger
from modelchain.api.uses import Uses
from modelchain.cli.options import Context, Kubeconfig, Namespace
from modelchain.cli.stored import read_stored
from modelchain.cli.tables import print_table, print_text, scientific
from modelchain.decide.budget import as_planned
from modelchain.errors import InputError
from modelchain.gate.outlook import Outlook, Taken, added, outlooks
from modelchain.io.load import parse
from modelchain.plan.plan import plan
from modelchain.plan.prices import shown

MS_PER_HOUR = 3_600_000
SECONDS_PER_HOUR = 3600
# The parts of an outlook, as columns.
PARTS = ("planned", "spent", "projected", "alone", "saved")


def cost(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A chain on a cluster.", show_default=False)
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="The root of a local run.", show_default=False)
    ] = None,
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
    stored, status = read_stored(name, root, namespace, kubeconfig, context)
    chain = parse(ModelChain, stored, stored["metadata"]["name"])
    if not status.stages:
        raise InputError(f"chain {chain.metadata.name} has no status yet; try again in a minute")
    found = _outlooks(chain, status)
    rows = list(_ledgers(status))
    if output == "json":
        typer.echo(json.dumps(_document(chain, status, found, rows), indent=2))
    elif output == "csv":
        _write_csv(found, rows)
    else:
        _print(chain.metadata.name, status, found, rows)


def _outlooks(chain: ModelChain, status: ChainStatus) -> list[Outlook]:
    stages = plan(chain, "analytic", {}, status.epochs).stages
    planned = {stage.name: (as_planned(stage), as_planned(stage.individual)) for stage in stages}
    known = [stage for stage in status.stages if stage.name in planned]
    return outlooks(status.model_copy(update={"stages": known}), planned)


def _ledgers(status: ChainStatus) -> Iterator[tuple[str, str, Expenses]]:
    """Each stage, baseline and removed stage, and behind it its attempts: kind, name, and what it
    has spent.
    """
    for kind, ledgers in (
        ("stage", list[StageLedger](status.stages)),
        ("alone", list[StageLedger](status.baselines)),
        ("removed", status.removed),
    ):
        for ledger in ledgers:
            yield kind, ledger.name or "others", ledger
            for attempt in ledger.attempts:
                yield "attempt", attempt.name, attempt


def _print(
    name: str,
    status: ChainStatus,
    found: Sequence[Outlook],
    rows: Sequence[tuple[str, str, Expenses]],
) -> None:
    """A table for each unit that is known, and one of the uses of GPU time."""
    held = any(ledger.gpu_seconds for _, _, ledger in rows)
    if any(ledger.cost for _, _, ledger in rows):
        _print_outlook(f"{name}, {status.currency}", found, _money)
    if held:
        _print_outlook(f"{name}, GPU hours", found, _hours)
    _print_outlook(f"{name}, MACs", found, _macs)
    if held:
        _print_uses(name, rows)
    if held and any(outlook.estimated for outlook in found):
        print_text("~ estimated: at the rate of the chain's own stages")
    if status.total.unpriced_seconds:
        hours = status.total.unpriced_seconds / SECONDS_PER_HOUR
        print_text(f"{hours:,.1f} GPU hours had no price")


def _print_outlook(title: str, found: Sequence[Outlook], unit: Callable[[Taken], str]) -> None:
    columns = {"stage": [*(one.name for one in found), "together"]}
    columns["state"] = [*(str(one.state) for one in found), ""]
    for part in PARTS:
        cells = [unit(getattr(one, part)) for one in found]
        if part in ("alone", "saved") and unit is not _macs:
            cells = [
                f"~{cell}" if one.estimated and cell else cell
                for one, cell in zip(found, cells, strict=True)
            ]
        columns[part] = [*cells, unit(added([getattr(one, part) for one in found]))]
    print_table(title, columns, ("stage", "state"), [len(found) - 1], markdown=False)


def _print_uses(name: str, rows: Sequence[tuple[str, str, Expenses]]) -> None:
    """GPU hours by use, of each ledger and of its attempts."""
    columns = {"": [_row_name(kind, of) for kind, of, _ in rows]}
    for use in Uses.model_fields:
        times = [getattr(ledger.gpu_milliseconds, use) for _, _, ledger in rows]
        if any(times):
            columns[use] = [f"{time / MS_PER_HOUR:,.1f}" if time else "" for time in times]
    totals = [ledger.gpu_milliseconds.total for _, _, ledger in rows]
    columns["together"] = [f"{total / MS_PER_HOUR:,.1f}" for total in totals]
    if any(ledger.cost for _, _, ledger in rows):
        columns["cost"] = [shown(one.cost) if one.cost else "" for _, _, one in rows]
    print_table(f"{name}, GPU hours by use", columns, ("",), [], markdown=False)


def _row_name(kind: str, name: str) -> str:
    return {"stage": name, "attempt": f"  {name}"}.get(kind, f"{name} ({kind})")


def _money(of: Taken) -> str:
    return "" if of.cost is None else f"{of.cost:,.2f}"


def _hours(of: Taken) -> str:
    return "" if of.gpu_seconds is None else f"{of.gpu_seconds / SECONDS_PER_HOUR:,.1f}"


def _macs(of: Taken) -> str:
    return "" if of.macs is None else scientific(of.macs)


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
    ]
    total = {part: _plain(added([getattr(one, part) for one in found])) for part in PARTS}
    return {
        "chain": chain.metadata.name,
        "currency": status.currency or None,
        "stages": stages,
        "total": total,
        "ledgers": [{"kind": kind, "name": name, **_spent(of)} for kind, name, of in rows],
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
