"""What a stage says while the API server refuses what is due for it. Pure.

A refused action stays due, and is tried again and again. Until it is accepted, the stage's reason
has the server's words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from modelchain.api.reasons import Code
from modelchain.api.status import StageStatus, State
from modelchain.decide import transitions
from modelchain.decide.observed import (
    Action,
    Discard,
    DropShare,
    Launch,
    MakeClaim,
    MakeIndex,
    Measure,
    RecordArtifact,
    RecordMetrics,
    Release,
    Stop,
    TakeShare,
    Verify,
)
from modelchain.decide.outcome import Outcome, Turn

# The code of a refusal, by the kind of action.
CODES: Mapping[type[Action], Code] = {
    Launch: Code.LAUNCH_REFUSED,
    Release: Code.RELEASE_REFUSED,
    Stop: Code.DELETE_REFUSED,
    Discard: Code.DELETE_REFUSED,
    Verify: Code.VERIFY_REFUSED,
    RecordArtifact: Code.RECORD_REFUSED,
    Measure: Code.MEASURE_REFUSED,
    RecordMetrics: Code.MEASURE_REFUSED,
    MakeClaim: Code.CLAIM_REFUSED,
    MakeIndex: Code.INDEX_REFUSED,
    TakeShare: Code.SHARE_REFUSED,
    DropShare: Code.SHARE_REFUSED,
}
# A release may also be refused for the lack of a queue.
REFUSALS = frozenset({*CODES.values(), Code.QUEUE_REQUIRED})
# A refusal of these kinds may pass: a quota is freed, a webhook starts again. A person has to act
# only if it has lasted for so many seconds.
PASSING, PASSES_WITHIN = (Code.LAUNCH_REFUSED, Code.RELEASE_REFUSED), 60.0


def with_refusal(turn: Turn, outcome: Outcome) -> Outcome:
    """The outcome of a stage; if its action was refused, with the server's words as the reason."""
    if outcome.action is None:
        return outcome
    return replace(outcome, stage=_told(turn, outcome.stage, outcome.action))


def with_refused_end(turn: Turn, outcomes: list[Outcome], ending: Action | None) -> list[Outcome]:
    """The outcomes; if the server refuses `ending`, with its words as the reason of one stage.

    It is the first stage that has not ended, since that one waits until what must not run is gone.
    """
    ended = (State.SUCCEEDED, State.FAILED)
    waiting = (n for n, outcome in enumerate(outcomes) if outcome.stage.state not in ended)
    first = next(waiting, None)
    if ending is None or first is None:
        return outcomes
    one = outcomes[first]
    told = replace(one, stage=_told(replace(turn, alone=one.alone), one.stage, ending))
    return [*outcomes[:first], told, *outcomes[first + 1 :]]


def _told(turn: Turn, stage: StageStatus, action: Action) -> StageStatus:
    """The stage; if this action was refused, with the server's words as the reason.

    If only the status says so, another process has tried the action, or this one before a restart.
    Then the reason stays until the action is tried again, so that it does not change to and fro.
    """
    status = turn.observed.status
    rows = status.baselines if turn.alone else status.stages
    stored = (known for known in rows if known.name == stage.name)
    before, refusal = next(stored, stage), turn.observed.refused(action)
    if refusal is None:
        same = before.code in (CODES[type(action)], Code.QUEUE_REQUIRED)
        return transitions.as_told_before(stage, before) if same else stage
    code = refusal.reason.code
    passing = code in PASSING and turn.now - refusal.since < PASSES_WITHIN
    if passing and not (before.stalled and before.code is code):
        return transitions.explained(stage, refusal.reason)
    return transitions.stalled(stage, refusal.reason)
