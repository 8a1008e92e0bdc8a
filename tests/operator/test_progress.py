"""What the operator learns by asking rank 0 for its progress: it answers, accepts a connection and
says nothing, or cannot be reached.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import pytest
from podshapes import running

from modelchain.api.contracts import LiveProgress
from modelchain_operator.api.kube import Object
from modelchain_operator.reconcile import snapshot
from modelchain_operator.reconcile.memory import MOST_IGNORED, Asked, Memory
from modelchain_operator.reconcile.snapshot import Reader
from modelchain_operator.runners.template import PROGRESS_PORT

ANSWER = LiveProgress(
    attempt="family-a-a1", step=7, steps=100, samples_per_second=1.0, eta_seconds=93.0
)
_addresses = itertools.count(os.getpid() * 16 % 65_000)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def listening(backlog: int = 8) -> Iterator[tuple[socket.socket, Object]]:
    """A socket on an address of its own, and a pod with that address."""
    for n in _addresses:
        address = f"127.33.{n >> 8 & 255}.{n & 255}"
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                server.bind((address, PROGRESS_PORT))
            except OSError:
                continue
            server.listen(backlog)
            pod = running()
            pod["status"]["podIP"] = address
            yield server, pod
            return


def asked(pod: Object, times: int = 1, serve: Callable[[], Awaitable[Any]] | None = None) -> Asked:
    """What is remembered after asking the pod so many times, ten seconds apart."""
    memory = Memory(clock=Clock())
    reader = Reader(None, memory, 0.0)  # type: ignore[arg-type]

    async def ask() -> None:
        server = await serve() if serve else None
        for _ in range(times):
            await reader.progress([pod])
            memory.clock.now += 10  # type: ignore[attr-defined]
        if server:
            server.close()

    asyncio.run(ask())
    return memory.progress[pod["metadata"]["uid"]]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=0.2, sock_read=0.2)
    monkeypatch.setattr(snapshot, "PROGRESS_TIMEOUT", timeout)


def test_a_trainer_that_answers() -> None:
    with listening() as (taken, pod):

        async def serve() -> asyncio.Server:
            async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                body = ANSWER.model_dump_json(by_alias=True).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

            return await asyncio.start_server(answer, sock=taken)

        found = asked(pod, 2, serve)
    assert (found.answer, found.answered, found.silent, found.ignored) == (ANSWER, 1010.0, None, ())


def test_connections_that_are_accepted_and_not_answered() -> None:
    """Only these are counted as ignored, because they show that a process listens."""
    with listening() as (_, pod):
        found = asked(pod, 3)
    assert (found.answered, found.silent, found.ignored) == (None, 1000.0, (1000.0, 1010.0, 1020.0))


def test_a_port_that_is_closed() -> None:
    with listening() as (taken, pod):
        taken.close()
        found = asked(pod, 3)
    assert (found.answered, found.silent, found.ignored) == (None, 1000.0, ())


def test_connections_that_are_never_accepted() -> None:
    """This happens under a network policy that drops packets. A full backlog does the same: it
    neither accepts nor refuses.
    """
    with listening(backlog=0) as (_, pod), socket.socket() as first, socket.socket() as second:
        for one in (first, second):
            one.setblocking(False)
            one.connect_ex((pod["status"]["podIP"], PROGRESS_PORT))
        found = asked(pod, 2)
    assert (found.answered, found.silent, found.ignored) == (None, 1000.0, ())


def test_an_answer_ends_the_silence_and_many_ignored_connections_take_little_memory() -> None:
    clock = Clock()
    memory = Memory(clock=clock)
    memory.note_answer("pod", ANSWER)
    for _ in range(3 * MOST_IGNORED):
        clock.now += 5
        memory.note_silence("pod", accepted=True)
    found = memory.progress["pod"]
    assert (found.answer, found.answered, found.silent) == (ANSWER, 1000.0, 1005.0)
    assert (
        found.ignored[-1] - found.ignored[0] == 5 * (3 * MOST_IGNORED - 1)
        and len(found.ignored) <= MOST_IGNORED + 2
    )
    memory.note_silence("pod", accepted=False)
    assert memory.progress["pod"].ignored == found.ignored
    memory.note_answer("pod", ANSWER)
    assert (memory.progress["pod"].silent, memory.progress["pod"].ignored) == (None, ())
