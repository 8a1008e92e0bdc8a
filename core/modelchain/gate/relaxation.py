"""Rule 3 of the paper at run time: a stage that misses its baseline is trained for more epochs.

In each round the epochs of the stage that missed, and of all later ones, grow. A round is written
to the status before anything of it is trained, and is never taken back. Epochs follow from the
rounds, so that a process may die at any moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal

from modelchain.api.status import RelaxationRound, Spent


@dataclass(frozen=True)
class Schedule:
    """The epochs of one stage."""

    epochs: int
    # The last round that has changed them; 0 for none.
    round: int = 0
    # What they were before any round.
    first_epochs: int | None = None

    @property
    def first(self) -> int:
        return self.epochs if self.first_epochs is None else self.first_epochs


@dataclass(frozen=True)
class Trained:
    """What a record tells of the schedule of a finished stage."""

    stage: str
    input_digest: str
    schedule: Schedule
    # Trained without a predecessor.
    alone: bool
    # What the training has cost; nothing if that is in a ledger already.
    spent: Spent = field(default_factory=Spent)


def longer(epochs: int, factor: str, most: int) -> int:
    """The epochs of the next round: at least one more, but never more than `most`."""
    grown = int((Decimal(epochs) * Decimal(factor)).to_integral_value(ROUND_CEILING))
    return max(epochs, min(most, max(epochs + 1, grown)))


def next_round(stage: str, epochs: int, factor: str, most: int) -> RelaxationRound | None:
    """The round that follows when `stage` misses; None if its epochs cannot grow.

    Args:
        epochs: the stage's present ones.
        factor: by which they grow.
        most: the epochs of a model that is trained alone.
    """
    grown = longer(epochs, factor, most)
    if grown == epochs:
        return None
    return RelaxationRound(stage=stage, epochs=grown, factor=factor)


def relaxed(
    names: Sequence[str],
    schedules: Mapping[str, Schedule],
    rounds: Sequence[RelaxationRound],
    most: int,
) -> dict[str, Schedule]:
    """The schedules after all rounds.

    A later stage never gets more epochs than the one that missed. That one may get more than its
    predecessor.

    Args:
        names: the chain's stages, in order.
        schedules: by stage, its schedule. Rounds that it has been through are not applied again.
        rounds: all that have begun.
        most: the epochs of a model that is trained alone.
    """
    place = {name: index for index, name in enumerate(names)}
    after = dict(schedules)
    for number, one in enumerate(rounds, start=1):
        missed = place.get(one.stage, len(names))
        for name in names[missed:]:
            at = after[name]
            if at.round < number:
                grown = min(one.epochs, longer(at.epochs, one.factor, most))
                epochs = one.epochs if name == one.stage else grown
                after[name] = Schedule(epochs, number, at.first)
    return after


def followed(
    rounds: Sequence[RelaxationRound],
    before: Mapping[str, Schedule],
    names: Sequence[str],
    most: int,
) -> list[RelaxationRound]:
    """The rounds of a chain of which stages were renamed or removed since the rounds began.

    A round stays with a renamed stage. If its stage is gone, it holds from the next one on, which
    keeps the epochs that the round had given it.

    Args:
        rounds: all that have begun.
        before: by stage, in order, the schedules from before the edit.
        names: the chain's stages, in order.
        most: the epochs of a model that is trained alone.
    """
    after = []
    for number, one in enumerate(rounds, start=1):
        gone = one.stage in before and one.stage not in names
        after.append(_moved(one, number, before, names, most) if gone else one)
    return after


def _moved(
    one: RelaxationRound,
    number: int,
    before: Mapping[str, Schedule],
    names: Sequence[str],
    most: int,
) -> RelaxationRound:
    """A round whose stage is not in the spec any more."""
    old = list(before)
    place = old.index(one.stage)
    if new := _new_name(old, place, names):
        return RelaxationRound(stage=new, epochs=one.epochs, factor=one.factor)
    following = next((name for name in old[place + 1 :] if name in names), None)
    if following is None:
        return one
    has = before[following]
    grown = min(one.epochs, longer(has.epochs, one.factor, most))
    epochs = has.epochs if has.round >= number else grown
    return RelaxationRound(stage=following, epochs=epochs, factor=one.factor)


def _new_name(old: Sequence[str], place: int, names: Sequence[str]) -> str | None:
    """The new name of the stage that was at this place; None if the stage was removed.

    It was renamed if stages with new names stand where it and those right before it stood.
    """
    first = place
    while first > 0 and old[first - 1] not in names:
        first -= 1
    start = names.index(old[first - 1]) + 1 if first > 0 else 0
    there = names[start : start + place - first + 1]
    renamed = len(there) == place - first + 1 and not set(there) & set(old)
    return there[-1] if renamed else None


def replayed(
    names: Sequence[str], records: Iterable[Trained], factor: str
) -> tuple[dict[str, Trained], list[RelaxationRound]]:
    """What records tell of a chain without a status: by stage its newest record, and the rounds.

    The newest record has the epochs of the latest round that the stage has finished. A round that
    has left no record is not known any more; the verdict on the round before leads to it again.

    Args:
        names: the chain's stages, in order.
        records: of the chain's finished stages, the newest of each stage at the end.
        factor: by which stages grow that no record tells of.
    """
    place = {name: index for index, name in enumerate(names)}
    trained = list(records)
    # A later stage without a predecessor is a baseline, which is no stage of the chain. It is one
    # as well if its name has left the spec, and there is a record with a predecessor.
    later = {r.stage for r in trained if not r.alone} | set(names[1:])
    stages = [r for r in trained if not (r.alone and r.stage in later)]
    newest = {record.stage: record for record in stages}
    by_round: dict[int, Trained] = {}
    for record in sorted(stages, key=lambda r: place.get(r.stage, len(names)), reverse=True):
        if record.schedule.first == newest[record.stage].schedule.first:
            by_round[record.schedule.round] = record  # the first stage of a round is the missed one
    rounds: list[RelaxationRound] = []
    for number in sorted(by_round):
        # If another chain has trained a whole round, the next one stands for it.
        missed = by_round[number]
        one = RelaxationRound(stage=missed.stage, epochs=missed.schedule.epochs, factor=factor)
        rounds += [one] * (number - len(rounds))
    return newest, rounds


def rounds_before(newest: Trained, records: Iterable[Trained]) -> list[Trained]:
    """Of the rounds that came before a stage's newest record, the newest record of each."""
    before = {
        record.schedule.round: record
        for record in records
        if (record.stage, record.alone) == (newest.stage, newest.alone)
        and record.schedule.round < newest.schedule.round
        and record.schedule.first == newest.schedule.first
    }
    return [before[number] for number in sorted(before)]
