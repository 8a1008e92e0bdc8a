"""The commands of `modelchain` for a cluster. pyproject.toml registers them as entry points.

Each command imports the Kubernetes client itself: the import takes a second, which other commands
should not have to wait, and the client may not be installed.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from modelchain.api.reasons import known
from modelchain.api.status import Condition, StageStatus, State
from modelchain.cli.complete import complete_stages
from modelchain.cli.options import Context, Kubeconfig, Name, NameOrAll, Namespace, Output
from modelchain.cli.stored import NEEDS_OPERATOR
from modelchain.decide.conditions import UNDERWAY, first_unmeasured, why_unmeasured
from modelchain.decide.measure import FAILED
from modelchain.errors import EXIT_DONE, EXIT_WORK_FAILED, InputError, TimedOut, WorkError
from modelchain.io.load import status_of

# The width of a table, in characters, where no terminal tells its own.
PIPE = 160

if TYPE_CHECKING:
    from modelchain_operator.api.kube import Kube, Object
    from modelchain_operator.explain.explain import Explanation


def get(
    name: NameOrAll = None,
    namespace: Namespace = None,
    all_namespaces: Annotated[
        bool, typer.Option("-A", "--all-namespaces", help="Chains of all namespaces.")
    ] = False,
    output: Output = "table",
    watch: Annotated[
        bool, typer.Option("-w", "--watch", help="Follow them until all have finished.")
    ] = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> int:
    """List chains, one line each, or follow them. A watch exits 1 if a chain failed.

    Example: [bold]modelchain get -n vision --watch[/bold]
    """
    if all_namespaces and (name or namespace):
        raise InputError("-A lists all namespaces; leave out NAME and -n, or -A")
    if watch and output == "json":
        raise InputError("-o json is one document, and --watch has no end; leave one of them out")
    with _packages():
        from modelchain_operator.cli.session import Place, on_cluster

    async def work(kube: Kube, space: str) -> int:
        where = None if all_namespaces else space
        chains = await _read(kube, where, name)
        if watch:
            return await _follow(kube, where, name)
        _print(chains, output, where, one=name is not None)
        return EXIT_DONE

    return on_cluster(Place(namespace, kubeconfig, context), work)


async def _follow(kube: Kube, space: str | None, name: str | None) -> int:
    """Show the chains that `_read` reads until all have finished. Returns the exit code."""
    from modelchain_operator.api.kube import CHAINS
    from modelchain_operator.api.objects import is_true
    from modelchain_operator.cli import listing
    from modelchain_operator.cli.changes import changes

    one = f"metadata.name={name}" if name else ""
    with _shown(space is None) as show:
        chains = await listing.follow(changes(kube, CHAINS, space, fields=one), show)
    if name and not chains:
        raise WorkError(f"{name} was deleted")
    failed = any(is_true(chain, "Failed") for chain in chains)
    return EXIT_WORK_FAILED if failed else EXIT_DONE


async def _read(kube: Kube, space: str | None, name: str | None) -> list[Object]:
    """The chain `name`, or all chains of the namespace `space`, or of all namespaces if None."""
    from modelchain_operator.cli.session import get_chain, list_chains

    if name is not None:
        assert space is not None
        return [await get_chain(kube, space, name)]
    return await list_chains(kube, space)


def _print(chains: list[Object], output: str, namespace: str | None, *, one: bool) -> None:
    """Print chains as a table or as JSON. A `namespace` of None stands for all namespaces. Of a
    chain that was asked for by its name, the table of the family follows.
    """
    from modelchain_operator.cli.listing import row, table

    rows = [row(chain, time.time()) for chain in chains]
    if output == "json":
        typer.echo(json.dumps([row._asdict() for row in rows], indent=1))
    elif rows:
        console = _console(PIPE)
        console.print(table(rows, namespace is None, console.width))
        _print_families(chains if one else [])
    else:
        where = "any namespace" if namespace is None else f"namespace {namespace}"
        typer.echo(f"no chains in {where}", err=True)


def _print_families(chains: Iterable[Object]) -> None:
    """Print the table of each chain that has a gate."""
    from modelchain_operator.cli.listing import gated_family

    for family in filter(None, map(gated_family, chains)):
        _console(PIPE).print(family)


def watch(
    name: Name,
    namespace: Namespace = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Give up then. Exits 124.", show_default=False),
    ] = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Follow one chain: its stages, the attempt, its pods, what it spends, and why it waits.

    Exits 0 once the chain is complete, and 1 if it has failed or is stalled. Ctrl-C leaves the
    chain alone. In a pipe, each change is a line.

    Example: [bold]modelchain watch vit-cc3m -n vision[/bold]
    """
    with _packages():
        from modelchain_operator.cli.session import Place, get_chain, on_cluster
        from modelchain_operator.cli.watching import screen, watch_chain

    async def work(kube: Kube, space: str) -> None:
        async with asyncio.timeout(timeout):
            chain = await get_chain(kube, space, name)
            with screen() as (show, pause):
                await watch_chain(kube, space, chain, show, pause)

    try:
        on_cluster(Place(namespace, kubeconfig, context), work)
    except TimeoutError as error:
        raise TimedOut(f"{name} has not finished within {timeout:g} s") from error


