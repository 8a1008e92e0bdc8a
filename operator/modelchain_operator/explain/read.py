"""All that `explain` looks at, read with the user's own rights. What they may not read is said, and
done without.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from modelchain.api.status import ChainStatus
from modelchain.io.load import status_of
from modelchain_operator.api.kube import (
    CLAIMS,
    EVENTS,
    JOBS,
    LEASES,
    PODS,
    PYTORCHJOBS,
    Forbidden,
    Kube,
    NotFound,
    Object,
    Resource,
)
from modelchain_operator.runners.pytorchjob import PyTorchJob
from modelchain_operator.runners.template import CHAIN_UID
from modelchain_operator.watch.leader import NAME as LEASE

T = TypeVar("T")

KUEUE = "kueue.x-k8s.io"


@dataclass(frozen=True)
class Queue:
    """Kueue as it is for one chain. `local`: the LocalQueue, None if there is none. `workloads`: of
    its namespace.
    """

    name: str
    installed: bool = False
    local: Object | None = None
    workloads: Sequence[Object] = ()


@dataclass(frozen=True)
class Situation:
    """One chain and what is around it. `now`: seconds since the epoch.

    `jobs`: its PyTorchJobs, None where that kind is not installed. `verifies`: its verify Jobs.
    `claims`: by name, None for one that is not there. `events`: of its namespace. `leases`: of
    operators, in all namespaces that may be read. `unreadable`: kinds the user may not read.
    """

    chain: Object
    now: float
    jobs: Sequence[Object] | None = ()
    pods: Sequence[Object] = ()
    verifies: Sequence[Object] = ()
    claims: Mapping[str, Object | None] = field(default_factory=dict)
    events: Sequence[Object] = ()
    leases: Sequence[Object] = ()
    queue: Queue | None = None
    unreadable: tuple[str, ...] = ()

    @property
    def status(self) -> ChainStatus:
        return status_of(self.chain)


async def read(kube: Kube, chain: Object) -> Situation:
    """Read around a chain. Raises any `ApiError` but `Forbidden`."""
    reader = _Reader(kube, chain["metadata"]["namespace"])
    selector = f"{CHAIN_UID}={chain['metadata']['uid']}"
    jobs, pods, verifies, events, leases = await asyncio.gather(
        reader.list_all(PYTORCHJOBS, selector),
        reader.list_all(PODS, selector),
        reader.list_all(JOBS, selector),
        reader.list_all(EVENTS),
        reader.leases(),
    )
    claims = {name: await reader.get(CLAIMS, name) for name in _claims(chain)}
    name = _queue_name(chain, jobs or [])
    queue = await reader.queue(name) if name else None
    return Situation(
        chain=chain,
        now=time.time(),
        jobs=jobs,
        pods=pods or [],
        verifies=verifies or [],
        claims={name: claim for name, claim in claims.items() if claim is not reader.HIDDEN},
        events=events or [],
        leases=leases,
        queue=queue,
        unreadable=tuple(sorted(reader.forbidden)),
    )


class _Reader:
    HIDDEN: Object = {"metadata": {}}  # stands for what is there, maybe, and may not be read

    def __init__(self, kube: Kube, namespace: str):
        self.kube, self.namespace = kube, namespace
        self.forbidden: set[str] = set()

    async def list_all(self, resource: Resource, selector: str = "") -> list[Object] | None:
        """None where the kind is not installed."""
        try:
            return await self._allowed(
                resource, self.kube.list(resource, self.namespace, selector), []
            )
        except NotFound:
            return None

    async def get(self, resource: Resource, name: str) -> Object | None:
        try:
            return await self._allowed(
                resource, self.kube.get(resource, self.namespace, name), self.HIDDEN
            )
        except NotFound:
            return None

    async def leases(self) -> list[Object]:
        """Of operators anywhere; else of one in the chain's own namespace."""
        fields = f"metadata.name={LEASE}"
        try:
            return await self.kube.list(LEASES, None, fields=fields)
        except Forbidden:
            return await self._allowed(
                LEASES, self.kube.list(LEASES, self.namespace, fields=fields), []
            )

    async def queue(self, name: str) -> Queue:
        for version in ("v1beta2", "v1beta1"):
            kinds = [Resource(KUEUE, version, plural) for plural in ("localqueues", "workloads")]
            if await self.kube.resource_exists(kinds[0]):
                local, workloads = await self.get(kinds[0], name), await self.list_all(kinds[1])
                return Queue(name, True, local, workloads or [])
        return Queue(name)

    async def _allowed(self, resource: Resource, reading: Awaitable[T], otherwise: T) -> T:
        try:
            return await reading
        except Forbidden:
            self.forbidden.add(resource.plural)
            return otherwise


def _claims(chain: Object) -> list[str]:
    """Of its data and its artifacts."""
    spec: dict[str, Any] = chain["spec"]
    storage = spec.get("storage") or {}
    data = ((spec.get("data") or {}).get("volume") or {}).get("claimName")
    own = f"{chain['metadata']['name']}-artifacts" if storage else None
    return sorted({name for name in (data, storage.get("claimName") or own) if name})


def _queue_name(chain: Object, jobs: Sequence[Object]) -> str | None:
    """As its jobs were labelled, else as the chain asks."""
    labelled = [queue for job in jobs if (queue := PyTorchJob().state(job).queue)]
    return labelled[-1] if labelled else (chain["spec"].get("runner") or {}).get("queueName")
