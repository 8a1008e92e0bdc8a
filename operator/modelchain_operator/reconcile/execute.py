"""The only writer: one action of `decide`, one call. Every write names what it expects to find
(RULES section 6).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

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
from modelchain_operator.reconcile.facts import RETRY, Facts, Need, image_of, task_of
from modelchain_operator.reconcile.memory import Memory
from modelchain_operator.runners import kueue, verify
from modelchain_operator.runners.registry import runner_for, runner_of, state_of
from modelchain_operator.runners.template import (
    CHAIN,
    CHAIN_UID,
    INPUT_DIGEST,
    STAGE,
    owner_reference,
)

QUEUE_REQUIRED = Reason(Code.QUEUE_REQUIRED, message="set spec.runner.queueName")


class Executor:
    """Carries out one step for one chain; `facts` are brought up to date with what the API server
    answered.
    """

    def __init__(self, kube: Kube, config: PoolFile, memory: Memory):
        self.kube, self.config, self.memory = kube, config, memory

    async def write_status(self, chain: Object, status: ChainStatus) -> Object:
        """PUT; the chain as it is then. A Conflict if it has changed since it was read."""
        body = status.model_dump(mode="json", by_alias=True, exclude_none=True)
        return await self.kube.replace_status(CHAINS, {**chain, "status": body})

    async def act(self, facts: Facts, action: Action) -> bool:
        """True if something was written, so that a look at what it changed is due."""
        match action:
            case Launch():
                await self._launch(facts, action)
            case Release(attempt):
                await self._release(facts, attempt)
                state = state_of(facts.jobs[attempt.name])
                # The watch tells what its controller makes of it; a queue may leave it as it is for
                # long.
                return not state.released or state.suspended
            case Stop(name):
                await self._delete_job(facts, name)
                return False  # the watch tells when it is gone
            case Discard(job_uid, name):
                await self._delete_job(facts, name, job_uid)
                return False
            case Verify(launch):
                await self._verify(facts, launch)
            case RecordArtifact():
                await self._record(facts, action)
            case MakeClaim():
                claim = await self.kube.create(CLAIMS, _claim(facts))
                facts.read[Need("claim")] = claim
                self.memory.claims.put((facts.namespace, claim["metadata"]["name"]), claim)
            case TakeShare(digest):
                lease = await self.kube.create(LEASES, _lease(facts, digest))
                facts.read.setdefault(Need("shares"), {})[digest] = lease
            case DropShare(digest):
                lease = facts.read[Need("shares")].pop(digest)
                meta = lease["metadata"]
                await self.kube.delete(
                    LEASES, facts.namespace, meta["name"], meta["uid"], propagation="Background"
                )
        return True

    async def _launch(self, facts: Facts, launch: Launch) -> None:
        runner = runner_for(launch.attempt.runner)
        job, stamp = requests.job_for(runner, facts.spec, self.config, facts.status.epochs, launch)
        job["metadata"]["annotations"][requests.MADE_FROM] = stamp
        refused = Reason(
            Code.LAUNCH_REFUSED, launch.attempt.name, next_command=runner.controller_pods
        )
        made = await self._create(runner.resource, job, refused)
        facts.jobs[launch.attempt.name] = made

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

    async def _release(self, facts: Facts, attempt: AttemptStatus) -> None:
        """One PATCH of what was just read: what a POST answered is outdated, its controller writes
        to a new job.
        """
        runner, name = runner_for(attempt.runner), attempt.name
        known, queue = facts.jobs[name], await self._queue(facts)
        for last in (False, False, True):
            job = await self.kube.get(runner.resource, facts.namespace, name)
            if uid(job) != uid(known) or is_deleting(job):
                raise Conflict(f"{name} is not the job that is to be released, or it goes")
            patch = runner.release(job, queue, timestamp(self.memory.clock()))
            try:
                refused = Reason(Code.RELEASE_REFUSED, name) if queue else QUEUE_REQUIRED
                with self._told((facts.namespace, name), refused):
                    facts.jobs[name] = await self.kube.patch(
                        runner.resource, facts.namespace, name, patch
                    )
                return
            except Conflict:
                if last:
                    raise

    async def _queue(self, facts: Facts) -> str | None:
        """The queue to release into: as the chain or the configuration says, else the namespace's
        own default.
        """
        if (named := requests.queue_of(facts.spec, self.config)) is not None:
            return named
        for resource in kueue.LOCAL_QUEUES:
            with suppress(NotFound, Forbidden):
                await self.kube.get(resource, facts.namespace, kueue.DEFAULT_QUEUE)
                return kueue.DEFAULT_QUEUE
        return None

    async def _delete_job(self, facts: Facts, name: str, job_uid: str | None = None) -> None:
        """Foreground: the job stays until its pods are gone, so that nobody makes a pod for a job
        that is no more.
        """
        job = facts.jobs.get(name)
        if job is not None and not is_deleting(job):
            kind, job_name = runner_of(job).resource, job["metadata"]["name"]
            await self.kube.delete(kind, facts.namespace, job_name, job_uid or uid(job))

    async def _verify(self, facts: Facts, launch: Launch) -> None:
        """Ask for the lost last word; a Job that could not answer makes room first."""
        name = verify.name(launch.attempt.name)
        old = facts.read.get(Need("verify", launch.attempt.name))
        if old is not None:
            await self.kube.delete(JOBS, facts.namespace, name, old["metadata"]["uid"])
            facts.read.pop(Need("verify", launch.attempt.name))
            return
        job = verify.build(
            requests.job_request(facts.spec, self.config, facts.status.epochs, launch)
        )
        if token := annotation(facts.chain, RETRY):
            job["metadata"]["annotations"][RETRY] = token
        facts.read[Need("verify", launch.attempt.name)] = await self.kube.create(JOBS, job)

    async def _record(self, facts: Facts, action: RecordArtifact) -> None:
        digest = action.launch.attempt.input_digest
        try:
            record = await self._create(
                ARTIFACTS, self._stage_artifact(facts, action), Reason(Code.RECORD_REFUSED)
            )
        except AlreadyExists:  # whoever wrote it: what it says decides
            facts.read.pop(Need("artifact", digest), None)
            return
        facts.read[Need("artifact", digest)] = record
        self.memory.artifacts.put((facts.namespace, digest), record)

    def _stage_artifact(self, facts: Facts, action: RecordArtifact) -> Object:
        launch, word = action.launch, action.word
        stage = facts.spec.spec.stages[launch.stage]
        claim = facts.read[Need("claim")]
        before = launch.predecessor
        job = facts.jobs.get(launch.attempt.name)
        inputs = dict(launch.inputs) if job is None else task_of(job)["inputs"]
        metrics = {name: f"{value:.2f}" for name, value in word.metrics.items()}
        names = [e.name for e in facts.spec.spec.evaluation if e.name in metrics]
        spec = StageArtifactSpec(
            chain=facts.spec.metadata.name,
            stage=stage.name,
            model=stage.model or "inline",
            input_digest=launch.attempt.input_digest,
            artifact_digest=str(word.left),
            manifest_digest=str(word.manifest_digest),
            path=f"{launch.attempt.input_digest}/artifact",
            claim_name=claim["metadata"]["name"],
            claim_uid=claim["metadata"]["uid"],
            image=image_of(job) if job else requests.image_of(facts.spec, self.config),
            epochs=int(inputs["epochs"]),
            predecessor=ArtifactPredecessor(
                input_digest=before.input_digest, artifact_digest=before.digest
            )
            if before
            else None,
            inputs=inputs,
            steps=word.steps or word.step,
            macs=action.spent.macs,
            seconds=word.seconds,
            gpu_seconds=action.spent.gpu_seconds,
            cost=action.spent.cost,
            metrics=metrics,
            accuracy=metrics[names[0]] if names else None,
            attempt=launch.attempt.name,
            trainer_math=word.trainer_math,
            finished_at=timestamp(self.memory.clock()),
        )
        meta = _metadata(facts, stage_artifact_name(launch.attempt.input_digest))
        meta["labels"] |= {STAGE: stage.name, INPUT_DIGEST: launch.attempt.input_digest[:63]}
        return StageArtifact(metadata=meta, spec=spec).model_dump(
            mode="json", by_alias=True, exclude_none=True
        )


def with_words(refused: Reason, namespace: str, said: str) -> Reason:
    """The reason of a refusal, with what the API server said and the command that shows its cause.

    A webhook that cannot be called is the controller's own: `next_command` shows its pods.
    """
    message = f"{refused.message}: {said}" if refused.message else said
    if "webhook" in said and refused.next_command:
        return refused.with_message(message)
    look = refusals.next_command(said, namespace)
    return Reason(refused.code, refused.subject, message, look)


def _metadata(facts: Facts, name: str) -> dict[str, Any]:
    labels = {CHAIN: facts.spec.metadata.name, CHAIN_UID: facts.uid}
    return {"name": name, "namespace": facts.namespace, "labels": labels}


def _claim(facts: Facts) -> Object:
    """The chain's own claim; it outlives the chain unless told otherwise."""
    storage = facts.spec.spec.storage
    if storage is None or storage.claim_template is None:
        raise InputError("there is no claim template", field="spec.storage")
    template = storage.claim_template
    meta = _metadata(facts, requests.claim_name(facts.spec))
    if not storage.retain:
        meta["ownerReferences"] = [owner_reference(facts.spec.metadata.name, facts.uid)]
    spec: Object = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": template.size}},
    }
    if template.storage_class_name is not None:
        spec["storageClassName"] = template.storage_class_name
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": spec}


def _lease(facts: Facts, digest: str) -> Object:
    """Held while a stage is trained that other chains may want, too; it goes with the chain."""
    claim = facts.read[Need("claim")]
    meta = _metadata(facts, requests.lease_name(claim["metadata"]["uid"], digest))
    owner = owner_reference(facts.spec.metadata.name, facts.uid)
    meta |= {"ownerReferences": [owner], "annotations": {INPUT_DIGEST: digest}}
    spec = {"holderIdentity": facts.spec.metadata.name}
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}
