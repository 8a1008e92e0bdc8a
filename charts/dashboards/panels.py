"""Panels in the style of these dashboards. Each has a title, a description and a unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models.common import (
    BarGaugeDisplayMode,
    BigValueColorMode,
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
    VizOrientation,
)
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboards.promql import CURRENCY

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")

# Units, as Grafana calls them.
MONEY = f"currency:{CURRENCY} "
GPU_HOURS = "suffix:GPU h"
MACS = "sci"
RATIO = "percentunit"
TIMES = "suffix:×"
POINTS = "suffix:points"
SECONDS = "s"
NUMBER = "short"
TIME = "time:MM-DD HH:mm"
BYTES = "bytes"
A_SECOND = "ops"

Panel = Any  # the builders have no base class with `title` and the like
Steps = Sequence[tuple[float | None, str]]  # from this value on, this colour

PLAIN: Steps = ((None, "text"),)
BLUE: Steps = ((None, "blue"),)
GOOD_IF_POSITIVE: Steps = ((None, "red"), (0, "green"))


def _panel(panel: Panel, title: str, text: str, unit: str, size: tuple[int, int]) -> Panel:
    width, height = size
    panel = panel.title(title).description(text).datasource(SOURCE).unit(unit)
    return panel.span(width).height(height)


def _query(expression: str, legend: str = "", *, instant: bool = False) -> prometheus.Dataquery:
    query = prometheus.Dataquery().expr(expression).datasource(SOURCE)
    query = query.legend_format(legend or "__auto")
    return query.instant() if instant else query.range()


def _colours(steps: Steps) -> dashboard.ThresholdsConfig:
    found = [Threshold(value=value, color=colour) for value, colour in steps]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(found)


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"])


def number(
    title: str,
    text: str,
    unit: str,
    expression: str,
    *,
    decimals: int | None = None,
    colours: Steps = PLAIN,
    width: int = 4,
) -> Panel:
    """One number, as of now."""
    panel = _panel(stat.Panel(), title, text, unit, (width, 4)).no_value("–")
    panel = panel.with_target(_query(expression, instant=True).ref_id("A"))
    panel = panel.graph_mode(BigValueGraphMode.NONE).color_mode(BigValueColorMode.VALUE)
    panel = panel.reduce_options(_last()).thresholds(_colours(colours))
    return panel if decimals is None else panel.decimals(decimals)


def lines(
    title: str,
    text: str,
    unit: str,
    *queries: tuple[str, str],
    width: int = 12,
    stacked: bool = False,
    lowest: float | None = 0,
    highest: float | None = None,
    colours: Mapping[str, str] | None = None,
) -> Panel:
    """Lines over time: of each query its expression and its legend. Colours are by legend."""
    panel = _panel(timeseries.Panel(), title, text, unit, (width, 8)).no_value("–")
    for ref, (expression, legend) in zip("ABCDEFGH", queries, strict=False):
        panel = panel.with_target(_query(expression, legend).ref_id(ref))
    panel = panel.legend(
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    panel = panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    panel = panel.show_points(VisibilityMode.NEVER).line_width(1)
    panel = panel if lowest is None else panel.min(lowest)
    panel = panel if highest is None else panel.max(highest)
    for name, colour in (colours or {}).items():
        fixed = DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": colour})
        panel = panel.override_by_name(str(name), [fixed])
    if not stacked:
        return panel.fill_opacity(0)
    return panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(40)


def bars(
    title: str,
    text: str,
    unit: str,
    *queries: tuple[str, str],
    width: int = 8,
    decimals: int | None = None,
    lowest: float = 0,
    highest: float | None = None,
    colours: Steps = BLUE,
) -> Panel:
    """A bar for each series, as of now."""
    panel = _panel(bargauge.Panel(), title, text, unit, (width, 8)).no_value("–")
    for ref, (expression, legend) in zip("ABCDEFGH", queries, strict=False):
        panel = panel.with_target(_query(expression, legend, instant=True).ref_id(ref))
    panel = panel.orientation(VizOrientation.HORIZONTAL).display_mode(BarGaugeDisplayMode.BASIC)
    panel = panel.reduce_options(_last()).thresholds(_colours(colours)).min(lowest)
    panel = panel if highest is None else panel.max(highest)
    return panel if decimals is None else panel.decimals(decimals)


@dataclass(frozen=True)
class TableColumn:
    """A column of a table: the value of a query, or what its series' labels say."""

    title: str
    expression: str
    unit: str = NUMBER
    decimals: int | None = None
    hidden: bool = False  # the query is there for its labels

    @property
    def style(self) -> list[DynamicConfigValue]:
        found = [DynamicConfigValue(id_val="unit", value=self.unit)]
        if self.decimals is not None:
            found.append(DynamicConfigValue(id_val="decimals", value=self.decimals))
        return found


def grid(
    title: str,
    text: str,
    labels: dict[str, str],
    *columns: TableColumn,
    height: int = 8,
    width: int = 24,
    links: dict[str, tuple[str, str]] | None = None,
) -> Panel:
    """A table. Series with the same labels share a row.

    Args:
        labels: the title of the column of each label, in this order before the values.
        links: by the title of a column, the title and the address that its cells lead to.
    """
    panel = _panel(table.Panel(), title, text, NUMBER, (width, height)).no_value("–").min_width(80)
    fields = {}
    for ref, column in zip("ABCDEFGHIJKL", columns, strict=False):
        query = _query(column.expression, instant=True).format(PromQueryFormat.TABLE)
        panel = panel.with_target(query.ref_id(ref))
        fields["Value" if len(columns) == 1 else f"Value #{ref}"] = column
    for transformation in _one_row_each(labels, fields):
        panel = panel.with_transformation(transformation)
    for column in columns:
        if not column.hidden:
            panel = panel.override_by_name(column.title, column.style)
    for column_title, (about, url) in (links or {}).items():
        link = DynamicConfigValue(id_val="links", value=[{"title": about, "url": url}])
        panel = panel.override_by_name(column_title, [link])
    return panel


def _one_row_each(
    labels: dict[str, str], fields: dict[str, TableColumn]
) -> list[DataTransformerConfig]:
    """Grafana's own steps: join the queries' series, then name, order and hide the columns."""
    shown = [name for name, column in fields.items() if not column.hidden]
    hidden = ["Time", *(name for name, column in fields.items() if column.hidden)]
    names = labels | {name: fields[name].title for name in shown}
    order = {name: place for place, name in enumerate([*labels, *shown])}
    options = {
        "excludeByName": dict.fromkeys(hidden, True),
        "renameByName": names,
        "indexByName": order,
    }
    return [
        DataTransformerConfig(id_val="merge", options={}),
        DataTransformerConfig(id_val="organize", options=options),
    ]


def timeline(
    title: str,
    text: str,
    expression: str,
    legend: str,
    names: dict[int, tuple[str, str]],
    *,
    height: int = 8,
) -> Panel:
    """States over time. `names` has the name and the colour of each value."""
    panel = _panel(statetimeline.Panel(), title, text, NUMBER, (24, height)).no_value("–")
    panel = panel.with_target(_query(expression, legend).ref_id("A"))
    mapped = {
        str(value): ValueMappingResult(text=name, color=colour, index=place)
        for place, (value, (name, colour)) in enumerate(names.items())
    }
    panel = panel.mappings([ValueMap(options=mapped)])
    panel = panel.show_value(VisibilityMode.AUTO).row_height(0.8)
    return panel.legend(
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
    )
