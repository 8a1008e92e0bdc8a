"""What the stand-ins share: one event loop in a thread of the test process, and a small client of
the API server.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import tempfile
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import yaml

T = TypeVar("T")
Json = dict[str, Any]
LINE_BYTES = 8 << 20  # a watch event is one line, and an object may have 1.5 MiB


@cache
def loop() -> asyncio.AbstractEventLoop:
    """The loop on which every stand-in of this process runs; tests themselves stay synchronous."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, name="stand-ins", daemon=True).start()
    return made


def run(work: Coroutine[Any, Any, T], timeout: float = 60) -> T:
    """Run a coroutine on that loop and wait for its result."""
    return asyncio.run_coroutine_threadsafe(work, loop()).result(timeout)


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class ApiError(Exception):
    """The API server's refusal."""

    def __init__(self, status: int, text: str):
        super().__init__(f"{status}: {text}")
        self.status = status


class Api:
    """A client with the credentials of a kubeconfig's current context."""

    def __init__(self, kubeconfig: Path):
        config = yaml.safe_load(Path(kubeconfig).read_text())
        context = _named(config["contexts"], config["current-context"])["context"]
        cluster = _named(config["clusters"], context["cluster"])["cluster"]
        user = _named(config["users"], context["user"]).get("user") or {}
        self.server: str = cluster["server"].rstrip("/")
        self.headers = {"Authorization": f"Bearer {user['token']}"} if "token" in user else {}
        self.tls: ssl.SSLContext | bool = (
            _tls(cluster, user) if self.server.startswith("https") else False
        )
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """Made on first use, since it belongs to the running loop. No time limits: the tests set
        their own.
        """
        if self._session is None:
            connector = aiohttp.TCPConnector(ssl=self.tls, limit=0)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
            self._session = aiohttp.ClientSession(
                connector=connector, headers=self.headers, timeout=timeout, read_bufsize=LINE_BYTES
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        params: Mapping[str, str] | None = None,
        patch: str = "strategic-merge-patch+json",
    ) -> Json:
        """One call. `patch` is the kind of a PATCH; the default one is for built-in objects alone.
        Raises ApiError.
        """
        kind = f"application/{patch if method == 'PATCH' else 'json'}"
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": kind, "Accept": "application/json"}
        async with self.session.request(
            method, self.server + path, data=data, headers=headers, params=params
        ) as r:
            text = await r.text()
            if r.status >= 400:
                raise ApiError(r.status, text)
            return dict(json.loads(text))

    async def follow(self, path: str, **params: str) -> AsyncIterator[tuple[str, Json]]:
        """ADDED, MODIFIED and DELETED for ever. A new list makes up for what was missed, deletions
        included.
        """
        known: dict[str, Json] = {}
        while True:
            try:
                listed = await self.request("GET", path, params=params)
                objects = {item["metadata"]["uid"]: item for item in listed.get("items", [])}
                for uid in known.keys() - objects.keys():
                    yield "DELETED", known.pop(uid)
                for uid, item in objects.items():
                    yield "MODIFIED" if uid in known else "ADDED", item
                known = objects
                version = listed["metadata"]["resourceVersion"]
                async for event in self._watch(
                    path, params | {"watch": "true", "resourceVersion": version}
                ):
                    item = event["object"]
                    if event["type"] == "ERROR":
                        break
                    if event["type"] == "DELETED":
                        known.pop(item["metadata"]["uid"], None)
                    else:
                        known[item["metadata"]["uid"]] = item
                    yield event["type"], item
            except (aiohttp.ClientError, ApiError, OSError):
                await asyncio.sleep(0.3)

    async def _watch(self, path: str, params: dict[str, str]) -> AsyncIterator[Json]:
        async with self.session.get(self.server + path, params=params) as response:
            if response.status >= 400:
                raise ApiError(response.status, await response.text())
            async for line in response.content:
                yield json.loads(line)


def _named(items: list[Json], name: str) -> Json:
    return next(item for item in items if item["name"] == name)


def _tls(cluster: Json, user: Json) -> ssl.SSLContext:
    with tempfile.TemporaryDirectory() as folder:
        authority, certificate, key = (
            _file(Path(folder), entry, name)
            for entry, name in (
                (cluster, "certificate-authority"),
                (user, "client-certificate"),
                (user, "client-key"),
            )
        )
        context = ssl.create_default_context(cafile=authority)
        if certificate:
            context.load_cert_chain(certificate, key)
    if cluster.get("insecure-skip-tls-verify"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _file(folder: Path, entry: Json, name: str) -> str | None:
    """A kubeconfig names a file or holds its content; Python's ssl wants a file."""
    if f"{name}-data" not in entry:
        return str(entry[name]) if name in entry else None
    path = folder / f"{name}.pem"
    path.write_bytes(base64.b64decode(entry[f"{name}-data"]))
    return str(path)
