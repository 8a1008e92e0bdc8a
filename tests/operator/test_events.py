"""Events: one event per message, with a count and a rate limit, and no failure stops a pass."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import travel

from modelchain.api.reasons import Code
from modelchain.api.status import StageStatus, State
from modelchain_operator.api.kube import AlreadyExists, ApiError, Forbidden, NotFound
from modelchain_operator.reconcile import controller
from modelchain_operator.reconcile.events import Events

CHAIN = {
    "apiVersion": "modelchain.dev/v1alpha1",
    "kind": "ModelChain",
    "metadata": {"namespace": "ns", "name": "vit", "uid": "u-1", "resourceVersion": "5"},
}


class Port:
    """The events of one API server, as `Events` uses it."""

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self.writes = 0
        self.fault: ApiError | None = None
        self.silent = False

    async def _write(self) -> None:
        self.writes += 1
        if self.silent:
            await asyncio.sleep(100)
        if self.fault:
            raise self.fault

    async def create(self, resource: object, event: dict[str, Any]) -> dict[str, Any]:
        await self._write()
        if event["metadata"]["name"] in self.events:
            raise AlreadyExists("yes")
        self.events[event["metadata"]["name"]] = dict(event)
        return event

    async def patch(
        self, resource: object, namespace: str, name: str, body: dict[str, Any]
    ) -> dict[str, Any]:
        await self._write()
        if name not in self.events:
            raise NotFound("no")
        self.events[name] |= body
        return self.events[name]

    def counts(self) -> dict[str, int]:
        return {event["message"]: event["count"] for event in self.events.values()}


def events(port: Port) -> Events:
    return Events(port, "pod-1")  # type: ignore[arg-type]


async def tell(ours: Events, *said: Any) -> None:
    ours.tell(*said)
    await asyncio.gather(*ours._waiting)


def test_a_repeated_message_raises_the_count() -> None:
    async def main() -> None:
        port = Port()
        ours = events(port)
        for _ in range(3):
            await tell(ours, CHAIN, "Normal", Code.STAGE_STARTING, "Stage vit-t started.")
        await tell(ours, CHAIN, "Warning", Code.STAGE_FAILED, "Stage vit-t failed.")
        assert port.counts() == {"Stage vit-t started.": 3, "Stage vit-t failed.": 1}
        event = next(iter(port.events.values()))
        assert (
            event["metadata"]["name"].startswith("vit.") and event["involvedObject"]["uid"] == "u-1"
        )

    travel.run(main())


def test_the_count_goes_on_after_a_restart_and_begins_again_when_the_event_expired() -> None:
    async def main() -> None:
        port = Port()
        await tell(events(port), CHAIN, "Normal", Code.STAGE_RUNNING, "M.")
        after = events(port)
        for _ in range(2):
            await tell(after, CHAIN, "Normal", Code.STAGE_RUNNING, "M.")
        assert port.counts() == {"M.": 3}
        port.events.clear()
        await tell(after, CHAIN, "Normal", Code.STAGE_RUNNING, "M.")
        assert port.counts() == {"M.": 1}

    travel.run(main())


def test_the_words_of_other_programs_are_one_short_line() -> None:
    """Both ends of a long message stay, and a terminal is told nothing."""

    async def main() -> None:
        port = Port()
        said = "webhook says\n\x1b[2J" + "no " * 1000 + "really"
        await tell(events(port), CHAIN, "Warning", Code.LAUNCH_REFUSED, said)
        [message] = port.counts()
        assert len(message) == 1024 and message.isprintable()
        assert message.startswith("webhook says \\x1b[2J") and message.endswith("no really")

    travel.run(main())


def test_a_flood_of_events_is_limited() -> None:
    async def main() -> None:
        port = Port()
        ours = events(port)
        for _ in range(600):
            await tell(ours, CHAIN, "Normal", Code.STAGE_RUNNING, "M.")
            await asyncio.sleep(0.1)
        assert (port.writes, ours.counts["dropped"]) == (26, 600 - 26)
        await asyncio.sleep(300)
        await tell(ours, CHAIN, "Normal", Code.STAGE_RUNNING, "M.")
        assert port.writes == 27

    travel.run(main())


def test_failed_writes_are_counted_and_time_out_soon() -> None:
    async def main() -> None:
        port = Port()
        ours = events(port)
        port.fault = Forbidden("no")
        await tell(ours, CHAIN, "Normal", Code.STAGE_RUNNING, "M.")
        port.silent = True
        start = travel.now()
        await tell(ours, CHAIN, "Normal", Code.STAGE_RUNNING, "M.")
        assert (ours.counts["failed"], round(travel.now() - start)) == (2, 5)

    travel.run(main())


STATES = {
    State.PENDING: Code.STAGE_PENDING,
    State.INDEXING: Code.STAGE_INDEXING,
    State.QUEUED: Code.STAGE_QUEUED,
    State.STARTING: Code.STAGE_STARTING,
    State.RUNNING: Code.STAGE_RUNNING,
    State.VERIFYING: Code.STAGE_VERIFYING,
    State.SUCCEEDED: Code.STAGE_SUCCEEDED,
    State.FAILED: Code.STAGE_FAILED,
    State.SUSPENDED: Code.STAGE_SUSPENDED,
}


@pytest.mark.parametrize("state", State)
def test_the_event_of_a_state(state: State) -> None:
    assert controller.news(StageStatus(name="a", state=state)) is STATES[state]


@pytest.mark.parametrize(
    ("stage", "code"),
    [
        (StageStatus(name="a", stalled=True), Code.STAGE_STALLED),
        (StageStatus(name="a", reason_code="Stopping"), Code.STAGE_STOPPING),
        (StageStatus(name="a", not_before=1.0), Code.STAGE_RETRYING),
        (StageStatus(name="a", reason_code="NodesAvoided"), Code.NODES_AVOIDED),
        (StageStatus(name="a", reason_code="ProgressUnknown"), Code.PROGRESS_UNKNOWN),
    ],
)
def test_the_event_of_a_stages_situation(stage: StageStatus, code: Code) -> None:
    assert controller.news(stage) is code
