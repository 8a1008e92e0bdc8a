"""Network policies: which pods may reach which ports."""

from __future__ import annotations

import pytest
from rendering import HOME, Object, find, one, rendered

OPERATOR = {
    "app.kubernetes.io/name": "modelchain",
    "app.kubernetes.io/instance": "modelchain",
    "app.kubernetes.io/component": "operator",
}
ROLES = {"key": "modelchain.dev/role", "operator": "In", "values": ["train", "baseline"]}
TRAINERS = {"podSelector": {"matchExpressions": [ROLES]}}
PROMETHEUS = {
    "namespaceSelector": {},
    "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
}
MONITORING = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
    "podSelector": {"matchLabels": {"app": "scraper"}},
}
ANY = "any"


def opened(rules: list[Object], peers: str) -> list[tuple[object, list[object]]]:
    """Every peer of the rules, with its ports."""
    return [
        (who, [(port["port"]) for port in rule.get("ports", [{"port": ANY}])])
        for rule in rules
        for who in rule.get(peers, [ANY])
    ]


def test_none_unless_asked_for() -> None:
    assert not find(rendered("default"), "NetworkPolicy")


@pytest.mark.parametrize(("name", "prometheus"), [("full", MONITORING), ("namespaced", PROMETHEUS)])
def test_of_trainers(name: str, prometheus: Object) -> None:
    policies = find(rendered(name), "NetworkPolicy", "-trainers")
    assert [policy["metadata"]["namespace"] for policy in policies] == ["vision", "language"]
    for policy in policies:
        spec = policy["spec"]
        assert {"podSelector": spec["podSelector"]} == TRAINERS
        assert sorted(spec["policyTypes"]) == ["Egress", "Ingress"]
        ours = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": HOME}}}
        ours["podSelector"] = {"matchLabels": OPERATOR}
        assert opened(spec["ingress"], "from") == [
            (prometheus, [9090]),
            (ours, [9091]),
            (TRAINERS, [ANY]),
        ]
        assert opened(spec["egress"], "to") == [(ANY, [53, 53]), (TRAINERS, [ANY])]


def test_of_the_operator() -> None:
    cluster, spaces, least = (
        one(rendered(name), "NetworkPolicy", "-operator")["spec"]
        for name in ("full", "namespaced", "least")
    )
    assert cluster["podSelector"]["matchLabels"] == OPERATOR
    assert opened(cluster["ingress"], "from") == [(ANY, [8080]), (MONITORING, [9090])]
    assert opened(least["ingress"], "from") == [(ANY, [8080])]
    everywhere = {**TRAINERS, "namespaceSelector": {}}
    assert opened(cluster["egress"], "to") == [
        (ANY, [53, 53]),
        (ANY, [443, 6443]),
        (everywhere, [9091]),
    ]
    where = {
        "key": "kubernetes.io/metadata.name",
        "operator": "In",
        "values": ["vision", "language"],
    }
    served = {**TRAINERS, "namespaceSelector": {"matchExpressions": [where]}}
    assert opened(spaces["egress"], "to")[-1] == (served, [9091])


def test_pods_of_cpu_jobs_have_no_connections() -> None:
    for policy in find(rendered("full"), "NetworkPolicy", "-verify"):
        values = ["verify", "index", "evaluate"]
        roles = {"key": "modelchain.dev/role", "operator": "In", "values": values}
        assert policy["spec"]["podSelector"] == {"matchExpressions": [roles]}
        assert sorted(policy["spec"]["policyTypes"]) == ["Egress", "Ingress"]
        assert not {"ingress", "egress"} & set(policy["spec"])
