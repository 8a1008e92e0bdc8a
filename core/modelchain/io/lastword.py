"""How a process gets its task, and leaves its last word.

The last word of an attempt is written, read, and made for a failed device and a finished artifact.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from modelchain.api.contracts import (
    LARGEST,
    MANIFEST,
    MOST_MACS,
    MOST_METRICS,
    MOST_STEPS,
    FailureClass,
    LastWord,
    Manifest,
    Results,
    Task,
)
from modelchain.api.faults import COLLECTIVE, fault_of
from modelchain.api.messages import one_line, shortened
from modelchain.api.spec import WrittenModel
from modelchain.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_PREEMPTED,
    EXIT_WORK_FAILED,
    WorkError,
)
from modelchain.identity.digest import KEY_DIGITS
from modelchain.io.files import read_artifact, sha256_of

T = TypeVar("T", bound=WrittenModel)

# The most bytes of a last word.
LAST_WORD_BYTES = 2048
# Characters of a message that are kept in any case.
MESSAGE_LENGTH = 200


def write_last_word(path: Path, word: LastWord) -> None:
    """Write the last word into the pod's file, which all ranks of the pod share.

    Only rank 0 reports success. If several ranks fail, the first failure stays, since it is the
    cause, unless its class is Unknown.
    """
    succeeded = word.result == "Succeeded"
    if succeeded and os.environ.get("RANK", "0") != "0":
        return
    text = _fitting(word)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        before = file.read()  # empty, if the kubelet has made the file
        if succeeded or not before or _unknown(before):
            file.truncate(0)
            file.write(text)


def _fitting(word: LastWord) -> bytes:
    """The word as JSON of at most LAST_WORD_BYTES.

    First details are left out that are in `results.json`: of metrics, and numbers of pictures. Then
    the middle of the message, and at last all metrics with their keys.
    """
    while len(text := word.model_dump_json(by_alias=True).encode()) > LAST_WORD_BYTES:
        main = {name: value for name, value in word.metrics.items() if "/" not in name}
        if main != word.metrics or word.pictures:
            word = word.model_copy(update={"metrics": main, "pictures": {}})
        elif len(word.message) > MESSAGE_LENGTH:
            message = shortened(word.message, len(word.message) * 3 // 4)
            word = word.model_copy(update={"message": message})
        else:
            word = word.model_copy(update={"metrics": {}, "evaluations": {}})
    return text


# The counts of a last word, each with the largest that can be true, its times and its texts.
_COUNTS = {
    "step": MOST_STEPS,
    "checkpointStep": MOST_STEPS,
    "steps": MOST_STEPS,
    "macs": MOST_MACS,
    "trainerMath": MOST_STEPS,
}
_TIMES = ("seconds", "gpuSeconds")
_TEXTS = ("message", "node", "fault")
_DIGESTS = ("manifestDigest", "artifactDigest")
_SHA_256, _KEY = re.compile(r"[0-9a-f]{64}"), re.compile(rf"[0-9a-f]{{{KEY_DIGITS}}}")
# Characters that are quoted of a value that cannot be true.
_QUOTED = 80


def read_last_word(text: str) -> LastWord | None:
    """The last word in a termination message; None if it holds none.

    Anything may have written the message. From a failure, values that cannot be true are left out,
    since its class matters more. A success with such a value is a failure.
    """
    try:
        said = {key: value for key, value in json.loads(text).items() if value is not None}
        wrong = [key for key, value in said.items() if not _possible(key, value)]
        kept = {key: value for key, value in said.items() if key not in wrong}
        word = LastWord.model_validate_json(json.dumps(kept))
    except (ValueError, AttributeError, RecursionError):
        return None
    if word.result == "Succeeded" and wrong:
        value = shortened(one_line(repr(said[wrong[0]])), _QUOTED)
        message = f"reported success, with {value} as {wrong[0]}"
        return LastWord(result="Failed", failure=FailureClass.NO_ARTIFACT, message=message)
    return word


def _possible(key: str, value: Any) -> bool:
    """Whether a value of a last word can be true."""
    if key in _DIGESTS:
        return isinstance(value, str) and _SHA_256.fullmatch(value) is not None
    if key in _TEXTS:
        return isinstance(value, str)
    if key in _COUNTS:
        return isinstance(value, int) and 0 <= value <= _COUNTS[key]
    if key in _TIMES:
        return isinstance(value, int | float) and 0 <= value <= LARGEST
    if key in _DICTS:
        return isinstance(value, dict) and all(map(_DICTS[key], value.items()))
    return key != "metrics" or _are_metrics(value)


def _are_metrics(value: Any) -> bool:
    few = isinstance(value, dict) and len(value) <= MOST_METRICS
    return few and all(map(_is_metric, value.items()))


def _is_key(item: tuple[str, Any]) -> bool:
    name, value = item
    return name.isprintable() and isinstance(value, str) and _KEY.fullmatch(value) is not None


def _is_count(item: tuple[str, Any]) -> bool:
    name, value = item
    return name.isprintable() and isinstance(value, int) and 1 <= value <= MOST_STEPS


def _is_metric(item: tuple[str, Any]) -> bool:
    name, value = item
    return (
        bool(name)
        and name.isprintable()
        and isinstance(value, int | float)
        and (-LARGEST <= value <= LARGEST)
    )


# What each entry of a dictionary of a last word must be.
_DICTS = {"evaluations": _is_key, "pictures": _is_count}
# The exit codes that agree with a last word. Any other failure has EXIT_WORK_FAILED.
_EXIT_CODES = {
    None: EXIT_DONE,
    FailureClass.USER_ERROR: EXIT_BAD_INPUT,
    FailureClass.PREEMPTED: EXIT_PREEMPTED,
}


def end(path: str | None, word: LastWord) -> int:
    """Write the last word, if there is a file for it, and return the exit code that agrees."""
    if path is not None:
        write_last_word(Path(path), word)
    return _EXIT_CODES.get(word.failure, EXIT_WORK_FAILED)


def read_task(kind: type[T], arguments: Sequence[str], *, refuses: bool = True) -> T:
    """The task of a process: in the file that its arguments name, or in MODELCHAIN_TASK.

    Raises ValidationError if it is not of this version's form. Then the last word says so, if
    `refuses` is set and the task names a file for it.
    """
    text = Path(arguments[0]).read_text() if arguments else os.environ["MODELCHAIN_TASK"]
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        if refuses:
            _refuse(text, error)
        raise


def _refuse(text: str, error: ValidationError) -> None:
    """Write the last word on a task that is not of this version's form: its operator is of another
    version than this image. The task's file for the last word can be read nevertheless.
    """
    message = (
        "spec.runner.image and the operator are of different versions: the task is not read:"
        f" {error}"
    )
    word = LastWord(result="Failed", failure=FailureClass.USER_ERROR, message=message)
    end(json.loads(text).get("lastWord"), word)


def _unknown(word: bytes) -> bool:
    """Whether this is the last word of a failure of class Unknown."""
    try:
        return LastWord.model_validate_json(word).failure is FailureClass.UNKNOWN
    except ValidationError:
        return False


def node() -> str:
    """The name of this machine; in a pod, the name of its node."""
    return os.environ.get("MODELCHAIN_NODE") or platform.node()


def blame(error: Exception, failure: str) -> dict[str, str]:
    """The fields of a last word for a failed device; none for another failure.

    They name the fault and this node. After a failed collective the node is left out, since the
    device of another node may be at fault.
    """
    if failure != FailureClass.HARDWARE:
        return {}
    fault = getattr(error, "fault", "") or fault_of(str(error))
    return {"fault": fault} | ({"node": node()} if fault != COLLECTIVE else {})


def success(artifact: Path, manifest: Manifest, results: Results, **spent: Any) -> LastWord:
    """The last word of a finished artifact; `spent` holds macs, seconds and gpu_seconds."""
    return LastWord(
        result="Succeeded", step=results.steps, steps=results.steps, metrics=results.final.metrics,
        evaluations={name: key[:KEY_DIGITS] for name, key in results.evaluations.items()},
        pictures=results.pictures,
        manifest_digest=sha256_of(artifact / MANIFEST), artifact_digest=manifest.artifact_digest,
        trainer_math=manifest.trainer_math, **spent,
    )  # fmt: skip


def verify_artifact(task: Task) -> LastWord:
    """The last word for an attempt that left none, made from its artifact.

    It is success, with the figures of `results.json`, or the failure NoArtifact or CorruptArtifact.

    Raises:
        OSError: the volume cannot be read, so nothing is known.
    """
    path = Path(task.root)
    for name in (task.input_digest, "artifact", MANIFEST):
        # The directory is listed, since NFS may answer the lookup of one name from an old cache.
        if path / name not in path.iterdir():
            return LastWord(
                result="Failed", failure=FailureClass.NO_ARTIFACT, message=f"{path} holds no {name}"
            )
        path /= name
    try:
        manifest, results = read_artifact(path.parent)
    except (WorkError, ValidationError) as error:
        message = " ".join(str(error).split())
        return LastWord(result="Failed", failure=FailureClass.CORRUPT_ARTIFACT, message=message)
    return success(path.parent, manifest, results, macs=results.macs, seconds=results.seconds)
