"""The status of a chain, which is also its ledger. It looks the same on a cluster and a laptop."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, Self, TypedDict, Unpack

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.alias_generators import to_camel

from modelchain.api.contracts import FailureClass, Progress
from modelchain.api.messages import one_line
from modelchain.api.reasons import Code, Reason, known
from modelchain.api.spec import WrittenModel
from modelchain.api.uses import NOT_USED, Uses


class State(StrEnum):
    PENDING = "Pending"
    INDEXING = "Indexing"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    VERIFYING = "Verifying"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUSPENDED = "Suspended"


# Up to here, every whole number is also a float.
EXACT = 2**53


def storable(value: Any) -> Any:
    """The number as an API server stores it.

    It keeps very large numbers as floats. They are rounded here already, so that a status is read
    back just as it was written.
    """
    large = isinstance(value, int) and value > EXACT
    return int(float(value)) if large or isinstance(value, float) else value


# A count of MACs, which may be too large for an integer of the API server.
Macs = Annotated[int, BeforeValidator(storable)]


# What is said of a chain. It may quote other programs.
Said = Annotated[str, AfterValidator(one_line)]


# How a node is bought: a spot node is cheaper, and may be taken away.
Capacity = Literal["OnDemand", "Spot"]


class PodTime(WrittenModel):
    """When one pod held GPUs, and when its main container ran (seconds since the epoch)."""

    # A pod holds its GPUs from the moment at which it was bound to its node. An older version did
    # not write that.
    scheduled: float | None = None
    # When the main container started; None before, and if it never did.
    started: float | None = None
    finished: float | None = None
    gpus: int = 0
    # This is rank 0's pod. Its running time is that of the attempt, and it tells of the work.
    first: bool = False
    # What rank 0 says that it has spent since it started, and the part that is kept.
    macs: Macs = 0
    saved_macs: Macs = 0
    # How rank 0 says that it has used its time.
    told: Uses = NOT_USED
    # Rank 0 can tell no more: it has left its last word, or others have resumed its work.
    over: bool = False
    # The end is not known, and is when the pod was last accounted.
    estimated: bool = False
    # Of its node; None if that is not known.
    capacity: Capacity | None = None

    @property
    def begins(self) -> float:
        """Since when the pod holds its GPUs."""
        return (self.started or 0.0) if self.scheduled is None else self.scheduled

    @model_serializer(mode="wrap")
    def _short(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The fields without those that say nothing: a status may list hundreds of pods."""
        times = ("scheduled", "started", "finished")
        said = whole(self).items()
        return {n: value for n, value in said if value or (n in times and value is not None)}


# The fields of `Expenses`, and of the ledgers made of it, that are left out where they are 0 or
# empty, as they are called here and in JSON.
_OFTEN_EMPTY = frozenset(
    name
    for field in (
        "lost_macs",
        "gpu_milliseconds",
        "queue_seconds",
        "unpriced_seconds",
        "reused",
        "replaced",
    )
    for name in (field, to_camel(field))
)


