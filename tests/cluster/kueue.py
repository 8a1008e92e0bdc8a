"""A stand-in for Kueue on the real control plane: its webhooks for PyTorchJobs, its admission, and
a log of both.

    with Kueue(control_plane) as kueue:
        tenant = kueue.serve(namespace)
        tenant.add_queue("default")
        ...
        assert kueue.broken() == []  # nothing started before its release

As Kueue v0.10 to v0.19 does (paths in kubernetes-sigs/kueue, pkg/controller/):

- jobs/kubeflow/jobs/pytorchjob: the mutating webhook is asked at CREATE alone, the validating one
at CREATE and UPDATE.
- jobframework/defaults.go: a job without queue label gets `default` where the namespace has a
  LocalQueue of that name (ApplyDefaultLocalQueue; on by default since v0.12); a job with a queue
  label, any, is suspended (WorkloadShouldBeSuspended), and one without only with
  manageJobsWithoutQueueName.
- jobframework/validation.go: the queue label may not change in an update whose *new* object is not
  suspended (validateUpdateForQueueName); it may not be removed, suspended or not, where there is a
  LocalQueue `default` (v0.11.6, v0.12.2) and a priority class may not be removed, nor added to a
  job that is not suspended; before v0.12 it may not change at all, which is what this one holds to.
  Annotations are not looked at.
- jobframework/reconciler.go (ReconcileGenericJob): a job without label is ignored unless
  manageJobsWithoutQueueName, whatever Workload it has. Else a job that runs without a Workload, or
  with one that is not admitted, is suspended; a suspended one without active pods gets a Workload
  of its queue, whether there is such a LocalQueue or not (core/workload_controller.go: "LocalQueue
  %s doesn't exist", Inadmissible); while it is suspended and not admitted, the Workload follows the
  label; an admitted one that is suspended, by whomsoever, is started again. An evicted one is
  suspended, and waits for admission once its pods are gone. To start is to merge the flavor into
  the pod templates.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import web
from apiclient import Api, ApiError, Json, cancel, run
from controlplane import ControlPlane

GROUP = "kueue.x-k8s.io"
QUEUE, PRIORITY, FLAVOR = f"{GROUP}/queue-name", f"{GROUP}/priority-class", "flavor.example.com"
CHAIN, HELD, RELEASED = "modelchain.dev/chain", "modelchain-held", "modelchain.dev/released"
NODES = {FLAVOR: "stand-in"}  # labels of the nodes on which admitted jobs run
JOBS = "/apis/kubeflow.org/v1/pytorchjobs"
TICK = 0.1
MANAGED = "stand-in.example.com/kueue"  # a namespace's label

PROBE = """
{apiVersion: kubeflow.org/v1, kind: PyTorchJob, metadata: {name: probe, namespace: %s},
 spec: {runPolicy: {suspend: true},
        pytorchReplicaSpecs: {Master: {replicas: 1, template: {
          spec: {containers: [{name: pytorch, image: none}]}}}}}}
"""

# Its schema is not what is tested, and it is installed in a second.
_VERSION = {
    "served": True,
    "schema": {
        "openAPIV3Schema": {
            "type": "object",
            "x-kubernetes-preserve-unknown-fields": True,
            "properties": {
                "spec": {"type": "object", "properties": {"clusterQueue": {"type": "string"}}}
            },
        }
    },
}
LOCAL_QUEUES: Json = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": f"localqueues.{GROUP}",
        "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/kueue"},
    },
    "spec": {
        "group": GROUP,
        "scope": "Namespaced",
        "names": {"kind": "LocalQueue", "listKind": "LocalQueueList", "plural": "localqueues"},
        "versions": [
            {"name": "v1beta1", "storage": False} | _VERSION,
            {"name": "v1beta2", "storage": True} | _VERSION,
        ],
    },
}


@dataclass(frozen=True)
class Seen:
    """A PyTorchJob as an admission request would make it. `refused`: in whose words it was not
    admitted.
    """

    verb: str
    namespace: str
    name: str
    uid: str
    user: str
    suspend: bool
    was_suspended: bool
    labels: dict[str, str]
    annotations: dict[str, str]
    refused: str | None
    at: float

    @property
    def queue(self) -> str | None:
        return self.labels.get(QUEUE)

    @property
    def released(self) -> bool:
        return RELEASED in self.annotations

    def __str__(self) -> str:
        how = "suspended" if self.suspend else "running"
        said = f", refused: {self.refused}" if self.refused else ""
        return (
            f"{self.verb} {self.name} by {self.user}: {how}, {self.queue}, released"
            f" {self.released}{said}"
        )


@dataclass
class Tenant:
    """A namespace that Kueue serves. All may be changed at any time.

    `quota`: how many jobs a queue lets run at once, without a number any. `manages_all`:
    manageJobsWithoutQueueName. `policy` is an admin's own validating webhook: its words are a
    refusal.
    """

    kueue: Kueue
    namespace: str
    quota: dict[str, int] = field(default_factory=dict)
    manages_all: bool = False
    policy: Callable[[Json], str | None] = lambda job: None
    queues: set[str] = field(default_factory=set)

    def add_queue(self, name: str, quota: int | None = None) -> None:
        run(self.kueue.make_queue(self, name))
        if quota is not None:
            self.quota[name] = quota

    def evict(self, job: str) -> None:
        """Kueue's preemption: its quota is gone; it goes on when it is admitted again."""
        self.kueue.workload(self.namespace, job).evicted = True

    def log(self, job: str) -> list[Seen]:
        """Of the jobs of this name, in order."""
        return [s for s in self.kueue.log if (s.namespace, s.name) == (self.namespace, job)]

    def ways(self, job: str) -> list[tuple[str | None, bool, bool]]:
        """(queue, suspended, released) of a job from state to state, as far as they were
        admitted.
        """
        states = [(s.queue, s.suspend, s.released) for s in self.log(job) if s.refused is None]
        return [
            state for before, state in zip([None, *states], states, strict=False) if state != before
        ]


