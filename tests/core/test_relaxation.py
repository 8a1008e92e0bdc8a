"""How epochs grow after a miss, and how rounds are found again in records."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelchain.api.status import RelaxationRound
from modelchain.gate.relaxation import (
    Schedule,
    Trained,
    followed,
    longer,
    next_round,
    relaxed,
    replayed,
)

NAMES = ("a", "b", "c", "d")
FACTORS = st.sampled_from(["1", "1.0", "1.25", "1.5", "2", "99"])
EPOCHS = st.lists(st.integers(1, 200), min_size=4, max_size=4)


def schedules(*epochs: int) -> dict[str, Schedule]:
    return {name: Schedule(at) for name, at in zip(NAMES, epochs, strict=True)}


def epochs_of(found: dict[str, Schedule]) -> list[int]:
    return [found[name].epochs for name in NAMES]


def one_round(stage: str, epochs: int, factor: str = "1.25", most: int = 32) -> RelaxationRound:
    found = next_round(stage, epochs, factor, most)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("epochs", "factor", "most", "after"),
    [
        (20, "1.25", 32, 25),
        (21, "1.25", 32, 27),  # 26.25
        (1, "1.25", 32, 2),
        (3, "1", 32, 4),
        (30, "1.25", 32, 32),
        (32, "1.25", 32, 32),
        (40, "1.25", 32, 40),  # baselineEpochs were lowered
        (10, "1.1", 32, 11),  # not 12, as with floats: 10 * 1.1 is 11.000000000000002
    ],
)
def test_epochs_of_the_next_round(epochs: int, factor: str, most: int, after: int) -> None:
    assert longer(epochs, factor, most) == after
    assert (next_round("b", epochs, factor, most) is None) == (after == epochs)


@given(st.integers(1, 200), FACTORS, st.integers(1, 200))
def test_the_rule_of_growth(epochs: int, factor: str, most: int) -> None:
    after = longer(epochs, factor, most)
    assert epochs <= after <= max(epochs, most)
    assert after > epochs or epochs >= most
    if epochs <= most:
        assert after == min(most, max(epochs + 1, ceil(epochs * Fraction(factor))))


def test_the_missed_stage_and_later_ones_grow() -> None:
    rounds = [one_round("b", 20)]
    found = relaxed(NAMES, schedules(32, 20, 18, 12), rounds, 32)
    assert epochs_of(found) == [32, 25, 23, 15]
    assert found["a"] == Schedule(32) and found["c"] == Schedule(23, 1, 18)
    rounds.append(one_round("c", 23))
    found = relaxed(NAMES, schedules(32, 20, 18, 12), rounds, 32)
    assert epochs_of(found) == [32, 25, 29, 19], "c gets more than b, which passed"
    assert found["b"] == Schedule(25, 1, 20) and found["d"] == Schedule(19, 2, 12)


def test_later_stages_get_no_more_than_the_one_that_missed() -> None:
    found = relaxed(NAMES, schedules(32, 20, 24, 24), [one_round("b", 20)], 32)
    assert epochs_of(found) == [32, 25, 25, 25]


def test_an_edited_factor_holds_for_rounds_to_come() -> None:
    rounds = [one_round("b", 8), one_round("b", 10, factor="2")]
    assert epochs_of(relaxed(NAMES, schedules(32, 8, 8, 4), rounds, 32)) == [32, 20, 20, 10]


@given(EPOCHS, st.lists(st.tuples(st.integers(1, 3), FACTORS), max_size=5))
def test_rounds_are_applied_once_in_any_pieces(
    epochs: list[int], misses: list[tuple[int, str]]
) -> None:
    """A pass may die after any round, and each pass applies all rounds that it reads."""
    at, rounds = schedules(*epochs), list[RelaxationRound]()
    for missed, factor in misses:
        before = at
        name = NAMES[missed]
        one = next_round(name, at[name].epochs, factor, 100)
        if one is None:
            assert at[name].epochs >= 100
            continue
        rounds.append(one)
        at = relaxed(NAMES, at, rounds, 100)
        assert at == relaxed(NAMES, at, rounds, 100), "again changes nothing"
        assert at == relaxed(NAMES, schedules(*epochs), rounds, 100), "so does all at once"
        for index, stage in enumerate(NAMES):
            if index < missed:
                assert at[stage] == before[stage]
            else:
                assert at[stage].round == len(rounds) and at[stage].first == epochs[index]
                assert at[stage].epochs <= at[name].epochs
        assert at[name].epochs > before[name].epochs


def record(stage: str, epochs: int, round_: int = 0, first: int | None = None) -> Trained:
    return Trained(stage, "0" * 64, Schedule(epochs, round_, first), alone=stage == "a")


def test_rounds_are_found_in_records() -> None:
    records = [
        record("a", 32),
        record("b", 20),
        record("b", 25, 1, 20),
        record("c", 23, 1, 18),
        record("c", 29, 2, 18),
    ]
    newest, rounds = replayed(NAMES, records, "1.25")
    assert [(name, one.schedule.epochs) for name, one in newest.items()] == [
        ("a", 32),
        ("b", 25),
        ("c", 29),
    ]
    assert [(one.stage, one.epochs) for one in rounds] == [("b", 25), ("c", 29)]
    planned = {"d": Schedule(12)}  # by the plan, from the epochs of round 0
    known = {name: one.schedule for name, one in newest.items()}
    assert epochs_of(relaxed(NAMES, known | planned, rounds, 32)) == [32, 25, 29, 19]


def test_a_baseline_is_no_stage_of_the_chain() -> None:
    alone = replace(record("b", 32), alone=True)
    newest, rounds = replayed(NAMES, [record("a", 32), record("b", 20), alone], "1.25")
    assert newest["b"].schedule.epochs == 20 and newest["a"].alone and rounds == []


def test_a_round_that_another_chain_has_trained() -> None:
    newest, rounds = replayed(
        NAMES, [record("a", 32), record("b", 20), record("b", 32, 2, 20)], "2"
    )
    assert newest["b"].schedule.round == len(rounds) == 2


def test_older_records_of_another_schedule_do_not_count() -> None:
    """The target was edited and the chain applied again: `b` was allocated 16 epochs."""
    records = [record("a", 32), record("b", 20), record("b", 25, 1, 20), record("b", 16)]
    newest, rounds = replayed(NAMES, records, "2")
    assert newest["b"].schedule == Schedule(16) and rounds == []


def test_records_of_stages_that_are_gone_stay_known() -> None:
    newest, _ = replayed(NAMES, [record("a", 32), record("z", 9)], "2")
    assert newest["z"].schedule.epochs == 9


OLD = {"a": Schedule(32), "b": Schedule(20, 1, 16), "c": Schedule(13, 1, 10), "d": Schedule(7)}
ROUND = RelaxationRound(stage="b", epochs=20, factor="1.25")


@pytest.mark.parametrize(
    ("names", "stage", "epochs"),
    [
        ("a b c d", "b", 20),
        ("a b2 c d", "b2", 20),
        ("a2 b2 c d", "b2", 20),
        ("a b2 c2 d2", "b2", 20),
        ("a b2 c", "b2", 20),
        ("a c d", "c", 13),
        ("c d", "c", 13),
        ("a d", "d", 9),
        ("a", "b", 20),
        ("x y z w", "y", 20),
        ("a n c d e", "n", 20),
    ],
)
def test_a_round_of_a_stage_that_was_renamed_or_removed(
    names: str, stage: str, epochs: int
) -> None:
    """Of four stages, b missed; c has begun the round, and d has not."""
    [one] = followed([ROUND], OLD, names.split(), 32)
    assert (one.stage, one.epochs, one.factor) == (stage, epochs, "1.25")


@given(EPOCHS, st.lists(st.tuples(st.integers(1, 3), FACTORS), max_size=5))
def test_what_is_found_in_the_records_of_a_chain_is_what_it_did(
    epochs: list[int], misses: list[tuple[int, str]]
) -> None:
    """Each stage is trained, judged, and may miss. Afterwards the status is lost."""
    at, rounds = schedules(*epochs), list[RelaxationRound]()
    records = [record("a", epochs[0])]
    for missed, factor in sorted(misses, key=lambda miss: miss[0]):
        for name in NAMES[1 : missed + 1]:
            records.append(record(name, at[name].epochs, at[name].round, at[name].first))
        one = next_round(NAMES[missed], at[NAMES[missed]].epochs, factor, 100)
        if one is None:
            continue
        rounds.append(one)
        at = relaxed(NAMES, at, rounds, 100)
    for name in NAMES[1:]:
        records.append(record(name, at[name].epochs, at[name].round, at[name].first))
    newest, found = replayed(NAMES, records, "1.25")
    assert {name: one.schedule.epochs for name, one in newest.items()} == {
        name: one.epochs for name, one in at.items()
    }
    assert [(r.stage, r.epochs) for r in found] == [(r.stage, r.epochs) for r in rounds]


def test_a_baseline_of_a_stage_that_has_left_the_spec_is_no_stage() -> None:
    """`b` has a new name; its model alone was found first."""
    alone = replace(record("b", 32), alone=True)
    records = [record("a", 32), alone, record("b", 20), record("c", 18)]
    newest, _ = replayed(["a", "beta", "c", "d"], records, "1.25")
    assert list(newest) == ["a", "b", "c"] and newest["b"].schedule.epochs == 20
