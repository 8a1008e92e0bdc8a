"""The CRDs are current and small, and keep the rules of kube-api-linter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from modelchain.api.spec import ChainSpec
from modelchain.cel import FIRST_TO_LAST, literal, quoted, sentence
from modelchain.cli.crds import rendered
from modelchain.crd import definitions
from modelchain.crd.schema import nodes

CRDS = Path(__file__).parents[2] / "crds"
DEFINITIONS = definitions()


def schema(name: str) -> dict[str, Any]:
    [version] = DEFINITIONS[name]["spec"]["versions"]
    return dict(version["schema"]["openAPIV3Schema"])


NODES = [
    pytest.param(path, node, id=f"{name}:{path}")
    for name in DEFINITIONS
    for path, node in nodes(schema(name))
    if path.startswith(("spec", "status"))
]


def test_the_files_are_current() -> None:
    assert {file.name: file.read_text() for file in CRDS.glob("*.yaml")} == rendered(), (
        "run `make crds`"
    )


@pytest.mark.parametrize("name", DEFINITIONS)
def test_each_crd_fits_the_annotation_of_plain_kubectl_apply(name: str) -> None:
    """kubectl writes the object as JSON into one annotation. All annotations of an object may take
    256 KiB together. The file itself, which people read and diff, stays below 200 KB.
    """
    assert len(rendered()[name].encode()) < 200_000
    assert len(json.dumps(DEFINITIONS[name])) < 200_000


@pytest.mark.parametrize(("path", "node"), NODES)
def test_everything_is_bounded(path: str, node: dict[str, Any]) -> None:
    match node.get("type"):
        case "string":
            assert "maxLength" in node or "enum" in node
        case "array":
            assert "maxItems" in node
        case "integer":
            assert node["format"] == "int64" and "maximum" in node
        case "object":
            assert "properties" in node or "maxProperties" in node or path.endswith("inputs")
        case kind:
            assert kind in ("boolean", "number")
    assert len(node.get("description", "")) < 160


@pytest.mark.parametrize(("path", "node"), NODES)
def test_no_default_within_a_list(path: str, node: dict[str, Any]) -> None:
    """Argo CD compares whole lists, so a default inside a list would always be a difference."""
    assert "default" not in node or not (
        "[]" in path or (path.startswith("status") and path != "status")
    )


def test_macs_are_numbers() -> None:
    found = [
        node["type"]
        for name in DEFINITIONS
        for path, node in nodes(schema(name))
        if path.endswith("macs")
    ]
    assert len(found) >= 4 and set(found) == {"number"}


def test_lists_that_others_patch_are_keyed() -> None:
    places = dict(nodes(schema("modelchains.yaml")))
    keys = {
        path: node["x-kubernetes-list-map-keys"]
        for path, node in places.items()
        if "x-kubernetes-list-type" in node
    }
    assert keys == {
        "spec.stages": ["name"],
        "spec.evaluation": ["name"],
        "status.conditions": ["type"],
    }
    assert places["status"]["default"] == {"observedGeneration": -1}


def test_every_rule_has_a_short_message() -> None:
    rules = [
        rule
        for name in DEFINITIONS
        for _, n in nodes(schema(name))
        for rule in n.get("x-kubernetes-validations", [])
    ]
    assert len(rules) > 50
    for rule in rules:
        assert 10 < len(rule["message"]) < 400 and "\n" not in rule["message"]


def test_cel_lists_an_index_for_every_possible_stage() -> None:
    [most] = [
        m.max_length for m in ChainSpec.model_fields["stages"].metadata if hasattr(m, "max_length")
    ]
    assert len(re.findall(r"\d+", FIRST_TO_LAST)) == most - 1


def test_cel_literals() -> None:
    assert quoted("it's a\\b") == r"'it\'s a\\b'"
    assert literal({"a": [1, 2.0]}) == "{'a': [1, 2.0]}"
    assert (
        sentence("100% of {b} and '{a}'", a="x", b="1 + 1")
        == r"'100%% of %s and \'%s\''.format([1 + 1, x])"
    )
