"""`GET /metrics`: what the status of every chain says, and how the operator itself is doing.

Metrics of chains are not counted here but read from their statuses, so neither a restart nor a
second operator can count anything twice. Only the leader exports them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import TypeVar
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Metric,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from modelchain.api.contracts import FailureClass
from modelchain.api.status import State
from modelchain.plan.pools import PoolFile
from modelchain_operator.reconcile.figures import SETTLED, Figures, StageFigures
from modelchain_operator.watch.service import Service

CHAIN = ("namespace", "chain")
STAGE = (*CHAIN, "stage")
CONDITIONS = (
    "Reconciling",
    "Stalled",
    "Ready",
    "Admitted",
    "Suspended",
    "Complete",
    "Failed",
    "Finished",
    "Measured",
)
# The failure classes after which a stage is tried again.
RETRIED = [str(failure) for failure in FailureClass if not failure.permanent]

# The `_created` series would say when the process began to count, which no query needs.
disable_created_metrics()  # type: ignore[no-untyped-call]

Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)
# The values of the labels, and the value.
Sample = tuple[Sequence[str], float]


def registry(service: Service, config: PoolFile) -> CollectorRegistry:
    """All metrics that are served: of the process, of the operator and of the chains."""
    made = CollectorRegistry()
    ProcessCollector(registry=made)
    made.register(OperatorCollector(service))
    made.register(ChainCollector(service, config))
    return made


def serve(port: int, served: CollectorRegistry) -> WSGIServer:
    """Serve the metrics on all interfaces, in a thread of its own, until the process ends."""
    server, _ = start_http_server(port, registry=served)
    return server


class OperatorCollector(Collector):
    """How the operator is doing. Its counters begin at 0 when the process starts."""

    def __init__(self, service: Service):
        self.service = service

    def collect(self) -> Iterator[Metric]:
        service = self.service
        yield _gauge(
            "modelchain_operator_build_info",
            "The operator's version",
            ["version"],
            [([version("modelchain")], 1)],
        )
        yield _gauge(
            "modelchain_operator_leader",
            "1 for the operator that works and reports chains, 0 for one that waits",
            [],
            [([], service.leads)],
        )
        yield _gauge(
            "modelchain_operator_last_list_timestamp_seconds",
            "When all chains were last listed; this is done every minute",
            [],
            [([], service.listed_at)] if service.listed_at else [],
        )
        yield _gauge(
            "modelchain_operator_queue_depth",
            "Chains that are due and wait for a worker",
            [],
            [([], service.queue.depth)],
        )
        yield from service.queue.seconds.collect()
        calls = dict(service.kube.calls)  # a copy, as the loop goes on counting
        yield _counter(
            "modelchain_operator_api_requests_total",
            "Requests to the API server without watches, by the answer's status; code is none if no"
            " answer came",
            ["verb", "resource", "code"],
            [
                ((verb, resource, str(code or "none")), n)
                for (verb, resource, code), n in calls.items()
            ],
        )


class ChainCollector(Collector):
    """What the statuses of the chains say.

    It yields one family after another, so a scrape of many chains needs little memory.
    """

    def __init__(self, service: Service, config: PoolFile):
        self.service = service
        self.defaults = config.defaults
        self.currency = config.currency

    def collect(self) -> Iterator[Metric]:
        chains = list(self.service.known.values()) if self.service.leads else []
        yield _gauge(
            "modelchain_info",
            "1 for every chain",
            [*CHAIN, "node_pool", "queue"],
            [((*_of(c), *self._where(c)), 1) for c in chains],
        )
        yield from _of_chains(chains)
        yield from _of_stages(chains)
        yield from _of_spending(chains, self.currency)

    def _where(self, chain: Figures) -> tuple[str, str]:
        """The chain's node pool and queue; where it names none, the operator's defaults."""
        pool, queue = self.defaults.node_pool or "", self.defaults.queue_name or ""
        return chain.node_pool or pool, chain.queue or queue


_SOURCE = (
    "source: trained by this chain, or reused, which is what the records it found say an earlier"
    " chain of its name has spent, or removed, the sum of stages that left the spec long ago"
)


def _of(chain: Figures) -> tuple[str, str]:
    return chain.namespace, chain.name


def _of_chains(chains: Sequence[Figures]) -> Iterator[Metric]:
    yield _gauge(
        "modelchain_condition",
        "1 if a condition of the chain is True, 0 if it is not or is absent",
        [*CHAIN, "condition"],
        [((*_of(c), kind), kind in c.true) for c in chains for kind in CONDITIONS],
    )
    yield _gauge(
        "modelchain_stage_reason",
        "1 for the reason of each stage; docs/reasons.md says what the codes mean",
        [*CHAIN, "stage", "reason"],
        [((*_of(c), s.name, s.reason), 1) for c in chains for s in c.stages if s.reason],
    )
    yield _gauge(
        "modelchain_stage_gate",
        "1 for the gate's verdict on each finished stage",
        [*CHAIN, "stage", "verdict"],
        [((*_of(c), s.name, s.verdict), 1) for c in chains for s in c.stages if s.verdict],
    )
    yield _gauge(
        "modelchain_stage_gate_difference_points",
        "The gate's metric of the stage less that of the same model trained alone",
        STAGE,
        _each(chains, lambda stage: stage.difference),
    )
    yield _gauge(
        "modelchain_stages", "Stages of a chain by state", [*CHAIN, "state"], _states(chains)
    )


def _of_stages(chains: Sequence[Figures]) -> Iterator[Metric]:
    yield _gauge(
        "modelchain_stage_planned_macs",
        "Multiply-accumulates the stage takes if nothing is repeated",
        STAGE,
        _each(chains, lambda stage: stage.planned_macs),
    )
    yield _gauge(
        "modelchain_stage_progress_ratio",
        "Steps done of the stage's steps, 0 to 1; absent while nothing is known",
        STAGE,
        _each(chains, lambda stage: stage.progress),
    )
    yield _gauge(
        "modelchain_stage_transition_seconds",
        "From the end of the predecessor's trainer to the job of this stage, at the last hand-over",
        STAGE,
        _each(chains, lambda stage: stage.transition_seconds),
    )


def _of_spending(chains: Sequence[Figures], currency: str) -> Iterator[Metric]:
    yield _counter(
        "modelchain_stage_macs_total",
        "Multiply-accumulates spent; " + _SOURCE,
        [*STAGE, "source"],
        _spent(chains, lambda stage: stage.macs),
    )
    yield _counter(
        "modelchain_stage_gpu_seconds_total",
        "GPU time by use, from a pod's binding to its node to its main container's end, without"
        " what was done since the newest checkpoint; " + _SOURCE,
        [*STAGE, "source", "use"],
        [
            ((*labels, use), value)
            for use in SETTLED
            for labels, value in _spent(chains, _time_of(use))
        ],
    )
    yield _counter(
        "modelchain_stage_cost_total",
        "GPU time at the pool's price; " + _SOURCE,
        [*STAGE, "source", "currency"],
        [
            ((*labels, chain.currency or currency), value)
            for chain in chains
            for labels, value in _spent([chain], lambda stage: stage.cost)
        ],
    )
    yield _counter(
        "modelchain_stage_retries_total",
        "Attempts that were made again, by the class of the attempt before",
        [*STAGE, "class"],
        _retries(chains),
    )


def _time_of(use: str) -> Callable[[StageFigures], float]:
    return lambda stage: stage.uses[use]


def _states(chains: Iterable[Figures]) -> Iterator[Sample]:
    for chain in chains:
        counts = Counter(stage.state for stage in chain.stages)
        yield from (((*_of(chain), str(state)), counts[state]) for state in State)


def _each(
    chains: Iterable[Figures], value_of: Callable[[StageFigures], float | None]
) -> Iterator[Sample]:
    for chain in chains:
        for stage in chain.stages:
            if (value := value_of(stage)) is not None:
                yield (*_of(chain), stage.name), value


def _spent(
    chains: Iterable[Figures], value_of: Callable[[StageFigures], float | None]
) -> Iterator[Sample]:
    """What each stage has spent, by source.

    The series `trained` begins at 0, so that Prometheus's `increase` counts all of it. A stage that
    found its result has a second series, `reused`, with what the result had cost. The sum of stages
    that were removed long ago is a series of its own, since their own series have counted it.
    """
    for chain in chains:
        for stage in (*chain.stages, *chain.baselines, *chain.removed):
            labels, value = (*_of(chain), stage.name), value_of(stage)
            if value is not None and not stage.name:
                yield (*labels, "removed"), value
            elif value is not None:
                yield (*labels, "trained"), value if stage.own else 0.0
                if value and not stage.own:
                    yield (*labels, "reused"), value


def _retries(chains: Iterable[Figures]) -> Iterator[Sample]:
    """Retries of each stage, by failure class.

    While a stage is trained, all classes are exported, at 0 if need be, so that Prometheus's
    `increase` counts the first retry. After it has succeeded, only those that occurred are left.
    """
    for chain in chains:
        named = (stage for stage in chain.removed if stage.name)
        for stage in (*chain.stages, *chain.baselines, *named):
            trains = stage.own and stage.state not in (State.SUCCEEDED, "")
            classes = RETRIED if trains else stage.retried
            yield from (
                ((*_of(chain), stage.name, kind), stage.retried.get(kind, 0)) for kind in classes
            )


def _gauge(name: str, text: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    return _filled(GaugeMetricFamily(name, text, labels=labels), samples)


def _counter(name: str, text: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    return _filled(CounterMetricFamily(name, text, labels=labels), samples)


def _filled(family: Family, samples: Iterable[Sample]) -> Family:
    """The family with these samples added."""
    for labels, value in samples:
        family.add_metric(labels, value)
    return family
