"""The runner for Kubeflow's PyTorchJob (training-operator v1.9).

Its run policy has fields that do not work as documented. Our jobs leave these out.
"""

from __future__ import annotations

from modelchain_operator.api.kube import Object, Resource
from modelchain_operator.api.objects import Read, label, maker, name, uid
from modelchain_operator.runners import kueue
from modelchain_operator.runners.port import JobRequest, JobState, job_state
from modelchain_operator.runners.template import metadata, trainer_template, training_role

PYTORCHJOBS = Resource("kubeflow.org", "v1", "pytorchjobs")
# The webhook requires a container of this name.
CONTAINER = "pytorch"
REPLICA_TYPE, REPLICA_INDEX = (
    "training.kubeflow.org/replica-type",
    "training.kubeflow.org/replica-index",
)


class PyTorchJob:
    """One Master, and Workers if a stage has more than one node.

    The job retries nothing and has no deadline, since `decide` does that for the chain.
    """

    resource: Resource = PYTORCHJOBS
    kind = "PyTorchJob"
    install = (
        "kubectl apply --server-side -k"
        " 'github.com/kubeflow/trainer.git/manifests/overlays/standalone?ref=v1.9.4'"
    )
    controller = "training-operator"
    controller_pods = "kubectl get pods -n kubeflow"
    framework = "kubeflow.org/pytorchjob"
    init_container = "init-pytorch"

    def build(self, request: JobRequest) -> Object:
        replicas = {"Master": self._replica(request, 1, rank_0=True)}
        if request.nodes > 1:
            replicas["Worker"] = self._replica(request, request.nodes - 1, rank_0=False)
        meta = metadata(request, request.name, training_role(request))
        meta["labels"] |= kueue.labels(request.priority_class)
        return {
            "apiVersion": f"{self.resource.group}/{self.resource.version}",
            "kind": self.kind,
            "metadata": meta,
            "spec": {
                "nprocPerNode": str(request.processes_per_node),
                "runPolicy": {"cleanPodPolicy": "Running", "suspend": True},
                "pytorchReplicaSpecs": replicas,
            },
        }

    def _replica(self, request: JobRequest, replicas: int, *, rank_0: bool) -> Object:
        template = trainer_template(request, CONTAINER, rank_0=rank_0)
        return {"replicas": replicas, "restartPolicy": "Never", "template": template}

    def release(self, job: Read, queue: str | None, now: str) -> Object:
        unsuspend = {"runPolicy": {"suspend": False}}
        return kueue.release(job, queue, now, suspended=_suspended(job), unsuspend=unsuspend)

    def state(self, job: Read) -> JobState:
        return job_state(job, suspended=_suspended(job), success="Succeeded")

    def nodes(self, job: Read) -> int:
        return sum(replica["replicas"] for replica in job["spec"]["pytorchReplicaSpecs"].values())

    def job_uid(self, pod: Read) -> str | None:
        owner = maker(pod, self.kind)
        if owner is None:
            return None
        # The controller becomes the owner of every pod that has its labels, even of a copy that a
        # user has made. But it gives these names only to pods that it has made itself.
        made = f"{owner['name']}-{label(pod, REPLICA_TYPE)}-{label(pod, REPLICA_INDEX)}"
        return str(owner["uid"]) if name(pod) == made else None

    def node_rank(self, pod: Read) -> int | None:
        match label(pod, REPLICA_TYPE):
            case "master":
                return 0
            case "worker":
                return int(label(pod, REPLICA_INDEX)) + 1
        return None

    def event_uids(self, job: Read) -> tuple[str, ...]:
        return (uid(job),)

    def describe(self, name: str, namespace: str) -> str:
        return f"kubectl describe pytorchjob {name} -n {namespace}"


def _suspended(job: Read) -> bool:
    return bool(job["spec"].get("runPolicy", {}).get("suspend", False))
