"""Zero-shot classification and retrieval, sharded over ranks; percentages, 0 to 100."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from open_clip import SimpleTokenizer
from torch import Tensor
from torch.nn import functional as F

from modelchain.api.contracts import MANIFEST, EvaluationTask, Findings, Manifest, TaskEvaluation
from modelchain.errors import WorkError
from modelchain.io import watchdog
from modelchain_data.batches import CHUNKS, cut_chunks, evaluation_image
from modelchain_data.build import cores
from modelchain_data.index import ShardSet
from modelchain_data.prompts import class_names, prompt_templates
from modelchain_data.request import open_evaluations
from modelchain_trainer.artifact import load_artifact
from modelchain_trainer.devices import this_device
from modelchain_trainer.models import encode_image, encode_text_chunks, frozen, normalise
from modelchain_trainer.runtime import autocast, ranks

RECALLS = (1, 5, 10)


@dataclass
class Evaluator:
    """All evaluations of a chain on one model. Rank r takes the samples r, r + world size ..., and
    all ranks get the metrics.
    """

    evaluations: Sequence[tuple[TaskEvaluation, ShardSet]]
    context_length: int
    device: torch.device
    threads: int
    precision: Callable[[], AbstractContextManager[object]]  # the context of a forward pass
    batch: int = 128  # pictures of this rank at a time

    def __post_init__(self) -> None:
        self.rank, self.world = ranks()

    def due(self, epoch: int | None) -> list[tuple[TaskEvaluation, ShardSet]]:
        """The evaluations due after that many epochs (`everyEpochs`); all of them for None."""
        return [
            (evaluation, samples)
            for evaluation, samples in self.evaluations
            if epoch is None or (evaluation.every_epochs and epoch % evaluation.every_epochs == 0)
        ]

    @property
    def pictures(self) -> dict[str, int]:
        """By an evaluation's name, on how many pictures it is measured."""
        return {evaluation.name: len(samples) for evaluation, samples in self.evaluations}

    @torch.no_grad()
    def __call__(self, clip: torch.nn.Module, epoch: int | None = None) -> dict[str, float]:
        """Metrics by name, in percent; with `epoch`, only of the evaluations due."""
        training = clip.training
        clip.eval()
        metrics: dict[str, float] = {}
        # No training step has these shapes: to compile for them takes longer than to run them.
        with torch.compiler.set_stance("force_eager"):
            for evaluation, samples in self.due(epoch):
                measure = self._zero_shot if evaluation.kind == "ZeroShot" else self._retrieval
                metrics |= measure(clip, evaluation, samples)
        clip.train(training)
        return metrics

    def _zero_shot(
        self, clip: torch.nn.Module, evaluation: TaskEvaluation, samples: ShardSet
    ) -> dict[str, float]:
        names = class_names(evaluation)
        classifier_CD = self.class_vectors(clip, names, prompt_templates(evaluation))
        top = [1] + ([5] if len(names) > 5 else [])
        correct = torch.zeros(len(top), dtype=torch.float64, device=self.device)
        for ids, images in self._pictures(clip, samples):
            labels = torch.as_tensor(samples.labels[ids], device=self.device).long()
            best = (images @ classifier_CD.T).topk(top[-1], dim=-1).indices
            hits = best == labels[:, None]
            correct += torch.stack([hits[:, :k].any(dim=-1).sum() for k in top])
        percent = 100 * self._sum(correct) / len(samples)
        extra = {f"{evaluation.name}/top-5": float(percent[1])} if len(top) > 1 else {}
        return {evaluation.name: float(percent[0]), **extra}

    def class_vectors(
        self, clip: torch.nn.Module, names: Sequence[str], templates: Sequence[Callable[[str], str]]
    ) -> Tensor:
        """Unit vectors [C, D], one for each of C classes: the mean over templates of unit features,
        as in open_clip's zero-shot classifier.
        """
        tokenizer = SimpleTokenizer(context_length=self.context_length)
        tokens = tokenizer([template(name) for name in names for template in templates]).numpy()
        ends = tokens.argmax(axis=-1) + 1  # the end-of-text token has the highest id
        text_KD = self._texts(clip, [row[:end] for row, end in zip(tokens, ends, strict=True)])
        return F.normalize(text_KD.view(len(names), len(templates), -1).mean(dim=1), dim=-1)

    def _retrieval(
        self, clip: Any, evaluation: TaskEvaluation, samples: ShardSet
    ) -> dict[str, float]:
        """R@k in both directions; the mean of their R@1 is the metric itself.

        Only features of this rank's samples are computed. The rows of the others stay zero until
        the sum over ranks fills them in.
        """
        captions = [(i, j) for i in range(len(samples)) for j in range(samples.caption_count(i))]
        owner = torch.as_tensor([i for i, _ in captions], device=self.device)
        image_ND = torch.zeros(len(samples), clip.text_projection.shape[1], device=self.device)
        for ids, features in self._pictures(clip, samples):
            image_ND[ids] = features
        image_ND = self._sum(image_ND)
        text_KD = self._texts(
            clip, [samples.tokens(i, j, self.context_length) for i, j in captions]
        )
        ks = [k for k in RECALLS if k <= len(samples)]  # of fewer pictures any k would be found
        to_text = _recalls(image_ND, text_KD, lambda best, rows: owner[best] == rows[:, None], ks)
        to_image = _recalls(text_KD, image_ND, lambda best, rows: best == owner[rows, None], ks)
        metrics = {evaluation.name: (to_text[0] + to_image[0]) / 2}
        for k, recall_of_text, recall_of_image in zip(ks, to_text, to_image, strict=True):
            metrics[f"{evaluation.name}/image-to-text-r{k}"] = recall_of_text
            metrics[f"{evaluation.name}/text-to-image-r{k}"] = recall_of_image
        return metrics

    def _pictures(self, clip: Any, samples: ShardSet) -> Iterator[tuple[list[int], Tensor]]:
        """This rank's (ids, unit features [n, D]) in batches, decoded by threads."""
        side = clip.visual.image_size[0]
        mine = range(self.rank, len(samples), self.world)
        with ThreadPoolExecutor(self.threads) as pool:
            for start in range(0, len(mine), self.batch):
                ids = list(mine[start : start + self.batch])
                pictures = list(pool.map(lambda i: _picture(samples, i, side), ids))
                images = normalise(torch.stack(pictures).to(self.device))
                yield ids, self._unit(encode_image, clip, images)

    def _texts(self, clip: Any, captions: list[np.ndarray]) -> Tensor:
        """Unit features [K, D] of K tokenised captions, on every rank. They are encoded in chunks
        of similar length, as in training.
        """
        features_KD = torch.zeros(len(captions), clip.text_projection.shape[1], device=self.device)
        mine = range(self.rank, len(captions), self.world)
        size = CHUNKS * self.batch
        for start in range(0, len(mine), size):
            rows = mine[start : start + size]
            chunks = cut_chunks([captions[k] for k in rows], self.context_length)
            moved = [(tokens.to(self.device), at.to(self.device)) for tokens, at in chunks]
            features_KD[list(rows)] = self._unit(encode_text_chunks, clip, moved)
        return self._sum(features_KD)

    def _unit(self, encode: Callable[..., Tensor], clip: torch.nn.Module, batch: Any) -> Tensor:
        watchdog.beat()  # a batch of an evaluation is progress
        with self.precision():
            features = encode(clip, batch)
        # Similarities are computed in fp32: in bf16 near neighbours would tie.
        return F.normalize(features.float(), dim=-1)

    def _sum(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor


def _picture(samples: ShardSet, i: int, side: int) -> Tensor:
    try:
        return evaluation_image(samples.picture(i), side)
    except ValueError as error:  # to leave the picture out would change what the metric means
        raise WorkError(
            f"evaluation picture {samples.key(i)!r} cannot be decoded: {error}", "Data"
        ) from error


def measure(task: EvaluationTask) -> Findings:
    """What a task asks for, in the precision that the artifact was trained in. Every
    byte of the artifact is hashed again first.

    Raises InputError or WorkError.
    """
    directory = Path(task.artifact)
    config, weights = load_artifact(directory)
    manifest = Manifest.model_validate_json((directory / MANIFEST).read_bytes())
    if task.artifact_digest not in (None, manifest.artifact_digest):
        raise WorkError(
            f"{directory}: its weights have sha256 {manifest.artifact_digest}, not"
            f" {task.artifact_digest}",
            "CorruptArtifact",
        )
    device = this_device(task.device)
    # torch counts the cores of its node, also where a container may use fewer.
    torch.set_num_threads(min(torch.get_num_threads(), cores()))
    clip = frozen(config, weights, device)
    evaluator = Evaluator(
        open_evaluations(task.data, only=task.names),
        context_length=config["text_cfg"]["context_length"],
        device=device,
        threads=torch.get_num_threads(),
        precision=autocast(device, manifest.inputs["precision"]),
    )
    return Findings(metrics=evaluator(clip), pictures=evaluator.pictures)


def _recalls(
    queries: Tensor,
    keys: Tensor,
    right: Callable[[Tensor, Tensor], Tensor],
    ks: Sequence[int],
    block: int = 1024,
) -> list[float]:
    """Percentage of queries that have a right key among their k nearest, for each k of `ks`.

    `right` takes the keys chosen [n, k] and the queries' rows [n]. Queries are taken in blocks, so
    that no matrix of all similarities is kept.
    """
    hits = torch.zeros(len(ks), dtype=torch.float64, device=queries.device)
    for start in range(0, len(queries), block):
        rows = torch.arange(start, min(start + block, len(queries)), device=queries.device)
        best = (queries[rows] @ keys.T).topk(ks[-1], dim=-1).indices
        found = right(best, rows)
        hits += torch.stack([found[:, :k].any(dim=-1).sum() for k in ks])
    return (100 * hits / len(queries)).tolist()
