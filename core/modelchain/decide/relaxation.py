"""The epochs of a chain's stages after all rounds of relaxation, and what the status says of them.

Epochs follow from the plan and from the rounds in the status. A chain without a status finds its
rounds in its records. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from modelchain.api.spec import ModelChain, Relaxation
from modelchain.api.status import (
    Acceleration,
    ChainStatus,
    RelaxationRound,
    RelaxationStatus,
    Spent,
    SpentAt,
    StageLedger,
    StageStatus,
)
from modelchain.decide.ledger import total_of
from modelchain.gate.relaxation import Schedule, Trained, followed, relaxed, replayed, rounds_before
from modelchain.plan.plan import Plan, plan
from modelchain.plan.pools import NodePool
from modelchain.plan.prices import milliseconds


def schedules_of(
    chain: ModelChain, old: ChainStatus, pools: Mapping[str, NodePool], now: float
) -> tuple[dict[str, Schedule], Plan]:
    """By stage, its epochs, and the plan with them. They are as the spec gives them, or as they
    were allocated and then relaxed.

    The plan allocates epochs as if there had been no round. Otherwise it would take from the last
    stages what a round has added to the first ones.

    Args:
        pools: the chain's node pool, by the name that the spec gives it.
        now: seconds since the epoch.
    """
    when = milliseconds(now)
    allocated = plan(chain, "analytic", pools, old.frozen_epochs, when)
    schedules = {stage.name: Schedule(stage.epochs) for stage in allocated.stages}
    if not old.rounds:
        return schedules, allocated
    given = {stage.name for stage in chain.spec.stages if stage.epochs is not None}
    ledgers: list[StageLedger] = [*old.removed, *old.stages]
    for stage in ledgers:
        fixed = stage.frozen and stage.name in schedules and stage.name not in given
        if fixed and stage.epochs is not None:
            schedules[stage.name] = Schedule(stage.epochs, stage.round, stage.first_epochs)
    names = [stage.name for stage in chain.spec.stages]
    after = relaxed(names, schedules, old.rounds, chain.spec.recipe.baseline_epochs)
    after |= {name: schedules[name] for name in given}
    epochs = {name: one.epochs for name, one in after.items()}
    return after, plan(chain, "analytic", pools, epochs, when)


def with_moved_rounds(chain: ModelChain, old: ChainStatus) -> ChainStatus:
    """The status with each round at the stage that it belongs to after an edit of the stages."""
    if old.relaxation is None:
        return old
    before = {
        stage.name: Schedule(stage.epochs, stage.round, stage.first_epochs)
        for stage in old.stages
        if stage.epochs is not None
    }
    names = [stage.name for stage in chain.spec.stages]
    rounds = followed(old.rounds, before, names, chain.spec.recipe.baseline_epochs)
    moved = old.relaxation.model_copy(update={"rounds": rounds})
    return old.model_copy(update={"relaxation": moved})


def relaxation(
    chain: ModelChain,
    rounds: Sequence[RelaxationRound],
    stages: Sequence[StageStatus],
    removed: Sequence[StageLedger],
) -> RelaxationStatus | None:
    """What the status says of relaxation; None before the first round."""
    if not rounds:
        return None
    epochs = {stage.name: stage.epochs for stage in stages if stage.epochs is not None}
    planned = plan(chain, "analytic", {}, epochs)
    given_up = [stage.relaxed for stage in (*stages, *removed) if stage.relaxed is not None]
    return RelaxationStatus(
        round=len(rounds),
        rounds=list(rounds),
        spent=total_of(given_up),
        acceleration=acceleration(chain, planned, stages, removed),
    )


def acceleration(
    chain: ModelChain,
    planned: Plan,
    stages: Sequence[StageStatus],
    removed: Sequence[StageLedger],
) -> Acceleration:
    """How many times fewer MACs the chain takes than its models alone.

    Args:
        planned: with the epochs of all rounds of relaxation so far.
    """
    spent = sum(stage.macs for stage in (*stages, *removed))
    finished = all(stage.done for stage in stages) and spent > 0
    return Acceleration(
        requested=chain.spec.allocation.target_acceleration,
        relaxed=f"{planned.acceleration:.3f}",
        achieved=f"{planned.individual.macs / spent:.3f}" if finished else None,
    )


def remembered(chain: ModelChain, records: Iterable[Trained]) -> ChainStatus:
    """The status of a chain that has none: what its records tell of its stages' epochs.

    A chain may have been deleted and applied again. Its stages keep the epochs that they were
    trained for. New ones would be new inputs, and train every stage again. What earlier rounds have
    cost counts as well.
    """
    gate = chain.spec.gate
    factor = gate.relaxation.factor if gate else Relaxation().factor
    trained = list(records)
    newest, rounds = replayed([stage.name for stage in chain.spec.stages], trained, factor)
    stages = [_remembered(record, rounds_before(record, trained)) for record in newest.values()]
    known = RelaxationStatus(round=len(rounds), rounds=rounds) if rounds else None
    return ChainStatus(stages=stages, relaxation=known)


def _remembered(newest: Trained, before: Sequence[Trained]) -> StageStatus:
    """A stage of which only records are known: the newest one, and those of earlier rounds."""
    return StageStatus(
        name=newest.stage,
        epochs=newest.schedule.epochs,
        frozen=True,
        round=newest.schedule.round,
        first_epochs=newest.schedule.first_epochs,
        last_digest=newest.input_digest,
        reused=[
            SpentAt(input_digest=record.input_digest, spent=record.spent)
            for record in before
            if record.spent != Spent()
        ],
        replaced=[record.input_digest for record in before],
    )
