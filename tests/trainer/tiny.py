"""A chain of two tiny models on a few real digits, as tasks for a trainer in this process."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image

from modelchain.api.contracts import METRICS, WEIGHTS, LastWord, Manifest, Predecessor, Task
from modelchain.api.spec import ModelChain
from modelchain.identity.digest import digest_of, stage_inputs
from modelchain.io.files import sha256_of
from modelchain.io.paths import DataFolder
from modelchain.io.stop import StopRequest
from modelchain_data import digits
from modelchain_data.batches import Batch
from modelchain_trainer.step import Step
from modelchain_trainer.train import Trainer

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
BATCH, SAMPLES, EPOCHS, STEPS_PER_EPOCH = 16, 70, 3, 4
STEPS = EPOCHS * STEPS_PER_EPOCH
EVALUATION = [
    {
        "name": "top1",
        "kind": "ZeroShot",
        "shards": "/data/val.tar",
        "classNames": "/data/names.json",
        "templates": "/data/templates.json",
    },
    {"name": "r1", "kind": "Retrieval", "shards": "/data/val.tar"},
]


def model(embed: int, width: int, layers: int) -> dict[str, Any]:
    """An inline modelConfig: both towers `width` wide (a multiple of 8) and `layers` deep."""
    return {
        "embed_dim": embed,
        "vision_cfg": {
            "image_size": 16,
            "patch_size": 8,
            "width": width,
            "layers": layers,
            "head_width": 8,
        },
        "text_cfg": {"context_length": 12, "width": width, "heads": width // 8, "layers": layers},
    }


def shard(path: Path, samples: Iterable[tuple[bytes, dict[str, Any]]]) -> None:
    """A tar of PNG bytes and their JSON, with keys 0000, 0001 ..."""
    with tarfile.open(path, "w") as tar:
        for number, (picture, meta) in enumerate(samples):
            for suffix, content in (("png", picture), ("json", json.dumps(meta).encode())):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def digit(index: int, captions: Sequence[str] | None = None) -> tuple[bytes, dict[str, Any]]:
    """One of the digits as a sample: its PNG and its JSON."""
    images, labels = digits.load()
    label = labels[index]
    buffer = io.BytesIO()
    Image.fromarray((images[index] * 15).astype("uint8")).convert("RGB").save(buffer, "PNG")
    given = captions or [
        f"a handwritten {NAMES[label]}.",
        f"the digit {NAMES[label]}",
        f"{NAMES[label]}, of {index}",
    ]
    return buffer.getvalue(), {"captions": list(given), "label": label, "classname": NAMES[label]}


def data(folder: Path) -> Path:
    """Fill `folder` with train.tar (SAMPLES), val.tar (30 samples) and the lists that a zero-shot
    evaluation needs.
    """
    folder.mkdir()
    shard(folder / "train.tar", (digit(i) for i in range(SAMPLES)))
    shard(folder / "val.tar", (digit(i) for i in range(1000, 1030)))
    (folder / "names.json").write_text(json.dumps(NAMES))
    (folder / "templates.json").write_text(json.dumps(["a handwritten {}.", "the digit {}"]))
    return folder


def spec(
    *models: dict[str, Any],
    epochs: int = EPOCHS,
    evaluation: bool = True,
    alpha: str = "500",
    **recipe: Any,
) -> ModelChain:
    """A chain of these models, by default of two tiny ones, on `data`; `recipe` overrides."""
    configs = models or (model(16, 16, 1), model(24, 24, 2))
    train = {"shards": "/data/train.tar", "samples": SAMPLES, "captionsPerSample": 2}
    return ModelChain.model_validate(
        {
            "apiVersion": "modelchain.dev/v1alpha1",
            "kind": "ModelChain",
            "metadata": {"name": "tiny"},
            "spec": {
                "stages": [
                    {"name": f"s{i}", "epochs": epochs, "modelConfig": config}
                    for i, config in enumerate(configs)
                ],
                "data": {"train": train},
                "evaluation": EVALUATION if evaluation else [],
                "transfer": {"distillation": {"alpha": alpha}},
                "recipe": {
                    "baselineEpochs": epochs,
                    "globalBatchSize": BATCH,
                    "learningRate": "1e-3",
                    "warmupSteps": {"first": 3, "successors": 2},
                    "precision": "fp32",
                    **recipe,
                },
            },
        }
    )


def task(
    chain: ModelChain,
    folder: Path,
    root: Path,
    index: int = 0,
    attempt: int = 1,
    before: Task | None = None,
) -> Task:
    """The task that the local runner would write for attempt `attempt` of stage `index`; `before`
    is the predecessor's.
    """
    predecessor = _predecessor(before) if before else None
    epochs = chain.spec.stages[index].epochs
    assert epochs is not None
    digest = predecessor.artifact_digest if predecessor else None
    inputs = stage_inputs(chain.spec, index, epochs=epochs, fingerprint=None, predecessor=digest)
    directory = root / digest_of(inputs) / f"local-a{attempt}"
    directory.mkdir(parents=True, exist_ok=True)
    return Task(
        chain="tiny",
        stage=chain.spec.stages[index].name,
        model="inline",
        attempt=f"tiny-s{index}-a{attempt}",
        input_digest=digest_of(inputs),
        inputs=inputs,
        root=str(root),
        owner=f"local-a{attempt}",
        predecessor=predecessor,
        data=DataFolder(chain, folder, Path("chain.yaml")).request(root / "index"),
        micro_batch_size=chain.spec.recipe.micro_batch_size,
        checkpoint_seconds=3600,
        macs_per_step=1000,
        threads=1,
        device="cpu",
        start_seconds=1800,
        stall_seconds=1800,
        last_word=str(directory / "termination.json"),
    )


def _predecessor(before: Task) -> Predecessor:
    return Predecessor(
        stage=before.stage,
        input_digest=before.input_digest,
        artifact_digest=sha256_of(artifact(before) / WEIGHTS),
        path=str(artifact(before)),
    )


def evaluated_every(task: Task, epochs: int) -> Task:
    """The same task with `everyEpochs` in all its evaluations."""
    often = [e.model_copy(update={"every_epochs": epochs}) for e in task.data.evaluation]
    return task.model_copy(update={"data": task.data.model_copy(update={"evaluation": often})})


def train(
    task: Task,
    after_step: Callable[[Trainer, int], None] = lambda *_: None,
    stop: StopRequest | None = None,
) -> tuple[LastWord, list[str]]:
    """Train in this process; `after_step(trainer, k)` is called when k steps are done. Returns the
    last word and the lines that were printed.
    """
    said: list[str] = []
    trainer = Trainer(task, stop or StopRequest(), {}, said.append)
    call = Step.__call__

    def counted(step: Step, batch: Batch) -> torch.Tensor:
        losses = call(step, batch)
        after_step(trainer, batch.step + 1)
        return losses

    with patch.object(Step, "__call__", counted):
        return trainer.train(), said


def stop_after(steps: int) -> Callable[[Trainer, int], None]:
    """An `after_step` that asks to stop in step `steps`, as SIGTERM does."""

    def after(trainer: Trainer, done: int) -> None:
        if done == steps:
            trainer.stop.asked = True

    return after


def artifact(task: Task) -> Path:
    return Path(task.root) / task.input_digest / "artifact"


def entries(task: Task, event: str = "step") -> list[dict[str, Any]]:
    """The entries of one kind in an attempt's metrics.jsonl."""
    lines = (Path(task.root) / task.input_digest / task.owner / METRICS).read_text().splitlines()
    return [entry for line in lines if (entry := json.loads(line))["event"] == event]


def manifest(directory: Path) -> Manifest:
    return Manifest.model_validate_json((directory / "manifest.json").read_bytes())
