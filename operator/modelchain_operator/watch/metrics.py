"""`GET /metrics`: what the status of every chain says, and how the operator itself is doing.

Metrics of chains are not counted here but read from their statuses, so neither a restart nor a
second operator can count anything twice. Only the leader exports them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Histogram,
    Metric,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.registry import Collector

from modelchain.plan.pools import PoolFile
from modelchain_operator.watch import (
    chain_metrics,
    outlook_metrics,
    price_metrics,
    spending_metrics,
    stage_metrics,
)
from modelchain_operator.watch.families import counter, gauge
from modelchain_operator.watch.service import Service

# The `_created` series would say when the process began to count, which no query needs.
disable_created_metrics()  # type: ignore[no-untyped-call]


def registry(
    service: Service, config: PoolFile, hand_overs: Histogram, clock: Callable[[], float]
) -> CollectorRegistry:
    """All metrics that are served: of the process, of the operator and of the chains.

    Args:
        hand_overs: how long those took that this process has seen.
        clock: the time by which prices hold, in seconds since the epoch.
    """
    made = CollectorRegistry()
    ProcessCollector(registry=made)
    made.register(OperatorCollector(service, hand_overs))
    made.register(ChainCollector(service, config, clock))
    return made


def serve(port: int, served: CollectorRegistry) -> WSGIServer:
    """Serve the metrics on all interfaces, in a thread of its own, until the process ends."""
    server, _ = start_http_server(port, registry=served)
    return server


class OperatorCollector(Collector):
    """How the operator is doing. Its counters begin at 0 when the process starts."""

    def __init__(self, service: Service, hand_overs: Histogram):
        self.service = service
        self.hand_overs = hand_overs

    def collect(self) -> Iterator[Metric]:
        yield gauge(
            "modelchain_operator_build_info",
            "The operator's version",
            ["version"],
            [([version("modelchain")], 1)],
        )
        yield from self._work()
        yield from self.service.queue.seconds.collect()
        yield from self.hand_overs.collect()
        calls = dict(self.service.kube.calls)  # a copy, as the loop goes on counting
        yield counter(
            "modelchain_operator_api_requests_total",
            "Requests to the API server without watches, by the answer's status; code is none if no"
            " answer came",
            ["verb", "resource", "code"],
            [
                ((verb, resource, str(code or "none")), n)
                for (verb, resource, code), n in calls.items()
            ],
        )

    def _work(self) -> Iterator[Metric]:
        service = self.service
        yield gauge(
            "modelchain_operator_leader",
            "1 for the operator that works and reports chains, 0 for one that waits",
            [],
            [([], service.leads)],
        )
        yield gauge(
            "modelchain_operator_last_list_timestamp_seconds",
            "When all chains were last listed; this is done every minute",
            [],
            [([], service.listed_at)] if service.listed_at else [],
        )
        yield gauge(
            "modelchain_operator_queue_depth",
            "Chains that are due and wait for a worker",
            [],
            [([], service.queue.depth)],
        )


class ChainCollector(Collector):
    """What the statuses of the chains say, and the prices by which they are accounted.

    It yields one family after another, so a scrape of many chains needs little memory.
    """

    def __init__(self, service: Service, config: PoolFile, clock: Callable[[], float]):
        self.service = service
        self.config = config
        self.clock = clock

    def collect(self) -> Iterator[Metric]:
        if not self.service.leads:
            return
        chains = list(self.service.known.values())
        yield from chain_metrics.families(chains, self.config)
        yield from stage_metrics.families(chains, self.config)
        yield from outlook_metrics.families(chains, self.config.currency)
        yield from spending_metrics.families(chains, self.config.currency)
        yield price_metrics.family(self.config, self.clock())
