"""What GitOps tools say of chains, by their own code: kstatus, Argo CD with the customizations of
`deploy/gitops/argocd`, and Flux with the profiles of `deploy/gitops/flux`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from programs import VERDICTS, program

GITOPS = Path(__file__).parents[2] / "deploy" / "gitops"
ARGO = GITOPS / "argocd"
KEY = "modelchain.dev_ModelChain"
PROFILES = ("running", "complete")
Object = dict[str, Any]


class Verdict(NamedTuple):
    """What the tools say of one chain. `differs`: Argo CD sees a difference to the manifest in Git.
    `offered` has by the name of each of Argo CD's actions the chain after it; None for one that is
    disabled.
    """

    kstatus: str
    health: str
    message: str
    flux: dict[str, str]
    differs: bool
    offered: dict[str, Object | None]


def ask(
    objects: Mapping[str, Object], git: Mapping[str, Object] | None = None
) -> dict[str, Verdict]:
    """The verdict about each object; `git` has the manifests of some. Raises `Unavailable`."""
    flux = {name: checks(name) for name in PROFILES}
    answers = _run({**argo(), "flux": flux, "objects": objects, "git": git or {}})
    return {name: Verdict(**answer) for name, answer in answers["objects"].items()}


def notices(apps: Mapping[str, Object]) -> dict[str, dict[str, str]]:
    """What Argo CD sends about each Application, by trigger. Raises `Unavailable`."""
    data = yaml.safe_load((ARGO / "notifications.yaml").read_text())["data"]
    triggers = {
        key.removeprefix("trigger."): yaml.safe_load(text)
        for key, text in data.items()
        if key.startswith("trigger.")
    }
    message = yaml.safe_load(data["template.chains"])["message"]
    asked = {"triggers": triggers, "template": message, "apps": apps}
    sent: dict[str, dict[str, str]] = _run({"notices": asked})["notices"]
    return sent


def _run(question: Object) -> Object:
    done = subprocess.run(
        [program(VERDICTS)], input=json.dumps(question), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def argo() -> dict[str, str]:
    """The two customizations, as argocd-cm has them."""
    data = yaml.safe_load((ARGO / "argocd-cm.yaml").read_text())["data"]
    return {what: data[f"resource.customizations.{what}.{KEY}"] for what in ("health", "actions")}


def checks(profile: str) -> dict[str, str]:
    """Flux's health checks of chains."""
    [one] = yaml.safe_load((GITOPS / "flux" / f"{profile}.yaml").read_text())["spec"][
        "healthCheckExprs"
    ]
    assert (one.pop("apiVersion"), one.pop("kind")) == ("modelchain.dev/v1alpha1", "ModelChain")
    return one
