"""Why a chain or a stage is as it is: one enum of codes, each with its meaning and what to do.

Status, conditions, events, metrics, `explain`, alerts and docs all use these codes. A `Reason` is
the code with its details; it becomes a sentence only where it is stored or shown. The table in
`docs/reasons.md` is made from this enum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

EDIT = "kubectl edit mchain {chain} -n {namespace}"
RETRY = "modelchain retry {chain} -n {namespace}"
RESUME = "modelchain resume {chain} -n {namespace}"
STOPS_FIRST = "; waits for an earlier attempt to stop"
EXPLAIN = "modelchain explain {chain} -n {namespace}"
WATCH = "modelchain watch {chain} -n {namespace}"
DESCRIBE = "kubectl describe mchain {chain} -n {namespace}"


class Code(StrEnum):
    """A reason. The value is written to objects and read by scripts, so it never changes.

    `meaning` and `action` are the docs' columns. `command` is the next command to type: a template
    over {chain}, {namespace} and {subject}, empty where nothing has to be done. `named`: a
    condition carries this code as its reason, and the sentence in the status begins with it.
    `retry_helps`: `modelchain retry` mends a stage that is stalled for this reason.
    """

    meaning: str
    action: str
    command: str
    named: bool
    retry_helps: bool

    def __new__(
        cls,
        value: str,
        meaning: str = "",  # for the type checker: a look-up by value gives the value alone
        action: str = "Nothing",
        command: str = "",
        named: bool = True,
        retry_helps: bool = False,
    ) -> Code:
        code = str.__new__(cls, value)
        code._value_ = value
        code.meaning = meaning
        code.action = action
        code.command = command
        code.named, code.retry_helps = named, retry_helps
        return code

    # Why a stage is trained, or is not.
    MISS = "Miss", "No finished artifact exists for the stage's inputs, so it is trained"
    UNCHANGED = (
        "Unchanged",
        "An artifact of the same inputs exists, so the stage is not trained again",
        "Nothing; to train it again, set the stage's `rerun`",
        "",
        False,
    )

    # What a stage waits for, and goes on by itself.
    WAITS_FOR_STAGE = "WaitsForStage", "An earlier stage has not finished", "Nothing", "", False
    WAITS_FOR_GATE = (
        "WaitsForGate",
        "An earlier stage missed its baseline, or is not measured yet",
        "See the reason of that stage",
        "",
        False,
    )
    WAITS_FOR_BASELINE = (
        "WaitsForBaseline",
        "The same model is trained alone first, as `gate.train` asks",
        "Nothing",
        WATCH,
    )
    GATE_RELAXED = (
        "GateRelaxed",
        "A stage missed its baseline, so it and all later stages are trained for more epochs",
    )
    GATE_UNMEASURED = (
        "GateUnmeasured",
        "The stage has finished, and what its gate compares is not measured yet",
    )
    STOPPING = (
        "Stopping",
        "The running attempt was asked to stop; it writes a checkpoint first",
        "Nothing",
        "",
        False,
    )
    RESUMES = "Resumes", "The next attempt resumes from the newest checkpoint", "Nothing", "", False
    MAKES_CLAIM = "MakesClaim", "The chain's own claim is being created", "Nothing", "", False
    TAKES_SHARE = (
        "TakesShare",
        "The stage's inputs are being reserved on a claim that several chains use",
        "Nothing",
        "",
        False,
    )
    SHARED_STAGE = (
        "SharedStage",
        "Another chain trains a stage of the same inputs; its artifact will be used",
        "Nothing",
        "modelchain explain {subject} -n {namespace}",
    )
    DATA_LOADING = (
        "DataLoading",
        "A Job still fills the claim that holds the data",
        "Nothing",
        "kubectl logs -f job/{subject} -n {namespace}",
    )
    INDEXING = (
        "Indexing",
        "A Job on CPUs indexes and checks the data before any GPU is asked for",
        "Nothing",
        "kubectl logs -f job/{subject} -n {namespace}",
        False,
    )
    NAME_GOING = (
        "NameGoing",
        "A job with the needed name was deleted, but still exists",
        "Nothing",
        "",
        False,
    )
    VERIFIES = (
        "Verifying",
        "The attempt's last word was lost; its artifact is hashed again before anything else",
        "Nothing",
        WATCH,
        False,
    )

    # What a queue or pods wait for.
    QUEUED = (
        "Queued",
        "Kueue has not admitted the job yet",
        "Nothing; see the Workload for what it waits for",
        "kubectl get workloads -n {namespace}",
    )
    UNSCHEDULABLE = (
        "Unschedulable",
        "No node fits the stage's pods",
        "Compare the node pool's selector and resources with the nodes",
        "kubectl describe pod {subject} -n {namespace}",
    )
    SCHEDULING_GATED = (
        "SchedulingGated",
        "A scheduling gate holds the stage's pods",
        "Ask who sets the gate",
        "kubectl describe pod {subject} -n {namespace}",
    )
    NODES_AVOIDED = (
        "NodesAvoided",
        "Only nodes are left whose devices failed within a day",
        "Wait, add nodes, or retry to allow these nodes again",
        RETRY,
        True,
        True,
    )
    PODS_ENDING = (
        "PodsEnding",
        "A pod of the attempt is being deleted and has not ended yet",
        "Nothing",
        "",
        False,
    )
    PODS_MISSING = (
        "PodsMissing",
        "Some of the attempt's pods are still to be created",
        "Nothing",
        "",
        False,
    )
    PROGRESS_UNKNOWN = (
        "ProgressUnknown",
        "The attempt runs, but rank 0 does not answer the operator, which lets it run",
        "Open port 9091 of the trainer's pods to the operator",
        "kubectl get networkpolicies -n {namespace}",
    )

    # What a person has to mend: the stage is stalled.
    INVALID_SPEC = (
        "InvalidSpec",
        "The spec cannot be run as it is",
        "Correct the field that the message names and apply the spec again",
        EDIT,
    )
    STATUS_UNREADABLE = (
        "StatusUnreadable",
        "Another version of the operator, usually a newer one, wrote the chain's status",
        "Install that version again; until then nothing is launched, stopped or deleted",
        "kubectl get deployments -A -l app.kubernetes.io/name=modelchain",
    )
    RUNNER_MISSING = (
        "RunnerMissing",
        "The kind of job that the chain asks for is not installed in this cluster",
        "Install it with the command in the message",
        EXPLAIN,
    )
    CLAIM_MISSING = (
        "ClaimMissing",
        "The claim for artifacts or data does not exist, or is being deleted",
        "Create it, or correct `spec.storage.claimName`",
        "kubectl get pvc -n {namespace}",
    )
    CLAIM_TAKEN = (
        "ClaimTaken",
        "A claim with the name `CHAIN-artifacts` exists, and this chain did not make it",
        "To use that claim, name it in `spec.storage.claimName`",
        EDIT,
    )
    DATA_FAILED = (
        "DataFailed",
        "The Job that fills the claim of data has failed",
        "Read its logs; delete the Job, or create it again",
        "kubectl logs job/{subject} -n {namespace}",
    )
    INDEX_FAILED = (
        "IndexFailed",
        "The Job that indexes the data has failed, and the data is not to blame",
        "Correct the cause that the message names, then retry",
        RETRY,
        True,
        True,
    )
    ARTIFACT_MISSING = (
        "ArtifactMissing",
        "The recorded artifact of the stage is not on the chain's claim",
        "Bring the claim back, or delete the record that the message names to train again",
        "kubectl get sart -n {namespace}",
    )
    DIGEST_CONFLICT = (
        "DigestConflict",
        "Two different artifacts are known for the same inputs",
        "Keep the recorded one, or delete the record to train again",
        "kubectl get sart -n {namespace}",
    )
    NAME_TAKEN = (
        "NameTaken",
        "A job of the needed name exists that this chain did not make",
        "If the message does not name another thing to do, nothing: the next attempt takes the next"
        " number",
        EXPLAIN,
    )
    ORPHANED_JOB = (
        "OrphanedJob",
        "A job that a deleted chain left behind may train the same stage",
        "Wait until it has ended, or delete it",
        EXPLAIN,
    )
    CLAIM_REFUSED = (
        "ClaimRefused",
        "The API server refuses to create the chain's claim",
        "Change what the message names: a quota, a policy, a webhook",
        DESCRIBE,
    )
    SHARE_REFUSED = (
        "ShareRefused",
        "The API server refuses the Lease by which chains agree who trains a shared stage",
        "Change what the message names: a quota, a policy, a webhook",
        DESCRIBE,
    )
    LAUNCH_REFUSED = (
        "LaunchRefused",
        "The API server refuses to create the attempt's job",
        "Change what the message names: a quota, a policy, a webhook",
        DESCRIBE,
    )
    RELEASE_REFUSED = (
        "ReleaseRefused",
        "The API server refuses to release the attempt's job into its queue",
        "Change what the message names",
        DESCRIBE,
    )
    QUEUE_REQUIRED = (
        "QueueRequired",
        "This cluster runs only jobs that are in a queue",
        "Set `spec.runner.queueName`",
        EDIT,
    )
    RECORD_REFUSED = (
        "RecordRefused",
        "The stage has finished, and the API server refuses its record",
        "Change what the message names; the artifact is safe meanwhile",
        DESCRIBE,
    )
    VERIFY_REFUSED = (
        "VerifyRefused",
        "The API server refuses the Job that hashes an artifact again",
        "Change what the message names; nothing is trained again before that Job has answered",
        DESCRIBE,
    )
    INDEX_REFUSED = (
        "IndexRefused",
        "The API server refuses the Job that indexes the data",
        "Change what the message names: a quota, a policy, a webhook",
        DESCRIBE,
    )
    DELETE_REFUSED = (
        "DeleteRefused",
        "The API server refuses to delete a job of the chain",
        "Change what the message names: a policy, a webhook",
        DESCRIBE,
    )
    PODS_FORBIDDEN = (
        "PodsForbidden",
        "The API server refuses pods or Services that a job needs",
        "Change what the message names: a quota, a limit, a webhook, the Pod Security Standard",
        DESCRIBE,
    )
    SUSPENDED_BY_ANOTHER = (
        "SuspendedByAnother",
        "Another controller or a person suspended the job, and it is in no queue",
        "Set `spec.runner.queueName`, or retry to launch a new attempt",
        RETRY,
        True,
        True,
    )
    GATE_MISSED = (
        "GateMissed",
        "A finished stage is less accurate than the same model trained alone, by more than"
        " `gate.tolerance`",
        "Allow it with a larger `gate.tolerance` or `onMiss: Continue`, or train the stage for more"
        " `epochs`",
        EDIT,
    )
    BUDGET_EXCEEDED = (
        "BudgetExceeded",
        "What the chain has spent, with what the stage will still take, is more than `spec.budget`"
        " allows",
        "Raise `spec.budget`, or remove it: the stage goes on from its newest checkpoint",
        EDIT,
    )
    NO_PRICE = (
        "NoPrice",
        "Some GPU time of the chain has no price, and `spec.budget.cost` limits money",
        "Give the node pool prices that hold for all of its nodes, or limit `gpuHours` instead",
        EDIT,
    )
    BASELINE_FAILED = (
        "BaselineFailed",
        "A model that is trained alone for the gate has failed, so its stage has no verdict",
        "Retry, or give its accuracy in `gate.baseline` instead",
        RETRY,
        True,
        True,
    )
    SAME_DEVICE_ERROR = (
        "SameDeviceError",
        "The devices of two nodes failed in the same way, so the nodes are probably not the cause",
        "Compare the GPU driver with the CUDA version of the image, then retry",
        RETRY,
        True,
        True,
    )
    VERIFY_UNANSWERED = (
        "VerifyUnanswered",
        "The Job that hashes the artifact again could not answer",
        "Read its logs, then retry",
        RETRY,
        True,
        True,
    )
    BLOCKED = (
        "Blocked",
        "The stage is stalled; its message says why",
        "Do what the message says",
        EXPLAIN,
    )

    # How an attempt ended without an artifact: the values of `FailureClass`.
    USER_ERROR = (
        "UserError",
        "The trainer refuses its inputs; another attempt cannot help",
        "Correct the spec or the data, then retry",
        EDIT,
    )
    CORRUPT_PREDECESSOR = (
        "CorruptPredecessor",
        "The predecessor's artifact does not have the recorded hash",
        "Restore the artifact, or delete its record to train that stage again",
        RETRY,
    )
    CORRUPT_ARTIFACT = (
        "CorruptArtifact",
        "The stage's own artifact does not have the recorded hash",
        "Restore the file, or delete the artifact to train again",
        RETRY,
    )
    PREEMPTED = "Preempted", "The platform took the pods away", "Nothing", RETRY
    KILLED = (
        "Killed",
        "The attempt's job was deleted, or on a laptop its trainer died without a last word",
        "Nothing",
        RETRY,
    )
    NON_FINITE = (
        "NonFinite",
        "The loss is not a finite number",
        "Lower the learning rate, or lengthen the warm-up",
        EDIT,
    )
    DATA = "Data", "Too many samples cannot be decoded", "Repair the shards, then retry", RETRY
    VOLUME_FULL = (
        "VolumeFull",
        "A volume is full",
        "Enlarge the claim or the pool's `ephemeralStorage`, then retry",
        RETRY,
    )
    NO_ARTIFACT = (
        "NoArtifact",
        "The trainer reported success, or the stage had finished, but the claim holds no artifact",
        "Retry to train it",
        RETRY,
    )
    ERROR = "Error", "The trainer failed", "Read the attempt's logs", RETRY
    OUT_OF_MEMORY = (
        "OutOfMemory",
        "The trainer ran out of memory",
        "Raise the pool's `memory`, or lower `recipe.microBatchSize`",
        EDIT,
    )
    NODE_LOST = (
        "NodeLost",
        "A node is gone, or it does not answer and a pod on it may still run",
        "Nothing if the node is gone; else make sure that it is dead and force-delete the pod",
        RETRY,
    )
    HARDWARE = (
        "Hardware",
        "A GPU failed; the chain avoids its node for a day",
        "Check the node's GPU; `nvidia-smi -q` and the kernel's log show errors",
        RETRY,
    )
    IMAGE = "Image", "The image cannot be pulled or started", "Correct `spec.runner.image`", EDIT
    INIT = "Init", "An init container failed: rank 0's pod was not reachable", "Nothing", RETRY
    START_DEADLINE = (
        "StartDeadline",
        "The attempt took no first step within `deadlines.startSeconds`",
        "Find out what it waited for, or raise the deadline",
        RETRY,
    )
    STALL_DEADLINE = (
        "StallDeadline",
        "The attempt took no step for `deadlines.stallSeconds`",
        "Read the stack traces in the attempt's logs",
        RETRY,
    )
    STAGE_DEADLINE = (
        "StageDeadline",
        "The stage has run for `deadlines.stageSeconds`",
        "Raise the deadline; the stage then resumes from the newest checkpoint",
        EDIT,
    )
    UNKNOWN = "Unknown", "The attempt ended without a last word", "Read its logs", RETRY

    # Why nothing runs although nothing is wrong.
    INTERRUPTED = (
        "Interrupted",
        "A local run was interrupted",
        "Type the same command again; it resumes from the newest checkpoint",
        "",
        False,
    )
    SUSPENDED = (
        "Suspended",
        "The chain's `spec.suspend` is true",
        "Resume the chain",
        RESUME,
        False,
    )

    # Why a metric of a finished stage is not known.
    MEASURE_WAITS = (
        "MeasureWaits",
        "The metric is measured once all stages are trained, after those before it",
        "Nothing",
        WATCH,
    )
    MEASURING = (
        "Measuring",
        "A Job measures the metric on the finished artifact",
        "Nothing",
        "kubectl logs -f job/{subject} -n {namespace}",
    )
    MEASURE_FAILED = (
        "MeasureFailed",
        "The Job that was to measure the metric has failed",
        "Read its logs, correct what they name, then retry",
        RETRY,
        True,
        True,
    )
    MEASURE_DEADLINE = (
        "MeasureDeadline",
        "The Job that was to measure the metric had not ended within `evaluating.deadlineSeconds`",
        "Find out why it took so long, or raise the node pool's deadline; then retry",
        RETRY,
        True,
        True,
    )
    MEASURE_REFUSED = (
        "MeasureRefused",
        "The API server refuses the Job that measures the metric, or the metric in the record",
        "Change what the message names: a quota, a policy, a webhook",
        DESCRIBE,
    )
    UNMEASURED = (
        "Unmeasured",
        "The metric is not known, and nothing has asked for it since the chain ended",
        "Retry to measure it; on a laptop, run again",
        RETRY,
        True,
        True,
    )

    # What conditions say of the whole chain.
    ALL_MEASURED = "AllMeasured", "Every metric that the spec asks for is known of every stage"
    ALL_STAGES_FINISHED = "AllStagesFinished", "Every stage has an artifact"
    IN_PROGRESS = "InProgress", "The chain is at work", "Nothing", WATCH
    PENDING = "Pending", "The stage waits for its turn"
    STARTING = (
        "Starting",
        "The attempt's job exists, and its pods have not started training",
        "Nothing",
        "kubectl describe pod {subject} -n {namespace}",
    )
    RUNNING = "Running", "The stage trains", "Nothing", "kubectl logs -f {subject} -n {namespace}"
    COMPLETE = "Complete", "The chain has finished", "Nothing", "kubectl get sart -n {namespace}"
    FAILED = "Failed", "A stage has failed and is not tried again by itself", "Retry", RETRY
    NO_FAILURE = "NoFailure", "No stage has failed"
    NOT_SUSPENDED = "NotSuspended", "Nothing is suspended"
    STOPPED = "Stopped", "The chain was stopped by a suspend or an interrupt", "Resume it", RESUME
    PLANNED = "Planned", "The spec is planned, and its stages are launched one after another"

    # What events tell.
    STAGE_PENDING = "StagePending", "A stage waits"
    STAGE_INDEXING = "StageIndexing", "A stage's data is indexed before its first attempt"
    STAGE_QUEUED = "StageQueued", "A stage's job waits in a queue"
    STAGE_STARTING = "StageStarting", "A stage is launched"
    STAGE_RUNNING = "StageRunning", "A stage trains"
    STAGE_VERIFYING = "StageVerifying", "A stage's artifact is verified"
    STAGE_SUCCEEDED = "StageSucceeded", "A stage has finished"
    STAGE_FAILED = "StageFailed", "A stage has failed and is not tried again", "Retry", RETRY
    STAGE_SUSPENDED = "StageSuspended", "A stage is suspended", "Resume the chain", RESUME
    STAGE_STALLED = (
        "StageStalled",
        "A stage cannot continue before a person acts",
        "See why",
        EXPLAIN,
    )
    STAGE_STOPPING = "StageStopping", "A stage's attempt was asked to stop"
    STAGE_RETRYING = "StageRetrying", "An attempt ended without an artifact; another one follows"
    STAGE_MEASURED = "StageMeasured", "A metric of a finished stage was measured"
    STATUS_REFUSED = (
        "StatusRefused",
        "The API server refuses the chain's status",
        "Change what the event names: a policy, a webhook, CRDs of another version",
        DESCRIBE,
    )

    # What only `explain` finds out.
    DELETING = "Deleting", "The chain is being deleted; artifacts stay"
    NOT_SEEN_YET = "NotSeenYet", "The operator has not reconciled the newest spec yet"
    NOT_SEEN = (
        "NotSeen",
        "The operator runs and has not reconciled the newest spec",
        "Read its logs: it may serve other namespaces, or fail at this chain",
    )
    NO_OPERATOR = "NoOperator", "No operator runs for this chain", "Install or start the operator"
    BACK_OFF = "BackOff", "The last attempt failed; the next one starts after a pause"
    NO_PODS = (
        "NoPods",
        "The job was released, and its controller has made no pods",
        "See whether the controller of this kind of job runs",
    )
    CLAIM_PENDING = (
        "ClaimPending",
        "A claim that the pods mount is not bound",
        "See the claim's events",
        "kubectl describe pvc {subject} -n {namespace}",
    )
    CLAIM_LOST = (
        "ClaimLost",
        "A claim that the pods mount has lost its volume",
        "Restore the volume",
        "kubectl describe pvc {subject} -n {namespace}",
    )
    KUEUE_MISSING = (
        "KueueMissing",
        "The chain names a queue, and Kueue is not installed",
        "Install Kueue, or leave out `spec.runner.queueName`",
    )
    LOCAL_QUEUE_MISSING = (
        "LocalQueueMissing",
        "The queue that the chain names does not exist in its namespace",
        "Create the LocalQueue, or correct `spec.runner.queueName`",
        "kubectl get localqueues -n {namespace}",
    )
    QUEUE_INACTIVE = (
        "QueueInactive",
        "The LocalQueue admits nothing at present",
        "Ask the administrator of the queue",
        "kubectl describe localqueue {subject} -n {namespace}",
    )
    NO_WORKLOAD = (
        "NoWorkload",
        "Kueue has made no Workload for the job",
        "Enable this kind of job in Kueue's `integrations.frameworks`",
    )


@dataclass(frozen=True)
class Reason:
    """A code with its details.

    `subject` is what it is about: a pod, job, claim or record by name, or another chain. `message`
    says it without the code. `next_command` is what to type, where it is not the code's own.
    `shown`: the sentence ends with that command, after this word. `bare`: the sentence does not
    begin with the code. `stops_first`: the stage also waits for an earlier attempt to stop.
    `never_trained`: of a miss, nothing was trained under the stage's name before.
    """

    code: Code
    subject: str = ""
    message: str = ""
    next_command: str = ""
    shown: Literal["", "see", "look"] = ""
    bare: bool = False
    stops_first: bool = False
    never_trained: bool = False

    @property
    def next(self) -> str:
        """The next command; still a template over {chain} and {namespace}."""
        return self.next_command or self.code.command.replace("{subject}", self.subject)

    @property
    def text(self) -> str:
        """The sentence as the status holds it."""
        ends = f"; {self.shown}: {self.next}" if self.shown else ""
        return self.without_command + ends

    @property
    def without_command(self) -> str:
        """The sentence without the command that may end it."""
        begins = f"{self.code}: " if self.code.named and not self.bare else ""
        waits = STOPS_FIRST if self.stops_first else ""
        return begins + self.message + waits

    def with_message(self, message: str) -> Reason:
        return replace(self, message=message)


def command_of(code: Code | None) -> str:
    """The next command for a code alone, still a template.

    It is `DESCRIBE` for a code of a newer version, and for a command that needs the reason's
    subject.
    """
    if code is None or not code.command or "{subject}" in code.command:
        return DESCRIBE
    return code.command


def known(code: str) -> Code | None:
    """The code of a stored status; None for none, or for one that another version wrote."""
    return Code(code) if code in Code._value2member_map_ else None


def filled(command: str, chain: str, namespace: str | None) -> str:
    """A next command for this chain; empty on a laptop where it needs a cluster."""
    if namespace is None and "{namespace}" in command:
        return ""
    return command.replace("{chain}", chain).replace("{namespace}", namespace or "")
