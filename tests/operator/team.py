"""One chain of one stage, reconciled by the real controller on an API server in memory that knows
several kinds of runner.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from jobrequests import CPU_POOL, IMAGE
from plainjob import INDEX
from podshapes import at, owned
from specs import config, inline, with_changes

from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import (
    CHAINS,
    JOBS,
    PODS,
    AlreadyExists,
    Conflict,
    NotFound,
    Object,
    Resource,
)
from modelchain_operator.api.objects import label
from modelchain_operator.api.objects import name as name_of
from modelchain_operator.api.objects import uid as uid_of
from modelchain_operator.reconcile.controller import Controller
from modelchain_operator.reconcile.snapshot import Reader, Snapshot
from modelchain_operator.runners.port import Runner
from modelchain_operator.runners.pytorchjob import REPLICA_INDEX, REPLICA_TYPE
from modelchain_operator.runners.template import ROLE, TRAINING, TRAINS
from modelchain_operator.runners.trainjob import JOBSETS, TRAINJOBS

# The Job that JobSet makes for the first attempt's TrainJob.
NODE_0 = "family-a-a1-node-0"


def merged(job: Object, patch: Object) -> Object:
    """The job after the API server has applied a merge patch."""
    out = dict(job)
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        else:
            out[key] = merged(out.get(key, {}), value) if isinstance(value, dict) else value
    return out


class Stub:
    """Stands in for a controller and for events, and ignores every call."""

    async def reconcile(self, key: tuple[str, str]) -> None: ...
    def remember(self, pod: Object) -> None: ...
    def artifact_changed(self, record: Object) -> None: ...
    def tell(self, *said: object) -> None: ...


class ApiServer:
    """Objects by kind and name. The kinds in `absent` are not installed."""

    def __init__(self) -> None:
        self.objects: defaultdict[Resource, dict[str, Object]] = defaultdict(dict)
        self.absent: set[Resource] = set()
        self.deleted: list[tuple[str, str]] = []
        self._versions: Iterator[int] = iter(range(1, 10_000))

    def put(self, resource: Resource, thing: Object) -> Object:
        stored: Object = json.loads(json.dumps(thing))
        version = next(self._versions)
        stored["metadata"] = {"uid": f"uid-{version}", "creationTimestamp": at(0)} | (
            stored["metadata"] | {"resourceVersion": str(version)}
        )
        self.objects[resource][stored["metadata"]["name"]] = stored
        return stored

    def names(self, runner: Runner) -> list[str]:
        """The jobs of attempts. Index Jobs may be of the same kind."""
        jobs = self.objects[runner.resource].values()
        return sorted(name_of(job) for job in jobs if label(job, ROLE) != "index")

    def parts_of(self, attempt: str, resource: Resource) -> list[Object]:
        """The parts of one kind that an attempt's job has."""
        things = self.objects[resource].values()
        return [thing for thing in things if name_of(thing).startswith(attempt)]

    async def get(self, resource: Resource, namespace: str, name: str) -> Object:
        if name not in self.objects[resource]:
            raise NotFound(name)
        return self.objects[resource][name]

    async def list(
        self, resource: Resource, namespace: str, selector: str = "", fields: str = ""
    ) -> list[Object]:
        if resource in self.absent:
            raise NotFound(resource.plural)
        parts = selector.replace(TRAINS, "").split(",")
        wanted = dict(part.split("=") for part in parts if part and "!=" not in part)
        found = [
            thing
            for thing in self.objects[resource].values()
            if wanted.items() <= thing["metadata"].get("labels", {}).items()
        ]
        if TRAINS not in selector:
            return found
        return [t for t in found if t["metadata"].get("labels", {}).get(ROLE) in TRAINING]

    async def create(self, resource: Resource, body: Object) -> Object:
        if body["metadata"]["name"] in self.objects[resource]:
            raise AlreadyExists(body["metadata"]["name"])
        if body["metadata"]["labels"].get(ROLE) == "index":  # its data is indexed at once
            body = body | {"status": {"conditions": [{"type": "Complete", "status": "True"}]}}
        return self.put(resource, body)

    async def patch(self, resource: Resource, namespace: str, name: str, body: Object) -> Object:
        thing = await self.get(resource, namespace, name)
        for field in ("uid", "resourceVersion"):
            if body["metadata"][field] != thing["metadata"][field]:
                raise Conflict(name)
        return self.put(resource, merged(thing, body))

    async def delete(
        self, resource: Resource, namespace: str, name: str, uid: str, propagation: str = ""
    ) -> None:
        if (await self.get(resource, namespace, name))["metadata"]["uid"] != uid:
            raise Conflict(name)
        del self.objects[resource][name]
        self.deleted.append((resource.plural, name))

    async def replace_status(self, resource: Resource, body: Object) -> Object:
        return self.put(resource, body)


