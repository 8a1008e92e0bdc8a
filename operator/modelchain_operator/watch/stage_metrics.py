"""The metrics of what each stage is and does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import Metric

from modelchain.api.status import State
from modelchain.plan.pools import PoolFile
from modelchain_operator.reconcile.figures import Figures, StageFigures
from modelchain_operator.watch.families import STAGE, Sample, each_stage, gauge, of
from modelchain_operator.watch.places import gpus_of, node_pool, pool_of


def families(chains: Sequence[Figures], config: PoolFile) -> Iterator[Metric]:
    """What each stage is, its state and reason, its results, and its moments."""
    yield gauge(
        "modelchain_stage_info",
        "1 for every stage of the spec: its model, and what it asks for; gpus: of all its nodes",
        [*STAGE, "model", "gpu", "node_pool", "gpus", "predecessor"],
        _about(chains, config),
    )
    yield gauge(
        "modelchain_stage_state",
        "1 for the state of each stage, 0 for every other state",
        [*STAGE, "state"],
        [
            ((*of(c), s.name, str(state)), s.state == state)
            for c in chains
            for s in c.stages
            for state in State
        ],
    )
    yield gauge(
        "modelchain_stage_reason",
        "1 for the reason of each stage; docs/reasons.md says what the codes mean",
        [*STAGE, "reason"],
        [((*of(c), s.name, s.reason), 1) for c in chains for s in c.stages if s.reason],
    )
    yield from _of_results(chains)
    yield from _of_progress(chains)
    yield gauge(
        "modelchain_stage_allocated_gpus",
        "GPUs that the pods of a stage or baseline hold now",
        STAGE,
        _held(chains),
    )


def _about(chains: Iterable[Figures], config: PoolFile) -> Iterator[Sample]:
    for chain in chains:
        pool = node_pool(chain, config)
        gpu = "" if pool is None else pool.gpu
        for name, spec in chain.specs.items():
            gpus = gpus_of(chain, name, config)
            shown = "" if gpus is None else str(gpus)
            where = (gpu, pool_of(chain, config), shown, spec.predecessor)
            yield (*of(chain), name, spec.model, *where), 1


def _held(chains: Iterable[Figures]) -> Iterator[Sample]:
    """Of stages always, of baselines and removed stages while they hold any."""
    for chain in chains:
        others = (stage for stage in (*chain.baselines, *chain.removed) if stage.held)
        yield from (((*of(chain), s.name), s.held) for s in (*chain.stages, *others))


def _of_results(chains: Sequence[Figures]) -> Iterator[Metric]:
    yield gauge(
        "modelchain_stage_gate",
        "1 for the gate's verdict on each finished stage",
        [*STAGE, "verdict"],
        [((*of(c), s.name, s.verdict), 1) for c in chains for s in c.stages if s.verdict],
    )
    yield gauge(
        "modelchain_stage_gate_difference_points",
        "The gate's metric of the stage less that of the same model trained alone",
        STAGE,
        each_stage(chains, lambda stage: stage.difference),
    )
    yield gauge(
        "modelchain_stage_result",
        "Each metric in the record of a finished stage, in percent; a loss in its own unit",
        [*STAGE, "metric"],
        _results(chains, lambda stage: stage.results),
    )
    yield gauge(
        "modelchain_stage_baseline_result",
        "The gate's metric of the same model trained alone, given in the spec or measured",
        [*STAGE, "metric"],
        _results(chains, lambda stage: stage.baseline),
    )


def _results(
    chains: Iterable[Figures], results_of: Callable[[StageFigures], Mapping[str, float]]
) -> Iterator[Sample]:
    for chain in chains:
        for stage in chain.stages:
            for metric, value in results_of(stage).items():
                yield (*of(chain), stage.name, metric), value


def _of_progress(chains: Sequence[Figures]) -> Iterator[Metric]:
    yield gauge(
        "modelchain_stage_progress_ratio",
        "Steps done of the stage's steps, 0 to 1; absent while nothing is known",
        STAGE,
        each_stage(chains, lambda stage: stage.progress),
    )
    yield gauge(
        "modelchain_stage_transition_seconds",
        "From the end of the predecessor's trainer to the job of this stage, at the last hand-over",
        STAGE,
        each_stage(chains, lambda stage: stage.transition_seconds),
    )
    yield gauge(
        "modelchain_stage_start_timestamp_seconds",
        "When the first attempt at the stage's present inputs left its queue, of the last ten",
        STAGE,
        each_stage(chains, lambda stage: stage.times.started),
    )
    yield gauge(
        "modelchain_stage_completion_timestamp_seconds",
        "When the attempt ended that finished the stage",
        STAGE,
        each_stage(chains, lambda stage: stage.times.completed),
    )
    yield gauge(
        "modelchain_stage_last_progress_timestamp_seconds",
        "When the operator last saw a new step of the stage's attempt; absent while none runs",
        STAGE,
        each_stage(chains, lambda stage: stage.times.stepped),
    )
    yield gauge(
        "modelchain_stage_eta_timestamp_seconds",
        "When the running stage will have taken all its steps, by its trainer",
        STAGE,
        each_stage(chains, lambda stage: stage.times.ends),
    )
