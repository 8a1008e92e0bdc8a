"""The parts of a chain's status that are made from its stages: conditions, summary and total.

`kubectl` and GitOps tools read them. `Stalled` and `Reconciling` follow kstatus: they exist only
while they are true, and never both. `Ready` is absent while the chain is suspended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from modelchain.api.messages import shortened
from modelchain.api.reasons import Code, command_of, filled
from modelchain.api.spec import ModelChain, WrittenModel
from modelchain.api.status import (
    AvoidedNode,
    ChainStatus,
    Condition,
    GateVerdict,
    RelaxationStatus,
    StageLedger,
    StageStatus,
    State,
    Summary,
    Total,
    Unmeasured,
)
from modelchain.decide.ledger import MESSAGE_LENGTH, timestamp, total_of
from modelchain.decide.transitions import Ledger
from modelchain.plan.prices import shown

# Of a status that is larger, as JSON, parts are left out: objects above 64 KiB are slow to watch
# and to list. Only if very many stages and pods have all their lists full, more is left, up to
# 200 KiB.
MAX_BYTES = 60_000
# The most characters of a stage's reason. A condition's message, which has at most 4096, quotes it.
REASON_LENGTH = 2000
# The most characters of a sentence in a status that would otherwise be too large.
BRIEF = 80
# Why a metric is missing that will be measured without anyone's help.
UNDERWAY = (Code.MEASURING, Code.MEASURE_WAITS)
# Conditions that are true of a chain that has ended.
ENDED = ("Complete", "Finished", "Measured")
# Conditions that tell whether the spec is met. They are set anew when the spec is refused.
OF_THE_SPEC = ("Stalled", "Reconciling", "Ready", "Admitted")


def completed(
    chain: ModelChain,
    old: ChainStatus,
    stages: list[StageStatus],
    retry: str | None,
    now: float,
    avoid: Iterable[AvoidedNode] = (),
    removed: Sequence[StageLedger] = (),
    relaxation: RelaxationStatus | None = None,
    baselines: Sequence[StageStatus] = (),
    currency: str = "",
) -> ChainStatus:
    """The whole status, made from its stages, in the form in which it is read back once written."""
    stages = [_cut(_filled(chain, stage), REASON_LENGTH, MESSAGE_LENGTH) for stage in stages]

    def conditions_of(stages: list[StageStatus]) -> list[Condition]:
        return _conditions(chain, old, stages, now)

    total = total_of([*stages, *removed])
    priced = any(ledger.cost is not None for ledger in (total, *baselines))
    status = ChainStatus(
        observed_generation=chain.metadata.generation or 0,
        stages=stages,
        removed=list(removed),
        total=total,
        currency=old.currency or (currency if priced else ""),
        avoid=list(avoid),
        relaxation=relaxation,
        baselines=[_cut(_filled(chain, row), REASON_LENGTH, MESSAGE_LENGTH) for row in baselines],
        retry=retry,
        conditions=conditions_of(stages),
        summary=_summary(chain, stages, total),
    )
    return _bounded(status, conditions_of).as_stored()


def _filled(chain: ModelChain, stage: StageStatus) -> StageStatus:
    """The stage, with its next commands filled in for this chain.

    The status of an older version has none. Then it is the code's own.
    """
    meta = chain.metadata
    command = stage.next or (command_of(stage.code) if _needs_a_person(stage) else "")
    unmeasured = [
        one.model_copy(update={"next": filled(one.next, meta.name, meta.namespace)})
        for one in stage.unmeasured
    ]
    return stage.changed(next=filled(command, meta.name, meta.namespace), unmeasured=unmeasured)


def refused(old: ChainStatus, generation: int, message: str, now: float) -> ChainStatus:
    """The status of a chain whose spec cannot be run. What is known of its stages stays.

    The chain does not count as complete, since the spec asks for something else than what has
    finished.
    """
    message = shortened(message, REASON_LENGTH)

    def condition(kind: str, true: bool) -> Condition:
        return _condition(old, _Fact(kind, true, Code.INVALID_SPEC, message), generation, now)

    conditions = [
        condition("Stalled", True),
        condition("Ready", False),
        condition("Admitted", False),
    ]
    for known in old.conditions:
        if known.type not in OF_THE_SPEC:
            conditions.append(condition(known.type, False) if known.type in ENDED else known)
    summary = old.summary.model_copy(update={"state": str(Code.INVALID_SPEC)})
    update = {"observed_generation": generation, "conditions": conditions, "summary": summary}
    return old.model_copy(update=update).as_stored()


def unreadable(
    stored: Mapping[str, Any], generation: int, message: str, now: float
) -> dict[str, Any]:
    """The stored status of another version, with conditions that say that it cannot be read.

    All else stays as it is, for the version that can read it.
    """
    found = [one for one in stored.get("conditions") or [] if isinstance(one, dict)]
    before = ChainStatus(conditions=[one for raw in found if (one := _readable(raw))])
    facts = [
        _Fact("Stalled", True, Code.STATUS_UNREADABLE, shortened(message, REASON_LENGTH)),
        _Fact("Ready", False, Code.BLOCKED, shortened(message, REASON_LENGTH)),
    ]
    new = [_condition(before, fact, generation, now) for fact in facts]
    kept = [raw for raw in found if raw.get("type") not in ("Stalled", "Ready", "Reconciling")]
    return {**stored, "conditions": [*(one.model_dump(by_alias=True) for one in new), *kept]}


def _readable(condition: dict[str, Any]) -> Condition | None:
    with suppress(ValidationError):
        return Condition.model_validate(condition)
    return None


def sentence(
    stage: StageStatus, *, command: bool = True, what: Literal["stage", "baseline"] = "stage"
) -> str:
    """What a stage does and why, in one sentence for events, conditions and tables.

    Args:
        command: whether the sentence may end with the command to type next. If the stage goes on
            only after a person has acted, it does.
        what: whether it is a stage of the chain, or the baseline of one.
    """
    doing = _DOING.get(stage.state)
    if doing is not None and stage.code is Code.MISS:
        # That it was never trained is no longer true.
        over = stage.never_trained and stage.state in (State.VERIFYING, State.SUCCEEDED)
        return f"{what} {stage.name} {doing}" + ("" if over else f" ({stage.cause})")
    if not command:
        return f"{what} {stage.name}: {stage.without_command}"
    # Some reasons name their command within the sentence.
    needed = _needs_a_person(stage) and stage.next not in stage.reason
    then = f"; next: {stage.next}" if needed else ""
    return f"{what} {stage.name}: {stage.reason}{then}"


def _needs_a_person(stage: StageStatus) -> bool:
    return stage.stalled or stage.state is State.FAILED


def brief(stage: StageStatus, what: Literal["stage", "baseline"] = "stage") -> str:
    """The `sentence` for a table of all stages. It leaves out that a stage was never trained."""
    doing = _DOING.get(stage.state)
    first = stage.code is Code.MISS and stage.never_trained
    return f"{what} {stage.name} {doing}" if doing and first else sentence(stage, what=what)


_DOING = {
    State.STARTING: "starts",
    State.RUNNING: "trains",
    State.VERIFYING: "was trained, and its artifact is checked",
    State.SUCCEEDED: "was trained",
}


def current(stages: Sequence[StageStatus]) -> StageStatus | None:
    """The stage that stands for the whole chain; None once all have finished.

    It is one that failed, else one that stalls, else one that is suspended, else the first that has
    not finished, or that the gate has not judged yet.
    """
    first = next((s for s in stages if not s.done), None)
    return _failed(stages) or _stalled(stages) or _suspended(stages) or first


def _failed(stages: Iterable[StageStatus]) -> StageStatus | None:
    return next((s for s in stages if s.state is State.FAILED), None)


def _stalled(stages: Iterable[StageStatus]) -> StageStatus | None:
    return next((s for s in stages if s.stalled), None)


def _suspended(stages: Iterable[StageStatus]) -> StageStatus | None:
    return next((s for s in stages if s.state is State.SUSPENDED), None)


@dataclass(frozen=True)
class _Fact:
    """A condition without its times."""

    kind: str
    true: bool
    reason: Code
    message: str


def _conditions(
    chain: ModelChain, old: ChainStatus, stages: list[StageStatus], now: float
) -> list[Condition]:
    """All conditions, in a fixed order, each with a sentence on why."""
    done = sum(s.state is State.SUCCEEDED for s in stages)
    count = f"{done} of {len(stages)} stages have finished"
    facts = [*_progress(stages, count), *_outcome(stages, count)]
    generation = chain.metadata.generation or 0
    return [_condition(old, fact, generation, now) for fact in facts]


def _progress(stages: list[StageStatus], count: str) -> Iterator[_Fact]:
    """The conditions that kstatus reads: `Stalled` or `Reconciling` while one is true, and `Ready`.

    A chain with a suspended stage has no `Ready`: it is neither ready nor on its way there.
    """
    stage = current(stages)
    if stage is None:
        yield _Fact("Ready", True, Code.ALL_STAGES_FINISHED, count)
        return
    why, unfinished = sentence(stage), _unfinished(stage)
    if stage.state is State.FAILED:
        yield _Fact("Stalled", True, stage.code or unfinished, why)
    elif stage.stalled:
        yield _Fact("Stalled", True, _named(stage) or unfinished, why)
    elif stage.state is not State.SUSPENDED:
        yield _Fact("Reconciling", True, _progress_reason(stage), why)
    if _suspended(stages) is None:
        yield _Fact("Ready", False, unfinished, f"{count}; {why}")


def _unfinished(stage: StageStatus) -> Code:
    """Why the chain has not finished, by the stage that stands for it."""
    if stage.state is State.FAILED:
        return Code.STAGE_FAILED
    if stage.stalled:
        return Code.BLOCKED
    return Code.STOPPED if stage.state is State.SUSPENDED else Code.IN_PROGRESS


def _outcome(stages: list[StageStatus], count: str) -> Iterator[_Fact]:
    """The conditions that every chain has, be they true or false."""
    failed, suspended = _failed(stages), _suspended(stages)
    stage = current(stages)
    if suspended:
        yield _Fact("Suspended", True, Code.STOPPED, suspended.reason)
    else:
        yield _Fact("Suspended", False, Code.NOT_SUSPENDED, "no stage is suspended")
    yield _admitted(stages)
    if stage is None:
        yield _Fact("Complete", True, Code.ALL_STAGES_FINISHED, count)
    else:
        why = _unfinished(stage)
        message = count if why is Code.IN_PROGRESS else f"{count}; {sentence(stage)}"
        yield _Fact("Complete", False, why, message)
    if failed:
        yield _Fact("Failed", True, Code.STAGE_FAILED, sentence(failed))
    else:
        yield _Fact("Failed", False, Code.NO_FAILURE, "no stage has failed")
    verdict = Code.COMPLETE if stage is None else Code.FAILED if failed else Code.IN_PROGRESS
    yield _Fact("Finished", verdict is not Code.IN_PROGRESS, verdict, count)
    yield _measured(stages, count)


def _measured(stages: Sequence[StageStatus], count: str) -> _Fact:
    """`Measured`: true once every stage has finished and has all metrics that the spec asks for."""
    if any(stage.state is not State.SUCCEEDED for stage in stages):
        return _Fact("Measured", False, Code.IN_PROGRESS, count)
    first = first_unmeasured(stages)
    if first is None:
        return _Fact("Measured", True, Code.ALL_MEASURED, "no metric is missing")
    code = first[1].code or Code.MEASURE_WAITS
    return _Fact("Measured", False, code, why_unmeasured(*first))


def first_unmeasured(stages: Iterable[StageStatus]) -> tuple[StageStatus, Unmeasured] | None:
    """The evaluation that stands for all whose metrics are missing, and its stage.

    It is one for which a person has to act, else the one that is measured now.
    """
    missing = [(stage, one) for stage in stages for one in stage.unmeasured]
    return min(missing, key=lambda pair: _rank(pair[1].code), default=None)


def _rank(code: Code | None) -> int:
    return 1 + UNDERWAY.index(code) if code in UNDERWAY else 0


def why_unmeasured(stage: StageStatus, one: Unmeasured) -> str:
    """Why a metric is missing, in one sentence."""
    why = one.reason or "its metric is not known yet"
    return f"stage {stage.name}, evaluation {one.evaluation}: {why}"


def _condition(old: ChainStatus, fact: _Fact, generation: int, now: float) -> Condition:
    """The condition with its times. As is usual, a new message alone does not change its time."""
    status: Literal["True", "False"] = "True" if fact.true else "False"
    before = old.condition(fact.kind)
    since = before.last_transition_time if before and before.status == status else timestamp(now)
    return Condition(
        type=fact.kind,
        status=status,
        reason=fact.reason,
        message=fact.message,
        last_transition_time=since,
        observed_generation=generation,
    )


def _admitted(stages: list[StageStatus]) -> _Fact:
    """`Admitted`: true once an attempt was made, or a stage has finished without one."""
    if any(s.attempt_count or s.state is State.SUCCEEDED for s in stages):
        message = "the chain is planned and its stages are launched one after another"
        return _Fact("Admitted", True, Code.PLANNED, message)
    stalled = _stalled(stages)
    if stalled is None:
        return _Fact("Admitted", False, Code.PENDING, "nothing was launched")
    return _Fact("Admitted", False, _named(stalled) or Code.BLOCKED, stalled.reason)


def _named(stage: StageStatus) -> Code | None:
    """The stage's code, if a condition may have it as its reason, else None."""
    return stage.code if stage.code is not None and stage.code.named else None


