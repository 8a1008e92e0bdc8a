"""Which test produces each code of a reason, and the check that it does (a plugin of pytest).

While a test of `TESTS` runs, the codes are collected that the project's own code decides on: for
the reason of a stage, a condition, an event or an explanation. What the test itself makes, and what
is only passed on, does not count. The test fails if a code is not among them that `TESTS` expects.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Where reasons are made; `api` only builds the sentence of a stored one.
OURS = tuple(f"{ROOT}/{room}/" for room in ("core/modelchain/decide", "operator"))

# By test, the codes that it must produce. tests/core/test_reasons.py checks that none is missing.
TESTS: dict[str, str] = {
    "tests/core/test_codes.py::test_a_stall_without_a_code_of_its_own": "Blocked NoFailure",
    "tests/core/test_codes.py::test_conditions_carry_codes[complete]": "AllStagesFinished",
    "tests/core/test_codes.py::test_conditions_carry_codes[failed]": "Failed NotSuspended Planned",
    "tests/core/test_codes.py::test_conditions_carry_codes[not begun]": "Pending",
    "tests/core/test_codes.py::test_conditions_carry_codes[suspended]": "Stopped",
    "tests/core/test_codes.py::test_the_code_of_a_corrupt_artifact": "CorruptArtifact",
    "tests/core/test_codes.py::"
    "test_the_code_of_a_failure[CorruptPredecessor]": "CorruptPredecessor",
    "tests/core/test_codes.py::test_the_code_of_a_failure[Data]": "Data",
    "tests/core/test_codes.py::test_the_code_of_a_failure[Error]": "Error",
    "tests/core/test_codes.py::test_the_code_of_a_failure[Hardware]": "Hardware",
    "tests/core/test_codes.py::test_the_code_of_a_failure[NonFinite]": "NonFinite",
    "tests/core/test_codes.py::test_the_code_of_a_failure[OutOfMemory]": "OutOfMemory",
    "tests/core/test_codes.py::test_the_code_of_a_failure[Preempted]": "Preempted",
    "tests/core/test_codes.py::test_the_code_of_a_failure[StageDeadline]": "StageDeadline",
    "tests/core/test_codes.py::test_the_code_of_a_failure[StallDeadline]": "StallDeadline",
    "tests/core/test_codes.py::test_the_code_of_a_failure[StartDeadline]": "StartDeadline",
    "tests/core/test_codes.py::test_the_code_of_a_failure[Unknown]": "Unknown",
    "tests/core/test_codes.py::test_the_code_of_a_failure[UserError]": "UserError",
    "tests/core/test_codes.py::test_the_code_of_a_failure[VolumeFull]": "VolumeFull",
    "tests/core/test_codes.py::test_the_code_of_a_hit": "Miss Unchanged",
    "tests/core/test_codes.py::test_the_code_of_an_interrupted_command": "Interrupted",
    "tests/core/test_codes.py::test_the_codes_of_a_new_chain": "WaitsForStage",
    "tests/core/test_conditions.py::test_kstatus_of_every_phase[verifying]": "Verifying",
    "tests/core/test_baselines.py::"
    "test_while_a_baseline_trains_its_stage_says_so": "WaitsForBaseline",
    "tests/core/test_baselines.py::test_a_baseline_that_fails_holds_its_stage": "BaselineFailed",
    "tests/core/test_gate.py::"
    "test_a_miss_holds_the_stages_after_it[True]": "GateMissed WaitsForGate",
    "tests/core/test_gate.py::"
    "test_an_unmeasured_stage_holds_and_is_not_taken_for_missed[True]": "GateUnmeasured",
    "tests/core/test_relax.py::test_a_round_is_told": "GateRelaxed",
    "tests/core/test_measure.py::"
    "test_an_evaluation_that_was_added_is_measured_on_all_stages_the_smallest_first": "AllMeasured",
    "tests/core/test_measure.py::"
    "test_a_suspended_chain_measures_nothing_and_its_job_is_deleted": "MeasureWaits",
    "tests/core/test_measure.py::"
    "test_a_failure_is_told_holds_nothing_back_and_is_measured_again_by_a_retry": "MeasureFailed",
    "tests/core/test_measure.py::test_a_finished_chain_measures_nothing_unasked": "Unmeasured",
    "tests/operator/test_measuring.py::"
    "test_an_added_evaluation_is_measured_without_training": "Measuring StageMeasured",
    "tests/operator/test_measuring.py::"
    "test_one_that_hangs_ends_at_its_deadline_until_a_retry[Failed]": "MeasureDeadline",
    "tests/operator/test_measuring.py::"
    "test_a_refusal_is_told_and_the_next_try_goes_on[create]": "MeasureRefused",
    "tests/core/test_nodes.py::test_the_reason_if_only_avoided_nodes_are_left": "NodesAvoided",
    "tests/core/test_waits.py::test_a_check_comes_before_the_next_one[_end]": "Killed",
    "tests/core/test_waits.py::test_a_check_comes_before_the_next_one[_stop_for_retry]": "Resumes",
    "tests/core/test_waits.py::test_each_wait[a claim]": "MakesClaim",
    "tests/core/test_waits.py::test_each_wait[a finished chain]": "NoArtifact",
    "tests/core/test_waits.py::test_each_wait[a share that no chain has]": "TakesShare",
    "tests/core/test_waits.py::test_each_wait[two nodes that failed alike]": "SameDeviceError",
    "tests/operator/test_events.py::"
    "test_the_event_of_a_stages_situation[stage0-StageStalled]": "StageStalled",
    "tests/operator/test_events.py::"
    "test_the_event_of_a_stages_situation[stage1-StageStopping]": "StageStopping",
    "tests/operator/test_events.py::"
    "test_the_event_of_a_stages_situation[stage2-StageRetrying]": "StageRetrying",
    "tests/operator/test_events.py::"
    "test_the_event_of_a_stages_situation[stage4-ProgressUnknown]": "ProgressUnknown",
    "tests/operator/test_events.py::test_the_event_of_a_state[Failed]": "StageFailed",
    "tests/operator/test_events.py::test_the_event_of_a_state[Indexing]": "StageIndexing",
    "tests/operator/test_events.py::test_the_event_of_a_state[Pending]": "StagePending",
    "tests/operator/test_events.py::test_the_event_of_a_state[Queued]": "StageQueued",
    "tests/operator/test_events.py::test_the_event_of_a_state[Running]": "StageRunning",
    "tests/operator/test_events.py::test_the_event_of_a_state[Starting]": "StageStarting",
    "tests/operator/test_events.py::test_the_event_of_a_state[Succeeded]": "StageSucceeded",
    "tests/operator/test_events.py::test_the_event_of_a_state[Suspended]": "StageSuspended",
    "tests/operator/test_events.py::test_the_event_of_a_state[Verifying]": "StageVerifying",
    "tests/operator/test_evidence.py::test_pods_that_are_still_to_be_created": "PodsMissing",
    "tests/operator/test_evidence.py::test_times_and_gpus": "Unschedulable",
    "tests/operator/test_evidence.py::test_what_an_attempt_waits_for[gated]": "SchedulingGated",
    "tests/operator/test_evidence.py::test_what_an_attempt_waits_for[going]": "PodsEnding",
    "tests/operator/test_evidence.py::test_what_an_attempt_waits_for[just made]": "Starting",
    "tests/operator/test_evidence.py::test_what_an_attempt_waits_for[root]": "Image",
    "tests/operator/test_explain.py::test_a_lease_that_was_given_back": "NoOperator",
    "tests/operator/test_explain.py::test_a_name_is_not_read_as_a_cause": "Init",
    "tests/operator/test_explain.py::test_a_node_that_does_not_answer": "NodeLost",
    "tests/operator/test_explain.py::test_a_pod_waits_for_a_missing_claim": "ClaimMissing",
    "tests/operator/test_explain.py::test_a_pod_waits_for_an_unbound_claim[Lost]": "ClaimLost",
    "tests/operator/test_explain.py::"
    "test_a_pod_waits_for_an_unbound_claim[Pending]": "ClaimPending",
    "tests/operator/test_explain.py::test_a_recent_change": "NotSeenYet",
    "tests/operator/test_explain.py::test_an_operator_that_does_not_reconcile": "NotSeen",
    "tests/operator/test_explain.py::test_back_off": "BackOff",
    "tests/operator/test_explain.py::test_complete": "Complete",
    "tests/operator/test_explain.py::test_deleting": "Deleting",
    "tests/operator/test_explain.py::test_no_controller_creates_pods": "NoPods",
    "tests/operator/test_explain.py::test_pods_that_are_refused": "PodsForbidden",
    "tests/operator/test_explain.py::"
    "test_queued[queue0-KueueMissing-Kueue is not installed-kubectl get "
    "crd localqueues.kueue.x-k8s.io]": "KueueMissing",
    "tests/operator/test_explain.py::"
    "test_queued[queue1-LocalQueueMissing-no LocalQueue q-kubectl get "
    "localqueues -n team]": "LocalQueueMissing",
    "tests/operator/test_explain.py::"
    "test_queued[queue2-NoWorkload-integrations.frameworks-kubectl get "
    "configmap kueue-manager-config -n kueue-system -o yaml]": "NoWorkload",
    "tests/operator/test_explain.py::"
    "test_queued[queue3-QueueInactive-takes nothing in: stopped-kubectl "
    "describe localqueue q -n team]": "QueueInactive",
    "tests/operator/test_explain.py::test_running": "Running",
    "tests/operator/test_explain.py::test_stopping": "Stopping",
    "tests/operator/test_explain.py::test_suspended": "Suspended",
    "tests/operator/test_explain.py::test_the_lease_that_was_renewed_last_counts": "InProgress",
    "tests/operator/test_explain.py::test_workloads_that_the_user_may_not_read": "Queued",
    "tests/operator/test_index_job.py::"
    "test_nothing_is_launched_before_the_data_is_indexed": "Indexing",
    "tests/operator/test_index_job.py::test_out_of_memory_names_the_limit": "IndexFailed",
    "tests/operator/test_made_jobs.py::"
    "test_a_claim_that_is_gone_when_a_job_is_to_be_made": "LaunchRefused",
    "tests/operator/test_made_jobs.py::"
    "test_a_later_stage_that_cannot_be_made_is_said_before_the_first_is_l"
    "aunched": "InvalidSpec",
    "tests/operator/test_names.py::"
    "test_a_job_that_goes_with_its_deleted_chain_is_waited_for": "NameGoing",
    "tests/operator/test_names.py::test_a_job_that_is_no_chains_is_passed_over": "NameTaken",
    "tests/operator/test_names.py::"
    "test_a_verify_job_goes_with_the_job_it_belongs_to": "ArtifactMissing",
    "tests/operator/test_names.py::"
    "test_an_orphaned_job_of_other_inputs_is_named_as_well": "OrphanedJob",
    "tests/operator/test_obstacles.py::test_a_claim_of_another_chain_is_not_taken": "ClaimTaken",
    "tests/operator/test_obstacles.py::test_a_kind_of_job_that_is_not_installed": "RunnerMissing",
    "tests/operator/test_obstacles.py::"
    "test_the_job_that_fills_the_data[Failed-DataFailed-True]": "DataFailed",
    "tests/operator/test_obstacles.py::"
    "test_the_job_that_fills_the_data[Suspended-DataLoading-False]": "DataLoading",
    "tests/operator/test_passes.py::"
    "test_a_chain_goes_on_once_its_status_can_be_read_again": "StatusUnreadable",
    "tests/operator/test_records.py::"
    "test_a_record_under_another_records_name_is_a_conflict": "DigestConflict",
    "tests/operator/test_records.py::"
    "test_only_rivals_on_the_same_claim_are_waited_for": "SharedStage",
    "tests/operator/test_refusals.py::"
    "test_a_refused_delete_does_not_revive_a_failed_stage": "DeleteRefused",
    "tests/operator/test_refusals.py::test_a_refused_status_is_an_event": "StatusRefused",
    "tests/operator/test_refusals.py::test_explain_has_the_servers_words[claim]": "ClaimRefused",
    "tests/operator/test_refusals.py::"
    "test_explain_has_the_servers_words[index Job]": "IndexRefused",
    "tests/operator/test_refusals.py::test_explain_has_the_servers_words[record]": "RecordRefused",
    "tests/operator/test_refusals.py::"
    "test_explain_has_the_servers_words[release into a queue]": "ReleaseRefused",
    "tests/operator/test_refusals.py::"
    "test_explain_has_the_servers_words[release without a queue]": "QueueRequired",
    "tests/operator/test_refusals.py::test_explain_has_the_servers_words[share]": "ShareRefused",
    "tests/operator/test_refusals.py::"
    "test_explain_has_the_servers_words[verify Job]": "VerifyRefused",
    "tests/operator/test_sidecars.py::"
    "test_a_verify_job_beside_a_sidecar_without_an_answer": "VerifyUnanswered",
    "tests/operator/test_sidecars.py::"
    "test_an_eviction_by_the_queue_is_no_end": "SuspendedByAnother",
}


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    """Refuse a file of `TESTS` that lacks one of its tests, if whole files are collected."""
    found = {item.nodeid for item in items}
    files = {name.partition("::")[0] for name in found}
    lost = [test for test in TESTS if test.partition("::")[0] in files and test not in found]
    if lost and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"tests/core/produced.py names tests that do not exist: {lost}")
    yield


@pytest.fixture(autouse=True)
def _produces_its_codes(request: pytest.FixtureRequest) -> Iterator[None]:
    expected = set(TESTS.get(request.node.nodeid, "").split())
    if not expected:
        yield
        return
    with watched() as seen:
        yield
    assert expected <= seen, f"not produced: {expected - seen}; see tests/core/produced.py"


@contextmanager
def watched() -> Iterator[set[str]]:
    """The codes that the project's code decides on in the block."""
    from modelchain.api.reasons import Reason
    from modelchain.decide import conditions
    from modelchain_operator.explain import explain
    from modelchain_operator.reconcile import controller

    seen: set[str] = set()
    make, conditions_of = Reason.__init__, conditions._conditions
    say, build, news = explain._Case._say, controller.Controller.__init__, controller.news

    def made(self: Reason, code: Any, *rest: Any, **more: Any) -> None:
        if sys._getframe(1).f_code.co_filename.startswith(OURS):
            seen.add(str(code))
        make(self, code, *rest, **more)

    def with_conditions(chain: Any, old: Any, stages: Any, now: float) -> Any:
        found = conditions_of(chain, old, stages, now)
        seen.update({one.reason for one in found} - _codes_of(stages))
        return found

    def said(self: Any, code: str, *rest: Any) -> Any:
        stalled = self.status.condition("Stalled")
        seen.update({str(code)} - _codes_of(self.status.stages) - {stalled and stalled.reason})
        return say(self, code, *rest)

    def told(stage: Any) -> Any:
        seen.add(str(news(stage)))
        return news(stage)

    def built(self: Any, kube: Any, events: Any, *rest: Any, **more: Any) -> None:
        build(self, kube, _Listening(events, seen), *rest, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reason, "__init__", made)
        patch.setattr(conditions, "_conditions", with_conditions)
        patch.setattr(explain._Case, "_say", said)
        patch.setattr(controller, "news", told)
        patch.setattr(controller.Controller, "__init__", built)
        yield seen


def _codes_of(stages: Any) -> set[str]:
    """The codes that the stages have already, and that others only pass on."""
    return {str(code) for stage in stages for code in (stage.reason_code, stage.code)}


class _Listening:
    """The events of a controller; `seen` gets their codes."""

    def __init__(self, events: Any, seen: set[str]):
        self._events, self._seen = events, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._events, name)

    def tell(self, chain: Any, kind: Any, code: str, message: str) -> None:
        self._seen.add(str(code))
        self._events.tell(chain, kind, code, message)
