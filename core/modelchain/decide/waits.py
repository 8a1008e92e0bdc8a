"""What a stage waits for before its next attempt: an ordered list of small functions.

Each function checks one thing. It returns the waiting stage, or None if that thing does not prevent
an attempt. The first one that returns a stage counts. All of them are pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from modelchain.api.contracts import FailureClass
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import StageStatus
from modelchain.decide import transitions
from modelchain.decide.nodes import same_everywhere
from modelchain.decide.observed import MakeClaim, MakeIndex, TakeShare
from modelchain.decide.outcome import Outcome, Turn, failed, stalled, unnumbered

# Seconds between two reads of a Job that fills the data's claim. Its events name no chain, so they
# cause no pass.
LOADING_SECONDS = 5.0
# Seconds between two reads of an index Job. Its end wakes the chain that made it, so only what it
# waits for, and the end of another chain's, is found by these.
INDEXING_SECONDS = 30.0

Wait = Callable[[Turn, StageStatus], Outcome | None]


def for_a_request(turn: Turn, stage: StageStatus) -> Outcome | None:
    """A finished chain whose artifact is gone trains nothing unless a user asks for it."""
    if not turn.finished:
        return None
    again = "type `modelchain retry`" if turn.observed.records else "run again"
    message = f"the chain had ended before; {again} to train it"
    return failed(turn, stage, FailureClass.NO_ARTIFACT, message)


def for_an_earlier_attempt(turn: Turn, stage: StageStatus) -> Outcome | None:
    """Only one attempt of a chain may run, and an earlier one still writes its checkpoint."""
    observed = turn.observed
    if not observed.live:
        return None
    if turn.stopping is None and stage.input_digest is not None:
        # The earlier attempt may not be in the status. Its number must not be used again, so it is
        # kept: once the attempt's objects are gone, they no longer tell it.
        highest = observed.highest_number(unnumbered(turn, stage), stage.input_digest)
        stage = transitions.numbered_after(stage, highest)
    if stage.not_before is None:
        stage = transitions.waiting(stage, replace(turn.miss, stops_first=True))
    else:  # it keeps the reason of its last failure
        stage = transitions.idle(stage)
    if observed.stuck is not None:
        return stalled(turn, stage, observed.stuck)
    return Outcome(stage, again=observed.poll_seconds)


def for_resumption(turn: Turn, stage: StageStatus) -> Outcome | None:
    """The chain is suspended, or the local command was interrupted."""
    if turn.stopping is None:
        return None
    return Outcome(transitions.suspended(stage, turn.stopping))


def for_the_back_off(turn: Turn, stage: StageStatus) -> Outcome | None:
    """The pause before a retry. Meanwhile the stage keeps its share and its reason."""
    if stage.not_before is None or turn.now >= stage.not_before:
        return None
    assert stage.input_digest is not None
    return Outcome(
        transitions.idle(stage),
        again=stage.not_before - turn.now,
        shares=frozenset({stage.input_digest}),
    )


def for_an_obstacle(turn: Turn, stage: StageStatus) -> Outcome | None:
    """Nothing can be launched until a person acts."""
    obstacle = turn.observed.obstacle
    return None if obstacle is None else stalled(turn, transitions.idle(stage), obstacle)


def for_other_devices(turn: Turn, stage: StageStatus) -> Outcome | None:
    """The same device error on several nodes: another node would hardly help."""
    everywhere = same_everywhere(turn.avoid)
    return None if everywhere is None else stalled(turn, transitions.idle(stage), everywhere)


def for_the_claim(turn: Turn, stage: StageStatus) -> Outcome | None:
    """The chain's own claim for artifacts is still to be created."""
    if not turn.observed.claim_missing:
        return None
    reason = Reason(Code.MAKES_CLAIM, message="makes the claim for its artifacts")
    return Outcome(transitions.waiting(stage, reason), action=MakeClaim())


def for_the_data(turn: Turn, stage: StageStatus) -> Outcome | None:
    """A Job still fills the data's claim, or has failed to."""
    loading = turn.observed.loading()
    if loading is None:
        return None
    if loading.code is Code.DATA_FAILED:
        return stalled(turn, transitions.idle(stage), loading)
    return Outcome(transitions.waiting(stage, loading), again=LOADING_SECONDS)


def for_the_index(turn: Turn, stage: StageStatus) -> Outcome | None:
    """A Job on CPUs still indexes and checks the data, so no GPU is asked for yet."""
    seen = turn.observed.indexing()
    if seen is None:
        return None
    if seen.failure is not None:
        return failed(turn, stage, seen.failure, seen.reason.message)
    if seen.stalls:
        return stalled(turn, transitions.idle(stage), seen.reason)
    return Outcome(
        transitions.indexing(stage, seen.reason),
        action=MakeIndex(seen.job) if seen.due else None,
        again=INDEXING_SECONDS,
    )


def for_the_share(turn: Turn, stage: StageStatus) -> Outcome | None:
    """Another chain has the share of these inputs. Once it has trained them, they may be a hit."""
    digest = stage.input_digest
    assert digest is not None
    share, again = turn.observed.share(digest), turn.observed.poll_seconds
    if share in (None, "Mine"):
        return None
    if isinstance(share, Reason):
        return Outcome(transitions.waiting_for_another_chain(stage, share), again=again)
    message = "reserves its inputs, which other chains on its claim may train as well"
    return Outcome(
        transitions.waiting(stage, Reason(Code.TAKES_SHARE, message=message)),
        action=TakeShare(digest),
        again=again,
        shares=frozenset({digest}),
    )


# They are asked in this order. A new kind of budget or gate is one more function in this list.
BEFORE_INTENT: tuple[Wait, ...] = (
    for_a_request,
    for_an_earlier_attempt,
    for_resumption,
    for_the_back_off,
    for_an_obstacle,
    for_other_devices,
    for_the_claim,
    for_the_data,
    for_the_index,
    for_the_share,
)


def first_wait(turn: Turn, stage: StageStatus) -> Outcome | None:
    """What the stage waits for before its next attempt; None if nothing is in the way."""
    answers = (wait(turn, stage) for wait in BEFORE_INTENT)
    return next((answer for answer in answers if answer is not None), None)