@dataclass
class Workload:
    """What Kueue remembers of a job."""

    queue: str
    since: float = field(default_factory=time.monotonic)
    admitted: bool = False
    evicted: bool = False
    finished: bool = False


class Kueue:
    """`delay`: seconds from a Workload to its admission, where there is quota."""

    def __init__(self, control_plane: ControlPlane, delay: float = 0.3):
        self.log: list[Seen] = []
        self.delay = delay
        self._plane, self._api = (
            control_plane,
            Api(control_plane.kubeconfig_for("kueue", ["system:masters"])),
        )
        self._tenants: dict[str, Tenant] = {}
        self._jobs: dict[str, Json] = {}
        self._workloads: dict[str, Workload] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._probed = 0

    def __enter__(self) -> Kueue:
        self._plane.kubectl("create", "-f", "-", input=json.dumps(LOCAL_QUEUES))
        crd = f"crd/localqueues.{GROUP}"
        for there in (
            "jsonpath={.status.conditions}",
            "condition=Established",
        ):  # the second fails without the first
            self._plane.kubectl("wait", f"--for={there}", crd, "--timeout=30s")
        port = run(self._start())
        self._plane.kubectl("create", "-f", "-", input=json.dumps(_webhooks(self._plane, port)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        names = (
            "mutatingwebhookconfiguration/stand-in-kueue",
            "validatingwebhookconfiguration/stand-in-kueue",
        )
        self._plane.kubectl("delete", *names, f"crd/localqueues.{GROUP}")
        run(self._stop())

    def serve(self, namespace: str, *, manages_all: bool = False) -> Tenant:
        """Returns when the API server asks the webhooks about this namespace's jobs."""
        tenant = self._tenants[namespace] = Tenant(self, namespace, manages_all=manages_all)
        self._plane.kubectl("label", "namespace", namespace, f"{MANAGED}=true", "--overwrite")
        deadline, asked = time.monotonic() + 30, self._probed
        while self._probed < asked + 2:  # the mutating one and the validating one
            assert time.monotonic() < deadline, "the API server does not ask the webhooks"
            self._plane.kubectl("create", "--dry-run=server", "-f", "-", input=PROBE % namespace)
            time.sleep(0.1)
        return tenant

    async def make_queue(self, tenant: Tenant, name: str) -> None:
        """A LocalQueue, known to the webhooks when this returns."""
        path = f"/apis/{GROUP}/v1beta2/namespaces/{tenant.namespace}/localqueues"
        body = {"apiVersion": f"{GROUP}/v1beta2", "kind": "LocalQueue", "metadata": {"name": name}}
        await self._api.request("POST", path, body | {"spec": {"clusterQueue": "cluster"}})
        tenant.queues.add(name)

    def workload(self, namespace: str, job: str) -> Workload:
        """That of the job of this name."""
        found = (j["metadata"] for j in self._jobs.values())
        (uid,) = (m["uid"] for m in found if (m["namespace"], m["name"]) == (namespace, job))
        return self._workloads[uid]

    def broken(self) -> list[str]:
        """What may never be of a chain's job: to be made otherwise than held, or to run without our
        release.
        """
        found = []
        for seen in (s for s in self.log if s.refused is None and CHAIN in s.labels):
            if seen.verb == "CREATE" and not (
                seen.suspend and seen.queue == HELD and not seen.released
            ):
                found.append(f"not made held: {seen}")
            if not seen.suspend and not seen.released:
                found.append(f"runs before its release: {seen}")
            if seen.released and seen.queue == HELD:
                found.append(f"released and held: {seen}")
        return found

    # The webhooks.

    async def _start(self) -> int:
        certificate, key = self._plane.authority.server(f"kueue-{time.time_ns()}", "IP:127.0.0.1")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        app = web.Application(client_max_size=16 << 20)
        app.router.add_post("/mutate", self._answers(self._mutate))
        app.router.add_post("/validate", self._answers(self._validate))
        self._server = web.AppRunner(app, access_log=None)
        await self._server.setup()
        await web.TCPSite(self._server, "127.0.0.1", 0, ssl_context=context).start()
        self._tasks = [asyncio.create_task(work()) for work in (self._watch, self._reconcile_all)]
        return int(self._server.addresses[0][1])

    async def _stop(self) -> None:
        await cancel(*self._tasks)
        await self._server.cleanup()
        await self._api.close()

    def _answers(
        self, decide: Callable[[Json, Tenant], Json]
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            asked = (await request.json())["request"]
            tenant = self._tenants.get(asked["namespace"])
            said = decide(asked, tenant) if tenant else {}
            self._probed += bool(asked.get("dryRun"))
            response = {"uid": asked["uid"], "allowed": True} | said
            return web.json_response(
                {
                    "apiVersion": "admission.k8s.io/v1",
                    "kind": "AdmissionReview",
                    "response": response,
                }
            )

        return answer

    def _mutate(self, asked: Json, tenant: Tenant) -> Json:
        job, patch = asked["object"], []
        labels = job["metadata"].get("labels") or {}
        if not labels.get(QUEUE) and "default" in tenant.queues:
            labels = labels | {QUEUE: "default"}
            patch.append({"op": "add", "path": "/metadata/labels", "value": labels})
        if (labels.get(QUEUE) or tenant.manages_all) and not _suspended(job):
            policy = job["spec"].get("runPolicy", {}) | {"suspend": True}
            patch.append({"op": "add", "path": "/spec/runPolicy", "value": policy})
        encoded = base64.b64encode(json.dumps(patch).encode()).decode()
        return {"patchType": "JSONPatch", "patch": encoded} if patch else {}

    def _validate(self, asked: Json, tenant: Tenant) -> Json:
        job, before = asked["object"], asked.get("oldObject")
        if job["metadata"].get("deletionTimestamp"):
            return {}  # only its finalizers go
        refused = (before and _refusal(before, job, tenant)) or tenant.policy(job)
        if not asked.get("dryRun"):
            meta = job["metadata"]
            seen = Seen(
                verb=asked["operation"],
                namespace=asked["namespace"],
                name=meta["name"],
                uid=meta.get("uid", ""),
                user=asked["userInfo"]["username"],
                suspend=_suspended(job),
                was_suspended=_suspended(before or job),
                labels=meta.get("labels") or {},
                annotations=meta.get("annotations") or {},
                refused=refused,
                at=time.monotonic(),
            )
            self.log.append(seen)
        return {"allowed": False, "status": {"code": 403, "message": refused}} if refused else {}

    # The controller.

    async def _watch(self) -> None:
        async for kind, job in self._api.follow(JOBS):
            if job["metadata"]["namespace"] not in self._tenants:
                continue
            if kind == "DELETED":
                self._jobs.pop(job["metadata"]["uid"], None)
                self._workloads.pop(job["metadata"]["uid"], None)
            else:
                self._jobs[job["metadata"]["uid"]] = job

    async def _reconcile_all(self) -> None:
        while True:
            for uid, job in list(self._jobs.items()):
                # What fails is of an outdated object, mostly: again at the next look.
                with contextlib.suppress(ApiError, aiohttp.ClientError, OSError):
                    await self._reconcile(uid, job, self._tenants[job["metadata"]["namespace"]])
            for uid, workload in self._workloads.items():
                self._admit(uid, workload)
            await asyncio.sleep(TICK)

    async def _reconcile(self, uid: str, job: Json, tenant: Tenant) -> None:
        """One step, as ReconcileGenericJob takes them."""
        workload, queue = self._workloads.get(uid), _queue(job)
        if job["metadata"].get("deletionTimestamp") or not (queue or tenant.manages_all):
            return
        if _finished(job):
            if workload:
                workload.finished = True
        elif workload is None or workload.evicted:
            if not _suspended(job):
                await self._set(job, suspend=True)
            elif not _active(job):
                self._workloads[uid] = Workload(queue)
        elif _suspended(job):
            if workload.admitted:
                await self._set(job, suspend=False)
            else:
                workload.queue = queue
        elif not workload.admitted:
            await self._set(job, suspend=True)

    def _admit(self, uid: str, workload: Workload) -> None:
        job = self._jobs.get(uid)
        if job is None or workload.admitted or workload.finished:
            return
        tenant = self._tenants[job["metadata"]["namespace"]]
        run_now = [
            other
            for key, other in self._workloads.items()
            if other.admitted
            and not other.finished
            and other.queue == workload.queue
            and key in self._jobs
            and self._jobs[key]["metadata"]["namespace"] == tenant.namespace
        ]
        free = len(run_now) < tenant.quota.get(workload.queue, 1000)
        workload.admitted = (
            workload.queue in tenant.queues
            and free
            and time.monotonic() > workload.since + self.delay
        )

    async def _set(self, job: Json, *, suspend: bool) -> None:
        """A PUT of what was seen, changed in `suspend` and in the flavor's node selector."""
        changed = json.loads(json.dumps(job))
        changed["spec"].setdefault("runPolicy", {})["suspend"] = suspend
        for replica in changed["spec"]["pytorchReplicaSpecs"].values():
            selector = replica["template"]["spec"].setdefault("nodeSelector", {})
            if suspend:
                selector.pop(FLAVOR, None)
            else:
                selector.update(NODES)
        meta = job["metadata"]
        path = f"/apis/kubeflow.org/v1/namespaces/{meta['namespace']}/pytorchjobs/{meta['name']}"
        await self._api.request("PUT", path, changed)


def _webhooks(plane: ControlPlane, port: int) -> Json:
    """Both configurations, as the kubebuilder markers of Kueue's pytorchjob_controller.go have
    them.
    """
    authority = base64.b64encode(plane.authority.certificate.read_bytes()).decode()

    def configuration(kind: str, path: str, operations: list[str]) -> Json:
        rule = {"apiGroups": ["kubeflow.org"], "apiVersions": ["v1"], "resources": ["pytorchjobs"]}
        webhook: dict[str, Any] = {
            "name": f"{path}.stand-in.example.com",
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "failurePolicy": "Fail",
            "clientConfig": {"url": f"https://127.0.0.1:{port}/{path}", "caBundle": authority},
            "namespaceSelector": {"matchLabels": {MANAGED: "true"}},
            "rules": [rule | {"operations": operations}],
        }
        return {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": kind,
            "metadata": {"name": "stand-in-kueue"},
            "webhooks": [webhook],
        }

    both = [
        configuration("MutatingWebhookConfiguration", "mutate", ["CREATE"]),
        configuration("ValidatingWebhookConfiguration", "validate", ["CREATE", "UPDATE"]),
    ]
    return {"apiVersion": "v1", "kind": "List", "items": both}


def _refusal(before: Json, job: Json, tenant: Tenant) -> str | None:
    """Of an update, in Kueue's words; the priority class as the strictest release has it."""
    old, new, path = _queue(before), _queue(job), "metadata.labels[%s]: Invalid value: %s: %s"
    if not _suspended(job) and old != new:
        return path % (QUEUE, json.dumps(new), "field is immutable")
    if old and not new and "default" in tenant.queues:
        return path % (QUEUE, '""', "queue-name must not be empty in namespace with default queue")
    was, is_now = (_labels(one).get(PRIORITY, "") for one in (before, job))
    if was != is_now:
        return path % (PRIORITY, json.dumps(is_now), "field is immutable")
    return None


def _labels(job: Json) -> dict[str, str]:
    return dict(job["metadata"].get("labels") or {})


def _queue(job: Json) -> str:
    return _labels(job).get(QUEUE, "")


def _suspended(job: Json) -> bool:
    return bool(job["spec"].get("runPolicy", {}).get("suspend"))


def _active(job: Json) -> bool:
    replicas = (job.get("status") or {}).get("replicaStatuses") or {}
    return any(replica.get("active") for replica in replicas.values())


def _finished(job: Json) -> bool:
    conditions = (job.get("status") or {}).get("conditions") or []
    return any(c["type"] in ("Succeeded", "Failed") and c["status"] == "True" for c in conditions)
