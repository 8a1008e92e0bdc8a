"""The metrics of finished stages: which are known, and what measures the others. Pure.

An evaluation may be added to the spec, or be changed, after a stage has finished. Then a Job runs
it on the artifact, and nothing is trained. Training comes first: nothing is measured before all
stages have finished. Then one Job runs at a time, and the smallest stage has its turn first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import Evaluation
from modelchain.api.status import StageStatus, State, Unmeasured
from modelchain.decide import transitions
from modelchain.decide.observed import Action, Artifact, Measure, RecordMetrics
from modelchain.decide.outcome import Outcome, Turn
from modelchain.identity.digest import digest_of, short_key

WAITS = Reason(Code.MEASURE_WAITS)
UNASKED = Reason(Code.UNMEASURED, message="the chain had ended before; a retry measures it")
# Why a metric is not known that a Job was to measure. An edit or a retry makes the Job again.
FAILED = (Code.MEASURE_FAILED, Code.MEASURE_DEADLINE)
ON_A_LAPTOP = Reason(Code.UNMEASURED, message="the next run of the command measures it")

# -- which metrics are known -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """The metrics of one evaluation. Their names are the evaluation's, or begin with it and `/`."""

    name: str
    # The evaluation's short key; None if that was not recorded.
    key: str | None
    metrics: Mapping[str, float]


def _known(artifact: Artifact) -> Iterator[_Known]:
    """What has been measured of an artifact. What the trainer measured itself comes first."""
    for name in dict.fromkeys(map(_evaluation, artifact.metrics)):
        yield _Known(name, artifact.evaluations.get(name), _of(name, artifact.metrics))
    for key, metrics in artifact.later.items():
        for name in dict.fromkeys(map(_evaluation, metrics)):
            yield _Known(name, key, _of(name, metrics))


