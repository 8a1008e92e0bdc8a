"""Reads all that `explain` needs, with the user's own rights.

`explain` does without the kinds that the user may not read, and names them.
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
from modelchain_operator.runners.template import CHAIN_UID, ROLE, TRAINS
from modelchain_operator.watch.leader import NAME as LEASE

T = TypeVar("T")


@dataclass(frozen=True)
class Situation:
    """One chain, and the objects that it depends on."""

    chain: Object
    # Seconds since the epoch.
    now: float
    # The chain's jobs, of every kind of runner.
    jobs: Sequence[Object] = ()
    pods: Sequence[Object] = ()
    # The Jobs that the operator runs for the chain beside training.
    cpu_jobs: Sequence[Object] = ()
    # By name; None for a claim that does not exist.
    claims: Mapping[str, Object | None] = field(default_factory=dict)
    # All events of the chain's namespace.
    events: Sequence[Object] = ()
    # The Leases of operators, in all namespaces that the user may read.
    leases: Sequence[Object] = ()
    queue: KueueQueue | None = None
    # The kinds that the user may not read.
    unreadable: tuple[str, ...] = ()

    @property
    def status(self) -> ChainStatus:
        return status_of(self.chain)


async def read(kube: Kube, chain: Object) -> Situation:
    """Read what a chain depends on. Raises any `ApiError` but `Forbidden`."""
    reader = _Reader(kube, chain["metadata"]["namespace"])
    selector = f"{CHAIN_UID}={chain['metadata']['uid']}"
    jobs, pods, cpu_jobs, events, leases = await asyncio.gather(
        reader.jobs(f"{selector},{TRAINS}"),
        reader.list_all(PODS, selector),
        reader.list_all(JOBS, f"{selector},{ROLE}!=train,{ROLE}!=baseline"),
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
        cpu_jobs=cpu_jobs,
        claims={name: claim for name, claim in claims.items() if claim is not reader.HIDDEN},
        events=events,
        leases=leases,
        queue=queue,
        unreadable=tuple(sorted(reader.forbidden)),
    )


class _Reader:
    # Stands for an object that the user may not read, so that it may or may not exist.
    HIDDEN: Object = {"metadata": {}}

    def __init__(self, kube: Kube, namespace: str):
        self.kube, self.namespace = kube, namespace
        self.forbidden: set[str] = set()

    async def list_all(self, resource: Resource, selector: str = "") -> list[Object]:
        """All objects of a kind in the namespace; none if the kind is not installed."""
        try:
            return await self._allowed(
                resource, self.kube.list(resource, self.namespace, selector), []
            )
        except NotFound:
            return []

    async def jobs(self, selector: str) -> list[Object]:
        """The jobs of every kind of runner."""
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
        """The Leases of operators in all namespaces.

        If the user may not list those, only one in the chain's own namespace is found.
        """
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
        """The result of a read. If it is forbidden: `otherwise`, and the kind is noted."""
        try:
            return await reading
        except Forbidden:
            self.forbidden.add(resource.plural)
            return otherwise


def _claims(chain: Object) -> list[str]:
    """The names of the chain's claims, for data and for artifacts."""
    spec: dict[str, Any] = chain["spec"]
    storage = spec.get("storage") or {}
    data = ((spec.get("data") or {}).get("volume") or {}).get("claimName")
    own = f"{chain['metadata']['name']}-artifacts" if storage else None
    return sorted({name for name in (data, storage.get("claimName") or own) if name})


def _queue_name(chain: Object, jobs: Sequence[Object]) -> str | None:
    """The queue in which the newest job was put, else the one that the chain asks for."""
    labelled = [queue for job in jobs if (queue := kueue.queue_of(job))]
    return labelled[-1] if labelled else (chain["spec"].get("runner") or {}).get("queueName")
