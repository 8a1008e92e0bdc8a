"""One working operator at a time, by a Lease, as client-go does it. It saves work; safety is the
launch protocol.

Clocks are never compared between machines: a Lease is stale when *we* have seen it unchanged for
its duration.
"""

from __future__ import annotations

import asyncio
import logging
import random
from datetime import UTC, datetime

from modelchain_operator.api.kube import (
    LEASES,
    ApiError,
    Conflict,
    Forbidden,
    Kube,
    NotFound,
    Object,
)

log = logging.getLogger(__name__)

LEASE_SECONDS, RENEW_DEADLINE, RETRY_PERIOD = 15, 10.0, 2.0
NAME = "modelchain-operator"


class Leader:
    """`leading` is set while the Lease is ours; losing it clears `leading` until it is won again.

    Any other holder is waited for, a dead one for `LEASE_SECONDS`. `identity` must be unique to
    this process.
    """

    def __init__(self, kube: Kube, namespace: str, identity: str):
        self.kube = kube
        self.namespace = namespace
        self.identity = identity
        self.leading = asyncio.Event()
        # The Lease as we last wrote it; None when it must be read first.
        self._held: Object | None = None
        self._version = ""  # of the Lease as last read
        self._alone = False  # no Lease can be had, and this was said
        self._changed = 0.0  # when we saw that version first, by our clock

    async def run(self) -> None:
        """Hold or wait for the Lease until cancelled; then give it back, so that a successor need
        not wait.
        """
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        try:
            while True:
                start = loop.time()
                try:
                    async with asyncio.timeout_at(
                        (renewed if self.leading.is_set() else start) + RENEW_DEADLINE
                    ):
                        ours = await self._acquire_or_renew()
                    renewed, self._alone = start, False
                except (
                    NotFound,
                    Forbidden,
                ) as error:  # no namespace for it, or no right: it only saves work
                    if not self._alone:
                        log.warning(
                            "working without the Lease %s in %s: %s", NAME, self.namespace, error
                        )
                    renewed, ours, self._alone = start, True, True
                except (ApiError, TimeoutError) as error:
                    log.warning(
                        "the Lease %s could not be renewed: %s",
                        NAME,
                        str(error) or "no answer in time",
                    )
                    ours = self.leading.is_set() and loop.time() - renewed < RENEW_DEADLINE
                self._tell(ours)
                pause = RETRY_PERIOD * random.uniform(1.0, 1.2)
                await asyncio.sleep(
                    min(pause, max(renewed + RENEW_DEADLINE - loop.time(), 0.0)) if ours else pause
                )
        finally:
            if self.leading.is_set():
                self.leading.clear()
                await self._release()

    async def _acquire_or_renew(self) -> bool:
        """One try, at most two calls; whether the Lease is ours now."""
        lease, self._held = (
            self._held,
            None,
        )  # until the answer is here, what the server has is unknown
        try:
            if lease is None:
                lease = await self.kube.get(LEASES, self.namespace, NAME)
                if self._taken(lease):
                    return False
            self._held = await self.kube.replace(LEASES, self._claim(lease))
        except NotFound:
            self._held = await self.kube.create(LEASES, self._claim(None))
        except Conflict:
            return False
        return True

    def _taken(self, lease: Object) -> bool:
        """Whether another process holds it, and has renewed it within its duration of our time."""
        now = asyncio.get_running_loop().time()
        if lease["metadata"]["resourceVersion"] != self._version:
            self._version, self._changed = lease["metadata"]["resourceVersion"], now
        spec = lease["spec"]
        if not spec.get("holderIdentity") or spec["holderIdentity"] == self.identity:
            return False
        return now - self._changed < (spec.get("leaseDurationSeconds") or LEASE_SECONDS)

    def _claim(self, old: Object | None) -> Object:
        """The Lease as it is when we hold it, from now on."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = dict(old["spec"]) if old else {}
        if spec.get("holderIdentity") != self.identity:
            spec["acquireTime"] = now
            spec["leaseTransitions"] = spec.get("leaseTransitions", 0) + 1 if old else 0
        spec |= {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": LEASE_SECONDS,
            "renewTime": now,
        }
        meta = old["metadata"] if old else {"namespace": self.namespace, "name": NAME}
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": meta,
            "spec": spec,
        }

    def _tell(self, ours: bool) -> None:
        if ours and not self.leading.is_set():
            log.info("leading as %s", self.identity)
            self.leading.set()
        elif not ours and self.leading.is_set():
            log.warning("the Lease %s is lost; waiting for it", NAME)
            self.leading.clear()

    async def _release(self) -> None:
        if self._held is None:
            return
        lease = self._claim(self._held)
        lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
        try:
            async with asyncio.timeout(2.0):
                await self.kube.replace(LEASES, lease)
        except (ApiError, TimeoutError) as error:
            log.warning(
                "the Lease %s could not be given back: %s", NAME, str(error) or "no answer in time"
            )
