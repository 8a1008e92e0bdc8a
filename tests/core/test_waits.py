"""What a stage waits for before its next attempt: one row per situation, and the order of waits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from specs import MINIMAL, with_changes

from modelchain.api.contracts import FailureClass as F
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import ModelChain
from modelchain.api.status import AttemptStatus, AvoidedNode, ChainStatus, StageStatus, State
from modelchain.decide import attempt, waits
from modelchain.decide.observed import (
    IndexSeen,
    Launch,
    MakeClaim,
    MakeIndex,
    Observed,
    Seen,
    TakeShare,
)
from modelchain.decide.outcome import Turn
from modelchain.plan.plan import plan

NOW = 1000.0
STAGE = StageStatus(name="vit-t", input_digest="d" * 64, reason="as before")
OBSTACLE = Reason(Code.INVALID_SPEC, message="no such pool")
LOADING = Reason(Code.DATA_LOADING, "pack", "job pack fills claim photos")
FAILED_LOAD = Reason(Code.DATA_FAILED, "pack", "job pack has failed")
INDEXES = Reason(Code.INDEXING, "index", "job index indexes the data")
FAILED_INDEX = Reason(Code.INDEX_FAILED, "index", "job index has failed")
WRONG = Reason(Code.USER_ERROR, "index", "data.train.samples is 10, but the shards hold 9")
STUCK = Reason(Code.NODE_LOST, "n1", "pod p should have ended")
OTHER = Reason(Code.SHARED_STAGE, "other", "chain other trains the same stage")
SUSPENDED = Reason(Code.SUSPENDED, message="spec.suspend is true")
NO_MONEY = ModelChain.model_validate(with_changes({"spec.budget.gpuHours": "0"}))
ALIKE = tuple(AvoidedNode(node=name, until=2 * NOW, fault="NoDevice") for name in ("n1", "n2"))


def turn(**changes: Any) -> Turn:
    """A turn in which nothing is in the way, with changes; `seen` changes what was read."""
    observed = Observed(
        status=ChainStatus(),
        artifact=lambda digest: None,
        attempt=lambda name: Seen(live=False, started=False),
        poll_seconds=30.0,
        **changes.pop("seen", {}),
    )
    plain = Turn(
        chain=ModelChain.model_validate(MINIMAL),
        index=0,
        observed=observed,
        now=NOW,
        finished=False,
        retried=False,
        stopping=None,
        plan=plan(ModelChain.model_validate(MINIMAL), "analytic", {}),
        avoid=(),
        miss=Reason(Code.MISS, "vit-t", "never trained"),
    )
    return replace(plain, **changes)


# The function, the situation, and the outcome: state, code, stalled, seconds until the next pass.
ROWS: dict[str, tuple[waits.Wait, Turn, tuple[State, Code, bool, float | None]]] = {
    "a finished chain": (
        waits.for_a_request,
        turn(finished=True),
        (State.FAILED, Code.NO_ARTIFACT, False, None),
    ),
    "an earlier attempt": (
        waits.for_an_earlier_attempt,
        turn(seen={"live": frozenset({"vit-t-a1"})}),
        (State.PENDING, Code.MISS, False, 30.0),
    ),
    "an earlier attempt on a lost node": (
        waits.for_an_earlier_attempt,
        turn(seen={"live": frozenset({"vit-t-a1"}), "stuck": STUCK}),
        (State.PENDING, Code.NODE_LOST, True, 30.0),
    ),
    "a suspended chain": (
        waits.for_resumption,
        turn(stopping=SUSPENDED),
        (State.SUSPENDED, Code.SUSPENDED, False, None),
    ),
    "an obstacle": (
        waits.for_an_obstacle,
        turn(seen={"obstacle": OBSTACLE}),
        (State.PENDING, Code.INVALID_SPEC, True, 30.0),
    ),
    "two nodes that failed alike": (
        waits.for_other_devices,
        turn(avoid=ALIKE),
        (State.PENDING, Code.SAME_DEVICE_ERROR, True, 30.0),
    ),
    "a budget that is spent": (
        waits.for_the_budget,
        turn(chain=NO_MONEY, seen={"records": True}),
        (State.PENDING, Code.BUDGET_EXCEEDED, True, 30.0),
    ),
    "a claim": (
        waits.for_the_claim,
        turn(seen={"claim_missing": True}),
        (State.PENDING, Code.MAKES_CLAIM, False, None),
    ),
    "data that is being packed": (
        waits.for_the_data,
        turn(seen={"loading": lambda: LOADING}),
        (State.PENDING, Code.DATA_LOADING, False, waits.LOADING_SECONDS),
    ),
    "data that was not packed": (
        waits.for_the_data,
        turn(seen={"loading": lambda: FAILED_LOAD}),
        (State.PENDING, Code.DATA_FAILED, True, 30.0),
    ),
    "data that is being indexed": (
        waits.for_the_index,
        turn(seen={"indexing": lambda: IndexSeen("index", INDEXES)}),
        (State.INDEXING, Code.INDEXING, False, waits.INDEXING_SECONDS),
    ),
    "data that was not indexed": (
        waits.for_the_index,
        turn(seen={"indexing": lambda: IndexSeen("index", FAILED_INDEX, stalls=True)}),
        (State.PENDING, Code.INDEX_FAILED, True, 30.0),
    ),
    "data that contradicts the spec": (
        waits.for_the_index,
        turn(seen={"indexing": lambda: IndexSeen("index", WRONG, failure=F.USER_ERROR)}),
        (State.FAILED, Code.USER_ERROR, False, None),
    ),
    "a share that no chain has": (
        waits.for_the_share,
        turn(seen={"share": lambda digest: "Free"}),
        (State.PENDING, Code.TAKES_SHARE, False, 30.0),
    ),
    "a share that another chain has": (
        waits.for_the_share,
        turn(seen={"share": lambda digest: OTHER}),
        (State.QUEUED, Code.SHARED_STAGE, False, 30.0),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_each_wait(name: str) -> None:
    wait, in_the_way, expected = ROWS[name]
    outcome = wait(in_the_way, STAGE)
    assert outcome is not None
    stage = outcome.stage
    assert (stage.state, stage.code, stage.stalled, outcome.again) == expected
    assert stage.reason and outcome.artifact is None and not outcome.wanted
    assert waits.first_wait(in_the_way, STAGE) == outcome, "no earlier wait applies"


@pytest.mark.parametrize("wait", waits.BEFORE_INTENT)
def test_no_wait_applies_when_nothing_is_in_the_way(wait: waits.Wait) -> None:
    assert wait(turn(), STAGE) is None
    assert wait(turn(seen={"share": lambda digest: "Mine"}), STAGE) is None
    assert waits.first_wait(turn(), STAGE) is None


def test_the_back_off_keeps_the_reason_and_the_share() -> None:
    stage = STAGE.changed(not_before=NOW + 8, state=State.PENDING)
    outcome = waits.first_wait(turn(), stage)
    assert outcome is not None and outcome.again == 8
    assert outcome.stage.reason == "as before" and outcome.shares == {"d" * 64}
    assert waits.for_the_back_off(turn(now=NOW + 8), stage) is None


def test_the_actions_of_waits() -> None:
    claim = waits.first_wait(turn(seen={"claim_missing": True}), STAGE)
    assert claim is not None and claim.action == MakeClaim()
    for due, action in ((True, MakeIndex("index")), (False, None)):
        job = IndexSeen("index", INDEXES, due=due)
        index = waits.first_wait(turn(seen={"indexing": lambda job=job: job}), STAGE)
        assert index is not None and index.action == action
    share = waits.first_wait(turn(seen={"share": lambda digest: "Free"}), STAGE)
    assert share is not None and share.action == TakeShare("d" * 64)
    assert share.shares == {"d" * 64}


def test_the_number_of_an_ending_attempt_is_remembered() -> None:
    """Once its job and pods are gone, nothing else knows the number."""
    seen = {"live": frozenset({"vit-t-a7"}), "highest_number": lambda stage, digest: 7}
    outcome = waits.for_an_earlier_attempt(turn(seen=seen), STAGE)
    assert outcome is not None and outcome.stage.attempt_count == 7


# What makes each wait apply, in the order in which they are asked: changes of the turn, of what was
# seen, and of the stage.
IN_ORDER: list[tuple[waits.Wait, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (waits.for_a_request, {"finished": True}, {}, {}),
    (waits.for_an_earlier_attempt, {}, {"live": frozenset({"vit-t-a1"})}, {}),
    (waits.for_resumption, {"stopping": SUSPENDED}, {}, {}),
    (waits.for_the_back_off, {}, {}, {"not_before": NOW + 8}),
    (waits.for_an_obstacle, {}, {"obstacle": OBSTACLE}, {}),
    (waits.for_other_devices, {"avoid": ALIKE}, {}, {}),
    (waits.for_the_budget, {"chain": NO_MONEY}, {"records": True}, {}),
    (waits.for_the_claim, {}, {"claim_missing": True}, {}),
    (waits.for_the_data, {}, {"loading": lambda: LOADING}, {}),
    (waits.for_the_index, {}, {"indexing": lambda: IndexSeen("index", INDEXES)}, {}),
    (waits.for_the_share, {}, {"share": lambda digest: OTHER}, {}),
]


def test_the_order_of_waits() -> None:
    assert [row[0] for row in IN_ORDER] == list(waits.BEFORE_INTENT)


@pytest.mark.parametrize(
    ("first", "second"),
    list(pairwise(IN_ORDER)),
    ids=lambda row: row[0].__name__,
)
def test_of_two_neighbours_the_first_is_reported(first: Any, second: Any) -> None:
    """Both apply, and no other wait does."""
    both = turn(**first[1] | second[1], seen=first[2] | second[2])
    stage = STAGE.changed(**first[3] | second[3])
    found = [wait for wait in waits.BEFORE_INTENT if wait(both, stage) is not None]
    assert found == [first[0], second[0]]
    assert waits.first_wait(both, stage) == first[0](both, stage) != second[0](both, stage)


ATTEMPT = AttemptStatus(
    name="vit-t-a1", number=1, input_digest="d" * 64, state=State.STARTING, uid="u"
)
WITHOUT_UID = ATTEMPT.changed(uid=None)
SUSPENDED_JOB = Seen(live=False, started=True, idle=True, uid="u")
# The checks of an open attempt, in the order in which they are made: the launch protocol. Beside
# each, what makes it apply together with the next one: the attempt, what is seen of it, the turn.
CHECKS: list[tuple[str, AttemptStatus, Seen, Turn]] = [
    ("_identify", WITHOUT_UID, replace(SUSPENDED_JOB, trained=True), turn()),
    ("_trained", ATTEMPT, replace(SUSPENDED_JOB, trained=True), turn(retried=True)),
    ("_stop_for_retry", ATTEMPT, SUSPENDED_JOB, turn(retried=True, stopping=SUSPENDED)),
    (
        "_stop_on_request",
        ATTEMPT,
        SUSPENDED_JOB,
        turn(stopping=SUSPENDED, chain=NO_MONEY, seen={"records": True}),
    ),
    (
        "_stop_for_the_budget",
        ATTEMPT,
        SUSPENDED_JOB,
        turn(chain=NO_MONEY, seen={"records": True, "outdated": lambda launch: True}),
    ),
    (
        "_stop_outdated",
        ATTEMPT,
        replace(SUSPENDED_JOB, stalled=STUCK),
        turn(seen={"outdated": lambda launch: True}),
    ),
    ("_stall", WITHOUT_UID, Seen(live=False, started=False, stalled=STUCK, taken=STUCK), turn()),
    ("_renumber", WITHOUT_UID, Seen(live=False, started=False, taken=STUCK), turn()),
    ("_launch", WITHOUT_UID, Seen(live=False, started=False, unreleased=True), turn()),
    ("_release", ATTEMPT, Seen(live=False, started=True, unreleased=True), turn()),
    ("_watch", ATTEMPT, Seen(live=True, started=True), turn()),
    ("_end", ATTEMPT, Seen(live=False, started=True), turn()),
]


def test_the_order_of_checks() -> None:
    assert [check.__name__ for check in attempt.CHECKS] == [row[0] for row in CHECKS]


@pytest.mark.parametrize("place", range(len(CHECKS)), ids=[row[0] for row in CHECKS])
def test_a_check_comes_before_the_next_one(place: int) -> None:
    _, open_attempt, seen, now = CHECKS[place]
    stage = STAGE.changed(attempts=[open_attempt])
    launch = Launch(0, open_attempt, {}, None)
    applies = [check(now, stage, launch, seen) is not None for check in attempt.CHECKS]
    assert applies[: place + 2] == [False] * place + [True] * len(applies[place : place + 2])
