"""The objects that each set of values renders: pods, rights, monitors, CRDs."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from generate import ARGO, CHART, REPOSITORY
from rendering import ALL, HOME, Object, find, objects, one, pod_templates, rendered

RIGHTS = ("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")


@pytest.mark.parametrize("name", ALL)
def test_pods_meet_the_restricted_standard(name: str) -> None:
    templates = list(pod_templates(rendered(name)))
    assert templates
    for template in templates:
        spec = template["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert {next(iter(set(volume) - {"name"})) for volume in spec["volumes"]} <= {
            "configMap",
            "emptyDir",
        }
        assert spec["securityContext"] == {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        for container in spec["containers"] + spec.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
            assert not [port for port in container["ports"] if "hostPort" in port]
            assert {mount["mountPath"] for mount in container["volumeMounts"]} == {
                "/etc/modelchain",
                "/tmp",
            }


@pytest.mark.parametrize("name", ALL)
def test_every_object_has_a_place_and_the_labels(name: str) -> None:
    for thing in rendered(name):
        cluster_wide = thing["kind"].startswith(("ClusterRole", "CustomResource"))
        assert ("namespace" in thing["metadata"]) is not cluster_wide
        assert thing["metadata"]["labels"]["app.kubernetes.io/name"] == "modelchain"
        assert name != "full" or thing["metadata"]["labels"]["team"] == "vision"


def operator(name: str) -> Object:
    found: Object = one(rendered(name), "Deployment", "-operator")["spec"]["template"]["spec"][
        "containers"
    ][0]
    return found


def test_the_operators_container() -> None:
    digest = "sha256:" + "1" * 64
    images = {name: operator(name)["image"] for name in ("default", "full", "least")}
    assert images == {
        "default": "ghcr.io/modelchain/operator:0.1.0",
        "full": "registry.example.com/operator:0.1.0-rc.1",
        "least": f"ghcr.io/modelchain/operator@{digest}",
    }
    common = ["--config=/etc/modelchain/config.yaml", "--liveness-port=8080"]
    assert operator("default")["args"] == [*common, "--log-format=json", "--metrics-port=9090"]
    assert operator("full")["args"] == [
        *common,
        "--log-format=plain",
        "--metrics-port=9090",
        "--verbose",
    ]
    assert operator("least")["args"] == [*common, "--log-format=json", "--metrics-port=0"]
    assert [port["name"] for port in operator("default")["ports"]] == ["health", "metrics"]
    assert [port["name"] for port in operator("least")["ports"]] == ["health"]
    assert [e["name"] for e in operator("full")["env"]] == ["POD_NAMESPACE", "HTTPS_PROXY"]


def test_the_pods_account_and_its_token() -> None:
    for name, account in (("default", "modelchain-operator"), ("least", "there-already")):
        (template,) = pod_templates(rendered(name))
        assert template["spec"]["serviceAccountName"] == account
        assert template["spec"]["automountServiceAccountToken"] is True
    assert one(rendered("default"), "ServiceAccount")["automountServiceAccountToken"] is False
    assert not find(rendered("least"), "ServiceAccount")


def test_a_change_of_the_configuration_restarts_the_operator() -> None:
    checksums = {
        next(pod_templates(objects("--set", f"progressSeconds={n}")))["metadata"]["annotations"][
            "checksum/config"
        ]
        for n in (30, 60)
    }
    assert len(checksums) == 2


def test_a_budget_only_where_there_are_several_replicas() -> None:
    assert one(rendered("default"), "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert not find(rendered("least"), "PodDisruptionBudget")


def test_rights_are_the_same_in_a_cluster_and_in_namespaces() -> None:
    cluster, spaces = rendered("default"), rendered("namespaced")
    rules = one(cluster, "ClusterRole", "-operator")["rules"]
    roles = find(spaces, "Role", "-operator")
    assert [role["metadata"]["namespace"] for role in roles] == ["vision", "language"]
    assert all(role["rules"] == rules for role in roles)
    assert not [thing for thing in spaces if thing["kind"].startswith("ClusterRole")]
    leader = [one(things, "Role", "-leader") for things in (cluster, spaces)]
    assert leader[0] == leader[1]
    for binding in find(spaces, "RoleBinding") + find(cluster, "ClusterRoleBinding"):
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": "modelchain-operator", "namespace": HOME}
        ]
    assert not [
        thing
        for thing in rendered("least")
        if thing["kind"] in RIGHTS and "-operator" in thing["metadata"]["name"]
    ]


def test_rights_of_people_go_to_the_clusters_roles() -> None:
    def may(role: str) -> set[tuple[str, str]]:
        found = one(rendered("default"), "ClusterRole", f"modelchain-{role}")
        assert (
            found["metadata"]["labels"][f"rbac.authorization.k8s.io/aggregate-to-{role}"] == "true"
        )
        return {(r, v) for rule in found["rules"] for r in rule["resources"] for v in rule["verbs"]}

    assert may("view") == {
        (r, v) for r in ("modelchains", "stageartifacts") for v in ("get", "list", "watch")
    }
    assert {r for r, _ in may("edit")} == {"modelchains"}
    assert may("admin") == {("stageartifacts", "delete"), ("stageartifacts", "deletecollection")}


def test_crds_are_those_of_the_repository() -> None:
    sources = [yaml.safe_load(path.read_text()) for path in sorted((REPOSITORY / "crds").iterdir())]
    found = find(rendered("default"), "CustomResourceDefinition")
    assert [crd["spec"] for crd in found] == [crd["spec"] for crd in sources]
    assert [crd["metadata"]["name"] for crd in found] == [
        crd["metadata"]["name"] for crd in sources
    ]
    kept = {"helm.sh/resource-policy": "keep"}
    assert all(crd["metadata"]["annotations"] == kept for crd in found)
    more = kept | {"argocd.argoproj.io/sync-options": "ServerSideApply=true"}
    assert all(
        c["metadata"]["annotations"] == more
        for c in find(rendered("full"), "CustomResourceDefinition")
    )
    assert all(
        "annotations" not in c["metadata"]
        for c in find(rendered("least"), "CustomResourceDefinition")
    )
    assert not find(rendered("namespaced"), "CustomResourceDefinition")


def test_monitors_only_where_asked_for() -> None:
    assert not [thing for thing in rendered("default") if thing["kind"].endswith("Monitor")]
    service = one(rendered("full"), "ServiceMonitor")
    assert service["metadata"]["labels"]["release"] == "prometheus"
    assert service["spec"]["endpoints"] == [
        {"port": "metrics", "interval": "15s", "honorLabels": True}
    ]
    selected = service["spec"]["selector"]["matchLabels"].items()
    assert selected <= one(rendered("full"), "Service")["metadata"]["labels"].items()
    assert one(rendered("full"), "PodMonitor")["spec"]["namespaceSelector"] == {"any": True}
    assert one(rendered("namespaced"), "PodMonitor")["spec"]["namespaceSelector"] == {
        "matchNames": ["vision", "language"]
    }


def test_what_trainers_serve_gets_the_labels_of_their_pods() -> None:
    """And cannot tell of another namespace."""
    (endpoint,) = one(rendered("full"), "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert not endpoint.get("honorLabels")
    copied = {
        rule["targetLabel"]: rule["sourceLabels"]
        for rule in endpoint["relabelings"]
        if "targetLabel" in rule
    }
    label = "__meta_kubernetes_pod_label_modelchain_dev"
    assert copied == {name: [f"{label}_{name}"] for name in ("chain", "stage", "role")}


def test_argo_cds_customizations_are_those_of_the_patch() -> None:
    assert not find(rendered("default"), "ConfigMap", "-argocd-cm")
    patch = yaml.safe_load((ARGO / "argocd-cm.yaml").read_text())
    found = one(rendered("full"), "ConfigMap", "-argocd-cm")["data"]
    assert patch.keys() == {"data"} and found == patch["data"]
    health = found["resource.customizations.health.modelchain.dev_ModelChain"]
    assert health == (ARGO / "health.lua").read_text()
    offered = yaml.safe_load(found["resource.customizations.actions.modelchain.dev_ModelChain"])
    names = sorted(action["name"] for action in offered["definitions"])
    assert names == ["resume", "retry", "suspend"]


def test_the_init_container_template_is_the_one_the_tests_run_with() -> None:
    assert not find(rendered("default"), "ConfigMap", "-init-container")
    found = one(rendered("full"), "ConfigMap", "-init-container")
    assert found["metadata"]["namespace"] == "training"
    assert (
        found["data"]["init-container.yaml"]
        == (CHART / "files" / "init-container.yaml").read_text()
    )
    text = found["data"]["init-container.yaml"]
    for name in ("InitContainerImage", "MaxTries", "MasterAddr"):
        text = text.replace(f"{{{{.{name}}}}}", "x")
    (container,) = yaml.safe_load(text)
    assert "{{" not in text
    security: dict[str, Any] = container["securityContext"]
    assert (security["runAsNonRoot"], security["capabilities"]) == (True, {"drop": ["ALL"]})
