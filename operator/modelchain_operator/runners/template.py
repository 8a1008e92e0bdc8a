"""The pod templates of every runner and of the operator's CPU Jobs.

They have the mounts and the environment, and meet the restricted Pod Security Standard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from modelchain.api.spec import API_VERSION, KIND
from modelchain.errors import InputError
from modelchain.plan.pools import NodePool
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import label
from modelchain_operator.runners import kueue
from modelchain_operator.runners.port import JobRequest

ARTIFACTS, PREDECESSORS = "/artifacts", "/predecessors"
HOME = "/home/modelchain"
SCRATCH = "/tmp"
SHM = "/dev/shm"
# The volume at SHM.
SHARED_MEMORY = "shm"
TERMINATION_MESSAGE = "/dev/termination-log"
NODE_VARIABLE, POD_VARIABLE = "MODELCHAIN_NODE", "MODELCHAIN_POD_UID"
TASK_VARIABLE = "MODELCHAIN_TASK"
METRICS_PORT, PROGRESS_PORT = 9090, 9091
# The last part of the grace period: torchrun and the kubelet need it after the workers have ended.
SHUTDOWN_SECONDS = 15

CHAIN, CHAIN_UID, CLAIM_UID, STAGE, ATTEMPT, INPUT_DIGEST, ROLE = (
    f"modelchain.dev/{name}"
    for name in ("chain", "chain-uid", "claim-uid", "stage", "attempt", "input-digest", "role")
)
# The most characters of a label's value.
LABEL_LENGTH = 63
# On a CPU Job, as an annotation: the generation of the chain that it was made for.
GENERATION = "modelchain.dev/generation"
# On a Job that packs data: the claim that it fills. No stage trains from that claim before.
FILLS = "modelchain.dev/fills"
# The annotation that names a pod's main container, for `kubectl logs` and for us.
MAIN_CONTAINER = "kubectl.kubernetes.io/default-container"

Role = Literal["train", "baseline", "verify", "index", "evaluate"]
# The roles of what trains, and the selector for it.
TRAINING: tuple[Role, ...] = ("train", "baseline")
TRAINS = f"{ROLE} in ({','.join(TRAINING)})"


def metadata(request: JobRequest, name: str, role: Role) -> Object:
    """The metadata of a job. The job is deleted with its chain."""
    return {
        "name": name,
        "namespace": request.namespace,
        "labels": labels(request, role),
        "annotations": _input_digest(request),
        "ownerReferences": [owner_reference(request.chain, request.chain_uid)],
    }


def owner_reference(chain: str, chain_uid: str) -> Object:
    """Makes an object be deleted with its chain, without blocking the chain's own deletion."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": chain,
        "uid": chain_uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def labels(request: JobRequest, role: Role) -> dict[str, str]:
    return {
        CHAIN: request.chain,
        CHAIN_UID: request.chain_uid,
        CLAIM_UID: request.claim_uid,
        **({STAGE: request.stage} if request.stage is not None else {}),
        **({ATTEMPT: str(request.attempt)} if request.attempt is not None else {}),
        **{key: label_of(digest) for key, digest in _input_digest(request).items()},
        ROLE: role,
    }


def _input_digest(request: JobRequest) -> dict[str, str]:
    """The whole input digest, as an annotation; nothing if the job is not about one."""
    return {} if request.input_digest is None else {INPUT_DIGEST: request.input_digest}


def training_role(request: JobRequest) -> Role:
    return "baseline" if request.alone else "train"


def label_of(digest: str) -> str:
    """The value of the label `INPUT_DIGEST`: a digest is one character longer than a value may be.

    An annotation has the whole digest.
    """
    return digest[:LABEL_LENGTH]


