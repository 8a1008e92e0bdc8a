"""Every object a runner makes is accepted: by the real schemas, the real webhook and the restricted
standard.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from controlplane import Cluster, KubectlError

sys.path.append(str(Path(__file__).parents[1] / "operator"))

from jobrequests import generated, of_examples, request

from modelchain_operator.runners import verify
from modelchain_operator.runners.port import JobRequest
from modelchain_operator.runners.pytorchjob import PyTorchJob

SPECS = int(os.environ.get("MODELCHAIN_SPECS", "30"))
Object = dict[str, Any]


@pytest.fixture
def restricted(cluster: Cluster, namespace: str) -> str:
    """A namespace that refuses pods outside the restricted Pod Security Standard."""
    cluster.kubectl(
        "label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted"
    )
    return namespace


def objects(asked: JobRequest) -> list[Object]:
    """The jobs, and their pods by themselves: the standard is enforced on pods alone."""
    job, check = PyTorchJob().build(asked), verify.build(asked)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    templates = {kind: spec["template"] for kind, spec in replicas.items()} | {
        "Verify": check["spec"]["template"]
    }
    pods = [
        _pod(f"{asked.name}-{kind.lower()}", template, asked)
        for kind, template in templates.items()
    ]
    return [job, check, *pods]


def _pod(name: str, template: Object, asked: JobRequest) -> Object:
    spec = template["spec"] | {"restartPolicy": "Never"}
    metadata = template["metadata"] | {"name": name, "namespace": asked.namespace}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def dry_run(cluster: Cluster, items: list[Object]) -> list[str]:
    """What the API server would create, by name."""
    manifest = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    created = cluster.kubectl(
        "create", "--dry-run=server", "--output=name", "-f", "-", input=manifest
    )
    return created.splitlines()


def test_objects_of_the_examples_are_accepted(cluster: Cluster, restricted: str) -> None:
    items = [
        made for asked in of_examples() for made in objects(replace(asked, namespace=restricted))
    ]
    assert len(dry_run(cluster, items)) == len(items)


def test_objects_of_generated_requests_are_accepted(cluster: Cluster, restricted: str) -> None:
    for start in range(0, SPECS, 50):
        seeds = range(start, min(start + 50, SPECS))
        items = [
            made
            for seed in seeds
            for made in objects(replace(generated(seed), namespace=restricted))
        ]
        assert len(dry_run(cluster, items)) == len(items)


def test_the_same_checks_refuse_what_is_wrong(cluster: Cluster, restricted: str) -> None:
    job, _, pod, *_ = objects(request(namespace=restricted))
    job["spec"]["pytorchReplicaSpecs"]["Master"]["replicas"] = 2
    with pytest.raises(KubectlError, match="must be 1"):
        dry_run(cluster, [job])
    pod["spec"]["securityContext"]["runAsNonRoot"] = False
    with pytest.raises(KubectlError, match="violates PodSecurity"):
        dry_run(cluster, [pod])


NOW = "2026-09-01T00:00:00Z"


@pytest.mark.parametrize("queue", [None, "vision"])
def test_a_release_is_of_the_job_that_was_read(
    cluster: Cluster, restricted: str, queue: str | None
) -> None:
    runner, asked = PyTorchJob(), request(namespace=restricted)
    job = ("pytorchjobs.kubeflow.org", asked.name, "-n", restricted, "-o", "json")
    built = runner.build(asked)
    del built["metadata"][
        "ownerReferences"
    ]  # its chain is not there, so the garbage collector would take it
    cluster.kubectl("create", "-f", "-", input=json.dumps(built))
    cluster.kubectl(
        "wait", "--for=condition=Suspended", *job[:4], "--timeout=60s"
    )  # then it is not written any more
    made = json.loads(cluster.kubectl("get", *job))
    assert not runner.state(made).released
    stale, another = {"resourceVersion": "1"}, {"uid": "1"}
    for change, refusal in (
        (stale, "modified"),
        (stale | another, "modified"),
        (another, "immutable"),
    ):
        other = runner.release(made | {"metadata": made["metadata"] | change}, queue, NOW)
        with pytest.raises(KubectlError, match=refusal):
            cluster.kubectl("patch", *job, "--type=merge", "-p", json.dumps(other))
    released = made
    for _ in range(1 if queue else 2):  # without a queue its label goes first
        assert not runner.state(released).released
        patch = runner.release(released, queue, NOW)
        released = json.loads(
            cluster.kubectl("patch", *job, "--type=merge", "-p", json.dumps(patch))
        )
    assert runner.state(released).released and runner.state(released).suspended == (
        queue is not None
    )
