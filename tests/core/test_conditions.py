"""Conditions as kstatus reads them, the one-line summary, and the size limit of a status."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from specs import config, inline, with_changes

from modelchain.api.contracts import FailureClass, Progress
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import ModelChain
from modelchain.api.status import (
    AttemptStatus,
    ChainStatus,
    Condition,
    PodTime,
    Spent,
    StageLedger,
    StageStatus,
    State,
)
from modelchain.api.uses import Uses
from modelchain.decide.conditions import MAX_BYTES, completed, refused, sentence, unreadable
from modelchain.decide.transitions import explained
from modelchain.io.table import stages_table

NOW = 1_700_000_000.0
EVALUATION = {"name": "top1", "kind": "Retrieval", "shards": "/data/val.tar"}


def chain(stages: int = 2, generation: int = 3, **changes: Any) -> ModelChain:
    shapes = (config() for _ in range(stages))
    meta = {"name": "family", "namespace": "team", "generation": generation}
    return ModelChain.model_validate(with_changes(inline(*shapes, metadata=meta, **changes)))


def status(
    *stages: StageStatus, before: ChainStatus | None = None, now: float = NOW
) -> ChainStatus:
    return completed(chain(len(stages)), before or ChainStatus(), list(stages), None, now)


def stage(name: str, state: State, reason: Reason | str = "why", **more: Any) -> StageStatus:
    """A stage as `decide` writes it: the text of a reason with its code beside it."""
    one = StageStatus(name=name, state=state, **more)
    if isinstance(reason, str):
        return one.changed(reason=reason)
    return explained(one, reason)


def kstatus(generation: int, status: ChainStatus) -> str:
    """What kstatus (`sigs.k8s.io/cli-utils/pkg/kstatus`) computes for any custom resource: an old
    observedGeneration is InProgress, Stalled is Failed, Reconciling is InProgress, and Ready must
    not be false.
    """
    if status.observed_generation != generation:
        return "InProgress"
    for condition in status.conditions:  # the first in list order decides
        if condition.type == "Stalled" and condition.status == "True":
            return "Failed"
        if condition.type == "Reconciling" and condition.status == "True":
            return "InProgress"
    ready = status.condition("Ready")
    return "InProgress" if ready and ready.status != "True" else "Current"


DONE = stage("a", State.SUCCEEDED)
PHASES: dict[str, tuple[StageStatus, str, str]] = {
    "pending": (stage("b", State.PENDING), "InProgress", "Pending"),
    "waits to try again": (
        stage("b", State.PENDING, Reason(Code.ERROR, message="it broke; tries again")),
        "InProgress",
        "Error",
    ),
    "queued": (
        stage("b", State.QUEUED, Reason(Code.QUEUED, message="waits for its turn")),
        "InProgress",
        "Queued",
    ),
    "shared": (
        stage("b", State.QUEUED, Reason(Code.SHARED_STAGE, message="chain x trains it")),
        "InProgress",
        "SharedStage",
    ),
    "starting": (
        stage("b", State.STARTING, Reason(Code.MISS, message="never trained")),
        "InProgress",
        "Starting",
    ),
    "refused, but that may pass": (
        stage("b", State.STARTING, Reason(Code.LAUNCH_REFUSED, message="403 quota")),
        "InProgress",
        "LaunchRefused",
    ),
    "running": (stage("b", State.RUNNING), "InProgress", "Running"),
    "verifying": (stage("b", State.VERIFYING), "InProgress", "Verifying"),
    "failed": (
        stage("b", State.FAILED, Reason(Code.OUT_OF_MEMORY, message="limit 8Gi")),
        "Failed",
        "OutOfMemory",
    ),
    "blocked": (
        stage("b", State.STARTING, Reason(Code.NAME_TAKEN, message="by another"), stalled=True),
        "Failed",
        "NameTaken",
    ),
    "complete": (stage("b", State.SUCCEEDED), "Current", ""),
    "suspended": (stage("b", State.SUSPENDED, "spec.suspend is true"), "Current", ""),
}


@pytest.mark.parametrize("phase", PHASES)
def test_kstatus_of_every_phase(phase: str) -> None:
    last, verdict, reason = PHASES[phase]
    found = status(DONE, last)
    assert kstatus(3, found) == verdict
    assert kstatus(4, found) == "InProgress", "no pass has seen the edit yet"
    said = found.condition("Stalled") or found.condition("Reconciling")
    assert (said.reason if said else "") == reason
    assert (found.condition("Ready") is None) == (phase == "suspended")
    assert [found.is_true(kind) for kind in ("Complete", "Failed", "Suspended")] == [
        phase == kind for kind in ("complete", "failed", "suspended")
    ]
    assert found.is_true("Finished") == (phase in ("complete", "failed"))
    assert found.is_true("Admitted")


def test_a_status_that_was_never_written_is_not_current() -> None:
    assert kstatus(1, ChainStatus()) == "InProgress"


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(State), st.booleans()), min_size=1, max_size=5))
def test_conditions_never_contradict_each_other(stages: list[tuple[State, bool]]) -> None:
    ended = (State.SUCCEEDED, State.FAILED)  # such a stage waits for nothing
    found = status(
        *(
            stage("abcde"[i], state, stalled=stalled and state not in ended)
            for i, (state, stalled) in enumerate(stages)
        )
    )
    kinds = [c.type for c in found.conditions]
    assert len(set(kinds)) == len(kinds) and not {"Stalled", "Reconciling"} <= set(kinds)
    assert all(
        c.reason and c.reason.isalnum() and c.message and c.observed_generation == 3
        for c in found.conditions
    )
    assert sum(found.is_true(kind) for kind in ("Complete", "Failed")) <= 1
    if found.is_true("Ready"):
        assert found.is_true("Complete") and kstatus(3, found) == "Current"


@pytest.mark.parametrize(
    ("last", "reason", "says"),
    [
        (stage("b", State.FAILED, Reason(Code.ERROR, message="it broke")), "StageFailed", "broke"),
        (
            stage("b", State.PENDING, Reason(Code.CLAIM_MISSING, message="no claim"), stalled=True),
            "Blocked",
            "no claim",
        ),
        (stage("b", State.SUSPENDED, "spec.suspend is true"), "Stopped", "spec.suspend is true"),
        (stage("b", State.RUNNING), "InProgress", "1 of 2 stages have finished"),
        (stage("b", State.SUCCEEDED), "AllStagesFinished", "2 of 2 stages have finished"),
    ],
)
def test_complete_says_why_a_chain_is_not(last: StageStatus, reason: str, says: str) -> None:
    found = status(DONE, last).condition("Complete")
    assert found is not None and found.reason == reason and says in found.message
    assert found.message.startswith(f"{1 + (reason == 'AllStagesFinished')} of 2 stages")


NEWER = {
    "observedGeneration": 2,
    "stages": [{"name": "a", "gate": {"verdict": "Passed"}}],
    "conditions": [
        {"type": "Reconciling", "status": "True", "reason": "Running", "message": "b trains"},
        {
            "type": "Ready",
            "status": "False",
            "reason": "InProgress",
            "message": "1 of 2",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
            "observedGeneration": 2,
        },
        {"type": "Admitted", "status": "True", "reason": "Planned", "owner": "a newer version"},
    ],
    "gates": {"a": 1},
}


def test_a_status_of_another_version_gets_conditions_and_keeps_all_else() -> None:
    found = unreadable(NEWER, 3, "stages.0.gate cannot be read", NOW)
    assert {**found, "conditions": []} == {**NEWER, "conditions": []}
    stalled, ready, admitted = found["conditions"]
    assert (stalled["type"], stalled["status"], stalled["reason"]) == (
        "Stalled",
        "True",
        "StatusUnreadable",
    )
    assert stalled["message"] == ready["message"] == "stages.0.gate cannot be read"
    assert ready["lastTransitionTime"] == "2026-01-01T00:00:00Z" and ready["status"] == "False"
    assert admitted == NEWER["conditions"][2]  # type: ignore[index]
    assert unreadable(found, 3, "stages.0.gate cannot be read", NOW + 60) == found, "written once"
    assert unreadable({"stages": 5}, 3, "x" * 9999, NOW)["conditions"]


def test_times_change_only_with_the_status() -> None:
    first = status(DONE, stage("b", State.RUNNING))
    later = status(DONE, stage("b", State.RUNNING, "another reason"), before=first, now=NOW + 60)
    assert [c.last_transition_time for c in later.conditions] == [
        c.last_transition_time for c in first.conditions
    ]
    ended = status(DONE, stage("b", State.SUCCEEDED), before=later, now=NOW + 120)
    changed = {
        c.type
        for c in ended.conditions
        if c.last_transition_time != first.conditions[0].last_transition_time
    }
    assert changed == {"Ready", "Complete", "Finished", "Measured"}


def test_a_refused_spec_fails_at_once_and_keeps_the_stages() -> None:
    before = status(DONE, stage("b", State.RUNNING))
    found = refused(before, 4, "spec.stages[0]: no", NOW + 60)
    assert kstatus(4, found) == "Failed" and found.stages == before.stages
    assert (
        found.condition("Reconciling") is None
        and found.condition("Stalled").message == "spec.stages[0]: no"
    )  # type: ignore[union-attr]
    assert refused(found, 4, "spec.stages[0]: no", NOW + 120) == found, (
        "the refusal is written once"
    )
    mended = completed(chain(), found, before.stages, None, NOW + 180)
    assert kstatus(3, mended) == "InProgress" and mended.condition("Stalled") is None


def test_a_complete_chain_whose_spec_is_refused_is_not_complete() -> None:
    """The stages that finished are not those of the spec now. They stay in the status, and nothing
    starts by itself.
    """
    before = status(DONE)
    assert before.is_true("Complete") and before.is_true("Finished")
    found = refused(before, 4, "spec.stages[0]: no", NOW + 60)
    for kind in ("Complete", "Finished"):
        condition = found.condition(kind)
        assert condition is not None and (condition.status, condition.reason) == (
            "False",
            "InvalidSpec",
        )
    assert found.stages == before.stages and found.is_over(1)
    assert refused(found, 4, "spec.stages[0]: no", NOW + 120) == found, (
        "the refusal is written once"
    )
    mended = completed(chain(), found, before.stages, None, NOW + 180)
    assert mended.is_true("Complete")


@pytest.mark.parametrize("length", [10, 5000])
def test_texts_of_any_length_fit_the_crd(length: int) -> None:
    """Both ends of a long text stay: the beginning has the reason's code, and the end what the API
    server or a webhook said last.
    """
    text = "policy says no; " * length + "the end"
    reason = Reason(Code.LAUNCH_REFUSED, message=text)
    failed = AttemptStatus(
        name="family-a-a1", number=1, input_digest="d", state=State.FAILED, message=text
    )
    one = stage("a", State.STARTING, reason, stalled=True, attempts=[failed])
    found = status(one)
    assert len(found.stages[0].reason) <= 2000 and len(found.stages[0].attempts[0].message) <= 512
    assert all(len(condition.message) < 4096 for condition in found.conditions)
    assert found.stages[0].reason.startswith("LaunchRefused: ") and found.stages[0].reason.endswith(
        "the end"
    )
    assert completed(chain(1), found, found.stages, None, NOW) == found
    assert len(refused(found, 4, text, NOW).condition("Stalled").message) < 4096  # type: ignore[union-attr]


def test_summary() -> None:
    at = Progress(step=29, steps=100, samples_per_second=1.0, eta_seconds=60.0)
    measured = stage("a", State.SUCCEEDED, results={"coco/R@5": "70.00", "top1": "41.20"})
    spec = chain(2, **{"spec.evaluation": [EVALUATION]})
    running = completed(
        spec, ChainStatus(), [measured, stage("b", State.RUNNING, progress=at)], None, NOW
    ).summary
    assert (running.stage, running.state, running.progress, running.accuracy) == (
        "2/2",
        "Running",
        "29%",
        "41.20",
    )
    blocked = status(DONE, stage("b", State.QUEUED, stalled=True)).summary
    assert (blocked.stage, blocked.state, blocked.progress, blocked.accuracy) == (
        "2/2",
        "Stalled",
        "",
        "",
    )
    done = status(DONE, stage("b", State.SUCCEEDED)).summary
    assert (done.stage, done.state, done.progress) == ("2/2", "Complete", "100%")


def test_a_status_of_32_stages_with_long_histories_is_bounded() -> None:
    attempts = [
        AttemptStatus(
            name=f"{'f' * 24}-{'s' * 16}-a{n}",
            number=n,
            input_digest="0" * 64,
            state=State.FAILED,
            failure=FailureClass.CORRUPT_PREDECESSOR,
            message="é" * 512,
            uid="u" * 36,
            macs=10**21,
            cost="12345.67",
            started_at="2026-01-01T00:00:00Z",
            finished_at="2026-01-01T00:00:00Z",
            gone=Spent(seconds=1234567.891),
        )
        for n in range(1, 11)
    ]
    running = attempts[-1].model_copy(
        update={
            "finished_at": None,
            "pods": {f"{n:036}": PodTime(started=1e9 + n, gpus=8) for n in range(64)},
        }
    )
    used = Uses(lost=10**12)
    spent = Spent(
        macs=10**22, gpu_seconds=1e9, gpu_milliseconds=used, seconds=1e8, cost="123456.78"
    )
    stages = [
        stage(
            f"stage-{n:010}",
            State.FAILED,
            "é" * 512,
            attempts=[*attempts[:-1], running] if n == 31 else attempts,
            input_digest="0" * 64,
            last_digest="1" * 64,
            spent=spent,
            macs=10**22,
            results={"top1": "41.20"},
        )
        for n in range(32)
    ]
    found = completed(chain(8), ChainStatus(), stages, None, NOW)
    size = len(found.model_dump_json(by_alias=True, exclude_none=True).encode())
    assert size < 64 * 1024 and size <= MAX_BYTES
    assert [s.spent for s in found.stages] == [spent] * 32, "the ledger stays whole"
    assert all(s.attempts and s.attempts[-1].number == 10 for s in found.stages), (
        "the newest attempt stays"
    )
    again = completed(chain(8), found, found.stages, None, NOW)
    assert completed(chain(8), again, again.stages, None, NOW) == again, (
        "a status that was shortened is not shortened further"
    )


RETRY, EDIT = "modelchain retry family -n team", "kubectl edit mchain family -n team"
PVCS = "kubectl get pvc -n team"


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        (Reason(Code.ERROR, message="it broke"), f"Error: it broke; next: {RETRY}"),
        (Reason(Code.USER_ERROR, message="no"), f"UserError: no; next: {EDIT}"),
        (Reason(Code.CLAIM_MISSING, message="none"), f"ClaimMissing: none; next: {PVCS}"),
        (Reason(Code.ERROR, "", "no", "kubectl x"), "Error: no; next: kubectl x"),
        (Reason(Code.ERROR, message=f"so type: {RETRY}"), f"Error: so type: {RETRY}"),
        (Reason(Code.ERROR, "", "no", "kubectl x", "look"), "Error: no; look: kubectl x"),
    ],
    ids=["retry", "edit", "get", "the reason's own", "named already", "shown already"],
)
@pytest.mark.parametrize("state", [State.PENDING, State.FAILED])
def test_who_has_to_act_is_told_the_next_command(reason: Reason, says: str, state: State) -> None:
    """Once, and it is the reason's own: not every failure is mended by a retry."""
    found = status(DONE, stage("b", state, reason, stalled=state is State.PENDING))
    kinds = ("Stalled", "Ready", "Complete", *(("Failed",) if state is State.FAILED else ()))
    for kind in kinds:
        condition: Condition | None = found.condition(kind)
        assert condition is not None and "stage b: " in condition.message
        assert condition.message.endswith(says)
        assert condition.message.count(found.stages[1].next) == 1


