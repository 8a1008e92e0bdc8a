"""What the files of a root tell of its stages: the journals of their attempts, and artifacts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from modelchain.api.contracts import MANIFEST, METRICS, RESULTS, Manifest, Results
from modelchain.api.status import ChainStatus
from modelchain.local.root import OWNER, number_in, read_model
from modelchain.report.model import Curve, Known

# The most points of a curve. A drawing cannot show more.
POINTS = 400


def stage_files(root: Path, status: ChainStatus) -> dict[str, Known]:
    """By stage, what the files in its input digest's directory tell."""
    return {
        stage.name: _of_stage(root / stage.input_digest)
        for stage in status.stages
        if stage.input_digest is not None
    }


def _of_stage(directory: Path) -> Known:
    artifact = directory / "artifact"
    return Known(
        curve=_curve(directory),
        results=read_model(Results, artifact / RESULTS),
        manifest=read_model(Manifest, artifact / MANIFEST),
    )


def _curve(directory: Path) -> Curve:
    """The losses of all attempts. One that resumed has the last word on the steps it repeated."""
    steps: dict[int, dict[str, Any]] = {}
    attempts = directory.glob(f"{OWNER}-a*/{METRICS}")
    for path in sorted(attempts, key=lambda path: number_in(path.parent, f"{OWNER}-a")):
        steps |= {entry["step"]: entry for entry in _entries(path)}
    told = [steps[step] for step in sorted(steps)]
    every = -(-len(told) // POINTS) or 1
    return Curve(
        losses=[(e["step"], e["loss"]) for e in told[::every]],
        ratios=[(e["step"], e["ratio"]) for e in told[::every] if e.get("ratio") is not None],
    )


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of steps that were not skipped. A line that was cut by a kill is left out."""
    with suppress(OSError), path.open("rb") as lines:
        for line in lines:
            with suppress(ValueError):
                entry = json.loads(line)
                if (
                    isinstance(entry, dict)
                    and entry.get("event") == "step"
                    and entry.get("loss") is not None
                ):
                    yield entry
