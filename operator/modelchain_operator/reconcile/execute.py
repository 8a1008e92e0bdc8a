"""Carries out the actions of `decide`. No other module writes the objects of a chain.

Every change of an object names its UID or resourceVersion, so that it fails if the object is
another one by now.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from modelchain.api.artifact import (
    ArtifactPredecessor,
    LaterMetrics,
    StageArtifact,
    StageArtifactSpec,
    stage_artifact_name,
)
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import AttemptStatus, ChainStatus, Expenses
from modelchain.decide.ledger import added, timestamp
from modelchain.decide.observed import (
    Action,
    Artifact,
    Discard,
    DropShare,
    Launch,
    MakeClaim,
    MakeIndex,
    Measure,
    RecordArtifact,
    RecordMetrics,
    Release,
    Stop,
    TakeShare,
    Verify,
    subject_of,
)
from modelchain.decide.refusals import CODES
from modelchain.errors import InputError
from modelchain.identity.digest import short_key
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
    Kube,
    NotFound,
    Object,
)
from modelchain_operator.api.objects import annotation, is_deleting, uid
from modelchain_operator.reconcile import job_requests as requests
from modelchain_operator.reconcile.memory import Memory
from modelchain_operator.reconcile.snapshot import RETRY, Need, Snapshot
from modelchain_operator.runners import evaluation_job, index_job, kueue, verify
from modelchain_operator.runners.port import JobRequest
from modelchain_operator.runners.registry import runner_for, runner_of, state_of
from modelchain_operator.runners.template import (
    CHAIN,
    CHAIN_UID,
    GENERATION,
    INPUT_DIGEST,
    STAGE,
    image_of,
    label_of,
    owner_reference,
    task_of,
)

QUEUE_REQUIRED = Reason(Code.QUEUE_REQUIRED, message="set spec.runner.queueName")


class Executor:
    """Carries out what was decided for a chain, and puts the server's answers into the snapshot."""

    def __init__(self, kube: Kube, config: PoolFile, memory: Memory):
        self.kube = kube
        self.config = config
        self.memory = memory

    async def write_status(self, chain: Object, status: ChainStatus) -> Object:
        """PUT the status and return the chain as it is now.

        Raises Conflict if the chain has changed since it was read.
        """
        return await self.replace_status(chain, _dumped(status))

    async def replace_status(self, chain: Object, status: Object) -> Object:
        return await self.kube.replace_status(CHAINS, {**chain, "status": status})

    async def act(self, snapshot: Snapshot, action: Action) -> bool:
        """Carry out an action. Returns whether the same pass has to decide again after it.

        Raises any `ApiError`. If the API server refused the action, or the action's object cannot
        be made at all, the next decision is told why.
        """
        try:
            again = await self._act(snapshot, action)
        except ApiError as error:
            if isinstance(error, AlreadyExists):
                self.memory.accepted(snapshot.uid, action)
            elif refusals.is_refusal(error):
                said = await self._refused(snapshot, action, str(error))
                self.memory.refuse(snapshot.uid, action, said)
            raise
        except InputError as error:
            # The same pass tells it, if that is news.
            return self.memory.refuse(snapshot.uid, action, requests.cannot_build(error))
        self.memory.accepted(snapshot.uid, action)
        return again

    async def _refused(self, snapshot: Snapshot, action: Action, answer: str) -> Reason:
        """What the status says of an action that the API server refused with this answer."""
        refused = Reason(CODES[type(action)], subject_of(action))
        if isinstance(action, Launch):
            shown = runner_for(action.attempt.runner).controller_pods
            refused = replace(refused, next_command=shown)
        elif isinstance(action, RecordMetrics):
            refused = refused.with_message("it was measured, and cannot be recorded")
        elif isinstance(action, Release) and await self._queue(snapshot) is None:
            refused = QUEUE_REQUIRED
        return with_words(refused, snapshot.namespace, answer)

    async def _act(self, snapshot: Snapshot, action: Action) -> bool:
        match action:
            case Launch():
                await self._launch(snapshot, action)
            case Release(attempt):
                await self._release(snapshot, attempt)
                state = state_of(snapshot.jobs[attempt.name])
                # If the job runs now, a watch event follows. A job that is still suspended needs
                # another patch, or waits in its queue, maybe for long and without any event.
                return not state.released or state.suspended
            case Stop() | Discard():
                await self._check_unchanged(snapshot)
                await self._delete_job(snapshot, action)
                return False  # the watch tells when the job no longer exists
            case Verify(launch):
                await self._verify(snapshot, launch)
            case RecordArtifact() | RecordMetrics():
                await self._record(snapshot, action)
            case MakeClaim():
                claim = await self.kube.create(CLAIMS, _claim(snapshot))
                snapshot.read[Need("claim")] = claim
                self.memory.claims.put((snapshot.namespace, claim["metadata"]["name"]), claim)
            case MakeIndex() | Measure():
                await self._make_cpu_job(snapshot, action)
            case TakeShare() | DropShare():
                await self._share(snapshot, action)
        return True

    async def _check_unchanged(self, snapshot: Snapshot) -> None:
        """Raise Conflict if the chain is not as this pass has read it.

        A job or share that the status did not name when it was read may be one that another
        operator has intended meanwhile. That one must not be deleted. The PUT changes nothing, but
        the API server compares the resourceVersion in it with the stored one.
        """
        snapshot.chain = await self.kube.replace_status(CHAINS, snapshot.chain)

    async def give_back(self, lease: Object) -> None:
        """Delete the Lease of a share."""
        meta = lease["metadata"]
        await self.kube.delete(
            LEASES, meta["namespace"], meta["name"], meta["uid"], propagation="Background"
        )

    async def _launch(self, snapshot: Snapshot, launch: Launch) -> None:
        runner, request = runner_for(launch.attempt.runner), self._request(snapshot, launch)
        job = runner.build(request)
        made_from = requests.made_from(snapshot.spec, self.config, launch, request.claim_uid)
        job["metadata"]["annotations"] |= {
            requests.MADE_FROM: made_from,
            requests.NODE_POOL: requests.pool_name(snapshot.spec, self.config) or "",
        }
        snapshot.jobs[launch.attempt.name] = await self.kube.create(runner.resource, job)

    def _request(self, snapshot: Snapshot, launch: Launch) -> JobRequest:
        claim, epochs = snapshot.read[Need("claim")], snapshot.status.epochs
        return requests.job_request(snapshot.spec, self.config, epochs, launch, uid(claim))

    async def _release(self, snapshot: Snapshot, attempt: AttemptStatus) -> None:
        """PATCH a job on its way to run, after reading it again.

        Its controller writes to a new job, so the answer to our POST is soon outdated. The answer
        to a PATCH of a moment ago is not. A Conflict is tried three times.
        """
        runner, name = runner_for(attempt.runner), attempt.name
        known, queue = snapshot.jobs[name], await self._queue(snapshot)
        for last in (False, False, True):
            job = snapshot.patched or await self.kube.get(runner.resource, snapshot.namespace, name)
            snapshot.patched = None
            if uid(job) != uid(known) or is_deleting(job):
                raise Conflict(
                    f"{name} is being deleted, or is another job than the one to release"
                )
            patch = runner.release(job, queue, timestamp(self.memory.clock()))
            try:
                snapshot.patched = await self.kube.patch(
                    runner.resource, snapshot.namespace, name, patch
                )
                snapshot.jobs[name] = snapshot.patched
                return
            except Conflict:
                if last:
                    raise

    async def _share(self, snapshot: Snapshot, action: TakeShare | DropShare) -> None:
        if isinstance(action, TakeShare):
            await self._take_share(snapshot, action.digest)
        else:
            await self._check_unchanged(snapshot)
            await self.give_back(snapshot.read[Need("shares")].pop(action.digest))

    async def _take_share(self, snapshot: Snapshot, digest: str) -> None:
        """Make the Lease of a share. One that a deleted chain has left behind is deleted first."""
        left = snapshot.read.pop(Need("lease", digest), None)
        if left is not None:
            await self.give_back(left)
            return
        lease = await self.kube.create(LEASES, _lease(snapshot, digest))
        snapshot.read.setdefault(Need("shares"), {})[digest] = lease

    async def _queue(self, snapshot: Snapshot) -> str | None:
        """The queue to release a job into; None if there is none.

        The chain or the configuration names it. Otherwise it is the namespace's default queue, if
        that exists.
        """
        if (named := requests.queue_of(snapshot.spec, self.config)) is not None:
            return named
        if snapshot.default_queue is None:
            snapshot.default_queue = await self._has_default_queue(snapshot.namespace)
        return kueue.DEFAULT_QUEUE if snapshot.default_queue else None

    async def _has_default_queue(self, namespace: str) -> bool:
        for resource in kueue.LOCAL_QUEUES:
            with suppress(NotFound, Forbidden):
                await self.kube.get(resource, namespace, kueue.DEFAULT_QUEUE)
                return True
        return False

    async def _delete_job(self, snapshot: Snapshot, action: Stop | Discard) -> None:
        """Delete a job in the foreground: it exists until all its pods have been deleted.

        So no pod can outlive the job without being seen.
        """
        name, known = subject_of(action), action.uid if isinstance(action, Discard) else None
        job, cpu_job = snapshot.jobs.get(name), snapshot.read.get(Need("cpu job", name))
        if cpu_job is not None and uid(cpu_job) == known:
            await self.kube.delete(JOBS, snapshot.namespace, name, known)
        elif job is not None and not is_deleting(job):
            kind, job_name = runner_of(job).resource, job["metadata"]["name"]
            await self.kube.delete(kind, snapshot.namespace, job_name, known or uid(job))

    async def _verify(self, snapshot: Snapshot, launch: Launch) -> None:
        """Make a Job that finds the lost last word. An earlier Job without an answer is deleted
        first.
        """
        name = verify.name(launch.attempt.name)
        old = snapshot.read.get(Need("verify", launch.attempt.name))
        if old is not None:
            await self.kube.delete(JOBS, snapshot.namespace, name, old["metadata"]["uid"])
            snapshot.read.pop(Need("verify", launch.attempt.name))
            return
        attempt = snapshot.jobs.get(launch.attempt.name)
        job = verify.build(self._request(snapshot, launch), attempt)
        job["metadata"]["annotations"] |= _asked(snapshot.chain)
        snapshot.read[Need("verify", launch.attempt.name)] = await self.kube.create(JOBS, job)

    async def _make_cpu_job(self, snapshot: Snapshot, action: MakeIndex | Measure) -> None:
        """Make an index Job or an evaluation Job. One that has failed is deleted first.

        If another operator or chain has made it meanwhile, the next decision reads that one.
        """
        need = Need("cpu job", action.job)
        old = snapshot.read.pop(need, None)
        if old is not None:
            await self._check_unchanged(snapshot)
            await self.kube.delete(JOBS, snapshot.namespace, action.job, uid(old), "Background")
            return
        job = self._cpu_job(snapshot, action)
        job["metadata"]["annotations"] |= _asked(snapshot.chain)
        with suppress(AlreadyExists):
            snapshot.read[need] = await self.kube.create(JOBS, job)

    def _cpu_job(self, snapshot: Snapshot, action: MakeIndex | Measure) -> Object:
        spec, claim = snapshot.spec, uid(snapshot.read[Need("claim")])
        if isinstance(action, Measure):
            request = requests.evaluation_request(spec, self.config, action, claim)
            return evaluation_job.build(request)
        return index_job.build(requests.index_request(spec, self.config, claim))

    async def _record(self, snapshot: Snapshot, action: RecordArtifact | RecordMetrics) -> None:
        if isinstance(action, RecordArtifact):
            await self._record_artifact(snapshot, action)
        else:
            await self._record_metrics(snapshot, action)

    async def _record_metrics(self, snapshot: Snapshot, action: RecordMetrics) -> None:
        """Add what was measured to the status of the artifact's record.

        Raises Conflict if the record has changed since it was read: another chain may have measured
        the same.
        """
        measure, digest = action.measure, action.measure.artifact.input_digest
        record = snapshot.recorded(digest)
        if record is None:
            raise Conflict(f"the record of {digest} is gone")
        job = snapshot.read[Need("cpu job", measure.job)]
        measured = LaterMetrics(
            metrics={name: f"{value:.2f}" for name, value in action.metrics.items()},
            pictures=action.pictures,
            measured_at=timestamp(self.memory.clock()),
            image=image_of(job),
        )
        meta = {key: record["metadata"][key] for key in ("uid", "resourceVersion")}
        status: Object = {"metrics": {short_key(measure.evaluation): _dumped(measured)}}
        if measure.evaluation == snapshot.spec.spec.evaluation[0]:
            status["accuracy"] = measured.metrics[measure.evaluation.name]
        record = await self.kube.patch_status(
            ARTIFACTS,
            snapshot.namespace,
            record["metadata"]["name"],
            {"metadata": meta, "status": status},
        )
        snapshot.read[Need("artifact", digest)] = record
        self.memory.artifacts.put((snapshot.namespace, digest), record)

    async def _record_artifact(self, snapshot: Snapshot, action: RecordArtifact) -> None:
        digest = action.launch.attempt.input_digest
        try:
            record = await self.kube.create(ARTIFACTS, self._stage_artifact(snapshot, action))
        except AlreadyExists:
            # An earlier pass or another operator made it. It is read again, and it decides.
            snapshot.read.pop(Need("artifact", digest), None)
            return
        snapshot.read[Need("artifact", digest)] = record
        self.memory.artifacts.put((snapshot.namespace, digest), record)

    def _stage_artifact(self, snapshot: Snapshot, action: RecordArtifact) -> Object:
        attempt, claim = action.launch.attempt, snapshot.read[Need("claim")]
        stage = snapshot.spec.spec.stages[action.launch.stage]
        known = None if action.launch.alone else snapshot.status.stages[action.launch.stage]
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
            round=known.round or None if known else None,
            first_epochs=known.first_epochs if known else None,
            predecessor=_predecessor(before) if before else None,
            inputs=inputs,
            steps=word.steps or word.step,
            seconds=word.seconds,
            **added([action.spent]),
            currency=self._currency(snapshot, action.spent),
            price_sources=list(action.price_sources),
            metrics=metrics,
            evaluations=word.evaluations,
            pictures=word.pictures,
            accuracy=metrics[shown[0]] if shown else None,
            attempt=attempt.name,
            trainer_math=word.trainer_math,
            finished_at=timestamp(self.memory.clock()),
        )
        meta = _metadata(snapshot, stage_artifact_name(uid(claim), attempt.input_digest))
        meta["labels"] |= {STAGE: stage.name, INPUT_DIGEST: label_of(attempt.input_digest)}
        return _dumped(StageArtifact(metadata=meta, spec=spec))

    def _currency(self, snapshot: Snapshot, spent: Expenses) -> str | None:
        """The currency of a cost; None without a cost."""
        return None if spent.cost is None else snapshot.status.currency or self.config.currency

    def _made_from(self, snapshot: Snapshot, launch: Launch) -> tuple[dict[str, Any], str]:
        """The inputs and the image of an attempt, as its job has them.

        Without the job they are those that a launch would have now.
        """
        job = snapshot.jobs.get(launch.attempt.name)
        if job is not None:
            return task_of(job)["inputs"], image_of(job)
        return dict(launch.inputs), requests.image_of(snapshot.spec, self.config)


