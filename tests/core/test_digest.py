"""The input digest must stay stable: golden digests, and for every field of the spec the stages
that a change of it retrains.
"""

from __future__ import annotations

import hashlib
import json
import re
import typing
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from specs import DELETE, config, with_changes

from modelchain.api.modelconfig import ModelConfig
from modelchain.api.spec import ModelChain
from modelchain.api.zoo import MODELS
from modelchain.identity.digest import canonical, differing_fields, digest_of, number, stage_inputs
from modelchain.plan.plan import plan

ZOO = {
    "metadata.labels": {"team": "a"},
    "spec.stages": [
        {"name": "a", "model": "ViT-T-16", "epochs": 32},
        {"name": "b", "model": "ViT-S-16", "epochs": 8},
        {"name": "c", "model": "ViT-B-16", "epochs": 5},
    ],
    "spec.evaluation": [
        {
            "name": "top1",
            "kind": "ZeroShot",
            "shards": "/data/v.tar",
            "classNames": "imagenet",
            "templates": "openai",
        }
    ],
    "spec.storage": {"claimTemplate": {"size": "1Gi"}},
    "spec.gate": {"metric": "top1", "baseline": {"b": "30"}},
    "spec.budget": {"cost": "100"},
}
INLINE = {
    f"spec.stages[{i}]": {
        "name": "abc"[i],
        "modelConfig": config(vision={"layers": 2 + i}),
        "epochs": 9 - i,
    }
    for i in range(3)
}
SWIN = {
    f"spec.stages[{i}]": {
        "name": "abc"[i],
        "modelConfig": config()
        | {"vision_cfg": {"timm_model_name": f"swin_{size}_patch4_window7_224"}},
        "epochs": 9,
    }
    for i, size in enumerate(("tiny", "small", "base"))
}
FREE = {
    "spec.stages[1].epochs": DELETE,
    "spec.stages[2].epochs": DELETE,
    "spec.allocation.targetAcceleration": "3",
}
ONLY = object()  # stands for the value of a field that has only one valid value today


class Row(NamedTuple):
    """`path` changed to `value` retrains these stages of a chain of a, b and c."""

    path: str
    value: Any
    misses: str
    base: dict[str, Any] = ZOO


def _vision(field: str, value: Any) -> Row:
    return Row(f"spec.stages[1].modelConfig.vision_cfg.{field}", value, "bc", INLINE)


def _text(field: str, value: Any) -> Row:
    return Row(f"spec.stages[1].modelConfig.text_cfg.{field}", value, "bc", INLINE)


def _trunk(field: str, value: Any, misses: str) -> Row:
    return Row(f"spec.stages[1].modelConfig.vision_cfg.{field}", value, misses, SWIN)


