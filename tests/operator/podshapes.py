"""Pods as a real API server, scheduler, kubelet and node controllers write them (Kubernetes
1.34).
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

Pod = dict[str, Any]
T0 = datetime(2026, 9, 1, tzinfo=UTC).timestamp()
IMAGE = "registry.example/trainer@sha256:" + "0" * 64


def at(seconds: float) -> str:
    return datetime.fromtimestamp(T0 + seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def word(
    result: str = "Failed", failure: str | None = "Error", message: str = "it broke", **more: Any
) -> str:
    """A termination message as the trainer writes it."""
    if result == "Succeeded":
        return json.dumps(
            {"result": result, "manifestDigest": "a" * 64, "artifactDigest": "d" * 64, **more}
        )
    return json.dumps({"result": result, "failure": failure, "message": message, **more})


def owned(kind: str, name: str, uid: str) -> dict[str, Any]:
    """The owner reference that a controller writes into what it makes for an object."""
    return {"kind": kind, "name": name, "uid": uid, "controller": True}


def made_for(job: Pod, pod: Pod) -> Pod:
    """The pod as the job's controller would have made it."""
    meta, labels = job["metadata"], pod["metadata"]["labels"]
    kind, index = (labels[f"training.kubeflow.org/replica-{what}"] for what in ("type", "index"))
    pod["metadata"] |= {
        "name": f"{meta['name']}-{kind}-{index}",
        "labels": labels | meta["labels"],
        "ownerReferences": [owned("PyTorchJob", meta["name"], meta["uid"])],
    }
    return pod


def of_job(job: Pod, pod: Pod, uid: str) -> Pod:
    """The pod as Kubernetes would have made it for a Job, with this UID."""
    meta = job["metadata"]
    pod["metadata"] |= {
        "name": f"{meta['name']}-x",
        "uid": uid,
        "labels": job["spec"]["template"]["metadata"]["labels"],
        "ownerReferences": [owned("Job", meta["name"], meta["uid"])],
    }
    return pod


def pending(rank: int = 0, *, created: float = 0, job: str = "vit-b-a1") -> Pod:
    """A new pod that neither the scheduler nor a kubelet has seen. Rank 0 is the master; the others
    are workers with training-operator's init container.
    """
    kind, index = ("master", 0) if rank == 0 else ("worker", rank - 1)
    name = f"{job}-{kind}-{index}"
    limits = {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "8"}
    pod: Pod = {
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": f"{name}-{created}",
            "creationTimestamp": at(created),
            "labels": {
                "training.kubeflow.org/job-name": job,
                "training.kubeflow.org/replica-type": kind,
                "training.kubeflow.org/replica-index": str(index),
            },
            "annotations": {"kubectl.kubernetes.io/default-container": "pytorch"},
            "ownerReferences": [owned("PyTorchJob", job, "job-uid")],
        },
        "spec": {
            "containers": [{"name": "pytorch", "image": IMAGE, "resources": {"limits": limits}}]
        },
        "status": {"phase": "Pending", "qosClass": "Guaranteed"},
    }
    if rank > 0:
        pod["spec"]["initContainers"] = [{"name": "init-pytorch", "image": "alpine:3.10"}]
    return pod


def unschedulable(
    rank: int = 0, *, reason: str = "Unschedulable", message: str = "0/3 nodes are available"
) -> Pod:
    pod = pending(rank)
    pod["status"]["conditions"] = [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": reason,
            "message": message,
            "lastTransitionTime": at(0),
        }
    ]
    return pod


def scheduled(rank: int = 0, **more: Any) -> Pod:
    pod = pending(rank, **more)
    pod["spec"]["nodeName"] = f"node-{rank}"
    pod["status"]["conditions"] = [
        {"type": "PodScheduled", "status": "True", "lastTransitionTime": at(more.get("created", 0))}
    ]
    return pod


def waiting(rank: int, reason: str, message: str = "", image: str = IMAGE) -> Pod:
    """A pod whose container the kubelet has not started, with the reason."""
    pod = scheduled(rank)
    state = {"waiting": {"reason": reason} | ({"message": message} if message else {})}
    pod["status"]["containerStatuses"] = [
        {"name": "pytorch", "image": image, "state": state, "ready": False}
    ]
    return pod


def in_init(rank: int = 1) -> Pod:
    pod = waiting(rank, "PodInitializing")
    pod["status"]["initContainerStatuses"] = [
        {"name": "init-pytorch", "image": "alpine:3.10", "state": {"running": {"startedAt": at(5)}}}
    ]
    return pod


def init_failed(rank: int = 1, *, end: float = 220) -> Pod:
    pod = in_init(rank)
    ended = {"exitCode": 1, "reason": "Error", "startedAt": at(5), "finishedAt": at(end)}
    pod["status"]["initContainerStatuses"][0]["state"] = {"terminated": ended}
    pod["status"]["phase"] = "Failed"
    return pod


def running(rank: int = 0, *, start: float = 10, created: float = 0) -> Pod:
    pod = scheduled(rank, created=created)
    pod["status"] |= {"phase": "Running", "podIP": f"10.0.0.{rank + 1}"}
    pod["status"]["containerStatuses"] = [
        {"name": "istio-proxy", "image": "istio", "state": {"running": {"startedAt": at(1)}}},
        {
            "name": "pytorch",
            "image": IMAGE,
            "state": {"running": {"startedAt": at(start)}},
            "ready": True,
        },
    ]
    return pod


def ended(
    rank: int = 0,
    *,
    code: int = 1,
    message: str = "",
    reason: str | None = None,
    start: float = 10,
    end: float = 100,
    created: float = 0,
) -> Pod:
    pod = running(rank, start=start, created=created)
    terminated = {
        "exitCode": code,
        "reason": reason or ("Error" if code else "Completed"),
        "startedAt": at(start),
        "finishedAt": at(end),
    } | ({"message": message} if message else {})
    pod["status"]["containerStatuses"][1]["state"] = {"terminated": terminated}
    pod["status"]["phase"] = "Failed" if code else "Succeeded"
    return pod


def disrupted(pod: Pod, reason: str, *, when: float = 90, message: str = "") -> Pod:
    pod["status"].setdefault("conditions", []).append(
        {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": reason,
            "message": message,
            "lastTransitionTime": at(when),
        }
    )
    return pod


def evicted(pod: Pod, message: str) -> Pod:
    """The pod after the kubelet's eviction manager ended it."""
    pod["status"] |= {"phase": "Failed", "reason": "Evicted", "message": message}
    return disrupted(pod, "TerminationByKubelet", message=message)


def deleted(pod: Pod, *, grace_over: float) -> Pod:
    pod["metadata"] |= {"deletionTimestamp": at(grace_over), "deletionGracePeriodSeconds": 120}
    return pod
