"""The tables of what a chain has spent and will take, for a terminal and for a page. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal

from modelchain.api.status import ChainStatus, Expenses, StageLedger
from modelchain.api.uses import Uses
from modelchain.decide.budget import as_planned
from modelchain.decide.ledger import total_of
from modelchain.gate.budget import SECONDS_PER_HOUR
from modelchain.gate.outlook import Outlook, Taken, added, outlooks, taken
from modelchain.plan.plan import MS_PER_HOUR, Plan
from modelchain.plan.prices import shown

# The parts of an outlook, as columns.
PARTS = ("planned", "spent", "projected", "alone", "saved")
Columns = dict[str, list[str]]


def outlooks_of(plan: Plan, status: ChainStatus) -> list[Outlook]:
    """The outlook of each stage, by the plan where the status has none yet."""
    planned = {s.name: (as_planned(s), as_planned(s.individual)) for s in plan.stages}
    known = [stage for stage in status.stages if stage.name in planned]
    return outlooks(status.model_copy(update={"stages": known}), planned)


def charged(status: ChainStatus) -> Taken:
    """What counts against `spec.budget`: all that was spent, baselines and removed stages too."""
    return taken(total_of([status.total, *status.baselines]))


def ledgers(status: ChainStatus) -> Iterator[tuple[str, str, Expenses]]:
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


def units(name: str, status: ChainStatus) -> Iterator[tuple[str, Callable[[Taken], str], bool]]:
    """The units in which anything is known: a title, how an amount is shown, and whether the
    figures of models alone are estimates in it.
    """
    rows = [ledger for _, _, ledger in ledgers(status)]
    if any(ledger.cost for ledger in rows):
        yield f"{name}, {status.currency}", _money, True
    if any(ledger.gpu_seconds for ledger in rows):
        yield f"{name}, GPU hours", _hours, True
    yield f"{name}, MACs", _macs, False


def outlook_columns(
    found: Sequence[Outlook], unit: Callable[[Taken], str], estimates: bool
) -> Columns:
    """A row for each stage, and their sum. Estimates are marked."""
    columns = {"stage": [*(one.name for one in found), "together"]}
    columns["state"] = [*(str(one.state or "") for one in found), ""]
    for part in PARTS:
        cells = [unit(getattr(one, part)) for one in found]
        if part in ("alone", "saved") and estimates:
            cells = [
                f"~{cell}" if one.estimated and cell else cell
                for one, cell in zip(found, cells, strict=True)
            ]
        columns[part] = [*cells, unit(added([getattr(one, part) for one in found]))]
    return columns


def use_columns(rows: Sequence[tuple[str, str, Expenses]]) -> Columns:
    """GPU hours by use, of each ledger and of its attempts. Uses of no time are left out."""
    columns = {"": [_row_name(kind, of) for kind, of, _ in rows]}
    for use in Uses.model_fields:
        times = [getattr(ledger.gpu_milliseconds, use) for _, _, ledger in rows]
        if any(times):
            columns[use] = [f"{time / MS_PER_HOUR:,.1f}" if time else "" for time in times]
    totals = [ledger.gpu_milliseconds.total for _, _, ledger in rows]
    columns["together"] = [f"{total / MS_PER_HOUR:,.1f}" for total in totals]
    if any(ledger.cost for _, _, ledger in rows):
        columns["cost"] = [shown(one.cost) if one.cost else "" for _, _, one in rows]
    return columns


def _row_name(kind: str, name: str) -> str:
    return {"stage": name, "attempt": f"  {name}"}.get(kind, f"{name} ({kind})")


def _money(of: Taken) -> str:
    return "" if of.cost is None else f"{Decimal(shown(str(of.cost))):,f}"


def _hours(of: Taken) -> str:
    return "" if of.gpu_seconds is None else f"{of.gpu_seconds / SECONDS_PER_HOUR:,.1f}"


def _macs(of: Taken) -> str:
    return "" if of.macs is None else scientific(of.macs)


def scientific(macs: int) -> str:
    """MACs with three digits: 2.95e19."""
    return f"{macs:.2e}".replace("e+", "e")
