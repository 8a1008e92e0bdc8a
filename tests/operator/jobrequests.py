"""Job requests: those of the examples, and generated ones that use every setting of a node pool."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelchain.io.load import load_chain
from modelchain.plan.pools import DEFAULT_POOLS, NodePool
from modelchain_operator.runners.port import JobRequest

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.yaml"))
IMAGE = "registry.example/trainer@sha256:" + "0" * 64
CPU_POOL = NodePool.model_validate({"gpu": "CPU", "gpusPerNode": 0})


def request(**changes: Any) -> JobRequest:
    """A request for one node with eight GPUs, with changes."""
    simple = JobRequest(
        name="vit-b-a1",
        namespace="team",
        chain="vit",
        chain_uid="11111111-2222-3333-4444-555555555555",
        stage="b",
        attempt=1,
        input_digest="ab" * 32,
        pool=DEFAULT_POOLS["a100-80gb"],
        image=IMAGE,
        artifacts_claim="vit-artifacts",
        claim_uid="99999999-8888-7777-6666-555555555555",
        task='{"v": 1, "note": "$(HOME) costs $5"}',
        processes_per_node=8,
        data_claim="cc3m",
    )
    return replace(simple, **changes)


def of_examples() -> list[JobRequest]:
    """The requests that the operator would make for every stage of every example."""
    out = []
    for file in EXAMPLES:
        chain = load_chain(file)
        spec, name = chain.spec, chain.metadata.name
        pool = DEFAULT_POOLS.get(spec.runner.node_pool or "", CPU_POOL)
        for stage in spec.stages:
            out.append(
                request(
                    name=f"{name}-{stage.name}-a1",
                    chain=name,
                    stage=stage.name,
                    pool=pool,
                    nodes=stage.resources.nodes,
                    processes_per_node=pool.processes(stage.resources.processes_per_node),
                    data_claim=spec.data.volume.claim_name,
                    mount_path=spec.data.volume.mount_path,
                )
            )
    return out


def generated(seed: int) -> JobRequest:
    """A random request that may use any setting; equal seeds give equal requests."""
    chance = random.Random(seed)
    optional: dict[str, Any] = {
        "nodeSelector": {"pool": "a100", "example.com/zone": ""},
        "tolerations": [
            {"key": "dedicated", "value": "ml", "effect": "NoExecute", "tolerationSeconds": 60}
        ],
        "cpu": chance.choice([1, "500m", "96"]),
        "memory": chance.choice(["64Gi", "1.5Ti"]),
        "ephemeralStorage": "100Gi",
        "extraResources": {"rdma/hca": 1},
        "env": {"NCCL_DEBUG": "WARN", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"},
        "labels": {"team": "vision"},
        "annotations": {"example.com/note": "a note"},
        "imagePullSecrets": ["registry"],
        "serviceAccountName": "default",
        "schedulerName": "other-scheduler",
        "shmSize": "64Gi",
        "graceSeconds": chance.randint(30, 3600),
        "runAsUser": chance.randint(1, 65535),
        "fsGroup": chance.randint(1, 65535),
        "topology": {chance.choice(["required", "preferred"]): "kubernetes.io/hostname"},
    }
    gpus = chance.choice([0, 1, 4, 8])
    chosen = {
        key: value for key, value in optional.items() if value is not None and chance.random() < 0.5
    }
    pool = NodePool.model_validate(
        {"gpu": "A100" if gpus else "CPU", "gpusPerNode": gpus, **chosen}
    )
    chain, stage, number = (
        "c" * chance.randint(1, 24),
        "s" * chance.randint(1, 16),
        chance.choice([1, 42, 999]),
    )
    claim = chance.choice(["shared", f"{chain}-artifacts"])
    return request(
        name=f"{chain}-{stage}-a{number}",
        chain=chain,
        stage=stage,
        attempt=number,
        pool=pool,
        nodes=chance.choice([1, 2, 4, 256]),
        processes_per_node=pool.processes(None),
        artifacts_claim=claim,
        data_claim=chance.choice([None, "cc3m", claim]),
        mount_path=chance.choice(["/data", "/mnt/data", "/datasets"]),
        task='{"text": "' + chance.choice(["$", "é", "x"]) * chance.choice([1, 30_000]) + '"}',
    )
