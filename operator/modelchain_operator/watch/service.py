"""The running operator: what wakes a chain, and the tasks that live and end together.

An event only puts a key in the queue. kopf never tells of what was deleted while a watch was
broken, so what we rely on is a LIST of all chains every minute.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from modelchain_operator.api.kube import (
    ARTIFACTS,
    CHAINS,
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
from modelchain_operator.api.objects import is_true, label, true_condition
from modelchain_operator.reconcile.figures import Figures, figures
from modelchain_operator.runners.pods import is_live
from modelchain_operator.runners.registry import RUNNERS
from modelchain_operator.runners.template import CHAIN
from modelchain_operator.watch.kopf_watch import Receiver, watch
from modelchain_operator.watch.leader import Leader
from modelchain_operator.watch.queue import WorkQueue

Key = tuple[str, str]  # a chain's namespace and name

RESYNC = 60.0  # seconds between two LISTs of all chains, which wake the unfinished ones
RESYNC_ALL = 600.0  # seconds between two that wake all
DISCOVERY = 30.0  # seconds between two tries to find a kind that is not installed
# seconds; the event that tells of a status we wrote can be here before the answer to the PUT
ECHO = 0.1
WATCH_AGAIN = 5.0  # seconds after kopf has ended
LIST_AGAIN = 5.0  # seconds after a LIST that took too long
STOP_WITHIN = 15  # seconds

JOB_ENDS = ("Succeeded", "Complete", "Failed")  # conditions

log = logging.getLogger(__name__)


class Controller(Protocol):
    """What acts on a chain. `remember` and `artifact_changed` are quick and never raise."""

    async def reconcile(self, key: Key) -> float | None: ...
    def remember(self, pod: Object) -> None: ...
    def artifact_changed(self, record: Object) -> None: ...


class Service:
    """Wakes `controller` for every chain of `namespaces` (all when empty), while `leader`, if any,
    leads.

    `health` is the URL at which probes are answered.
    """

    def __init__(
        self,
        kube: Kube,
        controller: Controller,
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
        self._listed = self._loop.time()  # when the last complete LIST was there
        self._refused = False  # the last LIST was not permitted
        self.listed_at = 0.0  # the same, in seconds since the epoch
        self.known: dict[Key, Figures] = {}

    @property
    def leads(self) -> bool:
        return self.leader is None or self.leader.leading.is_set()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises as soon as one part fails: the process is to be
        started again.
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
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(part) for part in parts]
            try:
                await stop.wait()
                log.info("told to stop")
            finally:
                signal.alarm(STOP_WITHIN)  # the process ends, whatever hangs now
            for task in running:
                task.cancel()

    async def _resync(self) -> None:
        due = 0.0
        while True:
            try:
                everything = self._loop.time() >= due
                await self._list(everything)
                if everything:
                    due = self._loop.time() + RESYNC_ALL
                self._refused = False
            except Gone:  # the pages took too long
                await asyncio.sleep(LIST_AGAIN)
                continue
            except NotFound:  # the kind is not installed, as `_served` says
                pass
            except Forbidden as error:
                self._refused = True
                log.warning("the chains could not be listed: %s", self._remedy(error))
            except ApiError as error:
                log.warning("the chains could not be listed: %s", error)
            await asyncio.sleep(RESYNC * random.uniform(0.9, 1.0))

    def _remedy(self, error: Forbidden) -> str:
        if error.code == 401:
            return (
                f"the API server refused the operator's credentials ({error}); renew its kubeconfig"
                " or token"
            )
        where = ", ".join(self.namespaces) or "all namespaces"
        return (
            f"the right to list modelchains in {where} is missing ({error}); grant the roles of"
            " operator/rbac/"
        )

    async def _list(self, everything: bool) -> None:
        before = set(self.known)
        spaces: list[str | None] = [*self.namespaces] or [None]
        there: set[Key] = set()
        for space in spaces:
            async for page in self.kube.pages(
                CHAINS, space
            ):  # all at once may be more than all else we hold
                for chain in page:
                    there.add(_key(chain))
                    self._know(chain)
                    if everything or not is_true(chain, "Finished"):
                        self.queue.add(_key(chain))
        self._listed, self.listed_at = self._loop.time(), time.time()
        for key in before - there:
            del self.known[key]
            self.queue.add(key)

    def _know(self, chain: Object) -> None:
        """A LIST and a watch may each be late; a counter that fell back for a moment would count
        twice.
        """
        known = self.known.get(_key(chain))
        if known is None or known.version < int(chain["metadata"]["resourceVersion"]):
            self.known[_key(chain)] = figures(chain, known)

    def _on_chain(self, chain: Object) -> None:
        self._know(chain)
        self._loop.call_later(ECHO, self._wake, _key(chain), chain)

    def _on_artifact(self, artifact: Object) -> None:
        self.controller.artifact_changed(artifact)
        namespace, name = _key(artifact)
        for key, known in self.known.items():
            if key[0] == namespace and name in known.artifacts:
                self.queue.add(key)

    def _on_job(self, job: Object) -> None:
        """A verify Job, or a job of any runner."""
        self._on_part(job, ended=any(true_condition(job, kind) for kind in JOB_ENDS))

    def _on_pod(self, pod: Object) -> None:
        self._on_part(pod, ended=not is_live(pod))
        self.controller.remember(pod)

    def _on_part(self, part: Object, ended: bool) -> None:
        """A job or pod; one that ended leaves a node idle."""
        if chain := label(part, CHAIN):
            self._wake((part["metadata"]["namespace"], chain), part, first=ended)

    def _wake(self, key: Key, seen: Object, first: bool = False) -> None:
        """Reconcile a chain, unless what was seen is what we wrote: the pass that wrote it has
        acted on it already.
        """
        if not self.kube.wrote(seen):
            self.queue.add(key, first=first)

    async def _watch(self, receivers: Mapping[Resource, Receiver]) -> None:
        """Watch these kinds as soon as all of them are installed."""
        while not await self._served(receivers):
            await asyncio.sleep(DISCOVERY)
        for key in self.known:  # a chain may have waited for the kind
            self.queue.add(key)
        kinds = ", ".join(resource.plural for resource in receivers)
        log.info("watching %s in %s", kinds, ", ".join(self.namespaces) or "all namespaces")
        health = self.health if CHAINS in receivers else None
        while True:
            try:
                await watch(self.kube, receivers, self.namespaces, health, self._alive)
            except (
                Exception
            ) as error:  # kopf gives up at any answer it does not know, such as a 409 to a LIST
                if not self._refused:  # a refusal has been logged
                    log.warning(
                        "%s are not watched: %s; again in %.0f s", kinds, error, WATCH_AGAIN
                    )
            await asyncio.sleep(WATCH_AGAIN)

    async def _served(self, resources: Mapping[Resource, Receiver]) -> bool:
        try:
            missing = [
                resource for resource in resources if not await self.kube.resource_exists(resource)
            ]
        except Forbidden:  # logged by the LIST
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
        """Why we are not, if so; called from kopf's thread."""
        age = self._loop.time() - self._listed
        return f"the chains were last listed {age:.0f} s ago" if age > 3 * RESYNC else None


def _key(obj: Object) -> Key:
    return obj["metadata"]["namespace"], obj["metadata"]["name"]
