"""How an ended attempt is judged, and which deadline a running attempt has missed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from modelchain.api.contracts import FailureClass as F
from modelchain.api.contracts import LastWord, Progress
from modelchain.api.faults import LAUNCH_FAILURE
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import Deadlines, Retry
from modelchain.api.status import AttemptStatus, PodTime, Spent, StageStatus, State
from modelchain.decide.observed import Contact, Seen
from modelchain.decide.verdict import deadline, judge, progress_unknown

LIMITS = Retry(maxRetries=1, maxDisruptions=2)
DEADLINES = Deadlines(startSeconds=100, stallSeconds=50, stageSeconds=1000)
WITHOUT_LIMIT = Deadlines(startSeconds=100, stallSeconds=50)
GONE = Seen(live=False, started=True)
CAUSES = [f for f in F if not f.permanent]


def attempt(**more: Any) -> AttemptStatus:
    return AttemptStatus(
        name="family-a-a1", number=1, input_digest="d", **{"state": State.RUNNING, **more}
    )


def failed(failure: F, **more: Any) -> Seen:
    return Seen(
        live=False,
        started=True,
        word=LastWord(result="Failed", failure=failure, message="why", **more),
    )


def running(**more: Any) -> Seen:
    return Seen(live=True, started=True, running=True, **more)


def stepped(step: int) -> StageStatus:
    return StageStatus(
        name="a", progress=Progress(step=step, steps=100, samples_per_second=1.0, eta_seconds=1.0)
    )


@pytest.mark.parametrize("failure", F)
def test_which_budget_a_failure_charges(failure: F) -> None:
    verdict = judge(
        LIMITS, StageStatus(name="a"), attempt(), failed(failure, checkpoint_step=5), False
    )
    assert (verdict.failure, verdict.message, verdict.stopped) == (failure, "why", False)
    assert (verdict.disruptions, verdict.retries) == ((1, 0) if failure.disruption else (0, 1))
    assert (verdict.final is not None) == failure.permanent and verdict.checkpoint_step == 5


@pytest.mark.parametrize("failure", [f for f in F if f.disruption])
def test_a_disruption_without_a_newer_checkpoint_charges_a_retry_too(failure: F) -> None:
    before = StageStatus(name="a", checkpoint_step=5)
    verdict = judge(LIMITS, before, attempt(), failed(failure, checkpoint_step=5), False)
    assert (verdict.disruptions, verdict.retries) == (1, 1)
    assert verdict.pays_retry and not verdict.advanced, "the next attempt waits as after a failure"


@pytest.mark.parametrize("failure", CAUSES)
def test_a_verdict_says_whether_a_retry_was_charged_and_progress_was_made(failure: F) -> None:
    for step in (5, 6):
        verdict = judge(
            LIMITS,
            StageStatus(name="a", checkpoint_step=5),
            attempt(),
            failed(failure, checkpoint_step=step),
            False,
        )
        assert verdict.pays_retry is (verdict.retries == 1) and verdict.advanced is (step == 6)


def test_only_the_first_launch_failure_is_blamed_on_the_device() -> None:
    """The second one is blamed on the program, because a wrong kernel fails on every node."""
    word = LastWord(
        result="Failed",
        failure=F.HARDWARE,
        message="unspecified launch failure",
        node="n1",
        fault=LAUNCH_FAILURE,
    )
    seen = Seen(live=False, started=True, word=word, bad_nodes={"n1": LAUNCH_FAILURE})
    assert judge(LIMITS, StageStatus(name="a"), attempt(), seen, False).failure is F.HARDWARE
    before = AttemptStatus(
        name="family-a-a0", number=0, input_digest="d", state=State.FAILED, fault=LAUNCH_FAILURE
    )
    stage = StageStatus(name="a", attempts=[before, attempt()])
    again = judge(LIMITS, stage, attempt(), seen, False)
    assert again.failure is F.ERROR and not again.failure.disruption
    other = replace(seen, bad_nodes={"n1": "EccError"})
    assert (
        judge(
            LIMITS, StageStatus(name="a", attempts=[before, attempt()]), attempt(), other, False
        ).failure
        is F.HARDWARE
    )


@pytest.mark.parametrize("failure", CAUSES)
def test_a_failure_beyond_its_budget_is_final(failure: F) -> None:
    before = StageStatus(name="a", retries=1, disruptions=2)
    verdict = judge(LIMITS, before, attempt(), failed(failure, checkpoint_step=5), False)
    field = "spec.retry.maxDisruptions" if failure.disruption else "spec.retry.maxRetries"
    assert verdict.final is not None and verdict.final.startswith("why") and field in verdict.final


@pytest.mark.parametrize("failure", F)
@pytest.mark.parametrize("how", ["suspended chain", "asked to stop"])
def test_an_attempt_that_was_stopped_charges_no_budget(failure: F, how: str) -> None:
    stopping = how == "suspended chain"
    one = attempt(state=State.RUNNING if stopping else State.SUSPENDED)
    verdict = judge(LIMITS, StageStatus(name="a"), one, failed(failure), stopping)
    assert verdict.stopped == failure.disruption
    if verdict.stopped:
        assert (verdict.retries, verdict.disruptions, verdict.final) == (0, 0, None)


def test_an_attempt_ended_for_a_deadline_is_charged_even_while_the_chain_is_suspended() -> None:
    one = attempt(state=State.SUSPENDED, ending=F.START_DEADLINE, message="no first step")
    verdict = judge(LIMITS, StageStatus(name="a"), one, failed(F.PREEMPTED), True)
    assert (verdict.failure, verdict.message, verdict.stopped) == (
        F.START_DEADLINE,
        "no first step",
        False,
    )
    assert (verdict.retries, verdict.disruptions) == (1, 1)


@pytest.mark.parametrize(
    ("seen", "failure"),
    [
        (GONE, F.KILLED),
        (Seen(live=False, started=True, evidence=(F.OUT_OF_MEMORY, "limit: 8Gi")), F.OUT_OF_MEMORY),
        (
            Seen(
                live=False,
                started=True,
                word=LastWord(result="Failed"),
                evidence=(F.NODE_LOST, "n"),
            ),
            F.ERROR,
        ),
        (
            Seen(live=False, started=True, word=LastWord(result="Succeeded", manifest_digest="m")),
            F.NO_ARTIFACT,
        ),
        (
            Seen(live=False, started=True, verify=LastWord(result="Failed", failure=F.NO_ARTIFACT)),
            F.NO_ARTIFACT,
        ),
    ],
    ids=[
        "nothing is known",
        "its pods know",
        "its own word first",
        "a success that left nothing",
        "verify said absent",
    ],
)
def test_the_cause_of_an_end(seen: Seen, failure: F) -> None:
    assert judge(LIMITS, StageStatus(name="a"), attempt(), seen, False).failure is failure


def test_no_deadline_without_pods() -> None:
    assert (
        deadline(
            DEADLINES,
            StageStatus(name="a"),
            attempt(),
            Seen(live=True, started=True, queued=True),
            1e9,
        )
        is None
    )


def test_the_start_deadline_counts_from_the_first_running_pod() -> None:
    pods = {"w": PodTime(started=1030.0), "m": PodTime(started=1000.0, first=True)}
    seen = running(pods=pods)
    assert deadline(DEADLINES, StageStatus(name="a"), attempt(), seen, 1040.0) == 60.0
    for seen in (
        running(pods=pods, contact=Contact(answered=1100.0)),
        running(pods=pods, waiting=Reason(Code.STARTING, message="1 of 2 pods run")),
    ):
        late = deadline(DEADLINES, StageStatus(name="a"), attempt(), seen, 1100.0)
        assert (
            isinstance(late, tuple)
            and late[0] is F.START_DEADLINE
            and "spec.deadlines.startSeconds" in late[1]
        )


def test_a_restart_by_the_queue_restarts_the_start_deadline() -> None:
    pods = {
        "old": PodTime(started=0.0, finished=50.0, first=True),
        "new": PodTime(started=1000.0, first=True),
    }
    one = attempt(stepped_at=40.0)
    assert deadline(DEADLINES, stepped(3), one, running(pods=pods), 1010.0) == 90.0


def test_a_stall_counts_from_the_last_step() -> None:
    seen, one = running(pods={"m": PodTime(started=1000.0, first=True)}), attempt(stepped_at=1200.0)
    assert deadline(DEADLINES, stepped(7), one, seen, 1210.0) == 40.0
    seen = replace(seen, contact=Contact(answered=1250.0))
    late = deadline(DEADLINES, stepped(7), one, seen, 1250.0)
    assert isinstance(late, tuple) and late[0] is F.STALL_DEADLINE and "after 7" in late[1]


@pytest.mark.parametrize(
    ("contact", "ends"),
    [
        (None, False),
        (Contact(), False),
        # A network policy closes the port, or the operator has just started.
        (Contact(silent=1200.0), False),
        # It answered before the deadline.
        (Contact(answered=1249.0, silent=1249.5), False),
        (Contact(answered=1249.0, silent=1249.5, ignored=9, ignored_for=900.0), False),
        (Contact(answered=1249.0, silent=1249.5, ignored=10, ignored_for=49.0), False),
        # It has never answered, so another program may accept the connections.
        (Contact(ignored=10, ignored_for=900.0), False),
        (Contact(answered=1249.0, silent=1249.5, ignored=10, ignored_for=50.0), True),
        (Contact(answered=1250.0), True),
    ],
)
def test_silence_alone_is_no_stall(contact: Contact | None, ends: bool) -> None:
    seen, one = (
        running(pods={"m": PodTime(started=1000.0, first=True)}, contact=contact),
        attempt(stepped_at=1200.0),
    )
    assert isinstance(deadline(WITHOUT_LIMIT, stepped(7), one, seen, 1_000_000.0), tuple) is ends
    first = running(pods={"m": PodTime(started=1150.0, first=True)}, contact=contact)
    assert (
        isinstance(
            deadline(WITHOUT_LIMIT, StageStatus(name="a"), attempt(), first, 1_000_000.0), tuple
        )
        is ends
    )


def test_a_trainer_that_cannot_be_reached_is_reported() -> None:
    pods = {"m": PodTime(started=1000.0, first=True)}
    silent = running(pods=pods, contact=Contact(silent=1000.0, address="10.0.0.1:9091, pod x"))
    assert progress_unknown(DEADLINES, silent, 1049.0) is None, "the trainer may still load"
    reason = progress_unknown(DEADLINES, silent, 1050.0)
    assert reason is not None and reason.text.startswith("ProgressUnknown: ")
    assert "10.0.0.1:9091" in reason.text and "NetworkPolicy" in reason.text
    assert progress_unknown(DEADLINES, silent, 9999.0) == reason, (
        "the reason stays the same, so it is written once"
    )
    assert (
        progress_unknown(DEADLINES, running(pods=pods, contact=Contact(answered=1.0)), 9999.0)
        is None
    )


def test_the_stage_deadline_counts_all_attempts_and_no_time_in_queues() -> None:
    stage = stepped(7).model_copy(update={"spent": Spent(seconds=600.0)})
    one = attempt(
        stepped_at=1290.0, pods={"m": PodTime(started=1000.0, first=True)}, gone=Spent(seconds=90.0)
    )
    assert deadline(DEADLINES, stage, one, running(pods=one.pods), 1300.0) == 10.0
    late = deadline(DEADLINES, stage, one, running(pods=one.pods), 1310.0)
    assert isinstance(late, tuple) and late[0] is F.STAGE_DEADLINE


def test_pods_that_do_not_start_end_the_attempt_at_the_start_deadline() -> None:
    seen = Seen(
        live=True,
        started=True,
        waiting=Reason(Code.IMAGE, message="image x cannot be pulled", bare=True),
        waits=(F.IMAGE, 1000.0),
    )
    assert deadline(DEADLINES, StageStatus(name="a"), attempt(), seen, 1090.0) == 10.0
    late = deadline(DEADLINES, StageStatus(name="a"), attempt(), seen, 1100.0)
    assert (
        isinstance(late, tuple)
        and late[0] is F.IMAGE
        and late[1].startswith("image x cannot be pulled")
    )


def test_an_attempt_that_can_never_start_is_ended_at_once() -> None:
    seen = Seen(live=True, started=True, hopeless=(F.IMAGE, "there is no image x"))
    assert deadline(DEADLINES, StageStatus(name="a"), attempt(), seen, 0.0) == (
        F.IMAGE,
        "there is no image x",
    )
