"""The two errors that a command reports: the input is wrong (exit 2), or the work
failed (exit 1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

EXIT_DONE = 0
EXIT_WORK_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_NOTHING_TO_DO = 3
EXIT_PREEMPTED = 75
EXIT_TIMED_OUT = 124
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, in which file, at which field, in one line.

    Names of files and of tar members are not under our control, so control characters are shown as
    escapes: a terminal would obey them.
    """

    message: str
    file: str | None = None
    field: str | None = None

    def __str__(self) -> str:
        where = [part for part in (self.file, self.field) if part]
        text = " ".join(": ".join([*where, self.message]).split())
        return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


class InputError(Exception):
    """What the user gave is wrong. Carries every problem found, with its place; exit code 2."""

    exit_code = EXIT_BAD_INPUT

    def __init__(
        self, *problems: Problem | str, file: str | Path | None = None, field: str | None = None
    ):
        where = str(file) if file is not None else None
        self.problems = [
            p if isinstance(p, Problem) else Problem(p, where, field) for p in problems
        ]
        super().__init__("\n".join(str(p) for p in self.problems))

    def in_file(self, file: str | Path) -> InputError:
        """The same problems, with `file` where a problem names no file."""
        return InputError(*(replace(p, file=p.file or str(file)) for p in self.problems))


class WorkError(Exception):
    """The work itself failed: a corrupt file, a diverged loss, a root in use. Exit code 1.

    `failure` is the class that decides which retry budget is charged
    (`modelchain.api.contracts.FailureClass`).
    """

    exit_code = EXIT_WORK_FAILED

    def __init__(self, message: str, failure: str = "Error"):
        self.failure = failure
        super().__init__(message)


class TimedOut(WorkError):
    """The time that the user gave for a command is over. Exit code 124, as that of `timeout`."""

    exit_code = EXIT_TIMED_OUT
