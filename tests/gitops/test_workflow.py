"""The workflow for a repository of chains: its own script, run on pull requests of a real Git."""

from __future__ import annotations

import json
import os
import shutil
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


# Stands for GitHub's command line. It lists the comments that the workflow's own filter takes, and
# writes down what else it is asked for.
GH = """#!/bin/sh
echo "$@" | tr '\\n' ' ' | sed 's/--jq.*//; s/ *$//' >> "$RUNNER_TEMP/asked"
echo >> "$RUNNER_TEMP/asked"
if [ "$4" = --jq ]; then jq -r "$5" "$RUNNER_TEMP/there.json"; fi
"""


class Checkout:
    """A repository with a family on its main branch, at the commit of a pull request."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runner = folder / "checkout", folder / "runner"
        (self.folder / "vision").mkdir(parents=True)
        self.runner.mkdir()
        self.file = self.folder / "vision" / "vit.yaml"
        self.file.write_text(FAMILY.read_text())
        (self.folder / "pools.yaml").write_text(POOLS)
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

    def run(self, name: str, path: str = "") -> tuple[int, str]:
        """The exit code of a step, as GitHub runs it, and its standard error.

        Commands are looked for in the folders of `path` first.
        """
        steps = yaml.safe_load(WORKFLOW.read_text())["jobs"]["plan"]["steps"]
        [step] = [one for one in steps if one.get("name") == name]
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=self.folder,
            env=os.environ
            | {
                "BASE": self.git("rev-parse", "main"),
                "GITHUB_REPOSITORY": "team/chains",
                "GITHUB_STEP_SUMMARY": str(self.runner / "summary.md"),
                "PR": "7",
                "RUNNER_TEMP": str(self.runner),
                "PATH": f"{path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr

    def check(self) -> tuple[int, str, str]:
        """The exit code of the plan's step, the comment, and standard error."""
        code, said = self.run("Plan")
        assert not self.git("status", "--porcelain"), "the step leaves files in the checkout"
        comment = self.runner / "comment.md"
        return code, comment.read_text() if comment.exists() else "", said

    def comments(self, *there: tuple[int, str, str]) -> list[str]:
        """What is asked of GitHub's API for the comment, on a pull request with these comments:
        each has its number, its author and its text.
        """
        found = [{"id": n, "user": {"login": who}, "body": text} for n, who, text in there]
        (self.runner / "there.json").write_text(json.dumps(found))
        (self.runner / "gh").write_text(GH)
        (self.runner / "gh").chmod(0o755)
        code, said = self.run("Comment", str(self.runner))
        assert code == 0, said
        return (self.runner / "asked").read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_an_edited_stage_and_what_it_costs(checkout: Checkout) -> None:
    checkout.edit("epochs: 18", "epochs: 20")
    code, comment, _ = checkout.check()
    assert code == 0 and "`vision/vit.yaml`" in comment
    rows = {line.split("|")[1].strip(): line for line in comment.splitlines() if "|vit-" in line}
    assert "Hit" in rows["vit-s"] and "Retrains" in rows["vit-b"] and "Retrains" in rows["vit-l"]
    assert (
        "the edit trains 2 of 4 models and keeps 2" in comment
        and "GPU hours, 370.53 USD" in comment
    )


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
    assert (code, comment) == (0, "")


def test_a_removed_family_is_told(checkout: Checkout) -> None:
    """A tool that prunes ends its training."""
    checkout.git("rm", "-q", "vision/vit.yaml")
    checkout.commit("no family")
    code, comment, _ = checkout.check()
    assert code == 0 and "`vision/vit.yaml` is removed." in comment
    assert "ends its training" in comment


def test_a_file_that_is_no_chain_any_more_is_a_removed_family(checkout: Checkout) -> None:
    checkout.edit("kind: ModelChain", "kind: Another")
    code, comment, _ = checkout.check()
    assert code == 0 and "`vision/vit.yaml` is removed." in comment


