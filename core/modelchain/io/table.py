"""Two tables: a chain's stages, for `run` and `status`, and the report of a finished chain."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from modelchain.api.contracts import Growth, Measured, Results
from modelchain.api.status import ChainStatus, GateVerdict, StageStatus, State
from modelchain.decide.conditions import brief
from modelchain.io.units import human
from modelchain.plan.plan import Plan, StagePlan
from modelchain.report.model import Table as Cells
from modelchain.report.model import spent_macs
from modelchain.report.relaxation import relaxation_lines

COLOURS = {
    State.SUCCEEDED: "green",
    State.RUNNING: "cyan",
    State.INDEXING: "cyan",
    State.STARTING: "cyan",
    State.VERIFYING: "cyan",
    State.FAILED: "red",
    State.SUSPENDED: "yellow",
}


def console(stderr: bool = False) -> Console:
    """A console for tables. A pipe has no width of its own; 160 characters fit every table."""
    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=160)


def stages_table(name: str, status: ChainStatus) -> RenderableType:
    """One row for each stage. Below the table, a line for each stage says why its state is so, and
    one what removed stages have spent.
    """
    running = any(stage.progress for stage in status.stages)
    gated = any(stage.gate for stage in status.stages)
    table = Table(title=f"chain {name}", title_justify="left", box=SIMPLE_HEAD)
    for column in (
        "stage",
        "state",
        "cache",
        "epochs",
        *(["progress"] if running else []),
        "MACs spent",
        "accuracy",
        *(["gate"] if gated else []),
    ):
        right = column in ("epochs", "MACs spent")
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    for name, stage in rows(status):
        table.add_row(
            name,
            Text(str(stage.state), style=COLOURS.get(stage.state, "dim")),
            stage.cache or "",
            "" if stage.epochs is None else str(stage.epochs),
            *([_progress(stage)] if running else []),
            human(stage.macs) if stage.macs else "",
            ", ".join(f"{k} {v} %" for k, v in stage.results.items() if "/" not in k),
            *([_verdict(stage)] if gated else []),
        )
    said = [(stage, brief(stage)) for stage in status.stages if stage.reason]
    said += [(row, brief(row, "baseline")) for row in status.baselines if row.reason]
    reasons = [
        Text(f"  {text}", style="red" if stage.state is State.FAILED else "dim")
        for stage, text in said
    ]
    return Group(table, *reasons, *_removed(status))


def family_table(found: Cells) -> Table:
    """A report's table of the family on a terminal; the row of sums stands apart."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in found.columns:
        left = name in ("model", "state", "gate")
        table.add_column(name.replace(": ", ":\n"), justify="left" if left else "right")
    for index, row in enumerate(found.rows, start=1):
        table.add_row(*row, end_section=index == len(found.rows) - 1)
    return table


def rows(status: ChainStatus) -> Iterator[tuple[str, StageStatus]]:
    """Each row's name and stage: the stages, and behind each one its model trained alone."""
    alone = {row.name: row for row in status.baselines}
    for stage in status.stages:
        yield stage.name, stage
        if stage.name in alone:
            yield f"{stage.name} alone", alone.pop(stage.name)
    for row in alone.values():  # of stages that are not shown, or not in the spec any more
        yield f"{row.name} alone", row


def _verdict(stage: StageStatus) -> Text:
    """The gate's verdict, and by how many points the stage is better than its baseline."""
    if stage.gate is None:
        return Text("")
    points = "" if stage.gate.difference is None else f" {Decimal(stage.gate.difference):+}"
    points += f" ± {stage.gate.standard_error}" if points and stage.gate.standard_error else ""
    red = stage.gate.verdict is GateVerdict.MISSED
    return Text(f"{stage.gate.verdict}{points}", style="red" if red else "")


