"""From what `decide` says to launch to what a runner builds: the task in a pod's paths, the pool,
the image, names.
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

CACHE = f"{ARTIFACTS}/cache"
MADE_FROM = "modelchain.dev/made-from"
PINNED = re.compile(r"@sha256:[0-9a-f]{64}$")


def claim_name(chain: ModelChain) -> str:
    """The claim of a chain's artifacts: its own, or the one it shares."""
    storage = chain.spec.storage
    assert storage is not None
    return storage.claim_name or f"{chain.metadata.name}-artifacts"


def lease_name(claim_uid: str, digest: str) -> str:
    """Of the Lease by which chains on one claim agree which of them trains the stage of an input
    digest.
    """
    return f"mchain-{hashlib.sha256(f'{claim_uid}{digest}'.encode()).hexdigest()[:16]}"


def pool_of(chain: ModelChain, config: PoolFile) -> NodePool:
    """The pool its stages run on. Raises InputError where there is none."""
    return config.pool(chain.spec.runner.node_pool)


def known_pool(chain: ModelChain, config: PoolFile) -> NodePool | None:
    """The pool, if the chain names one that is there."""
    try:
        return pool_of(chain, config)
    except InputError:
        return None


def image_of(chain: ModelChain, config: PoolFile) -> str:
    """The trainer image, pinned by digest: a tag can move while a chain runs. Raises InputError."""
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
    """All that the objects of this attempt are made from. Raises InputError for what a chain must
    name and does not.
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
    """An attempt's job as it would be made now, and a stamp of all that it is made from, its queue
    included.
    """
    job = runner.build(job_request(chain, config, epochs, launch))
    made_from = [job["spec"], queue_of(chain, config), chain.spec.runner.priority_class]
    return job, hashlib.sha256(canonical(made_from)).hexdigest()[:16]


def _threads(pool: NodePool, processes: int | None) -> int | None:
    """Cores of one process; None where the pool does not say how many a node gives."""
    return max(1, int(pool.cores / pool.processes(processes))) if pool.cores else None


def _data(chain: ModelChain) -> DataRequest:
    """The data as a pod sees it: the spec's own paths. What is missing there the trainer finds and
    names.
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
        cache=CACHE, file=f"ModelChain {chain.metadata.name}", train=files, evaluation=evaluations
    )
