"""`modelchain plan --against`: what an edit of a chain would train, and what that costs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from modelchain.api.artifact import claim_of
from modelchain.api.spec import ModelChain
from modelchain.cli.stored import read_records, read_stored
from modelchain.cli.tables import print_table, print_text
from modelchain.decide.change import (
    TRAINS,
    Before,
    Effect,
    StageChange,
    as_found_by,
    changes,
    finished,
    recorded,
)
from modelchain.errors import EXIT_NOTHING_TO_DO, InputError
from modelchain.io.load import load_chain, spec_of
from modelchain.plan.plan import Amount, IndividualPlan, Plan, StagePlan, plan, price_of, summed
from modelchain.plan.pools import NodePool
from modelchain.plan.prices import milliseconds, shown
from modelchain.report.cost import scientific

FILES = (".yaml", ".yml", ".json")


def read_before(
    chain: ModelChain,
    against: str,
    namespace: str | None,
    kubeconfig: Path | None,
    context: str | None,
) -> Before:
    """What `chain` finds of what there was before the edit: of a file, or of a chain on a cluster.

    Raises:
        InputError: there is no such file or chain, or the API server would refuse the edit.
    """
    if against == "-":
        raise InputError("--against reads no standard input; give a file, or the name of a chain")
    # No name of a chain has a slash, or is one of these two.
    if against.endswith(FILES) or "/" in against or against in (".", ".."):
        other = load_chain(Path(against))
        return as_found_by(chain, other, finished(other))
    stored, status = read_stored(against, None, namespace, kubeconfig, context)
    other = spec_of(stored, against)
    records = read_records(namespace, kubeconfig, context)
    claim = claim_of(stored)
    there = recorded(status, (record for record in records if record.claim_name == claim))
    return as_found_by(chain, other, there)


def print_changes(
    chain: ModelChain, before: Before, pools: Mapping[str, NodePool], output: str
) -> None:
    """Print what the spec of `chain` would train, with what it costs.

    Raises:
        typer.Exit: with 3, if the edit trains nothing.
    """
    found = changes(chain, before)
    epochs = {change.stage: change.epochs for change in found if not change.alone}
    now = milliseconds(time.time())
    planned = plan(chain, "analytic", pools, epochs, now)
    amounts = [_amount(change, planned) for change in found]
    paid = [a for change, a in zip(found, amounts, strict=True) if change.effect in TRAINS]
    removed = _removed(chain, before)
    if output == "json":
        typer.echo(json.dumps(_document(chain, found, amounts, paid, removed), indent=2))
    else:
        price = price_of(chain.spec, pools, now)
        currency = price[0].currency if price else None
        _print(chain, found, amounts, currency, output == "markdown")
        print_text(_in_words(found, paid, currency))
        if removed:
            print_text(f"removed from the chain: {', '.join(removed)}; their artifacts stay")
    if not paid:
        raise typer.Exit(EXIT_NOTHING_TO_DO)


def _removed(chain: ModelChain, before: Before) -> list[str]:
    """The stages that the chain had before and has no more, in their order."""
    has = {stage.name for stage in chain.spec.stages}
    return [stage.name for stage in before.status.stages if stage.name not in has]


def _amount(change: StageChange, planned: Plan) -> StagePlan | IndividualPlan:
    """What the stage, or the same model alone, takes by the plan."""
    [stage] = [one for one in planned.stages if one.name == change.stage]
    return stage.individual if change.alone else stage


def _print(
    chain: ModelChain,
    found: Sequence[StageChange],
    amounts: Sequence[StagePlan | IndividualPlan],
    currency: str | None,
    markdown: bool,
) -> None:
    """Print the table; the money is in `currency`, None without a price."""
    pays = [change.effect in TRAINS for change in found]
    rows = list(zip(amounts, pays, strict=True))
    columns = {
        "stage": [f"{c.stage} alone" if c.alone else c.stage for c in found],
        "effect": [str(change.effect) for change in found],
        "epochs": [str(change.epochs) for change in found],
        "MACs": [scientific(amount.macs) if paid else "" for amount, paid in rows],
    }
    if any(amount.gpu_hours is not None for amount in amounts):
        columns["GPU\nhours"] = [f"{a.gpu_hours or 0:,.1f}" if paid else "" for a, paid in rows]
    if currency is not None:
        cost = [shown(amount.cost or "0") if paid else "" for amount, paid in rows]
        columns[f"cost\n{currency}"] = cost
    columns["why"] = [change.why for change in found]
    name = chain.metadata.name
    print_table(f"{name}, what the edit trains", columns, ("stage", "effect", "why"), [], markdown)


def _in_words(
    found: Sequence[StageChange],
    paid: Sequence[StagePlan | IndividualPlan],
    currency: str | None,
) -> str:
    hits = sum(change.effect is Effect.HIT for change in found)
    if not paid:
        return "the edit trains nothing"
    total = _sum(paid)
    text = f"the edit trains {len(paid)} of {len(found)} models and keeps {hits}"
    text += f": {scientific(total.macs)} MACs"
    text += f", {total.gpu_hours:,.1f} GPU hours" if total.gpu_hours is not None else ""
    return text + (f", {shown(total.cost or '0')} {currency}" if currency else "")


def _sum(amounts: Sequence[StagePlan | IndividualPlan]) -> Amount:
    return summed(amounts) if amounts else Amount(macs=0, gpu_hours=None, cost=None)


def _document(
    chain: ModelChain,
    found: Sequence[StageChange],
    amounts: Sequence[StagePlan | IndividualPlan],
    paid: Sequence[StagePlan | IndividualPlan],
    removed: Sequence[str],
) -> dict[str, Any]:
    stages = [
        {
            "stage": change.stage,
            "alone": change.alone,
            "effect": str(change.effect),
            "why": change.why,
            "epochs": change.epochs,
            "macs": amount.macs,
            "gpuHours": amount.gpu_hours,
            "cost": amount.cost,
        }
        for change, amount in zip(found, amounts, strict=True)
    ]
    return {
        "chain": chain.metadata.name,
        "stages": stages,
        "trains": _sum(paid).model_dump(by_alias=True),
        "removed": removed,
    }