ROWS = [
    Row("apiVersion", ONLY, ""),
    Row("kind", ONLY, ""),
    Row("metadata.name", "other", ""),
    Row("metadata.namespace", "other", ""),
    Row("metadata.labels", {"team": "b"}, ""),
    Row("metadata.annotations", {"modelchain.dev/retry": "2"}, ""),
    Row("metadata.uid", "8f4b1f0e", ""),
    Row("metadata.resourceVersion", "2", ""),
    Row("metadata.generation", 2, ""),
    Row("metadata.creationTimestamp", "2026-01-02T03:04:05Z", ""),
    Row("metadata.managedFields", [], ""),
    Row("metadata.deletionTimestamp", "2026-01-02T03:04:05Z", ""),
    Row("metadata.ownerReferences", [], ""),
    Row("metadata.finalizers", [], ""),
    Row("status", {"stages": []}, ""),
    Row("spec.suspend", True, ""),
    Row("spec.stages[1].name", "beta", ""),
    Row("spec.stages[0].model", "ViT-C-16", "abc"),
    Row("spec.stages[1].model", "ViT-M-16", "bc"),
    Row("spec.stages[2].model", "ViT-L-16", "c"),
    Row("spec.stages[1].modelConfig.embed_dim", 48, "bc", INLINE),
    Row("spec.stages[1].modelConfig.quick_gelu", True, "bc", INLINE),
    _vision("image_size", 64),
    _vision("patch_size", 16),
    _vision("width", 96),
    _vision("layers", 7),
    _vision("head_width", 16),
    _vision("mlp_ratio", 2.0),
    _trunk("timm_model_name", "swin_large_patch4_window7_224", "bc"),
    _trunk("timm_model_pretrained", False, ""),
    _trunk("timm_pool", "avg", ""),
    _trunk("timm_proj", "linear", ""),
    _text("context_length", 77),
    Row("spec.stages[1].modelConfig.text_cfg.vocab_size", 49_408, "", INLINE),
    _text("width", 96),
    _text("heads", 1),
    _text("layers", 7),
    _text("mlp_ratio", 2.0),
    Row("spec.stages[1].epochs", 9, "bc"),
    Row("spec.stages[1].rerun", "again", "bc"),
    Row("spec.stages[1].resources.nodes", 4, ""),
    Row("spec.stages[1].resources.processesPerNode", 8, ""),
    Row("spec.data.train.shards", "/data/train-{00..08}.tar", "abc"),
    Row("spec.data.train.shards", "/data/moved/train-{00..07}.tar", ""),
    Row("spec.data.train.shards", "/data/train-{07..00}.tar", "abc"),
    Row("spec.data.train.samples", 99_999, "abc"),
    Row("spec.data.train.captionsPerSample", 3, "abc"),
    Row("spec.data.train.fingerprint", "0" * 64, "abc"),
    Row("spec.data.volume.claimName", "other", ""),
    Row("spec.data.volume.mountPath", "/mnt", ""),
    Row("spec.evaluation[0].name", "other", ""),
    Row("spec.evaluation[0].kind", ONLY, ""),
    Row("spec.evaluation[0].shards", "/data/w.tar", ""),
    Row("spec.evaluation[0].classNames", "/data/names.json", ""),
    Row("spec.evaluation[0].templates", "/data/templates.json", ""),
    Row("spec.evaluation[0].everyEpochs", 2, ""),
    Row("spec.evaluation", [], ""),
    Row("spec.recipe.baselineEpochs", 31, ""),
    Row("spec.recipe.baselineEpochs", 31, "abc", {**ZOO, "spec.stages[0].epochs": DELETE}),
    Row("spec.recipe.globalBatchSize", 128, "abc"),
    Row("spec.recipe.learningRate", "1e-4", "abc"),
    Row("spec.recipe.weightDecay", "0.2", "abc"),
    Row("spec.recipe.warmupSteps.first", 501, "abc"),
    Row("spec.recipe.warmupSteps.successors", 101, "bc"),
    Row("spec.recipe.precision", "fp32", "abc"),
    Row("spec.recipe.seed", 1, "abc"),
    Row("spec.recipe.microBatchSize", 64, ""),
    Row("spec.transfer.width", ONLY, "bc"),
    Row("spec.transfer.depth", ONLY, "bc"),
    Row("spec.transfer.distillation.alpha", "499", "bc"),
    Row("spec.transfer.distillation.convention", "Equation1", "bc"),
    Row("spec.allocation.targetAcceleration", "2", ""),
    Row("spec.allocation.targetAcceleration", "2", "bc", {**ZOO, **FREE}),
    Row("spec.allocation.endRatio", "0.5", ""),
    Row("spec.allocation.endRatio", "0.5", "bc", {**ZOO, **FREE}),
    Row("spec.gate.metric", "other", ""),
    Row("spec.gate.tolerance", "1", ""),
    Row("spec.gate.baseline", {"c": "40"}, ""),
    Row("spec.gate.train", ["c"], ""),
    Row("spec.gate.onMiss", "Continue", ""),
    Row("spec.gate.relaxation.factor", "2", ""),
    Row("spec.gate.relaxation.maxRounds", 1, ""),
    Row("spec.budget.cost", "200", ""),
    Row("spec.budget.gpuHours", "200", ""),
    Row("spec.budget.onExceed", "Fail", ""),
    Row("spec.storage.claimTemplate.storageClassName", "rwx", ""),
    Row("spec.storage.claimTemplate.size", "2Gi", ""),
    Row("spec.storage", {"claimName": "other"}, ""),
    Row("spec.storage.claimName", ONLY, ""),  # the row above changes it
    Row("spec.storage.retain", False, ""),
    Row("spec.runner.kind", "Local", ""),
    Row("spec.runner.nodePool", "a100-80gb", ""),
    Row("spec.runner.image", "ghcr.io/x@sha256:00", ""),
    Row("spec.runner.queueName", "vision", ""),
    Row("spec.runner.priorityClass", "batch", ""),
    Row("spec.retry.maxRetries", 0, ""),
    Row("spec.retry.maxDisruptions", 0, ""),
    Row("spec.deadlines.startSeconds", 60, ""),
    Row("spec.deadlines.stallSeconds", 60, ""),
    Row("spec.deadlines.stageSeconds", 3600, ""),
    Row("spec.checkpoint.everySeconds", 1, ""),
]


