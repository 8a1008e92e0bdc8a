"""The evaluation Job. It measures a metric on a finished artifact, and trains nothing.

It needs no GPU: an evaluation reads each picture and each text once, and a Job that asks for no GPU
never waits for one, nor takes one from a training.
"""

from __future__ import annotations

from modelchain_operator.api.kube import Object
from modelchain_operator.runners import cpu_job
from modelchain_operator.runners.cpu_job import Amounts, CpuJob
from modelchain_operator.runners.port import JobRequest
from modelchain_operator.runners.template import SCRATCH, Role

ROLE_OF_JOB: Role = "evaluate"
# The most that the Job asks for: it decodes and computes with all cores that it gets.
MOST = Amounts(cpu="16", memory="64Gi")
# The Job cannot write to the artifacts' claim, so it indexes the evaluation's shards here.
INDEX = f"{SCRATCH}/index"


def build(request: JobRequest) -> Object:
    """The Job. It is deleted with the chain, if not before."""
    work = CpuJob(
        role=ROLE_OF_JOB,
        program=("modelchain_trainer", "evaluate"),
        resources=cpu_job.resources(request.pool, MOST),
        reads_data=True,
        deadline_seconds=request.pool.evaluating.deadline_seconds,
    )
    return cpu_job.build(request, request.name, work)
