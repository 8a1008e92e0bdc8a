"""What lies where a stage's artifact belongs, re-hashed, and said as a last word. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modelchain.cli.files import read_artifact, sha256_of
from modelchain.contracts import MANIFEST, FailureClass, LastWord, Manifest, Results, Task
from modelchain.errors import WorkError


def success(artifact: Path, manifest: Manifest, results: Results, **spent: Any) -> LastWord:
    """The word on a whole artifact; `spent` holds macs, seconds and gpu_seconds."""
    math = manifest.environment.get("trainerMath")
    return LastWord(
        result="Succeeded", step=results.steps, steps=results.steps, metrics=results.final.metrics,
        manifest_digest=sha256_of(artifact / MANIFEST), artifact_digest=manifest.artifact_digest,
        trainer_math=math if isinstance(math, int) else None, **spent,
    )  # fmt: skip


def verify_artifact(task: Task) -> LastWord:
    """In place of a lost last word, what `results.json` says of all the training; or NoArtifact, or CorruptArtifact.

    Raises:
        OSError: the volume cannot be read, which answers nothing.
    """
    path = Path(task.root)
    for name in (task.input_digest, "artifact", MANIFEST):
        if path / name not in path.iterdir():  # listed, as NFS may answer a look-up from an old cache
            return LastWord(result="Failed", failure=FailureClass.NO_ARTIFACT, message=f"{path} holds no {name}")
        path /= name
    try:
        manifest, results = read_artifact(path.parent)
    except (WorkError, ValidationError) as error:
        message = " ".join(str(error).split())
        return LastWord(result="Failed", failure=FailureClass.CORRUPT_ARTIFACT, message=message)
    return success(path.parent, manifest, results, macs=results.macs, seconds=results.seconds)
