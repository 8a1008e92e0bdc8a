"""The API server and the command line give the same verdict on the same specs, in the same words.

Three layers refuse a spec. The *envelope* (apiVersion, kind, metadata) is the API server's own:
verdict and field are compared. What is *structural* (types, bounds, forms, unknown and missing
fields: the table's rows that pydantic refuses by its own errors, and names given twice in a list
keyed by name) the server refuses in its words, at the same field. Everything else is CEL of ours:
the sentence must be the command line's.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from apiclient import Api, ApiError, run
from controlplane import Cluster, KubectlError
from pydantic import ValidationError
from specs import BAD, DELETE, GOOD, Bad, config, inline, with_changes

from modelchain.api import messages
from modelchain.api.artifact import StageArtifact, StageArtifactSpec, stage_artifact_name
from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus, StageStatus
from modelchain.errors import InputError
from modelchain.io.load import load_chain, parse
from modelchain.plan.check import check, check_epochs

REPOSITORY = Path(__file__).parents[2]
CHAINS = "/apis/modelchain.dev/v1alpha1/namespaces/{}/modelchains"
IMAGE = "ghcr.io/x/trainer@sha256:" + "0" * 64
OUR_TYPES = {
    "model",
    "evaluation",
    "storage",
    "budget",
    "vision",
    "text",
    "mlp",
}  # of the validators in spec.py, modelconfig.py

# What the server lets through; the operator then says the command line's sentence in the condition
# Stalled/InvalidSpec.
NOT_REFUSED = {
    "a shard named twice": "to compare every alternative with every other costs more than CEL may"
}
# Refused by words that name no field.
NO_FIELD = {"samples with an exponent": "expected int, got float64"}


class Cause(NamedTuple):
    field: str
    message: str


@pytest.fixture(scope="module")
def api(cluster: Cluster) -> Iterator[Api]:
    made = Api(cluster.kubeconfig)
    yield made
    run(made.close())


def refusal(api: Api, chain: Any, namespace: str = "default") -> list[Cause]:
    """Why the server refuses to create this object (a dry run, unknown fields strictly); [] if it
    would.
    """
    query = {"dryRun": "All", "fieldValidation": "Strict"}
    try:
        run(api.request("POST", CHAINS.format(namespace), chain, query))
    except ApiError as error:
        status = json.loads(str(error).partition(": ")[2])
        causes = status.get("details", {}).get("causes", [])
        return [Cause(c.get("field", ""), c["message"]) for c in causes] or [
            Cause("", status["message"])
        ]
    return []


def problems(row: Bad) -> tuple[str, list[str]]:
    """The layer a row belongs to, and the sentences of the command line for its field."""
    with pytest.raises(InputError) as caught:
        check(parse(ModelChain, row.spec, "f"), "f")
    said = [
        p.message
        for p in caught.value.problems
        if p.field == row.field and row.message in p.message
    ]
    if row.field.split(".")[0] in ("apiVersion", "kind", "metadata"):
        return "envelope", said
    try:
        ModelChain.model_validate(row.spec)
    except ValidationError as error:
        types = {e["type"] for e in error.errors()}
        return ("ours" if types <= OUR_TYPES else "structural"), said
    return ("structural" if "used twice" in row.message else "ours"), said


def names(cause: Cause, field: str) -> bool:
    """The same field; or the list it is in, since CEL can blame no single item; or it is quoted in
    the words.
    """
    rest = field.removeprefix(cause.field)
    same = bool(cause.field) and field.startswith(cause.field) and rest[:1] in ("", "[")
    return same or f'"{field}' in cause.message


@pytest.mark.parametrize("row", BAD, ids=lambda row: row.name)
def test_bad_specs_are_refused_alike(row: Bad, api: Api) -> None:
    layer, said = problems(row)
    causes = refusal(api, row.spec)
    if row.name in NOT_REFUSED:
        assert causes == [], "it is refused after all: take it from NOT_REFUSED"
        return
    assert causes and said
    if row.name in NO_FIELD:
        assert any(NO_FIELD[row.name] in c.message for c in causes), causes
    elif layer == "envelope":
        word = (
            row.field.split(".")[1] if "." in row.field else row.field.removeprefix("api").lower()
        )
        assert any(
            word in f"{c.field} {c.message}" or f"'{word}'" in c.message.lower() for c in causes
        ), causes
    elif layer == "structural":
        field = row.field.removesuffix(".name") if "used twice" in row.message else row.field
        assert any(names(c, field) for c in causes), causes
    else:
        assert any(names(c, row.field) and any(s in c.message for s in said) for c in causes), (
            causes
        )


@pytest.mark.parametrize(
    "name", [n for n in GOOD if n != "as kubectl gives it back"]
)  # what a server adds, none takes
def test_good_specs_are_taken(name: str, api: Api) -> None:
    namespace = GOOD[name]["metadata"].get("namespace", "default")
    # The namespace does not exist, or it is another test's and is being terminated.
    assert namespace == "default" or refusal(api, GOOD[name], namespace)[0].message.startswith(
        "namespace"
    )
    assert refusal(api, GOOD[name] | {"metadata": {"name": "family"}}) == []


def test_no_pattern_is_refused_that_the_command_line_takes(api: Api) -> None:
    pieces = [
        "a",
        "..",
        "/",
        "{",
        "}",
        "{a,b}",
        "{a,../b}",
        "/..",
        "..}",
        ",",
        "{0..9}",
        "{000..999}",
        "{9..0}",
    ]
    draw = random.Random(0)
    verdicts: Counter[str] = Counter()
    for _ in range(150):
        pattern = "/data/" + "".join(draw.choices(pieces, k=draw.randint(1, 5)))
        spec = with_changes({"spec.data.train.shards": pattern})
        try:
            check(parse(ModelChain, spec, "f"), "f")
        except InputError:
            verdicts["refused"] += 1
            continue
        verdicts["taken"] += 1
        assert refusal(api, spec) == [], pattern
    assert min(verdicts.values()) > 30


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "examples").glob("*.yaml")), ids=lambda file: file.stem
)
def test_examples(file: Path, api: Api) -> None:
    chain = next(
        made for made in yaml.safe_load_all(file.read_text()) if made["kind"] == "ModelChain"
    )
    assert refusal(api, chain) == []


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        (
            {"spec.runner.image": "x:latest"},
            "spec.runner.image",
            messages.IMAGE.format(image="x:latest"),
        ),
        (
            {"spec.runner.image": IMAGE + "0"},
            "spec.runner.image",
            messages.IMAGE.format(image=IMAGE + "0"),
        ),
        (
            {"metadata.name": "1-family"},
            "metadata.name",
            messages.CHAIN_NAME.format(name="1-family"),
        ),
    ],
)
def test_what_only_a_cluster_asks(
    changes: dict[str, Any], field: str, message: str, api: Api
) -> None:
    assert any(
        c.field == field and message in c.message for c in refusal(api, with_changes(changes))
    )


def test_epochs_that_are_not_given(api: Api, tmp_path: Path) -> None:
    spec = with_changes({"spec.stages[1].epochs": DELETE})
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump(spec))
    with pytest.raises(InputError) as caught:
        check_epochs(load_chain(file), str(file), {})
    [problem] = caught.value.problems
    assert any(
        c.field == problem.field and problem.message in c.message for c in refusal(api, spec)
    )


def test_several_mismatches_and_keys_with_quotes(api: Api) -> None:
    spec = with_changes(
        inline(config(), config(vision={"width": 32}, text={"context_length": 32, "layers": 1}))
    )
    with pytest.raises(InputError) as caught:
        check(parse(ModelChain, spec, "f"), "f")
    said = " ".join(c.message for c in refusal(api, spec))
    assert sum(p.message in said for p in caught.value.problems) == 2, (
        "one by size, one by what must be equal"
    )
    assert "model 'a%s'b\\' is not known" in " ".join(
        c.message for c in refusal(api, with_changes({"spec.stages[0].model": "a%s'b\\"}))
    )


def test_defaults_are_those_of_the_types(api: Api) -> None:
    """And none stands within a list; null counts as not given."""
    chain = with_changes(
        {"spec.suspend": None, "spec.recipe.microBatchSize": None, "spec.storage": None}
    )
    made = run(api.request("POST", CHAINS.format("default"), chain, {"dryRun": "All"}))
    filled = ModelChain.model_validate(made).spec
    assert filled == ModelChain.model_validate(with_changes({})).spec
    assert filled.runner.model_dump(exclude_none=True) == {"kind": "PyTorchJob"}
    assert made["spec"]["stages"] == chain["spec"]["stages"]
    distillation = {"alpha": "500", "convention": "Released"}
    assert made["spec"]["transfer"] == {
        "width": "Insert",
        "depth": "Duplicate",
        "distillation": distillation,
    }
    assert made["status"] == {"observedGeneration": -1}


def kubectl_refuses(cluster: Cluster, namespace: str, value: Any, *command: str) -> str:
    with pytest.raises(KubectlError) as caught:
        cluster.kubectl(
            *(command or ("apply", "-f", "-")), f"--namespace={namespace}", input=json.dumps(value)
        )
    return str(caught.value)


def test_kubectl_refuses_a_misspelled_field(cluster: Cluster, namespace: str) -> None:
    said = kubectl_refuses(cluster, namespace, with_changes({"spec.recipe.learningrate": "1e-3"}))
    assert 'strict decoding error: unknown field "spec.recipe.learningrate"' in said


def test_storage_cannot_change(cluster: Cluster, namespace: str) -> None:
    def apply(changes: dict[str, Any]) -> None:
        cluster.kubectl(
            "apply", "-f", "-", f"--namespace={namespace}", input=json.dumps(with_changes(changes))
        )

    template = {"spec.storage": {"claimTemplate": {"size": "1Gi"}}}
    apply({})
    apply(template)
    apply(
        {"spec.storage": {"claimTemplate": {"size": "1Gi"}, "retain": False}, "spec.recipe.seed": 1}
    )
    for storage in ({"claimTemplate": {"size": "2Gi"}}, {"claimName": "c"}, DELETE):
        changed = with_changes({"spec.storage": storage} if storage is not DELETE else {})
        said = kubectl_refuses(cluster, namespace, changed)
        assert "spec.storage: Invalid value" in said and messages.STORAGE in said


def test_a_status_comes_back_as_it_was_written(api: Api, namespace: str) -> None:
    path = CHAINS.format(namespace)
    made = run(api.request("POST", path, with_changes({})))
    stage = StageStatus(name="vit-t", macs=10**24, results={"top1": "31.8"})
    status = ChainStatus(observed_generation=1, stages=[stage]).model_dump(
        mode="json", by_alias=True
    )
    assert status["stages"][0]["cache"] is None
    run(
        api.request(
            "PUT", f"{path}/family/status", made | {"status": status}, {"fieldValidation": "Strict"}
        )
    )
    kept = run(api.request("GET", f"{path}/family"))["status"]
    assert kept == status and kept["stages"][0]["cache"] is None
    assert ChainStatus.model_validate_json(json.dumps(kept)).stages[0].macs == int(1e24)


CLAIM = "8f4b1f0e"
NAME = stage_artifact_name(CLAIM, "a" * 64)


def stage_artifact() -> dict[str, Any]:
    spec = StageArtifactSpec(
        chain="family",
        stage="vit-t",
        model="ViT-T-16",
        input_digest="a" * 64,
        artifact_digest="b" * 64,
        manifest_digest="c" * 64,
        path="a" * 64 + "/artifact",
        claim_name="family-artifacts",
        claim_uid=CLAIM,
        image=IMAGE,
        epochs=32,
        inputs={"epochs": 32, "data": {"shards": ["a.tar"]}},
        steps=100,
        macs=15 * 10**23,
        seconds=12.5,
        gpu_seconds=100,
        metrics={"top1": "31.80"},
        accuracy="31.80",
        attempt="family-vit-t-a1",
        finished_at="2026-01-02T03:04:05Z",
    )
    whole = StageArtifact(metadata={"name": NAME}, spec=spec)
    return whole.model_dump(mode="json", by_alias=True, exclude_none=True)


def test_a_stage_artifact_never_changes(cluster: Cluster, namespace: str) -> None:
    artifact = stage_artifact()
    cluster.kubectl("create", "-f", "-", f"--namespace={namespace}", input=json.dumps(artifact))
    name = artifact["metadata"]["name"]
    kept = json.loads(
        cluster.kubectl("get", "sart", name, "-o", "json", f"--namespace={namespace}")
    )
    read = StageArtifact.model_validate(kept)
    assert read.spec.macs == 1.5e24 and read.spec.inputs == artifact["spec"]["inputs"]
    for path, value in (
        ("spec.epochs", 31),
        ("spec.inputs.epochs", 31),
        ("spec.cost", "1.00"),
        ("spec.metrics", {}),
    ):
        said = kubectl_refuses(
            cluster, namespace, with_changes({path: value}, kept), "replace", "-f", "-"
        )
        assert messages.ARTIFACT.format(name=name) in said
    cluster.kubectl("annotate", "sart", name, "note=this may change", f"--namespace={namespace}")


def later(value: str) -> dict[str, Any]:
    return {"metrics": {"food": value}, "measuredAt": "2026-01-02T03:04:05Z", "image": "i"}


def test_metrics_are_added_to_a_stage_artifact_and_never_changed(
    cluster: Cluster, namespace: str
) -> None:
    artifact = stage_artifact()
    cluster.kubectl("create", "-f", "-", f"--namespace={namespace}", input=json.dumps(artifact))
    name = artifact["metadata"]["name"]

    def patch(metrics: dict[str, Any] | None) -> tuple[str, ...]:
        body = json.dumps({"status": {"metrics": metrics}})
        return "patch", "sart", name, "--subresource=status", "--type=merge", "-p", body

    first, second = "a" * 16, "b" * 16
    for key, value in ((first, "61.00"), (second, "7.00")):
        cluster.kubectl(*patch({key: later(value)}), f"--namespace={namespace}")
    kept = json.loads(
        cluster.kubectl("get", "sart", name, "-o", "json", f"--namespace={namespace}")
    )
    read = StageArtifact.model_validate(kept)
    assert read.status is not None and list(read.status.metrics) == [first, second]
    assert read.spec.metrics == {"top1": "31.80"}
    for wrong in ({first: later("62.00")}, {first: None}, None, {first: {"image": "j"}}):
        said = kubectl_refuses(cluster, namespace, None, *patch(wrong))
        assert messages.METRICS.format(name=name) in said
    cluster.kubectl(*patch({first: later("61.00")}), f"--namespace={namespace}")


def test_kubectl_get(cluster: Cluster, namespace: str) -> None:
    for value in (with_changes({"spec.runner.queueName": "vision"}), stage_artifact()):
        cluster.kubectl("apply", "-f", "-", f"--namespace={namespace}", input=json.dumps(value))
    ready = {
        **{
            "type": "Ready",
            "status": "False",
            "reason": "InProgress",
            "message": "stage vit-s: running",
        },
        **{"lastTransitionTime": "2026-01-02T03:04:05Z"},
    }
    summary = {"stage": "2/4", "state": "Running", "progress": "43%", "accuracy": "31.80"}
    summary["gate"] = "1 Passed"
    status = {
        "conditions": [ready],
        "summary": summary,
        "total": {"cost": "12.50", "gpuSeconds": 7.5},
    }
    patch = (
        "patch",
        "mchain",
        "family",
        "--subresource=status",
        "--type=merge",
        "-p",
        json.dumps({"status": status}),
    )
    cluster.kubectl(*patch, f"--namespace={namespace}")

    def table(*words: str) -> tuple[str, str]:
        head, row = cluster.kubectl("get", *words, f"--namespace={namespace}").splitlines()
        return " ".join(head.split()), " ".join(row.split())

    short = "NAME STAGE STATE PROGRESS ACCURACY COST"
    head, row = table("mchain")
    assert head == f"{short} AGE" and row.startswith("family 2/4 Running 43% 31.80 12.50 ")
    head, row = table("mchain", "-o", "wide")
    assert head == f"{short} READY REASON GATE QUEUE GPU-SECONDS MESSAGE AGE"
    assert " 12.50 False InProgress 1 Passed vision 7.5 stage vit-s: running " in row
    head, row = table("sart")
    assert head == "NAME CHAIN STAGE MODEL EPOCHS ACCURACY LATER COST AGE"
    assert row.startswith(f"{NAME} family vit-t ViT-T-16 32 31.80 ") and len(row.split()) == 7
    measured = {"metrics": {"a" * 16: later("7.00")}, "accuracy": "7.00"}
    patch = "patch", "sart", NAME, "--subresource=status", "--type=merge", "-p"
    cluster.kubectl(*patch, json.dumps({"status": measured}), f"--namespace={namespace}")
    assert table("sart")[1].startswith(f"{NAME} family vit-t ViT-T-16 32 31.80 7.00 ")
    assert "modelchain.modelchain.dev/family" in cluster.kubectl(
        "get", "ml", "-o", "name", f"--namespace={namespace}"
    )
