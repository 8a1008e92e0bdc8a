"""The only writer: one action of `decide`, one call.

Every write names the object it expects, by UID or resourceVersion, so that it fails if another one
is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pydantic import BaseModel

from modelchain.api.artifact import (
    ArtifactPredecessor,
    StageArtifact,
    StageArtifactSpec,
    stage_artifact_name,
)
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import AttemptStatus, ChainStatus
from modelchain.decide.ledger import timestamp
from modelchain.decide.observed import (
    Action,
    Artifact,
    Discard,
    DropShare,
    Launch,
    MakeClaim,
    RecordArtifact,
    Release,
    Stop,
    TakeShare,
    Verify,
)
from modelchain.errors import InputError
from modelchain.plan.pools import PoolFile
from modelchain_operator.api import refusals
from modelchain_operator.api.kube import (
    ARTIFACTS,
    CHAINS,
    CLAIMS,
    JOBS,
    LEASES,
    AlreadyExists,
    ApiError,
    Conflict,
    Forbidden,
    Invalid,
    Kube,
    NotFound,
    Object,
    Resource,
)
from modelchain_operator.api.objects import annotation, is_deleting, uid
from modelchain_operator.reconcile import job_requests as requests
from modelchain_operator.reconcile.memory import Memory
from modelchain_operator.reconcile.snapshot import RETRY, Need, Snapshot
from modelchain_operator.runners import kueue, verify
from modelchain_operator.runners.registry import runner_for, runner_of, state_of
from modelchain_operator.runners.template import (
    CHAIN,
    CHAIN_UID,
    INPUT_DIGEST,
    STAGE,
    image_of,
    owner_reference,
    task_of,
)

QUEUE_REQUIRED = Reason(Code.QUEUE_REQUIRED, message="set spec.runner.queueName")


class Executor:
    """Carries out one step for one chain, and brings the snapshot up to date with what the API
    server answered.
    """

    def __init__(self, kube: Kube, config: PoolFile, memory: Memory):
        self.kube, self.config, self.memory = kube, config, memory

    async def write_status(self, chain: Object, status: ChainStatus) -> Object:
        """PUT; the chain as it is then. A Conflict if it has changed since it was read."""
        return await self.kube.replace_status(CHAINS, {**chain, "status": _dumped(status)})

    async def act(self, snapshot: Snapshot, action: Action) -> bool:
        """True if something was written whose consequences are to be decided in the same pass."""
        match action:
            case Launch():
                await self._launch(snapshot, action)
            case Release(attempt):
                await self._release(snapshot, attempt)
                state = state_of(snapshot.jobs[attempt.name])
                # The watch tells what its controller makes of it; a queue may leave it as it is for
                # long.
                return not state.released or state.suspended
            case Stop(name):
                await self._delete_job(snapshot, name)
                return False  # the watch tells when it is gone
            case Discard(job_uid, name):
                await self._delete_job(snapshot, name, job_uid)
                return False
            case Verify(launch):
                await self._verify(snapshot, launch)
            case RecordArtifact():
                await self._record(snapshot, action)
            case MakeClaim():
                claim = await self.kube.create(CLAIMS, _claim(snapshot))
                snapshot.read[Need("claim")] = claim
                self.memory.claims.put((snapshot.namespace, claim["metadata"]["name"]), claim)
            case TakeShare(digest):
                lease = await self.kube.create(LEASES, _lease(snapshot, digest))
                snapshot.read.setdefault(Need("shares"), {})[digest] = lease
            case DropShare(digest):
                lease = snapshot.read[Need("shares")].pop(digest)
                meta = lease["metadata"]
                await self.kube.delete(
                    LEASES, snapshot.namespace, meta["name"], meta["uid"], propagation="Background"
                )
        return True

    async def _launch(self, snapshot: Snapshot, launch: Launch) -> None:
        runner = runner_for(launch.attempt.runner)
        job, stamp = requests.job_for(
            runner, snapshot.spec, self.config, snapshot.status.epochs, launch
        )
        job["metadata"]["annotations"][requests.MADE_FROM] = stamp
        refused = Reason(
            Code.LAUNCH_REFUSED, launch.attempt.name, next_command=runner.controller_pods
        )
        made = await self._create(runner.resource, job, refused)
        snapshot.jobs[launch.attempt.name] = made

    async def _create(self, resource: Resource, body: Object, refused: Reason) -> Object:
        """POST; a refusal is told in the status, as `refused` with the server's words."""
        with self._told((body["metadata"]["namespace"], body["metadata"]["name"]), refused):
            return await self.kube.create(resource, body)

    @contextmanager
    def _told(self, key: tuple[str, str], refused: Reason) -> Iterator[None]:
        """Around the write of an object (its namespace and name): a refusal is remembered, so that
        the status tells it as `refused`, with the server's words added. Other errors pass by
        themselves, and are not told.
        """
        try:
            yield
        except AlreadyExists:
            self.memory.refused.pop(key, None)
            raise
        except ApiError as error:
            webhook = "webhook" in str(error)
            if isinstance(error, Forbidden | Invalid) or webhook:
                self.memory.refuse(key, with_words(refused, key[0], str(error)))
            raise
        self.memory.refused.pop(key, None)

    async def _release(self, snapshot: Snapshot, attempt: AttemptStatus) -> None:
        """One PATCH of what was just read: its controller writes to a new job, so what the POST
        answered is outdated.
        """
        runner, name = runner_for(attempt.runner), attempt.name
        known, queue = snapshot.jobs[name], await self._queue(snapshot)
        for last in (False, False, True):
            job = await self.kube.get(runner.resource, snapshot.namespace, name)
            if uid(job) != uid(known) or is_deleting(job):
                raise Conflict(f"{name} is not the job that is to be released, or it goes")
            patch = runner.release(job, queue, timestamp(self.memory.clock()))
            try:
                refused = Reason(Code.RELEASE_REFUSED, name) if queue else QUEUE_REQUIRED
                with self._told((snapshot.namespace, name), refused):
                    snapshot.jobs[name] = await self.kube.patch(
                        runner.resource, snapshot.namespace, name, patch
                    )
                return
            except Conflict:
                if last:
                    raise

    async def _queue(self, snapshot: Snapshot) -> str | None:
        """The queue to release into: as the chain or the configuration says, else the namespace's
        own default.
        """
        if (named := requests.queue_of(snapshot.spec, self.config)) is not None:
            return named
        for resource in kueue.LOCAL_QUEUES:
            with suppress(NotFound, Forbidden):
                await self.kube.get(resource, snapshot.namespace, kueue.DEFAULT_QUEUE)
                return kueue.DEFAULT_QUEUE
        return None

    async def _delete_job(self, snapshot: Snapshot, name: str, job_uid: str | None = None) -> None:
        """Foreground: the job stays until its pods are gone, so that its controller makes no pod
        for a job that is no more.
        """
        job = snapshot.jobs.get(name)
        if job is not None and not is_deleting(job):
            kind, job_name = runner_of(job).resource, job["metadata"]["name"]
            await self.kube.delete(kind, snapshot.namespace, job_name, job_uid or uid(job))

    async def _verify(self, snapshot: Snapshot, launch: Launch) -> None:
        """Ask for the lost last word; a Job that could not answer makes room first."""
        name = verify.name(launch.attempt.name)
        old = snapshot.read.get(Need("verify", launch.attempt.name))
        if old is not None:
            await self.kube.delete(JOBS, snapshot.namespace, name, old["metadata"]["uid"])
            snapshot.read.pop(Need("verify", launch.attempt.name))
            return
        job = verify.build(
            requests.job_request(snapshot.spec, self.config, snapshot.status.epochs, launch)
        )
        if token := annotation(snapshot.chain, RETRY):
            job["metadata"]["annotations"][RETRY] = token
        snapshot.read[Need("verify", launch.attempt.name)] = await self.kube.create(JOBS, job)

    async def _record(self, snapshot: Snapshot, action: RecordArtifact) -> None:
        digest = action.launch.attempt.input_digest
        try:
            record = await self._create(
                ARTIFACTS, self._stage_artifact(snapshot, action), Reason(Code.RECORD_REFUSED)
            )
        except AlreadyExists:  # by an earlier pass or another operator: what it says decides
            snapshot.read.pop(Need("artifact", digest), None)
            return
        snapshot.read[Need("artifact", digest)] = record
        self.memory.artifacts.put((snapshot.namespace, digest), record)

    def _stage_artifact(self, snapshot: Snapshot, action: RecordArtifact) -> Object:
        attempt = action.launch.attempt
        stage = snapshot.spec.spec.stages[action.launch.stage]
        claim = snapshot.read[Need("claim")]
        inputs, image = self._made_from(snapshot, action.launch)
        word, before = action.word, action.launch.predecessor
        metrics = {name: f"{value:.2f}" for name, value in word.metrics.items()}
        shown = [e.name for e in snapshot.spec.spec.evaluation if e.name in metrics]
        spec = StageArtifactSpec(
            chain=snapshot.spec.metadata.name,
            stage=stage.name,
            model=stage.model or "inline",
            input_digest=attempt.input_digest,
            artifact_digest=str(word.left),
            manifest_digest=str(word.manifest_digest),
            path=f"{attempt.input_digest}/artifact",
            claim_name=claim["metadata"]["name"],
            claim_uid=claim["metadata"]["uid"],
            image=image,
            epochs=int(inputs["epochs"]),
            predecessor=_predecessor(before) if before else None,
            inputs=inputs,
            steps=word.steps or word.step,
            macs=action.spent.macs,
            seconds=word.seconds,
            gpu_seconds=action.spent.gpu_seconds,
            cost=action.spent.cost,
            metrics=metrics,
            accuracy=metrics[shown[0]] if shown else None,
            attempt=attempt.name,
            trainer_math=word.trainer_math,
            finished_at=timestamp(self.memory.clock()),
        )
        meta = _metadata(snapshot, stage_artifact_name(attempt.input_digest))
        meta["labels"] |= {STAGE: stage.name, INPUT_DIGEST: attempt.input_digest[:63]}
        return _dumped(StageArtifact(metadata=meta, spec=spec))

    def _made_from(self, snapshot: Snapshot, launch: Launch) -> tuple[dict[str, Any], str]:
        """The inputs and the image of an attempt: as its job says, else as they would be now."""
        job = snapshot.jobs.get(launch.attempt.name)
        if job is not None:
            return task_of(job)["inputs"], image_of(job)
        return dict(launch.inputs), requests.image_of(snapshot.spec, self.config)