class Team:
    """One chain of one stage on an API server, reconciled by the real controller."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def unheard(self: Reader, pods: object) -> None: ...

        monkeypatch.setattr(Reader, "progress", unheard)
        self.server, self.now, self.kind = ApiServer(), 1_760_000_000.0, "PyTorchJob"
        changes = {
            "metadata.name": "family",
            "metadata.namespace": "team",
            "metadata.uid": "chain-uid",
            "metadata.generation": 1,
            "spec.runner": {"image": IMAGE, "nodePool": "cpu"},
            "spec.storage": {"claimTemplate": {"size": "1Gi"}},
            "spec.data.volume": {"claimName": "data"},
        }
        self.body = with_changes(inline(config(), **changes))
        self.chain = self.server.put(CHAINS, self.body)
        pools = PoolFile.model_validate({"nodePools": {"cpu": CPU_POOL.model_dump(by_alias=True)}})
        self.controller = Controller(self.server, Stub(), pools, lambda: self.now)  # type: ignore[arg-type]

    def one_pass(self) -> ChainStatus:
        """Makes one pass with the current runner and returns the status after it."""
        chain = self.server.objects[CHAINS]["family"]
        spec = ModelChain.model_validate(self.body)
        runner = spec.spec.runner.model_copy(update={"kind": self.kind})
        edited = spec.model_copy(update={"spec": spec.spec.model_copy(update={"runner": runner})})
        stored = ChainStatus.model_validate_json(json.dumps(chain.get("status") or {}))
        snapshot = Snapshot(chain, edited, stored, jobs={}, pods=[])
        asyncio.run(self.controller._decide_and_act(snapshot))
        return snapshot.status

    def attempts(self) -> list[tuple[str, str | None, bool]]:
        """Makes one pass and returns the attempts: name, runner, and whether it is open."""
        [stage] = self.one_pass().stages
        return [(a.name, a.runner, a.finished_at is None) for a in stage.attempts]

    def parts(self, **meta: Any) -> None:
        """Creates the JobSet and the Job of the first attempt's TrainJob, as Trainer and JobSet do.

        `meta` replaces fields of the JobSet's metadata.
        """
        job = self.server.objects[TRAINJOBS]["family-a-a1"]["metadata"]
        common = {"namespace": "team", "labels": job["labels"], "annotations": job["annotations"]}
        of_job = [owned("TrainJob", job["name"], job["uid"])]
        of_set = [owned("JobSet", "family-a-a1", "jobset-uid")]
        job_set = {"name": "family-a-a1", "uid": "jobset-uid", "ownerReferences": of_job} | meta
        node = {"name": NODE_0, "uid": "job-uid", "ownerReferences": of_set}
        self.server.put(JOBSETS, {"kind": "JobSet", "metadata": common | job_set})
        self.server.put(JOBS, {"kind": "Job", "metadata": common | node})

    def pod(self, runner: Runner, phase: str, **state: Any) -> None:
        """Creates rank 0's pod of the first attempt, and what lies between it and its job."""
        job = self.server.objects[runner.resource]["family-a-a1"]
        rank_0 = {REPLICA_TYPE: "master"} if runner.kind == "PyTorchJob" else {INDEX: "0"}
        labels = job["metadata"]["labels"] | rank_0 | {REPLICA_INDEX: "0"}
        name, owner = "family-a-a1-master-0", owned(runner.kind, "family-a-a1", uid_of(job))
        if runner.kind == "TrainJob":
            self.parts()
            name, owner = f"{NODE_0}-0-x7k2q", owned("Job", NODE_0, "job-uid")
        meta = {"name": name, "namespace": "team", "uid": "pod-uid"}
        meta |= {"labels": labels, "ownerReferences": [owner]}
        container = {"name": "trainer", "image": IMAGE, "resources": {}}
        status = {"phase": phase, "containerStatuses": [{"name": "trainer", "state": state}]}
        spec = {"containers": [container], "nodeName": "node-1"}
        self.server.put(PODS, {"metadata": meta, "spec": spec, "status": status})
