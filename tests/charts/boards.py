"""The generated dashboards, and the parts of them that tests look at."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml
from generate import CHART, REPOSITORY

FOLDER = CHART / "files" / "dashboards"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json"))
SERIES = re.compile(r"\b[a-z_]+:[a-z_:]+|\b(?:modelchain|process)_\w+")


@cache
def board(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def panels(name: str) -> list[dict[str, Any]]:
    """The panels of a dashboard, without its rows."""
    return [panel for panel in board(name)["panels"] if panel["type"] != "row"]


def queries(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The title of a panel, and one of its queries."""
    for panel in panels(name):
        yield from ((panel["title"], target) for target in panel["targets"])


def _rows() -> list[tuple[str, str, str]]:
    """Name, type and labels of every metric of docs/metrics.md."""
    page = (REPOSITORY / "docs" / "metrics.md").read_text()
    return re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*) \|", page, re.M)


def documented_labels() -> dict[str, set[str]]:
    """The labels of each metric, by its name."""
    return {name: set(re.findall(r"`(\w+)`", labels)) for name, _, labels in _rows()}


def documented() -> set[str]:
    """Every name of a series, with those of the parts of histograms."""
    histograms = [name for name, kind, _ in _rows() if kind == "histogram"]
    parts = {f"{name}_{part}" for name in histograms for part in ("bucket", "count", "sum")}
    return {name for name, _, _ in _rows()} | parts


def recorded() -> dict[str, str]:
    """The expression of each recording rule of the chart, by its name."""
    groups = yaml.safe_load((CHART / "files" / "rules.yaml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    return {rule["record"]: rule["expr"] for rule in rules if "record" in rule}
