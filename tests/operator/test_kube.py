"""`Kube` against a small scripted server: every failure has its own error, reads are repeated, and
writes never are.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from typing import Any

import pytest
from aiohttp import ClientTimeout, web
from kubernetes.aio import client

from modelchain_operator.api import kube
from modelchain_operator.api.kube import (
    CHAINS,
    JOBS,
    LEASES,
    PODS,
    AlreadyExists,
    Ambiguous,
    ApiError,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    Kube,
    NotFound,
    Throttled,
    Unavailable,
)
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
CHAIN = {"metadata": {"namespace": "ns", "name": "c", "resourceVersion": "7"}, "status": {}}


def status(
    code: int, reason: str = "", message: str = "", causes: list[str] | None = None, **headers: str
) -> Answer:
    body = {"kind": "Status", "code": code, "reason": reason, "message": message}
    body["details"] = {"causes": [{"reason": cause} for cause in causes or []]}

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=code, headers=headers)

    return answer


def good(body: dict[str, Any]) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response(body)

    return answer


async def reset(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def stall(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(30)
    return web.Response()


class Server:
    """Answers requests from a script and records them. The last answer is repeated for ever."""

    def __init__(self, *answers: Answer):
        self.answers = list(answers)
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.bodies: list[Any] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        self.requests.append((request.method, request.path_qs, dict(request.headers)))
        self.bodies.append(json.loads(text) if text else None)
        return await (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])(request)


@asynccontextmanager
async def serve(*answers: Answer) -> AsyncIterator[tuple[Kube, Server]]:
    server = Server(*answers)
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    server.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    async with client.ApiClient(client.Configuration(host=server.url)) as api:
        yield Kube(api), server
    await runner.cleanup()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube, "TIMEOUT", ClientTimeout(total=2.0, sock_connect=2.0))
    monkeypatch.setattr(kube, "READ_BACKOFF", 0.01)
    monkeypatch.setattr(kube, "READ_PATIENCE", 3.0)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (status(404, "NotFound"), NotFound),
        (status(409, "Conflict"), Conflict),
        (status(409, "AlreadyExists"), AlreadyExists),
        (status(410, "Expired"), Gone),
        (status(401, "Unauthorized"), Forbidden),
        (status(403, "Forbidden"), Forbidden),
        (status(422, "Invalid"), Invalid),
        (status(405, "MethodNotAllowed"), ApiError),
        (status(429, "TooManyRequests", **{"Retry-After": "7"}), Throttled),
        (status(500, "InternalError"), Ambiguous),
        (status(504, "Timeout"), Ambiguous),
        (reset, Ambiguous),
        (stall, Ambiguous),
    ],
)
def test_a_failed_write_raises_its_own_error_and_is_sent_once(
    answer: Answer, error: type[ApiError]
) -> None:
    async def main() -> None:
        async with serve(answer) as (port, server):
            writes = [
                port.create(CHAINS, CHAIN),
                port.replace(CHAINS, CHAIN),
                port.replace_status(CHAINS, CHAIN),
                port.patch(CHAINS, "ns", "c", {}),
                port.delete(CHAINS, "ns", "c", "u"),
            ]
            for number, write in enumerate(writes, 1):
                with pytest.raises(ApiError) as caught:
                    await write
                assert type(caught.value) is error
                assert len(server.requests) == number
            if error is Throttled:
                assert caught.value.retry_after == 7

    asyncio.run(main())


def test_a_write_on_a_kept_connection_that_dies_is_not_repeated() -> None:
    async def main() -> None:
        async with serve(good({}), reset) as (port, server):
            await port.get(CHAINS, "ns", "c")
            with pytest.raises(Ambiguous):
                await port.replace(CHAINS, CHAIN)
            assert [method for method, _, _ in server.requests] == ["GET", "PUT"]

    asyncio.run(main())


@pytest.mark.parametrize(
    "fault", [status(500), status(503), status(429, **{"Retry-After": "0"}), reset]
)
def test_reads_are_repeated(fault: Answer) -> None:
    async def main() -> None:
        async with serve(fault, fault, good({"kind": "ModelChain"})) as (port, _):
            assert await port.get(CHAINS, "ns", "c") == {"kind": "ModelChain"}
            assert port.calls.total() == 3 and port.calls["get", "modelchains", 200] == 1

    asyncio.run(main())


def test_a_read_gives_up_and_reports_a_long_retry_after() -> None:
    async def main() -> None:
        async with serve(status(500)) as (port, server):
            with pytest.raises(Unavailable):
                await port.get(CHAINS, "ns", "c")
            assert 2 < len(server.requests) < 12
        async with serve(status(429, **{"Retry-After": "30"})) as (port, server):
            with pytest.raises(Throttled) as caught:
                await port.get(CHAINS, "ns", "c")
            assert (caught.value.retry_after, len(server.requests)) == (30, 1)

    asyncio.run(main())


def test_a_refused_connection_is_no_ambiguous_write() -> None:
    async def main() -> None:
        async with serve(good({})) as (port, server):
            port.api.configuration.host = "http://127.0.0.1:1"
            with pytest.raises(Unavailable) as caught:
                await port.create(CHAINS, CHAIN)
            assert type(caught.value) is Unavailable
            assert not server.requests

    asyncio.run(main())


def test_an_answer_that_is_not_json() -> None:
    async def page(request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>")

    async def main() -> None:
        async with serve(page) as (port, _):
            with pytest.raises(Ambiguous, match="html"):
                await port.create(CHAINS, CHAIN)

    asyncio.run(main())


def test_list_reads_all_pages_and_starts_again_when_the_token_expires() -> None:
    def page(name: str, token: str) -> Answer:
        meta = {"continue": token} if token else {}
        return good(
            {
                "apiVersion": "v1",
                "kind": "PodList",
                "metadata": meta,
                "items": [{"metadata": {"name": name}}],
            }
        )

    async def main() -> None:
        async with serve(
            page("a", "t1"), status(410, "Expired"), page("a", "t2"), page("b", "")
        ) as (port, server):
            pods = await port.list(PODS, None, "x=y")
        assert [(pod["kind"], pod["metadata"]["name"]) for pod in pods] == [
            ("Pod", "a"),
            ("Pod", "b"),
        ]
        assert [path for _, path, _ in server.requests] == [
            "/api/v1/pods?limit=100&labelSelector=x%3Dy",
            "/api/v1/pods?limit=100&labelSelector=x%3Dy&continue=t1",
            "/api/v1/pods?limit=100&labelSelector=x%3Dy",
            "/api/v1/pods?limit=100&labelSelector=x%3Dy&continue=t2",
        ]

    asyncio.run(main())


def test_the_requests_of_writes() -> None:
    async def main() -> None:
        async with serve(good({})) as (port, server):
            await port.delete(JOBS, "ns", "j", "uid-1")
            await port.patch(CHAINS, "ns", "c", {"metadata": {"uid": "u"}})
            await port.replace_status(CHAINS, CHAIN)
            with pytest.raises(ValueError, match="resourceVersion"):
                await port.replace(LEASES, {"metadata": {"namespace": "ns", "name": "l"}})
        assert server.bodies[0] == {
            "preconditions": {"uid": "uid-1"},
            "propagationPolicy": "Foreground",
        }
        assert [path for _, path, _ in server.requests] == [
            "/apis/batch/v1/namespaces/ns/jobs/j",
            "/apis/modelchain.dev/v1alpha1/namespaces/ns/modelchains/c",
            "/apis/modelchain.dev/v1alpha1/namespaces/ns/modelchains/c/status",
        ]
        assert server.requests[1][2]["Content-Type"] == "application/merge-patch+json"
        assert all(
            headers["User-Agent"].startswith("modelchain-operator/")
            for _, _, headers in server.requests
        )

    asyncio.run(main())


def test_a_terminating_namespace_is_distinguished_from_a_missing_right() -> None:
    async def main() -> None:
        async with serve(
            status(403, "Forbidden", causes=["NamespaceTerminating"]), status(403, "Forbidden")
        ) as (p, _):
            for terminating in (True, False):
                with pytest.raises(Forbidden) as caught:
                    await p.create(CHAINS, CHAIN)
                assert caught.value.namespace_terminating is terminating

    asyncio.run(main())


def test_discovery() -> None:
    async def main() -> None:
        found = good({"resources": [{"name": "pytorchjobs"}, {"name": "pytorchjobs/status"}]})
        async with serve(status(404), good({"resources": []}), found) as (port, server):
            assert [await port.resource_exists(PYTORCHJOBS) for _ in range(3)] == [
                False,
                False,
                True,
            ]
        assert server.requests[0][1] == "/apis/kubeflow.org/v1"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("ahead", "follows"), [(300.0, True), (-300.0, True), (5.0, False), (None, False)]
)
def test_the_clock_follows_the_api_servers(ahead: float | None, follows: bool) -> None:
    """All timestamps of objects are by the API server's clock. A difference of a few seconds is
    ignored, because an answer takes time. The page of a proxy may have no date at all.
    """

    async def dated(request: web.Request) -> web.StreamResponse:
        answer = web.json_response({})
        answer.headers["Date"] = (
            "" if ahead is None else formatdate(time.time() - ahead, usegmt=True)
        )
        return answer

    async def main() -> None:
        async with serve(dated, status(404, Date=formatdate(time.time(), usegmt=True))) as (
            port,
            _,
        ):
            assert abs(port.now() - time.time()) < 1
            await port.get(CHAINS, "ns", "c")
            behind = ahead if follows and ahead is not None else 0.0
            assert abs(time.time() - behind - port.now()) < 3
            with pytest.raises(NotFound):
                await port.get(CHAINS, "ns", "c")
            assert abs(port.now() - time.time()) < 1, "the date of an error corrects the clock too"

    asyncio.run(main())


def streamed(*parts: bytes, broken: bool = False) -> Answer:
    """A body that comes in these parts."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.01)
        if broken:
            assert request.transport is not None
            request.transport.abort()
        return response

    return answer


