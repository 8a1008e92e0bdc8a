"""The drawings of a report, each as an SVG element.

Matplotlib draws them without a display. Text stays text, so that it can be searched and the file
is small.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from modelchain.api.status import State
from modelchain.report.model import Curve, Point, Span

WIDTH = 9.0  # inches, at 72 to an inch
TOGETHER, ALONE = "#0f5c8c", "#b4582a"
COLOURS = {
    State.SUCCEEDED: "#2e7d4f",
    State.FAILED: "#b3261e",
    State.SUSPENDED: "#c79a1b",
}
OPEN = "#3f78b5"
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.edgecolor": "#8a8a8a",
}
# A page names no other site, and the same chain gives the same drawing.
NO_METADATA: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))

Numbers = Callable[[Curve], Sequence[tuple[int, float]]]


@contextmanager
def _figure(height: float, salt: str) -> Iterator[tuple[Axes, Callable[[], str]]]:
    """One pair of axes, and a function that returns what was drawn as an SVG element.

    Ids inside an SVG are those of the whole page, so each figure has a salt of its own.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)

        def svg() -> str:
            written = io.StringIO()
            figure.savefig(written, format="svg", metadata=NO_METADATA)
            return re.sub(r"^.*?(?=<svg)", "", written.getvalue(), flags=re.DOTALL)

        yield figure.subplots(), svg


def accuracy_by_macs(together: Sequence[Point], alone: Sequence[Point], metric: str) -> str:
    """Accuracy against the accumulated MACs of the family: Figure 1 of the paper.

    The models trained alone are drawn if more than the first is known, which both ways share.
    """
    with _figure(3.6, "accuracy") as (axes, svg):
        if len(alone) > 1:
            _line(axes, alone, ALONE, "each trained alone", label_below=True)
        _line(axes, together, TOGETHER, "as a chain", label_below=False)
        axes.margins(x=0.08, y=0.2)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set_xlabel("multiply-accumulates, all models up to this one")
        axes.set_ylabel(f"{metric}, %")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        return svg()


def _line(axes: Axes, points: Sequence[Point], colour: str, label: str, label_below: bool) -> None:
    """Points with a line through them, each with the name of its stage."""
    macs = [point.macs for point in points]
    accuracies = [point.accuracy for point in points]
    axes.plot(macs, accuracies, "o-", color=colour, label=label, markersize=6)
    offset = (0, -16) if label_below else (0, 8)
    for point in points:
        place = (point.macs, point.accuracy)
        axes.annotate(
            point.stage, place, offset, textcoords="offset points", ha="center", color=colour
        )


def time_line(spans: Sequence[Span]) -> str:
    """A bar for each attempt, a line for each stage, from the start of the first one."""
    rows = list(dict.fromkeys(span.row for span in spans))
    begin = min(span.start for span in spans)
    unit, size = _unit(max(span.end for span in spans) - begin)
    with _figure(0.9 + 0.34 * len(rows), "time") as (axes, svg):
        for span in spans:
            colour = COLOURS.get(span.state, OPEN)
            start, length = (span.start - begin) / size, (span.end - span.start) / size
            axes.barh(rows.index(span.row), length, left=start, color=colour, height=0.6)
        axes.set_yticks(range(len(rows)), rows)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
        return svg()


def _unit(seconds: float) -> tuple[str, float]:
    """The unit in which a time is read best, and its seconds."""
    for unit, size in (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0)):
        if seconds > 3 * size:
            return unit, size
    return "seconds", 1.0


def losses(curves: Mapping[str, Curve]) -> str:
    """The training loss of each stage by its step."""
    return _curves(curves, "loss", "losses", lambda curve: curve.losses)


def ratios(curves: Mapping[str, Curve]) -> str:
    """The distillation loss divided by the task loss, of each stage that has a teacher."""
    return _curves(curves, "distillation loss / task loss", "ratios", lambda curve: curve.ratios)


def _curves(curves: Mapping[str, Curve], label: str, salt: str, values: Numbers) -> str:
    """A line for each stage that has these values, in the same colour in every drawing."""
    with _figure(2.8, salt) as (axes, svg):
        shades = mpl.colormaps["viridis"]
        for index, (name, curve) in enumerate(curves.items()):
            if values(curve):
                steps, numbers = zip(*values(curve), strict=True)
                shade = shades(0.85 * index / max(1, len(curves) - 1))
                axes.plot(steps, numbers, color=shade, linewidth=1.4, label=name)
        axes.set_xlabel("step of the stage")
        axes.set_ylabel(label)
        axes.legend(frameon=False, ncols=1 + len(curves) // 9)
        return svg()
