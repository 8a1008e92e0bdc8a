"""Values reach the operator's configuration, and a misspelt key is refused by its name."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import pytest
import yaml
from generate import CHART, PoolFile
from pydantic import BaseModel
from rendering import ALL, VALUES, one, rendered, run

from modelchain.io.load import parse
from modelchain.plan.pools import DEFAULT_POOLS, NodePool

POOL = {"gpu": "A100", "gpusPerNode": 8}


def written(name: str) -> PoolFile:
    """The operator's configuration file, as the operator reads it."""
    return parse(
        PoolFile,
        yaml.safe_load(one(rendered(name), "ConfigMap", "-operator")["data"]["config.yaml"]),
        name,
    )


@pytest.mark.parametrize("name", ALL)
def test_the_operator_reads_what_is_rendered(name: str) -> None:
    assert written(name)


def test_nothing_is_lost_on_the_way() -> None:
    full = yaml.safe_load((VALUES / "full.yaml").read_text())
    file = written("full")
    assert file == parse(
        PoolFile, {key: full[key] for key in ("nodePools", "defaults", "progressSeconds")}, "full"
    )
    assert file.node_pools["a100-80gb"].run_as_user == 1000000001
    assert written("namespaced").namespaces == ["vision", "language"]


def test_no_price_and_the_operators_own_pools_unless_named() -> None:
    assert written("default").node_pools == dict(DEFAULT_POOLS)


def test_the_examples_in_the_comments_are_valid() -> None:
    text = (CHART / "values.yaml").read_text()
    block = re.search(r"^nodePools: \{\}\n((?:#   .*\n)+)", text, re.M)
    assert block
    shown = yaml.safe_load("nodePools:\n" + re.sub("^# ", "", block[1], flags=re.M))
    pools = parse(PoolFile, shown, "values.yaml").node_pools
    assert {pool.gpu for pool in pools.values()} == {"A100", "H100", "H200"}
    done = run("--set-json", f"nodePools={json.dumps(shown['nodePools'])}")
    assert done.returncode == 0, done.stderr


