"""What one pass has read of a chain.

The chain, its jobs and its pods are always read. The rest is read once a decision turns out to
depend on it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import aiohttp

from modelchain.api.artifact import former_artifact_name, stage_artifact_name
from modelchain.api.contracts import LiveProgress
from modelchain.api.spec import KIND, ModelChain
from modelchain.api.status import AttemptStatus, ChainStatus
from modelchain_operator.api.kube import (
    ARTIFACTS,
    CHAINS,
    CLAIMS,
    EVENTS,
    JOBS,
    LEASES,
    NODES,
    PODS,
    Forbidden,
    Kube,
    NotFound,
    Object,
    Resource,
)
from modelchain_operator.api.objects import annotation, is_deleting, label, name, uid
from modelchain_operator.reconcile import job_requests as requests
from modelchain_operator.reconcile.memory import Asked, Cache, Memory
from modelchain_operator.runners import pods as podread
from modelchain_operator.runners import verify
from modelchain_operator.runners.index_job import ROLE_OF_JOB as INDEX_ROLE
from modelchain_operator.runners.registry import RUNNERS, job_uid_of, runner_for, state_of
from modelchain_operator.runners.template import (
    CHAIN,
    CHAIN_UID,
    CLAIM_UID,
    FILLS,
    INPUT_DIGEST,
    PROGRESS_PORT,
    ROLE,
    TRAINS,
    label_of,
    task_of,
)

RETRY = "modelchain.dev/retry"
# `total` is for a trainer that sends a byte now and then, which `sock_read` never ends.
PROGRESS_TIMEOUT = aiohttp.ClientTimeout(total=6, sock_connect=2, sock_read=2)

What = Literal[
    "artifact",
    "claim",
    "lease",
    "rivals",
    "name",
    "verify",
    "cpu job",
    "pods of index",
    "events",
    "records",
    "shares",
    "loaders",
    "chain",
    "records of",
    "node",
]


class Need(NamedTuple):
    """One read that a decision turned out to depend on. Its answer is kept for this pass.

    `which` is the name or digest that `Reader` needs to read `what`.
    """

    what: What
    which: str = ""


@dataclass
class Snapshot:
    """What was read of one chain."""

    chain: Object
    spec: ModelChain
    status: ChainStatus
    # The chain's jobs, of every kind of runner, by name (see `by_name`).
    jobs: dict[str, Object]
    pods: list[Object]
    # Unfinished jobs that a deleted chain of this name has left behind, so that nothing will delete
    # them.
    orphans: list[Object] = field(default_factory=list)
    # The kinds of runner that are not installed on this cluster.
    missing: set[str] = field(default_factory=set)
    # What the launch depends on was read after its intent was written.
    fresh: bool = False
    # The answers to needs, and the needs that are not answered yet.
    read: dict[Need, Any] = field(default_factory=dict)
    needs: set[Need] = field(default_factory=set)
    # The attempt's job after the first of two patches that release it, until the second.
    patched: Object | None = None
    # Whether the namespace has a default queue; None before a release asks.
    default_queue: bool | None = None

    @property
    def uid(self) -> str:
        return str(self.chain["metadata"]["uid"])

    @property
    def namespace(self) -> str:
        return str(self.chain["metadata"]["namespace"])

    @property
    def attempts(self) -> Iterator[AttemptStatus]:
        """All attempts that the status names."""
        return (attempt for _, attempt in self.status.attempts.values())

    @property
    def finished(self) -> frozenset[str]:
        """The input digests of which the status has an artifact."""
        stages = (stage for stage in self.status.stages if stage.artifact is not None)
        return frozenset(stage.input_digest for stage in stages if stage.input_digest)

    def recorded(self, digest: str) -> Object | None:
        """The record of these inputs on the chain's claim, as far as it was read."""
        claim = self.read.get(Need("claim"))
        named = self.read.get(Need("artifact", digest))
        records = [named] if named is not None else self.read.get(Need("records of", digest)) or []
        here = (r for r in records if claim is not None and is_record_of(r, claim, digest))
        return next(here, None)

    def want(self, what: What, which: str = "") -> Any:
        """The answer to a need. If it was not read yet: None, and the need is added to `needs`."""
        need = Need(what, which)
        if need not in self.read:
            self.needs.add(need)
            return None
        return self.read[need]


