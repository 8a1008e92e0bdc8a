"""What `modelchain get` prints: one line for each chain, once or until all have finished."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from typing import NamedTuple

from pydantic import ValidationError
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from modelchain.api.messages import one_line
from modelchain.api.spec import ModelChain
from modelchain.api.status import StageStatus, State
from modelchain.decide.conditions import current, sentence
from modelchain.errors import WorkError
from modelchain.io.load import status_of
from modelchain.io.table import family_table
from modelchain.io.units import age
from modelchain.report.model import family_cells
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import (
    condition,
    is_refused,
    is_true,
    name,
    true_condition,
)
from modelchain_operator.cli.changes import Feeds

# Ages grow without news.
REPAINT_SECONDS = 2.0
COLUMNS = ("namespace", "name", "stage", "state", "progress", "accuracy", "cost", "age", "why")
STYLES = {
    "Complete": "green",
    "Running": "cyan",
    "Starting": "cyan",
    "Indexing": "cyan",
    "Verifying": "cyan",
    "Suspended": "yellow",
}
# If fewer characters are left for the column `why`, it is printed below the table.
LEAST_WHY = 40
BAD = ("Failed", "Stalled", "InvalidSpec")


class ChainRow(NamedTuple):
    """One chain, ready to print. All but the first two and `state` may be empty."""

    namespace: str
    name: str
    stage: str
    state: str
    progress: str
    accuracy: str
    cost: str
    # In the form in which `kubectl` prints ages.
    age: str
    why: str


def row(chain: Object, now: float) -> ChainRow:
    meta, status = chain["metadata"], chain.get("status") or {}
    summary = status.get("summary") or {}
    return ChainRow(
        meta["namespace"],
        meta["name"],
        summary.get("stage", ""),
        summary.get("state") or "New",
        summary.get("progress", ""),
        summary.get("accuracy", ""),
        summary.get("cost", ""),
        age(now - datetime.fromisoformat(meta["creationTimestamp"]).timestamp()),
        one_line(why(chain)),
    )


def why(chain: Object) -> str:
    """Why the chain has not got further, in one sentence; empty for a complete chain that lacks no
    metric.
    """
    status = chain.get("status") or {}
    if not status.get("stages") and not status.get("conditions"):
        return "no operator has looked at it yet"
    if status.get("observedGeneration") != chain["metadata"]["generation"]:
        return "it was changed, and no operator has looked at it since"
    if (stalled := true_condition(chain, "Stalled")) is not None:
        stage = _current(chain)
        of_stage = stage is not None and (stage.stalled or stage.state is State.FAILED)
        if stage is None or not of_stage or is_refused(chain):
            return str(stalled["message"])
        return sentence(stage, command=False)
    if (suspended := true_condition(chain, "Suspended")) is not None:
        return str(suspended["message"])
    stage = _current(chain) if true_condition(chain, "Reconciling") else None
    return _missing_metric(chain) if stage is None else sentence(stage, command=False)


def _missing_metric(chain: Object) -> str:
    """Which metric of a complete chain is missing, and why; empty if none is."""
    measured = condition(chain, "Measured") if true_condition(chain, "Complete") else None
    return str(measured["message"]) if measured and measured["status"] == "False" else ""


def _current(chain: Object) -> StageStatus | None:
    """The stage that tells most of a chain.

    None if an operator of another version wrote a status that this version cannot read.
    """
    stages = (chain.get("status") or {}).get("stages") or []
    try:
        return current([StageStatus.model_validate_json(json.dumps(one)) for one in stages])
    except ValidationError:
        return None


def table(rows: Sequence[ChainRow], namespaces: bool, width: int) -> RenderableType:
    """One line for each chain, in `width` characters. Empty columns are left out.

    If there is too little room for the column `why`, the reasons are printed below the table.
    """
    out = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    kept = [i for i, column in enumerate(COLUMNS) if any(r[i] for r in rows) and (i or namespaces)]
    taken = sum(
        max(len(COLUMNS[i]), *(len(r[i]) for r in rows)) + 2 for i in kept if COLUMNS[i] != "why"
    )
    below = [i for i in kept if COLUMNS[i] == "why" and width - taken < LEAST_WHY]
    kept = [i for i in kept if i not in below]
    for i in kept:
        right = COLUMNS[i] in ("progress", "accuracy", "cost", "age")
        out.add_column(
            COLUMNS[i],
            justify="right" if right else "left",
            no_wrap=COLUMNS[i] not in ("name", "why"),
        )
    for r in rows:
        why = Text(r.why, style=_style(r), no_wrap=True, overflow="ellipsis")
        cells: list[str | Text] = [*r[:3], Text(r.state, style=_style(r)), *r[4:-1], why]
        out.add_row(*(cells[i] for i in kept))
    reasons = [
        Padding(Text(f"{r.name}: {r.why}", style=_style(r)), (0, 0, 0, 2), expand=False)
        for r in rows
        if below and r.why
    ]
    return Group(out, *reasons)


def gated_family(chain: Object) -> RenderableType | None:
    """The models of a chain beside the same models trained alone.

    None for a chain without a gate, and for one that another version of the API has checked.
    """
    try:
        spec = ModelChain.model_validate(chain)
        status = status_of(chain)
    except (ValidationError, WorkError):
        return None
    if spec.spec.gate is None or not status.stages:
        return None
    return family_table(family_cells(spec, status))


def _style(r: ChainRow) -> str:
    return "red" if r.state in BAD else STYLES.get(r.state, "dim")


class Lines:
    """Prints chains for a pipe: a line for each chain, and later one for each that has changed."""

    def __init__(self, namespaces: bool) -> None:
        self._first = 0 if namespaces else 1
        # By namespace and name, the row that was printed last, without its age.
        self._printed: dict[tuple[str, str], ChainRow] = {}

    def show(self, rows: Sequence[ChainRow]) -> None:
        for r in rows:
            timeless = r._replace(age="")
            if self._printed.get((r.namespace, r.name)) != timeless:
                self._printed[r.namespace, r.name] = timeless
                print("  ".join(value or "-" for value in r[self._first :]), flush=True)


async def follow(
    stream: AsyncIterator[list[Object]], show: Callable[[Sequence[ChainRow]], None]
) -> list[Object]:
    """Show the chains, as a stream tells them, until all have finished. Returns them as they are
    then. Raises the stream's errors.
    """
    told: list[list[Object]] = []
    async with Feeds() as feeds:
        feeds.add(stream, told.append)
        while True:
            await feeds.wait(REPAINT_SECONDS if told else None)
            chains = sorted(told[-1], key=lambda one: (one["metadata"]["namespace"], name(one)))
            del told[:-1]
            show([row(chain, time.time()) for chain in chains])
            if all(is_true(chain, "Finished") for chain in chains):
                return chains