def _of(evaluation: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of the evaluation with this name."""
    return {name: value for name, value in metrics.items() if _evaluation(name) == evaluation}


def _evaluation(metric: str) -> str:
    """The name of the evaluation that gave a metric."""
    return metric.partition("/")[0]


def measured(evaluation: Evaluation, artifact: Artifact) -> dict[str, float]:
    """The metrics of an evaluation, under its present name; empty if it was not measured.

    Its key decides, since the spec may use the same name for something else by now. Where no key
    was recorded, as in records of older versions, the name decides.
    """
    key, known = short_key(evaluation), list(_known(artifact))
    same = [one for one in known if one.key == key]
    named = [one for one in known if one.key is None and one.name == evaluation.name]
    for one in (*same, *named):
        if one.name in one.metrics:
            return {
                evaluation.name + name.removeprefix(one.name): value
                for name, value in one.metrics.items()
            }
    return {}


def results(evaluations: Sequence[Evaluation], artifact: Artifact) -> dict[str, float]:
    """The metrics to show of an artifact: those that the spec asks for, then all other ones.

    What the spec's name for an evaluation stood for at another time is not shown.
    """
    asked = {n: value for e in evaluations for n, value in measured(e, artifact).items()}
    names, keys = {e.name for e in evaluations}, {short_key(e) for e in evaluations}
    others = [one for one in _known(artifact) if one.name not in names and one.key not in keys]
    return asked | {name: value for one in others for name, value in one.metrics.items()}


def missing(evaluations: Iterable[Evaluation], artifact: Artifact) -> list[Evaluation]:
    """The evaluations that were not measured on an artifact."""
    return [evaluation for evaluation in evaluations if not measured(evaluation, artifact)]


# -- what is due for the others --------------------------------------------------------------------


@dataclass(frozen=True)
class _Due:
    """What is said of one evaluation that was not measured, and what is due for it."""

    told: Reason
    action: Action | None = None
    # Its Job is still needed.
    keeps: bool = False
    # It has the chain's turn, so the ones after it wait.
    busy: bool = False


def with_measurements(turn: Turn, outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes of all stages, with what is due for metrics that are not known."""
    hold, busy = _hold(turn, outcomes), False
    done = []
    places = {stage.name: index for index, stage in enumerate(turn.chain.spec.stages)}
    for outcome in outcomes:
        told = []
        now = replace(turn, index=places[outcome.stage.name], alone=outcome.alone)
        for measure in _measures(now, outcome):
            gate = _needed_by_the_gate(turn, outcome, outcomes, measure)
            before = _stored(now, outcome.stage, measure.evaluation)
            # Training goes first, but it cannot go on before the gate has its verdict.
            wait = None if gate and hold is WAITS else hold
            due = _due(turn, before, measure, wait or (WAITS if busy else None))
            told.append((measure.evaluation.name, due.told))
            if due.keeps:
                outcome = replace(outcome, jobs=outcome.jobs | {measure.job})
            if due.busy:
                busy, again = True, turn.observed.poll_seconds
                outcome = replace(outcome, action=due.action, again=again)
            elif gate and due.told.code in FAILED:
                outcome = replace(
                    outcome, stage=transitions.held_by_the_gate(outcome.stage, due.told)
                )
        done.append(replace(outcome, stage=transitions.unmeasured(outcome.stage, told)))
    return done


def _needed_by_the_gate(
    turn: Turn, outcome: Outcome, outcomes: Iterable[Outcome], measure: Measure
) -> bool:
    """Whether a stage waits for the gate's verdict, which needs this metric of it or its baseline.

    Such a metric is measured at once, since nothing else may be launched.
    """
    gate, name = turn.chain.spec.gate, outcome.stage.name
    if gate is None or measure.evaluation.name != gate.metric:
        return False
    stages = (other.stage for other in outcomes if not other.alone and other.stage.name == name)
    return any(stage.state is State.SUCCEEDED and not stage.over for stage in stages)


def _hold(turn: Turn, outcomes: Iterable[Outcome]) -> Reason | None:
    """Why nothing is measured now; None if nothing is in the way."""
    if not turn.observed.records:
        return ON_A_LAPTOP
    if turn.stopping is not None:
        stopping = turn.stopping
        return Reason(Code.MEASURE_WAITS, message=stopping.message, next_command=stopping.next)
    return WAITS if any(outcome.artifact is None for outcome in outcomes) else None


def _measures(turn: Turn, outcome: Outcome) -> Iterator[Measure]:
    """The measurements that a finished stage lacks."""
    if (artifact := outcome.artifact) is None:
        return
    for evaluation in missing(turn.chain.spec.evaluation, artifact):
        what = [evaluation.name, short_key(evaluation)]
        of = digest_of([artifact.input_digest, artifact.digest, *what])
        # At most 55 characters, so the name of a pod still fits into 63.
        job = f"{turn.chain.metadata.name}-{outcome.stage.name}-eval-{of[:8]}"
        yield Measure(turn.index, artifact, evaluation, job)


def _stored(turn: Turn, stage: StageStatus, evaluation: Evaluation) -> Unmeasured | None:
    """What the stored status says of an evaluation that was not measured."""
    status = turn.observed.status
    rows = status.baselines if turn.alone else status.stages
    stages = (known for known in rows if known.name == stage.name)
    entries = (one for known in stages for one in known.unmeasured)
    return next((one for one in entries if one.evaluation == evaluation.name), None)


def _due(turn: Turn, before: Unmeasured | None, measure: Measure, hold: Reason | None) -> _Due:
    """What is due for one evaluation.

    A finished chain starts no work unasked, for example after an upgrade of the operator. So an
    evaluation counts that is in the status already, since an edit or a retry came before. What has
    failed waits for another edit or retry; its Job is kept for the logs.
    """
    if turn.finished and turn.observed.records:
        if before is None or before.code is Code.UNMEASURED:
            return _Due(UNASKED)
        if before.code in FAILED:
            return _Due(_as_before(before), keeps=True)
    return _Due(hold) if hold is not None else _next(turn, before, measure)


def _as_before(before: Unmeasured) -> Reason:
    assert before.code is not None
    return Reason(before.code, message=before.reason, next_command=before.next)


def _next(turn: Turn, before: Unmeasured | None, measure: Measure) -> _Due:
    """What is due for the evaluation that has its turn."""
    seen = turn.observed.measurement(measure)
    if isinstance(seen, Reason):
        return _Due(seen, keeps=True, busy=seen.code not in FAILED)
    action: Action = measure
    if seen is not None:
        metrics = _metrics(measure.evaluation, seen)
        if not metrics:
            return _Due(_failed(measure, seen), keeps=True)
        pictures = seen.pictures.get(measure.evaluation.name)
        action = RecordMetrics(measure, metrics, pictures)
    told = _with_refusal(turn, before, action, measures(measure.job))
    return _Due(told, action, keeps=True, busy=True)


def measures(job: str) -> Reason:
    """The Job is at work, or is about to be made."""
    return Reason(Code.MEASURING, job, f"job {job} measures it")


def _metrics(evaluation: Evaluation, word: LastWord) -> dict[str, float]:
    """What a Job has measured; empty if it has failed."""
    succeeded = word.result == "Succeeded" and evaluation.name in word.metrics
    return _of(evaluation.name, word.metrics) if succeeded else {}


def _failed(measure: Measure, word: LastWord) -> Reason:
    failure = word.failure or FailureClass.ERROR
    why = word.message or "it left no metric"
    return Reason(Code.MEASURE_FAILED, measure.job, f"job {measure.job} failed: {failure}: {why}")


def _with_refusal(turn: Turn, before: Unmeasured | None, action: Action, told: Reason) -> Reason:
    """`told`, or why the API server refuses the action.

    If only the status says so, another process has tried the action. Then the reason stays until
    the action is tried again, so that it does not change to and fro.
    """
    refusal = turn.observed.refused(action)
    if refusal is not None:
        return refusal.reason
    if before is not None and before.code is Code.MEASURE_REFUSED:
        return _as_before(before)
    return told
