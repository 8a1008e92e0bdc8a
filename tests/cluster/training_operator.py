"""training-operator's own manifests, changed only where a process on the host differs from a
pod.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import yaml

USER = "system:serviceaccount:kubeflow:training-operator"

# It starts only once this fixed path exists; the certificates it serves lie under its TMPDIR.
_MOUNT_MARK = Path("/tmp/k8s-webhook-server/serving-certs/tls.crt")

# As the chart installs it: the default one is refused by the restricted Pod Security Standard.
INIT_CONTAINER = (
    Path(__file__).parents[2] / "charts" / "modelchain" / "files" / "init-container.yaml"
)

NOT_A_JOB = """
{apiVersion: kubeflow.org/v1, kind: PyTorchJob, metadata: {name: refused, namespace: default},
 spec: {pytorchReplicaSpecs: {Master: {template: {
   spec: {containers: [{name: not-pytorch, image: none}]}}}}}}
"""


def objects(
    manifests: Path, certificate: Path, key: Path, authority: Path, authority_key: Path, port: int
) -> str:
    """Everything training-operator wants in the cluster, its CRD apart, as one YAML: rights,
    certificates, webhook.
    """
    webhook = yaml.safe_load((manifests / "webhook/manifests.yaml").read_text())
    webhook["metadata"]["name"] = "validator.training-operator.kubeflow.org"
    webhook["webhooks"] = [
        w for w in webhook["webhooks"] if w["rules"][0]["resources"] == ["pytorchjobs"]
    ]
    url = f"https://127.0.0.1:{port}" + webhook["webhooks"][0]["clientConfig"]["service"]["path"]
    webhook["webhooks"][0]["clientConfig"] = {"url": url, "caBundle": _base64(authority)}
    secret = {
        **_object("v1", "Secret", "training-operator-webhook-cert", namespace="kubeflow"),
        "data": {
            "ca.crt": _base64(authority),
            "ca.key": _base64(authority_key),
            "tls.crt": _base64(certificate),
            "tls.key": _base64(key),
        },
    }
    binding = {
        **_object("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "training-operator"),
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": "ClusterRole",
            "name": "training-operator",
        },
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": USER}],
    }
    role = yaml.safe_load((manifests / "rbac/role.yaml").read_text())
    return yaml.safe_dump_all(
        [_object("v1", "Namespace", "kubeflow"), role, binding, secret, webhook]
    )


def serve_from(directory: Path, certificate: Path, key: Path) -> None:
    """Put the webhook's certificate where a training-operator with TMPDIR=`directory` looks for
    it.
    """
    certificates = directory / "k8s-webhook-server" / "serving-certs"
    certificates.mkdir(parents=True, exist_ok=True)
    (certificates / "tls.crt").write_bytes(certificate.read_bytes())
    (certificates / "tls.key").write_bytes(key.read_bytes())
    if not _MOUNT_MARK.exists():
        _MOUNT_MARK.parent.mkdir(parents=True, exist_ok=True)
        _MOUNT_MARK.write_text(
            "No certificate: training-operator only looks whether this file exists.\n"
        )


def _object(api_version: str, kind: str, name: str, **metadata: str) -> dict[str, Any]:
    return {"apiVersion": api_version, "kind": kind, "metadata": {"name": name, **metadata}}


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
