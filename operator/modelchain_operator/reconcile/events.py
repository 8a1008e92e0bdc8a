"""Events on a chain, as `kubectl describe` shows them: the same sentence again raises a count, and
adds no line.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter, OrderedDict
from datetime import UTC, datetime
from typing import Literal, TypeVar

from modelchain_operator.api.kube import EVENTS, AlreadyExists, ApiError, Kube, NotFound, Object

V = TypeVar("V")

log = logging.getLogger(__name__)

COMPONENT = "modelchain-operator"
REMEMBERED = 4096  # events and chains
BURST, REFILL_SECONDS = (
    25,
    30.0,
)  # events of one chain: that many at once, then one in so many seconds
MESSAGE_LIMIT = 1024  # characters, the API's own
PATIENCE = 5.0  # seconds one event may keep the others waiting
MOST_WAITING = 512  # events

Kind = Literal["Normal", "Warning"]


class Events:
    """Posts events. Failures are logged and counted, never raised: an event is news, not state.

    `counts`: posted, failed, and dropped for coming too often.
    """

    def __init__(self, kube: Kube, identity: str):
        self.kube = kube
        self.identity = identity
        self.counts: Counter[str] = Counter()
        self._repeats: OrderedDict[str, int] = OrderedDict()  # event name -> the count it has
        # Chain UID -> (tokens, when).
        self._tokens: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._waiting: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    def tell(self, chain: Object, kind: Kind, reason: str, message: str) -> None:
        """Say `message`, one sentence, of `chain` under the constant `reason`: in its turn, while
        the caller goes on.

        What still waits when the process ends is not said.
        """
        if not self._allowed(chain["metadata"]["uid"]) or len(self._waiting) >= MOST_WAITING:
            self.counts["dropped"] += 1
            return
        event = _event(chain, kind, reason, message[:MESSAGE_LIMIT], self.identity)
        task = asyncio.create_task(self._in_turn(event))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _in_turn(self, event: Object) -> None:
        try:
            async with self._turn, asyncio.timeout(PATIENCE):
                await self._post(event)
            self.counts["posted"] += 1
        except (
            ApiError,
            TimeoutError,
            RuntimeError,
        ) as error:  # RuntimeError: the session was closed, as we stop
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
                except AlreadyExists:  # from before we were started
                    count = (await self.kube.patch(EVENTS, namespace, name, now)).get("count") or 1
            if count:
                await self.kube.patch(EVENTS, namespace, name, now | {"count": count + 1})
        except NotFound:  # the server keeps events for an hour
            await self.kube.create(EVENTS, event)
            count = 0
        _keep(self._repeats, name, count + 1)

    def _allowed(self, uid: str) -> bool:
        """Take one token of the chain's bucket, if there is one."""
        now = asyncio.get_running_loop().time()
        tokens, when = self._tokens.pop(uid, (float(BURST), now))
        tokens = min(BURST, tokens + (now - when) / REFILL_SECONDS)
        _keep(self._tokens, uid, (tokens - 1 if tokens >= 1 else tokens, now))
        return tokens >= 1


def _keep(memory: OrderedDict[str, V], key: str, value: V) -> None:
    memory[key] = value
    while len(memory) > REMEMBERED:
        memory.popitem(last=False)


def _event(chain: Object, kind: str, reason: str, message: str, identity: str) -> Object:
    """A core/v1 Event whose name says what it says, so that two operators write one."""
    meta = chain["metadata"]
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    digest = hashlib.sha256("\0".join((meta["uid"], kind, reason, message)).encode()).hexdigest()
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
        "reason": reason,
        "message": message,
        "count": 1,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "source": {"component": COMPONENT},
        "reportingComponent": COMPONENT,
        "reportingInstance": identity,
    }
