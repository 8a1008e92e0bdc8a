"""Leader election on a Lease of a small server in memory: one leader, take-over, outages, and
giving the Lease back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import travel

from modelchain_operator.api.kube import AlreadyExists, Conflict, NotFound, Unavailable
from modelchain_operator.watch.leader import Leader


class Server:
    """Stores one Lease with its version."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.writes = 0

    def _keep(self, lease: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        self.writes += 1
        self.lease = deepcopy(lease)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return deepcopy(self.lease)


class Port:
    """One operator's connection to the server, with its faults."""

    def __init__(self, server: Server):
        self.server = server
        self.broken = False
        self.nowhere = False
        self.silent = False
        self.answers_lost = False

    async def _call(self) -> None:
        if self.silent:
            await asyncio.sleep(30)
        if self.broken:
            raise Unavailable("no")

    async def get(self, resource: object, namespace: str, name: str) -> dict[str, Any]:
        await self._call()
        if self.server.lease is None:
            raise NotFound("no")
        return deepcopy(self.server.lease)

    async def create(self, resource: object, lease: dict[str, Any]) -> dict[str, Any]:
        await self._call()
        if self.nowhere:
            raise NotFound("no such namespace")
        if self.server.lease is not None:
            raise AlreadyExists("yes")
        return self.server._keep(lease)

    async def replace(self, resource: object, lease: dict[str, Any]) -> dict[str, Any]:
        await self._call()
        if self.server.lease is None:
            raise NotFound("no")
        if lease["metadata"]["resourceVersion"] != self.server.lease["metadata"]["resourceVersion"]:
            raise Conflict("stale")
        kept = self.server._keep(lease)
        if self.answers_lost:
            raise Unavailable("lost")
        return kept


class World:
    def __init__(self) -> None:
        self.server = Server()
        self.ports: dict[str, Port] = {}
        self.leaders: dict[str, Leader] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.both = False

    def start(self, name: str) -> Port:
        self.ports[name] = Port(self.server)
        self.leaders[name] = Leader(self.ports[name], "ns", name)  # type: ignore[arg-type]
        self.tasks[name] = asyncio.create_task(self.leaders[name].run())
        return self.ports[name]

    async def stop(self, name: str) -> None:
        self.tasks[name].cancel()
        await asyncio.gather(self.tasks[name], return_exceptions=True)

    def leading(self) -> list[str]:
        return [name for name, leader in self.leaders.items() if leader.leading.is_set()]

    async def run(self, seconds: float) -> list[str]:
        """The leaders after so many seconds. There are never two in between."""
        end = travel.now() + seconds
        while travel.now() < end:
            await asyncio.sleep(0.1)
            assert len(self.leading()) < 2
        return self.leading()

    async def until(self, wanted: Callable[[list[str]], bool]) -> float:
        """The seconds until the leaders are as wanted."""
        start = travel.now()
        while not wanted(self.leading()):
            await self.run(0.1)
        return travel.now() - start


def test_without_a_namespace_for_the_lease_it_leads_and_takes_the_lease_later() -> None:
    async def main() -> None:
        world = World()
        port = world.start("a")
        port.nowhere = True
        assert await world.run(30) == ["a"] and world.server.lease is None
        port.nowhere = False
        assert await world.run(10) == ["a"] and world.server.lease is not None

    travel.run(main())


def test_one_leads_and_only_the_leader_renews() -> None:
    async def main() -> None:
        world = World()
        world.start("a")
        world.start("b")
        assert await world.run(60) == ["a"]
        assert 26 <= world.server.writes <= 31
        assert world.server.lease is not None
        assert world.server.lease["spec"]["leaseTransitions"] == 0

    travel.run(main())


def test_a_lease_that_is_given_back_is_taken_over_at_once() -> None:
    async def main() -> None:
        world = World()
        world.start("a")
        world.start("b")
        await world.run(5)
        await world.stop("a")
        assert await world.until(lambda names: names == ["b"]) < 3
        assert world.server.lease is not None
        assert world.server.lease["spec"]["leaseTransitions"] == 2 - 1

    travel.run(main())


def test_a_dead_leader_is_replaced_after_the_duration_of_its_lease() -> None:
    async def main() -> None:
        world = World()
        world.start("a")
        world.start("b")
        await world.run(5)
        world.leaders["a"]._written = None  # so that nothing is given back
        await world.stop("a")
        assert 12 < await world.until(lambda names: names == ["b"]) < 21

    travel.run(main())


def test_without_answers_leadership_ends_before_another_operator_may_lead() -> None:
    async def main() -> None:
        for fault in ("broken", "silent"):
            world = World()
            port = world.start("a")
            world.start("b")
            await world.run(5)
            setattr(port, fault, True)
            assert 7 < await world.until(lambda names: not names) <= 10.1
            assert await world.until(lambda names: names == ["b"]) < 12
            setattr(port, fault, False)
            assert await world.run(60) == ["b"]

    travel.run(main())


def test_a_short_outage_keeps_the_leader() -> None:
    async def main() -> None:
        world = World()
        port = world.start("a")
        await world.run(5)
        for fault in ("broken", "answers_lost"):
            setattr(port, fault, True)
            assert await world.run(6) == ["a"]
            setattr(port, fault, False)
            assert await world.run(6) == ["a"]

    travel.run(main())


def test_a_deleted_lease_is_created_again() -> None:
    async def main() -> None:
        world = World()
        world.start("a")
        await world.run(5)
        world.server.lease = None
        assert await world.run(5) == ["a"]
        assert world.server.lease is not None

    travel.run(main())


def test_a_stolen_lease_ends_leadership_until_it_expires() -> None:
    async def main() -> None:
        world = World()
        world.start("a")
        await world.run(5)
        assert world.server.lease is not None
        world.server._keep(
            {**world.server.lease, "spec": {"holderIdentity": "x", "leaseDurationSeconds": 15}}
        )
        assert await world.until(lambda names: not names) < 3
        assert 12 < await world.until(lambda names: names == ["a"]) < 21

    travel.run(main())