def parse(base: dict[str, Any], changes: dict[str, Any] | None = None) -> ModelChain:
    return ModelChain.model_validate(with_changes(changes or {}, with_changes(base)))


def weights_of(digest: str) -> str:
    """An artifact digest that differs whenever the inputs do, as after training."""
    return hashlib.sha256(f"weights of {digest}".encode()).hexdigest()


def chain_inputs(chain: ModelChain) -> list[dict[str, Any]]:
    """The inputs of every stage of a chain, after all stages were trained."""
    out: list[dict[str, Any]] = []
    for index, stage in enumerate(plan(chain, "analytic", {}).stages):
        predecessor = weights_of(digest_of(out[-1])) if out else None
        fingerprint = chain.spec.data.train.fingerprint
        inputs = stage_inputs(
            chain.spec, index, epochs=stage.epochs, fingerprint=fingerprint, predecessor=predecessor
        )
        out.append(inputs)
    return out


def digests(chain: ModelChain) -> list[str]:
    return [digest_of(inputs) for inputs in chain_inputs(chain)]


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.value is not ONLY], ids=lambda r: f"{r.path}={str(r.value)[:20]}"
)
def test_which_stages_a_field_retrains(row: Row) -> None:
    before, after = digests(parse(row.base)), digests(parse(row.base, {row.path: row.value}))
    assert "".join(n for n, x, y in zip("abc", before, after, strict=True) if x != y) == row.misses


