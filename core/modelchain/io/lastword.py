"""Writes the last word of an attempt, and makes it for a failed device and a finished artifact."""

from __future__ import annotations

import fcntl
import os
import platform
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modelchain.api.contracts import MANIFEST, FailureClass, LastWord, Manifest, Results, Task
from modelchain.api.faults import COLLECTIVE, fault_of
from modelchain.errors import WorkError
from modelchain.io.files import read_artifact, sha256_of

# The most bytes of a last word.
LAST_WORD_BYTES = 2048


def write_last_word(path: Path, word: LastWord) -> None:
    """Write the last word into the pod's file, which all ranks of the pod share.

    Only rank 0 reports success. If several ranks fail, the first failure stays, since it is the
    cause, unless its class is Unknown. From a word of more than LAST_WORD_BYTES, details of metrics
    are left out, which are in `results.json`, and then the end of the message.
    """
    succeeded = word.result == "Succeeded"
    if succeeded and os.environ.get("RANK", "0") != "0":
        return
    while len(text := word.model_dump_json(by_alias=True).encode()) > LAST_WORD_BYTES:
        main = {name: value for name, value in word.metrics.items() if "/" not in name}
        word = word.model_copy(
            update={"metrics": main, "message": word.message[: len(word.message) * 3 // 4]}
        )
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        before = file.read()  # empty, if the kubelet has made the file
        if succeeded or not before or _unknown(before):
            file.truncate(0)
            file.write(text)


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
