"""The fault proxy in front of the real API server: what each fault looks like to a client, and what
was committed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from apiclient import Api, ApiError, loop, run
from controlplane import ControlPlane
from faults import Hold, answer, first_of_each, kill, nth_write, request, reset, stale, stall
from proxy import FaultProxy, Watch


class Client:
    """A client of the proxy, in place of an operator."""

    def __init__(self, proxy: FaultProxy, folder: Path, namespace: str):
        self.proxy = proxy
        self.api = Api(proxy.kubeconfig(folder / "kubeconfig", client="a"))
        self.path = f"/api/v1/namespaces/{namespace}/configmaps"
        self.events: list[tuple[str, str]] = []

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return run(self.api.request(method, path, body), timeout=20)

    def create(self, name: str) -> None:
        self.call("POST", self.path, {"metadata": {"name": name}})

    def exists(self, name: str) -> bool:
        with suppress(ApiError):
            return bool(self.call("GET", f"{self.path}/{name}"))
        return False

    def follow(self) -> asyncio.Task[None]:
        """Begin to note the names in watch events."""

        async def note() -> None:
            async for kind, item in self.api.follow(self.path):
                self.events.append((kind, item["metadata"]["name"]))

        async def begin() -> asyncio.Task[None]:
            return asyncio.create_task(note())

        return run(begin())

    def sees(self, kind: str, name: str, seconds: float = 5) -> bool:
        deadline = time.monotonic() + seconds
        while (kind, name) not in self.events and time.monotonic() < deadline:
            time.sleep(0.02)
        return (kind, name) in self.events

    def watch(self) -> Watch:
        deadline = time.monotonic() + 5
        while not self.proxy.open_watches("configmaps"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self.proxy.open_watches("configmaps")[0]


@pytest.fixture
def client(control_plane: ControlPlane, namespace: str, tmp_path: Path) -> Iterator[Client]:
    with FaultProxy(control_plane.kubeconfig) as proxy:
        client = Client(proxy, tmp_path, namespace)
        yield client
        run(client.api.close())


class Victim:
    killed = False

    def kill(self) -> None:
        self.killed = True


def test_without_rules_it_only_counts(client: Client) -> None:
    client.create("a")
    client.call("PATCH", f"{client.path}/a", {"data": {"k": "v"}})
    assert client.call("GET", f"{client.path}/a")["data"] == {"k": "v"}
    assert len(client.call("GET", client.path)["items"]) == 2  # kube-root-ca.crt
    leases = client.path.replace("/api/v1", "/apis/coordination.k8s.io/v1").replace(
        "configmaps", "leases"
    )
    client.call("POST", leases, {"metadata": {"name": "mchain-0123456789abcdef"}})
    client.call("GET", "/version")
    with pytest.raises(ApiError, match="404"):
        client.call("PATCH", f"{leases}/modelchain-operator", {"spec": {}})
    reviews = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    client.call(
        "POST", reviews, {"spec": {"resourceAttributes": {"verb": "get", "resource": "pods"}}}
    )
    assert client.proxy.counts() == {"write": 3, "read": 2, "discovery": 1, "lease": 1, "review": 1}
    assert [
        (r.client, r.verb, r.resource, r.name, r.status, r.write) for r in client.proxy.writes()
    ] == [
        ("a", "create", "configmaps", "a", 201, 1),
        ("a", "patch", "configmaps", "a", 200, 2),
        ("a", "create", "leases", "mchain-0123456789abcdef", 201, 3),
    ]


def test_answers_of_its_own(client: Client) -> None:
    rule = client.proxy.on(request("create", "configmaps"), answer(429, retry_after=7), times=2)
    for _ in range(2):
        with pytest.raises(ApiError, match=r"429.*TooManyRequests"):
            client.create("a")
    client.create("a")
    assert rule.hits == 2

    client.proxy.on(first_of_each(), answer(503), times=None)
    for _ in range(2):
        with suppress(ApiError):
            client.create("b")
        client.exists("b")
    assert [r.status for r in client.proxy.log[-4:]] == [503, 503, 201, 200]
    client.proxy.clear()
    assert client.exists("b")


def test_resets_and_kills_before_and_after_the_commit(client: Client) -> None:
    victims = [Victim() for _ in range(3)]
    faults = [reset(), reset(commit=True), kill(victims[0], "send"), kill(victims[1], "commit")]
    for n, fault in enumerate(faults):
        client.proxy.on(nth_write(n + 1), fault)
        with pytest.raises(aiohttp.ClientError):
            client.create(f"c{n}")
    assert [client.exists(f"c{n}") for n in range(4)] == [False, True, False, True]
    client.proxy.on(nth_write(5), kill(victims[2], "response"))
    client.create("c4")
    assert all(v.killed for v in victims)


def test_a_held_request_goes_through_after_its_sender_has_gone(client: Client) -> None:
    hold = Hold()
    client.proxy.on(request("create", "configmaps"), hold)
    with pytest.raises(TimeoutError):
        body = {"metadata": {"name": "late"}}
        run(asyncio.wait_for(client.api.request("POST", client.path, body), 0.5))
    assert not client.exists("late") and [r.verb for r in hold.held] == ["create"]
    hold.release()
    deadline = time.monotonic() + 5
    while not client.exists("late"):
        assert time.monotonic() < deadline
    client.proxy.on(request("create", "configmaps"), stall(0.5))
    began = time.monotonic()
    client.create("slow")
    assert time.monotonic() - began > 0.5


def test_stale_reads(client: Client) -> None:
    def value() -> str:
        return str(client.call("GET", f"{client.path}/a").get("data", {}).get("k"))

    client.create("a")
    seen = [value()]
    for k in ("1", "2"):
        client.call("PATCH", f"{client.path}/a", {"data": {"k": k}})
        seen.append(value())
    client.proxy.on(request("get", "configmaps"), stale(versions=2))
    assert seen == ["None", "1", "2"] and value() == "None" and value() == "2"


def test_watches_cut_silenced_expired_and_lagging(client: Client) -> None:
    task = client.follow()
    client.watch()
    client.create("a")
    assert client.sees("ADDED", "a")

    for fault in (Watch.cut, Watch.expire):
        broken = client.watch()
        fault(broken)
        deadline = time.monotonic() + 5
        while broken in client.proxy.watches or not client.proxy.open_watches():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    client.watch().silence()
    client.create("b")
    assert not client.sees("ADDED", "b", seconds=0.5)
    client.watch().cut()
    assert client.sees("ADDED", "b")  # by the new list

    client.proxy.drop_event = lambda kind, item: kind == "DELETED"
    client.call("DELETE", f"{client.path}/a")
    client.create("c")
    assert client.sees("ADDED", "c") and ("DELETED", "a") not in client.events
    client.proxy.clear()

    client.proxy.on(request("watch", "configmaps"), answer(410))
    client.watch().cut()
    assert client.sees("DELETED", "a")
    client.watch()
    client.proxy.watch_lag = 0.7
    began = time.monotonic()
    client.create("d")
    assert client.sees("ADDED", "d") and time.monotonic() - began > 0.7
    loop().call_soon_threadsafe(task.cancel)
    deadline = time.monotonic() + 5
    while client.proxy.watches:
        assert time.monotonic() < deadline, "a watch outlives its client"
        time.sleep(0.02)


def test_an_api_server_that_is_away_looks_away(control_plane: ControlPlane, client: Client) -> None:
    control_plane.stop_component("kube-apiserver")
    try:
        with pytest.raises(aiohttp.ClientError):
            client.create("a")
    finally:
        control_plane.start_component("kube-apiserver")
    client.create("a")
