"""`modelchain`: the command line. Other rooms add commands by the entry points
`modelchain.commands`.
"""

from __future__ import annotations

import sys
from errno import EDQUOT, EIO, ENOSPC
from importlib.metadata import entry_points
from typing import Any

import typer

from modelchain.cli.cost import cost
from modelchain.cli.plan import plan
from modelchain.cli.report import report
from modelchain.cli.run import run
from modelchain.cli.status import status
from modelchain.cli.validate import validate
from modelchain.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_WORK_FAILED,
    InputError,
    WorkError,
)

# click's UsageError, which typer has only under a private name
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="modelchain",
    help="Train a family of vision models as one chain, each grown from the one before.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for command in (validate, plan, run, status, cost, report):
    app.command()(command)
for entry in entry_points(group="modelchain.commands"):
    try:
        command = entry.load()
    except ImportError:  # the room's packages are not installed, so its commands are absent
        continue
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=entry.name)
    else:
        app.command(name=entry.name)(command)


def main() -> None:
    """Run the command line. For wrong input it prints one line for each problem to
    standard error.
    """
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else EXIT_DONE)
    except _UsageError as error:  # typer itself would print a box
        if message := error.format_message():  # empty if no command was given: the help was printed
            print(f"modelchain: {message}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except (InputError, WorkError) as error:
        for line in str(error).splitlines():
            print(f"modelchain: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("modelchain: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        print(
            f"modelchain: {error.filename or 'file system'}: {error.strerror or error}",
            file=sys.stderr,
        )
        sys.exit(EXIT_WORK_FAILED if error.errno in (ENOSPC, EDQUOT, EIO) else EXIT_BAD_INPUT)
