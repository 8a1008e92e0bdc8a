"""Prints what `modelchain plan --search` has found."""

from __future__ import annotations

from itertools import pairwise
from textwrap import fill

from modelchain.api.spec import ModelChain
from modelchain.cli.tables import print_table, print_text
from modelchain.plan.search import Design, Search
from modelchain.report.cost import scientific

ABSENT = "·"


def print_search(found: Search, chain: ModelChain, markdown: bool) -> None:
    """A row for each design, with its epochs below the names of its models."""
    designs, ends = _sections(found)
    print_table(
        f"{found.chain}: chains up to {found.models[-1]}, {found.convention} MACs",
        _columns(found, designs),
        left=("",),
        ends=ends,
        markdown=markdown,
    )
    for sentence in (_what_is_shown(found), _how_epochs_are(found, chain), found.cannot_know):
        print_text(sentence if markdown else fill(sentence, 100))


def _sections(found: Search) -> tuple[list[Design], list[int]]:
    """The designs to show, and the places of those after which the smallest model changes. The
    file's design comes last if it is not among the others.
    """
    designs = list(found.frontier)
    ends = [i for i, (a, b) in enumerate(pairwise(designs)) if a.models[0] != b.models[0]]
    if found.file is not None and found.file not in designs:
        return [*designs, found.file], [*ends, len(designs) - 1]
    return designs, ends


def _columns(found: Search, designs: list[Design]) -> dict[str, list[str]]:
    epochs = [dict(zip(d.models, map(str, d.epochs), strict=True)) for d in designs]
    columns = {"": ["file" if design == found.file else "" for design in designs]}
    for name in found.models:
        columns[name.replace("-", "-\n", 1)] = [of.get(name, ABSENT) for of in epochs]
    return columns | {
        "MACs": [scientific(design.macs) for design in designs],
        "times less\nthan each\nalone": [f"{design.acceleration:.2f}" for design in designs],
        f"against\n{found.models[-1]}\nalone": [
            f"{design.of_largest_alone - 1:+.1%}" for design in designs
        ],
    }


def _what_is_shown(found: Search) -> str:
    better = "accelerates more"
    if found.target_acceleration is not None:
        better = "gives its second model more epochs"
    chains = "1 chain" if found.compared == 1 else f"{found.compared} chains"
    return (
        f"Below a model stand its epochs. Of {chains} in which each model is 2 to 4"
        " times as large as the one before, the table shows for each smallest model those worth"
        f" choosing from: each row takes more MACs than the one above it, and {better}."
        f" {found.models[-1]} alone takes {scientific(found.largest_alone_macs)} MACs."
    )


def _how_epochs_are(found: Search, chain: ModelChain) -> str:
    first = chain.spec.recipe.baseline_epochs
    second = f"so that every chain takes {found.target_acceleration} times less"
    if found.target_acceleration is None:
        stages = chain.spec.stages
        source = "3/16 of baselineEpochs, as in the paper's chains on CC3M"
        if len(stages) > 1 and stages[1].epochs is not None:
            source = "as in the file"
        second = f"the second model {found.second_epochs} ({source})"
    return (
        f"Epochs are by rule 3: the first model has {first}, {second}, the last"
        f" {found.end_ratio} of the second's. Where a model follows the same one as in the file,"
        " it has the file's epochs."
    )
