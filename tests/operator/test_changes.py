"""Objects that are followed: listed once, then watched; after a 410 listed again; after the end of
a stream watched again from the version that was seen last.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from modelchain_operator.api.kube import (
    CHAINS,
    ApiError,
    Forbidden,
    Gone,
    Object,
    Resource,
    Throttled,
    Unavailable,
)
from modelchain_operator.cli import changes as module
from modelchain_operator.cli.changes import Feeds, changes


class Over(Exception):
    """The script has ended."""


def thing(name: str, version: int, uid: str = "") -> Object:
    return {"metadata": {"name": name, "uid": uid or name, "resourceVersion": str(version)}}


class Scripted:
    """Answers lists and watches from a script: a list of objects with its version, a list of
    events, or an error. An error at the end of the events breaks the stream.
    """

    def __init__(self, *answers: Any):
        self.answers = list(answers)
        self.asked: list[str] = []

    async def list_at(
        self, resource: Resource, namespace: str | None, selector: str = "", fields: str = ""
    ) -> tuple[list[Object], str]:
        assert (resource, namespace, selector, fields) == (CHAINS, "team", "", "metadata.name=a")
        self.asked.append("list")
        objects, version = self._next()
        return objects, version

    async def watch(
        self, resource: Resource, namespace: str, version: str, selector: str, fields: str
    ) -> AsyncIterator[tuple[str, Object]]:
        assert (resource, namespace, selector, fields) == (CHAINS, "team", "", "metadata.name=a")
        self.asked.append(f"watch {version}")
        for event in self._next():
            if isinstance(event, Exception):
                raise event
            yield event

    def _next(self) -> Any:
        if not self.answers:
            raise Over
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def told(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> tuple[list[list[str]], list[str]]:
    """The names and versions that were told each time, and what the server was asked."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.0)
    kube: Any = Scripted(*answers)
    seen: list[list[str]] = []

    async def main() -> None:
        async for objects in changes(kube, CHAINS, "team", fields="metadata.name=a"):
            seen.append(
                [f"{o['metadata']['name']}{o['metadata']['resourceVersion']}" for o in objects]
            )

    with pytest.raises(Over):
        asyncio.run(main())
    return seen, kube.asked


def test_it_is_listed_once_and_then_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, asked = told(
        monkeypatch,
        ([thing("a", 3)], "5"),
        [
            ("MODIFIED", thing("a", 6)),
            ("ADDED", thing("b", 7)),
            ("DELETED", thing("a", 8)),
        ],
    )
    assert seen == [["a3"], ["a6"], ["a6", "b7"], ["b7"]]
    assert asked == ["list", "watch 5", "watch 8"]


def test_a_stream_that_ends_goes_on_from_its_bookmark(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, asked = told(
        monkeypatch,
        ([thing("a", 3)], "5"),
        [("BOOKMARK", {"metadata": {"resourceVersion": "40"}})],
        [],
        [("MODIFIED", thing("a", 41))],
    )
    assert seen == [["a3"], ["a41"]]
    assert asked == ["list", "watch 5", "watch 40", "watch 40", "watch 41"]


@pytest.mark.parametrize("broken", [Unavailable("reset"), Throttled("slowly", retry_after=0.0)])
def test_a_stream_that_breaks_is_begun_again(
    monkeypatch: pytest.MonkeyPatch, broken: ApiError
) -> None:
    seen, asked = told(
        monkeypatch,
        ([thing("a", 3)], "5"),
        [("MODIFIED", thing("a", 6)), broken],
        broken,
        [("MODIFIED", thing("a", 7))],
    )
    assert seen == [["a3"], ["a6"], ["a7"]]
    assert asked == ["list", "watch 5", "watch 6", "watch 6", "watch 7"]


def test_after_a_410_it_is_listed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was deleted meanwhile is gone, and so is one that has another UID now."""
    seen, asked = told(
        monkeypatch,
        ([thing("a", 3), thing("b", 4)], "5"),
        [Gone("too old")],
        Unavailable("away"),
        Gone("the list took too long"),
        ([thing("a", 9, uid="another")], "10"),
        [("MODIFIED", thing("a", 11, uid="another"))],
    )
    assert seen == [["a3", "b4"], ["a9"], ["a11"]]
    assert asked == ["list", "watch 5", "list", "list", "list", "watch 10", "watch 11"]


@pytest.mark.parametrize("answers", [(Forbidden("no"),), (([], "1"), Forbidden("no watch"))])
def test_what_no_other_try_mends_is_raised(answers: Any) -> None:
    kube: Any = Scripted(*answers)

    async def main() -> None:
        async for _ in changes(kube, CHAINS, "team", fields="metadata.name=a"):
            pass

    with pytest.raises(Forbidden):
        asyncio.run(main())


def test_the_first_list_is_not_tried_again() -> None:
    async def main(kube: Any) -> None:
        await anext(changes(kube, CHAINS, "team", fields="metadata.name=a"))

    with pytest.raises(Unavailable):
        asyncio.run(main(Scripted(Unavailable("away"))))


def test_pauses_grow_to_their_longest() -> None:
    pauses = module._pauses()
    found = [next(pauses) for _ in range(40)]
    assert found[0] <= module.FIRST_PAUSE and 15.0 <= found[-1] <= module.LONGEST_PAUSE


def test_an_error_of_a_feed_is_raised_where_news_are_awaited() -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise Forbidden("no")

    async def main() -> list[int]:
        seen: list[int] = []
        async with Feeds() as feeds:
            feeds.add(broken(), seen.append)
            with pytest.raises(Forbidden):
                while True:
                    await feeds.wait()
        return seen

    assert asyncio.run(main()) == [1]
