"""The runner for Kubeflow's TrainJob (Trainer v2).

Trainer makes a JobSet from a TrainJob and its TrainingRuntime, the JobSet makes a Job, and that
makes the pods. Each attempt has a TrainingRuntime of its own, which holds the pod template: a
TrainJob itself cannot set priority, scheduler, ports and the like.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy

from modelchain_operator.api.kube import JOBS, Object, Resource
from modelchain_operator.api.objects import Read, label, maker, name, uid
from modelchain_operator.runners import kueue
from modelchain_operator.runners.port import JobRequest, JobState, job_state
from modelchain_operator.runners.template import (
    TASK_VARIABLE,
    metadata,
    trainer_template,
    training_role,
)

GROUP, VERSION = "trainer.kubeflow.org", "v1alpha1"
TRAINJOBS = Resource(GROUP, VERSION, "trainjobs")
RUNTIMES = Resource(GROUP, VERSION, "trainingruntimes")
JOBSETS = Resource("jobset.x-k8s.io", "v1alpha2", "jobsets")
# Trainer knows the Job and the container that train by these names.
NODE = "node"
STEP, FRAMEWORK = f"{GROUP}/trainjob-ancestor-step", f"{GROUP}/framework"
INDEX = "batch.kubernetes.io/job-completion-index"


class TrainJob:
    """One Indexed Job with a pod for each node.

    The job retries nothing and has no deadline, since `decide` does that for the chain.
    """

    resource: Resource = TRAINJOBS
    kind = "TrainJob"
    runtimes: Resource | None = RUNTIMES
    parts: Mapping[Resource, str] = {JOBSETS: "TrainJob", JOBS: "JobSet"}
    install = (
        "kubectl apply --server-side -k"
        " 'github.com/kubeflow/trainer.git/manifests/overlays/manager?ref=v2.3.0'"
    )
    controller = "Kubeflow Trainer"
    controller_pods = "kubectl get pods -n kubeflow-system"
    framework = "trainer.kubeflow.org/trainjob"
    init_container = ""

    def build(self, request: JobRequest) -> Object:
        meta = metadata(request, request.name, training_role(request))
        meta["labels"] |= kueue.labels(request.priority_class)
        return {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": self.kind,
            "metadata": meta,
            "spec": {
                "suspend": True,
                "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": request.name},
                "trainer": self._trainer(request),
            },
        }

    def _trainer(self, request: JobRequest) -> Object:
        """Without the two numbers, Trainer sets no variables for torchrun.

        Image and task are those of the runtime. They show what the job was made from.
        """
        [container] = _template(request)["spec"]["containers"]
        return {
            "numNodes": request.nodes,
            "numProcPerNode": request.processes_per_node,
            "image": container["image"],
            "env": [variable for variable in container["env"] if variable["name"] == TASK_VARIABLE],
        }

    def runtime(self, request: JobRequest) -> Object | None:
        meta = metadata(request, request.name, training_role(request))
        template = {
            "metadata": _inherited(meta),
            "spec": {
                "failurePolicy": {"maxRestarts": 0},
                # Rank 0 can be reached before it is ready, since its peers wait for it.
                "network": {"publishNotReadyAddresses": True},
                "replicatedJobs": [_replicated_job(request, meta)],
            },
        }
        return {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "TrainingRuntime",
            "metadata": {**meta, "labels": {**meta["labels"], FRAMEWORK: "torch"}},
            "spec": {"mlPolicy": {"numNodes": request.nodes, "torch": {}}, "template": template},
        }

    def release(self, job: Read, queue: str | None, now: str) -> Object:
        suspended = _suspended(job)
        return kueue.release(job, queue, now, suspended=suspended, unsuspend={"suspend": False})

    def state(self, job: Read) -> JobState:
        return job_state(job, suspended=_suspended(job), success="Complete")

    def nodes(self, job: Read) -> int:
        return int(job["spec"]["trainer"]["numNodes"])

    def job_uid(self, pod: Read) -> str | None:
        owner = maker(pod, "Job")
        if owner is None:
            return None
        # The Job controller becomes the owner of every pod that has its labels, even of a copy that
        # a user has made. But it gives such names only to pods that it has made itself.
        made = rf"{re.escape(str(owner['name']))}-{label(pod, INDEX)}-[a-z0-9]{{5}}"
        return str(owner["uid"]) if re.fullmatch(made, name(pod)) else None

    def node_rank(self, pod: Read) -> int | None:
        index = label(pod, INDEX)
        return int(index) if index else None

    def event_uids(self, job: Read) -> tuple[str, ...]:
        return (uid(job),)

    def describe(self, name: str, namespace: str) -> str:
        return f"kubectl describe trainjob {name} -n {namespace}"


def _template(request: JobRequest) -> Object:
    """The pod template. All nodes have the same one, so all of them have rank 0's ports."""
    template = trainer_template(request, NODE, rank_0=True)
    template["spec"]["restartPolicy"] = "Never"
    return template


def _replicated_job(request: JobRequest, meta: Object) -> Object:
    inherited = _inherited(meta)
    inherited["labels"][STEP] = "trainer"
    spec = {"backoffLimit": 0, "template": _template(request)}
    return {"name": NODE, "template": {"metadata": inherited, "spec": spec}}


def _inherited(meta: Object) -> Object:
    """What a JobSet and a Job have in common with the job: the labels by which they are found."""
    return deepcopy({key: meta[key] for key in ("labels", "annotations")})


def _suspended(job: Read) -> bool:
    return bool(job["spec"].get("suspend", False))