def trainer_template(request: JobRequest, container: str, *, rank_0: bool) -> Object:
    """The pod template of one node's trainer, which runs under torchrun.

    torchrun finds its peers by the PET_* variables, which the job's controller sets.
    """
    pool = request.pool
    claims, mounts = _trainer_claims(request)
    trainer: Object = {
        "name": container,
        "command": _torchrun(request),
        "env": environment(request, _trainer_variables(pool)),
        "resources": _resources(pool, request.processes_per_node),
        "volumeMounts": [*mounts, mount(SHARED_MEMORY, SHM)],
    }
    if rank_0:
        ports = {"metrics": METRICS_PORT, "progress": PROGRESS_PORT}
        trainer["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    shm = {"name": SHARED_MEMORY, "emptyDir": {"medium": "Memory", "sizeLimit": pool.shm_size}}
    volumes = [*_claims(claims, read_only={"data"}), shm]
    template = pod_template(request, training_role(request), trainer, volumes)
    template["spec"] |= _placement(request)
    template["metadata"]["labels"] = {**pool.labels, **template["metadata"]["labels"]}
    template["metadata"]["annotations"] |= {**pool.annotations, **kueue.topology(pool)}
    return template


def _trainer_claims(request: JobRequest) -> tuple[dict[str, str], list[Object]]:
    """Claims by the name of their volume, and where they are mounted."""
    claims, data = _with_data(request, {"artifacts": request.artifacts_claim})
    artifacts = mount("artifacts", ARTIFACTS), mount("artifacts", PREDECESSORS, read_only=True)
    return claims, [*artifacts, *data]


def _with_data(request: JobRequest, claims: dict[str, str]) -> tuple[dict[str, str], list[Object]]:
    """The claims with that of the data, and where it is mounted; nothing if the image has it."""
    if request.data_claim is None:
        return claims, []
    check_mount_path(request.mount_path)
    # The kubelet would hang on a pod that has one claim in two volumes.
    volume = "artifacts" if request.data_claim == request.artifacts_claim else "data"
    data = mount(volume, request.mount_path, read_only=True)
    return {**claims, volume: request.data_claim}, [data]


def _torchrun(request: JobRequest) -> list[str]:
    # A single pod need not look up its own host name, which may not resolve. Both flags override
    # the controller's variables.
    here = ["--master-addr=127.0.0.1", "--local-addr=127.0.0.1"] if request.nodes == 1 else []
    torchrun = ["python", "-m", "torch.distributed.run", "--max-restarts=0"]
    return [*torchrun, *here, "-m", "modelchain_trainer"]


def _trainer_variables(pool: NodePool) -> dict[str, str]:
    return {
        **pool.env,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(pool.grace_seconds - SHUTDOWN_SECONDS),
        # Rank 0 listens on these two.
        "MODELCHAIN_METRICS_PORT": str(METRICS_PORT),
        "MODELCHAIN_PROGRESS_PORT": str(PROGRESS_PORT),
    }


def _placement(request: JobRequest) -> Object:
    """The fields that place a pod on a node of the pool, and others that the pool sets for pods."""
    pool = request.pool
    optional = {
        "nodeSelector": pool.node_selector,
        "priorityClassName": pool.priority_class_name,
        "schedulerName": pool.scheduler_name,
        "runtimeClassName": pool.runtime_class_name,
        "serviceAccountName": pool.service_account_name,
        "affinity": _away_from(request.avoid),
    }
    given = {name: value for name, value in optional.items() if value}
    return given | {"terminationGracePeriodSeconds": pool.grace_seconds}


def cpu_template(
    request: JobRequest,
    role: Role,
    program: tuple[str, ...],
    resources: Object,
    *,
    writes: bool,
    reads_data: bool,
) -> Object:
    """The pod template of a CPU Job, which sees the artifacts and, if asked for, the data.

    Args:
        program: a module of Python and its arguments.
        writes: whether it may write to the artifacts' claim.
    """
    claims, mounts = {"artifacts": request.artifacts_claim}, list[Object]()
    if reads_data:
        claims, mounts = _with_data(request, claims)
    container: Object = {
        "name": role,
        "command": ["python", "-m", *program],
        "env": environment(request, {}),
        "resources": resources,
        "volumeMounts": [mount("artifacts", ARTIFACTS, read_only=not writes), *mounts],
    }
    read_only = {"data"} if writes else {"artifacts", "data"}
    template = pod_template(request, role, container, _claims(claims, read_only))
    template["spec"]["restartPolicy"] = "Never"
    return template


def pod_template(
    request: JobRequest, role: Role, container: Object, volumes: list[Object]
) -> Object:
    """A pod with one container of the trainer's image, under the restricted standard.

    Apart from its mounts, the container can write in /tmp and HOME only.
    """
    pool = request.pool
    container |= {
        "image": request.image,
        "imagePullPolicy": "IfNotPresent",
        "terminationMessagePath": TERMINATION_MESSAGE,
        "terminationMessagePolicy": "File",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [*container["volumeMounts"], mount("tmp", SCRATCH), mount("home", HOME)],
    }
    spec: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _security(pool),
        "containers": [container],
        "volumes": [*volumes, {"name": "tmp", "emptyDir": {}}, {"name": "home", "emptyDir": {}}],
    }
    if tolerations := [
        t.model_dump(by_alias=True, exclude_none=True) for t in pool.pod_tolerations
    ]:
        spec["tolerations"] = tolerations
    if pool.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in pool.image_pull_secrets]
    annotations = {**_input_digest(request), MAIN_CONTAINER: container["name"]}
    return {"metadata": {"labels": labels(request, role), "annotations": annotations}, "spec": spec}