def _progress_reason(stage: StageStatus) -> Code:
    told = stage.code in (Code.LAUNCH_REFUSED, Code.RELEASE_REFUSED, Code.GATE_UNMEASURED)
    if stage.state in (State.PENDING, State.QUEUED) or told:
        return _named(stage) or Code(stage.state)
    return Code(stage.state)


def _summary(chain: ModelChain, stages: list[StageStatus], total: Total) -> Summary:
    """The summary: the first stage that is not done, and the newest accuracy of any stage."""
    cost = "" if total.cost is None else shown(total.cost)
    measured = next((s.results for s in reversed(stages) if s.results), {})
    named = (e.name for e in chain.spec.evaluation if e.name in measured)
    first = next(named, next(iter(measured), None))
    accuracy, gate = measured[first] if first else "", _gate(stages)
    stage = next((s for s in stages if not s.done), None)
    if stage is None:
        count = f"{len(stages)}/{len(stages)}"
        shown_as = {"state": "Complete", "progress": "100%"}
        return Summary(stage=count, **shown_as, accuracy=accuracy, gate=gate, cost=cost)
    at = stage.progress
    return Summary(
        stage=f"{stages.index(stage) + 1}/{len(stages)}",
        state="Stalled" if stage.stalled else str(stage.state),
        progress=f"{100 * at.step // at.steps}%" if at else "",
        accuracy=accuracy,
        gate=gate,
        cost=cost,
    )


