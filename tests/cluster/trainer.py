"""Kubeflow Trainer and JobSet, played on their real CRDs: neither is among the programs that the
control plane is built from.

As the real ones do, they make a JobSet from a TrainJob and its TrainingRuntime, and a Job from the
JobSet, hand on the suspension, and report how the Job ended. A runtime stays while a TrainJob names
it. The Job controller, which makes the pods, and the garbage collector are real. There is no
webhook, no Service, and no restart of a JobSet.
"""

from __future__ import annotations

import asyncio
import copy
import gzip
import logging
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
from apiclient import Api, ApiError, Json, cancel, run
from controlplane import ControlPlane

CRDS = sorted((Path(__file__).parent / "crds").glob("*.yaml.gz"))
GROUP = "/apis/trainer.kubeflow.org/v1alpha1"
TRAINJOBS, RUNTIMES = (GROUP, "trainjobs"), (GROUP, "trainingruntimes")
JOBSETS, JOBS = ("/apis/jobset.x-k8s.io/v1alpha2", "jobsets"), ("/apis/batch/v1", "jobs")
IN_USE = "trainer.kubeflow.org/resource-in-use"
STEP, NODE = "trainer.kubeflow.org/trainjob-ancestor-step", "node"
OF_SET = "jobset.sigs.k8s.io/jobset-name"
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
MERGE = "merge-patch+json"
PAUSE = 0.2  # seconds between two looks
Kind = tuple[str, str]
Key = tuple[str, str]  # namespace and name


NAMES = (
    "trainjobs.trainer.kubeflow.org",
    "trainingruntimes.trainer.kubeflow.org",
    "jobsets.jobset.x-k8s.io",
)


@contextmanager
def trainer_on(control_plane: ControlPlane) -> Iterator[None]:
    """The control plane has the CRDs of Trainer and JobSet, and both are played."""
    crds = "\n---\n".join(gzip.decompress(file.read_bytes()).decode() for file in CRDS)
    names = [f"crd/{name}" for name in NAMES]
    control_plane.kubectl("apply", "--server-side", "-f", "-", input=crds)
    # kubectl fails on a CRD that has no conditions yet.
    control_plane.kubectl("wait", "--for=jsonpath={.status.conditions}", *names, "--timeout=60s")
    control_plane.kubectl("wait", "--for=condition=Established", *names, "--timeout=60s")
    with Trainer(control_plane.kubeconfig):
        yield
        control_plane.kubectl("delete", *names, "--timeout=90s")


class Trainer:
    """Both controllers, for all namespaces. `errors` should stay empty."""

    def __init__(self, kubeconfig: Path):
        self.api = Api(kubeconfig)
        self.errors: list[str] = []
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> Trainer:
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
            raise AssertionError("the played Trainer failed:\n" + "\n".join(self.errors))

    async def _start(self) -> None:
        self._task = asyncio.create_task(self._work())

    async def _stop(self) -> None:
        assert self._task is not None
        await cancel(self._task)
        await self.api.close()

    async def _work(self) -> None:
        while True:
            await self._guard(self._look())
            await asyncio.sleep(PAUSE)

    async def _guard(self, work: Awaitable[None]) -> None:
        """What is gone, has changed or is in a namespace that ends is looked at again."""
        try:
            await work
        except (ApiError, aiohttp.ClientError, OSError) as error:
            if getattr(error, "status", 404) not in (403, 404, 409, 429):
                logging.exception("the played Trainer")
                self.errors.append(str(error))

    async def _look(self) -> None:
        jobs, sets = await self._list(JOBS), await self._list(JOBSETS)
        trainjobs = await self._list(TRAINJOBS)
        for key, runtime in (await self._list(RUNTIMES)).items():
            await self._guard(self._keep(runtime, key in trainjobs))
        for key, trainjob in trainjobs.items():
            if "deletionTimestamp" not in trainjob["metadata"]:
                await self._guard(self._trainjob(trainjob, sets.get(key)))
        for (namespace, name), jobset in sets.items():
            if "deletionTimestamp" not in jobset["metadata"]:
                job = jobs.get((namespace, f"{name}-{NODE}-0"))
                await self._guard(self._jobset(jobset, job))

    async def _list(self, kind: Kind) -> dict[Key, Json]:
        root, plural = kind
        try:
            found = (await self.api.request("GET", f"{root}/{plural}"))["items"]
        except ApiError as error:
            if error.status != 404:  # its CRD has been deleted
                raise
            found = []
        return {(o["metadata"]["namespace"], o["metadata"]["name"]): o for o in found}

    async def _patch(self, kind: Kind, thing: Json, body: Json, part: str = "") -> None:
        meta = thing["metadata"]
        await self.api.request(
            "PATCH", f"{_path(kind, meta)}/{meta['name']}{part}", body, patch=MERGE
        )

    async def _keep(self, runtime: Json, used: bool) -> None:
        """A runtime that a TrainJob names is not removed."""
        has, meta = IN_USE in runtime["metadata"].get("finalizers", []), runtime["metadata"]
        if used != has and (has or "deletionTimestamp" not in meta):
            await self._patch(RUNTIMES, runtime, {"metadata": {"finalizers": [IN_USE] * used}})

    async def _trainjob(self, trainjob: Json, jobset: Json | None) -> None:
        meta, spec = trainjob["metadata"], trainjob["spec"]
        if jobset is None:
            at = {"namespace": meta["namespace"]}
            runtime = await self.api.request(
                "GET", f"{_path(RUNTIMES, at)}/{spec['runtimeRef']['name']}"
            )
            await self.api.request("POST", _path(JOBSETS, meta), jobset_of(trainjob, runtime))
            return
        suspend = bool(spec.get("suspend"))
        if bool(jobset["spec"].get("suspend")) != suspend:
            await self._patch(JOBSETS, jobset, {"spec": {"suspend": suspend}})
        told = {"Completed": "Complete", "Failed": "Failed"}
        ended = [(told[c["type"]], c["reason"]) for c in _true(jobset) if c["type"] in told]
        wanted = {"Suspended": ("Suspended" if suspend else "Resumed", suspend)}
        wanted |= {kind: (reason, True) for kind, reason in ended}
        await self._report(TRAINJOBS, trainjob, wanted)

    async def _jobset(self, jobset: Json, job: Json | None) -> None:
        if job is None:
            made = job_of(jobset)
            await self.api.request("POST", _path(JOBS, jobset["metadata"]), made)
            return
        suspend = bool(jobset["spec"].get("suspend"))
        ended = {c["type"] for c in _true(job)}
        if bool(job["spec"].get("suspend")) != suspend and not ended & {"Complete", "Failed"}:
            await self._patch(JOBS, job, {"spec": {"suspend": suspend}})
        wanted = {}
        if "Complete" in ended:
            wanted["Completed"] = ("AllJobsCompleted", True)
        if "Failed" in ended:
            wanted["Failed"] = ("ReachedMaxRestarts", True)
        await self._report(JOBSETS, jobset, wanted)

    async def _report(self, kind: Kind, thing: Json, wanted: dict[str, tuple[str, bool]]) -> None:
        """Write the conditions that are not as wanted."""
        old = {c["type"]: c for c in thing.get("status", {}).get("conditions") or []}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        new = dict(old)
        for name, (reason, true) in wanted.items():
            if name not in old or (old[name]["status"] == "True") != true:
                new[name] = {
                    "type": name,
                    "status": str(true),
                    "reason": reason,
                    "message": f"{reason} (played)",
                    "lastTransitionTime": now,
                }
        if new != old:
            body = {"status": {"conditions": [*new.values()]}}
            await self._patch(kind, thing, body, "/status")


