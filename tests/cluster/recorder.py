"""A recorder at etcd: every revision of jobs, pods and StageArtifacts, in order, checked as it
comes.

    with Recorder(control_plane.etcd) as recorder:
        ...
        recorder.verify()                        # no promise was broken at any revision
        assert not recorder.orphans(chain_uid)   # nothing is left of a deleted chain

The promises: at most one live attempt a chain; no attempt is released for inputs whose artifact is
recorded; a successor's job comes after its predecessor's StageArtifact; an attempt's number never
names a second job once released. `History` checks them and does no I/O, `Recorder` feeds it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp
from apiclient import LINE_BYTES, Json, cancel, run
from playedpod import INDEX, REPLICA

GROUP = "modelchain.dev"
RELEASED = f"{GROUP}/released"  # of a job: that it was told to run, and when
JOBS, PLAIN_JOBS, PODS, ARTIFACTS = (
    "/registry/kubeflow.org/pytorchjobs/",
    "/registry/jobs/",
    "/registry/pods/",
    f"/registry/{GROUP}/stageartifacts/",
)
MARK = (  # among the keys we watch, below none that the API server reads
    "/registry/modelchain-recorder"
)
FIRST, BEHIND = (
    "/registry/jobs/",
    "/registry/pods0",
)  # all that is checked lies between, and one watch is one order
KEPT = (f"/registry/{GROUP}/stageartifacts/", "/registry/persistentvolumeclaims/")
# All keys but CustomResourceDefinitions, which are large, and Events, which are many.
SEARCHED = (
    ("/registry/apiextensions.k8s.io0", "/registry/events/"),
    ("/registry/events0", "/registry0"),
)

Attempt = tuple[str, str, str]  # chain UID, stage or "STAGE alone", number
TRAINING = ("train", "baseline")


@dataclass
class Job:
    """A job of a runner at one revision."""

    key: str
    uid: str
    attempt: Attempt
    digest: str
    released: bool
    live: bool
    predecessor: Json | None

    @classmethod
    def of(cls, key: str, body: Json) -> Job | None:
        """None of a job that is not ours."""
        meta, spec = body["metadata"], body["spec"]
        if (attempt := _attempt(meta.get("labels", {}))) is None:
            return None
        suspended = bool(spec.get("runPolicy", {}).get("suspend"))
        ended = {
            c["type"]
            for c in body.get("status", {}).get("conditions") or []
            if c["status"] == "True"
        }
        containers = [
            c
            for r in spec["pytorchReplicaSpecs"].values()
            for c in r["template"]["spec"]["containers"]
        ]
        task = next(
            (
                e["value"]
                for c in containers
                for e in c.get("env", [])
                if e["name"] == "MODELCHAIN_TASK"
            ),
            "{}",
        )
        return cls(
            key=key,
            uid=meta["uid"],
            attempt=attempt,
            digest=meta.get("annotations", {}).get(f"{GROUP}/input-digest", ""),
            released=not suspended or RELEASED in meta.get("annotations", {}),
            live=not suspended and not ended & {"Succeeded", "Failed"},
            predecessor=json.loads(task).get("predecessor"),
        )

    @classmethod
    def of_plain(cls, key: str, value: bytes) -> Job | None:
        """Of a `batch/v1` Job in protobuf (k8s.io/api batch/v1 generated.proto), if it is a
        trainer's.
        """
        body = _message(value)
        meta, spec = _fields(body[1][0]), _fields(body[2][0])
        labels, annotations = _named(meta)
        attempt = _attempt(labels)
        if attempt is None or labels.get(f"{GROUP}/role") not in TRAINING:
            return None
        suspended = bool(spec.get(10, [0])[0])
        conditions = map(_fields, _fields(body[3][0]).get(1, []) if 3 in body else [])
        ended = {c[1][0].decode() for c in conditions if c[2][0] == b"True"}
        pod_spec = _fields(_fields(spec[6][0])[2][0])
        variables = [v for c in pod_spec[2] for v in _fields(c).get(7, [])]
        task = _map(variables).get("MODELCHAIN_TASK", "{}")
        return cls(
            key=key,
            uid=meta[5][0].decode(),
            attempt=attempt,
            digest=annotations.get(f"{GROUP}/input-digest", ""),
            released=not suspended or RELEASED in annotations,
            live=not suspended and not ended & {"Complete", "Failed"},
            predecessor=json.loads(task).get("predecessor"),
        )


@dataclass
class Pod:
    """A trainer's pod at one revision."""

    attempt: Attempt
    digest: str
    live: bool
    rank_0: bool

    @classmethod
    def of(cls, body: bytes) -> Pod | None:
        """From the API server's protobuf (k8s.io/api core/v1 generated.proto); None of a pod that
        is no trainer.
        """
        pod = _message(body)
        meta, status = _fields(pod[1][0]), _fields(pod[3][0]) if 3 in pod else {}
        labels, annotations = _named(meta)
        attempt = _attempt(labels)
        if attempt is None or labels.get(f"{GROUP}/role") not in TRAINING:
            return None
        phase = status[1][0].decode() if 1 in status else "Pending"
        digest = annotations.get(f"{GROUP}/input-digest") or labels.get(f"{GROUP}/input-digest", "")
        rank_0 = labels.get(REPLICA) == "master" or labels.get(INDEX) == "0"
        return cls(attempt, digest, phase not in ("Succeeded", "Failed"), rank_0)


