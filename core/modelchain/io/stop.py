"""How a process is asked to stop. This imports no torch: a trainer listens before torch
is loaded.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGHUP)  # torchrun forwards the one that it gets

Handler = Callable[[int, FrameType | None], Any]


def listen(signals: Iterable[signal.Signals], handler: Handler) -> dict[signal.Signals, Any]:
    """Handle these signals, except SIGHUP where `nohup` has switched it off. Returns the handlers
    that were set before.
    """
    heard = [
        sig
        for sig in signals
        if sig is not signal.SIGHUP or signal.getsignal(sig) is not signal.SIG_IGN
    ]
    return {sig: signal.signal(sig, handler) for sig in heard}


class Preempted(BaseException):
    """The process was asked to stop, and everything worth keeping has been written.

    Like KeyboardInterrupt this is no failure of the code that it ends.
    """


@dataclass
class StopRequest:
    """A request to stop. The training loop obeys at the end of a step; other code obeys at once,
    since nothing is half done there.
    """

    asked: bool = False
    in_loop: bool = False

    def on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        first, self.asked = not self.asked, True
        if first:
            self.check()

    def check(self) -> None:
        """Outside the loop, raise Preempted if a stop was asked for."""
        if self.asked and not self.in_loop:
            raise Preempted("stopped outside the training loop; the newest checkpoint is kept")

    @contextmanager
    def loop(self, inside: bool = True) -> Iterator[None]:
        """Marks a block as part of the training loop. With False, it marks a block inside the loop
        that may be left at once.
        """
        before, self.in_loop = self.in_loop, inside
        try:
            self.check()
            yield
        finally:
            self.in_loop = before

    @contextmanager
    def heard(self, seconds: float, give_up: Callable[[], None]) -> Iterator[None]:
        """Handle SIGTERM and SIGHUP (unless `nohup` has switched it off) in the block, and ignore
        them after it. If the block has not ended `seconds` after a signal, a thread calls
        `give_up`, since a main thread that runs C code or waits for a lost peer handles no signal.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        over = threading.Event()

        def watch() -> None:
            while (heard := os.read(reading, 1)) and heard[0] not in STOPS:
                pass
            if heard and not over.wait(seconds):
                give_up()
            os.close(reading)

        threading.Thread(target=watch, name="stop", daemon=True).start()
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        stops = listen(STOPS, self.on_signal)
        # The runner turns a terminal's Ctrl-C into SIGTERM.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield
        finally:
            for sig in stops:
                signal.signal(sig, signal.SIG_IGN)  # too late to stop
            signal.set_wakeup_fd(-1)
            over.set()
            os.close(writing)
