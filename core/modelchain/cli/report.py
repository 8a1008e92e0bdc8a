"""`modelchain report`: a chain as one HTML page."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from modelchain.cli.options import Context, Kubeconfig, NameOrRoot, Namespace, RootOrName
from modelchain.cli.stored import read_begun, read_records
from modelchain.errors import InputError
from modelchain.io.files import write_atomic
from modelchain.local.journals import stage_files
from modelchain.plan.plan import plan
from modelchain.report.model import recorded, report_of

NEEDS_REPORT = (
    "reports are drawn with packages that are not installed; install them: pip install"
    " 'modelchain[report]'"
)


def report(
    name: NameOrRoot = None,
    root: RootOrName = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The HTML file to write.")] = Path(
        "report.html"
    ),
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Write a chain's report: one HTML file that needs no network.

    It shows what each model reached and took, the time line, losses and provenance, of NAME on a
    cluster, or of the chain in --root. The chain may still run.

    Example: [bold]modelchain report --root runs/quickstart -o report.html[/bold]
    """
    chain, status = read_begun(name, root, namespace, kubeconfig, context)
    if root is not None:
        known = stage_files(root, status)
    else:
        known = recorded(status, read_records(namespace, kubeconfig, context))
    planned = plan(chain, "analytic", {}, status.epochs)
    now = time.time()
    page = _renderer().page(report_of(chain, status, planned, known, now), now)
    try:
        write_atomic(output, page.encode())
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=output) from error
    print(f"report: {output}")


def _renderer() -> Any:
    """The module that makes the page. Its packages are optional, and slow to import."""
    try:
        return import_module("modelchain.io.page")
    except ImportError as error:
        raise InputError(NEEDS_REPORT) from error
