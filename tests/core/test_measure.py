"""Metrics that are measured after a stage has finished: which are known, and what is due."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import MINIMAL, with_changes

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import Evaluation, ModelChain
from modelchain.api.status import ChainStatus, State
from modelchain.decide.conditions import first_unmeasured, why_unmeasured
from modelchain.decide.decide import decide
from modelchain.decide.measure import measured, missing, results
from modelchain.decide.observed import (
    Action,
    Artifact,
    Decision,
    Discard,
    Launch,
    Measure,
    Measurement,
    Observed,
    RecordMetrics,
    Refusal,
    Seen,
)
from modelchain.identity.digest import short_key

NOW = 1000.0
ABSENT = Seen(live=False, started=False)


def evaluation(name: str, shards: str = "") -> dict[str, str]:
    return {"name": name, "kind": "Retrieval", "shards": f"/data/{shards or name}.tar"}


def asked(name: str, shards: str = "") -> Evaluation:
    return Evaluation.model_validate(evaluation(name, shards))


def artifact(**fields: Any) -> Artifact:
    return Artifact("w" * 64, f"{'d' * 64}/artifact", macs=1, **{"metrics": {}, **fields})


# -- which metrics are known -----------------------------------------------------------------------


def test_a_metric_of_the_same_key_is_known() -> None:
    keys = {"food": short_key(asked("food"))}
    found = artifact(metrics={"food": 61.0, "food/top-5": 80.0}, evaluations=keys)
    assert results([asked("food")], found) == {"food": 61.0, "food/top-5": 80.0}
    assert missing([asked("food")], found) == []


def test_a_metric_of_the_same_name_and_another_key_is_neither_known_nor_shown() -> None:
    found = artifact(metrics={"food": 61.0}, evaluations={"food": short_key(asked("food"))})
    changed = asked("food", "other")
    assert results([changed], found) == {} and missing([changed], found) == [changed]
    later = replace(found, later={short_key(changed): {"food": 7.0}})
    assert results([changed], later) == {"food": 7.0}
    assert results([asked("food")], later) == {"food": 61.0}, "the edit was taken back"


def test_in_a_record_without_keys_the_name_counts() -> None:
    found = artifact(metrics={"food": 61.0})
    assert missing([asked("food", "anything")], found) == []


def test_an_evaluation_that_was_renamed_is_known_under_its_new_name() -> None:
    keys = {"food": short_key(asked("food"))}
    found = artifact(metrics={"food": 61.0, "food/top-5": 80.0}, evaluations=keys)
    renamed = [asked("food101", "food")]
    assert results(renamed, found) == {"food101": 61.0, "food101/top-5": 80.0}
    assert missing(renamed, found) == []


def test_metrics_of_other_names_are_shown_after_those_that_the_spec_asks_for() -> None:
    found = artifact(metrics={"old": 1.0, "food": 61.0}, later={"f" * 16: {"cars": 2.0}})
    assert list(results([asked("food")], found)) == ["food", "old", "cars"]


NAMES, SHARDS = ["a", "b", "c"], ["x", "y"]
EVALUATIONS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(SHARDS)), unique_by=lambda pair: pair[0]
)
METRICS = st.dictionaries(st.sampled_from([*NAMES, "a/top-5", "b/top-5"]), st.floats(0, 100))


@given(EVALUATIONS, METRICS, EVALUATIONS, st.dictionaries(st.sampled_from(SHARDS), METRICS))
def test_each_evaluation_is_either_known_or_missing(
    spec: list[tuple[str, str]],
    metrics: dict[str, float],
    keys: list[tuple[str, str]],
    later: dict[str, dict[str, float]],
) -> None:
    found = artifact(
        metrics=metrics,
        evaluations={name: short_key(asked(name, shards)) for name, shards in keys},
        later={short_key(asked("any", shards)): those for shards, those in later.items()},
    )
    wanted = [asked(name, shards) for name, shards in spec]
    shown, absent = results(wanted, found), missing(wanted, found)
    for one in wanted:
        assert (one.name in shown) is (one not in absent)
        assert (one in absent) is (measured(one, found) == {})
        for name in measured(one, found):
            assert name.partition("/")[0] == one.name
    for one in wanted:  # what is shown under a name was measured by what the name stands for
        own = [n for n in metrics if n.partition("/")[0] == one.name]
        stale = found.evaluations.get(one.name) not in (None, short_key(one))
        if own and stale and one in absent:
            assert not set(own) & set(shown)


# -- what is due for the others --------------------------------------------------------------------


class Bench:
    """A chain whose stages are all hits, records without metrics, and Jobs that end on command."""

    def __init__(self, *names: str, **changes: Any):
        self.generation = 1
        self.retry: str | None = None
        self.status = ChainStatus()
        # The artifacts that are found: all, those of the first stage, or none.
        self.found = 2
        self.attempt = ABSENT
        # By input digest and key, what the record has; by name, what became of a Job.
        self.later: dict[str, dict[str, dict[str, float]]] = {}
        self.jobs: dict[str, Measurement] = {}
        self.made: list[Measure] = []
        # By name, the generation and the retry for which a failed Job was made.
        self.failed: dict[str, tuple[int, str | None]] = {}
        self.refusal: Refusal | None = None
        self.apply(*names, **changes)

    def apply(self, *names: str, **changes: Any) -> None:
        self.spec = [evaluation(name) for name in names]
        body = {"spec.evaluation": self.spec, "metadata.generation": self.generation, **changes}
        body["metadata.namespace"] = "team"
        self.chain = ModelChain.model_validate(with_changes(body, MINIMAL))
        self.generation += 1

    def artifact(self, digest: str) -> Artifact | None:
        first = self.status.stages[0].input_digest if self.status.stages else None
        if self.found < 1 or (self.found < 2 and digest != first):
            return None
        return Artifact(
            "w" * 64, f"{digest}/artifact", macs=1, metrics={}, later=self.later.get(digest, {})
        )

    def seen(self, measure: Measure) -> Measurement:
        seen = self.jobs.get(measure.job)
        failed = isinstance(seen, LastWord) and seen.result == "Failed"
        again = failed and self.failed[measure.job] != (self.generation, self.retry)
        return None if again else seen

    def observed(self) -> Observed:
        return Observed(
            status=self.status,
            artifact=self.artifact,
            attempt=lambda name: self.attempt,
            records=True,
            retry=self.retry,
            measurement=self.seen,
            evaluation_jobs={f"uid of {name}": name for name in self.jobs},
            refused=lambda action: self.refusal,
        )

    def step(self) -> Decision:
        step = decide(self.chain, self.observed(), NOW)
        if step.write:
            self.status = step.status
        elif step.action is not None:
            self.act(step.action)
        return step

    def act(self, action: Action) -> None:
        match action:
            case Measure(job=job):
                self.made.append(action)
                self.jobs[job] = Reason(Code.MEASURING, job, "it runs")
                assert len(self.running) == 1, "one Job at a time"
            case RecordMetrics(measure=measure, metrics=metrics):
                known = self.later.setdefault(measure.artifact.input_digest, {})
                key = short_key(measure.evaluation)
                assert key not in known, "nothing is measured twice"
                known[key] = dict(metrics)
            case Discard(name=name):
                del self.jobs[name]
            case Launch():
                pass
            case _:
                raise AssertionError(action)

    @property
    def running(self) -> list[str]:
        return [name for name, seen in self.jobs.items() if isinstance(seen, Reason)]

    def rest(self) -> Decision:
        """Steps until only an event changes anything."""
        for _ in range(100):
            step = self.step()
            if not step.write and step.action is None:
                return step
        raise AssertionError("it does not come to rest")

    def end(self, *, well: bool = True) -> None:
        """The running Job ends."""
        [name] = self.running
        wanted = next(measure for measure in reversed(self.made) if measure.job == name)
        word = LastWord(result="Succeeded", metrics={wanted.evaluation.name: 50.0})
        if not well:
            word = LastWord(result="Failed", failure=FailureClass.DATA, message="it is broken")
            self.failed[name] = (self.generation, self.retry)
        self.jobs[name] = word

    def codes(self) -> list[Code | None]:
        return [one.code for stage in self.status.stages for one in stage.unmeasured]


def test_an_evaluation_that_was_added_is_measured_on_all_stages_the_smallest_first() -> None:
    bench = Bench()
    bench.rest()
    assert bench.status.is_true("Complete") and bench.status.is_true("Measured")
    bench.apply("food")
    for name in ("vit-t", "vit-s"):
        bench.rest()
        assert bench.status.is_true("Complete") and not bench.status.is_true("Measured")
        assert bench.made[-1].job.startswith(f"family-{name}-eval-")
        bench.end()
    assert bench.rest().again is None
    assert [stage.results for stage in bench.status.stages] == [{"food": "50.00"}] * 2
    assert bench.status.is_true("Measured") and bench.jobs == {} and len(bench.made) == 2
    condition = bench.status.condition("Measured")
    assert condition and condition.reason == "AllMeasured"
    assert all(stage.state is State.SUCCEEDED for stage in bench.status.stages)


def test_the_status_says_which_metric_is_measured_and_which_ones_wait() -> None:
    bench = Bench("food", "cars")
    bench.rest()
    assert bench.codes() == [Code.MEASURING, *[Code.MEASURE_WAITS] * 3]
    [job] = bench.running
    condition = bench.status.condition("Measured")
    assert condition and condition.reason == "Measuring"
    assert condition.message == "stage vit-t, evaluation food: it runs"
    entry = bench.status.stages[0].unmeasured[0]
    assert entry.next == f"kubectl logs -f job/{job} -n team"
    assert bench.status.stages[0].unmeasured[1].reason == ""


def test_nothing_is_measured_while_a_stage_is_trained() -> None:
    bench = Bench("food")
    bench.found = 0
    while bench.step().write:
        pass
    bench.found = 1
    while bench.step().write:
        pass
    bench.attempt = Seen(live=True, started=True, uid="u", running=True)
    assert bench.rest().action is None
    one, two = bench.status.stages
    assert (one.state, two.state) == (State.SUCCEEDED, State.STARTING) and bench.made == []
    assert [(e.evaluation, e.code) for e in one.unmeasured] == [("food", Code.MEASURE_WAITS)]
    assert two.unmeasured == []
    bench.found = 2
    bench.attempt = Seen(live=False, started=True)
    bench.rest()
    assert len(bench.made) == 1


def test_a_suspended_chain_measures_nothing_and_its_job_is_deleted() -> None:
    bench = Bench("food")
    bench.rest()
    assert bench.running
    bench.apply("food", **{"spec.suspend": True})
    bench.rest()
    assert bench.jobs == {} and bench.codes() == [Code.MEASURE_WAITS] * 2
    assert "spec.suspend is true" in bench.status.stages[0].unmeasured[0].reason
    bench.apply("food")
    bench.rest()
    assert len(bench.running) == 1


def test_the_job_of_an_evaluation_that_left_the_spec_is_deleted() -> None:
    bench = Bench("food")
    bench.rest()
    bench.apply()
    bench.rest()
    assert bench.jobs == {} and bench.status.is_true("Measured")


def test_a_failure_is_told_holds_nothing_back_and_is_measured_again_by_a_retry() -> None:
    bench = Bench("food", "cars")
    bench.rest()
    bench.end(well=False)
    bench.rest()
    assert bench.codes() == [Code.MEASURE_FAILED, Code.MEASURING, *[Code.MEASURE_WAITS] * 2]
    told = first_unmeasured(bench.status.stages)
    assert told and "Data: it is broken" in why_unmeasured(*told)
    for _ in range(3):
        bench.end()
        bench.rest()
    assert bench.codes() == [Code.MEASURE_FAILED] and len(bench.made) == 4
    condition = bench.status.condition("Measured")
    assert condition and (condition.status, condition.reason) == ("False", "MeasureFailed")
    assert bench.status.is_true("Complete") and bench.status.stages[0].retries == 0
    bench.retry = "again"
    bench.rest()
    bench.end()
    bench.rest()
    assert len(bench.made) == 5 and bench.status.is_true("Measured") and bench.jobs == {}


def test_a_word_without_the_metric_is_a_failure() -> None:
    bench = Bench("food")
    bench.rest()
    [job] = bench.running
    bench.jobs[job] = LastWord(result="Succeeded", metrics={"cars": 1.0})
    bench.rest()
    assert bench.codes()[0] is Code.MEASURE_FAILED


def test_a_finished_chain_measures_nothing_unasked() -> None:
    """An upgrade may change how keys are made. It starts no Jobs."""
    bench = Bench("food")
    bench.rest()
    for _ in range(2):
        bench.end()
        bench.rest()
    bench.later, bench.made = {}, []
    assert bench.rest().again is None
    assert bench.made == [] and bench.codes() == [Code.UNMEASURED] * 2
    assert "modelchain retry family -n team" in bench.status.stages[0].unmeasured[0].next
    bench.retry = "now"
    bench.rest()
    assert len(bench.made) == 1


def test_a_refusal_is_told_in_the_servers_words() -> None:
    bench = Bench("food")
    bench.refusal = Refusal(Reason(Code.MEASURE_REFUSED, "job", "quota exceeded"), NOW)
    bench.step()
    assert bench.codes()[0] is Code.MEASURE_REFUSED
    condition = bench.status.condition("Measured")
    assert condition and "quota exceeded" in condition.message
    bench.refusal = None  # another operator has taken over and has not tried it yet
    assert isinstance(bench.step().action, Measure), "the sentence stays until it is tried"


def test_on_a_laptop_only_the_status_says_that_a_metric_is_missing() -> None:
    bench = Bench("food")
    observed = replace(bench.observed(), records=False)
    step = decide(bench.chain, observed, NOW)
    assert step.write and step.status.stages[0].unmeasured[0].code is Code.UNMEASURED
    step = decide(bench.chain, replace(observed, status=step.status), NOW)
    assert step.action is None and step.again is None


NEXT: dict[str, Callable[[Bench], object]] = {
    "the Job succeeds": lambda bench: bench.end(),
    "the Job fails": lambda bench: bench.end(well=False),
    "a retry": lambda bench: setattr(bench, "retry", f"{bench.retry}again"),
}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(NAMES), unique=True, min_size=1),
    st.lists(st.sampled_from(NAMES), unique=True),
    st.lists(st.sampled_from(list(NEXT)), max_size=12),
)
def test_whatever_jobs_and_users_do_everything_is_measured_once_in_the_end(
    first: list[str], second: list[str], happens: list[str]
) -> None:
    bench = Bench(*first)
    for number, what in enumerate(happens):
        bench.rest()
        if number == len(happens) // 2:
            bench.apply(*second)
            bench.rest()
        if bench.running or what == "a retry":
            NEXT[what](bench)
    bench.apply(*second)
    bench.rest()
    while bench.running:
        bench.end()
        bench.rest()
    assert bench.codes() == [] and bench.status.is_true("Measured") and bench.jobs == {}
    assert all(set(stage.results) >= set(second) for stage in bench.status.stages)


@pytest.mark.parametrize("length", [1, 24])
def test_a_job_has_a_name_that_leaves_room_for_its_pods(length: int) -> None:
    bench = Bench("food", **{"metadata.name": "c" * length, "spec.stages[0].name": "s" * 16})
    bench.rest()
    assert len(bench.made[0].job) <= 63 - len("-abcde")
