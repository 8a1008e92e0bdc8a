"""Kubeflow's PyTorchJob (training-operator v1.9). What its run policy promises and does not keep is
left out of it.
"""

from __future__ import annotations

from modelchain_operator.api.kube import PYTORCHJOBS, Object, Resource
from modelchain_operator.api.objects import Read, annotation, held, is_deleting, label
from modelchain_operator.runners.port import JobRequest, JobState
from modelchain_operator.runners.template import metadata, trainer_template

QUEUE, PRIORITY_CLASS = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
# a queue that is not there: until its release a job waits in it, and nobody can start it
HELD = "modelchain-held"
RELEASED = "modelchain.dev/released"  # when we let a job run; this alone says that we did
CONTAINER = "pytorch"  # the webhook asks for a container of this name
REPLICA_TYPE, REPLICA_INDEX = (
    "training.kubeflow.org/replica-type",
    "training.kubeflow.org/replica-index",
)


class PyTorchJob:
    """One Master, and Workers where a stage has more nodes. Retries, deadlines and clean-up are the
    chain's own.
    """

    resource: Resource = PYTORCHJOBS
    kind = "PyTorchJob"
    crd = "pytorchjobs.kubeflow.org"
    install = (
        "kubectl apply --server-side -k"
        " 'github.com/kubeflow/trainer.git/manifests/overlays/standalone?ref=v1.9.4'"
    )

    def build(self, request: JobRequest) -> Object:
        replicas = {"Master": self._replica(request, 1, rank_0=True)}
        if request.nodes > 1:
            replicas["Worker"] = self._replica(request, request.nodes - 1, rank_0=False)
        meta = metadata(request, request.name, "train")
        meta["labels"] |= {QUEUE: HELD} | (
            {PRIORITY_CLASS: request.priority_class} if request.priority_class else {}
        )
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
        meta: Object = {name: job["metadata"][name] for name in ("uid", "resourceVersion")}
        released = meta | {"annotations": {RELEASED: now}}
        if not _suspended(
            job
        ):  # somebody was faster: it is ours all the same, and its labels can no longer be changed
            return {"metadata": released}
        if queue is not None:
            return {"metadata": released | {"labels": {QUEUE: queue}}}  # Kueue lifts the suspension
        if label(job, QUEUE):
            return {"metadata": meta | {"labels": {QUEUE: None}}}
        return {"metadata": released, "spec": {"runPolicy": {"suspend": False}}}

    def state(self, job: Read) -> JobState:
        failed, queue = held(job, "Failed"), label(job, QUEUE)
        return JobState(
            released=annotation(job, RELEASED) is not None,
            suspended=_suspended(job),
            finished="Failed" if failed else "Succeeded" if held(job, "Succeeded") else None,
            deleting=is_deleting(job),
            message=failed.get("message", "") if failed else "",
            queue=queue if queue not in ("", HELD) else None,
        )

    def node_rank(self, pod: Read) -> int | None:
        match label(pod, REPLICA_TYPE):
            case "master":
                return 0
            case "worker":
                return int(label(pod, REPLICA_INDEX)) + 1
        return None


def _suspended(job: Read) -> bool:
    return bool(job["spec"].get("runPolicy", {}).get("suspend", False))
