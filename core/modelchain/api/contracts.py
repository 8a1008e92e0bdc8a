"""The JSON documents that the rooms exchange: task, last word, manifest, results and progress."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from modelchain.api.messages import one_line
from modelchain.api.spec import Evaluation, WrittenModel

MANIFEST = "manifest.json"
RESULTS = "results.json"
WEIGHTS = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
TASK = "task.json"
LAST_WORD = "termination.json"
METRICS = "metrics.jsonl"
# Beside an artifact: by evaluation key, the `Findings` after the artifact was finished.
EVALUATIONS = "evaluations.json"
# Beside an artifact: a `RelaxedEpochs`, if a round of relaxation gave it its epochs.
RELAXATION = "relaxation.json"


class FailureClass(StrEnum):
    """Why an attempt ended without an artifact. The class decides which budget is charged."""

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
        """`Error` stands for the class of a newer version, which is not known here."""
        return cls.ERROR

    @property
    def permanent(self) -> bool:
        """Whether trying again cannot help, because the user has to change something first."""
        return self in (
            self.USER_ERROR,
            self.DATA,
            self.CORRUPT_PREDECESSOR,
            self.CORRUPT_ARTIFACT,
            self.STAGE_DEADLINE,
        )

    @property
    def disruption(self) -> bool:
        """Whether the end was not the work's fault. It is then charged to `maxDisruptions`."""
        return self in (
            self.PREEMPTED,
            self.KILLED,
            self.NODE_LOST,
            self.HARDWARE,
            self.INIT,
            self.START_DEADLINE,
            self.UNKNOWN,
        )


class Predecessor(WrittenModel):
    """Where the predecessor's artifact lies, and the SHA-256 its weights must have."""

    stage: str
    input_digest: str
    artifact_digest: str
    path: str


class TaskEvaluation(Evaluation, WrittenModel):
    """An evaluation, with its shards on the trainer's machine."""

    # A list of paths, or a pattern in brace notation.
    files: list[str] | str


class TrainFiles(WrittenModel):
    """The training data: its shards, and what the spec says of them."""

    # A pod gets the pattern, since a list of thousands of paths would not fit into its task.
    files: list[str] | str
    samples: int
    captions_per_sample: int
    fingerprint: str | None


class DataRequest(WrittenModel):
    """What data a chain reads."""

    # The folder for the indexes of shards, which all chains of a root share. It is never beside the
    # data, which may be read-only.
    index: str
    file: str = Field(description="the spec file, for error messages")
    train: TrainFiles
    evaluation: list[TaskEvaluation]


class IndexTask(WrittenModel):
    """The data to be indexed and checked before a chain's first stage.

    `python -m modelchain_data FILE` reads such a task; without FILE, from MODELCHAIN_TASK. It
    builds the missing indexes, checks all data, writes a DataAnswer to standard output, and, in a
    pod, a LastWord.
    """

    v: Literal[1] = 1
    data: DataRequest
    last_word: str | None = Field(
        None, description="the file to which the termination message is written"
    )


class DataAnswer(WrittenModel):
    """What the data room answers to an IndexTask. With `problems` the data cannot be used."""

    fingerprint: str | None = None
    notes: list[str] = []
    problems: list[str] = []


class EvaluationTask(WrittenModel):
    """Evaluations to run on a finished artifact.

    `python -m modelchain_trainer evaluate FILE` reads such a task; without FILE, from
    MODELCHAIN_TASK. It writes its Findings to standard output, and, in a pod, a LastWord.
    """

    v: Literal[1] = 1
    artifact: str = Field(description="its directory")
    artifact_digest: str | None = Field(
        None, description="the SHA-256 that its weights must have; by default any"
    )
    data: DataRequest
    names: list[str] | None = Field(
        None, description="the evaluations to run, of those in `data`; by default all"
    )
    device: Literal["cuda", "cpu"] | None = Field(
        None,
        description=(
            "by default a GPU if there is one; a pod may see GPUs that it did not ask for, and that"
            " others use"
        ),
    )
    last_word: str | None = Field(
        None, description="the file to which the termination message is written"
    )


class Task(WrittenModel):
    """All that a trainer gets to know about the attempt that it trains.

    Paths are absolute on the trainer's machine.
    """

    v: Literal[1] = 1
    chain: str
    stage: str
    model: str
    attempt: str
    input_digest: str
    inputs: dict[str, Any] = Field(
        description="the hashed inputs, which hold every hyper-parameter"
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
        description="what the pool has; a trainer that finds no such device ends at once"
    )
    start_seconds: int = Field(
        description="the trainer ends itself if it has not made its first step after this time"
    )
    stall_seconds: int = Field(
        description="the trainer ends itself if it has made no new step for this time"
    )
    last_word: str = Field(description="the file to which the termination message is written")


# No stage takes more steps, no attempt more MACs, no time or metric is larger, and no stage has
# more metrics. A record can hold all of these.
MOST_STEPS = 10**15
MOST_MACS = 10**30
LARGEST = 1e12
MOST_METRICS = 256


