"""The operator's configuration file: it is checked strictly, and the operator works without one."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelchain.errors import InputError
from modelchain.io.load import load_model, parse
from modelchain.plan.pools import DEFAULT_POOLS, NodePool, PoolFile
from modelchain.plan.prices import milliseconds

SAMPLE = Path(__file__).parents[2] / "examples" / "operator" / "config.yaml"
GPU: dict[str, Any] = {"gpu": "A100", "gpusPerNode": 8}


def priced(currency: str) -> dict[str, Any]:
    return GPU | {"price": {"perGpuHour": "1", "currency": currency, "source": "a contract"}}


def dated(valid_from: str = "2026-01-01", **more: Any) -> dict[str, Any]:
    price = {"perGpuHour": "1", "currency": "USD", "source": "a contract"}
    return price | {"validFrom": valid_from} | more


def pool_file(**pool: Any) -> PoolFile:
    return parse(PoolFile, {"nodePools": {"mine": GPU | pool}}, "operator.yaml")


def test_the_default_pools_take_any_node_with_the_gpus() -> None:
    for pool in (DEFAULT_POOLS["a100-40gb"], DEFAULT_POOLS["a100-80gb"]):
        assert not pool.node_selector
        assert [t.model_dump(exclude_none=True) for t in pool.pod_tolerations] == [
            {"key": "nvidia.com/gpu", "operator": "Exists"}
        ]
    assert PoolFile.model_validate({}).node_pools == dict(DEFAULT_POOLS)


def test_the_sample_loads_and_its_pools_can_be_named() -> None:
    file = load_model(PoolFile, SAMPLE)
    for name in ("a100-80gb", "cpu"):
        assert file.pool(name) is file.node_pools[name]
    assert file.pool(None) is file.node_pools[file.defaults.node_pool or ""]


def test_the_sample_needs_nothing_of_a_site_and_shows_every_key_of_a_pool() -> None:
    text = SAMPLE.read_text()
    pool = yaml.safe_load(text)["nodePools"]["a100-80gb"]
    assert set(pool) == {
        "gpu",
        "gpusPerNode",
        "gpuResource",
        "tolerations",
        "shmSize",
        "env",
        "graceSeconds",
        "fsGroup",
    }
    shown = yaml.safe_load(re.sub(r"^    # (\w+: )", r"    \1", text, flags=re.M))
    parse(PoolFile, shown, "config.yaml")
    assert set(shown["nodePools"]["a100-80gb"]) == {
        field.alias for field in NodePool.model_fields.values()
    }


def test_a_cpu_pool_asks_for_no_gpu() -> None:
    pool = NodePool.model_validate({"gpu": "CPU", "gpusPerNode": 0, "cpu": 2})
    assert (pool.processes(None), pool.processes(3), pool.cpu, pool.pod_tolerations) == (
        1,
        3,
        "2",
        [],
    )


def test_there_is_one_process_per_gpu_by_default() -> None:
    pool = NodePool.model_validate(GPU)
    assert (pool.processes(None), pool.processes(2)) == (8, 2)
    with pytest.raises(InputError, match="9 is more than the 8 GPUs"):
        pool.processes(9)


def test_the_tolerated_taint_is_that_of_the_gpu_resource() -> None:
    amd = NodePool.model_validate(GPU | {"gpuResource": "amd.com/gpu"})
    none = NodePool.model_validate(GPU | {"tolerations": []})
    assert [t.key for t in amd.pod_tolerations] == ["amd.com/gpu"]
    assert none.pod_tolerations == []


def test_the_error_for_an_unknown_pool_names_the_pools() -> None:
    with pytest.raises(InputError, match=r"v100 is no node pool .* it has mine"):
        pool_file().pool("v100")
    with pytest.raises(InputError, match="name one of"):
        pool_file().pool(None)


def test_a_date_needs_no_quotes_and_a_price_without_one_holds_before_it(tmp_path: Path) -> None:
    """YAML reads `2026-07-01` as a date of its own."""
    file = tmp_path / "pools.yaml"
    file.write_text("""
