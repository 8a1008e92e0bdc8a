"""A second runner, only for tests: a plain `batch/v1` Job. Run as a program, this file is an
operator that creates plain Jobs instead of PyTorchJobs.
"""

from __future__ import annotations

from modelchain_operator.api.kube import JOBS, Object
from modelchain_operator.api.objects import Read, label, maker, uid
from modelchain_operator.runners import kueue
from modelchain_operator.runners.port import JobRequest, JobState, job_state
from modelchain_operator.runners.template import metadata, trainer_template, training_role

INDEX = "batch.kubernetes.io/job-completion-index"


class PlainJob:
    """A runner with one pod per node, numbered by the Job. Pods of several nodes would not find one
    another, so tests only simulate them.
    """

    resource = JOBS
    kind = "Job"
    install = "nothing to install"
    controller = "the Job controller"
    controller_pods = "kubectl get pods -n kube-system"
    framework = "batch/job"
    init_container = ""

    def build(self, request: JobRequest) -> Object:
        meta = metadata(request, request.name, training_role(request))
        meta["labels"] |= kueue.labels(request.priority_class)
        template = trainer_template(request, "trainer", rank_0=True)
        template["spec"]["restartPolicy"] = "Never"
        [container] = template["spec"]["containers"]
        container["env"].append({"name": "PET_NNODES", "value": str(request.nodes)})
        spec = {
            "suspend": True,
            "completionMode": "Indexed",
            "completions": request.nodes,
            "parallelism": request.nodes,
            "backoffLimit": 0,
            "template": template,
        }
        return {"apiVersion": "batch/v1", "kind": self.kind, "metadata": meta, "spec": spec}

    def release(self, job: Read, queue: str | None, now: str) -> Object:
        suspended = bool(job["spec"]["suspend"])
        return kueue.release(job, queue, now, suspended=suspended, unsuspend={"suspend": False})

    def state(self, job: Read) -> JobState:
        return job_state(job, suspended=bool(job["spec"]["suspend"]), success="Complete")

    def nodes(self, job: Read) -> int:
        return int(job["spec"]["completions"])

    def job_uid(self, pod: Read) -> str | None:
        owner = maker(pod, self.kind)
        return str(owner["uid"]) if owner is not None else None

    def node_rank(self, pod: Read) -> int | None:
        index = label(pod, INDEX)
        return int(index) if index else None

    def event_uids(self, job: Read) -> tuple[str, ...]:
        return (uid(job),)

    def describe(self, name: str, namespace: str) -> str:
        return f"kubectl describe job {name} -n {namespace}"


if __name__ == "__main__":
    from modelchain_operator.__main__ import main
    from modelchain_operator.runners.registry import RUNNERS

    RUNNERS["PyTorchJob"] = PlainJob()
    main()
