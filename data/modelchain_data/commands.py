"""The command `modelchain pack`, which an entry point in pyproject.toml names."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from modelchain.errors import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from modelchain_data.pack import Split

BURST_SECONDS = 2.0  # signals this close together count as one


def pack(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="Tars, a folder of them, a caption table, or `digits`."),
    ],
    to: Annotated[Path, typer.Option("--to", help="The new folder of shards.", show_default=False)],
    size: Annotated[int, typer.Option(help="Shrink pictures to this short side.", min=1)] = 256,
    captions: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="For a caption table: the columns of captions, separated by commas.",
        ),
    ] = None,
) -> None:
    """Make shards with pictures shrunk and captions tokenised once, and print their fingerprint for
    `data.train.fingerprint`.

    SRC may be a caption table as DreamLIP publishes it for CC3M and CC12M, or the word digits.

    Example: [bold]modelchain pack digits --to runs/digits[/bold]
    """
    for split in _pack(source, to, size, None if captions is None else captions.split(",")):
        skipped = f", {split.skipped} unusable left out" if split.skipped else ""
        bare = "" if split.captioned else ", none with a caption"
        counts = f"{split.samples} samples{bare}{skipped}"
        typer.echo(
            f"{split.name}: {counts}, shards {split.shards}, fingerprint {split.fingerprint}"
        )


def _pack(source: str, to: Path, size: int, captions: list[str] | None) -> list[Split]:
    """Pack with a progress bar. An interruption leaves nothing behind."""
    with (
        _stopped_as_by_ctrl_c() as check,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        from modelchain_data.pack import pack

        bar = progress.add_task(f"packing {source}", total=None)

        def on_index(done: int, shards: int) -> None:
            check()
            progress.update(bar, description=f"indexing shard {done} of {shards}")

        def on_progress(done: int) -> None:
            check()
            progress.update(bar, description=f"packing {source}", completed=done)

        return pack(
            source, to, size=size, captions=captions, on_progress=on_progress, on_index=on_index
        )


@contextlib.contextmanager
def _stopped_as_by_ctrl_c() -> Iterator[Callable[[], None]]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, so that nothing is left behind. A signal
    that nohup ignores stays ignored.

    Services and terminals send several signals at once, of which only the first counts. It may
    interrupt code that holds a lock, and another exception may follow, so after a signal every
    exception counts as the interruption. Python drops an exception that is raised in a destructor.
    So call the yielded function from time to time: after a signal it raises again.
    """
    heard = 0.0

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal heard
        before, heard = heard, time.monotonic()
        if heard - before > BURST_SECONDS:
            raise KeyboardInterrupt

    def check() -> None:
        if heard:
            raise KeyboardInterrupt

    ours = [
        sig
        for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(sig) != signal.SIG_IGN
    ]
    handlers = {sig: signal.signal(sig, stop) for sig in ours}
    try:
        yield check
    except BaseException:
        if not heard:
            raise
        print("modelchain: interrupted; nothing is left behind", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        for sig, handler in handlers.items():
            signal.signal(sig, signal.SIG_IGN if heard else handler)