def _gate(stages: Iterable[StageStatus]) -> str:
    """How many stages have each verdict of the gate, such as `2 Passed, 1 Missed`."""
    verdicts = [stage.gate.verdict for stage in stages if stage.gate]
    counts = ((verdicts.count(one), one) for one in GateVerdict if one is not GateVerdict.UNGATED)
    return ", ".join(f"{count} {verdict}" for count, verdict in counts if count)


def _bounded(
    status: ChainStatus, conditions_of: Callable[[list[StageStatus]], list[Condition]]
) -> ChainStatus:
    """The status, made smaller if it is too large. The ledger keeps what was spent.

    The oldest attempts are dropped first, from the stage with the most; then what is known of
    single input digests, and all attempts of finished stages. If that is not enough, sentences are
    shortened, and the conditions are made from the short ones; then an attempt that has ended does
    not name the sources of its prices either.
    """
    over = _size(status) - MAX_BYTES
    if over <= 0:
        return status
    stages, over = _shorter(status.stages, "attempts", lambda _: 1, over)
    baselines, over = _shorter(status.baselines, "attempts", lambda _: 1, over)
    removed, over = _shorter(status.removed, "trained_before", lambda _: 0, over)
    stages, over = _shorter(stages, "trained_before", lambda _: 0, over)
    stages, over = _shorter(stages, "attempts", lambda s: s.state is not State.SUCCEEDED, over)
    conditions = status.conditions
    if over > 0:  # the reason's message is left out: the short reason stands for it
        stages = [_briefest(stage) for stage in stages]
        baselines = [_briefest(row) for row in baselines]
        conditions = conditions_of(stages)
    update = {
        "stages": stages,
        "baselines": baselines,
        "removed": removed,
        "conditions": conditions,
    }
    return status.model_copy(update=update)


