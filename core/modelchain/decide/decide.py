"""`decide` decides what a chain does next, from its spec, what was read, and the time.

It is a pure function, and the same for a laptop and a cluster.

A decision is at most one write. If the status must change, the decision is to write it. An action
is taken only if the stored status already implies it. So a process may die between any two
decisions: the next one finds all that it needs in the stored status.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus, StageStatus
from modelchain.decide import transitions
from modelchain.decide.baselines import (
    awaiting,
    dropped_baselines,
    only_alone,
    planned_baselines,
    train_alone,
    with_baseline,
)
from modelchain.decide.budget import as_planned
from modelchain.decide.conditions import completed
from modelchain.decide.gate import gated
from modelchain.decide.ledger import seconds
from modelchain.decide.measure import with_measurements
from modelchain.decide.nodes import still_avoided, without_faults
from modelchain.decide.observed import (
    Action,
    Decision,
    Discard,
    DropShare,
    Measure,
    Observed,
    Stop,
)
from modelchain.decide.outcome import Hold, Outcome, Turn
from modelchain.decide.refusals import with_refusal, with_refused_end
from modelchain.decide.relaxation import relaxation, schedules_of, with_moved_rounds
from modelchain.decide.removed import removed
from modelchain.decide.stage import advance, behind, waits_for
from modelchain.plan.plan import Plan

# For so long the job of a closed attempt may still run, so that its sidecars can end by themselves.
SIDECAR_GRACE = 60.0


def decide(chain: ModelChain, observed: Observed, now: float) -> Decision:
    """What the chain does next.

    Args:
        chain: the checked spec.
        observed: what this pass has read, with the stored status.
        now: seconds since the epoch.
    """
    stored = observed.status
    old = with_moved_rounds(chain, stored)
    observed = replace(observed, status=old)
    # Removing the retry annotation is no new retry.
    retried = bool(observed.retry) and observed.retry != old.retry
    # A retry, or a spec that has changed, renews all budgets.
    fresh = retried or old.observed_generation != (chain.metadata.generation or 0)
    stages, baselines, planned = planned_stages(chain, observed, fresh, now)
    avoid = [] if retried else still_avoided(old.avoid, now)
    turn = Turn(
        chain=chain,
        index=0,
        observed=observed,
        now=now,
        finished=not fresh and old.is_over(len(stages)) and observed.only is None,
        retried=retried,
        stopping=_stopping(chain, observed),
        plan=planned,
        avoid=tuple(without_faults(avoid) if fresh else avoid),
        held=only_alone(observed),
    )
    outcomes = with_measurements(turn, _along(turn, stages, baselines))
    leaving = lingering([outcome.stage for outcome in outcomes], observed, now)
    wanted = frozenset(leaving).union(*(outcome.wanted for outcome in outcomes))
    unwanted = list(_unwanted(observed, wanted))
    outcomes = with_refused_end(turn, outcomes, unwanted[0] if unwanted else None)
    status = _status(turn, outcomes, baselines)
    if status != stored:
        return Decision(status, write=True, again=0.0)
    return _next_action(status, observed, outcomes, unwanted, leaving.values())


def _status(
    turn: Turn, outcomes: list[Outcome], baselines: Mapping[str, StageStatus]
) -> ChainStatus:
    """The chain's status after the outcomes of its stages and of these baselines."""
    chain, old = turn.chain, turn.observed.status
    stages = [outcome.stage for outcome in outcomes if not outcome.alone]
    alone = [outcome.stage for outcome in outcomes if outcome.alone]
    begun = [outcome.begins for outcome in outcomes if outcome.begins is not None]
    # The last stage that changed the avoided nodes has the newest list.
    changed = [outcome.avoid for outcome in outcomes if outcome.avoid is not None]
    gone = removed(turn)
    return completed(
        chain,
        old,
        stages,
        turn.observed.retry or old.retry,
        turn.now,
        changed[-1] if changed else turn.avoid,
        gone,
        relaxation(chain, [*old.rounds, *begun], stages, gone),
        [*alone, *dropped_baselines(turn, baselines)],
        turn.observed.currency,
    )


def _along(
    turn: Turn, stages: list[StageStatus], baselines: Mapping[str, StageStatus]
) -> list[Outcome]:
    """The outcome of every stage and baseline, in order.

    A stage can advance once its predecessor has an artifact; until then it waits. Its baseline
    comes right before it.
    """
    outcomes: list[Outcome] = []
    blocked: str | None = None
    for index, stage in enumerate(stages):
        turn = replace(turn, index=index)
        baseline: Outcome | None = None
        if stage.name in baselines:
            before = turn if blocked is None else replace(turn, held=Hold(waits_for(blocked), True))
            others = [*stages, *_alone(outcomes, baselines, but=stage.name)]
            baseline = train_alone(before, baselines[stage.name], others)
            outcomes.append(baseline)
        if blocked is not None:
            outcomes.append(behind(turn, stage, blocked))
            continue
        now = awaiting(turn, baseline, _alone(outcomes, baselines))
        outcome = gated(now, with_refusal(now, advance(now, stage)), baseline)
        outcomes.append(with_baseline(outcome, baseline))
        if outcome.artifact is None:
            blocked = stage.name
        turn = replace(
            turn,
            predecessor=outcome.artifact,
            handed_over=outcome.handed_over,
            held=turn.held or outcome.holds,
        )
    return outcomes