@pytest.mark.parametrize("field", ["width", "depth"])
def test_the_growth_method_is_hashed_though_only_one_exists(field: str) -> None:
    chain = parse(ZOO)
    other = chain.spec.transfer.model_copy(update={field: "Another"})
    changed = chain.model_copy(update={"spec": chain.spec.model_copy(update={"transfer": other})})
    before, after = digests(chain), digests(changed)
    assert before[0] == after[0] and before[1] != after[1] and before[2] != after[2]


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        path = prefix + (field.alias or name)
        nested = list(_models(field.annotation))
        if not nested:
            yield path
        for inner in nested:
            yield from _fields(inner, f"{path}{'[]' if 'list[' in str(field.annotation) else ''}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models(inner)


def test_every_field_of_the_spec_has_a_row() -> None:
    """A new field needs a decision whether it is hashed."""
    rows = {re.sub(r"\[\d\]", "[]", row.path) for row in ROWS}
    fields = set(_fields(ModelChain))
    assert len(fields) > 60
    assert fields - rows == set()
    assert rows - fields == {"spec.evaluation", "spec.storage"}, (
        "two rows replace whole groups; the fields of the groups have rows of their own"
    )


GOLDEN = {
    "ZOO": (ZOO, [
        "2d94218c8848eb66b2a8fc2dde10fe167ee00bfa07ddd6ddd37ca5a888595c9b",
        "2cad0cfc31af69ab1520c12906b252324dee4a16a60c5b42ba68f92c566203b0",
        "de31801d72ce416174af7f116a87791da97622a7b5cedb99cd84504e24744eef",
    ]),
    "INLINE": (INLINE, [
        "58a453852c746be980e8463e743dcd9fe631c3cc313841f629634fecbd5d5726",
        "a482568056846b85f7c52c81ddee85f08f850855d35d78c36ec1c89fe061a77d",
        "c2731900082cb9afb753e00a33b8e9aa5e61bb0f112d1a57f9ad652c6118fb98",
    ]),
    "SWIN": (SWIN, [
        "d437ccacf65a377ac025a3c37e28b092e1ce3d6c4adb5b1822a2756261ee6db4",
        "e97422f573c975bd32dd4e929933774d6e1900fd60a2857cf107de8d3f7af3cf",
        "0b5b063144d1c206c629bf71c5ab384bbfc2ff602d4e84e2a3a3c3d6e7c87e1c",
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_digests(name: str) -> None:
    """If this fails, a release would retrain every existing artifact. If that is intended, raise
    `v` and document it.
    """
    base, expected = GOLDEN[name]
    assert digests(parse(base)) == expected


def test_golden_text() -> None:
    """The exact text that is hashed, for implementations in other languages."""
    shards = hashlib.sha256(b'["train-00.tar","train-01.tar"]').hexdigest()
    text = (
        '{"captionsPerSample":4,"data":{"count":2,"fingerprint":null,"samples":100000,"shards":"'
        + shards
        + '"},'
        '"epochs":8,"globalBatchSize":256,"learningRate":"0.001","modelConfig":{"embed_dim":32,"quick_gelu":false,'
        '"text_cfg":{"context_length":16,"heads":2,"layers":2,"mlp_ratio":4.0,"vocab_size":49408,"width":64},'
        '"vision_cfg":{"head_width":32,"image_size":32,"layers":3,"mlp_ratio":4.0,"patch_size":8,"width":64}},'
        '"precision":"bf16","predecessor":"' + "f" * 64 + '","rerun":null,"seed":0,"transfer":'
        '{"depth":"Duplicate","distillation":{"alpha":"500"},"width":"Insert"},"v":2,"warmupSteps":100,"weightDecay":"0.1"}'
    )
    spec = parse(INLINE, {"spec.data.train.shards": "/data/train-{00..01}.tar"}).spec
    inputs = stage_inputs(spec, 1, epochs=8, fingerprint=None, predecessor="f" * 64)
    assert canonical(inputs).decode() == text
    assert digest_of(inputs) == hashlib.sha256(text.encode()).hexdigest()
    assert digest_of(json.loads(text)) == digest_of(inputs), (
        "inputs that are read back from a manifest have the same digest"
    )


def test_the_first_stage_has_no_transfer() -> None:
    first, second, third = chain_inputs(parse(ZOO))
    assert "transfer" not in first and "predecessor" not in first
    assert first["warmupSteps"] == 500 and second["warmupSteps"] == third["warmupSteps"] == 100


@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_config_written_out_hash_alike(name: str) -> None:
    resolved = MODELS[name].config.resolved()
    assert ModelConfig.model_validate(resolved).resolved() == resolved
    stages = (
        [{"name": "a", "model": name}],
        [{"name": "a", "modelConfig": json.loads(json.dumps(resolved))}],
    )
    assert digests(parse({"spec.stages": stages[0]})) == digests(parse({"spec.stages": stages[1]}))


def test_defaults_written_out_hash_alike() -> None:
    written = {
        "spec.recipe.weightDecay": "0.1",
        "spec.recipe.precision": "bf16",
        "spec.recipe.seed": 0,
        "spec.data.train.captionsPerSample": 4,
        "spec.transfer": {
            "width": "Insert",
            "depth": "Duplicate",
            "distillation": {"alpha": "500"},
        },
        "spec.stages[1].modelConfig.vision_cfg.mlp_ratio": 4,
    }
    assert digests(parse(INLINE)) == digests(parse(INLINE, written))


SPELLINGS = [
    ("1e-3", "0.001", ".001", "1.0E-3", "0.00100", "10e-4"),
    ("500", "5e2", "500.0", "0500"),
    ("0", "0.0", "0e9"),
]


@pytest.mark.parametrize("spellings", SPELLINGS, ids=lambda s: s[0])
def test_equal_decimals_hash_alike(spellings: tuple[str, ...]) -> None:
    alpha = "spec.transfer.distillation.alpha"
    assert len({tuple(digests(parse(ZOO, {alpha: text}))) for text in spellings}) == 1
    assert len({number(text) for text in spellings}) == 1


def test_equal_distillation_weights_hash_alike_in_both_conventions() -> None:
    """The alpha of Equation 1 times half the predecessor's embed_dim is the alpha of the authors'
    release. The embed_dim of ViT-T is 512, that of ViT-S 384.
    """

    def of(alpha: str, convention: str) -> ModelChain:
        return parse(
            ZOO, {"spec.transfer.distillation": {"alpha": alpha, "convention": convention}}
        )

    released, equation = of("500", "Released"), of("1.953125", "Equation1")
    assert (
        digests(released)[:2] == digests(equation)[:2]
        and digests(released)[2] != digests(equation)[2]
    )
    assert [inputs["transfer"]["distillation"] for inputs in chain_inputs(equation)[1:]] == [
        {"alpha": "500"},
        {"alpha": "375"},
    ]
    assert digests(of("0", "Equation1")) == digests(of("0", "Released"))


@given(st.from_regex(r"\A([0-9]{1,6}(\.[0-9]{0,6})?|\.[0-9]{1,6})([eE][-+]?[0-9]{1,2})?\Z"))
def test_a_decimal_has_one_spelling_and_keeps_its_value(text: str) -> None:
    spelled = number(text)
    assert Decimal(spelled) == Decimal(text)
    assert number(spelled) == spelled and re.fullmatch(
        r"0|[1-9]\d*|(0|[1-9]\d*)\.\d*[1-9]", spelled
    )


@pytest.mark.parametrize(
    ("changes", "base", "stage", "fields"),
    [
        ({"spec.recipe.learningRate": "1e-4"}, ZOO, 0, ["learningRate"]),
        ({"spec.recipe.learningRate": "1e-4"}, ZOO, 1, ["learningRate", "predecessor"]),
        ({"spec.stages[1].epochs": 9, "spec.stages[1].rerun": "x"}, ZOO, 1, ["epochs", "rerun"]),
        ({"spec.stages[1].epochs": 9}, ZOO, 2, ["predecessor"]),
        ({"spec.transfer.distillation.alpha": "1"}, ZOO, 1, ["transfer.distillation.alpha"]),
        ({"spec.data.train.shards": "/data/x.tar"}, ZOO, 0, ["data.shards", "data.count"]),
        (
            {"spec.stages[1].modelConfig.vision_cfg.layers": 9},
            INLINE,
            1,
            ["modelConfig.vision_cfg.layers"],
        ),
        ({"spec.suspend": True}, ZOO, 1, []),
    ],
)
def test_a_miss_names_its_fields(
    changes: dict[str, Any], base: dict[str, Any], stage: int, fields: list[str]
) -> None:
    old, new = chain_inputs(parse(base))[stage], chain_inputs(parse(base, changes))[stage]
    assert differing_fields(old, new) == fields


def test_a_stage_that_becomes_the_first_names_the_fields_it_lost() -> None:
    spec = parse(ZOO).spec
    as_second = stage_inputs(spec, 1, epochs=8, fingerprint=None, predecessor="a" * 64)
    alone = stage_inputs(spec, 1, epochs=8, fingerprint=None, predecessor=None)
    assert differing_fields(as_second, alone) == ["warmupSteps", "transfer", "predecessor"]