def test_a_failure_of_a_status_without_commands_gets_the_command_of_its_code() -> None:
    one = StageStatus(name="b", state=State.FAILED, reason="NonFinite: no", reason_code="NonFinite")
    found = status(DONE, one).condition("Failed")
    assert found is not None and found.message.endswith(f"; next: {EDIT}")


def test_on_a_laptop_no_command_of_a_cluster_is_told() -> None:
    spec, failed = chain(2), stage("b", State.FAILED, Reason(Code.ERROR, message="it broke"))
    here = spec.model_copy(
        update={"metadata": spec.metadata.model_copy(update={"namespace": None})}
    )
    found = completed(here, ChainStatus(), [DONE, failed], None, NOW).condition("Failed")
    assert found is not None and found.message == "stage b: Error: it broke"


def test_the_table_says_what_a_stage_did_and_not_what_was_in_the_cache() -> None:
    stages = [
        stage("a", State.SUCCEEDED, Reason(Code.MISS, message="never trained", never_trained=True)),
        stage("b", State.RUNNING, Reason(Code.MISS, message="epochs changed")),
    ]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(stages_table("family", ChainStatus(stages=stages)))
    text = console.export_text()
    assert (
        "stage a was trained\n" in text
        and "stage b trains (epochs changed)\n" in text
        and "Miss" not in text
    )