class Inputs(Mapping[str, Mapping[str, Any]]):
    """By input digest, the inputs of earlier work.

    They are in the task of a job, if one still exists, or in a StageArtifact.
    """

    def __init__(self, snapshot: Snapshot):
        self.snapshot = snapshot

    def __getitem__(self, digest: str) -> Mapping[str, Any]:
        for job in self.snapshot.jobs.values():
            if annotation(job, INPUT_DIGEST) == digest:
                inputs: Mapping[str, Any] = task_of(job)["inputs"]
                return inputs
        record = self.snapshot.want("artifact", digest)
        if record is None:
            raise KeyError(digest)
        found: Mapping[str, Any] = record["spec"]["inputs"]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def is_record_of(record: Object, claim: Object, digest: str) -> bool:
    """Whether a StageArtifact records an artifact of these inputs on this claim."""
    spec = record["spec"]
    return (spec["claimUID"], spec["inputDigest"]) == (uid(claim), digest)


def is_orphan(job: Object) -> bool:
    """Whether an unfinished job has lost the chain that owned it.

    If a chain is deleted with `--cascade=orphan`, Kubernetes takes it out of the job's owners.
    """
    owners = job["metadata"].get("ownerReferences") or []
    owned = any(owner["kind"] == KIND for owner in owners)
    return not owned and state_of(job).finished is None and not is_deleting(job)


def by_name(jobs: Iterable[Object], attempts: Iterable[AttemptStatus]) -> dict[str, Object]:
    """Jobs of all kinds by name.

    An attempt's name is the key of the job of the attempt's own kind. If a job of another kind has
    the same name, its key is `<kind>/<name>`.
    """
    kinds = {attempt.name: runner_for(attempt.runner).kind for attempt in attempts}
    found = {}
    for job in jobs:
        own = kinds.get(name(job), job["kind"]) == job["kind"]
        found[name(job) if own else f"{job['kind']}/{name(job)}"] = job
    return found


