"""A stand-in kubelet: real Node, Lease and Pod objects; what happens inside the pods is played from
a script.

    with Kubelet(kubeconfig, script=lambda pod: oom() if pod.attempt == 1 else None) as kubelet: ...

A script chooses a play (plays.py) for each pod, None for the usual one: trainers train and succeed,
verify Jobs look into the volume. Volumes are in memory, one a claim; their PersistentVolumes are
made here too, as an RWX provisioner would. The scheduler, the controllers and the training-operator
are the real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType

import aiohttp
from apiclient import Api, ApiError, Json, cancel, run
from playedpod import JOB, TORCHRUN_FAILED, Gang, Gone, Pod, Volume, condition
from plays import Play, index, usual
from podlogs import LogServer

LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
ALLOCATABLE = {
    "cpu": "64",
    "memory": "1000Gi",
    "ephemeral-storage": "1000Gi",
    "nvidia.com/gpu": "8",
    "pods": "110",
}
_kubelets = itertools.count(1)
Work = Callable[[], Awaitable[None]]
Script = Callable[[Pod], Play | None]


class Kubelet:
    """`count` nodes, played together.

    Args:
        script: chooses each pod's play; may be set anew at any time, for the pods to come.
        labels: of every node, for node selectors.
        heartbeat: seconds between two renewals of the nodes' Leases.
        certificate: with its key, to serve the pods' logs with; without one there are no logs.

    What it counts: `trained` has, by input digest, the attempts that took at least one step;
    `finished` how often a stage was trained to its end. `stop_delay` is how long a trainer takes
    after SIGTERM. `index` is the play of index Jobs' pods, which no script is asked for. `accuracy`
    is what a trainer measures of its model. `errors` should stay empty.
    """

    def __init__(
        self,
        kubeconfig: Path,
        count: int = 2,
        *,
        script: Script = lambda pod: None,
        labels: Mapping[str, str] | None = None,
        name: str | None = None,
        heartbeat: float = 4.0,
        certificate: tuple[Path, Path] | None = None,
    ):
        self.api, self.script, self.heartbeat = Api(kubeconfig), script, heartbeat
        name = (
            name or f"node-{next(_kubelets)}"
        )  # never again that of nodes to which old pods are bound
        self.nodes = [f"{name}-{i}" for i in range(count)]
        self.labels = dict(labels or {})
        self.stop_delay = 0.3
        self.index = index()
        self.accuracy: Callable[[Pod], float | None] = lambda pod: None
        self.lost: set[str] = set()
        self.trained: defaultdict[str, list[str]] = defaultdict(list)
        self.finished: Counter[str] = Counter()
        self.pods: dict[str, Pod] = {}
        self.errors: list[str] = []
        self.logs = LogServer(self.pods, *certificate) if certificate else None
        self._log_port: int | None = None
        self._usual = usual()
        self._volumes: defaultdict[str, Volume] = defaultdict(Volume)
        self._claims: dict[tuple[str, str], str] = {}
        self._gangs: dict[tuple[str, str], Gang] = {}
        self._playing: dict[str, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def __enter__(self) -> Kubelet:
        run(self._start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        run(self._stop())
        if kind is None and self.errors:
            raise AssertionError("the stand-in kubelet failed:\n" + "\n".join(self.errors))

    def lose_node(self, name: str) -> None:
        """The node falls silent: no more heartbeats, its pods' fates are unknown. The controllers
        find out.
        """
        self.lost.add(name)

    def recover_node(self, name: str) -> None:
        """Heartbeats come again; pods that were deleted meanwhile end now."""
        self.lost.discard(name)
        run(self._recover(name))

    def volume(self, namespace: str, claim: str) -> Volume:
        """What lies on a claim; a claim made again under the same name is another volume."""
        return self._volumes[self._claims.get((namespace, claim), f"{namespace}/{claim}")]

    def gang(self, pod: Pod) -> Gang:
        """The gang of a pod's job: a job made again under the same name has a new one."""
        owner = next((o["uid"] for o in pod.body["metadata"].get("ownerReferences", [])), pod.uid)
        return self._gangs.setdefault((pod.labels.get(JOB, ""), owner), Gang())

    async def write(self, method: str, path: str, body: Json | None = None) -> None:
        """One write, repeated while the API server is away. Raises Gone if its object is."""
        while True:
            try:
                await self.api.request(method, path, body)
                return
            except ApiError as error:
                if error.status == 404 or (
                    error.status == 409 and "object has been modified" not in str(error)
                ):
                    raise Gone(path) from error
                if error.status not in (409, 429) and error.status < 500:
                    raise
            except (aiohttp.ClientError, OSError):
                pass
            await asyncio.sleep(0.5)

    async def _start(self) -> None:
        self._log_port = await self.logs.start() if self.logs else None
        for name in self.nodes:
            await self._register(name)
        self._tasks = [
            asyncio.create_task(self._guard(work))
            for work in (self._beat, self._watch, self._provide)
        ]

    async def _stop(self) -> None:
        await cancel(*self._tasks, *self._playing.values())
        for pod in self.pods.values():
            await pod.stop_serving()
        if self.logs:
            await self.logs.stop()
        for name in self.nodes:
            with contextlib.suppress(ApiError, aiohttp.ClientError, OSError):
                await self.api.request("DELETE", f"/api/v1/nodes/{name}")
        await self.api.close()

    async def _guard(self, work: Work) -> None:
        try:
            await work()
        except Exception as error:
            logging.exception("the stand-in kubelet")
            self.errors.append(f"{type(error).__name__}: {error}")

    # Nodes.

    async def _register(self, name: str) -> None:
        meta = {"name": name, "labels": {"kubernetes.io/hostname": name, **self.labels}}
        await self._create("/api/v1/nodes", {"metadata": meta})
        ready = condition(
            "Ready", True, reason="KubeletReady", message="kubelet is posting ready status"
        )
        pressures = [condition(k, False) for k in ("MemoryPressure", "DiskPressure", "PIDPressure")]
        status = {
            "conditions": [ready, *pressures],
            "capacity": ALLOCATABLE,
            "allocatable": ALLOCATABLE,
        }
        status["addresses"] = [
            {"type": "InternalIP", "address": "127.0.0.1"},
            {"type": "Hostname", "address": name},
        ]
        if self._log_port is not None:
            status["daemonEndpoints"] = {"kubeletEndpoint": {"Port": self._log_port}}
        await self.write("PATCH", f"/api/v1/nodes/{name}/status", {"status": status})

    async def _create(self, path: str, body: Json) -> None:
        """409: it is there from an earlier run."""
        with contextlib.suppress(Gone):
            await self.write("POST", path, body)

    async def _beat(self) -> None:
        while True:
            await asyncio.gather(*map(self._renew, set(self.nodes) - self.lost))
            await asyncio.sleep(self.heartbeat)

    async def _renew(self, name: str) -> None:
        """Its Lease; made here, since a new control plane has no namespace for it in its first
        seconds.
        """
        renewed = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        spec = {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": renewed}
        try:
            await self.write("PATCH", f"{LEASES}/{name}", {"spec": spec})
        except Gone:
            await self._create(LEASES, {"metadata": {"name": name}, "spec": spec})

    async def _recover(self, name: str) -> None:
        await self._register(name)
        for pod in [p for p in self.pods.values() if p.node == name]:
            await pod.resend()
            if "deletionTimestamp" in pod.body["metadata"]:
                self._play(pod, pod.stop)

    # Pods.

    async def _watch(self) -> None:
        async for kind, body in self.api.follow("/api/v1/pods", fieldSelector="spec.nodeName!="):
            if body["spec"]["nodeName"] in self.nodes:
                await self._guard(partial(self._on_pod, kind, body))

    async def _on_pod(self, kind: str, body: Json) -> None:
        uid = body["metadata"]["uid"]
        if kind == "DELETED":
            await self._forget(uid)
            return
        deleted, pod = "deletionTimestamp" in body["metadata"], self.pods.get(uid)
        was_deleted = pod is not None and "deletionTimestamp" in pod.body["metadata"]
        if pod is None:
            self.pods[uid] = pod = Pod(self, body)
            if not deleted and body["status"].get("phase") not in ("Succeeded", "Failed"):
                play = self.index if pod.role == "index" else self.script(pod) or self._usual
                self._play(pod, partial(play, pod))
        pod.body = body
        if deleted and not was_deleted and pod.node not in self.lost:
            self._play(pod, pod.stop)

    def _play(self, pod: Pod, play: Work) -> None:
        """Begin a play; it takes the place of the one before."""
        if before := self._playing.get(pod.uid):
            before.cancel()
        self._playing[pod.uid] = asyncio.create_task(self._guard(play))

    async def _forget(self, uid: str) -> None:
        if pod := self.pods.pop(uid, None):
            if task := self._playing.pop(uid, None):
                task.cancel()
            pod.gang.running.discard(pod.name)
            if pod.rank == 0:
                pod.gang.end(TORCHRUN_FAILED)
            await pod.stop_serving()

    # Volumes.

    async def _provide(self) -> None:
        """A PersistentVolume for each pending claim, as a provisioner would; the real controller
        binds them.
        """
        async for kind, claim in self.api.follow("/api/v1/persistentvolumeclaims"):
            meta, spec = claim["metadata"], claim["spec"]
            if kind == "DELETED":
                self._claims.pop((meta["namespace"], meta["name"]), None)
                continue
            self._claims[meta["namespace"], meta["name"]] = meta["uid"]
            if "volumeName" in spec:
                continue
            volume = {
                "capacity": spec["resources"]["requests"],
                "accessModes": spec["accessModes"],
                "storageClassName": spec.get("storageClassName", ""),
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": f"/stand-in/{meta['uid']}"},
                "claimRef": {"kind": "PersistentVolumeClaim", "apiVersion": "v1"}
                | {key: meta[key] for key in ("namespace", "name", "uid")},
            }
            await self._create(
                "/api/v1/persistentvolumes",
                {"metadata": {"name": f"pv-{meta['uid']}"}, "spec": volume},
            )
