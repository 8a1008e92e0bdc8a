"""Chains on an API server in memory, reconciled by the real controller, and jobs that end on
command.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import podshapes
from memorykube import IMAGE, MemoryKube
from specs import config, inline, with_changes

from modelchain.api.contracts import LastWord
from modelchain.api.status import ChainStatus, StageStatus
from modelchain.io.load import status_of
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import ARTIFACTS, CHAINS, CLAIMS, PODS, ApiError, Object, Resource
from modelchain_operator.reconcile.controller import Controller
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS

NAMESPACE = "team"
POOLS = PoolFile.model_validate({"nodePools": {"cpu": {"gpu": "CPU", "gpusPerNode": 0}}})


class Events:
    """The events that the operator has posted: type, reason and message."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, str]] = []

    def tell(self, chain: Object, kind: str, reason: str, message: str) -> None:
        self.told.append((kind, str(reason), message))


class Lab:
    """One namespace and one operator."""

    def __init__(self, pools: PoolFile = POOLS) -> None:
        self.statuses: list[Object] = []
        self.kube, self.events, self.now = MemoryKube(self.statuses.append), Events(), podshapes.T0
        self.pools = pools
        self.restart()
        self.claim("data")

    def restart(self) -> None:
        """Another operator takes over. It remembers nothing."""
        api: Any = self.kube
        events: Any = self.events
        self.controller = Controller(api, events, self.pools, clock=lambda: self.now)

    # Objects.

    def claim(self, name: str, uid: str = "") -> Object:
        meta = {"name": name, "namespace": NAMESPACE, "uid": uid or f"{name}-uid", "labels": {}}
        if name.endswith("-artifacts"):
            meta["labels"] = {"modelchain.dev/chain": name.removesuffix("-artifacts")}
        return self.kube.put(CLAIMS, {"metadata": meta})

    def apply(self, name: str = "family", stages: str = "a", uid: str = "", **changes: Any) -> None:
        """Create or edit a chain with tiny models, one stage a letter."""
        shapes = (config(vision={"layers": 2 + i}) for i in range(len(stages)))
        known = self.kube.objects.get((CHAINS.plural, name))
        generation = known["metadata"]["generation"] + 1 if known and not uid else 1
        meta = {
            "name": name,
            "namespace": NAMESPACE,
            "uid": uid or f"{name}-chain",
            "generation": generation,
        }
        body = with_changes(
            {
                **inline(*shapes),
                "metadata": meta,
                "spec.runner": {"image": IMAGE, "nodePool": "cpu"},
                "spec.storage": {"claimTemplate": {"size": "1Gi"}},
                "spec.data.volume": {"claimName": "data"},
                **changes,
            }
        )
        status = known.get("status", {}) if known and not uid else {}
        self.kube.put(CHAINS, body | {"status": status})

    def get(self, resource: Resource, name: str) -> Object:
        return self.kube.objects[resource.plural, name]

    def names(self, resource: Resource) -> list[str]:
        return sorted(name for plural, name in self.kube.objects if plural == resource.plural)

    def drop(self, resource: Resource, name: str) -> Object:
        """Delete an object without the operator."""
        return self.kube.objects.pop((resource.plural, name))

    def records(self) -> list[Object]:
        return [self.get(ARTIFACTS, name) for name in self.names(ARTIFACTS)]

    # What happens.

    def passes(self, name: str = "family", count: int = 1) -> None:
        """Passes over a chain. Those that the API server refuses something end early."""
        for _ in range(count):
            with suppress(ApiError):
                asyncio.run(self.controller.reconcile((NAMESPACE, name)))

    def end(self, job: str, word: LastWord | None = None, *, code: int = 0) -> None:
        """The job's only pod ends with this last word, or without one."""
        made = self.get(PYTORCHJOBS, job)
        template = made["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["metadata"]
        said = word.model_dump_json(by_alias=True, exclude_none=True) if word else ""
        began, self.now = self.now - podshapes.T0, self.now + 100
        pod = podshapes.ended(
            code=code, message=said, created=began, start=began + 10, end=began + 90
        )
        meta = pod["metadata"] | {"name": f"{job}-master-0", "uid": f"{job}-pod-{began}"}
        meta["labels"] = meta["labels"] | template["labels"]
        meta["annotations"] = meta["annotations"] | template["annotations"]
        owner = {"kind": "PyTorchJob", "name": job, "uid": made["metadata"]["uid"]}
        meta["ownerReferences"] = [owner | {"controller": True}]
        self.kube.put(PODS, pod | {"kind": "Pod", "metadata": meta})
        result = "Failed" if code else "Succeeded"
        status = {"conditions": [{"type": result, "status": "True", "message": result}]}
        self.kube.put(PYTORCHJOBS, made | {"status": status})

    def finish(self, job: str) -> None:
        """The job's trainer leaves an artifact."""
        self.end(job, success(), code=0)

    # What the status says.

    def status(self, name: str = "family") -> ChainStatus:
        return status_of(self.get(CHAINS, name))

    def stage(self, name: str = "family", index: int = 0) -> StageStatus:
        return self.status(name).stages[index]


def success() -> LastWord:
    return LastWord(
        result="Succeeded",
        manifest_digest="a" * 64,
        artifact_digest="b" * 64,
        step=10,
        steps=10,
        macs=1000,
    )