def _path(kind: Kind, meta: Json) -> str:
    root, plural = kind
    return f"{root}/namespaces/{meta['namespace']}/{plural}"


def _true(thing: Json) -> list[Json]:
    conditions = thing.get("status", {}).get("conditions") or []
    return [c for c in conditions if c["status"] == "True"]


def _owner(thing: Json, version: str) -> Json:
    meta = thing["metadata"]
    owner = {"apiVersion": version, "kind": thing["kind"], "name": meta["name"], "uid": meta["uid"]}
    return owner | {"controller": True, "blockOwnerDeletion": True}


def jobset_of(trainjob: Json, runtime: Json) -> Json:
    """The JobSet that Trainer makes: the runtime's template, and what the TrainJob sets in it."""
    meta, trainer = trainjob["metadata"], trainjob["spec"]["trainer"]
    template = copy.deepcopy(runtime["spec"]["template"])
    for replicated in template["spec"]["replicatedJobs"]:
        job = replicated["template"]
        assert job["metadata"]["labels"][STEP] == "trainer", "Trainer would not know this job"
        replicated["replicas"] = 1
        job["spec"] |= {"parallelism": trainer["numNodes"], "completions": trainer["numNodes"]}
        [container] = job["spec"]["template"]["spec"]["containers"]
        assert container["name"] == NODE, "Trainer would not know this container"
        container["image"] = trainer.get("image", container["image"])
        container["env"] = _env(container["env"], [*trainer.get("env", []), *_torch(meta, trainer)])
    trainjob = {"kind": "TrainJob", **trainjob}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            **template["metadata"],
            "name": meta["name"],
            "namespace": meta["namespace"],
            "ownerReferences": [_owner(trainjob, "trainer.kubeflow.org/v1alpha1")],
        },
        "spec": {**template["spec"], "suspend": bool(trainjob["spec"].get("suspend"))},
    }


def _torch(meta: Json, trainer: Json) -> list[Json]:
    """The variables that Trainer sets for torchrun."""
    values: dict[str, Any] = {
        "PET_NNODES": trainer["numNodes"],
        "PET_NPROC_PER_NODE": trainer["numProcPerNode"],
        "PET_MASTER_ADDR": f"{meta['name']}-{NODE}-0-0.{meta['name']}",
        "PET_MASTER_PORT": 29500,
    }
    rank = {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}}
    return [rank, *({"name": name, "value": str(value)} for name, value in values.items())]


def _env(old: list[Json], new: list[Json]) -> list[Json]:
    """The variables, of which the new ones replace old ones of the same name."""
    return [*({v["name"]: v for v in [*old, *new]}).values()]


def job_of(jobset: Json) -> Json:
    """The Job that JobSet makes."""
    meta = jobset["metadata"]
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = copy.deepcopy(replicated["template"])
    more = {OF_SET: meta["name"], "jobset.sigs.k8s.io/jobset-uid": meta["uid"]}
    for thing in (job, job["spec"]["template"]):
        thing["metadata"]["labels"] |= more
    job["metadata"] |= {
        "name": f"{meta['name']}-{replicated['name']}-0",
        "namespace": meta["namespace"],
        "ownerReferences": [_owner({"kind": "JobSet", **jobset}, "jobset.x-k8s.io/v1alpha2")],
    }
    job["spec"] |= {"completionMode": "Indexed", "suspend": bool(jobset["spec"].get("suspend"))}
    return {"apiVersion": "batch/v1", "kind": "Job", **job}
