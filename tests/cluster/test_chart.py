"""What the chart renders is taken by a real API server, and does there what its README says."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from build import training_operator_source
from controlplane import Cluster, ControlPlane, KubectlError
from generate import CHART, REPOSITORY, helm
from rendering import ALL, HOME, find, one, options, pod_templates, rendered

NAMESPACES = (HOME, "vision", "language", "training", "kubeflow", "team-a", "monitoring")
MONITORS_APART = "crds.enabled=true,metrics.podMonitor.enabled=false"
DRY = ("apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict")


@pytest.fixture(scope="module")
def there(control_plane: ControlPlane) -> Iterator[ControlPlane]:
    """The control plane with every namespace that the values name, under the restricted
    standard.
    """
    before = control_plane.kubectl("get", "namespaces", "-o", "name").split()
    ours = [name for name in NAMESPACES if f"namespace/{name}" not in before]
    for name in ours:
        control_plane.kubectl("create", "namespace", name)
    control_plane.kubectl(
        "label", "namespace", HOME, "pod-security.kubernetes.io/enforce=restricted", "--overwrite"
    )
    yield control_plane
    control_plane.kubectl("label", "namespace", HOME, "pod-security.kubernetes.io/enforce-")
    if ours:
        control_plane.kubectl("delete", "namespace", *ours, "--wait=false")


def dry_run(cluster: Cluster, things: list[dict[str, Any]]) -> None:
    cluster.kubectl(*DRY, "-f", "-", input=yaml.safe_dump_all(things))


@pytest.mark.parametrize("name", ALL)
def test_everything_rendered_is_taken(there: ControlPlane, name: str) -> None:
    dry_run(
        there,
        [thing for thing in rendered(name) if thing["apiVersion"] != "monitoring.coreos.com/v1"],
    )


@pytest.mark.parametrize("name", ["cluster", "namespaced"])
def test_plain_manifests_are_taken(there: ControlPlane, name: str) -> None:
    dry_run(there, list(yaml.safe_load_all((REPOSITORY / "deploy" / f"{name}.yaml").read_text())))


@pytest.mark.parametrize("name", ["default", "full"])
def test_its_pods_are_admitted_under_the_restricted_standard(
    there: ControlPlane, name: str
) -> None:
    there.kubectl(
        "wait", "--for=create", "serviceaccount/default", f"--namespace={HOME}", "--timeout=30s"
    )
    for template in pod_templates(rendered(name)):
        dry_run(there, [pod(template["spec"] | {"serviceAccountName": "default"})])


def test_the_init_container_is_admitted_under_the_restricted_standard(there: ControlPlane) -> None:
    text = re.sub(r"\{\{\.\w+}}", "x", (CHART / "files" / "init-container.yaml").read_text())
    (container,) = yaml.safe_load(text)
    dry_run(there, [pod({"containers": [container]})])
    del container["securityContext"]
    with pytest.raises(KubectlError, match="violates PodSecurity"):
        dry_run(there, [pod({"containers": [container]})])


def pod(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "admitted", "namespace": HOME},
        "spec": spec,
    }


def test_people_get_their_rights_through_the_clusters_roles(there: ControlPlane) -> None:
    roles = [
        role
        for role in find(rendered("default"), "ClusterRole")
        if "aggregate" in str(role["metadata"]["labels"])
    ]
    there.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(roles))
    expected = {
        "view": [],
        "edit": ["create modelchains"],
        "admin": ["create modelchains", "delete stageartifacts"],
    }
    try:
        for role, may in expected.items():
            wanted = ["list modelchains", "list stageartifacts", *may]
            deadline = time.monotonic() + 30
            while (found := granted(there, role)) != wanted and time.monotonic() < deadline:
                time.sleep(0.5)
            assert found == wanted, role
    finally:
        there.kubectl("delete", "clusterrole", *(role["metadata"]["name"] for role in roles))


def granted(cluster: Cluster, role: str) -> list[str]:
    """What the cluster's own role may do of these."""
    rules = json.loads(cluster.kubectl("get", "clusterrole", role, "-o", "json"))["rules"]
    asked = (
        "list modelchains",
        "list stageartifacts",
        "create modelchains",
        "delete stageartifacts",
    )
    rights = {
        f"{verb} {resource}"
        for rule in rules
        if "modelchain.dev" in rule.get("apiGroups", [])
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }
    return [right for right in asked if right in rights]


def objects_of_the_chart(there: ControlPlane) -> set[str]:
    """Their names, in all namespaces."""
    kinds = "deployments,services,configmaps,serviceaccounts,roles,rolebindings"
    kinds += ",networkpolicies,poddisruptionbudgets"
    label = ("-l", "app.kubernetes.io/name=modelchain")
    return set(there.kubectl("get", kinds, "--all-namespaces", *label, "-o", "name").split())


def test_install_switch_to_namespaces_and_uninstall(there: ControlPlane) -> None:
    where = ("modelchain", f"--namespace={HOME}", f"--kubeconfig={there.kubeconfig}")
    before = objects_of_the_chart(there)  # of tests of the pages
    helm(
        "install", *where, str(CHART), "--take-ownership"
    )  # of the CRDs, as the chart's README says
    try:
        assert (
            there.kubectl("get", "clusterrole,clusterrolebinding", "-o", "name").count(
                "/modelchain-operator\n"
            )
            == 2
        )
        helm("upgrade", *where, str(CHART), *options("namespaced"), "--set", MONITORS_APART)
        left = there.kubectl("get", "clusterrole,clusterrolebinding", "-o", "name")
        assert "/modelchain-" not in left
        assert "/modelchain-operator" in there.kubectl(
            "get", "role", "--namespace=vision", "-o", "name"
        )
    finally:
        helm("uninstall", *where, "--wait")
    assert objects_of_the_chart(there) <= before
    assert (
        there.kubectl("get", "crd", "-l", "app.kubernetes.io/name=modelchain", "-o", "name").count(
            "\n"
        )
        == 2
    )


def test_the_readmes_patch_mounts_the_init_container(there: ControlPlane) -> None:
    manifest = training_operator_source() / "manifests" / "base" / "deployment.yaml"
    readme = (CHART / "README.md").read_text()
    (patch,) = re.findall(r"^kubectl patch .*? --patch '(.*?)'$", readme, re.M | re.S)
    patched = json.loads(
        there.kubectl("patch", "--local", "-f", str(manifest), "--patch", patch, "-o", "json")
    )
    patched["metadata"]["namespace"] = "kubeflow"
    dry_run(there, [patched])
    (container,) = patched["spec"]["template"]["spec"]["containers"]
    where = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    (file,) = one(rendered("full"), "ConfigMap", "-init-container")["data"]
    assert container["args"] == [
        f"--pytorch-init-container-template-file={where['init-container']}/{file}"
    ]
    assert "cert" in where