class Reader:
    """All reads of a pass.

    They are quorum reads, except for claims and records, which the memory caches for a minute.
    Watch events and our own writes refresh the cache.
    """

    def __init__(self, kube: Kube, memory: Memory, progress_seconds: float):
        self.kube = kube
        self.memory = memory
        self.progress_seconds = progress_seconds
        self._reads: dict[What, Callable[[Snapshot, str], Awaitable[Any]]] = {
            "artifact": self._artifact,
            "claim": self._claim,
            "lease": self._lease,
            "rivals": self._rivals,
            "name": self._job_of_intent,
            "verify": self._verify,
            "cpu job": self._cpu_job,
            "pods of index": self._pods_of_index,
            "events": self._events,
            "records": self._records,
            "shares": self._shares,
            "loaders": self._loaders,
            "chain": self._chain,
            "records of": self._records_of,
            "node": self._node,
        }

    async def jobs_and_pods(self, snapshot: Snapshot) -> None:
        """Read the chain's jobs, and then its pods.

        In this order no pod can be missed: a job that no longer exists makes no more pods.
        """
        namespace, selector = snapshot.namespace, f"{CHAIN_UID}={snapshot.uid}"
        of_this_name = f"{CHAIN}={snapshot.spec.metadata.name},{TRAINS}"
        jobs, snapshot.missing = await self._jobs(namespace, of_this_name)
        ours = [job for job in jobs if label(job, CHAIN_UID) == snapshot.uid]
        others = [job for job in jobs if label(job, CHAIN_UID) != snapshot.uid]
        snapshot.jobs = by_name(ours, snapshot.attempts)
        snapshot.orphans = [job for job in others if is_orphan(job)]
        for attempt in snapshot.attempts:
            known = attempt.finished_at is None and attempt.uid is not None
            if known and attempt.name not in snapshot.jobs:
                # The job existed, and the list lacks it. A read of this one job has to agree
                # before it counts as gone.
                kind = runner_for(attempt.runner).resource
                job = await self._get(kind, namespace, attempt.name)
                if job is not None and uid(job) == attempt.uid:
                    snapshot.jobs[attempt.name] = job
        snapshot.pods = await self.kube.list(PODS, namespace, selector)
        for pod in snapshot.pods:
            self.memory.remember(pod)

    async def _jobs(self, namespace: str, selector: str) -> tuple[list[Object], set[str]]:
        """The jobs of every kind of runner, and the kinds that are not installed.

        All kinds are read, since the chain may have asked for another kind before.
        """
        jobs: list[Object] = []
        missing = set()
        for kind, runner in RUNNERS.items():
            try:
                jobs += await self.kube.list(runner.resource, namespace, selector)
            except NotFound:
                missing.add(kind)
        return jobs, missing

    # Reads that a decision turned out to need.

    async def answer(self, snapshot: Snapshot) -> None:
        """Read what the snapshot needs.

        The claim is read first, since records and Leases are named after it. Records are read
        before the rest: once they are known, the rest may not be needed.
        """
        claim = snapshot.needs & {Need("claim")}
        records = {need for need in snapshot.needs if need.what == "artifact"}
        for needs in (claim, records or snapshot.needs - claim):
            await self.each(snapshot, sorted(needs))
        snapshot.needs.clear()

    async def records_ahead(self, snapshot: Snapshot) -> None:
        """Read the claim, and the records of the stages that have finished by the status.

        Every decision needs them. Without this it would find out one stage after the other, and be
        made again for each.
        """
        if not snapshot.finished:
            return
        await self.each(snapshot, [Need("claim")])
        await self.each(snapshot, [Need("artifact", one) for one in sorted(snapshot.finished)])

    async def each(self, snapshot: Snapshot, needs: Sequence[Need]) -> None:
        """Read several needs concurrently. None of them may depend on the answer to another."""
        answers = await asyncio.gather(*(self.one(snapshot, need) for need in needs))
        snapshot.read.update(zip(needs, answers, strict=True))

    async def one(self, snapshot: Snapshot, need: Need) -> Any:
        return await self._reads[need.what](snapshot, need.which)

    async def _artifact(self, snapshot: Snapshot, digest: str) -> Object | None:
        """The record that has the name of these inputs on the chain's claim.

        If the status says that the stage has finished, a record that an older version made may be
        there instead. `_records_of` finds such a one as well, but takes a LIST.
        """
        claim, namespace = snapshot.read.get(Need("claim")), snapshot.namespace
        if claim is None:
            return None
        known = self.memory.artifacts.get((namespace, digest))
        if known is not None and is_record_of(known, claim, digest):
            return known
        record = await self._get(ARTIFACTS, namespace, stage_artifact_name(uid(claim), digest))
        if record is None and digest in snapshot.finished:
            record = await self._get(ARTIFACTS, namespace, former_artifact_name(digest))
            if record is None or not is_record_of(record, claim, digest):
                return None
        if record is not None:
            self.memory.artifacts.put((namespace, digest), record)
        return record

    async def _records_of(self, snapshot: Snapshot, digest: str) -> list[Object]:
        """The records of an input digest on all claims, also on those that exist no longer."""
        selector = f"{INPUT_DIGEST}={label_of(digest)}"
        found = await self.kube.list(ARTIFACTS, snapshot.namespace, selector)
        return [record for record in found if record["spec"]["inputDigest"] == digest]

    async def _claim(self, snapshot: Snapshot, _: str) -> Object | None:
        if snapshot.spec.spec.storage is None:
            return None
        claim = requests.claim_name(snapshot.spec)
        return await self._cached(self.memory.claims, (snapshot.namespace, claim), CLAIMS, claim)

    async def _lease(self, snapshot: Snapshot, digest: str) -> Object | None:
        claim = snapshot.read.get(Need("claim"))
        if claim is None:
            return None
        lease = requests.lease_name(uid(claim), digest)
        return await self._get(LEASES, snapshot.namespace, lease)

    async def _shares(self, snapshot: Snapshot, _: str) -> dict[str, Object]:
        """By input digest, the Leases of the shares that the chain has."""
        selector = f"{CHAIN_UID}={snapshot.uid}"
        leases = await self.kube.list(LEASES, snapshot.namespace, selector)
        return {lease["metadata"]["annotations"][INPUT_DIGEST]: lease for lease in leases}

    async def idle_shares(self, chain: Object) -> list[Object]:
        """The Leases of the chain's shares for which it has no unfinished job and no live pod."""
        namespace, selector = chain["metadata"]["namespace"], f"{CHAIN_UID}={uid(chain)}"
        leases = await self.kube.list(LEASES, namespace, selector)
        if not leases:
            return []
        jobs, _ = await self._jobs(namespace, f"{selector},{TRAINS}")
        busy = [job for job in jobs if state_of(job).finished is None]
        pods = await self.kube.list(PODS, namespace, f"{selector},{TRAINS}")
        busy += [pod for pod in pods if podread.is_live(pod)]
        digests = {label(thing, INPUT_DIGEST) for thing in busy}
        return [le for le in leases if (annotation(le, INPUT_DIGEST) or "")[:63] not in digests]

    async def _rivals(self, snapshot: Snapshot, digest: str) -> list[Object]:
        """Unfinished jobs and live pods of other chains that train this input digest on this claim.

        Jobs of older versions do not say on which claim they train, and count as well.
        """
        selector = f"{INPUT_DIGEST}={label_of(digest)},{CHAIN_UID}!={snapshot.uid},{TRAINS}"
        jobs, _ = await self._jobs(snapshot.namespace, selector)
        pods = await self.kube.list(PODS, snapshot.namespace, selector)
        unfinished = [job for job in jobs if state_of(job).finished is None]
        training = unfinished + [pod for pod in pods if podread.is_live(pod) and job_uid_of(pod)]
        claim = snapshot.read.get(Need("claim"))
        here = ("", uid(claim) if claim else "")
        return [rival for rival in training if label(rival, CLAIM_UID) in here]

    async def _job_of_intent(self, snapshot: Snapshot, attempt: str) -> Object | None:
        """The job that has the name of an attempt. It may belong to another chain."""
        intent = next(a for a in snapshot.attempts if a.name == attempt)
        return await self._get(runner_for(intent.runner).resource, snapshot.namespace, attempt)

    async def _verify(self, snapshot: Snapshot, attempt: str) -> Object | None:
        return await self._get(JOBS, snapshot.namespace, verify.name(attempt))

    async def _cpu_job(self, snapshot: Snapshot, job: str) -> Object | None:
        """The CPU Job of this name. Another chain may have made it."""
        return await self._get(JOBS, snapshot.namespace, job)

    async def _pods_of_index(self, snapshot: Snapshot, chain_uid: str) -> list[Object]:
        """The pods of index Jobs that another chain has made."""
        selector = f"{CHAIN_UID}={chain_uid},{ROLE}={INDEX_ROLE}"
        return await self.kube.list(PODS, snapshot.namespace, selector)

    async def _records(self, snapshot: Snapshot, _: str) -> list[Object]:
        """All StageArtifacts of chains of this name: this one, and deleted ones before it."""
        selector = f"{CHAIN}={snapshot.spec.metadata.name}"
        return await self.kube.list(ARTIFACTS, snapshot.namespace, selector)

    async def _chain(self, snapshot: Snapshot, chain: str) -> Object | None:
        """A chain of the same namespace."""
        return await self._get(CHAINS, snapshot.namespace, chain)

    async def _loaders(self, snapshot: Snapshot, claim: str) -> list[Object]:
        """The Jobs that fill a data claim."""
        return await self.kube.list(JOBS, snapshot.namespace, f"{FILLS}={claim}")

    async def _events(self, snapshot: Snapshot, object_uid: str) -> list[Object]:
        """The events of one object."""
        fields = f"involvedObject.uid={object_uid}"
        return await self.kube.list(EVENTS, snapshot.namespace, fields=fields)

    async def _node(self, _: Snapshot, node: str) -> Object:
        """The labels of a node. There are none without the right to read nodes, which is optional,
        and none of a node that is gone.
        """
        found = self.memory.nodes.get(node)
        if found is None:
            try:
                labels = (await self.kube.get(NODES, "", node))["metadata"].get("labels") or {}
            except (NotFound, Forbidden):
                labels = {}
            found = {"metadata": {"labels": labels}}
            self.memory.nodes.put(node, found)
        return found

    async def _get(self, resource: Resource, namespace: str, name: str) -> Object | None:
        try:
            return await self.kube.get(resource, namespace, name)
        except NotFound:
            return None

    async def _cached(
        self, cache: Cache, key: tuple[str, str], resource: Resource, name: str
    ) -> Object | None:
        """The object, from the cache if it is there; None if it does not exist.

        That an object does not exist is never cached, since it may be made at any moment.
        """
        found = cache.get(key)
        if found is None:
            found = await self._get(resource, key[0], name)
            if found is not None:
                cache.put(key, found)
        return found

    def forget(self, snapshot: Snapshot, digests: Iterable[str]) -> None:
        """Forget what a decision depends on, so that it is read again before it is carried out.

        This is the records of these input digests, the claim, the share, and rivals and their
        chains. What has the attempt's name was read after its intent was written; if something
        gets that name later, the API server refuses the launch.
        """
        for digest in digests:
            snapshot.read.pop(Need("artifact", digest), None)
            self.memory.artifacts.drop((snapshot.namespace, digest))
        others = ("claim", "lease", "rivals", "chain")
        for need in [need for need in snapshot.read if need.what in others]:
            del snapshot.read[need]
        if snapshot.spec.spec.storage is not None:
            claim = requests.claim_name(snapshot.spec)
            self.memory.claims.drop((snapshot.namespace, claim))

    # Reads of trainers' progress.

    async def progress(self, pods: Iterable[Object]) -> None:
        """Ask running rank 0s for their progress, each at most once in `progress_seconds`."""
        due = []
        for pod in pods:
            asked = self.memory.progress.get(uid(pod), Asked()).at
            if time.monotonic() - asked >= self.progress_seconds:
                self.memory.note_question(uid(pod))
                due.append(self._ask(pod))
        await asyncio.gather(*due)

    async def _ask(self, pod: Object) -> None:
        """Ask rank 0 for its progress, and remember the answer, or that none came.

        Only silence on an accepted connection is the trainer's fault. Other errors may be the
        network's.
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
            self.memory.note_silence(uid(pod), accepted=True)
        except (aiohttp.ClientError, OSError, ValueError):
            self.memory.note_silence(uid(pod), accepted=False)
        else:
            self.memory.note_answer(uid(pod), answer)
