"""All that `explain` needs, read with the user's own rights. What they may not read is said, and
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
    Forbidden,
    Kube,
    NotFound,
    Object,
    Resource,
)
from modelchain_operator.runners import kueue
from modelchain_operator.runners.kueue import KueueQueue
from modelchain_operator.runners.registry import RUNNERS
from modelchain_operator.runners.template import CHAIN_UID, ROLE
from modelchain_operator.watch.leader import NAME as LEASE

T = TypeVar("T")


@dataclass(frozen=True)
class Situation:
    """One chain and what is around it. `now`: seconds since the epoch.

    `jobs`: its jobs, of every kind of runner. `verifies`: its verify Jobs. `claims`: by name, None
    for one that is not there. `events`: of its namespace. `leases`: of operators, in all namespaces
    that may be read. `unreadable`: kinds the user may not read.
    """

    chain: Object
    now: float
    jobs: Sequence[Object] = ()
    pods: Sequence[Object] = ()
    verifies: Sequence[Object] = ()
    claims: Mapping[str, Object | None] = field(default_factory=dict)
    events: Sequence[Object] = ()
    leases: Sequence[Object] = ()
    queue: KueueQueue | None = None
    unreadable: tuple[str, ...] = ()

    @property
    def status(self) -> ChainStatus:
        return status_of(self.chain)


async def read(kube: Kube, chain: Object) -> Situation:
    """Read around a chain. Raises any `ApiError` but `Forbidden`."""
    reader = _Reader(kube, chain["metadata"]["namespace"])
    selector = f"{CHAIN_UID}={chain['metadata']['uid']}"
    jobs, pods, verifies, events, leases = await asyncio.gather(
        reader.jobs(f"{selector},{ROLE}=train"),
        reader.list_all(PODS, selector),
        reader.list_all(JOBS, f"{selector},{ROLE}=verify"),
        reader.list_all(EVENTS),
        reader.leases(),
    )
    claims = {name: await reader.get(CLAIMS, name) for name in _claims(chain)}
    name = _queue_name(chain, jobs)
    queue = await reader.queue(name) if name else None
    return Situation(
        chain=chain,
        now=time.time(),
        jobs=jobs,
        pods=pods,
        verifies=verifies,
        claims={name: claim for name, claim in claims.items() if claim is not reader.HIDDEN},
        events=events,
        leases=leases,
        queue=queue,
        unreadable=tuple(sorted(reader.forbidden)),
    )


class _Reader:
    HIDDEN: Object = {"metadata": {}}  # stands for what is there, maybe, and may not be read

    def __init__(self, kube: Kube, namespace: str):
        self.kube, self.namespace = kube, namespace
        self.forbidden: set[str] = set()

    async def list_all(self, resource: Resource, selector: str = "") -> list[Object]:
        """Empty where the kind is not installed."""
        try:
            return await self._allowed(
                resource, self.kube.list(resource, self.namespace, selector), []
            )
        except NotFound:
            return []

    async def jobs(self, selector: str) -> list[Object]:
        """Of every kind of runner."""
        return [
            job
            for runner in RUNNERS.values()
            for job in await self.list_all(runner.resource, selector)
        ]

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

    async def queue(self, name: str) -> KueueQueue:
        for queues, workloads in zip(kueue.LOCAL_QUEUES, kueue.WORKLOADS, strict=True):
            if await self.kube.resource_exists(queues):
                local = await self.get(queues, name)
                return KueueQueue(name, True, local, await self.list_all(workloads))
        return KueueQueue(name)

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
    labelled = [queue for job in jobs if (queue := kueue.queue_of(job))]
    return labelled[-1] if labelled else (chain["spec"].get("runner") or {}).get("queueName")
