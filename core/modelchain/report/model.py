"""What a report shows of a chain: its tables, and the points of its drawings. Pure.

Everything is made from the spec, the status and the plan. What else is known, such as
losses, is `Known`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate

from modelchain.api.artifact import StageArtifactSpec
from modelchain.api.contracts import Growth, Manifest, Results
from modelchain.api.spec import ModelChain
from modelchain.api.status import AttemptStatus, ChainStatus, StageStatus, State
from modelchain.gate.budget import SECONDS_PER_HOUR
from modelchain.gate.outlook import Outlook, added, with_removed
from modelchain.plan.plan import Plan, plan
from modelchain.plan.prices import shown, total_cost
from modelchain.report.cost import (
    Columns,
    ledgers,
    outlook_columns,
    outlooks_of,
    scientific,
    units,
    use_columns,
)
from modelchain.report.relaxation import relaxation_lines


@dataclass(frozen=True)
class Curve:
    """Numbers of a training, each with its step. Of a long training there are a few hundred."""

    losses: Sequence[tuple[int, float]] = ()
    # The distillation loss divided by the task loss; empty without a teacher.
    ratios: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Known:
    """What there is of a stage beside the status: files in a root, or a record on a cluster."""

    curve: Curve = field(default_factory=Curve)
    results: Results | None = None
    manifest: Manifest | None = None
    record: StageArtifactSpec | None = None

    @property
    def fingerprint(self) -> str | None:
        """Of the training data that the stage's inputs name."""
        of = self.manifest or self.record
        data = of.inputs.get("data") if of else None
        told = data.get("fingerprint") if isinstance(data, dict) else None
        return told if isinstance(told, str) else None

    @property
    def made(self) -> str:
        """With what, by which attempt and when the weights were made, as far as that is known."""
        if self.manifest is not None:
            versions = sorted(self.manifest.environment.items())
            return ", ".join(f"{name} {value}" for name, value in versions)
        if self.record is not None:
            return f"{self.record.attempt}, {self.record.finished_at}, {self.record.image}"
        return ""


@dataclass(frozen=True)
class Table:
    """The headings of a table's columns, and the cells of its rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Point:
    """A model, the MACs of the family up to it, and its accuracy in percent."""

    stage: str
    macs: int
    accuracy: float


@dataclass(frozen=True)
class Span:
    """One attempt on the time line, in seconds since the epoch."""

    row: str
    start: float
    end: float
    state: State
    attempt: str


@dataclass(frozen=True)
class Report:
    """All that the page shows. A part is empty where nothing is known."""

    chain: str
    summary: Sequence[str]
    # The evaluation whose metric stands for the accuracy; None for a chain without evaluations.
    metric: str | None
    family: Table
    together: Sequence[Point]
    alone: Sequence[Point]
    # What was planned, spent and saved, in each unit that is known beside MACs, by title; and GPU
    # hours by use.
    outlook: Mapping[str, Table]
    uses: Table
    time_line: Sequence[Span]
    curves: Mapping[str, Curve]
    growth: Table
    provenance: Table
    reasons: Sequence[str]


def report_of(
    chain: ModelChain,
    status: ChainStatus,
    plan: Plan,
    known: Mapping[str, Known],
    now: float,
) -> Report:
    """The report of a chain, be it finished or not.

    Args:
        plan: with the epochs of the status.
        known: by stage.
        now: seconds since the epoch, at which open attempts end on the time line.
    """
    metric = _metric(chain)
    found = with_removed(outlooks_of(plan, status), status)
    return Report(
        chain=chain.metadata.name,
        summary=list(_summary(status, plan, found)),
        metric=metric,
        family=_family(status, plan, metric),
        together=_together(status, metric),
        alone=_alone(status, plan, metric),
        outlook=_outlook(plan, status, found),
        uses=_uses(status),
        time_line=list(_spans(status, now)),
        curves={name: of.curve for name, of in known.items() if of.curve.losses},
        growth=_growth(status, known),
        provenance=_provenance(chain, status, known),
        reasons=[f"{s.name}: {s.state}. {s.reason}" for s in status.stages if not s.done],
    )


def recorded(status: ChainStatus, records: Iterable[StageArtifactSpec]) -> dict[str, Known]:
    """By stage, the record of the artifact that its status names."""
    by_artifact = {(one.input_digest, one.artifact_digest): one for one in records}
    found = {
        stage.name: by_artifact.get((stage.input_digest, stage.artifact.digest))
        for stage in status.stages
        if stage.input_digest is not None and stage.artifact is not None
    }
    return {name: Known(record=record) for name, record in found.items() if record is not None}


def _metric(chain: ModelChain) -> str | None:
    """The gate's metric, else that of the first evaluation."""
    if chain.spec.gate is not None:
        return chain.spec.gate.metric
    return chain.spec.evaluation[0].name if chain.spec.evaluation else None


