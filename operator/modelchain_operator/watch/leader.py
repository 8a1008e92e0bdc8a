"""Elects the one operator that works, with a Lease, as client-go does.

The Lease only saves work. Two operators that work at once do no harm, by the launch protocol.

Clocks of two machines are never compared. A Lease is stale if this process has seen it unchanged
for the Lease's duration by its own clock.
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

# In seconds; the values are client-go's defaults.
# After so long without a renewal, others may take the Lease.
LEASE_SECONDS = 15
# After so long without a renewal, we stop working.
RENEW_DEADLINE = 10.0
# The pause between two tries.
RETRY_PERIOD = 2.0
NAME = "modelchain-operator"


class Leader:
    """Takes and renews the Lease. While it is ours, `leading` is set, else it is clear.

    While another process holds the Lease, we wait; if that process died, for `LEASE_SECONDS`.
    `identity` must be unique to this process.
    """

    def __init__(self, kube: Kube, namespace: str, identity: str):
        self.kube = kube
        self.namespace = namespace
        self.identity = identity
        self.leading = asyncio.Event()
        # The Lease as we last wrote it; None if it must be read first.
        self._written: Object | None = None
        # The resourceVersion of the Lease that we last read, and when we first saw it (loop time).
        self._version, self._changed = "", 0.0
        # Whether we work without a Lease. This is logged only once.
        self._alone = False

    async def run(self) -> None:
        """Take and renew the Lease until cancelled.

        Then give it back, so that the next operator need not wait for it to expire.
        """
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        try:
            while True:
                start = loop.time()
                since = renewed if self.leading.is_set() else start
                try:
                    async with asyncio.timeout_at(since + RENEW_DEADLINE):
                        ours = await self._acquire_or_renew()
                    renewed, self._alone = start, False
                except (NotFound, Forbidden) as error:
                    # There is no namespace for the Lease, or no right to it. We work all the same,
                    # since the Lease only saves work.
                    if not self._alone:
                        where = f"{NAME} in {self.namespace}"
                        log.warning("working without the Lease %s: %s", where, error)
                    renewed = start
                    ours = True
                    self._alone = True
                except (ApiError, TimeoutError) as error:
                    why = str(error) or "no answer in time"
                    log.warning("the Lease %s could not be renewed: %s", NAME, why)
                    ours = self.leading.is_set() and loop.time() - renewed < RENEW_DEADLINE
                self._set_leading(ours)
                pause = RETRY_PERIOD * random.uniform(1.0, 1.2)
                # Wake up at the deadline at the latest, to stop working in time.
                left = max(renewed + RENEW_DEADLINE - loop.time(), 0.0)
                await asyncio.sleep(min(pause, left) if ours else pause)
        finally:
            if self.leading.is_set():
                self.leading.clear()
                await self._give_back()

    async def _acquire_or_renew(self) -> bool:
        """Try once, with at most two calls. Returns whether the Lease is ours now."""
        # If the answer is lost, we do not know what the server has, and must read it next time.
        lease, self._written = self._written, None
        try:
            if lease is None:
                lease = await self.kube.get(LEASES, self.namespace, NAME)
                if self._taken(lease):
                    return False
            self._written = await self.kube.replace(LEASES, self._as_ours(lease))
        except NotFound:
            self._written = await self.kube.create(LEASES, self._as_ours(None))
        except Conflict:
            return False
        return True

    def _taken(self, lease: Object) -> bool:
        """Whether another process holds the Lease, and the Lease is not stale."""
        now = asyncio.get_running_loop().time()
        if lease["metadata"]["resourceVersion"] != self._version:
            self._version, self._changed = lease["metadata"]["resourceVersion"], now
        spec = lease["spec"]
        if not spec.get("holderIdentity") or spec["holderIdentity"] == self.identity:
            return False
        return now - self._changed < (spec.get("leaseDurationSeconds") or LEASE_SECONDS)

    def _as_ours(self, old: Object | None) -> Object:
        """The Lease with us as its holder, renewed now."""
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

    def _set_leading(self, ours: bool) -> None:
        """Set or clear `leading`, and log every change."""
        if ours and not self.leading.is_set():
            log.info("leading as %s", self.identity)
            self.leading.set()
        elif not ours and self.leading.is_set():
            log.warning("the Lease %s is lost; waiting for it", NAME)
            self.leading.clear()

    async def _give_back(self) -> None:
        """Clear the holder, so that another operator takes over at once."""
        if self._written is None:
            return
        lease = self._as_ours(self._written)
        lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
        try:
            async with asyncio.timeout(2.0):
                await self.kube.replace(LEASES, lease)
        except (ApiError, TimeoutError) as error:
            why = str(error) or "no answer in time"
            log.warning("the Lease %s could not be given back: %s", NAME, why)
