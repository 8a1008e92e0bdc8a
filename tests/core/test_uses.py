"""How the GPU time of an attempt is divided by use, and settled once it is known what was kept."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ledger import attempt

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.status import AttemptStatus, PodTime, StageStatus, State
from modelchain.api.uses import NOT_USED, Resumed, Uses
from modelchain.decide.ledger import account, closed
from modelchain.decide.observed import Seen
from modelchain.decide.settle import settled
from modelchain.decide.split import gpu_time, starts, used
from modelchain.decide.transitions import booked, resumed, work_settled

F = FailureClass


def pod(scheduled: float, started: float | None, finished: float | None = None, **more: Any) -> Any:
    known = {"gpus": 8, "first": True, "scheduled": scheduled, "started": started}
    return PodTime(**{**known, "finished": finished, **more})


def seen(pods: dict[str, PodTime], **more: Any) -> Seen:
    return Seen(live=bool(pods), started=True, pods=pods, **more)


def seconds(uses: Uses) -> dict[str, float]:
    """GPU seconds of one GPU of eight."""
    return {use: time / 8000 for use, time in uses if time}


def test_gpus_are_held_from_the_binding_to_a_node_on() -> None:
    one = account(attempt(), seen({"m": pod(100, None)}), 160)
    assert (one.gpu_seconds, seconds(one.gpu_milliseconds)) == (8 * 60, {"startup": 60})
    one = account(one, seen({"m": pod(100, 170)}), 180)
    assert seconds(one.gpu_milliseconds) == {"startup": 70, "unsaved": 10}, "not told yet"
    told = Uses(startup=15_000)
    one = account(one, seen({"m": pod(100, 170)}, told=told), 190)
    assert seconds(one.gpu_milliseconds) == {"startup": 85, "unsaved": 5}


def test_a_pod_that_never_ran_has_spent_its_time_on_starting() -> None:
    pods = {"m": pod(100, None, 400), "w": pod(110, None, 400, first=False)}
    over = closed(attempt(), seen(pods), 500, State.FAILED, F.IMAGE, "no such image")
    assert over.gpu_milliseconds == Uses(startup=8000 * (300 + 290)) and over.unsettled is None


def test_a_training_that_goes_well() -> None:
    word = Uses(startup=30_000, productive=500_000, evaluating=60_000)
    done = pod(100, 110, 705, told=word, over=True, macs=900, saved_macs=900)
    over = closed(attempt(), seen({"m": done}), 710, State.SUCCEEDED)
    assert seconds(over.gpu_milliseconds) == {
        "startup": 40,
        "productive": 500,
        "evaluating": 60,
        "lost": 5,  # from its last word to the end of its container
    }
    assert (over.macs, over.lost_macs) == (900, 0)


def test_a_worker_that_waits_for_the_others_is_starting() -> None:
    pods = {"m": pod(100, 110, told=Uses(startup=30_000, unsaved=10_000)), "w": pod(
        50, 60, first=False, gpus=4
    )}  # fmt: skip
    one = account(attempt(), seen(pods), 150)
    assert one.gpu_milliseconds == Uses(
        startup=1000 * (8 * 40 + 4 * 90), unsaved=1000 * (8 * 10 + 4 * 10)
    )


def test_a_stall_lasts_from_the_last_step_to_its_end() -> None:
    """The operator ends a trainer that hangs, which leaves no last word."""
    told = Uses(startup=10_000, productive=50_000, unsaved=20_000)
    one = attempt(stepped_at=200.0)
    hung = seen({"m": pod(100, 110, 2000)}, told=told)
    over = closed(one, hung, 2001, State.FAILED, F.STALL_DEADLINE, "no step")
    assert seconds(over.gpu_milliseconds) == {
        "startup": 20,
        "productive": 50,
        "stalled": 1800,
        "unsaved": 30,
    }
    assert over.unsettled is not None and over.unsettled.told.unsaved == 20_000


def test_a_trainer_that_says_that_it_stalled() -> None:
    """The last word of its watchdog. What a checkpoint has kept, the next trainer knows best."""
    told = Uses(startup=10_000, productive=50_000, unsaved=20_000, stalled=900_000)
    stalled = pod(100, 110, 1095, told=told, macs=700, saved_macs=500)
    over = closed(attempt(), seen({"m": stalled}), 1100, State.FAILED, F.STALL_DEADLINE)
    assert over.gpu_milliseconds.stalled == 8 * 900_000 and over.unsettled is not None
    later = Resumed(attempt=over.name, pod="m", macs=650, saved_macs=650, milliseconds=Uses(
        startup=10_000, productive=65_000
    ))  # fmt: skip
    final = settled(over, later)
    assert seconds(final.gpu_milliseconds) == {
        "startup": 20,
        "productive": 65,
        "stalled": 900,
        "lost": 10,
    }
    assert (final.macs, final.lost_macs) == (700, 50)


def test_a_start_that_takes_too_long_is_a_start() -> None:
    pods = {"m": pod(100, 110, 2000)}
    over = closed(attempt(), seen(pods), 2000, State.FAILED, F.START_DEADLINE, "no first step")
    assert seconds(over.gpu_milliseconds) == {"startup": 1900}


def lost_its_word() -> AttemptStatus:
    """An attempt that was killed at 700 and last told at 600."""
    told = Uses(startup=20_000, productive=300_000, unsaved=100_000)
    one = account(attempt(), seen({"m": pod(100, 110)}, told=told, macs=420, saved_macs=300), 600)
    return closed(one, seen({"m": pod(100, 110, 700)}), 701, State.FAILED, F.UNKNOWN)


KEPT = Resumed(
    attempt="family-a-a1",
    pod="m",
    macs=510,
    saved_macs=500,
    milliseconds=Uses(startup=20_000, productive=490_000, lost=10_000),
)


def test_the_next_trainer_settles_the_work_of_one_that_was_killed() -> None:
    over = lost_its_word()
    assert seconds(over.gpu_milliseconds) == {"startup": 30, "productive": 300, "unsaved": 270}
    final = settled(over, KEPT)
    assert seconds(final.gpu_milliseconds) == {"startup": 30, "productive": 490, "lost": 80}
    assert (final.macs, final.lost_macs, final.unsettled) == (510, 10, None)
    assert settled(final, KEPT) == settled(final, None) == final, "once and for all"


@pytest.mark.parametrize(
    "other", [None, Resumed(), KEPT.model_copy(update={"pod": "x"}),
              KEPT.model_copy(update={"attempt": "family-a-a7"})]
)  # fmt: skip
def test_work_that_no_later_trainer_resumes_is_lost(other: Resumed | None) -> None:
    final = settled(lost_its_word(), other)
    assert seconds(final.gpu_milliseconds) == {"startup": 30, "productive": 300, "lost": 270}
    assert (final.macs, final.lost_macs) == (420, 120)


def test_a_stage_settles_its_ledger_with_its_attempts() -> None:
    first, second = lost_its_word(), attempt(2)
    stage = booked(StageStatus(name="a", attempts=[attempt()], last_digest="d"), [first])
    stage = booked(stage, [first, second])
    assert stage.spent.gpu_milliseconds.unsaved == stage.trained.gpu_milliseconds.unsaved > 0
    stage = resumed(stage, second, KEPT)
    for ledger in (stage.spent, stage.trained, stage):
        assert seconds(ledger.gpu_milliseconds) == {"startup": 30, "productive": 490, "lost": 80}
        assert (ledger.macs, ledger.lost_macs, ledger.gpu_seconds) == (510, 10, 8 * 600)
    assert resumed(stage, second, KEPT) == work_settled(stage) == stage


def test_what_is_left_is_lost_once_the_stage_has_finished() -> None:
    first = lost_its_word()
    stage = booked(StageStatus(name="a", attempts=[attempt()], last_digest="d"), [first])
    stage = work_settled(stage)
    assert seconds(stage.trained.gpu_milliseconds)["lost"] == 270 and stage.lost_macs == 120
    trimmed = booked(StageStatus(name="a", attempts=[attempt()], last_digest="d"), [first])
    trimmed = work_settled(trimmed.changed(attempts=[]))
    assert seconds(trimmed.gpu_milliseconds)["lost"] == 270, "also if the attempt is not listed"


def test_an_evicted_attempt_resumes_its_own_work() -> None:
    """Each start counts from its own beginning. The first left no last word."""
    told = Uses(startup=20_000, productive=300_000, unsaved=100_000)
    one = account(attempt(), seen({"m": pod(100, 110)}, told=told, macs=420, saved_macs=300), 600)
    gone = {"m": pod(100, 110, 700)}
    one = account(one, seen({**gone, "n": pod(800, 810)}), 820)
    assert seconds(one.gpu_milliseconds) == {"startup": 40, "productive": 300, "unsaved": 280}
    again = Uses(startup=30_000, unsaved=5_000)
    one = account(one, seen({**gone, "n": pod(800, 810)}, told=again, macs=7, resumed=KEPT), 850)
    assert seconds(one.gpu_milliseconds) == {
        "startup": 30 + 40,
        "productive": 490,
        "lost": 80,
        "unsaved": 10,
    }
    assert (one.macs, one.lost_macs) == (517, 10)


def test_the_artifact_keeps_what_no_checkpoint_had_kept() -> None:
    """The last word was lost, and a verify Job finds the artifact whole."""
    made_by = Uses(startup=20_000, productive=500_000, evaluating=40_000)
    answer = LastWord(result="Succeeded", macs=900, saved_macs=900, milliseconds=made_by)
    told = Uses(startup=20_000, productive=300_000, unsaved=100_000)
    one = account(attempt(), seen({"m": pod(100, 110)}, told=told, macs=420, saved_macs=300), 600)
    silent = seen({"m": pod(100, 110, 700)}, verify=answer)
    over = closed(one, silent, 701, State.SUCCEEDED)
    assert seconds(over.gpu_milliseconds) == {
        "startup": 30,
        "productive": 500,
        "evaluating": 40,
        "lost": 30,
    }
    older = seen({"m": pod(100, 110, 700)}, verify=LastWord(result="Succeeded", macs=900))
    over = closed(one, older, 701, State.SUCCEEDED)
    assert seconds(over.gpu_milliseconds) == {"startup": 30, "productive": 400, "lost": 170}


def test_a_pod_that_vanished_unseen_ended_when_it_was_last_accounted() -> None:
    one = account(attempt(), seen({"m": pod(100, 110)}), 600)
    gone = account(one, seen({}), 9000)
    assert gone.gpu_seconds == one.gpu_seconds == 8 * 500 and gone.estimated
    assert closed(gone, seen({}), 9001, State.FAILED).estimated
    known = account(gone, seen({"m": pod(100, 110, 650)}), 9002)
    assert known.gpu_seconds == 8 * 550, "a remembered pod corrects it"


def test_the_time_in_a_queue_is_no_gpu_time() -> None:
    from modelchain.decide.transitions import at_work

    one = at_work(attempt(), queued=True, now=100.0)
    assert at_work(one, queued=True, now=150.0) == one
    one = at_work(one, queued=False, now=160.5)
    assert one.queue_seconds == 60.5 and at_work(one, queued=False, now=170.0) == one
    again = at_work(one, queued=True, now=200.0)
    over = closed(again, seen({}), 210.0, State.SUSPENDED)
    assert (over.queue_seconds, over.queued_at, over.gpu_seconds) == (70.5, None, 0.0)


def test_an_older_version_told_no_uses() -> None:
    said = attempt(gpu_seconds=7.25).model_dump_json(by_alias=True)
    one = AttemptStatus.model_validate_json(said.replace('"gpuMilliseconds":{},', ""))
    assert one.gpu_milliseconds == Uses(lost=7250)


TIMES = st.integers(0, 2_000_000)
TOLD = st.builds(Uses, **dict.fromkeys(Uses.model_fields, TIMES))


@st.composite
def gangs(draw: st.DrawFn) -> dict[str, PodTime]:
    """Pods of several starts, with clocks that may be wrong and trainers that may say anything."""
    pods, at = {}, 1000
    for start in range(draw(st.integers(1, 3))):
        at += draw(st.integers(0, 500))
        ends = draw(st.integers(at, at + 3000))
        for rank in range(draw(st.integers(1, 3))):
            scheduled = draw(st.integers(at, ends))
            started = draw(st.none() | st.integers(at - 50, ends + 50))
            told = draw(TOLD) if rank == 0 else NOT_USED
            pods[f"{start}-{rank}"] = PodTime(
                scheduled=float(scheduled),
                started=None if started is None else float(started),
                finished=draw(st.sampled_from([float(ends), float(at - 10)])),
                gpus=draw(st.integers(0, 8)),
                first=rank == 0,
                told=told,
                over=draw(st.booleans()),
            )
        at = ends
    last = max(pods, key=lambda uid: pods[uid].begins)
    if draw(st.booleans()):
        pods[last] = pods[last].model_copy(update={"finished": None})
    return pods


@settings(deadline=None)
@given(gangs(), st.integers(0, 9000))
def test_each_moment_has_exactly_one_use(pods: dict[str, PodTime], now: int) -> None:
    groups = starts(pods)
    assert sum(len(start.pods) for start in groups) == len(pods)
    for start in groups:
        uses = used(start, now)
        assert uses.total == gpu_time(start.pods, now) and min(dict(uses).values()) >= 0
        assert not (start.first and start.first.over and uses.unsaved)


@settings(deadline=None)
@given(
    gangs(),
    st.sampled_from([None, F.UNKNOWN, F.STALL_DEADLINE, F.START_DEADLINE, F.IMAGE]),
    st.none() | st.integers(0, 9000),
    st.none() | st.builds(Resumed, attempt=st.just("family-a-a1"), pod=st.sampled_from(
        ["", "0-0", "1-0", "2-0"]
    ), milliseconds=TOLD, macs=TIMES, saved_macs=TIMES),
)  # fmt: skip
def test_settling_moves_time_and_never_makes_any(
    pods: dict[str, PodTime], failure: F | None, stepped: int | None, later: Resumed | None
) -> None:
    """What the metrics export, all but `unsaved`, never falls."""
    one = account(attempt(stepped_at=stepped), seen(pods), 9000)
    state = State.FAILED if failure else State.SUCCEEDED
    over = closed(one, seen(pods), 9000, state, failure)
    final = settled(over, later)
    assert (
        one.gpu_milliseconds.total == over.gpu_milliseconds.total == round(1000 * over.gpu_seconds)
    )
    assert final.gpu_milliseconds.total == over.gpu_milliseconds.total
    assert final.gpu_milliseconds.unsaved == 0 and final.unsettled is None
    for before, after in ((one, over), (over, final)):
        for use, time in after.gpu_milliseconds:
            if use != "unsaved":
                assert time >= getattr(before.gpu_milliseconds, use), use
    assert final.macs >= over.macs >= one.macs
