"""What starts a pass of a chain: resync, artifacts, claims, pods and edits. Also what the service
forgets, and when its liveness check fails.
"""

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
    CLAIMS,
    ApiError,
    Forbidden,
    Gone,
    NotFound,
    Resource,
    Throttled,
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
    """An API server that only lists chains and claims, and a controller that records its calls."""

    def __init__(self, *chains: dict[str, Any]) -> None:
        self.chains = list(chains)
        # The UIDs of claims by namespace and name.
        self.claims: dict[Key, str] = {}
        self.broken: ApiError | None = None
        # A LIST of these kinds is not permitted.
        self.forbidden: set[Resource] = set()
        self.passes: list[tuple[Key, int]] = []
        self.changed: list[dict[str, Any]] = []
        self.changed_claims: list[Key] = []
        self.known_claims: dict[Key, str] = {}
        self.remembered: list[dict[str, Any]] = []

    async def pages(
        self, resource: Resource, namespace: str | None
    ) -> AsyncIterator[list[dict[str, Any]]]:
        if self.broken:
            raise self.broken
        if resource in self.forbidden:
            raise Forbidden("GET /x: 403 no", code=403)
        claims = [
            {"metadata": {"namespace": space, "name": name, "uid": uid}}
            for (space, name), uid in self.claims.items()
        ]
        for thing in self.chains if resource is CHAINS else claims:
            if namespace in (None, thing["metadata"]["namespace"]):
                yield [thing]

    async def resource_exists(self, resource: Resource) -> bool:
        return False

    def wrote(self, obj: dict[str, Any]) -> bool:
        return obj["metadata"].get("resourceVersion") == "2"

    async def reconcile(self, key: Key) -> float | None:
        self.passes.append((key, round(travel.now())))
        return None

    def remember(self, pod: dict[str, Any]) -> bool:
        self.remembered.append(pod)
        return pod.get("news", False)

    def artifact_changed(self, record: dict[str, Any]) -> None:
        self.changed.append(record)

    def claim_changed(self, claim: Key, uid: str | None) -> bool:
        """A pass has read the claims as they are in `known_claims`."""
        changed = uid is None or self.known_claims.get(claim, uid) != uid
        if changed:
            self.changed_claims.append(claim)
        return changed

    def passes_of(self, name: str) -> int:
        return len([key for key, _ in self.passes if key[1] == name])


def play(world: World, script: Callable[[Service], Awaitable[None]], *namespaces: str) -> None:
    async def main() -> None:
        service = Service(world, world, namespaces, None, "http://localhost:1/")  # type: ignore[arg-type]
        tasks = [asyncio.create_task(service.queue.run()), asyncio.create_task(service._resync())]
        await script(service)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    travel.run(main())


def test_unfinished_chains_have_a_pass_every_minute_and_all_every_ten() -> None:
    world = World(
        chain("running"), chain("done", finished=True), {"metadata": chain("new")["metadata"]}
    )

    async def script(service: Service) -> None:
        await asyncio.sleep(1200)

    play(world, script)
    assert 20 <= world.passes_of("running") == world.passes_of("new") <= 23
    assert world.passes_of("done") == 2


def test_a_finished_chain_that_was_edited_is_unfinished() -> None:
    edited = chain("edited", finished=True)
    edited["metadata"]["generation"] = 2
    world = World(edited)

    async def script(service: Service) -> None:
        await asyncio.sleep(300)

    play(world, script)
    assert world.passes_of("edited") >= 5


def test_a_chain_that_vanished_unseen_has_one_more_pass() -> None:
    world = World(chain("a"), chain("b"))

    async def script(service: Service) -> None:
        await asyncio.sleep(5)
        service._on_chain(chain("c"))
        await asyncio.sleep(30)
        world.chains = [chain("b")]
        await asyncio.sleep(600)
        assert set(service.known) == {("ns", "b")}

    play(world, script)
    assert world.passes_of("a") == world.passes_of("c") == 2


def test_an_event_of_our_own_write_starts_no_pass() -> None:
    world = World()
    done = chain("done", finished=True)

    async def script(service: Service) -> None:
        await asyncio.sleep(5)
        for version in ("2", "3", "2"):
            service._on_chain({**done, "metadata": done["metadata"] | {"resourceVersion": version}})
            await asyncio.sleep(1)
        assert ("ns", "done") in service.known

    play(world, script)
    assert world.passes_of("done") == 1


def test_an_artifact_starts_a_pass_of_the_chains_whose_status_names_its_digest() -> None:
    world = World(
        chain("waits", True, DIGEST),
        chain("other", True, "e" * 64),
        chain("far", True, DIGEST, namespace="elsewhere"),
    )

    artifact = {"metadata": {"namespace": "ns", "name": "sa-0"}, "spec": {"inputDigest": DIGEST}}

    async def script(service: Service) -> None:
        await asyncio.sleep(10)
        world.passes.clear()
        service._on_artifact(artifact)
        await asyncio.sleep(10)

    play(world, script)
    assert [key for key, _ in world.passes] == [("ns", "waits")]
    assert world.changed == [artifact]


def test_a_pod_is_remembered_and_starts_a_pass_of_its_chain() -> None:
    world = World()
    pod = {"metadata": {"namespace": "ns", "name": "p", "labels": {"modelchain.dev/chain": "vit"}}}

    async def script(service: Service) -> None:
        service._on_pod(pod)
        await asyncio.sleep(1)

    play(world, script)
    assert world.remembered == [pod]
    assert [key for key, _ in world.passes] == [("ns", "vit")]


