"""What a look at a chain reads: chain, jobs and pods always, the rest when a decision turns out to
depend on it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any

import aiohttp

from modelchain.api.artifact import stage_artifact_name
from modelchain.api.contracts import LiveProgress
from modelchain.decide.observed import Launch
from modelchain_operator.api.kube import (
    ARTIFACTS,
    CLAIMS,
    EVENTS,
    JOBS,
    LEASES,
    PODS,
    Kube,
    NotFound,
    Object,
    Resource,
)
from modelchain_operator.api.objects import uid
from modelchain_operator.reconcile import job_requests as requests
from modelchain_operator.reconcile.facts import Facts, Need, by_name
from modelchain_operator.reconcile.memory import Asked, Cache, Memory
from modelchain_operator.reconcile.pod_evidence import refusal
from modelchain_operator.runners import pods as podread
from modelchain_operator.runners import verify
from modelchain_operator.runners.registry import RUNNERS, runner_for, state_of
from modelchain_operator.runners.template import (
    CHAIN,
    CHAIN_UID,
    FILLS,
    INPUT_DIGEST,
    PROGRESS_PORT,
    ROLE,
)

PROGRESS_TIMEOUT = aiohttp.ClientTimeout(
    total=6, sock_connect=2, sock_read=2
)  # a byte now and then is no answer


class Reader:
    """All reads, quorum reads but for what the memory holds for a minute and a watch event or a
    write renews.
    """

    def __init__(self, kube: Kube, memory: Memory, progress_seconds: float):
        self.kube, self.memory, self.progress_seconds = kube, memory, progress_seconds

    async def jobs_and_pods(self, facts: Facts) -> None:
        """Jobs before pods: a job that is gone makes no more pods, so none can be missed."""
        selector = f"{CHAIN_UID}={facts.uid}"
        jobs, facts.missing = await self._jobs(facts.namespace, f"{selector},{ROLE}=train")
        facts.jobs = by_name(jobs, facts.status)
        for attempt in (a for stage in facts.status.stages for a in stage.attempts):
            if (
                attempt.finished_at is None
                and attempt.uid is not None
                and attempt.name not in facts.jobs
            ):
                # That it is not in a list is not enough to call a job gone that was there.
                kind = runner_for(attempt.runner).resource
                job = await self._get(kind, facts.namespace, attempt.name)
                if job is not None and job["metadata"]["uid"] == attempt.uid:
                    facts.jobs[attempt.name] = job
        facts.pods = await self.kube.list(PODS, facts.namespace, selector)
        for pod in facts.pods:
            self.memory.remember(pod)

    async def _jobs(self, namespace: str, selector: str) -> tuple[list[Object], set[str]]:
        """Jobs of every kind of runner, whatever kind the chain asks for now; and the kinds that
        are not installed.
        """
        jobs: list[Object] = []
        missing = set()
        for kind, runner in RUNNERS.items():
            try:
                jobs += await self.kube.list(runner.resource, namespace, selector)
            except NotFound:
                missing.add(kind)
        return jobs, missing

    async def answer(self, facts: Facts) -> None:
        """Read what is needed; records first, for what else was asked for without them may not be
        needed.
        """
        records = {need for need in facts.needs if need.what == "artifact"}
        claim = facts.needs & {Need("claim")}  # which a Lease is named after
        for needs in (records,) if records else (claim, facts.needs - claim):
            await self.each(facts, sorted(needs))
        facts.needs.clear()

    async def each(self, facts: Facts, needs: Sequence[Need]) -> None:
        """Read side by side what does not depend on one another."""
        answers = await asyncio.gather(*(self._answer(facts, need) for need in needs))
        facts.read.update(zip(needs, answers, strict=True))

    async def _answer(self, facts: Facts, need: Need) -> Any:
        namespace = facts.namespace
        match need.what:
            case "artifact":
                name = stage_artifact_name(need.which)
                return await self._cached(
                    self.memory.artifacts, ARTIFACTS, namespace, name, need.which
                )
            case "claim":
                if facts.spec.spec.storage is None:
                    return None
                name = requests.claim_name(facts.spec)
                return await self._cached(self.memory.claims, CLAIMS, namespace, name, name)
            case "lease":
                claim = facts.read[Need("claim")]
                return await self._get(
                    LEASES, namespace, requests.lease_name(claim["metadata"]["uid"], need.which)
                )
            case "shares":
                leases = await self.kube.list(LEASES, namespace, f"{CHAIN_UID}={facts.uid}")
                return {lease["metadata"]["annotations"][INPUT_DIGEST]: lease for lease in leases}
            case "rivals":
                selector = f"{INPUT_DIGEST}={need.which[:63]},{CHAIN_UID}!={facts.uid},{ROLE}=train"
                jobs, _ = await self._jobs(namespace, selector)
                unfinished = [job for job in jobs if state_of(job).finished is None]
                return unfinished + [
                    pod
                    for pod in await self.kube.list(PODS, namespace, selector)
                    if podread.is_live(pod)
                ]
            case "name":
                attempts = (a for stage in facts.status.stages for a in stage.attempts)
                attempt = next(a for a in attempts if a.name == need.which)
                return await self._get(runner_for(attempt.runner).resource, namespace, attempt.name)
            case "verify":
                return await self._get(JOBS, namespace, verify.name(need.which))
            case "records":
                return await self.kube.list(
                    ARTIFACTS, namespace, f"{CHAIN}={facts.spec.metadata.name}"
                )
            case "loaders":
                return await self.kube.list(JOBS, namespace, f"{FILLS}={need.which}")
            case "refusal":
                return refusal(
                    await self.kube.list(
                        EVENTS, namespace, fields=f"involvedObject.uid={need.which}"
                    )
                )

    async def _get(self, resource: Resource, namespace: str, name: str) -> Object | None:
        try:
            return await self.kube.get(resource, namespace, name)
        except NotFound:
            return None

    async def _cached(
        self, cache: Cache, resource: Resource, namespace: str, name: str, key: str
    ) -> Object | None:
        """Only what is there is remembered: that nothing is there must be true now."""
        found = cache.get((namespace, key))
        if found is None:
            found = await self._get(resource, namespace, name)
            if found is not None:
                cache.put((namespace, key), found)
        return found

    def forget(self, facts: Facts, launch: Launch) -> None:
        """Before a launch, what it rests on is read afresh: its own and its predecessor's records,
        claim and rivals.
        """
        artifacts = {launch.attempt.input_digest}
        if launch.predecessor is not None:
            artifacts.add(launch.predecessor.input_digest)
        for digest in artifacts:
            facts.read.pop(Need("artifact", digest), None)
            self.memory.artifacts.drop((facts.namespace, digest))
        for need in [n for n in facts.read if n.what in ("claim", "lease", "rivals", "name")]:
            del facts.read[need]
        self.memory.claims.drop((facts.namespace, requests.claim_name(facts.spec)))

    async def progress(self, pods: Iterable[Object]) -> None:
        """Ask running rank 0s how far they are, each at most once in `progress_seconds`."""
        due = []
        for pod in pods:
            if (
                time.monotonic() - self.memory.progress.get(uid(pod), Asked()).at
                >= self.progress_seconds
            ):
                self.memory.asks(uid(pod))
                due.append(self._ask(pod))
        await asyncio.gather(*due)

    async def _ask(self, pod: Object) -> None:
        """What it answers. That it does not says little: only of a connection that was accepted is
        silence its own.
        """
        address = pod["status"].get("podIP")
        host = f"[{address}]" if address and ":" in address else address
        try:
            async with (
                aiohttp.ClientSession(timeout=PROGRESS_TIMEOUT) as session,
                session.get(f"http://{host}:{PROGRESS_PORT}/progress") as response,
            ):
                answer = LiveProgress.model_validate_json(await response.content.read(4096))
        except aiohttp.SocketTimeoutError:
            self.memory.unheard(uid(pod), accepted=True)
        except (aiohttp.ClientError, OSError, ValueError):
            self.memory.unheard(uid(pod), accepted=False)
        else:
            self.memory.told(uid(pod), answer)
