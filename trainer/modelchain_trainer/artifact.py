"""Artifacts: what a finished stage leaves, an open_clip directory with a manifest; and its
predecessor's, re-hashed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip import CLIP, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelchain.api.contracts import (
    CONFIG,
    MANIFEST,
    RESULTS,
    WEIGHTS,
    Manifest,
    Predecessor,
    Results,
)
from modelchain.errors import InputError, WorkError
from modelchain.io.files import entry_of, read_artifact, seal, sha256_of, verify
from modelchain_trainer.checkpoint import as_work_error, check_finite


def find(directory: Path) -> tuple[Manifest, Results] | None:
    """A complete artifact of an input digest's directory, re-hashed; None if there is none.

    Raises:
        WorkError: there is one and it does not match its manifest, or belongs elsewhere. It is
            never overwritten.
    """
    artifact = directory / "artifact"
    return read_artifact(artifact) if (artifact / MANIFEST).is_file() else None


def export(
    clip: CLIP,
    config: Mapping[str, Any],
    results: Results,
    manifest: Manifest,
    directory: Path,
    attempt: str,
) -> tuple[Manifest, Results]:
    """Write `<directory>/artifact/`, loadable by `open_clip.create_model('local-dir:...')`; returns
    it as read again.

    If a whole one is there already, that one stays and ours is dropped; a torso without a manifest
    is put aside.
    """
    weights = {name: t.detach().float().cpu().contiguous() for name, t in clip.state_dict().items()}
    work = directory / f".artifact-{attempt}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        check_finite(weights)
        work.mkdir(parents=True)
        save_file(weights, work / WEIGHTS)
        preprocess = {
            "size": list(clip.visual.image_size),
            "mode": "RGB",
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "mean": list(OPENAI_DATASET_MEAN),
            "std": list(OPENAI_DATASET_STD),
        }
        (work / CONFIG).write_text(
            json.dumps({"model_cfg": dict(config), "preprocess_cfg": preprocess}, indent=1)
        )
        (work / RESULTS).write_text(results.model_dump_json(by_alias=True, indent=1))
        files = {name: entry_of(work / name) for name in (WEIGHTS, CONFIG, RESULTS)}
        sealed = manifest.model_copy(
            update={"files": files, "artifact_digest": files[WEIGHTS].sha256}
        )
        target = directory / "artifact"
        if target.exists() and find(directory) is None:
            target.rename(directory / f"artifact-without-manifest-{attempt}")
        if not target.exists():
            seal(work, sealed, target)
        return read_artifact(target)
    except Exception as error:
        raise as_work_error(error, "writing the artifact") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def load_artifact(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of an artifact, every byte re-hashed first. Raises InputError or
    WorkError.
    """
    try:
        manifest = verify(directory)
    except FileNotFoundError as error:
        raise InputError(f"holds no artifact (no {MANIFEST})", file=directory) from error
    if manifest.kind != "artifact":
        raise InputError("holds a checkpoint, not an artifact", file=directory)
    config = json.loads((directory / CONFIG).read_text())["model_cfg"]
    return config, load_file(directory / WEIGHTS)


def load_predecessor(predecessor: Predecessor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of the predecessor, if they are the very bytes this stage's inputs name.

    Raises:
        WorkError: missing, damaged or other bytes; names the file and both digests.
    """
    directory = Path(predecessor.path)
    try:
        loaded = load_artifact(directory)
    except (InputError, WorkError) as error:
        raise WorkError(str(error), "CorruptPredecessor") from error
    found = sha256_of(directory / WEIGHTS)
    if found != predecessor.artifact_digest:
        left = f"stage {predecessor.stage} left {predecessor.artifact_digest}"
        raise WorkError(
            f"{directory / WEIGHTS}: its sha256 is {found}, {left}", "CorruptPredecessor"
        )
    return loaded
