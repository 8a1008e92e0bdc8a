"""The base for overlays, as kubectl's kustomize builds it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml
from build import find_or_build
from verdicts import GITOPS

from modelchain.io.load import load_chain

Object = dict[str, Any]


def built(folder: Path) -> dict[tuple[str, str], Object]:
    kubectl = find_or_build().paths["kubectl"]
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    things = yaml.safe_load_all(done.stdout)
    return {(thing["kind"], thing["metadata"]["name"]): thing for thing in things}


def test_an_overlay_keeps_a_chain_and_its_claims_together(tmp_path: Path) -> None:
    base, ours = built(GITOPS / "base"), built(GITOPS / "overlay")
    chain, before = ours["ModelChain", "vit-cc3m-v2"], base["ModelChain", "vit-cc3m"]
    claims = [name for kind, name in ours if kind == "PersistentVolumeClaim"]
    assert claims == ["datasets-v2", "families-v2"]
    assert chain["spec"]["data"]["volume"]["claimName"] == "datasets-v2"
    assert chain["spec"]["storage"]["claimName"] == "families-v2"
    assert all(thing["metadata"]["namespace"] == "vision" for thing in ours.values())
    assert chain["spec"]["runner"]["image"].endswith("/trainer@sha256:" + "0" * 64)
    reruns = [stage.get("rerun") for stage in chain["spec"]["stages"]]
    assert reruns == [None, "2026-12", None]
    assert len(before["spec"]["stages"]) == len(reruns)
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump(chain))
    assert load_chain(file).metadata.name == "vit-cc3m-v2"


def test_no_tool_prunes_the_claims() -> None:
    """Their annotations are on the objects, not on the chain."""
    for (kind, _), thing in built(GITOPS / "base").items():
        kept = thing["metadata"].get("annotations", {})
        assert (kept.get("kustomize.toolkit.fluxcd.io/prune") == "disabled") == (
            kind == "PersistentVolumeClaim"
        )
