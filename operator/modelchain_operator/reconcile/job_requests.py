"""Makes the `JobRequest` from which a runner builds a job, for a `Launch` that `decide` asks for.

It adds the node pool, the image, the names of claims, and the task with paths as a pod sees them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import Any

from modelchain.api.artifact import own_claim
from modelchain.api.contracts import (
    DataRequest,
    EvaluationTask,
    IndexTask,
    TaskEvaluation,
    TrainFiles,
)
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import ModelChain, Stage
from modelchain.api.status import AttemptStatus, State
from modelchain.decide.observed import Artifact, Launch, Measure
from modelchain.decide.task import Placement, task_for
from modelchain.errors import InputError
from modelchain.identity.digest import canonical, stage_inputs
from modelchain.plan.pools import NodePool, PoolFile
from modelchain_operator.runners import evaluation_job, index_job
from modelchain_operator.runners.port import JobRequest
from modelchain_operator.runners.template import ARTIFACTS, PREDECESSORS, TERMINATION_MESSAGE

INDEX = f"{ARTIFACTS}/index"
# On a job: a hash of all that it was made from, which shows whether it would be made differently
# now.
MADE_FROM = "modelchain.dev/made-from"
# On a job: the name of the node pool that it was made for. An edit of the spec does not move it.
NODE_POOL = "modelchain.dev/node-pool"
# The first part of that hash. One that was computed in another way cannot be compared.
FORMULA = "2-"
# What a node pool says that makes no difference to a trainer's pod.
NOT_OF_PODS = {"gpu", "price", "prices", "capacity_label", "indexing", "evaluating"}
PINNED = re.compile(r"@sha256:[0-9a-f]{64}$")


def claim_name(chain: ModelChain) -> str:
    """The claim of a chain's artifacts: the existing one that it names, or its own."""
    storage = chain.spec.storage
    assert storage is not None
    return storage.claim_name or own_claim(chain.metadata.name)


def lease_name(claim_uid: str, digest: str) -> str:
    """The name of the Lease for a share.

    By it, chains on one claim agree which of them trains an input digest.
    """
    return f"mchain-{hashlib.sha256(f'{claim_uid}{digest}'.encode()).hexdigest()[:16]}"


def pool_of(chain: ModelChain, config: PoolFile) -> NodePool:
    """The node pool of a chain. Raises InputError if the configuration has none for it."""
    return config.pool(chain.spec.runner.node_pool)


def pool_name(chain: ModelChain, config: PoolFile) -> str | None:
    """The name of a chain's node pool, which the configuration may not have."""
    return chain.spec.runner.node_pool or config.defaults.node_pool


def image_of(chain: ModelChain, config: PoolFile) -> str:
    """The trainer's image, pinned by digest, since a tag may be moved while a chain runs.

    Raises InputError if there is no image, or if it is not pinned.
    """
    image = chain.spec.runner.image or config.defaults.image
    if image is None:
        raise InputError(
            "name the trainer image, by its digest: REPOSITORY@sha256:...",
            field="spec.runner.image",
        )
    if not PINNED.search(image):
        raise InputError(
            f"{image} is not pinned; end it in @sha256: and 64 hex digits",
            field="spec.runner.image",
        )
    return image


def queue_of(chain: ModelChain, config: PoolFile) -> str | None:
    return chain.spec.runner.queue_name or config.defaults.queue_name


def job_request(
    chain: ModelChain, config: PoolFile, epochs: dict[str, int], launch: Launch, claim_uid: str
) -> JobRequest:
    """All that the objects of this attempt are made from.

    Raises InputError if the chain lacks something that it must name, or if its task is too large.
    """
    meta, spec = chain.metadata, chain.spec
    assert meta.uid is not None and meta.namespace is not None
    stage, pool = spec.stages[launch.stage], pool_of(chain, config)
    task = task_for(chain, epochs, launch, _placement(chain, pool, stage))
    return JobRequest(
        name=launch.attempt.name,
        namespace=meta.namespace,
        chain=meta.name,
        chain_uid=meta.uid,
        stage=stage.name,
        attempt=launch.attempt.number,
        input_digest=launch.attempt.input_digest,
        pool=pool,
        image=image_of(chain, config),
        artifacts_claim=claim_name(chain),
        claim_uid=claim_uid,
        task=task.model_dump_json(by_alias=True),
        nodes=stage.resources.nodes,
        processes_per_node=pool.processes(stage.resources.processes_per_node),
        data_claim=spec.data.volume.claim_name,
        mount_path=spec.data.volume.mount_path,
        priority_class=spec.runner.priority_class,
        avoid=launch.avoid,
        alone=launch.alone,
    )


def _placement(chain: ModelChain, pool: NodePool, stage: Stage) -> Placement:
    assert chain.metadata.uid is not None
    return Placement(
        root=ARTIFACTS,
        predecessors=PREDECESSORS,
        owner=chain.metadata.uid[:8],
        last_word=TERMINATION_MESSAGE,
        data=_data(chain),
        threads=_threads(pool, stage.resources.processes_per_node),
        device="cuda" if pool.gpus_per_node else "cpu",
    )


def index_name(chain: ModelChain, config: PoolFile, claim_uid: str) -> str:
    """The name of the chain's index Job. It covers all that decides what the Job does.

    So chains that read the same data into the same claim with the same image share a Job.

    Raises InputError if the chain lacks something that it must name.
    """
    volume = chain.spec.data.volume
    read = _data(chain).model_dump(mode="json", exclude={"file"})
    image = image_of(chain, config)
    return index_job.name([claim_uid, image, volume.claim_name, volume.mount_path, read])