@pytest.mark.parametrize(
    ("kind", "role", "more", "woken"),
    [
        ("pod", "index", {"news": True}, True),
        ("pod", "index", {"news": False}, False),
        ("pod", "train", {"news": False}, True),
        ("job", "verify", {}, False),
        ("job", "verify", {"status": {"conditions": [{"type": "Failed", "status": "True"}]}}, True),
        (
            "job",
            "index",
            {"status": {"conditions": [{"type": "Complete", "status": "True"}]}},
            False,
        ),
        ("job", "train", {}, True),
    ],
)
def test_of_cpu_jobs_only_what_is_news_starts_a_pass(
    kind: str, role: str, more: dict[str, Any], woken: bool
) -> None:
    """Their pods and Jobs are written eight times before they are done."""
    labels = {"modelchain.dev/chain": "vit", "modelchain.dev/role": role}
    part = {"metadata": {"namespace": "ns", "name": "x", "labels": labels}, **more}
    world = World()

    async def script(service: Service) -> None:
        (service._on_pod if kind == "pod" else service._on_job)(part)
        await asyncio.sleep(1)

    play(world, script)
    assert world.passes_of("vit") == woken


def test_only_the_given_namespaces_are_listed() -> None:
    world = World(
        chain("a", namespace="one"), chain("b", namespace="two"), chain("c", namespace="three")
    )

    async def script(service: Service) -> None:
        await asyncio.sleep(10)

    play(world, script, "one", "three")
    assert sorted(key for key, _ in world.passes) == [("one", "a"), ("three", "c")]


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("GET /x: no"),
        Forbidden("GET /x: 401 no", code=401),
        Throttled("GET /x: 429", retry_after=1.0),
        Gone("GET /x: 410"),
        NotFound("GET /x: 404"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_liveness_check_does_not_depend_on_the_api_server(error: ApiError) -> None:
    """A restart would not bring the API server back, and would lose what is remembered."""
    world = World()

    async def script(service: Service) -> None:
        world.broken = error
        for _ in range(60):
            await asyncio.sleep(60)
            assert service._alive() is None

    play(world, script)


def test_the_liveness_check_fails_if_nothing_is_tried() -> None:
    world = World()

    async def hangs(everything: bool) -> None:
        await asyncio.sleep(10_000)

    async def script(service: Service) -> None:
        service._list = hangs  # type: ignore[method-assign]
        await asyncio.sleep(170)
        assert service._alive() is None
        await asyncio.sleep(60)
        assert "last try to list" in (service._alive() or "")

    play(world, script)


# -- claims ----------------------------------------------------------------------------------------


def stored(name: str, claim: str | None = None, **more: Any) -> dict[str, Any]:
    """A complete chain; without a claim's name it has its own."""
    storage = {"claimName": claim} if claim else {"claimTemplate": {"size": "1Gi"}}
    made = chain(name, finished=True, **more) | {"spec": {"storage": storage}}
    made["status"]["conditions"].append({"type": "Complete", "status": "True"})
    return made


@pytest.mark.parametrize("replaced", [False, True])
def test_a_claim_that_is_gone_or_replaced_starts_a_pass_of_complete_chains_within_a_minute(
    replaced: bool,
) -> None:
    world = World(
        stored("own"),
        stored("named", "shared"),
        stored("also", "shared"),
        stored("other", "elsewhere"),
        stored("far", "shared", namespace="far"),
        chain("failed", finished=True),
    )
    world.claims = {("ns", "own-artifacts"): "1", ("ns", "shared"): "2", ("ns", "elsewhere"): "3"}
    world.claims |= {("far", "shared"): "4", ("ns", "of no chain"): "5"}
    world.known_claims = dict(world.claims)

    async def script(service: Service) -> None:
        await asyncio.sleep(70)
        for name in ("own-artifacts", "shared", "of no chain"):
            if replaced:
                world.claims["ns", name] += "again"
            else:
                del world.claims["ns", name]
        world.passes.clear()
        await asyncio.sleep(61)

    play(world, script)
    assert sorted(key[1] for key, _ in world.passes) == ["also", "named", "own"]
    assert sorted(set(world.changed_claims)) == [("ns", "own-artifacts"), ("ns", "shared")]


def test_a_claim_that_was_never_listed_is_missed_as_well() -> None:
    """The chain was completed, and its claim deleted, between two LISTs."""
    world = World()

    async def script(service: Service) -> None:
        await asyncio.sleep(70)
        service._on_chain(stored("quick"))
        await asyncio.sleep(1)
        world.chains.append(stored("quick"))
        world.passes.clear()
        await asyncio.sleep(61)

    play(world, script)
    assert [key[1] for key, _ in world.passes] == ["quick"]


def test_without_the_right_to_list_claims_the_rest_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World(chain("running"))
    world.forbidden = {CLAIMS}

    async def script(service: Service) -> None:
        await asyncio.sleep(130)

    play(world, script)
    assert world.passes_of("running") >= 3
    assert "the right to list persistentvolumeclaims in all namespaces is missing" in caplog.text


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


def test_one_warning_says_how_to_install_missing_kinds(
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
