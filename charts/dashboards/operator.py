"""The operator itself: is it alive, does it keep up, and what does it ask of the API server."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.board import board, choice
from dashboards.colours import CONDITIONS, STATES
from dashboards.panels import (
    A_SECOND,
    BYTES,
    NUMBER,
    SECONDS,
    Panel,
    Steps,
    bars,
    lines,
    number,
    timeline,
)
from dashboards.promql import CHAIN, RANGE, RATE, quantile

# The namespace in which an operator runs; chains may be in others.
HERE = 'namespace=~"$operator"'
PASSES = "modelchain_operator_reconcile_duration_seconds"
HAND_OVERS = "modelchain_operator_transition_duration_seconds"
REQUESTS = f"rate(modelchain_operator_api_requests_total{{{HERE}}}[{RATE}])"
QUANTILES = (0.5, 0.95, 0.99)

ONE_LEADS: Steps = ((None, "red"), (1, "green"))
ONCE_A_MINUTE: Steps = ((None, "green"), (120, "orange"), (300, "red"))
NONE_IS_GOOD: Steps = ((None, "green"), (1, "red"))


def build() -> Dashboard:
    return board(
        "operator",
        "Operator",
        "The operator itself: is it alive, does it keep up, what does it ask of the API server",
        [
            choice(
                "operator",
                "Operator's namespace",
                "label_values(modelchain_operator_build_info, namespace)",
            )
        ],
        {
            "Now": [*_replicas(), *_known(), _leader()],
            "Work": [*_work()],
            "API server": [*_requests()],
            "Chains": [*_chains()],
            "Process": [*_process()],
        },
        since="now-6h",
    )


def _of(name: str) -> str:
    return f"{name}{{{HERE}}}"


def _replicas() -> list[Panel]:
    return [
        number(
            "Leaders",
            "Operators that work: one of all replicas. None works while the Lease changes hands.",
            NUMBER,
            f"sum({_of('modelchain_operator_leader')})",
            decimals=0,
            colours=ONE_LEADS,
        ),
        number(
            "Replicas",
            "Operators that are scraped.",
            NUMBER,
            f"count({_of('modelchain_operator_build_info')})",
            decimals=0,
        ),
        number(
            "Last list",
            "Time since all chains were last listed. This is done every minute.",
            SECONDS,
            f"time() - max({_of('modelchain_operator_last_list_timestamp_seconds')})",
            decimals=0,
            colours=ONCE_A_MINUTE,
        ),
    ]


def _known() -> list[Panel]:
    stalled = 'modelchain_condition{condition="Stalled"}'
    return [
        number(
            "Queue",
            "Chains that are due and wait for a worker.",
            NUMBER,
            f"sum({_of('modelchain_operator_queue_depth')})",
            decimals=0,
        ),
        number(
            "Chains",
            "That the operator knows, in all namespaces.",
            NUMBER,
            f"count(max by ({CHAIN}) (modelchain_info))",
            decimals=0,
        ),
        number(
            "Waiting for a person",
            "Chains with the condition Stalled. `modelchain explain` says what to do.",
            NUMBER,
            f"sum(max by ({CHAIN}) ({stalled}))",
            decimals=0,
            colours=NONE_IS_GOOD,
        ),
    ]


def _leader() -> Panel:
    return timeline(
        "Leader",
        "Which replica works, and which ones wait for the Lease.",
        f"max by (namespace, pod) ({_of('modelchain_operator_leader')})",
        "{{pod}}",
        {0: ("waits", "#6e6e6e"), 1: ("leads", "green")},
        height=5,
    )


def _work() -> list[Panel]:
    return [
        lines(
            "Queue over time",
            "Chains that are due and wait for a worker.",
            NUMBER,
            (f"max by (pod) ({_of('modelchain_operator_queue_depth')})", "{{pod}}"),
            width=8,
        ),
        lines(
            "Passes over chains",
            "Passes a second, by result.",
            A_SECOND,
            (f"sum by (result) (rate({_of(f'{PASSES}_count')}[{RATE}]))", "{{result}}"),
            width=8,
        ),
        lines(
            "Duration of a pass",
            "How long a pass over a chain takes: read, observe, decide, execute.",
            SECONDS,
            *((quantile(part, PASSES, HERE), f"p{100 * part:g}") for part in QUANTILES),
            width=8,
        ),
    ]


def _requests() -> list[Panel]:
    return [
        lines(
            "API requests by code",
            "Requests a second without watches, by the answer's status; `none` if no answer came.",
            A_SECOND,
            (f"sum by (code) ({REQUESTS})", "{{code}}"),
            stacked=True,
        ),
        lines(
            "API requests by resource",
            "Requests a second without watches: the ten most frequent.",
            A_SECOND,
            (f"topk(10, sum by (verb, resource) ({REQUESTS}))", "{{verb}} {{resource}}"),
        ),
    ]


def _chains() -> list[Panel]:
    stages = f"max by ({CHAIN}, state) (modelchain_stages)"
    conditions = f"max by ({CHAIN}, condition) (modelchain_condition)"
    return [
        lines(
            "Stages by state",
            "Of all chains.",
            NUMBER,
            (f"sum by (state) ({stages})", "{{state}}"),
            width=8,
            stacked=True,
            colours=STATES,
        ),
        lines(
            "Chains by condition",
            "Chains for which a condition is True.",
            NUMBER,
            (f"sum by (condition) ({conditions})", "{{condition}}"),
            width=8,
            colours=CONDITIONS,
        ),
        bars(
            "Hand-overs",
            "From the end of a stage's trainer to the job of the next stage, in the time range.",
            SECONDS,
            *(
                (quantile(part, HAND_OVERS, HERE, over=RANGE), f"p{100 * part:g}")
                for part in QUANTILES
            ),
            decimals=1,
        ),
    ]


def _process() -> list[Panel]:
    ours = f"and on (instance) {_of('modelchain_operator_build_info')}"
    cpu = f"rate({_of('process_cpu_seconds_total')}[{RATE}])"
    return [
        lines(
            "Memory",
            "Resident memory of each replica.",
            BYTES,
            (f"max by (pod) ({_of('process_resident_memory_bytes')} {ours})", "{{pod}}"),
        ),
        lines(
            "CPU",
            "Cores that each replica uses.",
            NUMBER,
            (f"max by (pod) ({cpu} {ours})", "{{pod}}"),
        ),
    ]
