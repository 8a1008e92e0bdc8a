"""The running operator: its tasks, and the events after which a chain gets a pass.

An event only puts the chain's key into the queue. Events may be missed: kopf does not report what
was deleted while a watch was broken. So all chains are also listed every minute.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from modelchain_operator.api.kube import (
    ARTIFACTS,
    CHAINS,
    CLAIMS,
    JOBS,
    PODS,
    ApiError,
    Forbidden,
    Gone,
    Kube,
    NotFound,
    Object,
    Resource,
)
from modelchain_operator.api.objects import is_true, label, true_condition, uid
from modelchain_operator.reconcile.figures import Figures, figures
from modelchain_operator.runners.pods import is_live
from modelchain_operator.runners.registry import RUNNERS
from modelchain_operator.runners.template import CHAIN, ROLE
from modelchain_operator.watch.health import serve as serve_health
from modelchain_operator.watch.kopf_watch import Receiver, watch
from modelchain_operator.watch.leader import Leader
from modelchain_operator.watch.queue import WorkQueue

Key = tuple[str, str]  # a chain's namespace and name

# All times are in seconds.

# Between two LISTs of all chains. Each LIST queues the unfinished ones.
RESYNC = 60.0
# Between two LISTs that queue the finished chains as well.
RESYNC_ALL = 600.0
# Between two tries to find a kind that is not installed.
DISCOVERY = 30.0
# The watch event of a status that we wrote can arrive before the answer to our PUT. We wait so long
# before we ask whether the write was ours.
ECHO = 0.1
# Before kopf is started again after it has ended.
WATCH_AGAIN = 5.0
# Before the chains are listed again after a LIST that took too long.
LIST_AGAIN = 5.0
# After a signal to stop. The process is killed if it has not ended by then.
STOP_WITHIN = 15

# The conditions with which a job of any kind ends.
JOB_ENDS = ("Succeeded", "Complete", "Failed")

log = logging.getLogger(__name__)


class Reconciler(Protocol):
    """What makes a pass over a chain. All methods but `reconcile` are quick, and never raise."""

    async def reconcile(self, key: Key) -> float | None: ...
    def remember(self, pod: Object) -> bool: ...
    def artifact_changed(self, record: Object) -> None: ...
    def claim_changed(self, claim: Key, uid: str | None) -> bool: ...


class Service:
    """Calls `controller` for the chains of `namespaces`; without any, for those of all namespaces.

    With a `leader`, it works only while that leads. `health` is the URL that answers probes.
    """

    def __init__(
        self,
        kube: Kube,
        controller: Reconciler,
        namespaces: Sequence[str],
        leader: Leader | None,
        health: str,
    ):
        self.kube = kube
        self.controller = controller
        self.namespaces = list(namespaces)
        self.leader = leader
        self.health = health
        self.queue: WorkQueue[Key] = WorkQueue(
            controller.reconcile, gate=leader.leading if leader else None
        )
        self._loop = asyncio.get_running_loop()
        # When chains or claims were last listed, or a LIST was at least tried, in loop time.
        self._tried = self._loop.time()
        # When the last complete LIST of chains ended, in seconds since the epoch.
        self.listed_at = 0.0
        # Whether the last LIST was not permitted.
        self._refused = False
        # What `/metrics` shows of each chain.
        self.known: dict[Key, Figures] = {}

    @property
    def leads(self) -> bool:
        return self.leader is None or self.leader.leading.is_set()

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT.

        Raises as soon as one task fails, so that the process ends and the kubelet restarts it.
        """
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, stop.set)
        ours: dict[Resource, Receiver] = {
            CHAINS: self._on_chain,
            ARTIFACTS: self._on_artifact,
            PODS: self._on_pod,
            JOBS: self._on_job,
        }
        runners = {runner.resource for runner in RUNNERS.values()}
        parts = [
            self.queue.run(),
            self._resync(),
            self._watch(ours),
            *(self._watch({kind: self._on_job}) for kind in runners - ours.keys()),
        ]
        if self.leader:
            parts.append(self.leader.run())
        if self.health:
            serve_health(self.health, self._alive)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(part) for part in parts]
            try:
                await stop.wait()
                log.info("stopping on a signal")
            finally:
                signal.alarm(STOP_WITHIN)  # SIGALRM kills the process if a task hangs
            for task in running:
                task.cancel()

    async def _resync(self) -> None:
        """List all chains and claims every minute, for ever."""
        due = 0.0
        while True:
            self._tried, listed = self._loop.time(), CHAINS
            try:
                everything = self._loop.time() >= due
                await self._list(everything)
                if everything:
                    due = self._loop.time() + RESYNC_ALL
                self._refused, listed = False, CLAIMS
                await self._list_claims()
            except Gone:  # the pages took too long
                await asyncio.sleep(LIST_AGAIN)
                continue
            except NotFound:  # the CRD is not installed; `_served` logs that
                pass
            except Forbidden as error:
                self._refused = listed is CHAINS
                remedy = self._remedy(error, listed)
                log.warning("%s could not be listed: %s", listed.plural, remedy)
            except ApiError as error:
                log.warning("%s could not be listed: %s", listed.plural, error)
            await asyncio.sleep(RESYNC * random.uniform(0.9, 1.0))

    def _remedy(self, error: Forbidden, listed: Resource) -> str:
        """What a LIST was refused for, and what to do about it."""
        if error.code == 401:
            return (
                f"the API server refused the operator's credentials ({error}); renew its kubeconfig"
                " or token"
            )
        where = ", ".join(self.namespaces) or "all namespaces"
        return (
            f"the right to list {listed.plural} in {where} is missing ({error}); grant the roles of"
            " operator/rbac/"
        )

    async def _list(self, everything: bool) -> None:
        """List all chains and queue the unfinished ones, or `everything`."""
        before = set(self.known)
        listed: set[Key] = set()
        async for chain in self._all(CHAINS):
            listed.add(_key(chain))
            self._know(chain)
            if everything or not is_true(chain, "Finished"):
                self.queue.add(_key(chain))
        self.listed_at = time.time()
        # A chain that was known and is not listed was deleted, perhaps while no watch saw it.
        for key in before - listed:
            del self.known[key]
            self.queue.add(key)

    async def _list_claims(self) -> None:
        """List all claims, and queue the complete chains whose claim is gone or was replaced.

        Such a chain has no other pass for minutes, and would go on to say that it is complete.
        """
        used = {
            key: (key[0], chain.claim)
            for key, chain in self.known.items()
            if "Complete" in chain.true
        }
        uids: dict[Key, str | None] = dict.fromkeys(used.values())
        async for claim in self._all(CLAIMS):
            if _key(claim) in uids:
                uids[_key(claim)] = uid(claim)
        gone = {key for key, found in uids.items() if self.controller.claim_changed(key, found)}
        for chain, used_claim in used.items():
            if used_claim in gone:
                self.queue.add(chain)

    async def _all(self, resource: Resource) -> AsyncIterator[Object]:
        """All objects of a kind in the namespaces served.

        They are read page by page: all at once could take more memory than the operator has.
        """
        spaces: list[str | None] = [*self.namespaces] or [None]
        for space in spaces:
            async for page in self.kube.pages(resource, space):
                self._tried = self._loop.time()
                for thing in page:
                    yield thing

    def _know(self, chain: Object) -> None:
        """Keep a chain's figures for `/metrics`, unless they are older than those we have.

        A LIST and a watch may overtake each other. If a counter fell for a moment, Prometheus would
        take that for a restart and count everything again.
        """
        known = self.known.get(_key(chain))
        if known is None or known.version < int(chain["metadata"]["resourceVersion"]):
            self.known[_key(chain)] = figures(chain, known)

    def _on_chain(self, chain: Object) -> None:
        self._know(chain)
        self._loop.call_later(ECHO, self._wake, _key(chain), chain)

    def _on_artifact(self, artifact: Object) -> None:
        """Queue every chain whose status has the record's inputs: it may have been deleted."""
        self.controller.artifact_changed(artifact)
        namespace, digest = artifact["metadata"]["namespace"], artifact["spec"]["inputDigest"]
        for key, known in self.known.items():
            if key[0] == namespace and digest in known.digests:
                self.queue.add(key)

    def _on_job(self, job: Object) -> None:
        """Handle the event of a job of any runner, or of a CPU Job.

        Of a CPU Job only its failure is news: if it ends well, its pod has told that before.
        """
        if _of_cpu_job(job) and not true_condition(job, "Failed"):
            return
        self._on_part(job, ended=any(true_condition(job, kind) for kind in JOB_ENDS))

    def _on_pod(self, pod: Object) -> None:
        """Handle the event of a pod.

        Of a CPU Job's pod only its end is news, and only once. What it waits for is found when its
        chain is polled.
        """
        if not _of_cpu_job(pod):
            self._on_part(pod, ended=not is_live(pod))
            self.controller.remember(pod)
        elif self.controller.remember(pod):
            self._on_part(pod, ended=True)

    def _on_part(self, part: Object, ended: bool) -> None:
        """Handle a job or pod. If it has ended, its chain goes first: a node may be idle."""
        if chain := label(part, CHAIN):
            self._wake((part["metadata"]["namespace"], chain), part, first=ended)

    def _wake(self, key: Key, seen: Object, first: bool = False) -> None:
        """Queue a chain, unless the event shows our own write: the pass has acted on it already."""
        if not self.kube.wrote(seen):
            self.queue.add(key, first=first)

    async def _watch(self, receivers: Mapping[Resource, Receiver]) -> None:
        """Watch these kinds as soon as all of them are installed."""
        while not await self._served(receivers):
            await asyncio.sleep(DISCOVERY)
        for key in self.known:  # a chain may have waited until the kind was installed
            self.queue.add(key)
        kinds = ", ".join(resource.plural for resource in receivers)
        log.info("watching %s in %s", kinds, ", ".join(self.namespaces) or "all namespaces")
        while True:
            try:
                await watch(self.kube, receivers, self.namespaces)
            except Exception as error:
                # kopf ends at any answer that it does not expect, such as a 409 to a LIST. If the
                # LIST was refused, `_resync` has logged that already.
                if not self._refused:
                    again = f"again in {WATCH_AGAIN:.0f} s"
                    log.warning("%s are not watched: %s; %s", kinds, error, again)
            await asyncio.sleep(WATCH_AGAIN)

    async def _served(self, resources: Mapping[Resource, Receiver]) -> bool:
        """Whether the API server knows all these kinds. What is missing is logged."""
        try:
            missing = [
                resource for resource in resources if not await self.kube.resource_exists(resource)
            ]
        except Forbidden:  # `_resync` logs that
            return False
        except ApiError as error:
            log.warning("the kinds of the API server could not be read: %s", error)
            return False
        if missing:
            kinds = ", ".join(resource.qualified for resource in missing)
            installs = (r.install for r in RUNNERS.values() if r.resource in missing)
            install = next(installs, "kubectl apply -f crds/")
            log.warning(
                "not installed: %s; install: %s; looking again in %.0f s", kinds, install, DISCOVERY
            )
        return not missing

    def _alive(self) -> str | None:
        """Why this process must be restarted, or None if it is well. Called from another thread.

        It is well as long as it tries to list the chains. A restart helps nothing if the API server
        is away or refuses.
        """
        age = self._loop.time() - self._tried
        return f"the last try to list the chains was {age:.0f} s ago" if age > 3 * RESYNC else None


def _of_cpu_job(part: Object) -> bool:
    """Whether a Job or pod is one of the Jobs that the operator runs beside training."""
    return label(part, ROLE) not in ("", "train")


def _key(obj: Object) -> Key:
    return obj["metadata"]["namespace"], obj["metadata"]["name"]