class Expenses(WrittenModel):
    """What was spent. The uses of GPU time sum up to all of it."""

    macs: Macs = 0
    # The part of them that is of no use.
    lost_macs: Macs = 0
    # Seconds that GPUs were held, summed over all of them; and by use, which sums up to the same.
    gpu_seconds: float = 0.0
    gpu_milliseconds: Uses = NOT_USED
    # Seconds that attempts waited in a queue or for the scheduler.
    queue_seconds: float = 0.0
    # A decimal string; None without a price.
    cost: str | None = None
    # The part of `gpu_seconds` that had no price.
    unpriced_seconds: float = 0.0

    @model_validator(mode="before")
    @classmethod
    def _without_uses(cls, said: Any) -> Any:
        """An older version did not tell the uses of GPU time. So all of it counts as lost."""
        if not isinstance(said, dict) or not said.get("gpuSeconds") or "gpuMilliseconds" in said:
            return said
        return {**said, "gpuMilliseconds": {"lost": round(1000 * said["gpuSeconds"])}}

    @model_serializer(mode="wrap")
    def _brief(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is most often 0 or empty: a status has many of these."""
        return {n: value for n, value in whole(self).items() if value or n not in _OFTEN_EMPTY}


class ExpenseFields(TypedDict, total=False):
    """Fields of `Expenses`, with their types."""

    macs: int
    lost_macs: int
    gpu_seconds: float
    gpu_milliseconds: Uses
    queue_seconds: float
    cost: str | None
    unpriced_seconds: float


class Spent(Expenses):
    """What attempts or pods that have ended have spent."""

    # Seconds that attempts ran, by rank 0's pods.
    seconds: float = 0.0

    @model_serializer(mode="wrap")
    def _brief(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without all amounts that are 0: these ledgers are the operator's own, and many."""
        return {name: value for name, value in whole(self).items() if value}


class Total(Expenses):
    """What was spent together, such as by all stages of a chain."""


class Priced(WrittenModel):
    """What an open attempt's time has cost up to a moment. It is never computed again."""

    # The name of the prices that hold since then.
    prices: str
    # In seconds since the epoch.
    since: float
    cost: str | None = None
    # The GPU time that had a price.
    milliseconds: int = 0


# The most sources of prices that are named, the newest ones.
MOST_SOURCES = 4


class Unsettled(WrittenModel):
    """The work of a closed attempt that left no last word.

    The next trainer says which part of it a checkpoint has kept. Until then the rest is `unsaved`.
    """

    # The UID of rank 0's pod; empty on a laptop.
    pod: str = ""
    # The GPUs for which rank 0 spoke.
    gpus: int = 0
    # What it had told, and its MACs.
    told: Uses = NOT_USED
    macs: Macs = 0
    saved_macs: Macs = 0


class SpentAt(WrittenModel):
    """What a stage's closed attempts have spent at one input digest."""

    input_digest: str
    spent: Spent


# Fields of an attempt that older versions wrote.
_NO_LONGER = ("price", "pricedSeconds", "pricedCost")


class AttemptStatus(Expenses):
    """One launch of a stage. Its name and input digest never change; a retry is a new attempt."""

    name: str
    number: int
    input_digest: str
    # The kind of runner that launches the attempt, whatever the spec says later. None in a status
    # of an older version, which had only one kind.
    runner: str | None = None
    # The node pool that the attempt's job was made for, whatever the spec says later. None while
    # there is no job, and in a status of an older version.
    pool: str | None = None
    state: State
    # How the attempt failed, and what there is to say about it.
    failure: FailureClass | None = None
    message: Said = ""
    # RFC 3339. The start is the moment at which the attempt left its queue.
    started_at: str | None = None
    # RFC 3339. Once it is set, the attempt is closed.
    finished_at: str | None = None
    # Where the prices come from.
    price_sources: list[Said] = Field([], max_length=MOST_SOURCES)
    # Since when it waits in a queue or for the scheduler, in seconds since the epoch.
    queued_at: float | None = None
    # The end of a pod is not known.
    estimated: bool = False
    # Only once it is closed, until it is known how much of its work was kept.
    unsettled: Unsettled | None = None
    # Only while the attempt is open: what was spent at other prices than the present ones; and
    # until when its time was accounted, in seconds since the epoch.
    priced: Priced | None = None
    accounted_at: float | None = None
    # The UID of the attempt's job. A job is released only once its UID is here.
    uid: str | None = None
    # The deadline for which the attempt is being ended.
    ending: FailureClass | None = None
    # The node whose own device ended the attempt, and a short name of the fault.
    node: str | None = None
    fault: Said = ""
    # Pods or Services of its job were refused, and it has taken no step since.
    parts_refused: bool = False
    # When such parts were last accepted, in seconds since the epoch: deadlines count from then.
    counts_from: float | None = None
    checkpoint_step: int = 0
    # When the attempt last took a step, in seconds since the epoch.
    stepped_at: float | None = None
    # The pods of an open attempt, by UID.
    pods: dict[str, PodTime] = {}
    # What was spent by pods that are no longer listed in `pods`.
    gone: Spent = Spent()

    @model_validator(mode="before")
    @classmethod
    def _of_an_older_version(cls, said: Any) -> Any:
        """Without the fields by which an older version kept what was spent at earlier prices."""
        if not isinstance(said, dict):
            return said
        return {key: value for key, value in said.items() if key not in _NO_LONGER}

    def changed(self, **fields: Unpack[AttemptFields]) -> AttemptStatus:
        """A copy in which these fields have these values."""
        return self.model_copy(update=dict(fields))


class AttemptFields(ExpenseFields, total=False):
    """Fields of `AttemptStatus` that may change, with their types; a test compares the two."""

    pool: str | None
    state: State
    failure: FailureClass | None
    message: str
    started_at: str | None
    finished_at: str | None
    price_sources: list[str]
    queued_at: float | None
    estimated: bool
    unsettled: Unsettled | None
    priced: Priced | None
    accounted_at: float | None
    uid: str | None
    ending: FailureClass | None
    node: str | None
    fault: str
    parts_refused: bool
    counts_from: float | None
    checkpoint_step: int
    stepped_at: float | None
    pods: dict[str, PodTime]
    gone: Spent


class GateVerdict(StrEnum):
    """Whether a finished stage is as accurate as the same model trained alone."""

    PASSED = "Passed"
    MISSED = "Missed"
    # The metric or the baseline is still to be measured.
    UNMEASURED = "Unmeasured"
    # The gate has no baseline for the stage.
    UNGATED = "Ungated"


class GateStatus(WrittenModel):
    """How a finished stage compares with the same model trained alone. Figures are decimals, in
    percent or points.
    """

    verdict: GateVerdict
    metric: str
    result: str | None = None
    baseline: str | None = None
    # The result less the baseline.
    difference: str | None = None
    # Of the result, where the number of pictures is known.
    standard_error: str | None = None


class ArtifactRef(WrittenModel):
    """A stage's artifact: its path, relative to the root, and the SHA-256 of its weights."""

    path: str
    digest: str
    # `TRAINER_MATH` of the trainer that made the artifact; None if that is not known.
    trainer_math: int | None = None


class Unmeasured(WrittenModel):
    """An evaluation of the spec whose metric is not known of a finished stage, and why not."""

    evaluation: str
    reason_code: str
    # What there is to say beside the code, and the command to type next. Both are empty if the
    # evaluation only waits for its turn.
    reason: Said = ""
    next: Said = ""

    @property
    def code(self) -> Code | None:
        """None if only another version knows the code."""
        return known(self.reason_code)

    @property
    def retry_helps(self) -> bool:
        return self.code is not None and self.code.retry_helps


# The most earlier input digests of a stage whose spending is kept apart, the newest ones.
MOST_DIGESTS = 16
# The most rounds of relaxation that a spec may ask for.
MOST_ROUNDS = 16


class StageLedger(Expenses):
    """What is kept of a stage after it was removed from the spec: above all what it has spent.

    Its own amounts are those of the ledger `spent`, of the open attempt, and of `reused`.
    """

    name: str
    epochs: int | None = None
    # The epochs were allocated by the plan and fixed by a launch. An edit does not change them.
    frozen: bool = False
    # The last round of relaxation that has changed the epochs; 0 for none. Before any round they
    # were `first_epochs`.
    round: int = 0
    first_epochs: int | None = None
    # The last attempts, the newest at the end.
    attempts: list[AttemptStatus] = []
    # The number of the newest attempt.
    attempt_count: int = 0
    # How many attempts ended with each failure class and were followed by another one. Unlike the
    # budgets, these counts are never renewed.
    retried: dict[FailureClass, int] = {}
    # The input digest at which the stage was last launched or finished. It is kept while the stage
    # waits.
    last_digest: str | None = None
    # The ledger: what closed attempts have spent.
    spent: Spent = Spent()
    # The part of it that was spent at `last_digest`, which the StageArtifact will record.
    trained: Spent = Spent()
    # The parts that were spent at other input digests, the newest at the end. An edit that is taken
    # back needs them.
    trained_before: list[SpentAt] = Field([], max_length=MOST_DIGESTS)
    # What records say that an earlier chain of this name has spent on artifacts that the stage has
    # found, or had found before a round of relaxation.
    reused: list[SpentAt] = Field([], max_length=MOST_DIGESTS)
    # The input digests that rounds of relaxation have replaced by ones with more epochs.
    replaced: list[str] = Field([], max_length=MOST_ROUNDS)
    # The part of what the stage shows that was spent at those digests. It stays in its uses.
    relaxed: Total | None = None

    def changed(self, **fields: Unpack[LedgerFields]) -> Self:
        """A copy in which these fields have these values."""
        return self.model_copy(update=dict(fields))

    @property
    def trained_here(self) -> bool:
        """Whether attempts of this stage have spent what it shows, be they listed or not."""
        return bool(self.attempts) or self.spent != Spent()

    @property
    def digests(self) -> set[str]:
        """The input digests at which what the stage shows was spent, as far as they are known."""
        known = {self.last_digest}
        known |= {at.input_digest for at in (*self.trained_before, *self.reused)}
        return {digest for digest in known if digest} | {a.input_digest for a in self.attempts}


class LedgerFields(ExpenseFields, total=False):
    """Fields of `StageLedger` that may change, with their types; a test compares the two."""

    epochs: int | None
    frozen: bool
    round: int
    first_epochs: int | None
    attempts: list[AttemptStatus]
    attempt_count: int
    retried: dict[FailureClass, int]
    last_digest: str | None
    spent: Spent
    trained: Spent
    trained_before: list[SpentAt]
    reused: list[SpentAt]
    replaced: list[str]
    relaxed: Total | None


class Planned(WrittenModel):
    """What a training takes by the plan. What is None is not known."""

    macs: Macs = 0
    gpu_seconds: float | None = None
    # A decimal string, at the price that held when it was planned.
    cost: str | None = None


class StageStatus(StageLedger):
    """One stage of the spec."""

    state: State = State.PENDING
    # Why the state is so: a sentence, its code, and the command to type next, if there is one. The
    # code may be one of a newer version, which `modelchain.api.reasons.Code` does not have.
    reason: Said = ""
    reason_code: str = ""
    next: Said = ""
    # Parts of the reason, so that `reason` need not be taken apart: its message, whether the stage
    # also waits for an earlier attempt to stop, and, of a miss, whether nothing was trained under
    # the stage's name before. An older version wrote none of them.
    message: Said = ""
    stops_first: bool = False
    never_trained: bool = False
    # A person has to act; `reason` says why.
    stalled: bool = False
    # The digest of the stage's present inputs; None while they are not known.
    input_digest: str | None = None
    # Whether an artifact existed when the stage got its inputs.
    cache: Literal["Hit", "Miss"] | None = None
    # What is charged to the two budgets.
    retries: int = 0
    disruptions: int = 0
    checkpoint_step: int = 0
    # When the back-off ends, in seconds since the epoch.
    not_before: float | None = None
    progress: Progress | None = None
    results: dict[str, str] = {}
    # Once the stage has finished: the evaluations whose metrics are not among the results.
    unmeasured: list[Unmeasured] = []
    # When the predecessor's trainer ended (seconds since the epoch), until this stage has a job.
    inherits_at: float | None = None
    # The seconds from `inherits_at` until this stage had a job.
    transition_seconds: float | None = None
    planned_macs: Macs = 0
    # The plan at the stage's first launch, of now before it, and that of the same model alone.
    plan: Planned | None = None
    alone: Planned | None = None
    artifact: ArtifactRef | None = None
    # How the finished stage compares with the same model trained alone; None without `spec.gate`.
    gate: GateStatus | None = None

    def changed(self, **fields: Unpack[StageFields]) -> Self:
        """A copy in which these fields have these values."""
        return self.model_copy(update=dict(fields))

    @property
    def over(self) -> bool:
        """Whether the stage has finished, and has its verdict if there is a gate."""
        unmeasured = self.gate is not None and self.gate.verdict is GateVerdict.UNMEASURED
        return self.state is State.SUCCEEDED and not unmeasured

    @property
    def done(self) -> bool:
        """Whether nothing is left to do for the stage, and no person has to act."""
        return self.over and not self.stalled

    @property
    def code(self) -> Code | None:
        """Why the stage is in its state; None if only another version knows the code.

        An older version wrote no code. For a failed stage, its last attempt has it.
        """
        if not self.reason_code and self.state is State.FAILED and self.attempts:
            return known(self.attempts[-1].failure or "")
        return known(self.reason_code)

    @property
    def cause(self) -> str:
        """The reason without its code and command; all of it in a status of an older version."""
        return self.message or self.reason

    @property
    def without_command(self) -> str:
        """The reason without its command; all of it in a status of an older version."""
        if not self.message or self.code is None:
            return self.reason
        reason = Reason(self.code, message=self.message, stops_first=self.stops_first)
        return reason.without_command


class StageFields(LedgerFields, total=False):
    """Fields of `StageStatus` that may change, with their types; a test compares the two."""

    state: State
    reason: str
    reason_code: str
    next: str
    message: str
    stops_first: bool
    never_trained: bool
    stalled: bool
    input_digest: str | None
    cache: Literal["Hit", "Miss"] | None
    retries: int
    disruptions: int
    checkpoint_step: int
    not_before: float | None
    progress: Progress | None
    results: dict[str, str]
    unmeasured: list[Unmeasured]
    inherits_at: float | None
    transition_seconds: float | None
    planned_macs: int
    plan: Planned | None
    alone: Planned | None
    artifact: ArtifactRef | None
    gate: GateStatus | None


class Condition(WrittenModel):
    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: Said
    last_transition_time: str
    observed_generation: int = 0


class Summary(WrittenModel):
    """What `kubectl get` shows of a chain in one line."""

    stage: str = ""
    state: str = ""
    progress: str = ""
    accuracy: str = ""
    # How many finished stages have each verdict of the gate.
    gate: str = ""
    # `total.cost`, rounded to the cent.
    cost: str = ""


# The most avoided nodes that are kept, the newest ones. A job can only exclude so many.
MOST_AVOIDED = 16


class AvoidedNode(WrittenModel):
    """A node whose own device failed. The chain's attempts keep away from it for a day."""

    node: str
    # When the day is over, in seconds since the epoch.
    until: float
    # A short name of the fault. It is cleared once work has progressed or the spec has changed.
    fault: Said = ""


# The most removed stages that are listed by name, the newest ones.
MOST_REMOVED = 16


class RelaxationRound(WrittenModel):
    """One round of relaxation: the stage that missed its baseline, and the epochs that it got."""

    stage: str
    epochs: int
    # By which later stages grow in this round, whatever the spec says by now.
    factor: str


class Acceleration(WrittenModel):
    """How many times fewer MACs the chain takes than training each model alone."""

    # `allocation.targetAcceleration`.
    requested: str | None = None
    # By the plan, with the epochs of all rounds so far.
    relaxed: str
    # By what was really spent, on rounds that missed as well; once all stages have finished.
    achieved: str | None = None


class RelaxationStatus(WrittenModel):
    """The rounds of relaxation that have begun. None of them is ever taken back."""

    # How many there are.
    round: int
    rounds: list[RelaxationRound] = Field(max_length=MOST_ROUNDS)
    # What was spent on the epochs that rounds have replaced. The stages' amounts include it.
    spent: Total | None = None
    acceleration: Acceleration | None = None


class ChainStatus(WrittenModel):
    """What the operator knows of a chain: its stages, what they have spent, and its conditions."""

    observed_generation: int = -1
    conditions: list[Condition] = []
    summary: Summary = Summary()
    stages: list[StageStatus] = []
    # The models that are trained alone for `gate.train`, under the names of their stages. Each has
    # attempts and a ledger of its own.
    baselines: list[StageStatus] = []
    # What stages have spent that are no longer in the spec, the newest at the end. The first one
    # has no name if there are too many: it is the sum of those removed before.
    removed: list[StageLedger] = Field([], max_length=MOST_REMOVED + 1)
    # The sum of `stages` and `removed`.
    total: Total = Total()
    # Of every cost; empty until there is one. Prices in another currency do not count.
    currency: str = ""
    avoid: list[AvoidedNode] = Field([], max_length=MOST_AVOIDED)
    # None before the first round.
    relaxation: RelaxationStatus | None = None
    # The last value of the retry annotation for which budgets were renewed. It stays when the
    # annotation is removed.
    retry: str | None = None

    def as_stored(self) -> ChainStatus:
        """The status in the form in which it is read back once it was written.

        `decide` compares in this form. Otherwise it would see a difference in every pass, and write
        the status for ever.
        """
        return ChainStatus.model_validate_json(
            self.model_dump_json(by_alias=True, exclude_none=True)
        )

    def is_over(self, stages: int) -> bool:
        """Whether all stages have finished or one has failed. Then nothing starts by itself."""
        done = [stage.over for stage in self.stages]
        return (len(done) == stages and all(done)) or any(
            s.state is State.FAILED for s in self.stages
        )

    @property
    def attempts(self) -> dict[str, tuple[StageLedger, AttemptStatus]]:
        """All attempts by name, each with its stage or baseline, which may have been removed."""
        ledgers: list[StageLedger] = [*self.stages, *self.baselines, *self.removed]
        return {attempt.name: (stage, attempt) for stage in ledgers for attempt in stage.attempts}

    @property
    def epochs(self) -> dict[str, int]:
        """The epochs of each stage, as far as they are known."""
        return {s.name: s.epochs for s in self.stages if s.epochs is not None}

    @property
    def frozen_epochs(self) -> dict[str, int]:
        """The epochs of each stage for which a launch has fixed them, so that no edit does.

        They are those from before any round of relaxation, from which the plan allocates the
        others.
        """
        ledgers: list[StageLedger] = [*self.removed, *self.stages]
        frozen = {s.name: s.first_epochs or s.epochs for s in ledgers if s.frozen}
        return {name: epochs for name, epochs in frozen.items() if epochs is not None}

    @property
    def rounds(self) -> list[RelaxationRound]:
        """The rounds of relaxation that have begun."""
        return self.relaxation.rounds if self.relaxation else []

    def condition(self, kind: str) -> Condition | None:
        return next((c for c in self.conditions if c.type == kind), None)

    def is_true(self, kind: str) -> bool:
        found = self.condition(kind)
        return found is not None and found.status == "True"