def _shorter(
    stages: Sequence[Ledger], field: str, least: Callable[[Ledger], int], over: int
) -> tuple[list[Ledger], int]:
    """The stages without the oldest items of their longest lists, and the bytes still to be saved.

    Args:
        field: the lists.
        least: how many items of a stage's list stay.
        over: how many bytes are to be saved.
    """
    lists: list[list[WrittenModel]] = [list(getattr(stage, field)) for stage in stages]
    while over > 0:
        spare = [one for stage, one in zip(stages, lists, strict=True) if len(one) > least(stage)]
        if not spare:
            break
        over -= _size(max(spare, key=len).pop(0))
    return [s.model_copy(update={field: kept}) for s, kept in zip(stages, lists, strict=True)], over


def _size(part: WrittenModel) -> int:
    return len(part.model_dump_json(by_alias=True, exclude_none=True).encode())


def _briefest(stage: StageStatus) -> StageStatus:
    """The stage with its texts cut as far as possible."""
    attempts = [a.changed(price_sources=[]) if a.finished_at else a for a in stage.attempts]
    return _cut(stage.changed(attempts=attempts), BRIEF, BRIEF).changed(message="")


def _cut(stage: StageStatus, reason: int, message: int) -> StageStatus:
    """The stage with its reason and the messages of its parts cut to so many characters."""
    unmeasured = [
        one.model_copy(update={"reason": shortened(one.reason, message)})
        for one in stage.unmeasured
    ]
    return stage.changed(
        reason=shortened(stage.reason, reason),
        message=shortened(stage.message, reason),
        attempts=[a.changed(message=shortened(a.message, message)) for a in stage.attempts],
        unmeasured=unmeasured,
    )
