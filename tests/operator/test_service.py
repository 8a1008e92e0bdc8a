"""What wakes a chain: resync, artifacts and children; what is forgotten; when we are not alive."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import travel

from modelchain.errors import InputError
from modelchain_operator.__main__ import _check_port
from modelchain_operator.api.kube import (
    ARTIFACTS,
    CHAINS,
    ApiError,
    Forbidden,
    NotFound,
    Resource,
    Unavailable,
)
from modelchain_operator.watch.service import Key, Service

DIGEST = "d" * 64


def chain(
    name: str, finished: bool = False, digest: str | None = None, namespace: str = "ns"
) -> dict[str, Any]:
    conditions = [{"type": "Finished", "status": str(finished)}]
    status = {
        "observedGeneration": 1,
        "conditions": conditions,
        "stages": [{"inputDigest": digest}],
    }
    return {
        "metadata": {"namespace": namespace, "name": name, "generation": 1, "resourceVersion": "1"},
        "status": status,
    }


class World:
    """An API server that only lists chains, and a controller that writes down what it is told."""

    def __init__(self, *chains: dict[str, Any]) -> None:
        self.chains = list(chains)
        self.broken: ApiError | None = None
        self.looks: list[tuple[Key, int]] = []
        self.changed: list[dict[str, Any]] = []
        self.remembered: list[dict[str, Any]] = []

    async def pages(
        self, resource: object, namespace: str | None
    ) -> AsyncIterator[list[dict[str, Any]]]:
        if self.broken:
            raise self.broken
        for chain in self.chains:
            if namespace in (None, chain["metadata"]["namespace"]):
                yield [chain]

    async def resource_exists(self, resource: Resource) -> bool:
        return False

    def wrote(self, obj: dict[str, Any]) -> bool:
        return obj["metadata"].get("resourceVersion") == "2"

    async def reconcile(self, key: Key) -> float | None:
        self.looks.append((key, round(travel.now())))
        return None

    def remember(self, pod: dict[str, Any]) -> None:
        self.remembered.append(pod)

    def artifact_changed(self, record: dict[str, Any]) -> None:
        self.changed.append(record)

    def looks_at(self, name: str) -> int:
        return len([key for key, _ in self.looks if key[1] == name])


def play(world: World, script: Callable[[Service], Awaitable[None]], *namespaces: str) -> None:
    async def main() -> None:
        service = Service(world, world, namespaces, None, "http://localhost:1/")  # type: ignore[arg-type]
        tasks = [asyncio.create_task(service.queue.run()), asyncio.create_task(service._resync())]
        await script(service)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    travel.run(main())


def test_unfinished_chains_are_woken_every_minute_and_all_every_ten() -> None:
    world = World(
        chain("running"), chain("done", finished=True), {"metadata": chain("new")["metadata"]}
    )

    async def script(service: Service) -> None:
        await asyncio.sleep(1200)

    play(world, script)
    assert 20 <= world.looks_at("running") == world.looks_at("new") <= 23
    assert world.looks_at("done") == 2


def test_a_changed_chain_is_unfinished() -> None:
    edited = chain("edited", finished=True)
    edited["metadata"]["generation"] = 2
    world = World(edited)

    async def script(service: Service) -> None:
        await asyncio.sleep(300)

    play(world, script)
    assert world.looks_at("edited") >= 5


def test_a_chain_that_vanished_unseen_is_looked_at_once_more() -> None:
    world = World(chain("a"), chain("b"))

    async def script(service: Service) -> None:
        await asyncio.sleep(5)
        service._on_chain(chain("c"))
        await asyncio.sleep(30)
        world.chains = [chain("b")]
        await asyncio.sleep(600)
        assert set(service.known) == {("ns", "b")}

    play(world, script)
    assert world.looks_at("a") == world.looks_at("c") == 2


def test_an_echo_of_our_own_write_wakes_nobody() -> None:
    world = World()
    done = chain("done", finished=True)

    async def script(service: Service) -> None:
        await asyncio.sleep(5)
        for version in ("2", "3", "2"):
            service._on_chain({**done, "metadata": done["metadata"] | {"resourceVersion": version}})
            await asyncio.sleep(1)
        assert ("ns", "done") in service.known

    play(world, script)
    assert world.looks_at("done") == 1


def test_an_artifact_wakes_those_whose_status_speaks_of_it() -> None:
    world = World(
        chain("waits", True, DIGEST),
        chain("other", True, "e" * 64),
        chain("far", True, DIGEST, namespace="elsewhere"),
    )

    artifact = {"metadata": {"namespace": "ns", "name": f"sa-{DIGEST[:20]}"}}

    async def script(service: Service) -> None:
        await asyncio.sleep(10)
        world.looks.clear()
        service._on_artifact(artifact)
        await asyncio.sleep(10)

    play(world, script)
    assert [key for key, _ in world.looks] == [("ns", "waits")]
    assert world.changed == [artifact]


def test_a_pod_is_remembered_and_wakes_its_chain() -> None:
    world = World()
    pod = {"metadata": {"namespace": "ns", "name": "p", "labels": {"modelchain.dev/chain": "vit"}}}

    async def script(service: Service) -> None:
        service._on_pod(pod)
        await asyncio.sleep(1)

    play(world, script)
    assert world.remembered == [pod]
    assert [key for key, _ in world.looks] == [("ns", "vit")]


def test_only_the_given_namespaces_are_listed() -> None:
    world = World(
        chain("a", namespace="one"), chain("b", namespace="two"), chain("c", namespace="three")
    )

    async def script(service: Service) -> None:
        await asyncio.sleep(10)

    play(world, script, "one", "three")
    assert sorted(key for key, _ in world.looks) == [("one", "a"), ("three", "c")]


def test_without_a_list_for_three_rounds_we_are_not_alive() -> None:
    world = World()

    async def script(service: Service) -> None:
        world.broken = Unavailable("no")
        await asyncio.sleep(170)
        assert service._alive() is None
        await asyncio.sleep(20)
        assert "last listed" in (service._alive() or "")
        world.broken = None
        await asyncio.sleep(60)
        assert service._alive() is None

    play(world, script)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            Forbidden("GET /x: 403 no", code=403),
            "the right to list modelchains in all namespaces is missing (GET",
        ),
        (
            Forbidden("GET /x: 401 no", code=401),
            "refused the operator's credentials (GET /x: 401 no)",
        ),
    ],
)
def test_a_refused_list_is_one_warning_with_a_remedy(
    error: Forbidden, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = World()
    world.broken = error

    async def script(service: Service) -> None:
        await asyncio.sleep(10)

    play(world, script)
    assert [
        said in r.getMessage()
        for r in caplog.records
        if r.name == "modelchain_operator.watch.service"
    ] == [True]


def test_without_the_kinds_one_warning_says_how_to_install_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()
    world.broken = NotFound("GET /x: 404 page not found", code=404)

    async def script(service: Service) -> None:
        assert not await service._served(
            {CHAINS: service._on_chain, ARTIFACTS: service._on_artifact}
        )
        await asyncio.sleep(10)

    play(world, script)
    (said,) = [
        r.getMessage() for r in caplog.records if r.name == "modelchain_operator.watch.service"
    ]
    assert (
        "modelchains.modelchain.dev, stageartifacts.modelchain.dev" in said
        and "kubectl apply -f crds/" in said
    )


def test_a_taken_port_is_bad_input() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} .* choose another with --liveness-port"):
            _check_port(port, "GET /healthz", "--liveness-port")
    _check_port(port, "GET /healthz", "--liveness-port")
