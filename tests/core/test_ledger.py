"""What attempts have spent: each pod and each attempt counts once, and a status is read back as it
was written.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import through_a_server

from modelchain.api.contracts import LastWord
from modelchain.api.status import AttemptStatus, ChainStatus, PodTime, StageStatus, State, Total
from modelchain.decide import ledger
from modelchain.decide.ledger import (
    ACCOUNT_SECONDS,
    account,
    closed,
    due,
    money,
    open_spending,
    running_seconds,
    same_pods,
    total_cost,
)
from modelchain.decide.observed import Seen
from modelchain.decide.transitions import booked

PRICE = "3.60"  # per GPU hour: a tenth of a cent per second


def attempt(number: int = 1, **more: Any) -> AttemptStatus:
    known = {
        "name": f"family-a-a{number}",
        "number": number,
        "input_digest": "d",
        "state": State.RUNNING,
    }
    return AttemptStatus(**{**known, **more})


def seen(pods: dict[str, PodTime], **more: Any) -> Seen:
    return Seen(live=bool(pods), started=True, pods=pods, **more)


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[float, float, int]]:
    """Pods of one attempt that a queue evicts and starts again, one after another: (started,
    finished, GPUs).
    """
    at, out = 1000.0, []
    for _ in range(draw(st.integers(1, 6))):
        at += draw(st.integers(0, 500))
        length = draw(st.integers(0, 1000))
        out.append((at, at + length, draw(st.integers(0, 16))))
        at += length
    return out


@settings(deadline=None)
@given(runs(), st.data())
def test_gpu_seconds_count_each_pod_once_whenever_passes_run(
    life: list[tuple[float, float, int]], data: Any
) -> None:
    """This is true even if a pod that is gone appears again, from the memory of watch events."""
    one, truth = attempt(), sum((finished - started) * gpus for started, finished, gpus in life)
    end = life[-1][1]
    for n, (started, finished, gpus) in enumerate(life):
        for now in sorted(data.draw(st.lists(st.floats(started, finished), max_size=3))):
            there = {f"p{n}": PodTime(started=started, gpus=gpus, first=True)}
            one = account(one, seen(there, price=PRICE), now)
        ended = {f"p{n}": PodTime(started=started, finished=finished, gpus=gpus, first=True)}
        again = {
            f"p{m}": PodTime(started=s, finished=f, gpus=g, first=True)
            for m, (s, f, g) in enumerate(life[:n])
            if data.draw(st.booleans())
        }
        one = account(one, seen({**again, **ended}, price=PRICE), finished)
    assert abs(one.gpu_seconds - truth) < 0.01
    assert abs(running_seconds(one, end + 999) - sum(f - s for s, f, _ in life)) < 0.01
    over = closed(one, seen({}, price=PRICE), end, State.FAILED)
    assert abs(over.gpu_seconds - truth) < 0.01 and not over.pods, (
        "an attempt that is closed after its pods are gone loses nothing"
    )
    assert over.cost == money(truth, PRICE)


@settings(deadline=None)
@given(runs())
def test_pods_that_vanish_unseen_count_until_the_next_pass(
    life: list[tuple[float, float, int]],
) -> None:
    one = attempt()
    for n, (started, finished, gpus) in enumerate(life):
        one = account(
            one, seen({f"p{n}": PodTime(started=started, gpus=gpus)}, price=PRICE), started
        )
        one = account(one, seen({}, price=PRICE), finished)
        once = account(one, seen({}, price=PRICE), finished + 1000)
        assert once.gpu_seconds == one.gpu_seconds, "a later pass does not move the pod's end"
    assert abs(one.gpu_seconds - sum((f - s) * g for s, f, g in life)) < 0.01


def test_the_list_of_pods_is_bounded_and_loses_no_time() -> None:
    one = attempt()
    for n in range(2 * ledger.MAX_PODS):
        pod = PodTime(started=10.0 * n + 1, finished=10.0 * n + 6, gpus=2, first=True)
        one = account(one, seen({f"p{n}": pod}), 10.0 * n + 6)
        assert len(one.pods) <= ledger.MAX_PODS
    assert one.gpu_seconds == 2 * ledger.MAX_PODS * 10 and one.gone.gpu_seconds > 0


def test_running_time_is_that_of_rank_0() -> None:
    pods = {"m": PodTime(started=1.0, gpus=8, first=True), "w": PodTime(started=1.0, gpus=8)}
    one = account(attempt(), seen(pods, price=PRICE), 11.0)
    assert (one.gpu_seconds, running_seconds(one, 11.0)) == (160.0, 10.0)


def test_without_pods_the_attempts_own_figures_count() -> None:
    word = LastWord(result="Succeeded", gpu_seconds=7.5, macs=5)
    one = account(
        attempt(macs=9),
        Seen(live=False, started=True, word=word, gpu_seconds=3.0, price=PRICE),
        10.0,
    )
    assert (one.gpu_seconds, one.cost, one.macs) == (7.5, "0.01", 9)


def test_the_figures_of_an_open_attempt_are_computed_anew() -> None:
    """A container that never started reports 1970 as its start. An earlier version charged for all
    the years since; the next pass corrects that.
    """
    early = {"m": PodTime(started=0.0, gpus=8, first=True), "w": PodTime(started=1.0, gpus=8)}
    one = attempt(pods=early, gpu_seconds=1e10, cost="9999999.00")
    assert not same_pods(one, seen({})) and not same_pods(one, seen(early))
    right = account(
        one,
        seen(
            {"m": PodTime(started=1000.0, gpus=8, first=True)},
            never_ran=frozenset("w"),
            price=PRICE,
        ),
        1010.0,
    )
    assert (right.gpu_seconds, right.cost, list(right.pods)) == (80.0, "0.08", ["m"])
    ended = account(
        right,
        seen({"m": PodTime(started=1000.0, finished=1009.0, gpus=8, first=True)}, price=PRICE),
        1020.0,
    )
    assert (ended.gpu_seconds, ended.cost) == (72.0, "0.07"), (
        "the end that the node reports replaces our estimate"
    )
    assert account(ended, seen({}), 1020.0).cost == "0.07", "without a price the known cost stays"


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("nodes", "evictions"), [(130, 1), (8, 33), (256, 4), (256, 500), (1, 500)]
)
def test_any_number_of_evictions_keeps_the_list_within_the_crd(nodes: int, evictions: int) -> None:
    """Pods that are gone come back as long as the operator remembers them; each counts once."""
    one, remembered, now = attempt(), {}, 1000.0
    for run in range(evictions + 1):
        there = {f"{run}-{n}": PodTime(started=now, gpus=8, first=n == 0) for n in range(nodes)}
        summed_up = one.gone.gpu_seconds > 0
        known = {uid: pod for uid, pod in remembered.items() if not summed_up or uid in one.pods}
        one = account(one, seen({**known, **there}, gone_pods=frozenset(known)), now)
        assert len(one.pods) <= 256
        ended = {uid: pod.model_copy(update={"finished": now + 10}) for uid, pod in there.items()}
        one = account(one, seen(ended, gone_pods=frozenset(ended)), now + 10)
        remembered, now = dict(list({**remembered, **ended}.items())[-4096:]), now + 60
    assert (
        one.gpu_seconds == (evictions + 1) * nodes * 80
        and running_seconds(one, now) == (evictions + 1) * 10
    )
    assert len(one.model_dump_json(by_alias=True, exclude_none=True)) < 40_000


def test_hours_already_spent_keep_their_price() -> None:
    pods = {"m": PodTime(started=1.0, gpus=8, first=True)}
    one = account(attempt(), seen(pods, price="2.00"), 3601.0)
    one = account(one, seen(pods, price="4.00"), 7201.0)
    assert one.cost == "48.00", "8 GPUs: an hour at 2.00, and one at 4.00"
    one = account(one, seen(pods, price="4.00"), 10_801.0)
    assert one.cost == "80.00"
    one = account(one, seen(pods), 14_401.0)
    assert one.cost == "80.00", "hours without a price cost nothing that is known"
    over = closed(one, seen(pods, price="1.00"), 18_001.0, State.FAILED)
    assert over.cost == "88.00" and over.gpu_seconds == 5 * 8 * 3600
    assert (over.price, over.priced_cost) == (None, None), "a closed attempt has a cost, no price"


def test_hours_before_a_price_was_named_stay_without_one() -> None:
    pods = {"m": PodTime(started=1.0, gpus=8, first=True)}
    one = account(attempt(), seen(pods), 3601.0)
    assert one.cost is None
    assert account(one, seen(pods, price="2.00"), 7201.0).cost == "16.00"


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3600), st.sampled_from(["1.00", "2.50", None]))))
def test_the_cost_is_what_each_hour_cost_when_it_was_accounted(
    hours: list[tuple[int, str | None]],
) -> None:
    pods, now, truth = {"m": PodTime(started=1.0, gpus=8, first=True)}, 1.0, 0.0
    one = account(attempt(), seen(pods, price=hours[0][1] if hours else None), now)
    for seconds, price in hours:
        now += seconds
        one = account(one, seen(pods, price=price), now)
        truth += seconds * 8 * float(price or 0) / 3600
    assert abs(float(one.cost or 0) - truth) <= 0.01 * (1 + len(hours)), "rounded at each change"


def test_an_attempt_that_is_evicted_counts_the_macs_of_all_its_lives() -> None:
    """Each rank 0 counts from its own start, and so does its last word."""
    first = {"m1": PodTime(started=1.0, gpus=8, first=True), "w1": PodTime(started=2.0, gpus=8)}
    one = account(attempt(), seen(first, macs=500), 10.0)
    assert one.macs == 500
    ended = {
        uid: pod.model_copy(update={"finished": 20.0, "macs": 520 if pod.first else 0})
        for uid, pod in first.items()
    }
    one = account(one, seen(ended), 20.0)
    assert one.macs == 520, "its last word tells more than its progress did"
    second = {"m2": PodTime(started=30.0, gpus=8, first=True)}
    one = account(one, seen({**ended, **second}, macs=10), 40.0)
    assert one.macs == 530, "much less than the first life"
    one = account(one, seen(second, macs=700), 50.0)
    assert one.macs == 1220, "the first pods are gone by now"
    word = LastWord(result="Failed", macs=710)
    over = {"m2": second["m2"].model_copy(update={"finished": 60.0})}
    final = closed(one, seen(over, word=word), 60.0, State.FAILED)
    assert final.macs == 1230 and closed(final, seen({}), 70.0, State.FAILED).macs == 1230


def test_macs_of_lives_that_are_summed_up_are_not_lost() -> None:
    one, now = attempt(), 1.0
    for n in range(2 * ledger.MAX_PODS):
        pod = PodTime(started=now, finished=now + 5, gpus=2, first=True)
        one, now = account(one, seen({f"p{n}": pod}, macs=n), now + 5), now + 10
    assert one.macs == sum(range(2 * ledger.MAX_PODS)) and one.gone.macs > 0


def test_an_attempt_is_due_once_a_minute_while_pods_hold_gpus() -> None:
    pods = {"m": PodTime(started=1.0, gpus=8, first=True), "w": PodTime(started=1.0, gpus=8)}
    one = account(attempt(), seen(pods, price=PRICE), 10.0)
    assert not due(one, seen(pods), 10.0) and not due(one, seen(pods), 9.0 + ACCOUNT_SECONDS)
    assert due(one, seen(pods), 10.0 + ACCOUNT_SECONDS) and ACCOUNT_SECONDS < 60
    told = account(one, seen(pods, macs=500, price=PRICE), 10.0)
    assert not due(told, seen(pods), 10.0), "a pod that tells nothing at present is no news"
    last = {**pods, "m": pods["m"].model_copy(update={"macs": 501})}
    assert due(told, seen(last), 10.0), "but a last word is"
    half = {**pods, "w": pods["w"].model_copy(update={"finished": 10.0})}
    one = account(one, seen(half, price=PRICE), 10.0)
    assert not due(one, seen(half), 60.0) and due(one, seen(half), 65.0), "by the pods that run"
    over = {uid: pod.model_copy(update={"finished": 10.0}) for uid, pod in pods.items()}
    one = account(one, seen(over, price=PRICE), 10.0)
    assert not due(one, seen(over), 1e6), "nothing runs, so nothing is written"
    cpu = {"m": PodTime(started=1.0, first=True)}
    assert not due(account(attempt(), seen(cpu), 10.0), seen(cpu), 1e6)


def test_same_pods() -> None:
    pods = {"m": PodTime(started=1.0, first=True)}
    one = account(attempt(), seen(pods), 10.0)
    assert same_pods(one, seen(pods)) and not same_pods(one, seen({}))
    assert not same_pods(one, seen({**pods, "w": PodTime(started=5.0)}))
    assert not same_pods(one, seen({}, never_ran=frozenset("m")))
    gone = account(one, seen({}), 20.0)
    assert same_pods(gone, seen({})), "the pod is already known to be gone"


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**21), st.integers(0, 10**6)), min_size=1, max_size=30))
def test_an_attempt_is_closed_once_and_trimming_loses_nothing(spent: list[tuple[int, int]]) -> None:
    stage = StageStatus(name="a")
    macs = gpu_seconds = 0.0
    for number, (some_macs, seconds) in enumerate(spent, 1):
        opened = attempt(
            number, macs=some_macs, gpu_seconds=float(seconds), cost=money(seconds, PRICE)
        )
        stage = booked(stage, [*stage.attempts, opened])
        over = opened.model_copy(update={"finished_at": "2026-01-01T00:00:00Z"})
        for _ in range(3):  # a repeated pass adds nothing
            stage = booked(stage, [*stage.attempts[:-1], over])
        macs, gpu_seconds = macs + over.macs, gpu_seconds + seconds
    assert len(stage.attempts) == min(len(spent), ledger.KEPT_ATTEMPTS)
    assert abs(stage.macs - macs) <= 1e-12 * macs and stage.gpu_seconds == gpu_seconds
    assert (
        open_spending(stage.spent, stage.attempts).cost
        == stage.cost
        == total_cost(money(s, PRICE) for _, s in spent)
    )


def test_money() -> None:
    assert money(3600, None) is None
    assert money(3600, "2.21") == "2.21" and money(1, "18.00") == "0.01" and money(0, "9") == "0.00"
    assert (
        total_cost(["0.10", None, "0.20"]) == "0.30"
        and total_cost([None]) is None
        and total_cost([]) is None
    )
    assert total_cost(["0.10"] * 1000) == "100.00", "the sum is exact, because no float is used"


@settings(deadline=None)
@given(st.integers(0, 10**24))
def test_macs_beyond_64_bits_are_read_back_as_they_were_written(macs: int) -> None:
    """An API server keeps an integer beyond 64 bits as a float, and may print it as one."""
    stages = [StageStatus(name="a", macs=macs, attempts=[attempt(macs=macs)])]
    status = ChainStatus(stages=stages, total=Total(macs=sum(s.macs for s in stages)))
    stored = json.loads(status.model_dump_json(by_alias=True))
    assert ChainStatus.model_validate_json(json.dumps(through_a_server(stored))) == status
    assert abs(status.total.macs - macs) <= macs * 2**-52