def _alone(
    outcomes: Iterable[Outcome], baselines: Mapping[str, StageStatus], but: str = ""
) -> list[StageStatus]:
    """The baselines as they are now: after this pass, as far as it has come, or as stored."""
    now = {outcome.stage.name: outcome.stage for outcome in outcomes if outcome.alone}
    return [row for name, row in {**baselines, **now}.items() if name != but]


def _next_action(
    status: ChainStatus,
    observed: Observed,
    outcomes: list[Outcome],
    unwanted: list[Action],
    leave_in: Iterable[float],
) -> Decision:
    """The decision when the status need not change: an action, or a pause before the next pass.

    `leave_in`: the seconds for which lingering attempts may still go on.
    """
    shares = frozenset[str]().union(*(outcome.shares for outcome in outcomes))
    due_in = [outcome.again for outcome in outcomes if outcome.again is not None]
    again = min([*due_in[:1], *leave_in], default=None)
    due = [outcome.action for outcome in outcomes if outcome.action is not None]
    jobs = frozenset[str]().union(*(outcome.jobs for outcome in outcomes))
    spare = list(_spare(observed, jobs))
    first = spare if due and isinstance(due[0], Measure) else []  # one such Job runs at a time
    candidates = [*unwanted, *first, *due, *_tidying(observed, shares), *spare]
    action = candidates[0] if candidates else None
    at_rest = again is None and action is None
    pause = None if at_rest else again or observed.poll_seconds
    return Decision(status, write=False, action=action, again=pause)


def lingering(stages: Iterable[StageStatus], observed: Observed, now: float) -> Mapping[str, float]:
    """The closed attempts whose job or sidecars go on, each with the seconds it may still do so.

    After that it is not wanted any more. Until it is gone, no other attempt is made.
    """
    closed = {
        attempt.name: seconds(attempt.finished_at) + SIDECAR_GRACE - now
        for stage in stages
        for attempt in stage.attempts
        if attempt.finished_at is not None and attempt.name in observed.live
    }
    return {name: left for name, left in closed.items() if left > 0}


def _unwanted(observed: Observed, wanted: frozenset[str]) -> Iterable[Action]:
    """The actions that end what must not run: strays, and attempts that are not wanted any more.

    They come before all others.
    """
    for uid, name in sorted(observed.strays.items()):
        yield Discard(uid, name)
    for name in sorted(observed.live - wanted):
        yield Stop(name)


def _spare(observed: Observed, needed: frozenset[str]) -> Iterable[Action]:
    """The actions that delete evaluation Jobs that are not needed."""
    for uid, name in sorted(observed.evaluation_jobs.items()):
        if name not in needed:
            yield Discard(uid, name)


def _tidying(observed: Observed, shares: frozenset[str]) -> Iterable[Action]:
    """The actions that give back shares and delete finished jobs. They come after all others."""
    for digest in sorted(observed.shares - shares):
        yield DropShare(digest)
    for uid, name in sorted(observed.spent_jobs.items()):
        yield Discard(uid, name)


def _stopping(chain: ModelChain, observed: Observed) -> Reason | None:
    """Why nothing may run; None if it may."""
    if observed.interrupted:
        message = "interrupted; the same command resumes from the newest checkpoint"
        return Reason(Code.INTERRUPTED, message=message)
    if chain.spec.suspend:
        return Reason(Code.SUSPENDED, message="spec.suspend is true; set it to false to go on")
    return None


def planned_stages(
    chain: ModelChain, observed: Observed, fresh: bool, now: float
) -> tuple[list[StageStatus], dict[str, StageStatus], Plan]:
    """The spec's stages in order and its baselines by stage, with what the status knows of them,
    and the plan.

    Epochs with which a stage was launched stay. If the spec or the retry is new, budgets are
    renewed.
    """
    old = observed.status
    known = {stage.name: transitions.returned(stage) for stage in old.removed}
    known |= {stage.name: stage for stage in old.stages}
    pool = observed.pool
    pools = {} if pool is None else {chain.spec.runner.node_pool or "": pool}
    schedules, planned = schedules_of(chain, old, pools, now)
    figures = {stage.name: stage for stage in planned.stages}
    stages = []
    for spec in chain.spec.stages:
        stage = transitions.planned(
            known.get(spec.name, StageStatus(name=spec.name)),
            schedules[spec.name],
            macs=figures[spec.name].macs,
            frozen=spec.epochs is None and spec.name in old.frozen_epochs,
        )
        figure = figures[spec.name]
        stage = transitions.foreseen(stage, as_planned(figure), as_planned(figure.individual))
        stages.append(transitions.renewed(stage) if fresh else stage)
    return stages, planned_baselines(chain, planned, observed, fresh), planned
