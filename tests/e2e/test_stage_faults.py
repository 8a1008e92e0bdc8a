"""What befalls a stage while it really trains: it finishes, or says what is wrong; lost work is
counted.

One fault, chosen by a seed that is printed, unless MODELCHAIN_SWEEPS=all (`make e2e-faults`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from lab import Lab
from system import HOME, NAMESPACE, System, chain

OPERATORS = "app.kubernetes.io/name=modelchain"
STEPS = 30  # some checkpoints are made by then


def kill_trainer(system: System, lab: Any, pod: str) -> None:
    """All processes but torchrun, which is the first of the container."""
    others = (
        "int(p) for p in os.listdir('/proc') if p.isdigit() and p not in ('1', str(os.getpid()))"
    )
    kill = f"import os; [os.kill(p, 9) for p in [{others}]]"
    system.kubectl("exec", pod, "--", "python", "-c", kill)


def kill_container(system: System, lab: Lab, pod: str) -> None:
    (status,) = system.get("pod", pod)["status"]["containerStatuses"]
    lab.ctr(
        "tasks", "kill", "--signal", "SIGKILL", status["containerID"].removeprefix("containerd://")
    )


def evict(system: System, lab: Any, pod: str) -> None:
    body = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": NAMESPACE},
    }
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
    system.cluster.kubectl("create", "--raw", path, "-f", "-", input=json.dumps(body))


def kill_operator(system: System, lab: Any, pod: str) -> None:
    kubectl = system.cluster.kubectl
    kubectl("delete", "pods", "-n", HOME, "-l", OPERATORS, "--force", "--grace-period=0")


def restart_api_server(system: System, lab: Lab, pod: str) -> None:
    lab.ask("stop", "kube-apiserver")
    time.sleep(5)
    lab.ask("start", "kube-apiserver")


# What is done, and by which class the attempt that it ends is made again; none where nothing is to
# end.
FAULTS: dict[str, tuple[Callable[[System, Any, str], None], set[str]]] = {
    "the trainer's processes are killed": (
        kill_trainer,
        {"Unknown"},
    ),  # no last word, and no evidence
    "the container is killed": (kill_container, {"Unknown"}),
    "the pod is evicted": (evict, {"Preempted"}),
    "the operator is killed": (kill_operator, set()),
    "the API server restarts": (restart_api_server, set()),
    "the volume is full": (lambda system, lab, pod: None, {"VolumeFull"}),
}
OWN_NODE = {"the container is killed", "the API server restarts", "the volume is full"}


@pytest.fixture(scope="module")
def packed(system: System) -> None:
    """The quickstart's data, whether or not its chain was applied."""
    things = [d for d in yaml.safe_load_all(system.example()) if d["kind"] != "ModelChain"]
    system.apply(*things)
    system.kubectl("wait", "--for=condition=Complete", "job/quickstart-data", "--timeout=180s")


@pytest.mark.timeout(900)
@pytest.mark.sweep(1)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_befalls_a_stage_that_trains(
    system: System, packed: None, request: pytest.FixtureRequest, fault: str
) -> None:
    lab = request.getfixturevalue("lab") if fault in OWN_NODE else None
    name = "fault-" + "".join(word[0] for word in fault.split()).lower()
    if fault == "the volume is full":
        return full_volume(system, name)
    happen, classes = FAULTS[fault]
    system.apply(chain(name, 2, epochs=12))
    pod = system.trains(name, "small", STEPS)
    happen(system, lab, pod["metadata"]["name"])
    status = system.until(name, "Complete", 600)
    first, second = status["stages"]
    for stage in (first, second):
        assert stage["macs"] == sum(a["macs"] for a in stage["attempts"]) >= stage["plannedMacs"]
    if classes:
        assert len(first["attempts"]) == 2 and set(first.get("retried") or {}) <= classes, first
        assert first["attempts"][0]["checkpointStep"] > 0
    else:
        assert len(first["attempts"]) == 1 and not first.get("retried"), first
    assert [a["state"] for a in second["attempts"]] == ["Succeeded"]
    assert len(system.list("sart", f"modelchain.dev/chain={name}")) == 2


def full_volume(system: System, name: str) -> None:
    """No room for a checkpoint (a model of 13 MB with its moments): it says so, and goes on once
    there is.
    """
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "small",
            "resources": {"requests": {"storage": "256Mi"}},
        },
    }
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    filler = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{name}-filler"},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "filler",
                    "image": system.trainer,
                    "securityContext": security,
                    "command": [
                        "sh",
                        "-c",
                        "head -c 250M /dev/zero > /artifacts/filler; sleep 3600",
                    ],
                    "volumeMounts": [{"name": "artifacts", "mountPath": "/artifacts"}],
                }
            ],
            "volumes": [{"name": "artifacts", "persistentVolumeClaim": {"claimName": name}}],
        },
    }
    system.apply(claim, filler)
    system.kubectl("wait", "--for=condition=Ready", f"pod/{name}-filler", "--timeout=120s")
    system.apply(chain(name, 1, storage={"claimName": name}, retry={"maxRetries": 1}))
    failed = system.until(name, "Failed", 400)
    (stage,) = failed["stages"]
    assert {a["failure"] for a in stage["attempts"]} == {"VolumeFull"} and len(
        stage["attempts"]
    ) == 2
    assert "No space left on device" in stage["reason"] or "full" in stage["reason"], stage[
        "reason"
    ]
    system.kubectl("exec", f"{name}-filler", "--", "rm", "/artifacts/filler")
    system.kubectl("annotate", "mchain", name, "modelchain.dev/retry=room")
    system.until(name, "Complete", 400)
    system.kubectl("delete", "pod", f"{name}-filler", "--grace-period=0", "--force")
