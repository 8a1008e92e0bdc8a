"""`modelchain`, and `kubectl modelchain`: the command line. Other rooms add commands by the entry
points `modelchain.commands`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from errno import EDQUOT, EIO, ENOSPC
from importlib.metadata import entry_points
from typing import Any

import typer

from modelchain.cli.complete import COMPLETES, answer
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

NAME = "modelchain"
# As kubectl calls the program `kubectl-modelchain`.
PLUGIN = "kubectl modelchain"


def _commands() -> Iterator[tuple[str, typer.Typer | Callable[..., Any]]]:
    """All commands by name; those of rooms whose packages are not installed are absent."""
    for command in (validate, plan, run, status, cost, report):
        yield command.__name__, command
    for entry in entry_points(group="modelchain.commands"):
        try:
            yield entry.name, entry.load()
        except ImportError:
            continue


def command_line(program: str) -> Any:
    """The command line under the name by which it was called, which its help shows."""
    app = typer.Typer(
        name=NAME,
        help="Train a family of vision models as one chain, each grown from the one before.",
        no_args_is_help=True,
        # kubectl has a completion of its own, which asks `kubectl_complete-modelchain`.
        add_completion=program == NAME,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    for name, command in _commands():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name=name)(command)
    made = typer.main.get_command(app)
    _call_examples(made, program)
    return made


def _call_examples(command: Any, program: str) -> None:
    """Let the examples in the help of a command and of all below it begin with `program`."""
    example = r"(Example:\s+(?:\[bold\])?)modelchain "
    command.help = re.sub(example, rf"\1{program} ", command.help or "")
    for one in getattr(command, "commands", {}).values():
        _call_examples(one, program)


def kubectl_main() -> None:
    """`kubectl modelchain`: the same command line under another name."""
    main(PLUGIN)


def main(program: str = NAME) -> None:
    """Run the command line. For wrong input it prints one line for each problem to
    standard error.
    """
    if os.environ.get(COMPLETES):
        answer(lambda: command_line(NAME)(prog_name=NAME, standalone_mode=False))
    try:
        code = command_line(program)(prog_name=program, standalone_mode=False)
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
