"""The last word of an attempt: writing it, and its fields for a failing device and for a finished
artifact.
"""

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

LAST_WORD_BYTES = 2048


def write_last_word(path: Path, word: LastWord) -> None:
    """Write the last word, at most 2 KiB of it.

    Only rank 0 reports success. Of several failures in one pod's file the first stays, since it is
    the cause, unless its class is Unknown. A word that is too long loses the details of metrics,
    which `results.json` has, and the end of its message. The kubelet may have made an empty file.
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
        before = file.read()
        if succeeded or not before or b'"class":"Unknown"' in before:
            file.truncate(0)
            file.write(text)


def node() -> str:
    """The machine's name; in a pod, its node's."""
    return os.environ.get("MODELCHAIN_NODE") or platform.node()


def blame(error: Exception, failure: str) -> dict[str, str]:
    """The fields for a failing device: the error, and this node if a node's device failed."""
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
    """The last word for an attempt that left none, from the artifact: success with the figures of
    `results.json`, or the failure NoArtifact or CorruptArtifact.

    Raises:
        OSError: the volume cannot be read, so nothing is known.
    """
    path = Path(task.root)
    for name in (task.input_digest, "artifact", MANIFEST):
        # Listed, since NFS may answer the lookup of one name from an old cache.
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