@pytest.mark.parametrize(
    ("state", "first", "changed"),
    [
        (State.RUNNING, "trains (never trained)", "trains (epochs changed)"),
        (
            State.VERIFYING,
            "was trained, and its artifact is checked",
            "was trained, and its artifact is checked (epochs changed)",
        ),
        (State.SUCCEEDED, "was trained", "was trained (epochs changed)"),
    ],
)
def test_what_was_trained_is_not_said_to_be_never_trained(
    state: State, first: str, changed: str
) -> None:
    miss = Reason(Code.MISS, message="never trained", never_trained=True)
    assert sentence(stage("b", state, miss)) == f"stage b {first}"
    edited = Reason(Code.MISS, message="epochs changed")
    assert sentence(stage("b", state, edited)) == f"stage b {changed}"


def test_the_table_says_what_removed_stages_have_spent() -> None:
    removed = [StageLedger(name="", macs=10**12), StageLedger(name="b", macs=2 * 10**12)]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(stages_table("family", ChainStatus(stages=[DONE], removed=removed)))
    assert "removed stages spent 3.00 T MACs: others, b\n" in console.export_text()


def test_a_table_says_that_an_earlier_attempt_stops_first() -> None:
    """The command is left out of a table's sentence, but not what the stage waits for."""
    reason = Reason(Code.PREEMPTED, "b-a1", "it was evicted", "kubectl x", "see", stops_first=True)
    stage = explained(StageStatus(name="b"), reason)
    assert sentence(stage, command=False).endswith(
        "it was evicted; waits for an earlier attempt to stop"
    )
    assert stage.cause == "it was evicted"


def test_the_reason_of_an_older_version_is_shown_whole() -> None:
    """Such a status has no message. Its reason is not taken apart, neither in a table nor for a
    person who asks for the cause.
    """
    old = StageStatus(name="b", reason="Miss: never trained; see: x", reason_code="Miss", next="x")
    assert old.cause == old.without_command == old.reason
    assert sentence(old, command=False) == f"stage b: {old.reason}"
    newer = old.changed(reason_code="OfALaterVersion", message="never trained")
    assert newer.without_command == old.reason, "this version does not know how it is made"
