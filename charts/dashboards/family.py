"""Family cost: what families of models have cost, will cost, and would have cost one by one."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.board import board, chains
from dashboards.colours import USES
from dashboards.panels import (
    GOOD_IF_POSITIVE,
    GPU_HOURS,
    MACS,
    MONEY,
    NUMBER,
    RATIO,
    SECONDS,
    TIME,
    TIMES,
    Panel,
    Steps,
    TableColumn,
    bars,
    grid,
    lines,
    number,
)
from dashboards.promql import (
    CHAIN,
    COST,
    GPU_SECONDS,
    IN_CURRENCY,
    MACS_LOST,
    MACS_SPENT,
    STAGE,
    TRAINED,
    burn_rate,
    done,
    gauge,
    growth,
    in_pools,
    projected_cost,
    series,
    time_left,
    total,
)

NO_USE = 'use=~"startup|stalled|lost"'
WASTE: Steps = ((None, "green"), (0.1, "orange"), (0.25, "red"))
BUDGET: Steps = ((None, "green"), (0.8, "orange"), (1, "red"))
CHAIN_NAME = "{{namespace}} / {{chain}}"
STAGE_NAME = f"{CHAIN_NAME} / {{{{stage}}}}"
TO_CHAIN = (
    "Show this chain",
    "/d/modelchain-chain?var-datasource=${datasource}&var-namespace=${__data.fields.Namespace}"
    "&var-chain=${__data.fields.Chain}&${__url_time_range}",
)

PLANNED, ALONE = (
    gauge(f"modelchain_stage_{which}_cost", IN_CURRENCY) for which in ("planned", "baseline")
)
PROJECTED = projected_cost()
SAVED = gauge("modelchain_saved_cost", IN_CURRENCY)
SPENT = series(COST, IN_CURRENCY)
BUDGETED = gauge("modelchain_budget_cost", IN_CURRENCY)


def build() -> Dashboard:
    return board(
        "family",
        "Family cost",
        "What families of models have cost, will cost, and would have cost one by one",
        chains(),
        {
            "All selected chains": [*_spent(), *_saved(), *_work(), *_limits()],
            "By chain": [_chains(), *_by_chain()],
            "By stage": [_cost_by_stage(), _macs(), _stages()],
            "GPUs and prices": [*_gpus(), _prices()],
        },
        since="now-7d",
    )


def _spent() -> list[Panel]:
    return [
        number(
            "Spent",
            "Of all attempts of these chains, also of those that failed, and of the models that the"
            " gate trains alone. What a chain found finished counts if an earlier chain of its name"
            " has trained it.",
            MONEY,
            total(SPENT),
        ),
        number(
            "Projected",
            "At the end of these chains: what is spent, and what their stages will still take at"
            " the rate that was measured. Of models that the gate trains alone, and of removed"
            " stages, only what they have spent.",
            MONEY,
            total(PROJECTED),
        ),
        number(
            "Planned",
            "The plan at the first launch of each stage; before it, the plan of now.",
            MONEY,
            total(PLANNED),
        ),
    ]


def _saved() -> list[Panel]:
    return [
        number(
            "Alone",
            "The same models, each trained alone. An estimate: its MACs at the rate that was"
            " measured of the chain's own stage; where the gate has trained the model alone, its"
            " ledger.",
            MONEY,
            total(ALONE),
        ),
        number(
            "Saved",
            "Alone less what the stages are projected to cost; negative if they cost more. What the"
            " gate has spent on models alone is not taken off.",
            MONEY,
            total(SAVED),
            colours=GOOD_IF_POSITIVE,
        ),
        number(
            "Burn rate",
            "Money an hour: the GPUs held now at the price in force of the node pool in the chain's"
            " spec. If a pool has prices for spot nodes too, this is the highest. After an edit of"
            " the pool, it is right once the attempt before has ended.",
            MONEY,
            burn_rate(),
        ),
    ]


def _work() -> list[Panel]:
    alone = total(gauge("modelchain_stage_baseline_macs"))
    projected = total(gauge("modelchain_stage_projected_macs"))
    time = total(series(GPU_SECONDS))
    return [
        number(
            "Acceleration",
            "MACs of training each model alone over the MACs that these chains take, spent and to"
            " be spent. Over several chains it is the ratio of the sums.",
            TIMES,
            f"{alone} / {projected}",
            decimals=2,
        ),
        number(
            "GPU time",
            "For how long GPUs were held, summed over all of them. Time since the newest checkpoint"
            " is added once it is known whether it is kept.",
            GPU_HOURS,
            f"{time} / 3600",
            decimals=0,
        ),
        number(
            "Waste",
            "Share of the GPU time that brought no result: lost work, stalls and startups.",
            RATIO,
            f"{total(series(GPU_SECONDS, NO_USE))} / {time}",
            decimals=1,
            colours=WASTE,
        ),
    ]


def _limits() -> list[Panel]:
    return [
        number(
            "Lost work",
            "Share of the MACs that no checkpoint has kept, or that were done twice.",
            RATIO,
            f"{total(series(MACS_LOST))} / {total(series(MACS_SPENT))}",
            decimals=1,
            colours=WASTE,
        ),
        number(
            "Time left",
            "Until the last of these chains ends, as projected. Empty if none runs or it is"
            " unknown.",
            SECONDS,
            time_left(),
            decimals=1,
        ),
        number(
            "Budget",
            "What the chains with a budget have spent of all their budgets. Empty without one.",
            RATIO,
            f"sum({total(SPENT, CHAIN)} and on ({CHAIN}) {BUDGETED}) / {total(BUDGETED)}",
            decimals=0,
            colours=BUDGET,
        ),
    ]


def _chains() -> Panel:
    planned = total(gauge("modelchain_stage_planned_macs"), CHAIN)

    def highest(name: str, *matchers: str) -> str:
        return f"max by ({CHAIN}) ({series(name, *matchers)})"

    def acceleration(kind: str) -> str:
        return highest("modelchain_acceleration_ratio", f'kind="{kind}"')

    finish = highest("modelchain_eta_timestamp_seconds")
    return grid(
        "Chains",
        "A row for each chain. Its name leads to the chain's own dashboard. Done is the share of"
        " the planned MACs whose steps are done. Requested and achieved are accelerations; the"
        " second is known once all stages have finished.",
        {"namespace": "Namespace", "chain": "Chain"},
        TableColumn("Done", f"{total(done(), CHAIN)} / {planned}", RATIO, 0),
        TableColumn("Planned", total(PLANNED, CHAIN), MONEY),
        TableColumn("Spent", total(SPENT, CHAIN), MONEY),
        TableColumn("Projected", total(PROJECTED, CHAIN), MONEY),
        TableColumn("Alone", total(ALONE, CHAIN), MONEY),
        TableColumn("Saved", total(SAVED, CHAIN), MONEY),
        TableColumn("Budget", total(BUDGETED, CHAIN), MONEY),
        TableColumn("Requested", acceleration("requested"), TIMES, 2),
        TableColumn("Achieved", acceleration("achieved"), TIMES, 2),
        TableColumn("Finish", f"1000 * {finish}", TIME),
        height=7,
        links={"Chain": TO_CHAIN},
    )


def _by_chain() -> list[Panel]:
    over = f"/ on ({CHAIN}) {total(BUDGETED, CHAIN)}"
    return [
        lines(
            "Burn rate by chain",
            "Money an hour: the GPUs held at the price in force of the node pool in the chain's"
            " spec.",
            MONEY,
            (burn_rate(CHAIN), CHAIN_NAME),
            width=8,
            stacked=True,
        ),
        bars(
            "Dearest chains",
            "The ten that have spent the most in the time range.",
            MONEY,
            (f"topk(10, {growth(COST, IN_CURRENCY, TRAINED, by=CHAIN)})", CHAIN_NAME),
        ),
        bars(
            "Budgets",
            "What is spent, and what is projected, over `spec.budget.cost`, with models that the"
            " gate trains alone. A chain is stopped when it has spent its budget. Empty without"
            " one.",
            RATIO,
            (f"{total(SPENT, CHAIN)} {over}", f"{CHAIN_NAME} spent"),
            (f"{total(PROJECTED, CHAIN)} {over}", f"{CHAIN_NAME} projected"),
            decimals=0,
            highest=1,
            colours=BUDGET,
        ),
    ]


def _cost_by_stage() -> Panel:
    return lines(
        "Cost by stage",
        "Cumulated. The line of a stage that is not being trained is flat.",
        MONEY,
        (total(SPENT, STAGE), STAGE_NAME),
        stacked=True,
    )


def _macs() -> Panel:
    of_stages = f"and on ({STAGE}) {gauge('modelchain_stage_info')}"
    return lines(
        "MACs of the chains, and alone",
        "The work that is done for the stages, beside the work of training each model alone for as"
        " far as its stage has come.",
        MACS,
        (total(f"{series(MACS_SPENT)} {of_stages}"), "chains"),
        (
            f"sum({gauge('modelchain_stage_baseline_macs')}"
            f" * {gauge('modelchain_stage_progress_ratio')})",
            "alone",
        ),
    )


def _stages() -> Panel:
    return grid(
        "Stages",
        "Planned, spent and projected cost of each stage, and of the same model trained alone. A"
        " row such as `vit-s alone` is a model that the gate has trained alone.",
        {"namespace": "Namespace", "chain": "Chain", "stage": "Stage"},
        TableColumn("Planned", total(PLANNED, STAGE), MONEY),
        TableColumn("Spent", total(SPENT, STAGE), MONEY),
        TableColumn("Projected", total(PROJECTED, STAGE), MONEY),
        TableColumn("Alone", total(ALONE, STAGE), MONEY),
        TableColumn("GPU time", f"{total(series(GPU_SECONDS), STAGE)} / 3600", GPU_HOURS, 1),
        TableColumn("MACs", total(series(MACS_SPENT), STAGE), MACS, 2),
        height=10,
        links={"Chain": TO_CHAIN},
    )


def _gpus() -> list[Panel]:
    by_pool = total(in_pools(total(series(GPU_SECONDS), CHAIN)), "node_pool")
    return [
        lines(
            "GPU time by use",
            "Cumulated; the uses sum up to all time that is settled. docs/cost.md says what each"
            " use is.",
            GPU_HOURS,
            (f"{total(series(GPU_SECONDS), 'use')} / 3600", "{{use}}"),
            stacked=True,
            colours=USES,
        ),
        bars(
            "GPU time by node pool",
            "Of these chains, in the node pool that each has now. After an edit of"
            " `runner.nodePool`, the time in the pool before counts here too.",
            GPU_HOURS,
            (f"{by_pool} / 3600", "{{node_pool}}"),
            decimals=0,
        ),
        bars(
            "Wasted GPU time",
            "By use, in the time range: lost work, stalls and startups.",
            GPU_HOURS,
            (f"{growth(GPU_SECONDS, TRAINED, NO_USE, by='use')} / 3600", "{{use}}"),
            width=4,
        ),
    ]


def _prices() -> Panel:
    labels = ("node_pool", "gpu", "capacity", "currency", "source")
    price = f"max by ({', '.join(labels)}) (modelchain_node_pool_gpu_hour_price)"
    return grid(
        "Prices",
        "Of a GPU hour in each node pool: those in force now, and where the operator's"
        " configuration has them from.",
        dict(zip(labels, ("Node pool", "GPU", "Capacity", "Currency", "Source"), strict=True)),
        TableColumn("Price of a GPU hour", price, NUMBER, 2),
        height=6,
    )