def test_a_removed_stage_is_told(checkout: Checkout) -> None:
    lines = checkout.file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "name: vit-s" not in line]
    checkout.file.write_text("".join(kept))
    checkout.commit("without a stage")
    code, comment, _ = checkout.check()
    assert code == 0 and "removed from the chain: vit-s" in comment


def test_a_renamed_file_trains_nothing(checkout: Checkout) -> None:
    checkout.git("mv", "vision/vit.yaml", "vision/family.yml")
    checkout.commit("another name")
    code, comment, _ = checkout.check()
    assert code == 0 and "`vision/family.yml`" in comment and "the edit trains nothing" in comment
    assert "removed" not in comment and "Retrains" not in comment


@pytest.mark.parametrize("name", ["another.yml", "ch\u00e4in.yaml", "two words.yaml"])
def test_no_name_is_overlooked(name: str, checkout: Checkout) -> None:
    (checkout.folder / "vision" / name).write_text(FAMILY.read_text())
    checkout.commit("another family")
    code, comment, _ = checkout.check()
    assert code == 0 and f"`vision/{name}`, a new file:" in comment and "vit-l" in comment


def test_an_invalid_family_can_be_repaired(checkout: Checkout) -> None:
    checkout.git("checkout", "-q", "main")
    checkout.edit("name: vit-s", "name: vit-t")
    checkout.git("checkout", "-q", "-B", "edit")
    checkout.file.write_text(FAMILY.read_text())
    checkout.commit("a repair")
    code, comment, _ = checkout.check()
    assert code == 0 and "which is not valid on the main branch; its whole plan:" in comment
    assert "this chain costs" in comment


ASKED = "api --paginate repos/team/chains/issues/7/comments"
OTHERS = (
    (1, "github-actions[bot]", "another workflow's"),
    (2, "a-person", "<!-- modelchain plan -->\nquoted"),
)


NEEDS_JQ = pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")


@NEEDS_JQ
def test_the_comment_is_written_and_then_edited_and_those_of_others_are_left(
    checkout: Checkout,
) -> None:
    checkout.edit("epochs: 18", "epochs: 20")
    _, comment, _ = checkout.check()
    body = f"-F body=@{checkout.runner}/comment.md"
    assert checkout.comments(*OTHERS) == [ASKED, f"api repos/team/chains/issues/7/comments {body}"]
    (checkout.runner / "asked").unlink()
    ours = (3, "github-actions[bot]", comment)
    edit = f"api -X PATCH repos/team/chains/issues/comments/3 {body}"
    assert checkout.comments(*OTHERS, ours) == [ASKED, edit]


@NEEDS_JQ
def test_without_a_chain_there_is_no_comment(checkout: Checkout) -> None:
    (checkout.folder / "other.yaml").write_text("kind: ConfigMap\n")
    checkout.commit("a file")
    assert checkout.check()[:2] == (0, "")
    assert checkout.comments(*OTHERS) == [ASKED]
    (checkout.runner / "asked").unlink()
    ours = (3, "github-actions[bot]", "<!-- modelchain plan -->\nof an earlier push")
    gone = "api -X DELETE repos/team/chains/issues/comments/3"
    assert checkout.comments(*OTHERS, ours) == [ASKED, gone]


@pytest.mark.parametrize(
    ("budget", "code", "told"),
    [
        ('{gpuHours: "1"}', 1, "spec.budget.gpuHours allows 1"),
        ('{gpuHours: "9000"}', 0, ""),
        (None, 2, "spec.budget: is not given"),
    ],
)
def test_the_budget_of_a_changed_family(
    budget: str | None, code: int, told: str, checkout: Checkout
) -> None:
    of = f"spec:\n  budget: {budget}\n" if budget else "spec:\n  suspend: true\n"
    checkout.edit("spec:\n", of)
    assert checkout.check()[0] == 0
    done, said = checkout.run("Budget")
    assert done == code and told in said
