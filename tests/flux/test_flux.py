"""A family in Git, applied by a real Flux: what a commit trains, and what Flux says meanwhile."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from controllers import INTERVAL, PROFILES, Begin, Flux, Synced
from kubelet import Kubelet
from playedpod import Pod
from plays import hang, user_error
from rig import chain
from verdicts import ask

MODELCHAIN = Path(sys.executable).parent / "modelchain"
pytestmark = pytest.mark.timeout(600)
Object = dict[str, Any]


def edited(thing: Object, path: str, value: Any) -> Object:
    """The chain with one field of its second stage, its spec or its metadata changed."""
    new = copy.deepcopy(thing)
    places = {
        "stage": new["spec"]["stages"][1],
        "spec": new["spec"],
        "metadata": new["metadata"],
    }
    where, field = path.split(".")
    places[where][field] = value
    return new


def rerun(thing: Object) -> Object:
    return edited(thing, "stage.rerun", "2026-12")


def test_a_commit_trains_what_it_edits_and_nothing_else(begin: Begin, kubelet: Kubelet) -> None:
    synced = begin("complete")
    first = chain()
    synced.until_ready(synced.repository.commit(first, "a family"))
    assert synced.attempts() == [1, 1, 1] and synced.space.status()["summary"]["stage"] == "3/3"

    retrain = synced.repository.commit(rerun(first), "retrain b")
    synced.until_ready(retrain)
    assert synced.attempts() == [1, 2, 2]

    synced.until_ready(synced.repository.revert(retrain))
    assert synced.attempts() == [1, 2, 2], "the artifacts of the first commit are there"
    assert [stage["cache"] for stage in synced.space.status()["stages"]] == ["Hit"] * 3

    labelled = edited(first, "metadata.labels", {"team": "vision"})
    synced.until_ready(synced.repository.commit(labelled, "a label"))
    assert synced.space.get("mchain", "family")["metadata"]["labels"]["team"] == "vision"
    assert synced.attempts() == [1, 2, 2] and kubelet.errors == []


def test_nothing_drifts(begin: Begin) -> None:
    """Flux applies the same file again and again, and neither it nor the operator writes. Argo CD
    would see no difference either.
    """
    synced = begin("complete")
    manifest = chain(stages=2)
    synced.until_ready(synced.repository.commit(manifest))
    version, passes = synced.space.at_rest(), synced.passes()
    end = time.monotonic() + 45
    while time.monotonic() < end:
        time.sleep(INTERVAL)
        assert synced.space.version() == version
    assert synced.passes() - passes >= 45 // INTERVAL // 2, "Flux has applied it meanwhile"
    live = synced.space.get("mchain", "family")
    assert not ask({"family": live}, {"family": manifest})["family"].differs
    assert ask({"family": live}, {"family": rerun(manifest)})["family"].differs


def test_a_commit_that_the_api_server_refuses_changes_nothing(begin: Begin) -> None:
    synced = begin("complete")
    first = chain(stages=2)
    synced.until_ready(synced.repository.commit(first))
    version = synced.space.at_rest()
    refused = synced.repository.commit(edited(first, "stage.epochs", 0))
    synced.space.wait(
        lambda: (
            synced.status.get("lastAttemptedRevision", "").endswith(refused)
            and synced.ready.get("status") == "False"
        ),
        "Flux says that the commit is refused",
    )
    assert "dry-run failed" in synced.ready["message"] and "epochs" in synced.ready["message"]
    assert synced.space.version() == version
    synced.until_ready(synced.repository.revert(refused))
    assert synced.space.version() == version


def trains_on(pod: Pod) -> Any:
    """The second stage trains until it is stopped."""
    return hang() if pod.role == "train" and pod.stage == "b" else None


def test_a_commit_suspends_the_chain_while_flux_waits_for_it(
    begin: Begin, kubelet: Kubelet
) -> None:
    kubelet.script = trains_on
    synced = begin("complete")
    first = chain()
    synced.repository.commit(first)
    synced.space.wait(lambda: synced.space.states()[1:2] == ["Running"], "stage b trains", 120)
    assert synced.ready["status"] == "Unknown", "Flux waits for the family"
    synced.repository.commit(edited(first, "spec.suspend", True))
    synced.space.until("Suspended", timeout=120)
    assert synced.attempts() == [1, 1, 0]
    kubelet.script = lambda pod: None
    synced.until_ready(synced.repository.commit(first))
    assert synced.attempts() == [1, 2, 1]


def by_kubectl(synced: Synced) -> None:
    patch = json.dumps({"spec": {"suspend": True}})
    synced.space.kubectl("patch", "mchain", "family", "--type=merge", "-p", patch)


def by_our_command(synced: Synced) -> None:
    where = ["-n", synced.space.namespace, "--kubeconfig", str(synced.space.cluster.kubeconfig)]
    subprocess.run([MODELCHAIN, "suspend", "family", *where], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("git", "suspend", "stays"),
    [
        ({}, by_our_command, True),
        ({"suspend": False}, by_our_command, False),
        ({}, by_kubectl, False),
    ],
    ids=["by our command", "by our command against Git", "by kubectl"],
)
def test_who_may_suspend_a_chain_beside_git(
    begin: Begin,
    kubelet: Kubelet,
    git: Object,
    suspend: Callable[[Synced], None],
    stays: bool,
) -> None:
    """Flux takes back what differs from Git, and whatever kubectl has set."""
    kubelet.script = trains_on
    synced = begin("running")
    thing = chain(stages=2)
    thing["spec"] |= git
    synced.until_ready(synced.repository.commit(thing))
    suspend(synced)
    passes = synced.passes()
    synced.space.wait(lambda: synced.passes() > passes + 1, "Flux has applied it")
    assert synced.space.get("mchain", "family")["spec"]["suspend"] is stays


def test_the_profile_running_is_ready_while_the_chain_trains(
    begin: Begin, kubelet: Kubelet
) -> None:
    kubelet.script = trains_on
    synced = begin("running")
    synced.until_ready(synced.repository.commit(chain()))
    synced.space.wait(lambda: synced.space.states()[1:2] == ["Running"], "stage b trains", 120)
    assert synced.ready["status"] == "True"


@pytest.mark.parametrize("profile", ["running", "complete"])
def test_flux_fails_with_the_chain_and_goes_on_with_it(
    begin: Begin, kubelet: Kubelet, profile: str
) -> None:
    kubelet.script = lambda pod: user_error() if pod.role == "train" else None
    synced = begin(profile)
    commit = synced.repository.commit(chain(stages=2))
    synced.space.until("Failed", timeout=120)
    synced.space.wait(lambda: synced.ready.get("status") == "False", "Flux fails", 120)
    assert synced.ready["reason"] == "HealthCheckFailed"
    kubelet.script = lambda pod: None
    synced.space.patch("family", annotations={"modelchain.dev/retry": "by a person"})
    synced.until_ready(commit)
    assert synced.attempts()[0] == 2


def test_what_is_gone_from_git_is_deleted_and_its_artifacts_stay(begin: Begin) -> None:
    synced = begin("complete")
    synced.repository.commit({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}})
    first = chain(stages=2)
    synced.until_ready(synced.repository.commit(first))
    synced.repository.commit({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}})
    space = synced.space
    space.wait(lambda: space.names("mchain") == [], "the chain is gone")
    space.wait(lambda: space.names("pytorchjobs") == [], "its jobs are gone")
    assert len(space.names("sart")) == 2 and "family-artifacts" in space.names("pvc")
    synced.until_ready(synced.repository.commit(first))
    assert synced.attempts() == [0, 0], "it comes back, and nothing is trained again"


@pytest.mark.parametrize("file", ["running", "complete", "notifications"])
def test_the_api_server_takes_our_files_as_they_are(flux: Flux, file: str) -> None:
    words = ("apply", "--dry-run=server", "--validate=strict", "-f", str(PROFILES / f"{file}.yaml"))
    flux.control_plane.kubectl(*words)
