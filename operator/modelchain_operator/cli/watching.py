"""`modelchain watch`: follows one chain until it has finished, or cannot go on by itself."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live

from modelchain.api.status import StageStatus
from modelchain.decide.conditions import sentence
from modelchain.errors import WorkError
from modelchain.io.table import rows
from modelchain_operator.api.kube import Kube, Object
from modelchain_operator.api.objects import name
from modelchain_operator.cli.changes import Feeds
from modelchain_operator.cli.followed import Followed, end_of
from modelchain_operator.cli.listing import why
from modelchain_operator.cli.tree import (
    ASCII,
    UNICODE,
    Watched,
    progress_of,
    state_of,
    tree,
    watched_of,
)

# Ages and the time that is left change without news; between two pictures there is a pause.
REPAINT_SECONDS, PAUSE_SECONDS = 1.0, 0.2
Show = Callable[[Watched], None]


async def watch_chain(kube: Kube, namespace: str, chain: Object, show: Show, pause: float) -> None:
    """Show a chain and what becomes of it, until all of its stages have finished.

    Args:
        pause: seconds after each picture.

    Raises WorkError if the chain was deleted, or cannot go on by itself.
    """
    followed = Followed(chain)
    async with Feeds() as feeds:
        followed.follow(feeds, kube, namespace, need_pods=False)
        while True:
            await feeds.wait(REPAINT_SECONDS if followed.ready else None)
            if not followed.ready:
                continue
            show(watched_of(followed.chain, followed.pods, time.time()))
            if (over := end_of(followed.chain)) is not None:
                if over:
                    raise WorkError(over)
                return
            await asyncio.sleep(pause)


@contextmanager
def screen() -> Iterator[tuple[Show, float]]:
    """How to show views, and the pause after each: a terminal is painted again in place, and to a
    pipe goes a line for each change.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        yield StageLines().show, 0.0
        return
    signs = ASCII if console.options.ascii_only else UNICODE
    with Live(console=console, auto_refresh=False) as live:

        def paint(view: Watched) -> None:
            live.update(tree(view, console.width, signs), refresh=True)

        yield paint, PAUSE_SECONDS


class StageLines:
    """Prints views for a pipe: a line for the chain and for each stage that has changed."""

    def __init__(self) -> None:
        self._printed: dict[str, str] = {}

    def show(self, view: Watched) -> None:
        for key, line in lines(view):
            if self._printed.get(key) != line:
                self._printed[key] = line
                print(line)
        sys.stdout.flush()


def lines(view: Watched) -> Iterator[tuple[str, str]]:
    """A line for the chain, and one for each stage and baseline; each with what it is about."""
    summary = view.status.summary
    parts = [name(view.chain), summary.stage, summary.state or "New"]
    # What is said of a stage has a line of its own.
    parts += [] if view.status.stages else [why(view.chain)]
    yield "", "  ".join(part or "-" for part in parts)
    for title, stage in rows(view.status):
        yield title, "  ".join(_line(title, stage, view))


def _line(title: str, stage: StageStatus, view: Watched) -> Iterator[str]:
    part = progress_of(stage)
    yield title
    yield state_of(stage)
    yield "-" if part is None else f"{int(part * 100)}%"
    yield stage.attempts[-1].name if stage.attempts else "-"
    if stage.reason:
        yield sentence(stage, what="baseline" if title.endswith(" alone") else "stage")
