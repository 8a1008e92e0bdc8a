"""The gate's verdict on a finished stage, and what follows from it. Pure."""

from __future__ import annotations

from dataclasses import replace

from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import Gate
from modelchain.api.status import GateStatus, GateVerdict
from modelchain.decide import transitions
from modelchain.decide.measure import measured
from modelchain.decide.observed import Artifact
from modelchain.decide.outcome import Hold, Outcome, Turn
from modelchain.gate.relaxation import next_round
from modelchain.gate.verdict import in_words, judged, within_error
from modelchain.identity.digest import short_key


def gated(turn: Turn, outcome: Outcome, baseline: Outcome | None) -> Outcome:
    """The outcome of a stage with the gate's verdict on it, once it has finished.

    Nothing that has finished is lost by a verdict. Later stages are only kept from being trained,
    until the stage has passed, or a person lets them.

    Args:
        baseline: that of the same model trained alone, if the gate trains it.
    """
    gate, artifact = turn.chain.spec.gate, outcome.artifact
    stage = outcome.stage
    if gate is None or artifact is None:
        return replace(outcome, stage=transitions.judged(stage, None))
    alone = _metrics(turn, baseline.artifact) if baseline and baseline.artifact else {}
    found = judged(gate, stage.name, _metrics(turn, artifact), alone, _pictures(turn, artifact))
    outcome = replace(outcome, stage=transitions.judged(stage, found))
    if found.verdict is GateVerdict.UNMEASURED:
        return _unmeasured(outcome, gate, found)
    if found.verdict is not GateVerdict.MISSED or gate.on_miss == "Continue":
        return outcome
    if gate.on_miss == "Relax":
        return _relaxed(turn, outcome, gate, found)
    return _stopped(outcome, gate, found, "give the stage more epochs")


def _unmeasured(outcome: Outcome, gate: Gate, found: GateStatus) -> Outcome:
    """The chain is not complete without a verdict. Later stages wait for it too, unless a miss has
    no consequences.
    """
    stage = outcome.stage
    whose = "" if found.result is None else " of the model trained alone"
    reason = Reason(
        Code.GATE_UNMEASURED,
        stage.name,
        f"{found.metric}{whose}, which the gate needs, is not measured",
    )
    waits = Reason(Code.WAITS_FOR_GATE, stage.name, f"waits for the gate's verdict on {stage.name}")
    hold = None if gate.on_miss == "Continue" else Hold(waits, stops=False)
    return replace(outcome, stage=transitions.explained(stage, reason), holds=hold)


def _metrics(turn: Turn, artifact: Artifact) -> dict[str, float]:
    """The metrics of the gate's evaluation that were measured on an artifact."""
    spec = turn.chain.spec
    asked = (e for e in spec.evaluation if spec.gate and e.name == spec.gate.metric)
    return {name: value for e in asked for name, value in measured(e, artifact).items()}


def _pictures(turn: Turn, artifact: Artifact) -> int | None:
    """On how many pictures the gate's metric was measured, if it is the share of them that the
    model classifies right. Other metrics have no standard error that follows from the number.
    """
    spec = turn.chain.spec
    asked = next((e for e in spec.evaluation if spec.gate and e.name == spec.gate.metric), None)
    if asked is None or asked.kind != "ZeroShot":
        return None
    return artifact.pictures.get(short_key(asked))


def _relaxed(turn: Turn, outcome: Outcome, gate: Gate, found: GateStatus) -> Outcome:
    """Begin a round. In the next pass the stage has its new epochs, and so other inputs."""
    stage, rounds = outcome.stage, turn.observed.status.rounds
    assert stage.epochs is not None
    factor, most = gate.relaxation.factor, turn.chain.spec.recipe.baseline_epochs
    one = next_round(stage.name, stage.epochs, factor, most)
    if one is None:
        return _stopped(outcome, gate, found, None)
    if len(rounds) >= gate.relaxation.max_rounds:
        return _stopped(outcome, gate, found, "raise gate.relaxation.maxRounds")
    if turn.stopping is not None:  # a round that has begun is never taken back
        waits = Reason(Code.WAITS_FOR_GATE, stage.name, f"waits for the gate on {stage.name}")
        return replace(outcome, holds=Hold(waits, stops=True))
    error = "; the miss is smaller than the standard error" if within_error(gate, found) else ""
    message = (
        f"{in_words(gate, found)}; round {len(rounds) + 1} trains it for {one.epochs} epochs"
        f" instead of {stage.epochs}{error}"
    )
    stage = transitions.relaxed(stage, Reason(Code.GATE_RELAXED, stage.name, message))
    return replace(outcome, stage=stage, artifact=None, begins=one, again=0.0)


def _stopped(outcome: Outcome, gate: Gate, found: GateStatus, longer: str | None) -> Outcome:
    """A person decides.

    Args:
        longer: how the stage gets more epochs; None if it has all that it may have.
    """
    stage = outcome.stage
    ways = ["raise gate.tolerance", "set gate.onMiss: Continue", *([longer] if longer else [])]
    listed = f"{', '.join(ways[:-1])}{',' if longer else ''} or {ways[-1]}"
    reason = Reason(Code.GATE_MISSED, stage.name, f"{in_words(gate, found)}; to go on, {listed}")
    waits = Reason(
        Code.WAITS_FOR_GATE, stage.name, f"waits for a person, as {stage.name} missed its baseline"
    )
    hold = Hold(waits, stops=True)
    return replace(outcome, stage=transitions.held_by_the_gate(stage, reason), holds=hold)
