"""The metrics of what chains were planned to take, will have taken, and save.

They are the numbers of `modelchain cost`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import Metric

from modelchain_operator.reconcile.figures import Figures
from modelchain_operator.reconcile.outlook_figures import OutlookFigures, StageOutlook, TakenFigures
from modelchain_operator.watch.families import CHAIN, STAGE, Sample, currency_of, gauge, of

# By the middle of a metric's name: what it is, and the figure.
_KINDS: dict[str, tuple[str, Callable[[StageOutlook], TakenFigures]]] = {
    "planned": (
        "the plan of the stage's first launch, or of now before it",
        lambda stage: stage.planned,
    ),
    "baseline": (
        "the same model trained alone: measured if it was, else estimated",
        lambda stage: stage.baseline,
    ),
    "projected": (
        "what the stage will have taken at its end: spent, and what is left of its work",
        lambda stage: stage.projected,
    ),
}


def families(chains: Sequence[Figures], currency: str) -> Iterator[Metric]:
    """All metrics of outlooks. A figure that is not known has no sample."""
    for kind, (text, amounts_of) in _KINDS.items():
        name, samples = f"modelchain_stage_{kind}", list(_of_stages(chains, amounts_of, currency))
        macs = _planned_macs(chains) if kind == "planned" else _macs(samples)
        yield gauge(f"{name}_macs", f"Multiply-accumulates, {text}", STAGE, macs)
        yield gauge(f"{name}_gpu_seconds", f"GPU time, {text}", STAGE, _gpu_seconds(samples))
        yield gauge(f"{name}_cost", f"Money, {text}", [*STAGE, "currency"], _cost(samples))
    yield from _of_chains(chains, currency)


def _of_chains(chains: Sequence[Figures], currency: str) -> Iterator[Metric]:
    saved = [
        (of(chain), currency_of(chain, currency), outlook.saved)
        for chain, outlook in _known(chains)
    ]
    text = "of the chain's models alone less those that its stages will have taken; may be negative"
    yield gauge("modelchain_saved_macs", f"Multiply-accumulates {text}", CHAIN, _macs(saved))
    yield gauge("modelchain_saved_gpu_seconds", f"GPU time {text}", CHAIN, _gpu_seconds(saved))
    yield gauge("modelchain_saved_cost", f"Money {text}", [*CHAIN, "currency"], _cost(saved))
    yield gauge(
        "modelchain_acceleration_ratio",
        "How many times fewer MACs the chain takes than its models alone; kind: requested by"
        " spec.allocation, relaxed by the plan with all rounds of relaxation, or achieved by what"
        " was spent, once all stages have finished",
        [*CHAIN, "kind"],
        [
            ((*of(chain), kind), value)
            for chain, outlook in _known(chains)
            for kind, value in outlook.accelerations.items()
        ],
    )


# The values of the labels without the currency, the currency, and the amounts.
_Row = tuple[Sequence[str], str, TakenFigures]


def _known(chains: Iterable[Figures]) -> Iterator[tuple[Figures, OutlookFigures]]:
    return ((chain, chain.outlook) for chain in chains if chain.outlook is not None)


def _of_stages(
    chains: Iterable[Figures], amounts_of: Callable[[StageOutlook], TakenFigures], currency: str
) -> Iterator[_Row]:
    for chain, outlook in _known(chains):
        for name, stage in outlook.stages.items():
            labels = (*of(chain), name)
            yield labels, currency_of(chain, currency), amounts_of(stage)


def _planned_macs(chains: Iterable[Figures]) -> Iterator[Sample]:
    """They are known of every stage, also of a chain whose outlook cannot be computed."""
    for chain in chains:
        known = {} if chain.outlook is None else chain.outlook.stages
        for stage in chain.stages:
            found = known.get(stage.name)
            macs = None if found is None else found.planned.macs
            yield (*of(chain), stage.name), stage.planned_macs if macs is None else macs


def _macs(rows: Iterable[_Row]) -> Iterator[Sample]:
    return ((labels, part.macs) for labels, _, part in rows if part.macs is not None)


def _gpu_seconds(rows: Iterable[_Row]) -> Iterator[Sample]:
    return ((labels, part.gpu_seconds) for labels, _, part in rows if part.gpu_seconds is not None)


def _cost(rows: Iterable[_Row]) -> Iterator[Sample]:
    return (((*labels, money), part.cost) for labels, money, part in rows if part.cost is not None)