StageName = Annotated[
    str | None,
    typer.Argument(
        metavar="[STAGE]",
        help="Default: the one it is at.",
        show_default=False,
        autocompletion=complete_stages,
    ),
]
AttemptNumber = Annotated[
    int | None,
    typer.Option("--attempt", min=1, metavar="N", help="Default: the newest.", show_default=False),
]
Tail = Annotated[
    int | None,
    typer.Option(min=0, metavar="N", help="The last lines alone.", show_default=False),
]


def logs(
    name: Name,
    stage: StageName = None,
    namespace: Namespace = None,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Follow the chain, from stage to stage.")
    ] = False,
    attempt: AttemptNumber = None,
    all_ranks: Annotated[
        bool, typer.Option("--all-ranks", help="Of every pod, and not of rank 0's alone.")
    ] = False,
    tail: Tail = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Print what a chain's trainer says: rank 0 of the newest attempt, of the stage it is at.

    If the pods are gone, print the last word and where the records lie.

    Example: [bold]modelchain logs vit-cc3m -n vision -f[/bold]
    """
    with _packages():
        from modelchain_operator.cli.log_streams import follow_logs
        from modelchain_operator.cli.logs import Choice, print_logs
        from modelchain_operator.cli.session import Place, get_chain, on_cluster

    async def work(kube: Kube, space: str) -> None:
        chain = await get_chain(kube, space, name)
        choice = Choice(stage, attempt, all_ranks)
        begin = follow_logs if follow else print_logs
        await begin(kube, space, chain, choice, tail, _say)

    on_cluster(Place(namespace, kubeconfig, context), work)


def _say(line: str) -> None:
    print(line, flush=True)


def explain(
    name: Name,
    namespace: Namespace = None,
    output: Annotated[
        Literal["text", "json"], typer.Option("-o", "--output", help="Text, or one JSON document.")
    ] = "text",
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Say why a chain is not running, or what it does: the cause, the evidence and the next command
    to type.

    Example: [bold]modelchain explain vit-cc3m -n vision[/bold]
    """
    with _packages():
        from modelchain_operator.cli.session import Place, get_chain, on_cluster
        from modelchain_operator.explain import explain as reasons
        from modelchain_operator.explain import read as situation

    async def work(kube: Kube, space: str) -> situation.Situation:
        return await situation.read(kube, await get_chain(kube, space, name))

    seen = on_cluster(Place(namespace, kubeconfig, context), work)
    found = reasons.explain(seen)
    if output == "json":
        typer.echo(json.dumps(reasons.document(seen, found), indent=1))
        return
    _console().print(explanation(found))
    _print_families([seen.chain])
    typer.echo(found.next)  # not through the console, which would fold it: users copy it


def suspend(
    name: Name, namespace: Namespace = None, kubeconfig: Kubeconfig = None, context: Context = None
) -> None:
    """Stop a chain: what trains writes a checkpoint and ends, and nothing else is started.

    Example: [bold]modelchain suspend vit-cc3m -n vision[/bold]
    """
    _set_suspend(name, namespace, kubeconfig, context, True)


def resume(
    name: Name, namespace: Namespace = None, kubeconfig: Kubeconfig = None, context: Context = None
) -> None:
    """Let a suspended chain resume from its newest checkpoint.

    Example: [bold]modelchain resume vit-cc3m -n vision[/bold]
    """
    _set_suspend(name, namespace, kubeconfig, context, False)


def retry(
    name: Name, namespace: Namespace = None, kubeconfig: Kubeconfig = None, context: Context = None
) -> None:
    """Try a failed stage again from its newest checkpoint, with both budgets renewed; or ask again
    for a lost verification, or for a metric that could not be measured.

    Example: [bold]modelchain retry vit-cc3m -n vision[/bold]
    """
    with _packages():
        from modelchain_operator.api.kube import CHAINS
        from modelchain_operator.cli.session import Place, get_chain, on_cluster
        from modelchain_operator.reconcile.snapshot import RETRY

    async def work(kube: Kube, space: str) -> str:
        chain = await get_chain(kube, space, name)
        look = f"modelchain explain {name} -n {space}"
        what, measures = _to_retry(chain, look)
        asked = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        await kube.patch(CHAINS, space, name, {"metadata": {"annotations": {RETRY: asked}}})
        when = "once the chain is resumed" if chain["spec"].get("suspend") else "at once"
        if measures:
            return f"{what} of {name} is measured again {when}; look: {look}"
        return (
            f"{what} of {name} is tried again {when}, with its budgets renewed;"
            f" {_watch(name, space)}"
        )

    typer.echo(on_cluster(Place(namespace, kubeconfig, context), work))


