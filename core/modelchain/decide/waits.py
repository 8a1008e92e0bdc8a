"""What a stage waits for before its next attempt: an ordered list of small functions.

Each function looks at one thing and answers with the stage as it waits, or with None if that thing
is not in the way. The first answer counts. All of them are pure.
"""

from __future__ import annotations

from collections.abc import Callable

from modelchain.api.contracts import FailureClass
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import StageStatus
from modelchain.decide import transitions
from modelchain.decide.nodes import same_everywhere
from modelchain.decide.observed import MakeClaim, TakeShare
from modelchain.decide.outcome import Outcome, Turn, failed, stalled

LOADING_SECONDS = 5.0  # between two looks at a Job that fills the claim of data

Wait = Callable[[Turn, StageStatus], Outcome | None]


def for_a_request(turn: Turn, stage: StageStatus) -> Outcome | None:
    """A finished chain whose artifact has gone trains nothing unasked."""
    if not turn.finished:
        return None
    again = "type `modelchain retry`" if turn.observed.records else "run again"
    message = f"the chain had ended before; {again} to train it"
    return failed(turn, stage, FailureClass.NO_ARTIFACT, message)


def for_an_earlier_attempt(turn: Turn, stage: StageStatus) -> Outcome | None:
    """One attempt of a chain lives at a time; an earlier one still writes its checkpoint."""
    observed = turn.observed
    if not observed.live:
        return None
    if turn.stopping is None and stage.input_digest is not None:
        # Once the earlier attempt is gone, nothing else remembers its number.
        highest = observed.highest_number(stage.name, stage.input_digest)
        stage = stage.changed(attempt_count=max(stage.attempt_count, highest))
    message = f"{turn.miss.message}; waits for an earlier attempt to stop"
    stage = transitions.waiting(stage, turn.miss.with_message(message))
    if observed.stuck is not None:
        return stalled(turn, stage, observed.stuck)
    return Outcome(stage, again=observed.poll_seconds)


def for_resumption(turn: Turn, stage: StageStatus) -> Outcome | None:
    if turn.stopping is None:
        return None
    return Outcome(transitions.suspended(stage, turn.stopping))


def for_the_back_off(turn: Turn, stage: StageStatus) -> Outcome | None:
    """The pause before a retry. The share is kept meanwhile, and so is what was said of it."""
    if stage.not_before is None or turn.now >= stage.not_before:
        return None
    assert stage.input_digest is not None
    return Outcome(
        transitions.idle(stage),
        again=stage.not_before - turn.now,
        shares=frozenset({stage.input_digest}),
    )


def for_an_obstacle(turn: Turn, stage: StageStatus) -> Outcome | None:
    obstacle = turn.observed.obstacle
    return None if obstacle is None else stalled(turn, transitions.idle(stage), obstacle)


def for_other_devices(turn: Turn, stage: StageStatus) -> Outcome | None:
    everywhere = same_everywhere(turn.avoid)
    return None if everywhere is None else stalled(turn, transitions.idle(stage), everywhere)


def for_the_claim(turn: Turn, stage: StageStatus) -> Outcome | None:
    if not turn.observed.claim_missing:
        return None
    reason = Reason(Code.MAKES_CLAIM, message="makes the claim for its artifacts")
    return Outcome(transitions.waiting(stage, reason), action=MakeClaim())


def for_the_data(turn: Turn, stage: StageStatus) -> Outcome | None:
    loading = turn.observed.loading()
    if loading is None:
        return None
    if loading.code is Code.DATA_FAILED:
        return stalled(turn, transitions.idle(stage), loading)
    return Outcome(transitions.waiting(stage, loading), again=LOADING_SECONDS)


def for_the_share(turn: Turn, stage: StageStatus) -> Outcome | None:
    """Another chain trains the same inputs; after that, its artifact may be a hit."""
    digest = stage.input_digest
    assert digest is not None
    holder = turn.observed.share(digest)
    if holder in (None, "Mine"):
        return None
    again = turn.observed.poll_seconds
    if not holder:
        message = "claims the stage it may share with other chains"
        return Outcome(
            transitions.waiting(stage, Reason(Code.TAKES_SHARE, message=message)),
            action=TakeShare(digest),
            again=again,
            shares=frozenset({digest}),
        )
    message = f"chain {holder} trains the same stage; this one waits until that has ended"
    reason = Reason(Code.SHARED_STAGE, holder, message)
    return Outcome(transitions.waiting_for_another_chain(stage, reason), again=again)


# In this order before a new attempt is intended. A later budget or gate is one more function here.
BEFORE_INTENT: tuple[Wait, ...] = (
    for_a_request,
    for_an_earlier_attempt,
    for_resumption,
    for_the_back_off,
    for_an_obstacle,
    for_other_devices,
    for_the_claim,
    for_the_data,
    for_the_share,
)


def first_wait(turn: Turn, stage: StageStatus) -> Outcome | None:
    """What the stage waits for before its next attempt; None if nothing is in the way."""
    answers = (wait(turn, stage) for wait in BEFORE_INTENT)
    return next((answer for answer in answers if answer is not None), None)
