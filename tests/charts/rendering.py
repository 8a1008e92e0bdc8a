"""The chart as Helm renders it, once for each set of values."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from generate import CHART, helm

Object = dict[str, Any]

VALUES = Path(__file__).parent / "values"
ALL = ["default", *sorted(file.stem for file in VALUES.glob("*.yaml"))]
HOME = "modelchain-system"


def options(name: str) -> list[str]:
    """Helm's options that choose the values of one file here, or none."""
    return [] if name == "default" else ["--values", str(VALUES / f"{name}.yaml")]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`helm template` of the chart, also where it refuses the values."""
    return helm("template", "modelchain", str(CHART), "--namespace", HOME, *arguments, check=False)


@cache
def objects(*arguments: str) -> tuple[Object, ...]:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return tuple(thing for thing in yaml.safe_load_all(done.stdout) if thing)


def rendered(name: str) -> tuple[Object, ...]:
    return objects(*options(name))


def find(things: tuple[Object, ...], kind: str, name: str = "") -> list[Object]:
    """The objects of one kind whose names end with a suffix."""
    return [t for t in things if t["kind"] == kind and t["metadata"]["name"].endswith(name)]


def one(things: tuple[Object, ...], kind: str, name: str = "") -> Object:
    (found,) = find(things, kind, name)
    return found


def pod_templates(things: tuple[Object, ...]) -> Iterator[Object]:
    for thing in things:
        if "template" in (thing.get("spec") or {}):
            yield thing["spec"]["template"]