def with_words(refused: Reason, namespace: str, said: str) -> Reason:
    """The reason of a refusal, with what the API server said and the command that shows its cause.

    A webhook that cannot be called is the controller's own: `next_command` shows its pods.
    """
    message = f"{refused.message}: {said}" if refused.message else said
    if "webhook" in said and refused.next_command:
        return refused.with_message(message)
    look = refusals.next_command(said, namespace)
    return Reason(refused.code, refused.subject, message, look)


def _predecessor(before: Artifact) -> ArtifactPredecessor:
    return ArtifactPredecessor(input_digest=before.input_digest, artifact_digest=before.digest)


def _dumped(body: BaseModel) -> Object:
    return body.model_dump(mode="json", by_alias=True, exclude_none=True)


def _metadata(snapshot: Snapshot, name: str) -> dict[str, Any]:
    labels = {CHAIN: snapshot.spec.metadata.name, CHAIN_UID: snapshot.uid}
    return {"name": name, "namespace": snapshot.namespace, "labels": labels}


def _claim(snapshot: Snapshot) -> Object:
    """The chain's own claim; it outlives the chain unless told otherwise."""
    storage = snapshot.spec.spec.storage
    if storage is None or storage.claim_template is None:
        raise InputError("there is no claim template", field="spec.storage")
    template = storage.claim_template
    meta = _metadata(snapshot, requests.claim_name(snapshot.spec))
    if not storage.retain:
        meta["ownerReferences"] = [owner_reference(snapshot.spec.metadata.name, snapshot.uid)]
    spec: Object = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": template.size}},
    }
    if template.storage_class_name is not None:
        spec["storageClassName"] = template.storage_class_name
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": spec}


def _lease(snapshot: Snapshot, digest: str) -> Object:
    """Held while a stage is trained that other chains may want, too; it goes with the chain."""
    claim = snapshot.read[Need("claim")]
    meta = _metadata(snapshot, requests.lease_name(claim["metadata"]["uid"], digest))
    owner = owner_reference(snapshot.spec.metadata.name, snapshot.uid)
    meta |= {"ownerReferences": [owner], "annotations": {INPUT_DIGEST: digest}}
    spec = {"holderIdentity": snapshot.spec.metadata.name}
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}
