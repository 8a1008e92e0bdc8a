"""For `explain`: what pods wait for, in the words in which the operator would say it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from modelchain.api.reasons import Reason
from modelchain_operator.api.kube import Object
from modelchain_operator.reconcile.attempt import GONE
from modelchain_operator.reconcile.pod_evidence import evidence
from modelchain_operator.runners.port import Runner


def of_pods(
    pods: Sequence[Object], job: Object | None, nodes: int, runner: Runner
) -> Reason | None:
    """Why these pods do not run; None if there is nothing to say."""
    state = runner.state(job) if job is not None else GONE
    return evidence(
        pods,
        (),
        job=state,
        nodes=nodes,
        node_rank=runner.node_rank,
        gpu_resource="nvidia.com/gpu",
        now=0.0,
    ).waiting
