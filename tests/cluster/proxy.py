"""A fault proxy between an operator and the API server: plain HTTP in, the kubeconfig's credentials
out.

    with FaultProxy(control_plane.kubeconfig) as proxy:
        start_operator(proxy.kubeconfig(tmp_path / "a", client="a"))
        proxy.on(nth_write(3), kill(operator, "commit"))
        proxy.on(request("create", "pytorchjobs"), answer(429, retry_after=1), times=2)
        for watch in proxy.open_watches("pods"): watch.silence()

Every request is numbered and logged; rules and watches may be changed at any time. Without rules
nothing is changed.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import web
from apiclient import Api, Json, cancel, loop, run
from faults import STREAM, Action, Answer, Exchange, Match, Request, Rule, failure
from yarl import URL

KEPT = 8  # answers a URL is remembered by, for `stale`
PASSED = ("Content-Type", "Accept", "User-Agent")
RETURNED = ("Content-Type", "Retry-After", "Warning")
SHARE = re.compile(r"^mchain-[0-9a-f]{16}$")  # a Lease on a digest, not on leadership
REVIEWS = (
    "subjectaccessreviews",
    "selfsubjectaccessreviews",
    "selfsubjectrulesreviews",
    "tokenreviews",
)


class Watch:
    """An open watch."""

    def __init__(self, asked: Request):
        self.request = asked
        self.silent = False
        self.lines: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue()

    def cut(self) -> None:
        """It ends as if the server had closed it."""
        self._put(None)

    def silence(self) -> None:
        """It stays open, and nothing that happens is told any more."""
        self.silent = True

    def expire(self) -> None:
        """An ERROR event 410 Gone: the resource version is too old."""
        gone = json.loads(failure(410, "too old resource version").body)
        self._put(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
        self._put(None)

    def _put(self, line: bytes | None) -> None:
        loop().call_soon_threadsafe(self.lines.put_nowait, (time.monotonic(), line))


class FaultProxy:
    """One proxy, for one operator or several: `client` in their kubeconfigs tells them apart.

    `log` has every request in order; `watch_lag` delays every watch event by that many seconds;
    `drop_event` is asked about each watch event (type, object) whether it is lost.
    """

    def __init__(self, kubeconfig: Path):
        self.log: list[Request] = []
        self.rules: list[Rule] = []
        self.watches: list[Watch] = []
        self.watch_lag = 0.0
        self.drop_event: Callable[[str, Json], bool] | None = None
        self.history: defaultdict[tuple[Any, ...], deque[Answer]] = defaultdict(
            lambda: deque(maxlen=KEPT)
        )
        self._api, self._writes = Api(kubeconfig), 0
        self._tasks: set[asyncio.Task[Answer | None]] = set()

    def __enter__(self) -> FaultProxy:
        run(self._start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        run(self._stop())

    def kubeconfig(
        self, path: Path, *, client: str = "operator", namespace: str = "default"
    ) -> Path:
        """Write a kubeconfig that leads here."""
        context = {"cluster": "proxy", "user": client, "namespace": namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "proxy", "cluster": {"server": self.url}}],
            "users": [{"name": client, "user": {"token": client}}],
            "contexts": [{"name": "proxy", "context": context}],
            "current-context": "proxy",
        }
        path.write_text(json.dumps(config))
        return path

    def on(self, match: Match, action: Action, times: int | None = 1) -> Rule:
        """From now on: `action` for the next `times` requests that match (None: all); the first
        rule that wants it.
        """
        rule = Rule(match, action, times)
        self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """No more faults; what is held stays held."""
        self.rules.clear()
        self.watch_lag, self.drop_event = 0.0, None

    def open_watches(self, resource: str | None = None) -> list[Watch]:
        return [watch for watch in self.watches if resource in (None, watch.request.resource)]

    def writes(self) -> list[Request]:
        """The writes so far, in order; `nth_write` counts the same."""
        return [r for r in self.log if r.kind == "write"]

    def counts(self) -> Counter[str]:
        """Requests so far by kind: read, watch, write, event, lease, review, discovery."""
        return Counter(r.kind for r in self.log)

    async def forward(self, asked: Request) -> Answer:
        """The API server's answer to a request that is no watch."""
        async with self._ask(asked) as response:
            body, asked.status = await response.read(), response.status
            headers = {
                name: response.headers[name] for name in RETURNED if name in response.headers
            }
        answered = Answer(response.status, body, headers)
        if asked.kind == "read" and response.status == 200:
            seen = self.history[asked.path, tuple(sorted(asked.query.items()))]
            if not seen or seen[-1].body != body:
                seen.append(answered)
        return answered

    async def _start(self) -> None:
        app = web.Application(client_max_size=16 << 20, handler_args={"access_log": None})
        app.router.add_route("*", "/{path:.*}", self._handle)
        # A watch ends with its client; other requests go on without theirs, see `_handle`.
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=1
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _stop(self) -> None:
        await cancel(*self._tasks)
        for watch in self.watches:
            watch.cut()
        await self._runner.cleanup()
        await self._api.close()

    async def _handle(self, http: web.Request) -> web.StreamResponse:
        exchange = Exchange(await self._read(http), self)
        asked = exchange.request
        rule = next((r for r in self.rules if r.wants(asked)), None)
        if rule:
            rule.hits += 1
        task = asyncio.create_task(self._act(rule.action if rule else Exchange.forward, exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        answered = await asyncio.shield(task)
        if answered is STREAM:
            return await self._stream(http, asked)
        if answered is None:
            _reset(http)
            return web.Response()
        asked.status = asked.status or answered.status
        response = web.Response(
            status=answered.status, body=answered.body, headers=answered.headers
        )
        await response.prepare(http)
        await response.write_eof()
        if exchange.after:
            exchange.after()
        return response

    async def _act(self, action: Action, exchange: Exchange) -> Answer | None:
        """The API server being away looks as it does without a proxy."""
        try:
            return await action(exchange)
        except (aiohttp.ClientError, OSError):
            return None

    async def _read(self, http: web.Request) -> Request:
        body = await http.read()
        token = http.headers.get("Authorization", "").removeprefix("Bearer ")
        found = _parse(http.method, http.path, dict(http.query), body)
        if found["kind"] == "write":
            self._writes += 1
            found["write"] = self._writes
        asked = Request(
            number=len(self.log) + 1,
            client=token,
            method=http.method,
            path=http.path,
            query=dict(http.query),
            body=body,
            headers={name: http.headers[name] for name in PASSED if name in http.headers},
            **found,
        )
        self.log.append(asked)
        return asked

    def _ask(self, asked: Request) -> Any:
        url = URL(self._api.server + asked.path).with_query(asked.query)
        headers = asked.headers | {"Accept-Encoding": "identity"}
        return self._api.session.request(
            asked.method, url, data=asked.body or None, headers=headers
        )

    async def _stream(self, http: web.Request, asked: Request) -> web.StreamResponse:
        try:
            upstream = await self._ask(asked)
        except (aiohttp.ClientError, OSError):
            _reset(http)
            return web.Response()
        asked.status = upstream.status
        async with upstream:
            if upstream.status != 200:
                return web.Response(
                    status=upstream.status,
                    body=await upstream.read(),
                    content_type="application/json",
                )
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(http)
            watch = Watch(asked)
            self.watches.append(watch)
            pump = asyncio.create_task(self._pump(upstream, watch))
            try:
                while (line := await self._next(watch)) is not None:
                    await response.write(line)
                await response.write_eof()
            except ConnectionError:
                pass
            finally:
                self.watches.remove(watch)
                await cancel(pump)
        return response

    async def _pump(self, upstream: aiohttp.ClientResponse, watch: Watch) -> None:
        """Events from the API server into the watch's line, until it ends."""
        with suppress(aiohttp.ClientError, OSError):
            async for line in upstream.content:
                if watch.silent or (self.drop_event and self._dropped(line)):
                    continue
                watch.lines.put_nowait((time.monotonic() + self.watch_lag, line))
        if not watch.silent:
            watch.lines.put_nowait((0, None))

    def _dropped(self, line: bytes) -> bool:
        event = json.loads(line)
        return self.drop_event is not None and self.drop_event(event["type"], event["object"])

    async def _next(self, watch: Watch) -> bytes | None:
        due, line = await watch.lines.get()
        await asyncio.sleep(max(0, due - time.monotonic()))
        return line


def _parse(method: str, path: str, query: dict[str, str], body: bytes) -> dict[str, Any]:
    """What the API server takes a path for: /api/v1 or /apis/GROUP/VERSION, [namespaces/NS,]
    RESOURCE[/NAME[/SUB]].
    """
    parts = path.strip("/").split("/")
    head = {"api": 2, "apis": 3}.get(parts[0])
    if head is None or len(parts) <= head:
        return {"verb": method.lower(), "kind": "discovery"}
    found = {"group": parts[1] if parts[0] == "apis" else ""}
    rest = parts[head:]
    if rest[0] == "namespaces" and len(rest) > 2:
        found["namespace"], rest = rest[1], rest[2:]
    found |= dict(zip(("resource", "name", "subresource"), rest, strict=False))
    named, watch = "name" in found, query.get("watch", "").lower() in ("true", "1")
    reads = "watch" if watch else "get" if named else "list"
    deletes = "delete" if named else "deletecollection"
    verbs = {
        "GET": reads,
        "HEAD": reads,
        "POST": "create",
        "PUT": "update",
        "PATCH": "patch",
        "DELETE": deletes,
    }
    verb, resource = verbs[method], found["resource"]
    if verb == "create" and not named:
        found["name"] = (
            json.loads(body)["metadata"].get("name", "") if resource not in REVIEWS else ""
        )
    if verb in ("get", "list", "watch"):
        kind = "watch" if watch else "read"
    elif resource == "events":
        kind = "event"
    elif resource in REVIEWS:
        kind = "review"
    elif resource == "leases" and not SHARE.search(found.get("name", "")):
        kind = "lease"
    else:
        kind = "write"
    return found | {"verb": verb, "kind": kind}


def _reset(http: web.Request) -> None:
    """RST instead of FIN: a connection that broke, not one that was closed."""
    if http.transport:
        http.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        http.transport.abort()
