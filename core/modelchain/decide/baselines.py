"""Baselines: models of the chain that are trained alone, to compare the chain's stages with.

A baseline is a stage without a predecessor. It is launched, watched, retried and recorded as any
stage, and has attempts and a ledger of its own. Its inputs are those of a chain with this model
alone, so that chains on one claim train it once. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import ModelChain
from modelchain.api.status import StageStatus, State
from modelchain.decide import transitions
from modelchain.decide.observed import Observed
from modelchain.decide.outcome import Hold, Outcome, Turn, settled
from modelchain.decide.refusals import with_refusal
from modelchain.decide.stage import advance, waits_for
from modelchain.gate.relaxation import Schedule
from modelchain.plan.plan import Plan


def planned_baselines(
    chain: ModelChain, plan: Plan, observed: Observed, fresh: bool
) -> dict[str, StageStatus]:
    """By stage, each baseline that is to be trained, with what the status knows of it."""
    asked = {*(chain.spec.gate.train if chain.spec.gate else []), observed.only}
    known = {row.name: row for row in observed.status.baselines}
    rows = {}
    for stage in plan.stages:
        if stage.name in asked:
            row = transitions.planned(
                known.get(stage.name, StageStatus(name=stage.name)),
                Schedule(stage.individual.epochs),
                macs=stage.individual.macs,
                frozen=False,
            )
            rows[stage.name] = transitions.renewed(row) if fresh else row
    return rows


def only_alone(observed: Observed) -> Hold | None:
    """Why nothing else is trained by `run --alone`; None for any other command."""
    if observed.only is None:
        return None
    message = f"only the model of {observed.only} is trained now, alone"
    return Hold(Reason(Code.WAITS_FOR_BASELINE, observed.only, message), stops=True)


def train_alone(turn: Turn, row: StageStatus, others: Iterable[StageStatus]) -> Outcome:
    """The outcome of the baseline of the stage whose turn it is.

    One attempt of a chain runs at a time. What runs goes on, and the baseline runs next.

    Args:
        turn: that of the stage. If it is held, the baseline waits as well, unless only it is asked
            for.
        row: the baseline.
        others: the chain's stages and its other baselines.
    """
    hold = turn.held if row.name != turn.observed.only else None
    running = _running(others)
    if hold is None and running is not None:
        hold = Hold(waits_for(running), stops=False)
    turn = replace(turn, alone=True, predecessor=None, handed_over=None, held=hold)
    outcome = with_refusal(turn, advance(turn, row))
    return replace(outcome, alone=True)


def _running(rows: Iterable[StageStatus]) -> str | None:
    """The first of them with an attempt that is open, be it only intended."""
    return next((row.name for row in rows if any(not a.finished_at for a in row.attempts)), None)


def awaiting(turn: Turn, baseline: Outcome | None, alone: Iterable[StageStatus]) -> Turn:
    """The turn of a stage, which is not launched before its baseline has finished, or beside
    another one.

    Args:
        baseline: the stage's own.
        alone: all baselines of the chain.
    """
    waits = baseline is not None and baseline.artifact is None
    name = baseline.stage.name if baseline and waits else _running(alone)
    if name is None or turn.stopping is not None:
        return turn
    message = f"the model of {name} is trained alone first, as the gate asks"
    return replace(
        turn, held=turn.held or Hold(Reason(Code.WAITS_FOR_BASELINE, name, message), False)
    )


def with_baseline(outcome: Outcome, baseline: Outcome | None) -> Outcome:
    """The outcome of a stage; stalled if its baseline has failed and nothing of the stage runs."""
    if baseline is None or baseline.stage.state is not State.FAILED or outcome.wanted:
        return outcome
    row = baseline.stage
    reason = Reason(
        Code.BASELINE_FAILED, row.name, f"{row.name}, trained alone, failed: {row.reason}"
    )
    return replace(outcome, stage=transitions.held_by_the_gate(outcome.stage, reason))


def dropped_baselines(turn: Turn, wanted: Mapping[str, object]) -> list[StageStatus]:
    """The baselines that the gate asks for no longer, and that have spent something."""
    rows = [row for row in turn.observed.status.baselines if row.name not in wanted]
    turn = replace(turn, alone=True)
    spent = (row for row in rows if row.trained_here or row.reused)
    return [transitions.dropped(row, settled(turn, row)) for row in spent]