@dataclass
class History:
    """What is true after the last revision, and which promises were broken on the way.

    `violations` are sentences. `created`, `released` and `ended` give the time, in seconds of
    `time.monotonic`, at which a job (by UID) was made and released and at which rank 0 of an
    attempt ended. `late` are the names of jobs whose creation a test has held back: such a job may
    be made when its number was used up long ago, but it must never be released.
    """

    violations: list[str] = field(default_factory=list)
    late: set[str] = field(default_factory=set)
    created: dict[str, float] = field(default_factory=dict)
    released: dict[str, float] = field(default_factory=dict)
    ended: dict[Attempt, float] = field(default_factory=dict)
    jobs_of: defaultdict[str, dict[str, Job]] = field(default_factory=lambda: defaultdict(dict))
    _attempts: dict[str, Attempt] = field(default_factory=dict)
    _live: defaultdict[str, defaultdict[str, set[str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(set))
    )
    _artifacts: defaultdict[str, dict[str, Json]] = field(default_factory=lambda: defaultdict(dict))
    _numbers: dict[Attempt, str] = field(default_factory=dict)
    _twins: dict[str, frozenset[str]] = field(default_factory=dict)
    _digest_ended: dict[tuple[str, str], float] = field(default_factory=dict)

    def put(self, revision: int, key: str, value: bytes, at: float = 0.0) -> None:
        """A key was written."""
        namespace = key.split("/")[-2]
        if key.startswith(ARTIFACTS):
            self._artifacts[namespace][key] = json.loads(value)["spec"]
        elif key.startswith((JOBS, PLAIN_JOBS)):
            plain = key.startswith(PLAIN_JOBS)
            if job := Job.of_plain(key, value) if plain else Job.of(key, json.loads(value)):
                self._on_job(revision, namespace, job, at)
                self._count(revision, key, job.attempt, job.live)
        elif key.startswith(PODS) and (pod := Pod.of(value)):
            if pod.rank_0 and not pod.live and pod.attempt not in self.ended:
                self.ended[pod.attempt] = self._digest_ended[pod.attempt[0], pod.digest[:63]] = at
            self._count(revision, key, pod.attempt, pod.live)

    def delete(self, revision: int, key: str) -> None:
        """A key was removed."""
        if key.startswith(ARTIFACTS):
            self._artifacts[key.split("/")[-2]].pop(key, None)
        elif attempt := self._attempts.pop(key, None):
            self._count(revision, key, attempt, live=False)

    def handovers(self, chain_uid: str | None = None) -> list[float]:
        """Seconds from the end of a stage's rank 0 to its successor's job, for each successor
        launched after it.
        """
        return [
            self.created[job.uid] - ended
            for chain, jobs in self.jobs_of.items()
            if chain_uid in (None, chain)
            for job in jobs.values()
            if job.predecessor
            and (ended := self._digest_ended.get((chain, job.predecessor["inputDigest"][:63])))
        ]

    def _on_job(self, revision: int, namespace: str, job: Job, at: float) -> None:
        chain, name = job.attempt[0], job.key.rpartition("/")[2]
        artifacts = self._artifacts[namespace].values()
        if job.uid not in self.created:
            self.created[job.uid] = at
            digest = (job.predecessor or {}).get("artifactDigest")
            if job.predecessor and digest not in {a["artifactDigest"] for a in artifacts}:
                self._broken(
                    revision,
                    f"job {name} was made before a StageArtifact of its predecessor {digest} was"
                    " there",
                )
            if self._numbers.get(job.attempt, job.uid) != job.uid and name not in self.late:
                self._broken(
                    revision, f"job {name} has the number of another job that had been released"
                )
        if job.released and job.uid not in self.released:
            self.released[job.uid] = at
            if self._numbers.get(job.attempt, job.uid) != job.uid:
                self._broken(
                    revision, f"job {name} was released, and another one of its number before"
                )
            self._numbers[job.attempt] = job.uid
            if job.digest in {a["inputDigest"] for a in artifacts}:
                self._broken(
                    revision,
                    f"job {name} was released after the artifact of its inputs {job.digest} was"
                    " recorded",
                )
        self.jobs_of[chain][job.uid] = job

    def _count(self, revision: int, key: str, attempt: Attempt, live: bool) -> None:
        """Keep who is live; a violation is told once for each set of attempts."""
        chain, name = attempt[0], f"{attempt[1]}-a{attempt[2]}"
        self._attempts[key] = attempt
        if not live:
            self._live[chain][name].discard(key)
            if not self._live[chain][name]:
                del self._live[chain][name]
            return
        self._live[chain][name].add(key)
        names = frozenset(self._live[chain])
        if len(names) > 1 and self._twins.get(chain) != names:
            self._twins[chain] = names
            keys = sorted(key for keys in self._live[chain].values() for key in keys)
            self._broken(
                revision, f"chain {chain} has {len(names)} live attempts: {', '.join(keys)}"
            )

    def _broken(self, revision: int, sentence: str) -> None:
        self.violations.append(f"revision {revision}: {sentence}")


class Recorder:
    """Feeds a History from etcd's JSON gateway (`etcd`: a plain HTTP endpoint), from now on."""

    def __init__(self, etcd: str):
        self.history, self._etcd = History(), etcd
        self._seen = 0
        self._error: Exception | None = None

    def __enter__(self) -> Recorder:
        run(self._start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        run(self._stop())

    def catch_up(self) -> History:
        """The history up to this moment: a key of our own is written, and waited for."""
        run(self._mark())
        return self.history

    def verify(self) -> None:
        """Raises AssertionError with every promise that was broken so far."""
        violations = self.catch_up().violations
        assert not violations, "\n".join(violations)

    def orphans(self, chain_uid: str) -> list[str]:
        """Keys of all objects that name the chain or one of its jobs, but for StageArtifacts,
        claims and Events.
        """
        uids = [uid.encode() for uid in (chain_uid, *self.catch_up().jobs_of[chain_uid])]
        found = [pair for bounds in SEARCHED for pair in run(self._range(*bounds))[1]]
        return [
            key
            for key, value in found
            if not key.startswith(KEPT) and any(uid in value for uid in uids)
        ]

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None), read_bufsize=LINE_BYTES
        )
        self._seen, present = await self._range(FIRST, BEHIND)
        for key, value in present:
            self.history.put(self._seen, key, value, time.monotonic())
        self.history.violations.clear()  # in what order these came is not known
        self._task = asyncio.create_task(self._follow())

    async def _stop(self) -> None:
        await cancel(self._task)
        await self._session.close()

    async def _follow(self) -> None:
        while True:
            try:
                async for revision, kind, key, value in self._watch():
                    if kind == "DELETE":
                        self.history.delete(revision, key)
                    else:
                        self.history.put(revision, key, value, time.monotonic())
                    self._seen = revision
            except (
                aiohttp.ClientError,
                OSError,
            ):  # etcd restarts; nothing is lost, we go on where we were
                await asyncio.sleep(0.2)
            except Exception as error:
                self._error = error
                raise

    async def _watch(self) -> AsyncIterator[tuple[int, str, str, bytes]]:
        asked = {
            "key": _b64(FIRST),
            "range_end": _b64(BEHIND),
            "start_revision": str(self._seen + 1),
        }
        async with self._session.post(
            f"{self._etcd}/v3/watch", json={"create_request": asked}
        ) as response:
            async for line in response.content:
                for event in json.loads(line)["result"].get("events", []):
                    kv = event["kv"]
                    value = base64.b64decode(kv.get("value", ""))
                    yield int(kv["mod_revision"]), event.get("type", "PUT"), _text(kv["key"]), value

    async def _range(self, first: str, behind: str) -> tuple[int, list[tuple[str, bytes]]]:
        asked = {"key": _b64(first), "range_end": _b64(behind)}
        async with self._session.post(f"{self._etcd}/v3/kv/range", json=asked) as response:
            found = await response.json()
        pairs = [
            (_text(kv["key"]), base64.b64decode(kv.get("value", ""))) for kv in found.get("kvs", [])
        ]
        return int(found["header"]["revision"]), pairs

    async def _mark(self) -> None:
        asked = {"key": _b64(MARK), "value": _b64("")}
        async with self._session.post(f"{self._etcd}/v3/kv/put", json=asked) as response:
            revision = int((await response.json())["header"]["revision"])
        while self._seen < revision:
            if self._error:
                raise RuntimeError("the recorder failed") from self._error
            await asyncio.sleep(0.01)