def _to_retry(chain: Object, explain: str) -> tuple[str, bool]:
    """What a retry tries again, and whether that is a metric of finished stages, not a stage.

    Raises InputError if there is none. The error's message ends with the command `explain`.
    """
    name, status = chain["metadata"]["name"], status_of(chain)
    stalled = status.condition("Stalled")
    for stage in status.stages:
        failed = stage.state is State.FAILED or stage.not_before is not None
        if stage.code not in FAILED and (failed or _retry_helps(stage, stalled)):
            return f"stage {stage.name}", False
    again = [(s, one) for s in status.stages for one in s.unmeasured if one.retry_helps]
    if len(again) == 1:
        return f"evaluation {again[0][1].evaluation} of stage {again[0][0].name}", True
    if again:
        return f"each of {len(again)} missing metrics", True
    why, mend = "no stage has failed or stalled", ""
    if stalled is not None and stalled.status == "True":
        mend = stalled.reason
    elif status.is_true("Complete") and (missing := first_unmeasured(status.stages)) is not None:
        why = why_unmeasured(*missing)
        mend = "" if missing[1].code in UNDERWAY else missing[1].reason_code
    if mend:
        raise InputError(
            f"a retry does not help {name}: {mend} has to be corrected, and then it goes on by"
            f" itself; look: {explain}"
        )
    raise InputError(f"{name} has nothing to try again: {why}; look: {explain}")


def _retry_helps(stage: StageStatus, stalled: Condition | None) -> bool:
    """Whether the stage stalls for a reason that a retry can end, such as a lost verification.

    An older operator wrote the code to the condition `stalled` alone.
    """
    code = stage.code
    if stage.stalled and not stage.reason_code and stalled is not None:
        code = known(stalled.reason)
    return code is not None and code.retry_helps


def _set_suspend(
    name: str, namespace: str | None, kubeconfig: Path | None, context: str | None, value: bool
) -> None:
    """Set spec.suspend to `value`, and print what happens now."""
    with _packages():
        from modelchain_operator.api.kube import CHAINS
        from modelchain_operator.cli.session import Place, get_chain, on_cluster

    async def work(kube: Kube, space: str) -> str:
        chain = await get_chain(kube, space, name)
        if bool(chain["spec"].get("suspend")) == value:
            return f"{name} is {'already' if value else 'not'} suspended; nothing was changed"
        await kube.patch(CHAINS, space, name, {"spec": {"suspend": value}})
        status = status_of(chain)
        if status.is_true("Complete"):
            goes = "no metric is measured" if value else "the missing metrics are measured"
            what = goes if first_unmeasured(status.stages) else "nothing stops or starts"
            return f"{name} is complete, so {what}; its spec.suspend is {str(value).lower()} now"
        if not value:
            return f"{name} resumes from its newest checkpoint; {_watch(name, space)}"
        busy = next(
            (s.name for s in status.stages if s.state in (State.RUNNING, State.STARTING)), None
        )
        ends = f"stage {busy} writes a checkpoint and stops, and " if busy else ""
        return f"{name} is suspended: {ends}nothing else is started; {_watch(name, space)}"

    typer.echo(on_cluster(Place(namespace, kubeconfig, context), work))


def _watch(name: str, namespace: str) -> str:
    return f"watch: modelchain watch {name} -n {namespace}"


def explanation(found: Explanation) -> RenderableType:
    """The state, the cause and the evidence. The caller prints the next command below."""
    from modelchain.io.units import age

    parts: list[RenderableType] = [Text(found.state, style="bold"), Text(found.cause)]
    for line in found.evidence:
        old = "" if line.age_seconds is None else f" ({age(line.age_seconds)} ago)"
        text = Text.assemble("- ", (line.object, "cyan"), (old, "dim"), f": {line.message}")
        parts.append(Padding(text, (0, 0, 0, 2), expand=False))
    return Group(*parts, "")


def _console(pipe: int = 4096) -> Console:
    """A console as wide as the terminal. In a pipe it has `pipe` characters a line.

    By default these are so many that nothing is folded.
    """
    made = Console(highlight=False)
    return made if made.is_terminal else Console(width=pipe, highlight=False)


@contextmanager
def _shown(namespaces: bool) -> Iterator[Any]:
    """A function that shows rows. It redraws a terminal, and prints to a pipe what has changed.

    With `namespaces`, each row names its namespace.
    """
    from rich.live import Live

    from modelchain_operator.cli.listing import Lines, table

    console = Console()
    if not console.is_terminal:
        yield Lines(namespaces).show
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda rows: live.update(table(rows, namespaces, console.width), refresh=True)


@contextmanager
def _packages() -> Iterator[None]:
    """Within this context, a missing package ends in the advice to install the operator's extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("modelchain", "modelchain_operator"):
            raise
        raise InputError(NEEDS_OPERATOR) from error
