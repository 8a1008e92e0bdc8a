"""`decide` at the sizes that users have: deciding again right after a pass changes nothing, and
every request is carried out.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from life import Life, life_of

from modelchain.api.contracts import FailureClass
from modelchain.api.status import State

MOMENTS = 12


def random_life(chance: random.Random) -> Life:
    """A chain with up to about 1e21 MACs per stage."""
    macs = 10 ** chance.uniform(16, 21)
    per_sample = 1e11  # about the training MACs of ViT-S
    samples = int(min(99_999_999_999, macs / per_sample / 32))
    return life_of(
        chance.choice(["vit-cc3m", "swin-cc3m"]),
        chance.choice([1, 8, 100]),
        **{"spec.data.train.samples": samples},
        **{
            "spec.data.train.captionsPerSample": chance.randint(1, 64),
            "spec.recipe.seed": chance.randint(0, 999),
        },
    )


def check_requests(life: Life) -> None:
    """Makes every possible request at this moment; each is carried out within two passes."""
    name = life.live
    suspended = life.copy()
    suspended.edit(**{"spec.suspend": True})
    edited = life.copy()
    edited.edit(**{"spec.recipe.seed": 12345})
    for other in (suspended, edited):
        other.reconcile()
        other.reconcile()
        assert name is None or other.runs[name].stopped
        assert other.status.observed_generation == life.body["metadata"]["generation"] + 1
    asked = replace(life.copy(), retry="again")
    asked.reconcile()
    assert asked.status.retry == "again"
    if name is not None:
        late = life.copy()
        late.now += 1e6
        late.reconcile()
        late.reconcile()
        assert late.runs[name].stopped, "the trainer answers, but has taken no step for days"


@pytest.mark.parametrize("of", ["vit-cc3m", "swin-cc3m", "vit-merged15m", *range(5)])
def test_every_request_is_carried_out_at_any_moment(of: str | int) -> None:
    chance = random.Random(of)
    life = life_of(of) if isinstance(of, str) else random_life(chance)
    for _ in range(MOMENTS):
        life.reconcile()
        check_requests(life)
        life.happens(chance)
    life.reconcile()
    listed = sum(attempt.macs for stage in life.status.stages for attempt in stage.attempts)
    assert life.status.total.macs >= listed * (1 - 1e-12), (
        "the sum is smaller by rounding only: above 2^53 it is a double"
    )


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("nodes", "evictions"), [(1, 500), (8, 500), (130, 20), (256, 20)])
def test_gpu_seconds_are_right_after_any_number_of_evictions(nodes: int, evictions: int) -> None:
    life, chance = life_of("swin-cc3m", nodes), random.Random(nodes)
    life.reconcile()
    began = life.now
    for n in range(evictions):
        life.evict()
        if n % 7 == 0:
            life.train(chance)
        life.reconcile()
    check_requests(life)
    life.end(None)
    ended = life.now
    life.reconcile()
    first = life.status.stages[0]
    idle = evictions * 60.0  # after an eviction no pod holds a GPU for a minute
    assert first.state is State.SUCCEEDED
    # The tolerance is for the passes, which take time too.
    assert first.gpu_seconds == pytest.approx((ended - began - idle) * nodes * 8, abs=nodes)


@pytest.mark.parametrize("change", [{"spec.suspend": True}, {"spec.recipe.seed": 12345}])
def test_an_attempt_that_takes_steps_while_it_should_stop_is_stopped(
    change: dict[str, Any],
) -> None:
    """A step that is not in the status yet is written first. That must happen once only, or the
    stop would be put off for ever.
    """
    life, chance = life_of("swin-cc3m", nodes=8), random.Random(0)
    life.reconcile()
    for _ in range(2):  # the first step of an attempt, and another
        name = life.live
        assert name is not None
        life.train(chance)
        asked = life.copy()
        asked.edit(**change)
        asked.reconcile()
        asked.reconcile()
        assert asked.runs[name].stopped
        asked.train(chance)
        asked.reconcile()
        life.reconcile()


@pytest.mark.parametrize("poll_seconds", [5.0, 30.0, 3600.0])
@pytest.mark.parametrize("how", ["starts", "stands still", "is suspended", "is superseded"])
def test_an_attempt_is_accounted_at_least_once_a_minute(how: str, poll_seconds: float) -> None:
    """The operator makes a pass when `decide` asks for one, or a minute after the last one."""
    life = life_of("swin-cc3m", nodes=2)
    life.poll_seconds, life.tells = poll_seconds, how == "stands still"
    life.reconcile()
    if how == "is suspended":
        life.edit(**{"spec.suspend": True})
    elif how == "is superseded":
        life.edit(**{"spec.recipe.seed": 99})
    life.reconcile()
    name, began, writes = life.live, life.now, len(life.written)
    assert name is not None
    while life.now < began + 1200:
        again = life.reconcile().again
        (spent,) = [a.gpu_seconds for n, (_, a) in life.status.attempts.items() if n == name]
        assert life.gpu_seconds - spent < 61 * 2 * 8, "at most a minute is missing"
        life.now += min(again or 60.0, 60.0)
    assert len(life.written) - writes <= 1200 / 50 + 1, "and it is not written more often"
    life.reconcile()
    life.end(FailureClass.PREEMPTED)
    life.edit(**{"spec.suspend": True})
    life.reconcile()
    writes = len(life.written)
    for _ in range(5):
        life.now += 3600
        assert life.reconcile().again is None
    assert len(life.written) == writes, "nothing runs, so nothing is written"
    assert life.status.total.gpu_seconds == pytest.approx(life.gpu_seconds, abs=16)
