"""The operator runs with the rights of operator/rbac and no others, and uses every one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from controlplane import ControlPlane
from faults import Request
from kubelet import Kubelet
from playedpod import Pod
from plays import Play, fail, hang, lost_message, stall, user_error, usual
from proxy import FaultProxy
from rig import CONFIG, Operator, Space, chain

from modelchain.api.contracts import FailureClass

RBAC = Path(__file__).parents[2] / "operator" / "rbac"
HOME = "modelchain-system"
USER = f"system:serviceaccount:{HOME}:modelchain-operator"
GROUPS = ["system:serviceaccounts", f"system:serviceaccounts:{HOME}"]
LEADER = "modelchain-operator-leader"
POOLS = {
    "nowhere": {"gpu": "CPU", "gpusPerNode": 0, "nodeSelector": {"there-is": "none"}},
    "refused": {"gpu": "CPU", "gpusPerNode": 0, "priorityClassName": "there-is-none"},
}
SETTINGS = CONFIG | {"nodePools": CONFIG["nodePools"] | POOLS}
Right = tuple[str, str, str, str]  # role, group, resource, verb


def objects(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((RBAC / f"{file}.yaml").read_text()))


def rules(file: str, role: str) -> list[dict[str, Any]]:
    return next(
        o["rules"]
        for o in objects(file)
        if o["kind"].endswith("Role") and o["metadata"]["name"] == role
    )


def granted(file: str) -> set[Right]:
    """Every right, one by one."""
    roles = (
        (LEADER, rules("account", LEADER)),
        ("modelchain-operator", rules(file, "modelchain-operator")),
    )
    return {
        (role, group, resource, verb)
        for role, found in roles
        for rule in found
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def used(log: list[Request]) -> set[Right]:
    return {
        (
            LEADER if r.namespace == HOME else "modelchain-operator",
            r.group,
            "/".join(part for part in (r.resource, r.subresource) if part),
            r.verb,
        )
        for r in log
        if r.kind != "discovery"
    }


def test_rules_are_narrow_and_the_same_in_both_files() -> None:
    assert rules("cluster", "modelchain-operator") == rules("namespaced", "modelchain-operator")
    resources = {resource for _, _, resource, _ in granted("cluster")}
    assert not [right for right in granted("cluster") if "*" in "".join(right)]
    assert not resources & {
        "secrets",
        "configmaps",
        "pods/exec",
        "pods/log",
        "modelchains/finalizers",
    }
    queues = [
        rule
        for rule in rules("cluster", "modelchain-operator")
        if "localqueues" in rule["resources"]
    ]
    assert [rule["resourceNames"] for rule in queues] == [["default"]]


def script(pod: Pod) -> Play | None:
    """By chain and stage; see `exercise`."""
    if pod.role == "evaluate":
        return None
    match pod.chain, pod.stage, pod.attempt:
        case "disrupted", _, attempt if attempt <= 4:
            return fail(FailureClass.PREEMPTED, "made room", share=attempt / 5, after=0.2)
        case "failed", _, 1:
            return user_error()
        case "lost", _, _ if pod.role == "train":
            return lost_message(0.2)
        case "unanswered", _, _ if pod.role == "train":
            return lost_message(0.2)
        case "unanswered", _, _:
            return hang()
        case (("suspended" | "deleted"), _, attempt) if attempt < 3:
            return stall(0.5, 0.2)
    return usual(0.2)


def exercise(space: Space, kubelet: Kubelet) -> None:
    """Every call the operator can make, by chains that run side by side."""
    kubelet.script = script
    chains = {
        name: chain(name, 1)
        for name in ("disrupted", "failed", "lost", "unanswered", "suspended", "deleted")
    }
    chains |= {name: chain(name, 2) for name in ("sharing", "shared")} | {
        name: chain(name, 1) for name in POOLS
    }
    for seed, (name, made) in enumerate(chains.items()):  # the same inputs are trained once
        made["spec"]["recipe"]["seed"] = seed
        if name in POOLS:
            made["spec"]["runner"]["nodePool"] = name
        if name in ("sharing", "shared"):
            made["spec"]["storage"] = {"claimName": "data"}
            made["spec"]["recipe"]["seed"] = 100
    space.apply({"apiVersion": "v1", "kind": "List", "items": [*chains.values()]})

    for _ in range(2):  # what is said twice is one event with a count
        space.wait(lambda: space.stage("a", "suspended").get("progress"), "progress of suspended")
        space.patch("suspended", {"suspend": True})
        space.until("Suspended", "suspended")
        space.patch("suspended", {"suspend": False})
    space.until("Failed", "failed")
    space.patch("failed", annotations={"modelchain.dev/retry": "1"})
    space.wait(lambda: space.get("job", "unanswered-a-a1-verify"), "a verify Job")
    space.kubectl(
        "patch",
        "job",
        "unanswered-a-a1-verify",
        "-p",
        json.dumps({"spec": {"activeDeadlineSeconds": 1}}),
    )
    space.wait(
        lambda: "VerifyUnanswered" in space.stage("a", "unanswered")["reason"],
        "an unanswered verify Job",
    )
    kubelet.script = lambda pod: None if pod.role == "verify" else script(pod)
    space.patch("unanswered", annotations={"modelchain.dev/retry": "1"})
    space.kubectl("delete", "mchain", "deleted", "--wait")
    space.wait(
        lambda: space.stage("a", "nowhere")["reason"].startswith("Unschedulable"),
        "an unschedulable stage",
    )
    space.wait(
        lambda: space.stage("a", "refused")["reason"].startswith("PodsForbidden"), "refused pods"
    )
    for name in ("disrupted", "failed", "lost", "unanswered", "suspended", "sharing", "shared"):
        space.until("Complete", name)
    added = {"name": "found", "kind": "Retrieval", "shards": "/data/found.tar"}
    space.patch("sharing", {"evaluation": [added]})
    space.wait(lambda: "found" in space.stage("b", "sharing")["results"], "a later metric")
    space.wait(
        lambda: " ".join(space.names("pytorchjobs")).count("disrupted") == 3, "spent jobs deleted"
    )


@pytest.fixture
def account(control_plane: ControlPlane) -> Iterator[Path]:
    """The operator's own kubeconfig; what it may do is still to be said."""
    control_plane.kubectl("apply", "-f", str(RBAC / "account.yaml"))
    yield control_plane.kubeconfig_for(USER, GROUPS)
    control_plane.kubectl("delete", "lease,role,rolebinding", "--all", f"--namespace={HOME}")
    control_plane.kubectl("delete", "-f", str(RBAC / "cluster.yaml"), "--ignore-not-found")


@pytest.mark.parametrize("mode", ["cluster", "namespaced"])
def test_every_right_is_needed_and_none_is_missing(
    mode: str, control_plane: ControlPlane, account: Path, namespace: str, tmp_path: Path
) -> None:
    where = [f"--namespace={namespace}"] if mode == "namespaced" else []
    control_plane.kubectl("apply", "-f", str(RBAC / f"{mode}.yaml"), *where)
    space = Space(control_plane, namespace)
    with Kubelet(control_plane.kubeconfig) as kubelet, FaultProxy(account) as proxy:
        served = (namespace,) if mode == "namespaced" else ()
        operator = Operator(
            proxy.kubeconfig(tmp_path / "proxy"),
            tmp_path,
            served,
            leader_election=True,
            settings=SETTINGS,
        )
        operator.environment["POD_NAMESPACE"] = HOME
        with operator:
            exercise(space, kubelet)
            operator.stop()
        # Other tests' namespaces that are being deleted refuse what is made in them.
        refused = [
            str(r)
            for r in proxy.log
            if r.status in (401, 403) and r.namespace in ("", HOME, namespace)
        ]
        assert not refused, "calls the role does not allow"
        assert used(proxy.log) == granted(mode)