def with_words(refused: Reason, namespace: str, answer: str) -> Reason:
    """The reason of a refusal, with the API server's answer and the command that shows its cause.

    A webhook that fails is one of the job's controller, so `refused.next_command`, which shows the
    controller's pods, stays.
    """
    message = f"{refused.message}: {answer}" if refused.message else answer
    if "webhook" in answer and refused.next_command:
        return refused.with_message(message)
    command = refusals.next_command(answer, namespace)
    return Reason(refused.code, refused.subject, message, command)


def _asked(chain: Object) -> dict[str, str]:
    """Annotations of a CPU Job: for which edit and which retry of the chain it was made."""
    token, generation = annotation(chain, RETRY), str(chain["metadata"]["generation"])
    return {GENERATION: generation} | ({RETRY: token} if token else {})


def _predecessor(before: Artifact) -> ArtifactPredecessor:
    return ArtifactPredecessor(input_digest=before.input_digest, artifact_digest=before.digest)


def _dumped(body: BaseModel) -> Object:
    return body.model_dump(mode="json", by_alias=True, exclude_none=True)


def _metadata(snapshot: Snapshot, name: str) -> dict[str, Any]:
    labels = {CHAIN: snapshot.spec.metadata.name, CHAIN_UID: snapshot.uid}
    return {"name": name, "namespace": snapshot.namespace, "labels": labels}


def _claim(snapshot: Snapshot) -> Object:
    """The chain's own claim. It outlives the chain unless `storage.retain` is false."""
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
    """The Lease of a share. It is deleted with the chain, if the share is not dropped before."""
    claim = snapshot.read[Need("claim")]
    meta = _metadata(snapshot, requests.lease_name(claim["metadata"]["uid"], digest))
    owner = owner_reference(snapshot.spec.metadata.name, snapshot.uid)
    meta |= {"ownerReferences": [owner], "annotations": {INPUT_DIGEST: digest}}
    spec = {"holderIdentity": snapshot.spec.metadata.name}
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}
