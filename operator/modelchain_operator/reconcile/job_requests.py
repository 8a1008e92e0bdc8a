"""Makes the `JobRequest` from which a runner builds a job, for a `Launch` that `decide` asks for.

It adds the node pool, the image, the names of claims, and the task with paths as a pod sees them.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from modelchain.api.contracts import DataRequest, TaskEvaluation, TrainFiles
from modelchain.api.spec import ModelChain
from modelchain.decide.observed import Launch
from modelchain.decide.task import Placement, task_for
from modelchain.errors import InputError
from modelchain.identity.digest import canonical
from modelchain.plan.pools import NodePool, PoolFile
from modelchain_operator.api.kube import Object
from modelchain_operator.runners.port import JobRequest, Runner
from modelchain_operator.runners.template import ARTIFACTS, PREDECESSORS, TERMINATION_MESSAGE

INDEX = f"{ARTIFACTS}/index"
# On a job: a hash of all that it was made from, which shows whether it would be made differently
# now.
MADE_FROM = "modelchain.dev/made-from"
PINNED = re.compile(r"@sha256:[0-9a-f]{64}$")


def claim_name(chain: ModelChain) -> str:
    """The claim of a chain's artifacts: the existing one that it names, or its own."""
    storage = chain.spec.storage
    assert storage is not None
    return storage.claim_name or f"{chain.metadata.name}-artifacts"


def lease_name(claim_uid: str, digest: str) -> str:
    """The name of the Lease for a share.

    By it, chains on one claim agree which of them trains an input digest.
    """
    return f"mchain-{hashlib.sha256(f'{claim_uid}{digest}'.encode()).hexdigest()[:16]}"


def pool_of(chain: ModelChain, config: PoolFile) -> NodePool:
    """The node pool of a chain. Raises InputError if the configuration has none for it."""
    return config.pool(chain.spec.runner.node_pool)


def known_pool(chain: ModelChain, config: PoolFile) -> NodePool | None:
    """The node pool of a chain; None if the configuration has none for it."""
    try:
        return pool_of(chain, config)
    except InputError:
        return None


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
    chain: ModelChain, config: PoolFile, epochs: dict[str, int], launch: Launch
) -> JobRequest:
    """All that the objects of this attempt are made from.

    Raises InputError if the chain lacks something that it must name.
    """
    meta, spec = chain.metadata, chain.spec
    assert meta.uid is not None and meta.namespace is not None
    stage, pool = spec.stages[launch.stage], pool_of(chain, config)
    placement = Placement(
        root=ARTIFACTS,
        predecessors=PREDECESSORS,
        owner=meta.uid[:8],
        last_word=TERMINATION_MESSAGE,
        data=_data(chain),
        threads=_threads(pool, stage.resources.processes_per_node),
        device="cuda" if pool.gpus_per_node else "cpu",
    )
    task = task_for(chain, epochs, launch, placement)
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
        task=task.model_dump_json(by_alias=True),
        nodes=stage.resources.nodes,
        processes_per_node=pool.processes(stage.resources.processes_per_node),
        data_claim=spec.data.volume.claim_name,
        mount_path=spec.data.volume.mount_path,
        priority_class=spec.runner.priority_class,
        avoid=launch.avoid,
    )


def job_for(
    runner: Runner, chain: ModelChain, config: PoolFile, epochs: dict[str, int], launch: Launch
) -> tuple[Object, str]:
    """An attempt's job as it would be made now, and a hash of all that it is made from.

    The hash covers the queue, too, which a job gets only at its release.
    """
    job = runner.build(job_request(chain, config, epochs, launch))
    made_from = [job["spec"], queue_of(chain, config), chain.spec.runner.priority_class]
    return job, hashlib.sha256(canonical(made_from)).hexdigest()[:16]


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
