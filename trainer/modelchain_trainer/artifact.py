"""Artifacts: what a finished stage leaves, an open_clip directory with a manifest. A predecessor's
is hashed again before it is used.
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
    FileEntry,
    Findings,
    Growth,
    Manifest,
    Measured,
    Predecessor,
    Results,
    Task,
)
from modelchain.errors import InputError, WorkError
from modelchain.identity.digest import evaluation_key
from modelchain.io.files import entry_of, read_artifact, seal, sha256_of, verify
from modelchain_trainer.checkpoint import as_work_error, check_finite
from modelchain_trainer.growth import GrowthReport
from modelchain_trainer.hyperparameters import Hyperparameters
from modelchain_trainer.state import TrainState


def find(directory: Path) -> tuple[Manifest, Results] | None:
    """The complete artifact of an input digest's directory, hashed again; None if there is none.

    Raises:
        WorkError: there is one, but it does not match its manifest or belongs elsewhere. It is
            never overwritten.
    """
    artifact = directory / "artifact"
    return read_artifact(artifact) if (artifact / MANIFEST).is_file() else None


def results_of(
    task: Task,
    hyper: Hyperparameters,
    state: TrainState,
    grown: GrowthReport | None,
    found: Findings,
    seconds: float,
) -> Results:
    """`results.json` of a stage that ended in `state`, in which its evaluations found this."""
    # A stage whose batches were all skipped has gone back or failed before.
    assert state.initial_loss is not None and state.final_loss is not None
    return Results(
        stage=task.stage,
        model=task.model,
        predecessor=task.predecessor.stage if task.predecessor else None,
        steps=hyper.steps,
        samples_seen=hyper.steps * hyper.global_batch_size,
        macs=hyper.steps * task.macs_per_step,
        seconds=seconds,
        growth=Growth.model_validate(grown.to_dict()) if grown else None,
        initial=Measured(loss=state.initial_loss, metrics=state.initial_metrics or {}),
        final=Measured(loss=state.final_loss, metrics=found.metrics),
        evaluations={e.name: evaluation_key(e) for e in task.data.evaluation},
        pictures=found.pictures,
        counters=state.counters.to_json(),
    )


def export(
    clip: CLIP,
    config: Mapping[str, Any],
    results: Results,
    manifest: Manifest,
    directory: Path,
    attempt: str,
) -> tuple[Manifest, Results]:
    """Write `<directory>/artifact/`, which `open_clip.create_model('local-dir:...')` opens; returns
    it as read again.

    A complete artifact that is there already stays, and ours is dropped. One without a manifest is
    put aside.
    """
    weights = {name: t.detach().float().cpu().contiguous() for name, t in clip.state_dict().items()}
    work = directory / f".artifact-{attempt}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        check_finite(weights)
        work.mkdir(parents=True)
        files = _write_files(work, weights, config, clip.visual.image_size, results)
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


def _write_files(
    work: Path,
    weights: dict[str, Tensor],
    config: Mapping[str, Any],
    image_size: tuple[int, int],
    results: Results,
) -> dict[str, FileEntry]:
    """Write all but the manifest into `work`; returns the manifest's entries."""
    save_file(weights, work / WEIGHTS)
    # How open_clip preprocesses a picture; our own evaluation does the same.
    preprocess = {
        "size": list(image_size),
        "mode": "RGB",
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "mean": list(OPENAI_DATASET_MEAN),
        "std": list(OPENAI_DATASET_STD),
    }
    model = {"model_cfg": dict(config), "preprocess_cfg": preprocess}
    (work / CONFIG).write_text(json.dumps(model, indent=1))
    (work / RESULTS).write_text(results.model_dump_json(by_alias=True, indent=1))
    return {name: entry_of(work / name) for name in (WEIGHTS, CONFIG, RESULTS)}


def load_artifact(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of an artifact, after every byte is hashed again.

    Raises:
        InputError: there is no artifact.
        WorkError: it is damaged.
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
    """Config and weights of the predecessor, if they are the bytes that this stage's inputs name.

    Raises:
        WorkError: it is missing, damaged, or another artifact; names the file and both digests.
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