def index_request(chain: ModelChain, config: PoolFile, claim_uid: str) -> JobRequest:
    """All that the chain's index Job is made from.

    Raises InputError if the chain lacks something that it must name, or if its task is too large.
    """
    task = IndexTask(data=_data(chain), last_word=TERMINATION_MESSAGE)
    return _of_cpu_job(chain, config, claim_uid, index_name(chain, config, claim_uid), task)


def evaluation_request(
    chain: ModelChain, config: PoolFile, measure: Measure, claim_uid: str
) -> JobRequest:
    """All that an evaluation Job is made from.

    Raises InputError if the chain lacks something that it must name.
    """
    task = EvaluationTask(
        artifact=f"{ARTIFACTS}/{measure.artifact.path}",
        artifact_digest=measure.artifact.digest,
        data=_data(chain).model_copy(update={"index": evaluation_job.INDEX}),
        names=[measure.evaluation.name],
        device="cpu",
        last_word=TERMINATION_MESSAGE,
    )
    stage = chain.spec.stages[measure.stage].name
    request = _of_cpu_job(chain, config, claim_uid, measure.job, task)
    return replace(request, stage=stage, input_digest=measure.artifact.input_digest)


def _of_cpu_job(
    chain: ModelChain, config: PoolFile, claim_uid: str, name: str, task: IndexTask | EvaluationTask
) -> JobRequest:
    """What a CPU Job of this name is made from, which is about no stage."""
    meta, volume = chain.metadata, chain.spec.data.volume
    assert meta.uid is not None and meta.namespace is not None
    return JobRequest(
        name=name,
        namespace=meta.namespace,
        chain=meta.name,
        chain_uid=meta.uid,
        pool=pool_of(chain, config),
        image=image_of(chain, config),
        artifacts_claim=claim_name(chain),
        claim_uid=claim_uid,
        task=task.model_dump_json(by_alias=True),
        data_claim=volume.claim_name,
        mount_path=volume.mount_path,
    )


def check_jobs(chain: ModelChain, config: PoolFile, epochs: dict[str, int]) -> None:
    """Raise InputError if the job of any stage cannot be made: its task may be too large.

    Checked before the first stage is launched, and with the largest values that the rest may have.
    """
    nothing = "0" * 64
    for index, stage in enumerate(chain.spec.stages):
        before = Artifact(nothing, f"{nothing}/artifact", macs=0, metrics={}) if index else None
        predecessor = nothing if index else None
        inputs = stage_inputs(
            chain.spec, index, epochs=10_000, fingerprint=nothing, predecessor=predecessor
        )
        attempt = AttemptStatus(
            name=f"{chain.metadata.name}-{stage.name}-a999",
            number=999,
            input_digest=nothing,
            state=State.PENDING,
        )
        launch = Launch(index, attempt, inputs, before)
        job_request(chain, config, epochs, launch, claim_uid="")


def cannot_build(error: InputError) -> Reason:
    """Why no job can be made of a spec that the API server has accepted."""
    problem = error.problems[0]
    return Reason(Code.INVALID_SPEC, problem.field or "", str(problem))


def made_from(chain: ModelChain, config: PoolFile, launch: Launch, claim_uid: str) -> str:
    """A hash of all that an attempt's job is made from, in the spec and the configuration.

    It covers the queue, too, which a job gets only at its release. It does not cover how this
    version of the operator writes a job, so an upgrade takes no job out of its queue. Fields that
    have their default are left out, since the next version may have more of them.

    Raises InputError if the chain lacks something that it must name.
    """
    spec = chain.spec
    values = [
        image_of(chain, config),
        claim_name(chain),
        claim_uid,
        queue_of(chain, config),
        spec.runner.priority_class,
        spec.recipe.micro_batch_size,
        spec.deadlines.start_seconds,
        spec.deadlines.stall_seconds,
        list(launch.avoid),
    ]
    parts = (spec.stages[launch.stage].resources, spec.data, spec.checkpoint, *spec.evaluation)
    given = [part.model_dump(mode="json", exclude_defaults=True) for part in parts]
    pool = pool_of(chain, config).model_dump(
        mode="json", exclude_defaults=True, exclude=NOT_OF_PODS
    )
    return FORMULA + hashlib.sha256(canonical([values, given, pool])).hexdigest()[:16]


def _threads(pool: NodePool, processes: int | None) -> int | None:
    """The threads of one process: its share of a node's cores; None if the pool gives no cores."""
    return max(1, int(pool.cores / pool.processes(processes))) if pool.cores else None


def _data(chain: ModelChain) -> DataRequest:
    """The data as a pod sees it: with the paths of the spec.

    Whether the files exist, only the trainer can find out. It names those that are missing.
    """
    train = chain.spec.data.train
    evaluations: list[Any] = [
        TaskEvaluation.model_validate(e.model_dump(by_alias=True) | {"files": e.shards})
        for e in chain.spec.evaluation
    ]
    files = TrainFiles(
        files=train.shards,
        samples=train.samples,
        captions_per_sample=train.captions_per_sample,
        fingerprint=train.fingerprint,
    )
    return DataRequest(
        index=INDEX, file=f"ModelChain {chain.metadata.name}", train=files, evaluation=evaluations
    )
