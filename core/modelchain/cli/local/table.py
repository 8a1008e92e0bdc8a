"""The table of stages that `run` keeps up to date and `status` prints once, and the report at a chain's end."""

from __future__ import annotations

from datetime import timedelta

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from modelchain.contracts import Results
from modelchain.plan import Plan
from modelchain.status import ChainStatus, StageStatus, State

COLOURS = {
    State.SUCCEEDED: "green",
    State.RUNNING: "cyan",
    State.STARTING: "cyan",
    State.VERIFYING: "cyan",
    State.FAILED: "red",
    State.SUSPENDED: "yellow",
}


def human(value: float) -> str:
    """A count in the units people say: 1.2e13 is "12.00 T"."""
    for unit in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 1000:
            return f"{value:.2f} {unit}".rstrip() if unit else f"{value:.0f}"
        value /= 1000
    return f"{value:.3g} Z"


def stages_table(name: str, status: ChainStatus) -> RenderableType:
    """One line a stage: state, progress with ETA, MACs spent, first metric."""
    table = Table(title=f"chain {name}", title_justify="left", header_style="bold", expand=False)
    for column, justify in (("stage", "left"), ("state", "left"), ("cache", "left"), ("epochs", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("progress", width=34)
    table.add_column("MACs spent", justify="right")
    table.add_column("accuracy", justify="left")
    for stage in status.stages:
        table.add_row(
            stage.name,
            Text(str(stage.state), style=COLOURS.get(stage.state, "dim")),
            stage.cache or "",
            "" if stage.epochs is None else str(stage.epochs),
            _progress(stage),
            human(stage.macs) if stage.macs else "",
            ", ".join(f"{k} {v} %" for k, v in stage.results.items() if "/" not in k),
        )
    reasons = [
        Text(f"{s.name}: {s.reason}", style="red" if s.state is State.FAILED else "dim")
        for s in status.stages
        if s.reason
    ]
    return Group(table, *reasons)


def _progress(stage: StageStatus) -> RenderableType:
    if stage.progress is None:
        return ""
    at = stage.progress
    grid = Table.grid(padding=(0, 1))
    eta = timedelta(seconds=round(at.eta_seconds))
    grid.add_row(ProgressBar(total=at.steps, completed=at.step, width=12), f"{at.step}/{at.steps}", f"{eta} left")
    return grid


def report_table(plan: Plan, status: ChainStatus, results: dict[str, Results]) -> RenderableType:
    """What the chain cost against training each model alone, and what each stage reached."""
    table = Table(title=f"chain {plan.chain}: finished", title_justify="left", header_style="bold", show_footer=True)
    metric = next((name for r in results.values() for name in r.final.metrics if "/" not in name), None)
    total, alone = sum(r.macs for r in results.values()), plan.individual.macs
    columns = [
        ("stage", "together"), ("epochs", ""), ("parameters grown", ""),
        (f"{metric or 'loss'} at step 0", ""), ("at the end", ""), 
        ("seconds", f"{sum(r.seconds for r in results.values()):.0f}"),
        ("MACs", human(total)), ("alone (epochs)", human(alone)), ("alone / chain", f"{alone / total:.2f}x" if total else ""),
    ]  # fmt: skip
    for name, footer in columns:
        table.add_column(name, footer=footer, justify="left" if name == "stage" else "right")
    for planned, stage in zip(plan.stages, status.stages, strict=True):
        result = results.get(planned.name)
        if result is None:
            continue
        grown = result.growth
        share = (
            f"{100 * (1 - grown.new / (grown.inserted + grown.duplicated + grown.new)):.0f} %"
            if grown
            else "from scratch"
        )
        first = f"{result.initial.metrics[metric]:.1f} %" if metric else f"{result.initial.loss:.3f}"
        last = f"{result.final.metrics[metric]:.1f} %" if metric else f"{result.final.loss:.3f}"
        table.add_row(
            planned.name, str(stage.epochs), share, first, last, f"{result.seconds:.0f}", human(result.macs),
            f"{human(planned.individual.macs)} ({planned.individual.epochs})",
            f"{planned.individual.macs / result.macs:.2f}x",
        )  # fmt: skip
    return table