def event(kind: str, **obj: Any) -> bytes:
    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


def watched(*answers: Answer) -> tuple[list[tuple[str, Any]], Server]:
    """The events of one watch, with the error that ended it as the last one."""
    found: list[tuple[str, Any]] = []

    async def main() -> Server:
        async with serve(*answers) as (port, server):
            try:
                async for one in port.watch(CHAINS, "ns", "5", "a=b", "metadata.name=c"):
                    found.append(one)
            except ApiError as error:
                found.append(("raised", type(error)))
            return server

    return found, asyncio.run(main())


def test_a_watch_yields_each_event_as_it_comes() -> None:
    """A status may be larger than what is read at once, and an event may come in pieces."""
    large = event("MODIFIED", status="x" * 300_000)
    found, server = watched(
        streamed(event("ADDED", n=1) + large[:70_000], large[70_000:], event("BOOKMARK", n=2))
    )
    assert [kind for kind, _ in found] == ["ADDED", "MODIFIED", "BOOKMARK"]
    assert len(found[1][1]["status"]) == 300_000
    [(method, path, _)] = server.requests
    assert method == "GET" and path.startswith("/apis/modelchain.dev/v1alpha1/namespaces/ns/")
    for part in ("watch=1", "resourceVersion=5", "labelSelector=a%3Db", "allowWatchBookmarks"):
        assert part in path
    assert "fieldSelector=metadata.name%3Dc" in path


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (streamed(event("ERROR", code=410, reason="Expired", message="too old")), Gone),
        (streamed(event("ERROR", code=500, message="etcd")), Unavailable),
        (streamed(event("ADDED", n=1), broken=True), Unavailable),
        (streamed(b'{"type": "ADD'), Unavailable),
        (status(410, "Expired"), Gone),
        (status(403, "Forbidden"), Forbidden),
        (status(429, "TooManyRequests"), Throttled),
        (status(502), Unavailable),
        (reset, Unavailable),
    ],
)
def test_how_a_watch_fails(answer: Answer, error: type[ApiError]) -> None:
    """It is not sent again: its caller knows from which version to go on."""
    found, server = watched(answer)
    assert found[-1][0] == "raised" and issubclass(found[-1][1], error)
    assert len(server.requests) == 1