def fields(model: type[BaseModel]) -> dict[str, Any]:
    """The names of a type's fields, nested as far as types are ours."""
    found = {}
    for field in model.model_fields.values():
        kinds = [field.annotation, *get_args(field.annotation)]
        kinds += [inner for kind in kinds for inner in get_args(kind)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        found[str(field.alias)] = fields(inner[0]) if inner else None
    return found


def names(schema: dict[str, Any]) -> dict[str, Any] | None:
    while "properties" not in schema:
        inner = schema.get("items") or schema.get("additionalProperties")
        if not isinstance(inner, dict):
            return None
        schema = inner
    assert schema["additionalProperties"] is False
    return {key: names(inner) for key, inner in schema["properties"].items()}


def test_the_schema_has_every_field_of_the_configuration_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    expected = fields(PoolFile)
    assert expected["nodePools"].keys() == {field.alias for field in NodePool.model_fields.values()}
    assert {key: names(schema[key]) for key in expected} == expected


TYPOS: dict[str, dict[str, Any]] = {
    "replcas": {"replcas": 2},
    "repo": {"image": {"repo": "x"}},
    "enable": {"metrics": {"serviceMonitor": {"enable": True}}},
    "matchLabel": {"networkPolicies": {"prometheus": {"podSelector": {"matchLabel": {"a": "b"}}}}},
    "gpuPerNode": {"nodePools": {"mine": POOL | {"gpuPerNode": 8}}},
    "perGPUHour": {
        "nodePools": {
            "mine": POOL | {"price": {"perGPUHour": "1", "currency": "USD", "source": "x"}}
        }
    },
    "nodepool": {"defaults": {"nodepool": "mine"}},
    "effects": {"nodePools": {"mine": POOL | {"tolerations": [{"effects": "NoSchedule"}]}}},
    "1NCCL": {"nodePools": {"mine": POOL | {"env": {"1NCCL": "x"}}}},
    "requiredDuringScheduling": {"affinity": {"nodeAffinity": {"requiredDuringScheduling": {}}}},
    "secretKeyReff": {
        "env": [{"name": "A", "valueFrom": {"secretKeyReff": {"name": "x", "key": "y"}}}]
    },
}


@pytest.mark.parametrize("key", TYPOS)
def test_a_typo_is_refused_by_its_name(key: str) -> None:
    (top, value), *_ = TYPOS[key].items()
    done = run("--set-json", f"{top}={json.dumps(value)}")
    assert done.returncode != 0
    assert f"additional properties '{key}' not allowed" in done.stderr


WRONG = {
    "/nodePools/mine/price/perGpuHour": {
        "nodePools": {"mine": POOL | {"price": {"perGpuHour": 2.5}}}
    },
    "/nodePools/mine": {"nodePools": {"mine": {"gpu": "A100"}}},
    "/nodePools/mine/memory": {"nodePools": {"mine": POOL | {"memory": "900GB"}}},
    "/nodePools/mine/cpu": {"nodePools": {"mine": POOL | {"cpu": "2Gi"}}},
    "/defaults/image": {"defaults": {"image": "registry/trainer:latest"}},
    "defaults.nodePool: their": {"nodePools": {"mine": POOL}, "defaults": {"nodePool": "their"}},
    "defaults.nodePool: mine": {"defaults": {"nodePool": "mine"}},
    "metrics.serviceMonitor.enabled": {
        "metrics": {"enabled": False, "serviceMonitor": {"enabled": True}}
    },
    "/env/0/name": {"env": [{"name": "POD_NAMESPACE", "value": "elsewhere"}]},
    "/image/digest": {"image": {"digest": "1234"}},
    "/progressSeconds": {"progressSeconds": 1},
}


@pytest.mark.parametrize("place", WRONG)
def test_a_wrong_value_is_refused_by_its_place(place: str) -> None:
    settings = [
        word
        for name, value in WRONG[place].items()
        for word in ("--set-json", f"{name}={json.dumps(value)}")
    ]
    done = run(*settings)
    assert done.returncode != 0
    assert place in done.stderr


NULLS = """namespaces image crds logFormat podLabels trainingOperator metrics
    networkPolicies.apiServerPorts
    networkPolicies.prometheus.namespaceSelector podDisruptionBudget.enabled"""


@pytest.mark.parametrize("path", NULLS.split())
def test_null_is_refused_by_its_name(path: str) -> None:
    """Helm removes such a key, and a policy without its ports would open all."""
    done = run("--set", f"{path}=null")
    assert done.returncode != 0
    assert re.search(f"missing propert(y|ies) .*'{path.split('.')[-1]}'", done.stderr), done.stderr


@pytest.mark.parametrize("path", ["crds.annotations", "serviceAccount.annotations"])
def test_no_annotations_may_be_null(path: str) -> None:
    done = run("--set", f"{path}=null")
    assert done.returncode == 0, done.stderr
    assert done.stdout == run().stdout


def test_no_limits_and_the_operators_pools_by_name_may_be_chosen() -> None:
    done = run("--set", "resources.limits=null", "--set", "defaults.nodePool=a100-40gb")
    assert done.returncode == 0, done.stderr
    operator = next(o for o in yaml.safe_load_all(done.stdout) if o and o["kind"] == "Deployment")
    assert "limits" not in operator["spec"]["template"]["spec"]["containers"][0]["resources"]


def test_the_chart_knows_the_operators_own_pools_by_name() -> None:
    done = run("--set", "defaults.nodePool=their")
    assert f"their is not among nodePools: {', '.join(sorted(DEFAULT_POOLS))}" in done.stderr


def test_annotations_of_ours_win() -> None:
    key = "kubectl.kubernetes.io/default-container"
    done = run("--set-json", f"podAnnotations={json.dumps({key: 'other', 'a': 'b'})}")
    operator = next(o for o in yaml.safe_load_all(done.stdout) if o and o["kind"] == "Deployment")
    found = operator["spec"]["template"]["metadata"]["annotations"]
    assert (found[key], found["a"]) == ("operator", "b") and done.stdout.count(f"{key}: ") == 1