def _security(pool: NodePool) -> Object:
    """A pod's security context: the restricted Pod Security Standard, and what the pool adds."""
    security: Object = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if pool.run_as_user is not None:
        security["runAsUser"] = pool.run_as_user
    if pool.fs_group is not None:
        # With OnRootMismatch the kubelet does not change every file of a volume for every pod.
        security |= {"fsGroup": pool.fs_group, "fsGroupChangePolicy": "OnRootMismatch"}
    return security


def environment(request: JobRequest, more: dict[str, str]) -> list[Object]:
    """The environment of a container: its task and folders to write to.

    `more` may override the folders, but not the task and the node.
    """
    variables = {
        "HOME": HOME,
        # torch asks for the user's name, and the image's user may have none.
        "USER": "modelchain",
        "TMPDIR": SCRATCH,
        "XDG_CACHE_HOME": f"{HOME}/.cache",
        **more,
        # Kubernetes would expand $(NAME).
        TASK_VARIABLE: request.task.replace("$", "$$"),
    }
    # A trainer whose device fails reports its node, which is then avoided. Its checkpoints name its
    # pod, whose work they have kept. So a pool's `env` must not replace these.
    of_the_pod = {NODE_VARIABLE: "spec.nodeName", POD_VARIABLE: "metadata.uid"}
    return [
        *(
            {"name": name, "value": value}
            for name, value in variables.items()
            if name not in of_the_pod
        ),
        *(
            {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
            for name, path in of_the_pod.items()
        ),
    ]


def mount(volume: str, path: str, *, read_only: bool = False) -> Object:
    return {"name": volume, "mountPath": path} | ({"readOnly": True} if read_only else {})


def _claims(claims: dict[str, str], read_only: set[str]) -> list[Object]:
    return [
        {
            "name": volume,
            "persistentVolumeClaim": {"claimName": claim}
            | ({"readOnly": True} if volume in read_only else {}),
        }
        for volume, claim in claims.items()
    ]


def _resources(pool: NodePool, processes: int) -> Object:
    """A trainer's resources."""
    wanted: dict[str, Any] = {
        "cpu": pool.cpu,
        "memory": pool.memory,
        "ephemeral-storage": pool.ephemeral_storage,
        **pool.extra_resources,
    }
    if pool.gpus_per_node:
        wanted[pool.gpu_resource] = str(processes)
    return guaranteed(wanted)


def guaranteed(wanted: Mapping[str, str | None]) -> Object:
    """A container's resources. Requests equal limits, so that the pod is Guaranteed.

    Such a pod is not throttled by its neighbours, and is not evicted first.
    """
    given = {name: quantity for name, quantity in wanted.items() if quantity is not None}
    return {"requests": given, "limits": dict(given)} if given else {}


def _away_from(nodes: tuple[str, ...]) -> Object:
    """The affinity that keeps a pod away from these nodes.

    It uses their names, since the label kubernetes.io/hostname may differ from the name.
    """
    if not nodes:
        return {}
    # The API server takes only one value for each of these fields.
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    terms = {"nodeSelectorTerms": [{"matchFields": fields}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}


def check_mount_path(path: str) -> None:
    """Raise InputError if the data would be mounted over a path that the trainer's pods use."""
    for ours in (ARTIFACTS, PREDECESSORS, SCRATCH, HOME, SHM):
        if f"{path.rstrip('/')}/".startswith(f"{ours}/") or f"{ours}/".startswith(
            f"{path.rstrip('/')}/"
        ):
            raise InputError(
                f"{path} would cover {ours}, which the trainer's pods use; mount the data at /data",
                field="spec.data.volume.mountPath",
            )


# What a job was made from, read from the job.


def task_of(job: Object) -> dict[str, Any]:
    """The task that a job was made with."""
    value: str = _trainer(job)[1]
    # `environment` has doubled the dollar signs.
    return dict(json.loads(value.replace("$$", "$")))


def image_of(job: Object) -> str:
    """The image that the job's trainers run."""
    return str(_trainer(job)[0]["image"])


def _trainer(job: Object) -> tuple[Object, str]:
    """The container that trains, and the text of its task.

    They are searched for in the whole spec, since each kind of job has its pod templates elsewhere.
    """
    stack: list[Any] = [job["spec"]]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            for variable in value.get("env") or []:
                if variable["name"] == TASK_VARIABLE:
                    return value, variable["value"]
            stack += value.values()
        elif isinstance(value, list):
            stack += value
    raise KeyError(TASK_VARIABLE)


def attempt_of(thing: Object) -> str:
    """The name of the attempt that a pod or job was made for."""
    return f"{unnumbered_of(thing)}{label(thing, ATTEMPT)}"


def unnumbered_of(thing: Object) -> str:
    """The name of the attempt that a pod or job was made for, without its number."""
    letter = "b" if label(thing, ROLE) == "baseline" else "a"
    return f"{label(thing, CHAIN)}-{label(thing, STAGE)}-{letter}"