class LastWord(WrittenModel):
    """Rank 0's termination message, of at most 2 KiB. It outlives the process and its pod.

    A trainer of another version may have written it. So unknown keys are ignored, an unknown class
    counts as an Error, and a `manifestDigest` without a result counts as a success.
    """

    model_config = ConfigDict(extra="ignore")

    result: Literal["Succeeded", "Failed"]
    failure: FailureClass | None = Field(None, alias="class")
    message: Annotated[str, AfterValidator(one_line)] = ""
    step: int = 0
    checkpoint_step: int | None = None
    manifest_digest: str | None = None
    artifact_digest: str | None = None
    steps: int | None = None
    macs: int = Field(0, description="spent by this attempt")
    seconds: float = 0.0
    gpu_seconds: float = 0.0
    metrics: dict[str, float] = {}
    evaluations: dict[str, str] = Field(
        {}, description="by an evaluation's name, the short form of its key"
    )
    pictures: dict[str, int] = Field(
        {}, description="by an evaluation's name, on how many pictures it was measured"
    )
    fingerprint: str | None = Field(None, description="of the training data, once it is indexed")
    trainer_math: int | None = Field(None, description="of the trainer that trained the weights")
    node: str | None = Field(
        None, description="the node whose device failed, if the failure is a node's"
    )
    fault: Annotated[str, AfterValidator(one_line)] = Field(
        "", description="a short name of the device error; equal errors have equal names"
    )

    @model_validator(mode="before")
    @classmethod
    def _result_follows(cls, word: Any) -> Any:
        """Add the result that an older trainer did not write."""
        if isinstance(word, dict) and "result" not in word:
            return {**word, "result": "Succeeded" if word.get("manifestDigest") else "Failed"}
        return word

    @property
    def left(self) -> str | None:
        """The SHA-256 of the attempt's weights, or of its manifest if only that is known."""
        return self.artifact_digest or self.manifest_digest


class FileEntry(WrittenModel):
    """One file of an artifact, in its manifest."""

    sha256: str
    size: int


class Manifest(WrittenModel):
    """The list of the files of an artifact or of a checkpoint.

    It is written last. Without it the files do not count.
    """

    v: Literal[1] = 1
    kind: Literal["artifact", "checkpoint"]
    input_digest: str
    # The SHA-256 of the weights file alone, since a successor inherits nothing else. If training
    # again gives the same weights, byte by byte, that is the same artifact.
    artifact_digest: str | None = None
    step: int
    inputs: dict[str, Any]
    files: dict[str, FileEntry]
    environment: dict[str, str | int]

    @property
    def trainer_math(self) -> int | None:
        """`TRAINER_MATH` of the trainer that wrote the manifest; None if it did not say."""
        number = self.environment.get("trainerMath")
        return number if isinstance(number, int) else None


class Findings(WrittenModel):
    """What evaluations have found of one model."""

    metrics: dict[str, float] = Field(
        description="in percent; their names are the evaluation's, or begin with it and `/`"
    )
    pictures: dict[str, int] = Field(
        {}, description="by an evaluation's name, on how many pictures it was measured"
    )


class RelaxedEpochs(WrittenModel):
    """Which round of relaxation gave an artifact its epochs, and what they were before any round.

    On a cluster the StageArtifact tells this.
    """

    round: int
    first_epochs: int


class Measured(WrittenModel):
    """The loss and the metrics of one model at one time."""

    loss: float
    metrics: dict[str, float]


class Growth(WrittenModel):
    """How a stage's first weights were made from its predecessor's.

    `inserted`, `duplicated` and `new` count the elements of all parameters.
    """

    method: dict[str, str]
    inserted: int
    duplicated: int
    new: int


class Results(WrittenModel):
    """`results.json` of an artifact.

    `macs` and `seconds` are those of the training that made these weights.
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
        {}, description="by an evaluation's name, its `modelchain.identity.digest.evaluation_key`"
    )
    pictures: dict[str, int] = Field(
        {}, description="by an evaluation's name, on how many pictures it was measured"
    )
    counters: dict[str, int] = {}


class Progress(WrittenModel):
    """How far a training is: the part of the last line of metrics.jsonl that a table shows."""

    step: int
    steps: int
    samples_per_second: float
    eta_seconds: float


class LiveProgress(Progress):
    """What rank 0 answers to `GET /progress` on port 9091.

    An answer with a figure that cannot be true is no answer.
    """

    step: int = Field(ge=0, le=MOST_STEPS)
    steps: int = Field(ge=1, le=MOST_STEPS)
    samples_per_second: float = Field(ge=0, le=LARGEST)
    eta_seconds: float = Field(ge=0, le=LARGEST)
    attempt: str
    checkpoint_step: int = Field(0, ge=0, le=MOST_STEPS)
    macs: int = Field(0, ge=0, le=MOST_MACS)
