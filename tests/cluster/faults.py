"""Faults for the proxy: which requests a rule matches, and what it does to them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from apiclient import loop

if TYPE_CHECKING:
    from proxy import FaultProxy

Kind = Literal["read", "watch", "write", "event", "lease", "review", "discovery"]


@dataclass(eq=False)
class Request:
    """One request as the API server understands it.

    `kind` is "write" only for what changes the work's objects: Events, the leader election's Lease
    and access reviews are counted apart. `write` numbers these writes from 1. `client` is the
    bearer token of the operator's kubeconfig.
    """

    number: int
    client: str
    method: str
    path: str
    query: dict[str, str]
    body: bytes
    headers: dict[str, str]
    verb: str
    group: str = ""
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    kind: Kind = "read"
    write: int | None = None
    status: int | None = None
    at: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        what = (
            "/".join(part for part in (self.resource, self.name, self.subresource) if part)
            or self.path
        )
        return f"#{self.number} {self.client} {self.verb} {what} -> {self.status}"


@dataclass(frozen=True)
class Answer:
    """What goes back to the operator; None instead of one resets the connection."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


STREAM = Answer(200, b"")


@dataclass
class Exchange:
    """A request under way, as an action sees it."""

    request: Request
    proxy: FaultProxy
    after: Callable[[], None] | None = None  # called when the operator has its answer

    async def forward(self) -> Answer:
        """The API server's answer; of a watch, that it may be streamed."""
        return STREAM if self.request.kind == "watch" else await self.proxy.forward(self.request)


Match = Callable[[Request], bool]
Action = Callable[[Exchange], Awaitable[Answer | None]]


@dataclass
class Rule:
    """`hits` counts the requests it was applied to."""

    match: Match
    action: Action
    times: int | None
    hits: int = 0

    def wants(self, request: Request) -> bool:
        return (self.times is None or self.hits < self.times) and self.match(request)


class Victim(Protocol):
    """A process, such as subprocess.Popen."""

    def kill(self) -> None: ...


# What a rule matches.


def request(verb: str | None = None, resource: str | None = None, **more: str) -> Match:
    """By verb ("create", "watch" …), resource ("pytorchjobs") and any other attribute of a
    Request.
    """
    wanted = more | {k: v for k, v in (("verb", verb), ("resource", resource)) if v is not None}
    return lambda r: all(getattr(r, key) == value for key, value in wanted.items())


def nth_write(n: int) -> Match:
    """The n-th write since the proxy started, from 1."""
    return lambda r: r.write == n


def first_of_each() -> Match:
    """The first request of each kind: client, verb, resource and subresource. Use with
    `times=None`.
    """
    seen: set[tuple[str, ...]] = set()

    def match(r: Request) -> bool:
        kind = (r.client, r.verb, r.resource or r.path, r.subresource)
        new = kind not in seen
        seen.add(kind)
        return new

    return match


# What a rule does.


def answer(
    status: int, *, retry_after: int | None = None, message: str = "by the fault proxy"
) -> Action:
    """An answer of the proxy's own; the API server does not hear of the request."""

    async def act(exchange: Exchange) -> Answer:
        return failure(status, message, retry_after)

    return act


def reset(*, commit: bool = False) -> Action:
    """The connection is reset, before the API server hears of the request or after it has
    answered.
    """

    async def act(exchange: Exchange) -> None:
        if commit:
            await exchange.forward()

    return act


def kill(victim: Victim, when: Literal["send", "commit", "response"]) -> Action:
    """kill -9 before the request is sent, after it was committed without an answer, or after the
    answer.
    """

    async def act(exchange: Exchange) -> Answer | None:
        if when == "send":
            victim.kill()
            return None
        answered = await exchange.forward()
        if when == "commit":
            victim.kill()
            return None
        exchange.after = victim.kill
        return answered

    return act


def stall(seconds: float = 30) -> Action:
    """The request waits, then goes its way."""

    async def act(exchange: Exchange) -> Answer:
        await asyncio.sleep(seconds)
        return await exchange.forward()

    return act


class Hold:
    """An action: requests wait here, whatever becomes of their senders, until `release` lets them
    through.
    """

    def __init__(self) -> None:
        self.held: list[Request] = []
        self._released = asyncio.Event()

    async def __call__(self, exchange: Exchange) -> Answer:
        self.held.append(exchange.request)
        await self._released.wait()
        return await exchange.forward()

    def release(self) -> None:
        """From now on nothing is held."""
        loop().call_soon_threadsafe(self._released.set)


def stale(versions: int = 1) -> Action:
    """A GET or LIST is answered as it was that many versions ago, as far as it is remembered."""

    async def act(exchange: Exchange) -> Answer:
        before = list(
            exchange.proxy.history[
                exchange.request.path, tuple(sorted(exchange.request.query.items()))
            ]
        )
        return before[max(0, len(before) - 1 - versions)] if before else await exchange.forward()

    return act


def failure(status: int, message: str, retry_after: int | None = None) -> Answer:
    """A Status object, as the API server's refusals are."""
    reasons = {
        409: "Conflict",
        410: "Expired",
        429: "TooManyRequests",
        500: "InternalError",
        503: "ServiceUnavailable",
    }
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": status,
        "message": message,
    }
    body["reason"] = reasons.get(status, "Timeout" if status == 504 else "Unknown")
    headers = {"Content-Type": "application/json"}
    return Answer(
        status,
        json.dumps(body).encode(),
        headers | ({"Retry-After": str(retry_after)} if retry_after else {}),
    )
