"""The metrics of what stages, baselines and removed stages have spent: counters, which do not fall
while their chain exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import Metric

from modelchain.api.contracts import FailureClass
from modelchain.api.status import State
from modelchain_operator.reconcile.figures import SETTLED, Figures, Spending
from modelchain_operator.watch.families import STAGE, Sample, counter, currency_of, of

# The failure classes after which a stage is tried again.
RETRIED = [str(failure) for failure in FailureClass if not failure.permanent]

_SOURCE = (
    "source: trained by this chain, or reused, which is what the records it found say an earlier"
    " chain of its name has spent, or removed, the sum of stages that left the spec long ago"
)


def families(chains: Sequence[Figures], currency: str) -> Iterator[Metric]:
    """Work, time and money by source, and retries."""
    yield from _work(chains)
    yield counter(
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
    yield counter(
        "modelchain_stage_queue_seconds_total",
        "Time that attempts have waited in a queue or for the scheduler, added when a wait is over;"
        " " + _SOURCE,
        [*STAGE, "source"],
        _spent(chains, lambda spending: spending.queue_seconds),
    )
    yield counter(
        "modelchain_stage_cost_total",
        "GPU time at the pool's price; " + _SOURCE,
        [*STAGE, "source", "currency"],
        [
            ((*labels, currency_of(chain, currency)), value)
            for chain in chains
            for labels, value in _spent([chain], lambda spending: spending.cost)
        ],
    )
    yield counter(
        "modelchain_stage_retries_total",
        "Attempts that were made again, by the class of the attempt before",
        [*STAGE, "class"],
        _retries(chains),
    )


def _work(chains: Sequence[Figures]) -> Iterator[Metric]:
    yield counter(
        "modelchain_stage_macs_total",
        "Multiply-accumulates spent; " + _SOURCE,
        [*STAGE, "source"],
        _spent(chains, lambda spending: spending.macs),
    )
    yield counter(
        "modelchain_stage_lost_macs_total",
        "Multiply-accumulates of work that no checkpoint has kept, once that is known; " + _SOURCE,
        [*STAGE, "source"],
        _spent(chains, lambda spending: spending.lost_macs),
    )


def _time_of(use: str) -> Callable[[Spending], float]:
    return lambda spending: spending.uses[use]


def _spent(
    chains: Iterable[Figures], value_of: Callable[[Spending], float | None]
) -> Iterator[Sample]:
    """What each stage has spent, by source.

    The series `trained` begins at 0, so that Prometheus's `increase` counts all of it. A stage that
    has found results has a second series, `reused`, with what they had cost. The sum of stages that
    were removed long ago is a series of its own, since their own series have counted it.
    """
    for chain in chains:
        for stage in (*chain.stages, *chain.baselines, *chain.removed):
            labels = (*of(chain), stage.name)
            own = None if stage.trained is None else value_of(stage.trained)
            found = None if stage.reused is None else value_of(stage.reused)
            if own is not None or found is not None:
                yield (*labels, "trained" if stage.name else "removed"), own or 0.0
            if found:
                yield (*labels, "reused"), found


def _retries(chains: Iterable[Figures]) -> Iterator[Sample]:
    """Retries of each stage, by failure class.

    While a stage is trained, all classes are exported, at 0 if need be, so that Prometheus's
    `increase` counts the first retry. After it has succeeded, only those that occurred are left.
    """
    for chain in chains:
        named = (stage for stage in chain.removed if stage.name)
        for stage in (*chain.stages, *chain.baselines, *named):
            trains = stage.trained is not None and stage.state not in (State.SUCCEEDED, "")
            classes = RETRIED if trains else stage.retried
            yield from (
                ((*of(chain), stage.name, kind), stage.retried.get(kind, 0)) for kind in classes
            )
