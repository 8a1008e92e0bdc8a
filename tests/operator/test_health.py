"""The liveness probe: it is answered as long as the process can be of use, and by a thread."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from modelchain_operator.watch import health, service
from modelchain_operator.watch.service import Service


def status(port: int, path: str = "/healthz") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The ports of the servers that a test starts."""
    ports, servers, serve = [], [], health.serve

    def noted(url: str, alive: Any) -> Any:
        servers.append(serve(url, alive))
        ports.append(servers[-1].server_address[1])
        return servers[-1]

    monkeypatch.setattr(service, "serve_health", noted)
    monkeypatch.setattr(health, "serve", noted)
    yield ports
    for server in servers:
        server.shutdown()
        server.server_close()


def test_what_a_probe_is_answered(probes: list[int]) -> None:
    why: list[str | None] = [None]
    health.serve("http://127.0.0.1:0/healthz", lambda: why[0])
    assert status(probes[0]) == (200, "alive")
    assert status(probes[0], "/other")[0] == 404
    why[0] = "it hangs"
    assert status(probes[0]) == (500, "it hangs")


class Nothing:
    """An API server on which no CRD is installed, and a controller without work."""

    async def resource_exists(self, resource: object) -> bool:
        return False

    async def pages(self, resource: object, namespace: object) -> Any:
        for page in ():
            yield page


def test_probes_are_answered_before_the_crds_are_installed(
    probes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.signal, "alarm", lambda seconds: None)
    api: Any = Nothing()
    api.reconcile = None

    async def main() -> None:
        url = "http://127.0.0.1:0/healthz"
        running = asyncio.create_task(Service(api, api, [], None, url).run())
        await asyncio.sleep(0.1)
        assert (await asyncio.to_thread(status, probes[0]))[0] == 200
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def test_a_hanging_event_loop_is_seen(probes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe does not run in the loop, which would keep it from answering."""
    monkeypatch.setattr(service, "RESYNC", 0.05)
    api: Any = Nothing()
    api.reconcile = None

    said: list[tuple[int, str]] = []

    def ask() -> None:
        time.sleep(0.3)
        said.append(status(probes[0]))

    async def main() -> None:
        health.serve("http://127.0.0.1:0/healthz", Service(api, api, [], None, "")._alive)
        asked = threading.Thread(target=ask)
        asked.start()
        time.sleep(1.0)  # the loop hangs
        assert said and said[0][0] == 500
        asked.join()

    asyncio.run(main())
