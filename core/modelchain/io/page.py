"""A report as one HTML page that needs no other file and no network."""

from __future__ import annotations

from datetime import UTC, datetime

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from modelchain.io import drawings
from modelchain.report.model import Report

TEMPLATE = "report.html"


def page(report: Report, now: float) -> str:
    """The page, in UTF-8. `now` is when it was made, in seconds since the epoch."""
    templates = Environment(
        loader=PackageLoader("modelchain.io", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return templates.get_template(TEMPLATE).render(
        report=report,
        made=made,
        drawings={name: Markup(svg) for name, svg in _drawings(report).items()},
    )


def _drawings(report: Report) -> dict[str, str]:
    """By name, the SVG elements for which there is something to draw."""
    drawn = {}
    if report.metric is not None and report.together:
        drawn["accuracy"] = drawings.accuracy_by_macs(report.together, report.alone, report.metric)
    if report.time_line:
        drawn["time"] = drawings.time_line(report.time_line)
    if report.curves:
        drawn["losses"] = drawings.losses(report.curves)
    if any(curve.ratios for curve in report.curves.values()):
        drawn["ratios"] = drawings.ratios(report.curves)
    return drawn
