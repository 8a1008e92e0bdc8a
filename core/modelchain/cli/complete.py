"""What shells are told to complete: commands, options, and the names of chains and stages.

A completion never fails and never waits long. What it cannot find out, it does not offer.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

import typer

from modelchain.cli.stored import of_the_operator
from modelchain.errors import EXIT_DONE

# The variable by which a shell asks `modelchain` for completions.
COMPLETES = "_MODELCHAIN_COMPLETE"
# A shell that waits is in the way: if a cluster has not answered by then, nothing is offered.
SECONDS = 2.0
# The directives to kubectl: offer these alone, or files.
NO_FILES, FILES = ":4", ":0"


def complete_chains(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names of the chains in the namespace that was typed."""
    return [one for one in _asked("names", ctx) if one.startswith(incomplete)]


def complete_stages(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names of the stages of the chain that was typed."""
    chain = ctx.params.get("name")
    stages = _asked("stages", ctx, str(chain)) if chain else []
    return [one for one in stages if one.startswith(incomplete)]


def _asked(what: str, ctx: typer.Context, *names: str) -> list[str]:
    """The answer of the operator's function, if it comes in time."""
    kubeconfig = ctx.params.get("kubeconfig")
    file = Path(kubeconfig) if kubeconfig else None
    place = (ctx.params.get("namespace"), file, ctx.params.get("context"))
    read = of_the_operator(what)
    found: list[str] = []

    def ask() -> None:
        with suppress(Exception):
            found.extend(read(*names, *place))

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return list(found)


def answer(command_line: Callable[[], Any]) -> NoReturn:
    """Answer a shell and end the process, at once: a thread may still wait for an API server."""
    code: Any = EXIT_DONE
    with redirect_stderr(io.StringIO()), suppress(Exception):
        try:
            command_line()
        except SystemExit as ended:
            code = ended.code
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else EXIT_DONE)


def for_kubectl() -> NoReturn:
    """`kubectl_complete-modelchain`: kubectl calls it with the words after `kubectl modelchain`.

    The last one is to be completed. Each line of the answer is a word with its description; the
    last line is a directive.
    """
    # Not at the top: the command line imports this file for its arguments.
    from modelchain.cli.app import NAME, command_line

    *before, last = sys.argv[1:] or [""]
    typed = shlex.join([NAME, *before]) + " " + (shlex.quote(last) if last else "")
    # The protocol of fish has the same lines.
    os.environ |= {
        COMPLETES: "complete_fish",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_ARGS": typed,
    }

    def ask() -> None:
        out = io.StringIO()
        with redirect_stdout(out), suppress(SystemExit, Exception):
            command_line(NAME)(args=[], prog_name=NAME, standalone_mode=False)
        words = out.getvalue().strip()
        print(f"{words}\n{NO_FILES}" if words else FILES)

    answer(ask)
