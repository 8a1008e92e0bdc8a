"""The objects of `cluster_simulation`: small and comparable, with the form in which the API server
would return each.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from typing import Any

from simulation import MAX_DISRUPTIONS, MAX_RETRIES, TOP1
from specs import config, inline, with_changes

from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import Object
from modelchain_operator.reconcile.snapshot import RETRY
from modelchain_operator.runners.kueue import QUEUE, RELEASED, UNRELEASED_QUEUE
from modelchain_operator.runners.template import MAIN_CONTAINER, ROLE, TRAINING

NAMESPACE = "team"
CONFIGS = [
    PoolFile.model_validate(
        {
            "nodePools": {"small": {"gpu": "A100", "gpusPerNode": 1}},
            "defaults": {
                "nodePool": "small",
                "image": "registry.example/trainer@sha256:" + digit * 64,
            },
        }
    )
    for digit in "01"
]


def clock(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Chain:
    """A ModelChain. `edits` are as in `specs.with_changes`; `version` is the resourceVersion."""

    name: str
    uid: str
    stages: int
    edits: tuple[tuple[str, Any], ...] = ()
    suspend: bool = False
    queue: bool = False
    shared: bool = False
    generation: int = 1
    retry: str | None = None
    version: int = 1
    status: ChainStatus = field(default_factory=ChainStatus, compare=False, repr=False)

    def shown(self) -> Object:
        body = self.status.model_dump(mode="json", by_alias=True, exclude_none=True)
        found = _chain_body(replace(self, version=0, status=ChainStatus()))[0]
        meta = {**found["metadata"], "resourceVersion": str(self.version)}
        return {**found, "metadata": meta, "status": body}

    def spec(self) -> ModelChain:
        return _chain_body(replace(self, version=0, status=ChainStatus()))[1]


@cache
def _chain_body(chain: Chain) -> tuple[Object, ModelChain]:
    shapes = (config(vision={"layers": 2 + i}) for i in range(chain.stages))
    storage = {"claimName": "shared"} if chain.shared else {"claimTemplate": {"size": "1Gi"}}
    changes = {
        "metadata": {
            "name": chain.name,
            "namespace": NAMESPACE,
            "uid": chain.uid,
            "generation": chain.generation,
        },
        "spec.suspend": chain.suspend,
        "spec.retry": {"maxRetries": MAX_RETRIES, "maxDisruptions": MAX_DISRUPTIONS},
        "spec.data.volume.claimName": "data",
        "spec.storage": storage,
        **({"spec.runner.queueName": "team-queue"} if chain.queue else {}),
        **({"metadata.annotations": {RETRY: chain.retry}} if chain.retry else {}),
        **(
            {"spec.evaluation": [TOP1]}
            if any("spec.gate" in path for path, _ in chain.edits)
            else {}
        ),
        **{path: list(v) if isinstance(v, tuple) else v for path, v in chain.edits},
    }
    body = with_changes(inline(*shapes, **changes))
    return body, ModelChain.model_validate(body)


@dataclass(frozen=True)
class Job:
    """A PyTorchJob. `made_from` tells jobs with different bodies apart. `ran` is true if pods were
    created for it since it was last suspended.
    """

    name: str
    uid: str
    owner: str
    digest: str
    made_from: str
    body: Object = field(compare=False, repr=False)
    created: float
    version: int = 1
    suspended: bool = True
    queue: str | None = UNRELEASED_QUEUE
    released: bool = False
    finished: str | None = None
    deleting: bool = False
    ran: bool = False

    @property
    def queued(self) -> bool:
        return self.queue not in (None, UNRELEASED_QUEUE)

    def changed(self, **update: Any) -> Job:
        return replace(self, version=self.version + 1, **update)


@dataclass(frozen=True)
class Pod:
    """`word` is its termination message; `job` is the UID of the job that created it. `trainer` is
    the phase that the pod would have if no sidecar ran on.
    """

    uid: str
    job: str
    digest: str
    labels: tuple[tuple[str, str], ...]
    created: float
    phase: str = "Pending"
    word: str = ""
    claim: str = ""
    deleting: bool = False
    started: float | None = None
    ended: float | None = None
    gpus: int = 1
    trainer: str = ""

    @property
    def live(self) -> bool:
        return self.phase in ("Pending", "Running")

    @property
    def trains(self) -> bool:
        return dict(self.labels)[ROLE] in TRAINING


@dataclass(frozen=True)
class Verifier:
    """A verify Job or an index Job."""

    name: str
    uid: str
    owner: str
    digest: str
    body: Object = field(compare=False, repr=False)
    finished: bool = False
    deleting: bool = False
    failed: bool = False

    @property
    def indexes(self) -> bool:
        return bool(self.body["metadata"]["labels"][ROLE] == "index")


@dataclass(frozen=True)
class Thing:
    """A StageArtifact, a claim or a Lease: it is created, read and deleted, but never changed."""

    name: str
    uid: str
    owner: str
    says: str
    body: Object = field(compare=False, repr=False)
    created: float = 0.0


@cache
def shown(thing: Job | Pod | Verifier | Thing) -> Object:
    """The object as the API server returns it: always the same dict for the same object, so that
    states of the search can compare what an operator has read by identity.
    """
    match thing:
        case Job():
            meta = {
                **thing.body["metadata"],
                "uid": thing.uid,
                "resourceVersion": str(thing.version),
            }
            meta["creationTimestamp"] = clock(thing.created)
            labels = {key: value for key, value in meta["labels"].items() if key != QUEUE}
            meta["labels"] = labels | ({QUEUE: thing.queue} if thing.queue else {})
            if thing.released:
                meta["annotations"] = {**meta["annotations"], RELEASED: clock(thing.created)}
            if thing.deleting:
                meta["deletionTimestamp"] = clock(2e9)
            policy = {**thing.body["spec"]["runPolicy"], "suspend": thing.suspended}
            ended = [thing.finished] if thing.finished else []
            conditions = [
                {"type": kind, "status": "True", "message": "as its pods"} for kind in ended
            ]
            spec = {**thing.body["spec"], "runPolicy": policy}
            return {
                **thing.body,
                "metadata": meta,
                "spec": spec,
                "status": {"conditions": conditions},
            }
        case Pod():
            return _pod_shown(thing)
        case Verifier():
            meta = {**thing.body["metadata"], "uid": thing.uid}
            if thing.deleting:
                meta["deletionTimestamp"] = clock(2e9)
            ended = "Failed" if thing.failed else "Complete"
            conditions = [{"type": ended, "status": "True"}] if thing.finished else []
            return {**thing.body, "metadata": meta, "status": {"conditions": conditions}}
        case Thing():
            meta = {
                **thing.body["metadata"],
                "uid": thing.uid,
                "creationTimestamp": clock(thing.created),
            }
            return {**thing.body, "metadata": meta}


def _pod_shown(pod: Pod) -> Object:
    made_by = pod.job.split("#")[0]
    owner = {"name": made_by, "uid": pod.job, "controller": True}
    meta: Object = {
        "name": f"{made_by}-master-0" if pod.trains else pod.uid,
        "namespace": NAMESPACE,
        "uid": pod.uid,
        "labels": dict(pod.labels),
        "ownerReferences": [owner | {"kind": "PyTorchJob" if pod.trains else "Job"}],
        "annotations": {MAIN_CONTAINER: "main"},
        "creationTimestamp": clock(pod.created),
    }
    if pod.deleting:
        meta["deletionTimestamp"] = clock(2e9)
    state: Object = {"waiting": {"reason": "ContainerCreating"}}
    if pod.phase == "Running" and not pod.trainer:
        state = {"running": {"startedAt": clock(pod.started or 0)}}
    elif ended := pod.trainer or ("" if pod.live else pod.phase):
        state = {
            "terminated": {
                "exitCode": 0 if ended == "Succeeded" else 1,
                "message": pod.word,
                "startedAt": clock(pod.started or 0),
                "finishedAt": clock(pod.ended or 0),
            }
        }
    limits = {"nvidia.com/gpu": str(pod.gpus)} if pod.gpus else {}
    return {
        "kind": "Pod",
        "metadata": meta,
        "spec": {
            "nodeName": "node",
            "containers": [{"name": "main", "resources": {"limits": limits}}],
        },
        "status": {
            "phase": pod.phase,
            "podIP": "10.0.0.1",
            "conditions": [
                {
                    "type": "PodScheduled",
                    "status": "True",
                    "lastTransitionTime": clock(pod.created),
                }
            ],
            "containerStatuses": [{"name": "main", "state": state}],
        },
    }
