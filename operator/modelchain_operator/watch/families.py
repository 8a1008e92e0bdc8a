"""How families of metrics are made of figures: their labels, and the samples of each stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from modelchain_operator.reconcile.figures import Figures, StageFigures

CHAIN = ("namespace", "chain")
STAGE = (*CHAIN, "stage")

Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)
# The values of the labels, and the value.
Sample = tuple[Sequence[str], float]


def gauge(name: str, text: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    return _filled(GaugeMetricFamily(name, text, labels=labels), samples)


def counter(name: str, text: str, labels: Sequence[str], samples: Iterable[Sample]) -> Metric:
    return _filled(CounterMetricFamily(name, text, labels=labels), samples)


def _filled(family: Family, samples: Iterable[Sample]) -> Family:
    """The family with these samples added."""
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def of(chain: Figures) -> tuple[str, str]:
    """The values of the labels `CHAIN`."""
    return chain.namespace, chain.name


def each_chain(
    chains: Iterable[Figures], value_of: Callable[[Figures], float | None]
) -> Iterator[Sample]:
    """A sample for each chain of which the value is known."""
    for chain in chains:
        if (value := value_of(chain)) is not None:
            yield of(chain), value


def each_stage(
    chains: Iterable[Figures], value_of: Callable[[StageFigures], float | None]
) -> Iterator[Sample]:
    """A sample for each stage of which the value is known."""
    for chain in chains:
        for stage in chain.stages:
            if (value := value_of(stage)) is not None:
                yield (*of(chain), stage.name), value


def currency_of(chain: Figures, default: str) -> str:
    """The currency of a chain's costs; the operator's, while the chain has none yet."""
    return chain.currency or default