nodePools:
  a:
    gpu: A100
    gpusPerNode: 8
    capacityLabel: karpenter.sh/capacity-type
    price: {perGpuHour: "4", currency: EUR, source: before}
    prices:
    - {validFrom: 2026-07-01, perGpuHour: "3", currency: EUR, source: from July}
    - validFrom: 2026-07-01T12:00:00Z
      perGpuHour: "1"
      capacity: Spot
      currency: EUR
      source: spot
""")
    pools = load_model(PoolFile, file)
    july = milliseconds(datetime(2026, 7, 1, tzinfo=UTC).timestamp())
    prices, noon = pools.node_pools["a"].price_list, july + 12 * 3_600_000
    found = [prices.at(when, "Spot") for when in (july - 1, july, noon)]
    assert [price.source for price in found if price] == ["before", "from July", "spot"]
    assert pools.currency == "EUR" and PoolFile().currency == ""


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown setting": ({"progresSeconds": 5}, "unknown field"),
    "unknown key of a pool": ({"nodePools": {"a": GPU | {"gpus": 8}}}, "unknown field"),
    "no pools": ({"nodePools": {}}, "nodePools"),
    "default that is none": (
        {"nodePools": {"a": GPU}, "defaults": {"nodePool": "b"}},
        "b is not among nodePools",
    ),
    "image by tag": ({"defaults": {"image": "trainer:latest"}}, "sha256"),
    "our label": (
        {"nodePools": {"a": GPU | {"labels": {"modelchain.dev/chain": "x"}}}},
        "set by the operator",
    ),
    "our variable": (
        {"nodePools": {"a": GPU | {"env": {"MODELCHAIN_TASK": "x"}}}},
        "set by the operator",
    ),
    "two topologies": (
        {"nodePools": {"a": GPU | {"topology": {"required": "r", "preferred": "p"}}}},
        "exactly one",
    ),
    "value of Exists": (
        {
            "nodePools": {
                "a": GPU | {"tolerations": [{"key": "k", "operator": "Exists", "value": "v"}]}
            }
        },
        "no value",
    ),
    "any taint": ({"nodePools": {"a": GPU | {"tolerations": [{}]}}}, "give a key"),
    "for how long": (
        {"nodePools": {"a": GPU | {"tolerations": [{"key": "k", "tolerationSeconds": 1}]}}},
        "NoExecute",
    ),
    "root": ({"nodePools": {"a": GPU | {"runAsUser": 0}}}, "runAsUser"),
    "no time to save": ({"nodePools": {"a": GPU | {"graceSeconds": 10}}}, "graceSeconds"),
    "two currencies": (
        {"nodePools": {"a": priced("USD"), "b": priced("EUR"), "c": GPU}},
        "in EUR and USD; give",
    ),
    "two currencies in one list": (
        {"nodePools": {"a": GPU | {"prices": [dated(), dated("2026-02-01", currency="EUR")]}}},
        "in EUR and USD; give",
    ),
    "two prices at once": (
        {"nodePools": {"a": GPU | {"prices": [dated("2026-01-01"), dated("2026-01-01T00:00Z")]}}},
        "equal validFrom",
    ),
    "no time": ({"nodePools": {"a": GPU | {"prices": [dated("2026-13-01")]}}}, "is no time; write"),
    "a price without a label": (
        {"nodePools": {"a": GPU | {"prices": [dated(capacity="Spot")]}}},
        "needs capacityLabel",
    ),
    "no quantity": ({"nodePools": {"a": GPU | {"memory": "lots"}}}, "memory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(name: str) -> None:
    value, message = BAD[name]
    with pytest.raises(InputError, match=message):
        parse(PoolFile, value, "operator.yaml")