def _removed(status: ChainStatus) -> list[RenderableType]:
    macs = sum(stage.macs for stage in status.removed)
    names = ", ".join(stage.name or "others" for stage in status.removed)
    spent = f"  removed stages spent {human(macs)} MACs: {names}"
    return [Text(spent, style="dim")] if macs else []


def _progress(stage: StageStatus) -> RenderableType:
    """A bar, the steps and the time that is left; nothing for a stage that does not run."""
    if stage.progress is None:
        return ""
    at = stage.progress
    grid = Table.grid(padding=(0, 1))
    eta = timedelta(seconds=round(at.eta_seconds))
    grid.add_row(
        ProgressBar(total=at.steps, completed=at.step, width=12),
        f"{at.step}/{at.steps}",
        f"{eta} left",
    )
    return grid


def report_table(plan: Plan, status: ChainStatus, results: dict[str, Results]) -> RenderableType:
    """What each stage reached, and what the chain cost compared to training each model alone."""
    # A name with a slash, such as "imagenet/top-5", is a secondary metric.
    metric = next(
        (name for r in results.values() for name in r.final.metrics if "/" not in name), None
    )
    table = Table(
        title=f"chain {plan.chain}: finished",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_footer=True,
    )
    gated = any(stage.gate for stage in status.stages)
    columns = _report_columns(plan, status, results, metric or "loss")
    for header, footer in [*columns, *(_GATE_COLUMNS if gated else [])]:
        table.add_column(
            header, footer=footer, justify="left" if header == "stage" else "right", no_wrap=True
        )
    for planned, stage in zip(plan.stages, status.stages, strict=True):
        row = _report_row(planned, stage, results[planned.name], metric)
        table.add_row(*row, *(_compared(stage) if gated else []))
    told = [Text(f"  {line}", style="dim") for line in relaxation_lines(status)]
    return Group(table, *_removed(status), *told)


# The gate's metric of the same model trained alone, and the verdict.
_GATE_COLUMNS = [("alone:\nreached", ""), ("gate", "")]


def _compared(stage: StageStatus) -> list[RenderableType]:
    baseline = stage.gate.baseline if stage.gate else None
    return [f"{baseline} %" if baseline else "", _verdict(stage)]


def _report_columns(
    plan: Plan, status: ChainStatus, results: dict[str, Results], measured: str
) -> list[tuple[str, str]]:
    """The heading of each column, and what stands below it: a sum where one makes sense."""
    total, alone = spent_macs(status), plan.individual.macs
    seconds = sum(r.seconds for r in results.values())
    return [
        ("stage", "together"),
        ("epochs", ""),
        ("inherited", ""),
        (f"{measured}\nat step 0", ""),
        (f"{measured}\nat the end", ""),
        ("seconds", f"{seconds:.0f}"),
        ("MACs", human(total)),
        ("alone:\nepochs", ""),
        ("alone:\nMACs", human(alone)),
        ("times\nless", f"{alone / total:.2f}" if total else ""),
    ]


def _report_row(
    planned: StagePlan, stage: StageStatus, result: Results, metric: str | None
) -> list[str]:
    individual = planned.individual
    return [
        planned.name,
        str(stage.epochs),
        _inherited(result.growth),
        _measure(result.initial, metric),
        _measure(result.final, metric),
        f"{result.seconds:.0f}",
        human(stage.macs) if stage.macs else "",
        str(individual.epochs),
        human(individual.macs),
        f"{individual.macs / stage.macs:.2f}" if stage.macs else "",
    ]


def _inherited(growth: Growth | None) -> str:
    """The share of the parameters that came from the predecessor."""
    if growth is None:
        return "nothing"
    share = 1 - growth.new / (growth.inserted + growth.duplicated + growth.new)
    return f"{share:.0%}"


def _measure(measured: Measured, metric: str | None) -> str:
    """The metric in percent; the loss for a chain without evaluations."""
    return f"{measured.metrics[metric]:.1f} %" if metric else f"{measured.loss:.3f}"
