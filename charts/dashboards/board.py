"""What the dashboards have in common: variables, links between them, and their file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from dashboards.panels import SOURCE, Panel

TAG = "modelchain"
Rows = dict[str, Sequence[Panel]]  # by the title of the row


def board(
    name: str, title: str, text: str, variables: Sequence[Any], rows: Rows, *, since: str
) -> Dashboard:
    """A dashboard.

    Args:
        name: of its address, which no later version changes.
        since: the beginning of the time range that it opens with.
    """
    made = dashboard.Dashboard(f"ModelChain / {title}").uid(f"modelchain-{name}").description(text)
    made = made.tags([TAG]).readonly().refresh("1m").time(since, "now")
    made = made.tooltip(DashboardCursorSync.CROSSHAIR).link(_siblings())
    for variable in (_data_source(), *variables):
        made = made.with_variable(variable)
    for row, panels in rows.items():
        made = made.with_row(dashboard.Row(row))
        for panel in panels:
            made = made.with_panel(panel)
    built: Dashboard = made.build()
    for number, panel in enumerate(built.panels or [], start=1):
        panel.id_val = number
    return built


def text_of(built: Dashboard) -> str:
    """The dashboard's file."""
    return JSONEncoder(sort_keys=True, indent=1, ensure_ascii=False).encode(built) + "\n"


def choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """A variable of which several values may be chosen, or all."""
    every = VariableOption(selected=True, text=["All"], value=["$__all"])
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(every)
    )


def chains() -> list[dashboard.QueryVariable]:
    """The variables that select chains."""
    known = 'modelchain_info{namespace=~"$namespace"}'
    return [
        choice("namespace", "Namespace", "label_values(modelchain_info, namespace)"),
        choice("chain", "Chain", f"label_values({known}, chain)"),
    ]


def _data_source() -> dashboard.DatasourceVariable:
    return dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")


def _siblings() -> dashboard.DashboardLink:
    """Links to the other dashboards, with the same chains and the same time range."""
    return (
        dashboard.DashboardLink("ModelChain")
        .type(DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .include_vars(True)
        .keep_time(True)
    )