def _summary(status: ChainStatus, plan: Plan, found: Sequence[Outlook]) -> Iterator[str]:
    """The chain in a few sentences. What it has saved is said once all stages have finished."""
    done = [stage for stage in status.stages if stage.state is State.SUCCEEDED]
    count = len(plan.stages)
    yield f"{len(done)} of {count} models are trained."
    spent, alone = spent_macs(status), plan.individual.macs
    projected = added([one.projected for one in found])
    if len(done) == count and spent:
        yield (
            f"The chain took {scientific(spent)} MACs. Training each model alone takes"
            f" {scientific(alone)}, which is {times(alone, spent)}."
        )
    elif projected.macs:
        yield (
            f"The chain has taken {scientific(spent)} MACs so far, and will have taken"
            f" {scientific(projected.macs)}. Training each model alone takes {scientific(alone)},"
            f" which is {times(alone, projected.macs)}."
        )
    removed = sum(stage.macs for stage in status.removed)
    if removed:
        yield f"Of these, {scientific(removed)} were spent on stages that have left the chain."
    own = sum(row.macs for row in status.baselines if not _is_of_a_stage(row, status))
    if own:
        yield f"Training models alone for the gate took another {scientific(own)} MACs."
    yield from relaxation_lines(status)


def spent_macs(status: ChainStatus) -> int:
    """What the chain has spent, on stages that have left it as well."""
    return sum(stage.macs for stage in (*status.stages, *status.removed))


def _is_of_a_stage(baseline: StageStatus, status: ChainStatus) -> bool:
    """Whether it is the same training as a stage of the chain, as that of the first stage is."""
    return baseline.last_digest in {stage.last_digest for stage in status.stages}


def times(alone: int, chain: int) -> str:
    """How the MACs of the models trained alone compare with those of the chain."""
    ratio = alone / chain
    return f"{ratio:.2f} times as much" if ratio >= 1 else f"{1 / ratio:.2f} times less"


def family_cells(chain: ModelChain, status: ChainStatus) -> Table:
    """The family's table alone."""
    return _family(status, plan(chain, "analytic", {}, status.epochs), _metric(chain))


def _family(status: ChainStatus, plan: Plan, metric: str | None) -> Table:
    """One row for each model of the family, with what it would have taken alone, and their sum."""
    stages = status.stages[: len(plan.stages)]
    spent, alone = spent_macs(status), plan.individual.macs
    finished = len(stages) == len(plan.stages) and all(map(_finished, stages))
    columns = {
        "model": [*(stage.name for stage in stages), "together"],
        "state": [*(str(stage.state) for stage in stages), ""],
        "epochs": [*("" if stage.epochs is None else str(stage.epochs) for stage in stages), ""],
        "alone: epochs": [*(str(planned.individual.epochs) for planned in plan.stages), ""],
    }
    if metric is not None:
        columns[f"{metric}, %"] = [*(stage.results.get(metric, "") for stage in stages), ""]
    if any(stage.gate and stage.gate.baseline for stage in stages):
        columns |= _gate_columns(stages)
    ratios = [
        f"{planned.individual.macs / stage.macs:.2f}" if _finished(stage) and stage.macs else ""
        for planned, stage in zip(plan.stages, stages, strict=False)
    ]
    columns |= {
        "MACs": [*(scientific(s.macs) if s.macs else "" for s in stages), scientific(spent)],
        "alone: MACs": [
            *(scientific(planned.individual.macs) for planned in plan.stages),
            scientific(alone),
        ],
        "times less": [*ratios, f"{alone / spent:.2f}" if finished else ""],
        **_money_columns("", stages),
        **_money_columns("alone: ", _rows_alone(status)),
    }
    return Table(list(columns), list(zip(*columns.values(), strict=False)))


def _gate_columns(stages: Sequence[StageStatus]) -> dict[str, list[str]]:
    """The baselines, the differences to them, and the verdicts."""
    cells = [_gate_cells(stage) for stage in stages]
    baselines, differences, verdicts = zip(*cells, strict=True)
    return {
        "alone, %": [*baselines, ""],
        "difference": [*differences, ""],
        "gate": [*verdicts, ""],
    }


def _rows_alone(status: ChainStatus) -> list[StageStatus | None]:
    """By stage, its model trained alone here; None if there is none."""
    baselines = {row.name: row for row in status.baselines}
    return [baselines.get(stage.name) for stage in status.stages]


def _money_columns(prefix: str, rows: Sequence[StageStatus | None]) -> dict[str, list[str]]:
    """GPU hours and cost, where there are any."""
    columns = {}
    seconds = [0.0 if row is None else row.gpu_seconds for row in rows]
    if any(seconds):
        hours = (*seconds, sum(seconds))
        columns[f"{prefix}GPU hours"] = [f"{s / SECONDS_PER_HOUR:,.1f}" if s else "" for s in hours]
    costs = [None if row is None else row.cost for row in rows]
    if any(costs):
        parts = [*costs, total_cost(costs)]
        columns[f"{prefix}cost"] = ["" if cost is None else shown(cost) for cost in parts]
    return columns


