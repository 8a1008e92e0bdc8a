"""Events on a chain, as `kubectl describe` shows them.

An event with the same sentence as an earlier one raises its count and adds no line.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter, OrderedDict
from datetime import UTC, datetime
from typing import Literal, TypeVar

from modelchain.api.messages import one_line, shortened
from modelchain.api.reasons import Code
from modelchain_operator.api.kube import EVENTS, AlreadyExists, ApiError, Kube, NotFound, Object

V = TypeVar("V")

log = logging.getLogger(__name__)

COMPONENT = "modelchain-operator"
# How many events and how many chains are remembered.
REMEMBERED = 4096
# A chain may post this many events at once, and then one in so many seconds.
BURST, REFILL_SECONDS = 25, 30.0
# The API server's limit, in characters.
MESSAGE_LIMIT = 1024
# For how many seconds one event may keep the others waiting.
PATIENCE = 5.0
# How many events may wait. Further ones are dropped.
MOST_WAITING = 512

Kind = Literal["Normal", "Warning"]


class Events:
    """Posts events. A failure is logged and counted, and never raised: no decision needs an event.

    `counts` has how many events were posted, have failed, and were dropped as there were too many.
    """

    def __init__(self, kube: Kube, identity: str):
        self.kube = kube
        self.identity = identity
        self.counts: Counter[str] = Counter()
        # By the event's name, the count that it has on the server.
        self._repeats: OrderedDict[str, int] = OrderedDict()
        # By chain UID, the tokens in its bucket and when they were counted.
        self._tokens: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._waiting: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    def tell(self, chain: Object, kind: Kind, code: Code, message: str) -> None:
        """Post an event on `chain`, one after the other and without making the caller wait.

        `message` is one sentence. Events that still wait when the process ends are lost.
        """
        if not self._allowed(chain["metadata"]["uid"]) or len(self._waiting) >= MOST_WAITING:
            self.counts["dropped"] += 1
            return
        event = _event(
            chain, kind, code, shortened(one_line(message), MESSAGE_LIMIT), self.identity
        )
        task = asyncio.create_task(self._in_turn(event))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _in_turn(self, event: Object) -> None:
        try:
            async with self._turn, asyncio.timeout(PATIENCE):
                await self._post(event)
            self.counts["posted"] += 1
        # RuntimeError comes from a session that was closed since the operator stops.
        except (ApiError, TimeoutError, RuntimeError) as error:
            self.counts["failed"] += 1
            log.warning(
                "event %s was not posted: %s", event["reason"], str(error) or "no answer in time"
            )

    async def _post(self, event: Object) -> None:
        name, namespace = event["metadata"]["name"], event["metadata"]["namespace"]
        now = {"lastTimestamp": event["lastTimestamp"]}
        count = self._repeats.pop(name, 0)
        try:
            if not count:
                try:
                    await self.kube.create(EVENTS, event)
                except AlreadyExists:
                    # An earlier process, or another operator, posted it. The answer has its count.
                    count = (await self.kube.patch(EVENTS, namespace, name, now)).get("count") or 1
            if count:
                await self.kube.patch(EVENTS, namespace, name, now | {"count": count + 1})
        except NotFound:  # the server deletes an event after an hour
            await self.kube.create(EVENTS, event)
            count = 0
        _keep(self._repeats, name, count + 1)

    def _allowed(self, uid: str) -> bool:
        """Take one token from the chain's bucket; False if it is empty."""
        now = asyncio.get_running_loop().time()
        tokens, when = self._tokens.pop(uid, (float(BURST), now))
        tokens = min(BURST, tokens + (now - when) / REFILL_SECONDS)
        _keep(self._tokens, uid, (tokens - 1 if tokens >= 1 else tokens, now))
        return tokens >= 1


def _keep(memory: OrderedDict[str, V], key: str, value: V) -> None:
    """Put a value, and drop the oldest ones above the limit."""
    memory[key] = value
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)


def _event(chain: Object, kind: Kind, code: Code, message: str, identity: str) -> Object:
    """A core/v1 Event. Its name is a hash of its content, so two operators post only one."""
    meta = chain["metadata"]
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    digest = hashlib.sha256("\0".join((meta["uid"], kind, code, message)).encode()).hexdigest()
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": meta["namespace"], "name": f"{meta['name']}.{digest[:16]}"},
        "involvedObject": {
            "apiVersion": chain["apiVersion"],
            "kind": chain["kind"],
            "namespace": meta["namespace"],
            "name": meta["name"],
            "uid": meta["uid"],
            "resourceVersion": meta["resourceVersion"],
        },
        "type": kind,
        "reason": code,
        "message": message,
        "count": 1,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": identity,
    }
