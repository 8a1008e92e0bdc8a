"""`modelchain plan`: what a chain will cost, before it runs, and which chains there could be."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal

import typer

from modelchain.api.spec import ModelChain
from modelchain.api.status import Capacity
from modelchain.cli.against import print_changes, read_before
from modelchain.cli.budget import KnownPools, check_budget
from modelchain.cli.options import Context, FileOption, Kubeconfig, Namespace
from modelchain.cli.search import print_search
from modelchain.cli.tables import print_table, print_text
from modelchain.errors import InputError
from modelchain.io.load import load_chain, load_model
from modelchain.plan import plan as planning
from modelchain.plan.pools import DEFAULT_POOLS, NodePool, PoolFile
from modelchain.plan.prices import Price, milliseconds, shown
from modelchain.plan.search import search as find_designs
from modelchain.report.cost import scientific

OutputOption = Annotated[
    Literal["table", "json", "markdown"], typer.Option("-o", "--output", help="What to print.")
]
ConventionOption = Annotated[
    planning.Convention,
    typer.Option(
        help=(
            "How MACs are counted: as the trainer spends them, or as the paper's Table G prints"
            " them."
        )
    ),
]
PoolsOption = Annotated[
    Path | None,
    typer.Option(
        help="The operator's node-pool file: GPUs and prices. Default: A100 pools, no prices.",
        show_default=False,
    ),
]
SearchOption = Annotated[
    bool, typer.Option("--search", help="Show which chains there could be, and what each costs.")
]
LargestOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="With --search: the model in which every chain ends. Default: the file's last.",
        show_default=False,
    ),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL,...",
        help="With --search: models that every chain must have.",
        show_default=False,
    ),
]
BudgetOption = Annotated[
    bool, typer.Option("--budget", help="Exit 1 if the plan does not fit into spec.budget.")
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME",
        help=(
            "Show what the file would train of a chain that exists: in another file, or NAME on a"
            " cluster. Exits 3 if nothing."
        ),
        show_default=False,
    ),
]


def plan(
    file: FileOption,
    output: OutputOption = "table",
    convention: ConventionOption = "analytic",
    pools: PoolsOption = None,
    search: SearchOption = False,
    largest: LargestOption = None,
    keep: KeepOption = None,
    budget: BudgetOption = False,
    against: AgainstOption = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
) -> None:
    """Show what a chain will cost, stage by stage, against training each model alone.

    Epochs, MACs, GPU hours and money. Nothing is trained and no data is read. With --against: what
    an edit would train.

    Example: modelchain plan -f examples/vit-cc3m.yaml --convention paper
    """
    _check_options(search, convention, pools, {"largest": largest, "keep": keep}, budget, against)
    if against is None and (namespace or kubeconfig or context):
        raise InputError("a plan reads no cluster; name a chain there with --against NAME")
    chain = load_chain(file)
    before = (
        None if against is None else read_before(chain, against, namespace, kubeconfig, context)
    )
    try:
        if before is not None:
            print_changes(chain, before, _pools(pools), output)
        elif search:
            _search(chain, output, convention, largest, keep)
        else:
            known = KnownPools(_pools(pools), pools is not None, milliseconds(time.time()))
            result = _plan(chain, output, convention, known)
            if budget:
                check_budget(chain.spec, result, known)
    except InputError as error:
        raise error.in_file(file) from error


def _check_options(
    search: bool,
    convention: str,
    pools: Path | None,
    searched: Mapping[str, str | None],
    budget: bool,
    against: str | None,
) -> None:
    """Raise InputError for options that do not go together.

    `searched` has the options of --search by their names.
    """
    if search and pools is not None:
        raise InputError("--search compares MACs, not prices: leave out --pools")
    if not search and any(option is not None for option in searched.values()):
        raise InputError("--largest and --keep are options of --search: add --search")
    for name, option in searched.items():
        if option is not None and "" in [one.strip() for one in option.split(",")]:
            raise InputError(f"--{name}: the name of a model is empty")
    if against is not None and (search or convention == "paper"):
        raise InputError("--against compares what is trained: leave out --search and --convention")
    if budget and (against is not None or search):
        raise InputError("--budget is about one whole chain: leave out --against and --search")


def _search(
    chain: ModelChain,
    output: str,
    convention: planning.Convention,
    largest: str | None,
    keep: str | None,
) -> None:
    kept = [] if keep is None else [name.strip() for name in keep.split(",")]
    found = find_designs(chain, convention, largest, kept)
    if output == "json":
        typer.echo(found.to_json())
    else:
        print_search(found, chain, output == "markdown")


def _plan(
    chain: ModelChain, output: str, convention: planning.Convention, known: KnownPools
) -> planning.Plan:
    """Print the plan, and return it."""
    result = planning.plan(chain, convention, known.pools, now=known.now)
    if output == "json":
        typer.echo(result.to_json())
        return result
    price = planning.price_of(chain.spec, known.pools, known.now) if result.total.cost else None
    note = _what_run_does(chain, result)
    _print(result, price, note, output == "markdown")
    if result.baselines:
        print_text(_baselines(result.baselines, price[0] if price else None))
    return result


def _pools(file: Path | None) -> Mapping[str, NodePool]:
    return load_model(PoolFile, file).node_pools if file else DEFAULT_POOLS


def _what_run_does(chain: ModelChain, shown: planning.Plan) -> str | None:
    """The epochs that `run` will allocate, if another convention than its own is shown."""
    if shown.convention == "analytic" or all(stage.epochs for stage in chain.spec.stages[1:]):
        return None
    try:
        epochs = [stage.epochs for stage in planning.plan(chain, "analytic", {}).stages]
    except InputError as error:
        return f"`run` allocates epochs by the analytic convention, and would refuse: {error}"
    same = epochs == [stage.epochs for stage in shown.stages]
    listed = "the same epochs" if same else "epochs " + ", ".join(map(str, epochs))
    return f"`run` allocates epochs by the analytic convention: {listed}"


def _print(
    result: planning.Plan,
    price: tuple[Price, Capacity | None] | None,
    note: str | None,
    markdown: bool,
) -> None:
    print_table(
        f"{result.chain}, {result.convention} MACs",
        _columns(result, price[0] if price else None),
        left=("stage", "model"),
        ends=[len(result.stages) - 1],
        markdown=markdown,
    )
    if price:
        named, capacity = price
        of = f" ({capacity})" if capacity else ""
        print_text(f"{named.per_gpu_hour} {named.currency} per GPU hour{of}: {named.source}")
    if note:
        print_text(note)
    print_text(_in_words(result))


def _columns(result: planning.Plan, price: Price | None) -> dict[str, list[str]]:
    """By heading, a cell for each stage, for the chain, and for each model trained alone."""
    stages, total = result.stages, result.total
    spent = accumulate(stage.macs for stage in stages)
    alone = accumulate(stage.individual.macs for stage in stages)
    amounts: list[planning.StagePlan | planning.Amount] = [*stages, total, result.individual]
    columns = {
        "stage": [*(stage.name for stage in stages), "chain", "each alone"],
        "model": [*(stage.model for stage in stages), "", ""],
        "epochs": [*(str(stage.epochs) for stage in stages), "", ""],
        "samples": [*(_count(stage.samples) for stage in stages), "", ""],
        "MACs": [scientific(amount.macs) for amount in amounts],
        "share": [*(f"{stage.macs / total.macs:.1%}" for stage in stages), "", ""],
    }
    if total.gpu_hours is not None:
        columns["GPU\nhours"] = [f"{amount.gpu_hours:,.1f}" for amount in amounts]
    if price:
        columns[f"cost\n{price.currency}"] = [shown(amount.cost or "0") for amount in amounts]
    columns |= {
        "alone:\nMACs": [*(scientific(stage.individual.macs) for stage in stages), "", ""],
        "\nratio": [*(f"{stage.individual.macs / stage.macs:.2f}" for stage in stages), "", ""],
        "ratio\nso far": [*(f"{a / s:.2f}" for a, s in zip(alone, spent, strict=True)), "", ""],
    }
    return columns


def _in_words(result: planning.Plan) -> str:
    chain, alone = scientific(result.total.macs), scientific(result.individual.macs)
    ratio = result.acceleration
    verdict = f"{ratio:.2f} times less" if ratio >= 1 else f"{1 / ratio:.2f} times more"
    return f"this chain costs {chain} MACs; training each alone {alone}: {verdict}"


def _baselines(baselines: Sequence[planning.BaselinePlan], price: Price | None) -> str:
    """What the baselines cost that the gate has trained."""
    total = planning.summed(baselines)
    names = ", ".join(baseline.name for baseline in baselines)
    text = f"gate.train adds {scientific(total.macs)} MACs for {names}, trained alone"
    text += f", {total.gpu_hours:,.1f} GPU hours" if total.gpu_hours is not None else ""
    return text + (f", {shown(total.cost or '0')} {price.currency}" if price else "")


def _count(samples: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if samples >= size:
            return f"{samples / size:.1f} {unit}"
    return str(samples)