def _attempt(labels: dict[str, str]) -> Attempt | None:
    names = ("chain-uid", "stage", "attempt")
    chain, stage, number = (labels.get(f"{GROUP}/{name}") for name in names)
    if chain is None or stage is None or number is None:
        return None
    alone = " alone" if labels.get(f"{GROUP}/role") == "baseline" else ""
    return chain, stage + alone, number


def _message(value: bytes) -> dict[int, list[Any]]:
    """The object in the API server's envelope."""
    return _fields(_fields(value.removeprefix(b"k8s\x00"))[2][0])


def _named(meta: dict[int, list[Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """Labels and annotations."""
    return _map(meta.get(11, [])), _map(meta.get(12, []))


def _fields(message: bytes) -> dict[int, list[Any]]:
    """The fields of a protobuf message by number: bytes, or integers."""
    found: defaultdict[int, list[Any]] = defaultdict(list)
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
            found[tag >> 3].append(value)
            continue
        length, at = _varint(message, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
        found[tag >> 3].append(message[at : at + length])
        at += length
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """An integer, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _map(entries: list[bytes]) -> dict[str, str]:
    pairs = [_fields(entry) for entry in entries]
    return {pair[1][0].decode(): pair.get(2, [b""])[0].decode() for pair in pairs}


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode()
