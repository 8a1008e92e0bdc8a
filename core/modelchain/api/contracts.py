"""What passes between the rooms, as typed JSON: the trainer's task, its last word, the manifest,
the results.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from modelchain.api.spec import Evaluation, Record

MANIFEST, RESULTS, WEIGHTS, CONFIG = (
    "manifest.json",
    "results.json",
    "open_clip_model.safetensors",
    "open_clip_config.json",
)
TASK, LAST_WORD, METRICS = "task.json", "termination.json", "metrics.jsonl"
EVALUATIONS = (  # beside an artifact: evaluations that were added after it was finished
    "evaluations.json"
)


class FailureClass(StrEnum):
    """Why an attempt ended without an artifact; decides which budget pays (RULES section 5)."""

    USER_ERROR = "UserError"
    CORRUPT_PREDECESSOR = "CorruptPredecessor"
    CORRUPT_ARTIFACT = "CorruptArtifact"
    PREEMPTED = "Preempted"
    KILLED = "Killed"
    NON_FINITE = "NonFinite"
    DATA = "Data"
    VOLUME_FULL = "VolumeFull"
    NO_ARTIFACT = "NoArtifact"
    ERROR = "Error"
    OUT_OF_MEMORY = "OutOfMemory"
    NODE_LOST = "NodeLost"
    HARDWARE = "Hardware"
    IMAGE = "Image"
    INIT = "Init"
    START_DEADLINE = "StartDeadline"
    STALL_DEADLINE = "StallDeadline"
    STAGE_DEADLINE = "StageDeadline"
    UNKNOWN = "Unknown"

    @classmethod
    def _missing_(cls, value: object) -> FailureClass:
        return cls.ERROR

    @property
    def permanent(self) -> bool:
        """Trying again cannot help: somebody has to change something first."""
        return self in (
            self.USER_ERROR,
            self.DATA,
            self.CORRUPT_PREDECESSOR,
            self.CORRUPT_ARTIFACT,
            self.STAGE_DEADLINE,
        )

    @property
    def disruption(self) -> bool:
        """The machine's doing, not the work's: charged to maxDisruptions."""
        return self in (
            self.PREEMPTED,
            self.KILLED,
            self.NODE_LOST,
            self.HARDWARE,
            self.INIT,
            self.START_DEADLINE,
            self.UNKNOWN,
        )


class Predecessor(Record):
    """Where the predecessor's artifact lies, and the SHA-256 its weights must have."""

    stage: str
    input_digest: str
    artifact_digest: str
    path: str


class TaskEvaluation(Evaluation, Record):
    """An evaluation with its shards as paths on the trainer's machine: written out, or a pattern in
    brace notation.
    """

    files: list[str] | str


class TrainFiles(Record):
    files: (
        list[str] | str
    )  # a pod is given the pattern: written out, thousands of paths do not fit into a task
    samples: int
    captions_per_sample: int
    fingerprint: str | None


class DataRequest(Record):
    """What data a chain reads, and where its indexes and tokens may be kept (never beside the
    data).

    `python -m modelchain_data FILE` takes one: it builds what is missing, checks all of it before
    the first stage, and answers with a DataAnswer on standard output.
    """

    cache: str
    file: str = Field(description="the spec file, for error messages")
    train: TrainFiles
    evaluation: list[TaskEvaluation]


class DataAnswer(Record):
    fingerprint: str | None = None
    notes: list[str] = []
    problems: list[str] = []


class EvaluationRequest(Record):
    """What `python -m modelchain_trainer evaluate FILE` is asked: these evaluations of a finished
    artifact.
    """

    artifact: str
    data: DataRequest


