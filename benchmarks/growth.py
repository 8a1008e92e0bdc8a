"""`python benchmarks/growth.py`: what growth gains before and soon after the first step, on real
data.

It takes both families of Table G, an eighth as wide (with text towers of three layers and pictures
of 32 pixels), on Fashion-MNIST. The trainer trains every predecessor. On every edge the grown
student is compared with the same student at random. Results are added to the results file edge by
edge, and an edge that it has is not run again. `--write` puts the tables into docs/growth.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from copy import deepcopy
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from markers import between
from modelchain.api.contracts import (
    WEIGHTS,
    DataRequest,
    Predecessor,
    Task,
    TaskEvaluation,
    TrainFiles,
)
from modelchain.api.zoo import MODELS
from modelchain.families import swin
from modelchain.identity.digest import VERSION, digest_of
from modelchain.io.files import sha256_of
from modelchain.io.stop import Preempted, StopRequest
from modelchain_data.batches import Batch, Batches
from modelchain_data.index import open_set
from modelchain_trainer import artifact, growth, models
from modelchain_trainer.evaluate import Evaluator
from modelchain_trainer.loss import contrastive
from modelchain_trainer.train import Trainer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "growth.md"
DATA = ROOT.parent / "shared" / "data" / "fashion-mnist"
FAMILIES = {
    "ViT": ["ViT-T-16", "ViT-C-16", "ViT-S-16", "ViT-M-16", "ViT-B-16", "ViT-XB-16", "ViT-L-16"],
    "Swin": ["Swin-T", "Swin-S", "Swin-B", "Swin-L"],
}
SMALLER = 8
IMAGE = 32
HEAD = 8
CONTEXT = 32
TEXT_LAYERS = 3
CHAIN = ("ViT-T-16", "ViT-S-16", "ViT-B-16", "ViT-L-16")  # the paper's, beside neighbours
BATCH = 32
CAPTIONS = 1
SHARDS = 2
EPOCHS = 2
HELD_OUT = 8  # batches of the validation set
METHODS = ("Insert", "Released", "FPI", "LEMON")
Json = dict[str, Any]


def small(name: str) -> Json:
    """The open_clip config of a model of Table G, an eighth as wide."""
    config = deepcopy(MODELS[name].config.resolved())
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] //= SMALLER
    text |= {"width": text["width"] // SMALLER, "context_length": CONTEXT, "layers": TEXT_LAYERS}
    vision["image_size"] = IMAGE
    if MODELS[name].config.vision_cfg.family is swin:
        vision["timm_model_name"] = _trunk(name)
    else:
        vision |= {"width": vision["width"] // SMALLER, "head_width": HEAD}
    return config


def _trunk(name: str) -> str:
    """A Swin trunk that timm has no name for, registered with timm."""
    vision = MODELS[name].config.vision_cfg
    width, depths = vision.shape.width // SMALLER, vision.shape.depths
    known = name.lower().replace("-", "_") + "_eighth"

    def make(**_: Any) -> nn.Module:
        heads = tuple(width * 2**stage // (HEAD // 2) for stage in range(len(depths)))
        trunk = SwinTransformer(
            img_size=IMAGE,
            patch_size=4,
            window_size=2,
            embed_dim=width,
            depths=depths,
            num_heads=heads,
        )
        trunk.default_cfg = {}
        return trunk

    make.__name__, make.__module__ = known, __name__
    if not timm.is_model(known):
        timm.models.register_model(make)
    return known


class Lab:
    """One data set, and the models trained on it."""

    def __init__(self, data: Path, root: Path):
        self.root = root
        shards = [str(data / "train" / f"train-{i:06d}.tar") for i in range(SHARDS)]
        self.samples = sum(
            json.loads((data / "sizes.json").read_text())[f"train/{Path(s).name}"] for s in shards
        )
        self.steps = self.samples // BATCH  # an epoch's
        train = TrainFiles(
            files=shards, samples=self.samples, captions_per_sample=CAPTIONS, fingerprint=None
        )
        self.request = DataRequest(
            index=str(root / "index"), file="growth.py", train=train, evaluation=[]
        )
        held_out = open_set([data / "val" / "val-000000.tar"], root / "index")
        batches = Batches(
            data=held_out,
            image_size=IMAGE,
            context_length=CONTEXT,
            global_batch_size=BATCH,
            captions_per_sample=1,
            seed=1,
            threads=1,
        )
        self.held_out = list(itertools.islice(batches.from_step(0), HELD_OUT))
        metric = TaskEvaluation(
            name="top1",
            kind="ZeroShot",
            shards="/data/val.tar",
            files=[],
            class_names=str(data / "classnames.json"),
            templates=str(data / "templates.json"),
        )
        self.evaluate = Evaluator(
            [(metric, held_out)], CONTEXT, torch.device("cpu"), 1, nullcontext
        )

    def train(
        self,
        name: str,
        before: Task | None = None,
        width: str = "Insert",
        alpha: str = "500",
        stop: int | None = None,
    ) -> tuple[Task, models.Student | None]:
        """Train to the end, or for `stop` steps. Returns the task, and the student unless it was
        trained before.
        """
        task = self._task(name, before, width, alpha)
        trainer = Trainer(task, StopRequest(), {}, lambda _: None)
        waiting = trainer.meter.waiting

        def counted(batches: Iterator[Batch]) -> Iterator[Batch]:
            for batch in waiting(batches):
                # The loop obeys at the end of this step.
                trainer.stop.asked = stop is not None and batch.step + 1 >= stop
                yield batch

        trainer.meter.waiting = counted  # type: ignore[method-assign]
        with suppress(Preempted):
            trainer.train()
        stage = getattr(trainer, "stage", None)  # not built if the artifact was there
        return task, stage and stage.student

    def _task(self, name: str, before: Task | None, width: str, alpha: str) -> Task:
        predecessor = None if before is None else _predecessor(before)
        inputs = self._inputs(name, predecessor, width, alpha)
        return Task(
            chain="growth",
            stage=name,
            model=name,
            attempt=name,
            input_digest=digest_of(inputs),
            inputs=inputs,
            root=str(self.root),
            owner="growth",
            predecessor=predecessor,
            data=self.request,
            micro_batch_size=None,
            checkpoint_seconds=3600,
            macs_per_step=1,
            threads=1,
            last_word="",
            device="cpu",
            start_seconds=604_800,
            stall_seconds=604_800,
        )

    def _inputs(self, name: str, predecessor: Predecessor | None, width: str, alpha: str) -> Json:
        inputs: Json = {
            "v": VERSION,
            "modelConfig": small(name),
            "epochs": EPOCHS,
            "globalBatchSize": BATCH,
            "learningRate": "1e-3",
            "weightDecay": "0.1",
            "warmupSteps": 25,
            "precision": "fp32",
            "seed": 0,
            "captionsPerSample": CAPTIONS,
            "data": {"samples": self.samples},
            "rerun": None,
        }
        if predecessor is not None:
            inputs["transfer"] = {
                "width": width,
                "depth": "Duplicate",
                "distillation": {"alpha": alpha},
            }
            inputs["predecessor"] = predecessor.artifact_digest
        return inputs

    @torch.no_grad()
    def loss(self, clip: nn.Module) -> float:
        """The task loss of held-out batches, as in training but without stochastic depth."""
        clip.eval()
        losses = []
        for batch in self.held_out:
            image = models.encode_image(clip, models.normalise(batch.images))
            text = models.encode_text_chunks(clip, batch.chunks)
            losses.append(float(contrastive(image, text[:, None], clip.logit_scale.exp())))
        clip.train()
        return sum(losses) / len(losses)


def _predecessor(task: Task) -> Predecessor:
    """What `task` has trained, for a successor."""
    place = Path(task.root) / task.input_digest / "artifact"
    return Predecessor(
        stage=task.stage,
        input_digest=task.input_digest,
        artifact_digest=sha256_of(place / WEIGHTS),
        path=str(place),
    )


def of_edge(lab: Lab, before: Task, name: str, trained: bool) -> Json:
    """Losses on held-out pictures: at random, after growth, and if `trained` after an epoch."""
    config, weights = artifact.load_artifact(Path(before.root) / before.input_digest / "artifact")
    student = small(name)
    found: Json = {
        "random": lab.loss(models.build(student, 0)),
        "start": {},
        "epoch": {},
        "top1": {},
    }
    for method in METHODS:
        clip = models.build(student, 0)
        growth.grow(clip, weights, method)
        found["start"][method] = lab.loss(clip)
        if method == "Insert":
            found["top1"]["start"] = lab.evaluate(clip)["top1"]
    if not trained:
        return found
    runs = [("Insert", "500"), ("Released", "500")]
    if config["embed_dim"] != student["embed_dim"]:
        runs.append(("Insert", "0"))
    for method, alpha in runs:
        _, after = lab.train(name, before, method, alpha, stop=lab.steps)
        assert after is not None
        key = method if alpha != "0" else f"{method} alone"
        found["epoch"][key], found["top1"][key] = (
            lab.loss(after.clip),
            lab.evaluate(after.clip)["top1"],
        )
    return found


def tables(found: dict[str, Json]) -> str:
    """Means over all edges, and over those whose embedding changes its size."""
    first = (
        "| edge | at random | " + " | ".join(METHODS) + " | `Insert`, an epoch later | `Released` |"
    )
    lines = [first, "|---" * (len(METHODS) + 4) + "|"]
    for edge, row in found.items():
        losses = [row["random"], *(row["start"][method] for method in METHODS)]
        losses += [row["epoch"].get("Insert"), row["epoch"].get("Released")]
        cells = ["" if loss is None else f"{loss:.3f}" for loss in losses]
        lines.append(f"| {edge} | {' | '.join(cells)} |")
    lines += [
        "",
        "| edge, `Insert` | before its first step | after its first epoch | the same, α = 0 |",
        "|---" * 4 + "|",
    ]
    for edge, row in found.items():
        if "Insert alone" in row["epoch"]:
            pairs = [(row["start"]["Insert"], row["top1"]["start"])]
            pairs += [(row["epoch"][key], row["top1"][key]) for key in ("Insert", "Insert alone")]
            lines.append(
                f"| {edge} | "
                + " | ".join(f"{loss:.3f}, {top1:.1f} %" for loss, top1 in pairs)
                + " |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="fashion-mnist's shards")
    parser.add_argument(
        "--root", type=Path, default=ROOT / "runs" / "growth", help="for models and results.json"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="train on every edge, not on neighbours and T-S-B-L alone",
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    arguments = parser.parse_args()
    arguments.root.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    results = arguments.root / "results.json"
    found: dict[str, Json] = json.loads(results.read_text()) if results.exists() else {}
    lab = Lab(arguments.data, arguments.root)
    for family, names in FAMILIES.items():
        chain = [*pairwise(names), *pairwise(name for name in names if name in CHAIN)]
        for a, b in combinations(names, 2):
            edge, trained = f"{a} -> {b}", arguments.all or (a, b) in chain
            if edge in found and (found[edge]["epoch"] or not trained):
                continue
            found[edge] = {"family": family, **of_edge(lab, lab.train(a)[0], b, trained)}
            results.write_text(json.dumps(found, indent=1))
            print(edge, json.dumps(found[edge]), flush=True)
    if arguments.write:
        PAGE.write_text(between(PAGE.read_text(), "growth.py", tables(found)))
    else:
        print(tables(found))


if __name__ == "__main__":
    main()
