"""The input digest: a hash of all that changes one stage's weights, and of nothing else.

It names a stage's directory, so its formula must never change. Tests compare it with stored
digests. A new formula needs a new `v`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from modelchain.api.spec import ChainSpec, Evaluation
from modelchain.identity.shards import base_names

VERSION = 2
# Raise this number whenever the trainer's arithmetic changes. It is recorded in checkpoints and
# artifacts. It is not hashed, since an upgrade must not train all stages again. A trainer does not
# resume a checkpoint that has another number.
TRAINER_MATH = 3


def canonical(value: Any) -> bytes:
    """JSON in which equal values give equal bytes: keys are sorted, no blanks, ASCII only."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def digest_of(inputs: Mapping[str, Any] | Sequence[Any]) -> str:
    """SHA-256 of the canonical JSON, 64 lowercase hex digits."""
    return hashlib.sha256(canonical(inputs)).hexdigest()


def number(decimal: str | Decimal) -> str:
    """A decimal in one spelling for equal values: "1e-3", "0.001" and ".0010" give "0.001"."""
    value = Decimal(decimal).normalize()
    return format(abs(value) if value == 0 else value, "f")


def stage_inputs(
    spec: ChainSpec, index: int, *, epochs: int, fingerprint: str | None, predecessor: str | None
) -> dict[str, Any]:
    """The resolved inputs of stage `index`, as plain JSON.

    Args:
        spec: the checked spec.
        index: the stage's place in the chain, from 0.
        epochs: the stage's epochs: as the spec gives, as allocated, or as launched before.
        fingerprint: of the training data; None if it is not known. If the spec gives one, the two
            were compared.
        predecessor: the predecessor's artifact digest; None for the first stage and for a model
            that is trained alone.
    """
    stage, recipe = spec.stages[index], spec.recipe
    train = spec.data.train
    warmup = recipe.warmup_steps.first if predecessor is None else recipe.warmup_steps.successors
    inputs: dict[str, Any] = {
        "v": VERSION,
        "modelConfig": stage.config.resolved(),
        "epochs": epochs,
        "globalBatchSize": recipe.global_batch_size,
        "learningRate": number(recipe.learning_rate),
        "weightDecay": number(recipe.weight_decay),
        "warmupSteps": warmup,
        "precision": recipe.precision,
        "seed": recipe.seed,
        "captionsPerSample": train.captions_per_sample,
        "data": {**_shard_list(train.shards), "samples": train.samples, "fingerprint": fingerprint},
        "rerun": stage.rerun,
    }
    if predecessor is not None:
        transfer, dim = spec.transfer, spec.stages[index - 1].config.embed_dim
        inputs["transfer"] = {
            "width": transfer.width,
            "depth": transfer.depth,
            "distillation": {"alpha": number(transfer.distillation.released_alpha(dim))},
        }
        inputs["predecessor"] = predecessor
    return inputs


@lru_cache(maxsize=1024)  # every pass over a chain asks for every stage
def _shard_list(pattern: str) -> Mapping[str, Any]:
    """One digest of all shard names in order, and their number.

    So the inputs stay small even for 100,000 shards.
    """
    names = base_names(pattern)
    return {"shards": digest_of(names), "count": len(names)}


# The digits of an evaluation's key in last words and records. A last word has 2 KiB for the keys of
# up to 16 evaluations.
KEY_DIGITS = 16


def evaluation_key(evaluation: Evaluation) -> str:
    """A digest of what an evaluation measures. Equal keys need no second measurement.

    The evaluation's name, the folders of its files and its interval are not hashed.
    """
    return _evaluation_key(
        evaluation.kind, evaluation.shards, evaluation.class_names, evaluation.templates
    )


@lru_cache(maxsize=1024)  # every pass over a chain asks for every evaluation
def _evaluation_key(kind: str, shards: str, *lists: str | None) -> str:
    names = [PurePosixPath(path).name if path else None for path in lists]
    return digest_of({"kind": kind, "shards": base_names(shards), "lists": names})


def short_key(evaluation: Evaluation) -> str:
    """The evaluation's key as last words and records have it."""
    return evaluation_key(evaluation)[:KEY_DIGITS]


def differing_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The dotted names of the inputs that differ, in the order of the new inputs.

    They explain a miss.
    """
    out: list[str] = []
    for key in [*new, *(k for k in old if k not in new)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differing_fields(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(prefix + key)
    return out