def test_a_list_names_the_version_from_which_to_watch() -> None:
    async def main() -> None:
        page = {"apiVersion": "v1", "kind": "PodList", "items": [{"metadata": {"name": "p"}}]}
        first = page | {"metadata": {"resourceVersion": "7", "continue": "more"}}
        last = page | {"metadata": {"resourceVersion": "7"}}
        async with serve(good(first), good(last)) as (port, _):
            found, version = await port.list_at(PODS, "ns")
        assert (len(found), version, found[0]["kind"]) == (2, "7", "Pod")

    asyncio.run(main())


def test_the_log_of_a_pod() -> None:
    async def main() -> None:
        lines = "2026-01-01T00:00:00Z a \u00e9\n2026-01-01T00:00:01Z b"
        async with serve(streamed(lines.encode()), status(400, "BadRequest")) as (port, server):
            found = [line async for line in port.log("ns", "p", "main", {"tailLines": "3"})]
            assert found == lines.splitlines()
            path = server.requests[0][1]
            assert path.startswith("/api/v1/namespaces/ns/pods/p/log?")
            assert "container=main" in path and "timestamps=true" in path and "tailLines=3" in path
            with pytest.raises(Invalid):
                await anext(port.log("ns", "p", "main", {}))

    asyncio.run(main())
