"""One table of good and bad specs, as data, for the tests of core and of a real API server.

A spec is `MINIMAL` with changes by path, such as
`{"spec.stages[1].model": "ViT-S-16", "spec.recipe.seed": DELETE}`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

DELETE = object()
Object = dict[str, Any]

MINIMAL: Object = {
    "apiVersion": "modelchain.dev/v1alpha1",
    "kind": "ModelChain",
    "metadata": {"name": "family"},
    "spec": {
        "stages": [
            {"name": "vit-t", "model": "ViT-T-16"},
            {"name": "vit-s", "model": "ViT-S-16", "epochs": 20},
        ],
        "data": {"train": {"shards": "/data/train-{00..07}.tar", "samples": 100_000}},
        "recipe": {
            "baselineEpochs": 32,
            "globalBatchSize": 256,
            "learningRate": "1e-3",
            "warmupSteps": {"first": 500, "successors": 100},
        },
    },
}

_EVALUATION: Object = {
    "name": "digits-top1",
    "kind": "ZeroShot",
    "shards": "/data/val.tar",
    "classNames": "/data/classes.json",
    "templates": "openai",
}
_RETRIEVAL: Object = {"name": "coco-r1", "kind": "Retrieval", "shards": "/data/coco/val.tar"}
_VISION: Object = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
_TEXT: Object = {"context_length": 16, "width": 64, "heads": 2, "layers": 2}


def with_changes(changes: Mapping[str, Any], base: Object = MINIMAL) -> Object:
    """A copy of `base` with these paths set, or removed where the value is DELETE. Missing mappings
    are created.
    """
    out = copy.deepcopy(base)
    for path, value in changes.items():
        keys: list[str | int] = [
            int(k) if k.isdigit() else k for k in re.findall(r"[^.\[\]]+", path)
        ]
        at: Any = out
        for key in keys[:-1]:
            at = at[key] if isinstance(key, int) else at.setdefault(key, {})
        last = keys[-1]
        if value is DELETE:
            del at[last]
        elif isinstance(last, int) and last == len(at):
            at.append(copy.deepcopy(value))
        else:
            at[last] = copy.deepcopy(value)
    return out


def config(*, vision: Object | None = None, text: Object | None = None, **top: Any) -> Object:
    """A tiny inline modelConfig, with 2 heads of 32 in each tower."""
    return {
        "embed_dim": 32,
        "vision_cfg": _VISION | (vision or {}),
        "text_cfg": _TEXT | (text or {}),
        **top,
    }


def inline(*configs: Object, **changes: Any) -> dict[str, Any]:
    """Changes that give the stages these configs, and the names a, b, c and so on."""
    stages = [
        {"name": "abcdefgh"[i], "modelConfig": c, "epochs": 20} for i, c in enumerate(configs)
    ]
    return {"spec.stages": stages, **changes}


_BIGGER: Object = config(vision={"width": 96}, text={"layers": 3})
_SWIN: Object = config()
_SWIN["vision_cfg"] = {"timm_model_name": "swin_tiny_patch4_window7_224"}

_RELAXES: Object = {
    "spec.evaluation": [_RETRIEVAL],
    "spec.stages[1].epochs": DELETE,
    "spec.allocation.targetAcceleration": "1.5",
}

_GOOD_CHANGES: dict[str, dict[str, Any]] = {
    "minimal": {},
    "a chain of one stage": {"spec.stages[1]": DELETE},
    "epochs left to the plan": {
        "spec.stages[1].epochs": DELETE,
        "spec.allocation.targetAcceleration": "2",
        "spec.allocation.endRatio": "0.5",
    },
    "the same model cannot follow itself, but a wider one can": inline(config(), _BIGGER),
    "three inline stages": inline(
        config(), _BIGGER, config(vision={"width": 128, "layers": 4}, text={"layers": 3})
    ),
    "only the text tower grows": inline(config(), config(text={"width": 96, "heads": 3})),
    "the embedding shrinks": inline(
        config(embed_dim=64), config(embed_dim=32, vision={"width": 96})
    ),
    "swin": {"spec.stages[0].model": "Swin-T", "spec.stages[1].model": "Swin-S"},
    "a mlp ratio in whole numbers": inline(config(vision={"mlp_ratio": 2})),
    "every field": {
        "metadata.namespace": "vision",
        "metadata.labels": {"team": "a"},
        "metadata.annotations": {"modelchain.dev/retry": "1"},
        "spec.suspend": False,
        "spec.stages[0].rerun": "again, please",
        "spec.stages[0].epochs": 32,
        "spec.stages[0].resources": {"nodes": 2, "processesPerNode": 4},
        "spec.data.train.captionsPerSample": 4,
        "spec.data.train.fingerprint": "0" * 64,
        "spec.data.volume": {"claimName": "cc3m", "mountPath": "/data"},
        "spec.evaluation": [{**_EVALUATION, "everyEpochs": 1}, _RETRIEVAL],
        "spec.recipe.weightDecay": "0.1",
        "spec.recipe.precision": "fp32",
        "spec.recipe.seed": 7,
        "spec.recipe.microBatchSize": 64,
        "spec.transfer": {
            "width": "Insert",
            "depth": "Duplicate",
            "distillation": {"alpha": "2", "convention": "Equation1"},
        },
        "spec.storage": {
            "claimTemplate": {"storageClassName": "rwx", "size": "500Gi"},
            "retain": True,
        },
        "spec.runner": {
            "kind": "PyTorchJob",
            "nodePool": "a100-80gb",
            "image": "ghcr.io/x@sha256:" + "0" * 64,
            "queueName": "q",
            "priorityClass": "batch",
        },
        "spec.retry": {"maxRetries": 0, "maxDisruptions": 0},
        "spec.deadlines": {"startSeconds": 600, "stallSeconds": 900, "stageSeconds": 86_400},
        "spec.checkpoint": {"everySeconds": 5},
        "spec.gate": {
            "metric": "digits-top1",
            "tolerance": "0.5",
            "baseline": {"vit-s": "30.16"},
            "train": [],
            "onMiss": "Continue",
            "relaxation": {"factor": "1.25", "maxRounds": 3},
        },
        "spec.budget": {"cost": "2500", "gpuHours": "1e3", "onExceed": "Suspend"},
    },
    "a gate that trains a baseline and relaxes": {
        **_RELAXES,
        "spec.gate": {"metric": "coco-r1", "train": ["vit-s"], "onMiss": "Relax"},
    },
    "a gate of 32 stages": {
        "spec.evaluation": [_RETRIEVAL],
        **inline(
            *(config(vision={"layers": 1 + i}) for i in range(8)),
            **{
                f"spec.stages[{i}]": {
                    "name": f"s{i}",
                    "modelConfig": config(vision={"layers": 1 + i}),
                    "epochs": 20,
                }
                for i in range(8, 32)
            },
        ),
        "spec.gate": {
            "metric": "coco-r1",
            "baseline": {f"s{i}": "100" for i in range(8, 32)},
            "train": ["b", "c", "d", "e", "f", "g", "h"],
        },
    },
    "as kubectl gives it back": {
        "metadata.uid": "8f4b1f0e-7a0c-4b86-9a86-0b0ba7a9f0c1",
        "metadata.resourceVersion": "81423",
        "metadata.generation": 3,
        "metadata.creationTimestamp": "2026-01-02T03:04:05Z",
        "metadata.managedFields": [
            {"manager": "kubectl", "operation": "Apply", "fieldsV1": {"f:spec": {}}}
        ],
        "metadata.annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}\n"},
        "status": {
            "observedGeneration": 3,
            "conditions": [],
            "stages": [{"name": "vit-t", "anything": [1.5, None]}],
        },
    },
    "made by a name that a server completes": {
        "metadata.generateName": "sweep-",
        "metadata.name": "sweep-x7k2p",
        "metadata.selfLink": (
            "/apis/modelchain.dev/v1alpha1/namespaces/team/modelchains/sweep-x7k2p"
        ),
        "metadata.deletionGracePeriodSeconds": 0,
        "metadata.ofALaterVersion": {"any": ["thing"]},
    },
    "a name that a server will complete": {"metadata": {"generateName": "sweep-"}},
    "the longest names": {"metadata.name": "a" * 24, "spec.stages[0].name": "b" * 16},
    "decimals in other spellings": {
        "spec.recipe.learningRate": ".5e-3",
        "spec.recipe.weightDecay": "0",
    },
    "many shards in two groups": {
        "spec.data.train.shards": "/data/{a-{000..499},b-{000..499}}.tar"
    },
    "shards in a list": {
        "spec.data.train.shards": "/data/{" + ",".join(f"{i:03}" for i in range(250)) + "}.tar"
    },
    "a range that falls": {"spec.data.train.shards": "/data/{7..0}-{00..03}.tar"},
    "dots in a name": {"spec.data.train.shards": "/data/a..b/{..,x}y.{0..3}.tar"},
    "a mount with a slash at its end": {"spec.data.volume.mountPath": "/data/"},
    "16 evaluations": {
        "spec.evaluation": [
            _RETRIEVAL | {"name": f"e{i}", "shards": "/data/" + "a/" * 500 + "x"} for i in range(16)
        ]
    },
    "32 stages": inline(
        *(config(vision={"layers": 1 + i}) for i in range(8)),
        **{
            f"spec.stages[{i}]": {
                "name": f"s{i}",
                "modelConfig": config(vision={"layers": 1 + i}),
                "epochs": 20,
            }
            for i in range(8, 32)
        },
    ),
    "the shortest schedule that can warm up": {
        "spec.recipe.warmupSteps.successors": 20 * (100_000 // 256) - 1
    },
    "an image of one patch": inline(config(vision={"image_size": 8})),
}
GOOD: dict[str, Object] = {name: with_changes(changes) for name, changes in _GOOD_CHANGES.items()}


class Bad(NamedTuple):
    """A spec that is refused, the field that the message names, and a part of the message."""

    name: str
    spec: Object
    field: str
    message: str


def _bad(name: str, changes: Mapping[str, Any], field: str, message: str) -> Bad:
    return Bad(name, with_changes(changes), field, message)


def _one(name: str, path: str, value: Any, message: str) -> Bad:
    """A spec with one changed path, which the message must name."""
    return _bad(name, {path: value}, path, message)


def _pair(name: str, before: Object, after: Object, message: str) -> Bad:
    """A chain of two stages that cannot be neighbours; the message names the second stage."""
    return _bad(name, inline(before, after), "spec.stages[1]", message)


def _gate(name: str, gate: Mapping[str, Any], field: str, message: str, **changes: Any) -> Bad:
    """A chain with a measured metric and this gate."""
    whole = {"metric": "coco-r1", "baseline": {"vit-s": "30"}, **gate}
    spec = {"spec.evaluation": [_RETRIEVAL], "spec.gate": whole, **changes}
    return _bad(name, spec, f"spec.gate.{field}", message)


_STAGE, _TRAIN, _RECIPE = "spec.stages[0]", "spec.data.train", "spec.recipe"
_MODEL = f"{_STAGE}.modelConfig"

BAD: list[Bad] = [
    # the object
    _one("another apiVersion", "apiVersion", "modelchain.dev/v1", "'modelchain.dev/v1alpha1'"),
    _one("another kind", "kind", "Pod", "'ModelChain'"),
    _one("no kind", "kind", DELETE, "required"),
    _one("no metadata", "metadata", DELETE, "required"),
    _one("no name", "metadata.name", DELETE, "required"),
    _one("name with an upper-case letter", "metadata.name", "Family", "does not have the form"),
    _one("name that begins with a digit", "metadata.name", "1family", "does not have the form"),
    _one("name that ends with a dash", "metadata.name", "family-", "does not have the form"),
    _one("name with a dot", "metadata.name", "fam.ily", "does not have the form"),
    _one("name with a line break", "metadata.name", "family\n", "does not have the form"),
    _one("name too long", "metadata.name", "a" * 25, "at most 24"),
    _one("empty name", "metadata.name", "", "does not have the form"),
    _one("label that is a number", "metadata.labels.team", 7, "quotes"),
    _one("no spec", "spec", DELETE, "required"),
    _one("spec is a list", "spec", [], "valid dictionary"),
    _one("unknown key in spec", "spec.stage", [], "unknown field"),
    _one("a field of a later version", "spec.pretrained", {"tag": "x"}, "unknown field"),
    _one("suspend is a text", "spec.suspend", "true", "boolean"),
    _one("suspend is a number", "spec.suspend", 1, "boolean"),
    # stages
    _one("no stages", "spec.stages", DELETE, "required"),
    _one("an empty chain", "spec.stages", [], "at least 1"),
    _one("stages as a mapping", "spec.stages", {"vit-t": {}}, "list"),
    _one("stages is null", "spec.stages", None, "list"),
    _one(
        "too many stages",
        "spec.stages",
        [{"name": f"s{i}", "model": "ViT-T-16"} for i in range(33)],
        "at most 32",
    ),
    _one("a stage that is a text", _STAGE, "ViT-T-16", "valid dictionary"),
    _one("a stage without a name", f"{_STAGE}.name", DELETE, "required"),
    _one("stage name with an underscore", f"{_STAGE}.name", "vit_t", "does not have the form"),
    _one("stage name too long", f"{_STAGE}.name", "a" * 17, "at most 16"),
    _one("stage name is a number", f"{_STAGE}.name", 7, "quotes"),
    _one("unknown key in a stage", f"{_STAGE}.epoch", 3, "unknown field"),
    _one("a name in another spelling of case", f"{_STAGE}.model_config", config(), "unknown field"),
    _bad(
        "two stages of one name",
        {"spec.stages[1].name": "vit-t"},
        "spec.stages[1].name",
        "used twice",
    ),
    _bad(
        "neither model nor modelConfig",
        {f"{_STAGE}.model": DELETE},
        _STAGE,
        "exactly one of model and modelConfig",
    ),
    _bad(
        "both model and modelConfig",
        {_MODEL: config()},
        _STAGE,
        "exactly one of model and modelConfig",
    ),
    _bad("unknown model", {f"{_STAGE}.model": "ViT-H-14"}, _STAGE, "'ViT-H-14' is not known"),
    _one("epochs 0", f"{_STAGE}.epochs", 0, "greater than or equal to 1"),
    _one("epochs too many", f"{_STAGE}.epochs", 10_001, "less than or equal to 10000"),
    _one("epochs as text", f"{_STAGE}.epochs", "20", "integer"),
    _one("epochs as a fraction", f"{_STAGE}.epochs", 2.5, "integer"),
    _one("epochs as a boolean", f"{_STAGE}.epochs", True, "integer"),
    _one("rerun is empty", f"{_STAGE}.rerun", "", "at least 1"),
    _one("rerun is a number", f"{_STAGE}.rerun", 2, "quotes"),
    _one("no nodes", f"{_STAGE}.resources.nodes", 0, "greater than or equal to 1"),
    _one("unknown resource", f"{_STAGE}.resources.gpus", 8, "unknown field"),
    _bad(
        "processes that do not divide the batch",
        {f"{_STAGE}.resources": {"nodes": 3}},
        f"{_STAGE}.resources",
        "not divisible by 3 processes",
    ),
    _bad(
        "more processes than pictures",
        {f"{_STAGE}.resources": {"nodes": 256, "processesPerNode": 2}},
        f"{_STAGE}.resources",
        "512 processes",
    ),
    _bad(
        "processes that do not divide the micro-batch",
        {f"{_STAGE}.resources": {"processesPerNode": 8}, f"{_RECIPE}.microBatchSize": 4},
        f"{_STAGE}.resources",
        "microBatchSize 4 is not divisible by 8 processes",
    ),
    _bad(
        "processes of a later stage that do not divide the batch",
        {"spec.stages[1].resources": {"processesPerNode": 3}},
        "spec.stages[1].resources",
        "stage 'vit-s': globalBatchSize 256 is not divisible by 3 processes",
    ),
    # inline models
    _bad(
        "embed_dim missing",
        inline(config()) | {f"{_MODEL}.embed_dim": DELETE},
        f"{_MODEL}.embed_dim",
        "required",
    ),
    _bad(
        "embed_dim too large",
        inline(config(embed_dim=1 << 20)),
        f"{_MODEL}.embed_dim",
        "less than or equal to 16384",
    ),
    _bad(
        "unknown key in a config",
        inline(config(vision={"patch_dropout": 0.5})),
        f"{_MODEL}.vision_cfg.patch_dropout",
        "unknown field",
    ),
    _bad(
        "width not divisible into heads",
        inline(config(vision={"width": 80})),
        f"{_MODEL}.vision_cfg",
        "not divisible into heads of head_width 32",
    ),
    _bad(
        "image not divisible into patches",
        inline(config(vision={"image_size": 30})),
        f"{_MODEL}.vision_cfg",
        "not divisible by patch_size 8",
    ),
    _bad(
        "text width not divisible by heads",
        inline(config(text={"heads": 3})),
        f"{_MODEL}.text_cfg",
        "not divisible by heads 3",
    ),
    _bad(
        "an MLP of no whole width",
        inline(config(vision={"mlp_ratio": 2.33})),
        f"{_MODEL}.vision_cfg",
        "not a whole number",
    ),
    _bad(
        "another vocabulary",
        inline(config(text={"vocab_size": 32_000})),
        f"{_MODEL}.text_cfg.vocab_size",
        "equal to 49408",
    ),
    _bad(
        "a context of two tokens",
        inline(config(text={"context_length": 2})),
        f"{_MODEL}.text_cfg.context_length",
        "equal to 3",
    ),
    _bad(
        "layers of no depth",
        inline(config(vision={"layers": 0})),
        f"{_MODEL}.vision_cfg.layers",
        "greater than or equal to 1",
    ),
    _bad(
        "layers as a list, open_clip's ResNet",
        inline(config(vision={"layers": [3, 4, 6, 3]})),
        f"{_MODEL}.vision_cfg.layers",
        "integer",
    ),
    _bad(
        "unknown timm trunk",
        inline(config()) | {f"{_MODEL}.vision_cfg": {"timm_model_name": "resnet50"}},
        f"{_MODEL}.vision_cfg",
        "'resnet50' is not supported",
    ),
    _bad(
        "a pretrained trunk",
        inline(_SWIN) | {f"{_MODEL}.vision_cfg.timm_model_pretrained": True},
        f"{_MODEL}.vision_cfg.timm_model_pretrained",
        "False",
    ),
    _bad(
        "width beside a timm trunk",
        inline(_SWIN) | {f"{_MODEL}.vision_cfg.width": 96},
        f"{_MODEL}.vision_cfg",
        "width cannot be set",
    ),
    _bad(
        "a timm pool without a trunk",
        inline(config(vision={"timm_pool": "avg"})),
        f"{_MODEL}.vision_cfg",
        "go with timm_model_name",
    ),
    # neighbours
    _pair("the same model twice", config(), config(), "no tower grows"),
    _bad(
        "the same model of Table G twice",
        {"spec.stages[1].model": "ViT-T-16"},
        "spec.stages[1]",
        "no tower grows",
    ),
    _bad(
        "a smaller model after a larger",
        {f"{_STAGE}.model": "ViT-B-16"},
        "spec.stages[1]",
        "stage 'vit-s' after 'vit-t': vision width shrinks (768 then 384)",
    ),
    _pair("only the embedding grows", config(), config(embed_dim=64), "no tower grows"),
    _pair(
        "depth shrinks while width grows",
        config(),
        config(vision={"width": 96, "layers": 1}),
        "stage 'b' after 'a': vision depth shrinks (2 then 1)",
    ),
    _pair(
        "text width and heads shrink",
        config(text={"width": 96, "heads": 3}),
        config(vision={"layers": 3}),
        "text width shrinks (96 then 64)",
    ),
    _pair(
        "text depth shrinks",
        config(),
        config(vision={"width": 96}, text={"layers": 1}),
        "text depth shrinks (2 then 1)",
    ),
    _pair(
        "head width changes",
        config(),
        config(vision={"width": 128, "head_width": 64}),
        "vision head_width must be equal along the chain (32 then 64)",
    ),
    _pair(
        "text head width changes",
        config(),
        config(text={"width": 128, "heads": 2}),
        "text head width must be equal",
    ),
    _pair(
        "patch size changes",
        config(),
        config(vision={"width": 96, "patch_size": 16}),
        "vision patch_size must be equal",
    ),
    _pair(
        "image size changes",
        config(),
        config(vision={"width": 96, "image_size": 64}),
        "vision image_size must be equal",
    ),
    _pair(
        "context length changes",
        config(),
        config(text={"layers": 3, "context_length": 77}),
        "text context_length must be equal",
    ),
    _pair(
        "the activation changes",
        config(),
        _BIGGER | {"quick_gelu": True},
        "quick_gelu must be equal",
    ),
    _pair(
        "the MLP ratio changes",
        config(),
        config(vision={"width": 96, "mlp_ratio": 2.0}),
        "vision mlp_ratio must be equal",
    ),
    _bad(
        "a Swin after a ViT",
        {"spec.stages[1].model": "Swin-S"},
        "spec.stages[1]",
        "cannot be neighbours",
    ),
    _bad(
        "a Swin that shrinks in one part",
        {f"{_STAGE}.model": "Swin-S", "spec.stages[1].model": "Swin-T"},
        "spec.stages[1]",
        "vision depth shrinks (18 then 6)",
    ),
    # data
    _one("no data", "spec.data", DELETE, "required"),
    _one("no shards", f"{_TRAIN}.shards", DELETE, "required"),
    _one("shards as a list", f"{_TRAIN}.shards", ["/data/a.tar"], "string"),
    _one(
        "shards by a relative path", f"{_TRAIN}.shards", "data/train.tar", "does not have the form"
    ),
    _one(
        "shards from a shell",
        f"{_TRAIN}.shards",
        "pipe:cat /data/train.tar",
        "does not have the form",
    ),
    _one(
        "shards from a shell, in braces",
        f"{_TRAIN}.shards",
        "/data/{pipe:cat,x}",
        "'pipe:' runs a shell",
    ),
    _one(
        "shards from the network",
        f"{_TRAIN}.shards",
        "s3://bucket/train.tar",
        "does not have the form",
    ),
    _one(
        "shards outside the mount", f"{_TRAIN}.shards", "/datasets/train.tar", "does not lie under"
    ),
    _one(
        "shards partly outside the mount",
        f"{_TRAIN}.shards",
        "/{data,etc}/train.tar",
        "/{data,etc}/train.tar does not lie under",
    ),
    _bad(
        "shards outside another mount",
        {"spec.data.volume.mountPath": "/mnt"},
        f"{_TRAIN}.shards",
        "/data/train-{00..07}.tar does not lie under spec.data.volume.mountPath /mnt",
    ),
    _one(
        "shards outside by braces alone",
        f"{_TRAIN}.shards",
        "/{data/a,data/b}.tar",
        "does not lie under",
    ),
    _one("shards that climb out", f"{_TRAIN}.shards", "/data/../etc/passwd", "'..' is not allowed"),
    _one(
        "shards that climb out in braces",
        f"{_TRAIN}.shards",
        "/data/{a,../b}/train.tar",
        "'..' is not allowed",
    ),
    _one("the mount itself", f"{_TRAIN}.shards", "/data/", "does not lie under"),
    _one("shards with a NUL", f"{_TRAIN}.shards", "/data/\0.tar", "NUL"),
    _one("unbalanced braces", f"{_TRAIN}.shards", "/data/train-{0..9.tar", "unbalanced braces"),
    _one("a shard named twice", f"{_TRAIN}.shards", "/data/{a,a}.tar", "names a file twice"),
    _one("a range too long", f"{_TRAIN}.shards", "/data/{0..100000}.tar", "more than 100000 files"),
    _one(
        "a range without end",
        f"{_TRAIN}.shards",
        "/data/{0..99999999999999999999}.tar",
        "more than 100000 files",
    ),
    _one(
        "ranges that multiply",
        f"{_TRAIN}.shards",
        "/data/{0..999}{0..999}.tar",
        "more than 100000 files",
    ),
    _one("a brace bomb", f"{_TRAIN}.shards", "/data/" + "{a,b}" * 200, "more than 100000 files"),
    _one(
        "a nested brace bomb",
        f"{_TRAIN}.shards",
        "/data/{" + "{a,b}" * 200 + ",x}",
        "more than 100000 files",
    ),
    _one(
        "braces nested without end",
        f"{_TRAIN}.shards",
        "/data/" + "{a," * 200 + "b" + "}" * 200,
        "nested more than",
    ),
    _one("a path too long", f"{_TRAIN}.shards", "/data/" + "a" * 1024, "at most 1024"),
    _one("no samples", f"{_TRAIN}.samples", 0, "greater than or equal to 1"),
    _one("samples with an exponent", f"{_TRAIN}.samples", 1e6, "integer"),
    _one("samples beyond all bounds", f"{_TRAIN}.samples", 10**12, "less than or equal to"),
    _one("no captions", f"{_TRAIN}.captionsPerSample", 0, "greater than or equal to 1"),
    _one("too many captions", f"{_TRAIN}.captionsPerSample", 65, "less than or equal to 64"),
    _one(
        "a fingerprint in upper case", f"{_TRAIN}.fingerprint", "A" * 64, "does not have the form"
    ),
    _one("a mount with ..", "spec.data.volume.mountPath", "/data/..", "'..' is not allowed"),
    _one("a relative mount", "spec.data.volume.mountPath", "data", "does not have the form"),
    _one("a claim of no name", "spec.data.volume.claimName", "", "does not have the form"),
    # evaluation
    _one("evaluation as a mapping", "spec.evaluation", _EVALUATION, "list"),
    _bad(
        "unknown kind of evaluation",
        {"spec.evaluation": [_EVALUATION | {"kind": "LinearProbe"}]},
        "spec.evaluation[0].kind",
        "'ZeroShot' or 'Retrieval'",
    ),
    _bad(
        "zero-shot without class names",
        {"spec.evaluation": [{k: v for k, v in _EVALUATION.items() if k != "classNames"}]},
        "spec.evaluation[0]",
        "needs classNames and templates",
    ),
    _bad(
        "retrieval with class names",
        {"spec.evaluation": [_RETRIEVAL | {"classNames": "imagenet"}]},
        "spec.evaluation[0]",
        "takes no classNames",
    ),
    _bad(
        "two evaluations of one name",
        {"spec.evaluation": [_EVALUATION, _EVALUATION]},
        "spec.evaluation[1].name",
        "used twice",
    ),
    _bad(
        "class names outside the mount",
        {"spec.evaluation": [_EVALUATION | {"classNames": "/etc/names.json"}]},
        "spec.evaluation[0].classNames",
        "does not lie under",
    ),
    _bad(
        "templates by a name that is not built in",
        {"spec.evaluation": [_EVALUATION | {"templates": "mine"}]},
        "spec.evaluation[0].templates",
        "does not lie under",
    ),
    _bad(
        "evaluation shards that climb out",
        {"spec.evaluation": [_RETRIEVAL | {"shards": "/data/../x.tar"}]},
        "spec.evaluation[0].shards",
        "'..' is not allowed",
    ),
    _bad(
        "a metric name with a slash",
        {"spec.evaluation": [_RETRIEVAL | {"name": "a/b"}]},
        "spec.evaluation[0].name",
        "does not have the form",
    ),
    _bad(
        "evaluated every -1 epochs",
        {"spec.evaluation": [_RETRIEVAL | {"everyEpochs": -1}]},
        "spec.evaluation[0].everyEpochs",
        "greater than or equal to 0",
    ),
    _one(
        "too many evaluations",
        "spec.evaluation",
        [_RETRIEVAL | {"name": f"e{i}"} for i in range(17)],
        "at most 16",
    ),
    # recipe
    _one("no recipe", _RECIPE, DELETE, "required"),
    _one("no baselineEpochs", f"{_RECIPE}.baselineEpochs", DELETE, "required"),
    _one("a batch of one", f"{_RECIPE}.globalBatchSize", 1, "greater than or equal to 2"),
    _bad(
        "a batch larger than the data",
        {f"{_TRAIN}.samples": 255},
        f"{_RECIPE}.globalBatchSize",
        "256 is more than the 255 samples",
    ),
    _one(
        "a micro-batch that does not divide",
        f"{_RECIPE}.microBatchSize",
        100,
        "does not divide globalBatchSize 256",
    ),
    _one(
        "a micro-batch larger than the batch",
        f"{_RECIPE}.microBatchSize",
        512,
        "does not divide globalBatchSize 256",
    ),
    _one("no learning rate", f"{_RECIPE}.learningRate", DELETE, "required"),
    _one("the learning rate as a number", f"{_RECIPE}.learningRate", 0.001, "quotes"),
    _one("a learning rate of 0", f"{_RECIPE}.learningRate", "0", "must lie between"),
    _one("a negative learning rate", f"{_RECIPE}.learningRate", "-1e-3", "does not have the form"),
    _one(
        "a learning rate in words",
        f"{_RECIPE}.learningRate",
        "1e-3 or so",
        "does not have the form",
    ),
    _one(
        "a learning rate of no number", f"{_RECIPE}.learningRate", "NaN", "does not have the form"
    ),
    _one(
        "a weight decay of no number",
        f"{_RECIPE}.weightDecay",
        "nan",
        "'nan' does not have the form of a decimal",
    ),
    _one(
        "a learning rate without end",
        f"{_RECIPE}.learningRate",
        "1e999999",
        "does not have the form",
    ),
    _one(
        "a learning rate with blanks", f"{_RECIPE}.learningRate", " 1e-3", "does not have the form"
    ),
    _one(
        "a learning rate in other digits", f"{_RECIPE}.learningRate", "١", "does not have the form"
    ),
    _one(
        "a weight decay beyond bounds", f"{_RECIPE}.weightDecay", "1e9", "must lie between 0 and 10"
    ),
    _one("another precision", f"{_RECIPE}.precision", "fp16", "'bf16' or 'fp32'"),
    _one("a seed beyond 31 bits", f"{_RECIPE}.seed", 2**31, "less than or equal to"),
    _one("a seed that is negative", f"{_RECIPE}.seed", -1, "greater than or equal to 0"),
    _one("warm-up as one number", f"{_RECIPE}.warmupSteps", 500, "valid dictionary"),
    _one(
        "the first stage never ends its warm-up",
        f"{_RECIPE}.warmupSteps.first",
        32 * 390,
        "stage 'vit-t' trains only 12480 steps",
    ),
    _one(
        "a successor never ends its warm-up",
        f"{_RECIPE}.warmupSteps.successors",
        20 * 390,
        "stage 'vit-s' trains only 7800 steps",
    ),
    _bad(
        "the default warm-up is too long for little data",
        {f"{_RECIPE}.warmupSteps": DELETE, f"{_TRAIN}.samples": 2560},
        f"{_RECIPE}.warmupSteps.first",
        "8000 steps of warm-up",
    ),
    # the rest
    _one("another growth in width", "spec.transfer.width", "LiGO", "'Insert'"),
    _one("another growth in depth", "spec.transfer.depth", "Interpolate", "'Duplicate'"),
    _one("alpha as a number", "spec.transfer.distillation.alpha", 500, "quotes"),
    _one(
        "a meaning of alpha that is not known",
        "spec.transfer.distillation.convention",
        "Equation2",
        "Released",
    ),
    _one("alpha beyond bounds", "spec.transfer.distillation.alpha", "1e10", "must lie between"),
    _one("a target below 1", "spec.allocation.targetAcceleration", "0.5", "must lie between"),
    _one("no epochs at the end", "spec.allocation.endRatio", "0", "must lie between 0.01 and 1"),
    _one("more epochs at the end", "spec.allocation.endRatio", "1.01", "must lie between"),
    _one("the end ratio as a number", "spec.allocation.endRatio", 0.5, "quotes"),
    # gate and budget
    _gate("a gate without a metric", {"metric": ""}, "metric", "does not have the form"),
    _gate("a metric that is not measured", {"metric": "top1"}, "metric", "'top1' is not measured"),
    _gate(
        "a baseline of the first stage",
        {"baseline": {"vit-t": "30"}},
        "baseline",
        "only a stage after the first",
    ),
    _gate(
        "a baseline of no stage",
        {"baseline": {"vit-b": "30"}},
        "baseline",
        "only a stage after the first",
    ),
    _gate(
        "a baseline of the first stage that is to be trained",
        {"train": ["vit-t"]},
        "train",
        "only a stage after the first",
    ),
    _gate(
        "a baseline of a misspelt stage",
        {"baseline": {"vit-s": "30", "vit-ss": "30"}},
        "baseline",
        "there is no stage 'vit-ss'",
    ),
    _gate(
        "a misspelt stage whose baseline is to be trained",
        {"train": ["vit-s", "vit-ss"], "baseline": {}},
        "train",
        "there is no stage 'vit-ss'",
    ),
    _gate(
        "the first stage between others that have a baseline",
        {"baseline": {"vit-s": "30", "vit-t": "30"}},
        "baseline",
        "'vit-t' is the first stage, which is trained alone",
    ),
    _gate(
        "a baseline above 100 %",
        {"baseline": {"vit-s": "101"}},
        "baseline",
        "must lie between 0 and 100 (got 101)",
    ),
    _gate(
        "a baseline above 100 %, by its stage",
        {"baseline": {"vit-s": "100.5"}},
        "baseline",
        "'vit-s' must lie between 0 and 100 (got 100.5)",
    ),
    _gate(
        "a negative baseline",
        {"baseline": {"vit-s": "-1"}},
        "baseline.vit-s",
        "'-1' does not have the form of a decimal: digits without a sign, such as 0.5",
    ),
    _gate(
        "a baseline that is given and trained",
        {"train": ["vit-s"]},
        "train",
        "in both baseline and train",
    ),
    _gate(
        "a baseline that is trained twice",
        {"baseline": {}, "train": ["vit-s", "vit-s"]},
        "train",
        "named twice",
    ),
    _gate("a tolerance as a number", {"tolerance": 0.5}, "tolerance", "quotes"),
    _gate("a tolerance above 100 points", {"tolerance": "101"}, "tolerance", "must lie between"),
    _gate("an unknown consequence of a miss", {"onMiss": "Retry"}, "onMiss", "'Stop'"),
    _gate(
        "a factor that shortens",
        {"relaxation": {"factor": "0.9"}},
        "relaxation.factor",
        "must lie between 1 and 100",
    ),
    _gate("no rounds", {"relaxation": {"maxRounds": 0}}, "relaxation.maxRounds", "greater than or"),
    _gate(
        "relaxation without a target",
        {"onMiss": "Relax"},
        "onMiss",
        "give spec.allocation.targetAcceleration",
    ),
    _gate(
        "relaxation of epochs that are given",
        {"onMiss": "Relax"},
        "onMiss",
        "cannot lengthen the epochs that stage 'vit-s' gives",
        **{"spec.allocation.targetAcceleration": "1.5"},
    ),
    _gate(
        "relaxation without a baseline",
        {"onMiss": "Relax", "baseline": {}},
        "onMiss",
        "needs something to compare with",
        **_RELAXES,
    ),
    _one("a budget without a limit", "spec.budget", {"onExceed": "Fail"}, "give a limit"),
    _bad(
        "a budget as a number",
        {"spec.budget": {"cost": 2500}},
        "spec.budget.cost",
        "quotes",
    ),
    _bad(
        "a budget beyond bounds",
        {"spec.budget": {"gpuHours": "1e13"}},
        "spec.budget.gpuHours",
        "must lie between 0 and 1e12",
    ),
    _bad(
        "a claim and a template",
        {"spec.storage": {"claimName": "c", "claimTemplate": {"size": "1Gi"}}},
        "spec.storage",
        "exactly one of claimTemplate and claimName",
    ),
    _bad(
        "neither a claim nor a template",
        {"spec.storage": {"retain": True}},
        "spec.storage",
        "exactly one of claimTemplate and claimName",
    ),
    _one(
        "a size in words",
        "spec.storage",
        {"claimTemplate": {"size": "big"}},
        "does not have the form",
    )._replace(field="spec.storage.claimTemplate.size"),
    _one("an unknown runner", "spec.runner.kind", "Slurm", "'PyTorchJob' or 'Local'"),
    _one("an empty image", "spec.runner.image", "", "at least 1"),
    _one("a queue that is no label", "spec.runner.queueName", "My queue", "does not have the form"),
    _one("a queue too long for a label", "spec.runner.queueName", "q" * 64, "at most 63"),
    _one(
        "a priority class that is no name",
        "spec.runner.priorityClass",
        "High!",
        "does not have the form",
    ),
    _one(
        "a storage class that is no name",
        "spec.storage",
        {"claimTemplate": {"size": "1Gi", "storageClassName": "A B"}},
        "does not have the form",
    )._replace(field="spec.storage.claimTemplate.storageClassName"),
    _one("a deadline of 0", "spec.deadlines.startSeconds", 0, "greater than or equal to 1"),
    _one(
        "a stall deadline beyond bounds",
        "spec.deadlines.stallSeconds",
        10**7,
        "less than or equal to 604800",
    ),
    _one("a stage deadline as text", "spec.deadlines.stageSeconds", "1d", "integer"),
    _one("retries below 0", "spec.retry.maxRetries", -1, "greater than or equal to 0"),
    _one(
        "disruptions beyond bounds",
        "spec.retry.maxDisruptions",
        10_001,
        "less than or equal to 10000",
    ),
    _one(
        "a checkpoint every 0 seconds",
        "spec.checkpoint.everySeconds",
        0,
        "greater than or equal to 1",
    ),
]
