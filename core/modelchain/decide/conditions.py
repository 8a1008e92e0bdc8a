"""A chain's conditions, its one-line summary and the bound on its size: what `kubectl` and GitOps
tools read.

`Stalled` and `Reconciling` follow kstatus: there only while true, never both, `Ready` absent while
suspended.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from modelchain.api.messages import shortened
from modelchain.api.spec import ModelChain
from modelchain.api.status import (
    AvoidedNode,
    ChainStatus,
    Condition,
    StageStatus,
    State,
    Summary,
    Total,
)
from modelchain.decide.ledger import MESSAGE_LENGTH, timestamp, total_cost

MAX_BYTES = 60_000  # of a status as JSON; an object of 64 KiB is slow to watch and list
REASON_LENGTH = (
    2000  # characters of a stage's reason: a condition's message, of 4096 at most, is longer
)
BRIEF = 80  # characters of a sentence where there is no room
OVER = ("Complete", "Finished")


def completed(
    chain: ModelChain,
    old: ChainStatus,
    stages: list[StageStatus],
    retry: str | None,
    now: float,
    avoid: Iterable[AvoidedNode] = (),
) -> ChainStatus:
    """The whole status from its stages, just as it is read back after it was written."""
    stages = [_cut(stage, REASON_LENGTH, MESSAGE_LENGTH) for stage in stages]
    status = ChainStatus(
        observed_generation=chain.metadata.generation or 0,
        stages=stages,
        total=Total(
            macs=sum(s.macs for s in stages),
            gpu_seconds=sum(s.gpu_seconds for s in stages),
            cost=total_cost(s.cost for s in stages),
        ),
        avoid=list(avoid),
        retry=retry,
        conditions=_conditions(chain, old, stages, now),
        summary=_summary(chain, stages),
    )
    return _bounded(status).as_stored()


def refused(old: ChainStatus, generation: int, message: str, now: float) -> ChainStatus:
    """The status of a chain whose spec cannot be run: all that is known of its stages stays.

    It is not complete: the spec asks for something else than what has finished.
    """
    message = shortened(message, REASON_LENGTH)
    facts = (("Stalled", True), ("Ready", False), ("Admitted", False))
    conditions = [
        _condition(old, kind, true, "InvalidSpec", message, generation, now) for kind, true in facts
    ]
    kept = [
        _condition(old, c.type, False, "InvalidSpec", message, generation, now)
        if c.type in OVER
        else c
        for c in old.conditions
        if c.type not in ("Stalled", "Reconciling", "Ready", "Admitted")
    ]
    summary = old.summary.model_copy(update={"state": "InvalidSpec"})
    update = {
        "observed_generation": generation,
        "conditions": [*conditions, *kept],
        "summary": summary,
    }
    return old.model_copy(update=update).as_stored()


def constant(reason: str) -> str:
    """The reason constant a stage's sentence begins with, if it does: "SharedStage: ..." gives
    SharedStage.
    """
    head, colon, _ = reason.partition(": ")
    return head if colon and head.isalnum() and head[:1].isupper() else ""


def sentence(stage: StageStatus) -> str:
    """What a stage does, and why, for somebody who reads it in an event or a condition."""
    doing = _DOING.get(stage.state)
    if doing is None or not stage.reason.startswith("Miss: "):
        return f"stage {stage.name}: {stage.reason}"
    return f"stage {stage.name} {doing} ({stage.reason.removeprefix('Miss: ')})"


_DOING = {State.STARTING: "starts", State.RUNNING: "trains", State.SUCCEEDED: "was trained"}


def _conditions(
    chain: ModelChain, old: ChainStatus, stages: list[StageStatus], now: float
) -> list[Condition]:
    """In a fixed order, each with one sentence of why; times change only with the status."""
    name, namespace = chain.metadata.name, chain.metadata.namespace
    done = sum(s.state is State.SUCCEEDED for s in stages)
    complete = done == len(stages)
    failed = next((s for s in stages if s.state is State.FAILED), None)
    stalled = next((s for s in stages if s.stalled), None)
    held = next((s for s in stages if s.state is State.SUSPENDED), None)
    current = (
        failed
        or stalled
        or held
        or next((s for s in stages if s.state is not State.SUCCEEDED), None)
    )
    count = f"{done} of {len(stages)} stages have finished"
    again = f"; then: modelchain retry {name} -n {namespace}" if namespace else ""
    look = f"; look: modelchain explain {name} -n {namespace}" if namespace else ""
    why = sentence(current) if current else count
    facts: list[tuple[str, bool, str, str]] = []
    if failed:
        facts.append(("Stalled", True, constant(failed.reason) or "StageFailed", why + again))
    elif stalled:
        facts.append(("Stalled", True, constant(stalled.reason) or "Blocked", why + look))
    elif not complete and not held and current:
        facts.append(("Reconciling", True, _progress_reason(current), why))
    if complete:
        facts.append(("Ready", True, "AllStagesFinished", count))
    elif not held:
        facts.append(
            (
                "Ready",
                False,
                "StageFailed" if failed else "Blocked" if stalled else "InProgress",
                f"{count}; {why}",
            )
        )
    verdict = "Complete" if complete else "Failed" if failed else "InProgress"
    facts += [
        ("Suspended", held is not None, "Stopped" if held else "NotSuspended",
         held.reason if held else "nothing is held back"),
        ("Admitted", *_admitted(stages, stalled)),
        ("Complete", complete, "AllStagesFinished" if complete else "InProgress", count),
        ("Failed", failed is not None, "StageFailed" if failed else "NoFailure",
         why + again if failed else "no stage has failed"),
        ("Finished", verdict != "InProgress", verdict, count),
    ]  # fmt: skip
    generation = chain.metadata.generation or 0
    return [_condition(old, *fact, generation, now) for fact in facts]


def _condition(
    old: ChainStatus, kind: str, true: bool, reason: str, message: str, generation: int, now: float
) -> Condition:
    """Its time is that of the last change of its status, not of its sentence."""
    status: Literal["True", "False"] = "True" if true else "False"
    before = old.condition(kind)
    return Condition(
        type=kind,
        status=status,
        reason=reason,
        message=message,
        last_transition_time=before.last_transition_time
        if before and before.status == status
        else timestamp(now),
        observed_generation=generation,
    )


def _admitted(stages: list[StageStatus], stalled: StageStatus | None) -> tuple[bool, str, str]:
    """The spec is planned and its first stage needed no more than a launch."""
    begun = any(s.attempt_count or s.state is State.SUCCEEDED for s in stages)
    if begun:
        return True, "Planned", "the chain is planned and its stages are launched one after another"
    return (
        False,
        (constant(stalled.reason) or "Blocked") if stalled else "Pending",
        stalled.reason if stalled else "nothing was launched",
    )


def _progress_reason(stage: StageStatus) -> str:
    return {
        State.PENDING: constant(stage.reason) or "Pending",
        State.QUEUED: constant(stage.reason) or "Queued",
    }.get(stage.state, str(stage.state))


def _summary(chain: ModelChain, stages: list[StageStatus]) -> Summary:
    done = sum(s.state is State.SUCCEEDED for s in stages)
    open_ = next((s for s in stages if s.state is not State.SUCCEEDED), None)
    at = open_.progress if open_ else None
    measured = next((s.results for s in reversed(stages) if s.results), {})
    first = next(
        (e.name for e in chain.spec.evaluation if e.name in measured), next(iter(measured), None)
    )
    return Summary(
        stage=f"{done}/{len(stages)}"
        if open_ is None
        else f"{stages.index(open_) + 1}/{len(stages)}",
        state="Complete" if open_ is None else "Stalled" if open_.stalled else str(open_.state),
        progress="100%" if open_ is None else f"{100 * at.step // at.steps}%" if at else "",
        accuracy=measured[first] if first else "",
    )


def _bounded(status: ChainStatus) -> ChainStatus:
    """Without the oldest closed attempts where the whole would grow too large; the ledger keeps
    what they spent.

    Where that is not enough, sentences are cut.
    """
    while len(status.model_dump_json(by_alias=True, exclude_none=True).encode()) > MAX_BYTES:
        longest = max(status.stages, key=lambda s: len(s.attempts), default=None)
        if longest is None or len(longest.attempts) <= 1:
            return status.model_copy(
                update={"stages": [_cut(stage, BRIEF, BRIEF) for stage in status.stages]}
            )
        shorter = longest.model_copy(update={"attempts": longest.attempts[1:]})
        stages = [shorter if s is longest else s for s in status.stages]
        status = status.model_copy(update={"stages": stages})
    return status


def _cut(stage: StageStatus, reason: int, message: int) -> StageStatus:
    attempts = [
        a.model_copy(update={"message": shortened(a.message, message)}) for a in stage.attempts
    ]
    return stage.model_copy(
        update={"reason": shortened(stage.reason, reason), "attempts": attempts}
    )