def _gate_cells(stage: StageStatus) -> list[str]:
    """The baseline, the difference to it, and the verdict."""
    if stage.gate is None:
        return ["", "", ""]
    error = f" ± {stage.gate.standard_error}" if stage.gate.standard_error else ""
    difference = stage.gate.difference
    points = "" if difference is None else f"{float(difference):+.2f}{error}"
    return [stage.gate.baseline or "", points, str(stage.gate.verdict)]


def _finished(stage: StageStatus) -> bool:
    return stage.state is State.SUCCEEDED and stage.macs > 0


def _together(status: ChainStatus, metric: str | None) -> list[Point]:
    """Each finished model of the chain, at the MACs of the chain up to it."""
    spent = accumulate(stage.macs for stage in status.stages)
    return [
        Point(stage.name, macs, float(stage.results[metric]))
        for stage, macs in zip(status.stages, spent, strict=True)
        if metric in stage.results and stage.macs
    ]


def _alone(status: ChainStatus, plan: Plan, metric: str | None) -> list[Point]:
    """Each model whose accuracy alone is known, at the MACs of training the family one by one.

    The first model of a chain is itself trained alone.
    """
    baselines = {row.name: row for row in status.baselines}
    planned = [stage.individual.macs for stage in plan.stages]
    points = []
    for index, (stage, macs) in enumerate(zip(status.stages, accumulate(planned), strict=False)):
        own = baselines.get(stage.name)
        accuracy = stage.gate.baseline if stage.gate else None
        if own is not None and metric in own.results:
            accuracy = own.results[metric]
        if index == 0 and accuracy is None and metric is not None:
            accuracy = stage.results.get(metric)
        if accuracy is not None:
            points.append(Point(stage.name, macs, float(accuracy)))
    return points


def _outlook(plan: Plan, status: ChainStatus, found: Sequence[Outlook]) -> dict[str, Table]:
    columns = {
        title: outlook_columns(found, unit, estimates)
        for title, unit, estimates in units(plan.chain, status)
        if estimates
    }
    return {title: _table(of) for title, of in columns.items()}


def _uses(status: ChainStatus) -> Table:
    """GPU hours by use; without rows if no GPU was held."""
    rows = list(ledgers(status))
    held = any(ledger.gpu_seconds for _, _, ledger in rows)
    return _table(use_columns(rows)) if held else Table([], [])


def _table(columns: Columns) -> Table:
    return Table(list(columns), list(zip(*columns.values(), strict=True)))


def _spans(status: ChainStatus, now: float) -> Iterator[Span]:
    """The attempts that are still listed in the status, stage by stage."""
    for stage in status.stages:
        for alone in (row for row in status.baselines if row.name == stage.name):
            yield from _of(f"{alone.name} alone", alone.attempts, now)
        yield from _of(stage.name, stage.attempts, now)


def _of(row: str, attempts: Sequence[AttemptStatus], now: float) -> Iterator[Span]:
    for attempt in attempts:
        if attempt.started_at is not None:
            end = now if attempt.finished_at is None else seconds_of(attempt.finished_at)
            start = seconds_of(attempt.started_at)
            yield Span(row, start, max(start, end), attempt.state, attempt.name)


def seconds_of(time: str) -> float:
    """Seconds since the epoch of an RFC 3339 time."""
    return datetime.fromisoformat(time).timestamp()


def _growth(status: ChainStatus, known: Mapping[str, Known]) -> Table:
    """How much each model has inherited, and what it could do before its first step."""
    rows = []
    for stage in status.stages:
        results = known.get(stage.name, Known()).results
        if results is not None and results.growth is not None:
            grown: Growth = results.growth
            total = grown.inserted + grown.duplicated + grown.new
            rows.append(
                [
                    stage.name,
                    results.predecessor or "",
                    f"{grown.method['width']}, {grown.method['depth']}",
                    f"{grown.inserted:,}",
                    f"{grown.duplicated:,}",
                    f"{grown.new:,}",
                    f"{1 - grown.new / total:.0%}",
                    f"{results.initial.loss:.3f}",
                    f"{results.final.loss:.3f}",
                ]
            )
    columns = ["model", "grown from", "method: width, depth", "inserted", "duplicated", "new"]
    return Table([*columns, "inherited", "loss at step 0", "loss at the end"], rows)


def _provenance(chain: ModelChain, status: ChainStatus, known: Mapping[str, Known]) -> Table:
    """From what the weights were made, and what they are."""
    train, image = chain.spec.data.train, chain.spec.runner.image
    rows = [["training data", f"{train.samples:,} samples, {train.shards}"]]
    told = [of.fingerprint for of in known.values() if of.fingerprint]
    fingerprint = train.fingerprint or next(iter(told), None)
    rows += [["fingerprint of the data", fingerprint]] if fingerprint else []
    rows += [["trainer's image", image]] if image else []
    for stage in status.stages:
        rows += [[f"{stage.name}: inputs", stage.input_digest]] if stage.input_digest else []
        if stage.artifact is not None:
            rows.append([f"{stage.name}: weights", stage.artifact.digest])
            rows.append([f"{stage.name}: directory", stage.artifact.path])
        made = known.get(stage.name, Known()).made
        rows += [[f"{stage.name}: made", made]] if made else []
    return Table(["what", "value"], rows)
