"""The workflow for a repository of chains: its own script, run on pull requests of a real Git."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from playing import REPOSITORY

WORKFLOW = REPOSITORY / "deploy" / "gitops" / "ci" / "github-actions.yaml"
FAMILY = REPOSITORY / "examples" / "vit-cc3m.yaml"
POOLS = """
nodePools:
  a100-80gb:
    gpu: A100
    gpusPerNode: 8
    price: {perGpuHour: "2.50", currency: USD, source: contract}
"""


class Checkout:
    """A repository with a family on its main branch, at the commit of a pull request."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "vision").mkdir()
        self.file = folder / "vision" / "vit.yaml"
        self.file.write_text(FAMILY.read_text())
        (folder / "pools.yaml").write_text(POOLS)
        self.git("init", "-q", "-b", "main")
        self.commit("a family")
        self.git("checkout", "-q", "-b", "edit")

    def git(self, *words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.com")
        done = subprocess.run(
            ["git", *who, *words], cwd=self.folder, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def commit(self, text: str) -> None:
        self.git("add", "-A")
        self.git("commit", "-qm", text)

    def edit(self, old: str, new: str) -> None:
        text = self.file.read_text()
        assert old in text
        self.file.write_text(text.replace(old, new))
        self.commit("an edit")

    def check(self) -> tuple[int, str, str]:
        """The exit code of the step, as GitHub runs it, and its comment."""
        steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["plan"]["steps"]
        [step] = [one for one in steps if one.get("name") == "Plan"]
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=self.folder,
            env=os.environ
            | {
                "BASE": self.git("rev-parse", "main"),
                "GITHUB_STEP_SUMMARY": str(self.folder / "summary.md"),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
        )
        return done.returncode, (self.folder / "comment.md").read_text(), done.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_an_edited_stage_and_what_it_costs(checkout: Checkout) -> None:
    checkout.edit("epochs: 18", "epochs: 20")
    code, comment, _ = checkout.check()
    assert code == 0 and "`vision/vit.yaml`" in comment
    rows = {line.split("|")[1].strip(): line for line in comment.splitlines() if "|vit-" in line}
    assert "Hit" in rows["vit-s"] and "Retrains" in rows["vit-b"] and "Retrains" in rows["vit-l"]
    assert "the edit trains 2 of 4 models and keeps 2" in comment and "GPU hours, 3" in comment


def test_an_edit_that_trains_nothing_passes(checkout: Checkout) -> None:
    checkout.edit("metadata: {name: vit-cc3m}", "metadata: {name: vit-cc3m, labels: {team: x}}")
    code, comment, _ = checkout.check()
    assert code == 0 and "the edit trains nothing" in comment


def test_an_invalid_chain_fails_the_check(checkout: Checkout) -> None:
    checkout.edit("name: vit-s", "name: vit-t")
    code, _, said = checkout.check()
    assert code == 2 and "'vit-t' is used twice" in said


def test_a_new_family_shows_its_whole_plan(checkout: Checkout) -> None:
    text = FAMILY.read_text().replace("vit-cc3m", "another")
    (checkout.folder / "vision" / "another.yaml").write_text(text)
    checkout.commit("another family")
    code, comment, _ = checkout.check()
    assert code == 0 and "`vision/another.yaml`" in comment and "vit-l" in comment
    assert "`vision/vit.yaml`" not in comment


def test_other_files_and_what_main_did_meanwhile_do_not_count(checkout: Checkout) -> None:
    (checkout.folder / "other.yaml").write_text("kind: ConfigMap\n")
    checkout.commit("a file")
    checkout.git("checkout", "-q", "main")
    checkout.edit("epochs: 18", "epochs: 20")
    checkout.git("checkout", "-q", "edit")
    code, comment, _ = checkout.check()
    assert code == 0 and comment == "### What this edit trains\n"