class Task(Record):
    """All that a trainer is told: one stage, one attempt. Paths are absolute on the trainer's
    machine.
    """

    v: Literal[1] = 1
    chain: str
    stage: str
    model: str
    attempt: str
    input_digest: str
    inputs: dict[str, Any] = Field(
        description="the hashed inputs; every hyper-parameter is read from here"
    )
    root: str
    owner: str = Field(description="names the attempt's directory under <root>/<input digest>/")
    predecessor: Predecessor | None
    data: DataRequest
    micro_batch_size: int | None
    checkpoint_seconds: int
    macs_per_step: int
    threads: int | None
    device: Literal["cuda", "cpu"] = Field(
        description="what the pool promises: a trainer that finds less ends at once"
    )
    start_seconds: int = Field(
        description="the trainer ends itself without a first step within this time"
    )
    stall_seconds: int = Field(description="and without a new step for this time")
    last_word: str = Field(description="file for the termination message")


class LastWord(Record):
    """The termination message (<= 2 KiB): an attempt's final word, which outlives its pod.

    Read with patience, for it is evidence and may be another version's: what is not known is passed
    over, a `manifestDigest` without a result is a success, a class without a name here is an Error.
    """

    model_config = ConfigDict(extra="ignore")

    result: Literal["Succeeded", "Failed"]
    failure: FailureClass | None = Field(None, alias="class")
    message: str = ""
    step: int = 0
    checkpoint_step: int | None = None
    manifest_digest: str | None = None
    artifact_digest: str | None = None
    steps: int | None = None
    macs: int = Field(0, description="spent by this attempt")
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    metrics: dict[str, float] = {}
    trainer_math: int | None = Field(None, description="of the trainer that made the weights")
    node: str | None = Field(
        None, description="the node whose own device failed; none where no node is to blame"
    )
    fault: str = Field(
        "", description="a short name of the device error, equal for equal errors on two nodes"
    )

    @model_validator(mode="before")
    @classmethod
    def _result_follows(cls, word: Any) -> Any:
        if isinstance(word, dict) and "result" not in word:
            return {**word, "result": "Succeeded" if word.get("manifestDigest") else "Failed"}
        return word

    @property
    def left(self) -> str | None:
        """What names the weights it left: their SHA-256, or the manifest's where only that is
        given.
        """
        return self.artifact_digest or self.manifest_digest


class FileEntry(Record):
    sha256: str
    size: int


class Manifest(Record):
    """Renamed into place last: no manifest, no artifact. `artifactDigest` is the SHA-256 of the
    weights file.

    The weights alone name what a successor inherits: trained again to the same bytes, an artifact
    is the same artifact.
    """

    v: Literal[1] = 1
    kind: Literal["artifact", "checkpoint"]
    input_digest: str
    artifact_digest: str | None = None
    step: int
    inputs: dict[str, Any]
    files: dict[str, FileEntry]
    environment: dict[str, str | int]

    @property
    def trainer_math(self) -> int | None:
        """`TRAINER_MATH` of the trainer that wrote this; None of one that did not say."""
        number = self.environment.get("trainerMath")
        return number if isinstance(number, int) else None


class Measured(Record):
    loss: float
    metrics: dict[str, float]


class Growth(Record):
    """Elements of the student's parameters by where they came from."""

    method: dict[str, str]
    inserted: int
    duplicated: int
    new: int


class Results(Record):
    """`results.json` of an artifact. `macs` and `seconds` are those of the training that made these
    weights.
    """

    stage: str
    model: str
    predecessor: str | None
    steps: int
    samples_seen: int
    macs: int
    seconds: float
    initial: Measured
    final: Measured
    growth: Growth | None
    evaluations: dict[str, str] = Field(
        {}, description="by name, its `modelchain.identity.digest.evaluation_key`"
    )
    counters: dict[str, int] = {}


class Progress(Record):
    """Live progress, the last line of metrics.jsonl reduced to what a table shows."""

    step: int
    steps: int
    samples_per_second: float
    eta_seconds: float


class LiveProgress(Progress):
    """What rank 0 answers to `GET /progress` on port 9091."""

    attempt: str
    checkpoint_step: int = 0
    macs: int = 0
