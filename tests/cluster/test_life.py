"""The life of a chain: stopped, edited, finished, deleted, made again; one
namespace for all.
"""

from __future__ import annotations

import contextlib
import json
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plays
import pytest
from controlplane import ControlPlane
from kubelet import Kubelet
from playedpod import Pod, Volume
from plays import Play
from recorder import Recorder
from rig import IMAGE, Object, Operator, Space, chain, fresh_namespace
from specs import DELETE

from modelchain_operator.runners.template import FILLS

QUEUE = "kueue.x-k8s.io/queue-name"


class World:
    """A namespace with an operator; `scripts` has a chain's script for its pods, by the chain's
    name.
    """

    def __init__(self, space: Space, kubelet: Kubelet, operator: Operator, recorder: Recorder):
        self.space, self.kubelet, self.operator, self.recorder = space, kubelet, operator, recorder
        self.scripts: dict[str, Callable[[Pod], Play | None]] = {}
        kubelet.script = lambda pod: self.scripts.get(str(pod.chain), lambda pod: None)(pod)

    def apply(
        self, name: str, stages: int = 2, *, stalls: tuple[str, ...] = (), **changes: Any
    ) -> None:
        """A chain whose inputs no other chain has. Attempts of `stalls`, such as a1 of stage b,
        stop half-way.
        """
        seed = {"spec.recipe.seed": zlib.crc32(name.encode()) % 1000}
        self.scripts[name] = lambda pod: (
            plays.stall() if f"{pod.stage}{pod.attempt}" in stalls else None
        )
        self.space.apply(chain(name, stages, **(seed | changes)))

    def runs(self, name: str, attempt: str) -> Object:
        """Wait until an attempt has taken steps; its job."""
        stage = attempt.removeprefix(f"{name}-").split("-")[0]

        def stepped() -> bool:
            found = self.space.stage(stage, name)
            return found["attempts"][-1]["name"] == attempt and found["progress"]["step"] > 0

        self.space.wait(lambda: _try(stepped), f"{attempt} runs")
        return self.space.get("pytorchjob", attempt)

    def attempts(self, name: str) -> dict[str, list[str]]:
        """By stage, how its attempts stand."""
        return {
            s["name"]: [a["state"] for a in s["attempts"]]
            for s in self.space.status(name)["stages"]
        }

    def jobs(self, name: str) -> list[str]:
        return [n for n in self.space.names("pytorchjobs") if n.startswith(f"{name}-")]

    def volume(self, name: str) -> Volume:
        return self.kubelet.volume(self.space.namespace, f"{name}-artifacts")

    def again(self, name: str, kind: str = "Complete", seconds: float = 60.0) -> Object:
        """Wait until what the spec says now is looked at and the condition holds; the status
        then.
        """

        def seen() -> Object | None:
            found = self.space.get("mchain", name)
            status: Object = found.get("status", {})
            true = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
            return (
                status
                if status.get("observedGeneration") == found["metadata"]["generation"]
                and kind in true
                else None
            )

        return self.space.wait(seen, f"{kind} of {name} as it is now", seconds)

    def edit(self, name: str, **stages: Object) -> None:
        """Change stages by name."""
        spec = self.space.get("mchain", name)["spec"]
        self.space.patch(name, {"stages": [s | stages.get(s["name"], {}) for s in spec["stages"]]})


def _try(what: Callable[[], bool]) -> bool:
    try:
        return what()
    except (KeyError, IndexError):
        return False


@pytest.fixture(scope="module")
def world(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with (
        fresh_namespace(control_plane) as namespace,
        Kubelet(control_plane.kubeconfig, 3) as kubelet,
        Operator(
            control_plane.kubeconfig, tmp_path_factory.mktemp("life"), (namespace,)
        ) as operator,
        Recorder(control_plane.etcd) as recorder,
    ):
        yield World(Space(control_plane, namespace), kubelet, operator, recorder)
        recorder.verify()


@pytest.fixture(autouse=True)
def _promises(world: World) -> Iterator[None]:
    yield
    world.recorder.verify()


# -- stop and edit ---------------------------------------------------------------------------------


def test_what_keeps_an_attempt_from_starting_is_mended(world: World) -> None:
    """It is made again of what the spec says now, and no budget is charged."""
    world.apply("mended", 1, **{"spec.runner.nodePool": "nowhere"})
    world.space.wait(
        lambda: "Unschedulable" in world.space.stage("a", "mended").get("reason", ""),
        "no node fits",
    )
    world.space.patch("mended", {"runner": {"nodePool": "cpu"}})
    status = world.again("mended")
    assert world.attempts("mended") == {"a": ["Suspended", "Succeeded"]}
    assert (status["stages"][0]["retries"], status["stages"][0]["disruptions"]) == (0, 0)


def test_no_stage_starts_before_its_data_is_packed(world: World) -> None:
    pack = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "pack", "labels": {FILLS: "photos"}},
        "spec": {
            "suspend": True,
            "template": {
                "spec": {"restartPolicy": "Never", "containers": [{"name": "pack", "image": IMAGE}]}
            },
        },
    }
    Space(world.space.cluster, world.space.namespace, data="photos")
    world.space.apply(pack)
    world.apply("early", 2, **{"spec.data.volume.claimName": "photos"})
    waits = lambda: (  # noqa: E731
        (world.space.condition("Reconciling", "early") or {}).get("reason") == "DataLoading"
    )
    world.space.wait(waits, "it waits for its data")
    assert world.space.stage("a", "early")["reason"] == "DataLoading: job pack fills claim photos"
    past = "2026-01-01T00:00:00Z"
    failed = [{"type": kind, "status": "True"} for kind in ("FailureTarget", "Failed")]
    status = json.dumps({"status": {"startTime": past, "conditions": failed}})
    world.space.kubectl(
        "patch", "job", "pack", "--subresource=status", "--type=merge", "-p", status
    )
    stalled = world.space.until("Stalled", "early")["conditions"][0]
    assert stalled["reason"] == "DataFailed" and "kubectl logs job/pack" in stalled["message"]
    assert world.jobs("early") == []
    world.space.kubectl("delete", "job", "pack")
    world.space.until("Complete", "early")


def test_a_record_has_the_cost_of_all_attempts_at_its_inputs(world: World) -> None:
    world.apply("dear", 1, **{"spec.runner.nodePool": "a100"})
    world.scripts["dear"] = lambda pod: (
        plays.preempt(2.0) if pod.attempt == 1 else plays.succeed(2.0)
    )
    stage = world.again("dear")["stages"][0]
    assert len(stage["attempts"]) == 2 and all(a["gpuSeconds"] for a in stage["attempts"])
    record = next(r["spec"] for r in world.space.list("sart") if r["spec"]["chain"] == "dear")
    assert [record[k] for k in ("gpuSeconds", "cost", "macs")] == [
        stage[k] for k in ("gpuSeconds", "cost", "macs")
    ]


def test_suspend_and_resume(world: World) -> None:
    world.apply("pause", stalls=("b1",), **{"spec.runner.nodePool": "a100"})
    world.runs("pause", "pause-b-a1")
    world.space.patch("pause", {"suspend": True})
    status = world.again("pause", "Suspended")
    kinds = {c["type"] for c in status["conditions"]}
    assert not kinds & {"Ready", "Stalled", "Reconciling"}
    stage = status["stages"][1]
    assert (stage["state"], stage["retries"], stage["disruptions"]) == ("Suspended", 0, 0)
    assert "set it to false" in stage["reason"]
    spent = stage["gpuSeconds"]
    assert spent > 0 and world.volume("pause").checkpoints[stage["inputDigest"]] == 3900, (
        "it wrote a checkpoint"
    )
    assert world.jobs("pause") == ["pause-a-a1"]
    world.space.patch("pause", {"suspend": False})
    stage = world.again("pause")["stages"][1]
    assert [a["state"] for a in stage["attempts"]] == ["Suspended", "Succeeded"]
    assert (stage["retries"], stage["disruptions"]) == (0, 0) and stage["gpuSeconds"] >= spent
    assert world.kubelet.trained[stage["inputDigest"]] == ["pause-b-a1", "pause-b-a2"]


def test_edit_while_it_runs(world: World) -> None:
    """A later stage's edit leaves the running one alone; its own and an earlier one's supersede it;
    back resumes.
    """
    space = world.space
    world.apply("edit", 3, stalls=("b1", "b2"))
    job = world.runs("edit", "edit-b-a1")
    first = space.stage("b", "edit")["inputDigest"]
    world.edit("edit", c={"epochs": 21})
    world.again("edit", "Reconciling")
    assert space.get("pytorchjob", "edit-b-a1")["metadata"]["uid"] == job["metadata"]["uid"]
    assert "deletionTimestamp" not in space.get("pytorchjob", "edit-b-a1")["metadata"]
    world.edit("edit", b={"rerun": "x"})
    world.runs("edit", "edit-b-a2")
    assert space.stage("b", "edit")["inputDigest"] != first and "edit-b-a1" not in world.jobs(
        "edit"
    )
    assert space.stage("b", "edit")["reason"] == "Miss: rerun changed"
    world.edit("edit", a={"epochs": 21}, b={"rerun": None})
    space.wait(lambda: "edit-a-a2" in world.jobs("edit"), "the earlier stage is trained again")
    world.edit("edit", a={"epochs": 20})
    status = world.again("edit")
    assert status["stages"][1]["inputDigest"] == first
    assert (
        world.kubelet.trained[first][0] == "edit-b-a1" and len(world.kubelet.trained[first]) == 2
    ), "it was resumed"
    assert all((s["retries"], s["disruptions"]) == (0, 0) for s in status["stages"])
    assert {a["state"] for s in status["stages"] for a in s["attempts"]} == {
        "Suspended",
        "Succeeded",
    }


def test_edits_of_a_finished_chain(world: World) -> None:
    """Only what changed and its successors are trained; what is back is a hit; order and names are
    no inputs.
    """
    space = world.space
    world.apply("done", 3)
    before = space.until("Complete", "done")
    world.edit("done", b={"rerun": "x"})
    world.again("done")
    assert world.jobs("done") == ["done-a-a1", "done-b-a1", "done-b-a2", "done-c-a1", "done-c-a2"]
    world.edit("done", b={"rerun": None})
    status = world.again("done")
    assert [s["inputDigest"] for s in status["stages"]] == [
        s["inputDigest"] for s in before["stages"]
    ]
    assert [s["cache"] for s in status["stages"]] == ["Hit"] * 3 and len(world.jobs("done")) == 5
    assert status["total"]["macs"] > before["total"]["macs"], "what was spent stays in the ledger"
    a, b, c = space.get("mchain", "done")["spec"]["stages"]
    space.patch("done", {"stages": [a | {"name": "b"}, b | {"name": "a"}, c]})
    assert [s["cache"] for s in world.again("done")["stages"]] == ["Hit"] * 3 and len(
        world.jobs("done")
    ) == 5
    space.patch("done", {"stages": [a, c]})
    stages = world.again("done")["stages"]
    assert [s["name"] for s in stages] == ["a", "c"]
    assert len(world.jobs("done")) == 6 and stages[1]["reason"] == "Miss: predecessor changed"
    vision = c["modelConfig"]["vision_cfg"] | {"layers": 9}
    more = c | {"name": "d", "modelConfig": c["modelConfig"] | {"vision_cfg": vision}}
    space.patch("done", {"stages": [a, b, c, more]})
    stages = world.again("done")["stages"]
    assert [s["cache"] for s in stages] == [
        "Hit",
        "Hit",
        "Hit",
        "Miss",
    ] and "done-d-a1" in world.jobs("done")


def test_a_finished_chain_starts_nothing(world: World) -> None:
    space = world.space
    world.apply("rest", 1)
    space.until("Complete", "rest")
    jobs = world.jobs("rest")
    space.kubectl("label", "mchain", "rest", "team=vision")
    world.operator.kill()
    world.operator.start()
    record = space.list("sart", "modelchain.dev/chain=rest")[0]["metadata"]["name"]
    space.kubectl("delete", "sart", record)
    failed = space.until("Failed", "rest")["conditions"]
    assert "modelchain retry rest -n" in next(c["message"] for c in failed if c["type"] == "Failed")
    assert world.jobs("rest") == jobs
    digest = space.stage("a", "rest")["inputDigest"]
    space.patch("rest", annotations={"modelchain.dev/retry": "1"})
    stage = space.until("Complete", "rest")["stages"][0]
    assert len(stage["attempts"]) == 2 and world.kubelet.finished[digest] == 1, (
        "the trainer found what it had left"
    )


def test_retry_renews_budgets_once(world: World) -> None:
    space = world.space
    world.apply("again", 1, **{"spec.retry": {"maxRetries": 0}})
    world.scripts["again"] = lambda pod: plays.oom() if pod.attempt < 3 else None
    space.until("Failed", "again")
    space.patch("again", annotations={"modelchain.dev/retry": "1"})
    space.wait(lambda: world.attempts("again")["a"] == ["Failed"] * 2, "it is tried once more")
    world.operator.kill()
    world.operator.start()
    time.sleep(3)
    assert (
        world.attempts("again")["a"] == ["Failed"] * 2
        and space.condition("Failed", "again")["status"] == "True"
    )
    space.patch("again", annotations={"modelchain.dev/retry": "2"})
    space.until("Complete", "again")


def test_a_longer_deadline_goes_on(world: World) -> None:
    world.apply("late", 1, stalls=("a1",), **{"spec.deadlines": {"stageSeconds": 3}})
    assert (
        world.space.until("Failed", "late")["stages"][0]["attempts"][0]["failure"]
        == "StageDeadline"
    )
    world.space.patch("late", {"deadlines": {"stageSeconds": 600}})
    stage = world.again("late")["stages"][0]
    assert world.kubelet.trained[stage["inputDigest"]] == ["late-a-a1", "late-a-a2"]


# -- refused edits ---------------------------------------------------------------------------------


def test_an_edit_that_cannot_be_run(world: World) -> None:
    """The CRD lets it through, the operator does not: what runs is left alone, the next edit mends
    it.
    """
    space = world.space
    world.apply("wrong", 2, stalls=("a1",))
    job = world.runs("wrong", "wrong-a-a1")
    stages = space.get("mchain", "wrong")["spec"]["stages"]
    open_ended = [{k: v for k, v in s.items() if k != "epochs"} for s in stages]
    space.patch("wrong", {"stages": open_ended, "allocation": {"targetAcceleration": "900000"}})
    status = world.again("wrong", "Stalled")
    stalled = next(c for c in status["conditions"] if c["type"] == "Stalled")
    assert (
        stalled["reason"] == "InvalidSpec" and "correct it and apply it again" in stalled["message"]
    )
    assert space.get("pytorchjob", "wrong-a-a1")["metadata"]["uid"] == job["metadata"]["uid"]
    space.patch("wrong", {"stages": stages, "allocation": None, "runner": {"nodePool": "nope"}})
    world.again("wrong", "Reconciling")
    assert len(space.status("wrong")["stages"][0]["attempts"]) == 1, (
        "the pool is asked for at the next launch only"
    )
    space.kubectl("delete", "pytorchjob", "wrong-a-a1")
    status = world.again("wrong", "Stalled")
    stalled = next(c for c in status["conditions"] if c["type"] == "Stalled")
    assert stalled["reason"] == "InvalidSpec" and "nope is no node pool" in stalled["message"]
    space.patch("wrong", {"runner": {"nodePool": "cpu"}})
    world.again("wrong")


def test_another_image_while_a_stage_trains(world: World) -> None:
    """What trains goes on, and is recorded with the image it ran; the next stage runs the new
    one.
    """
    world.scripts["pinned"] = lambda pod: plays.succeed(3.0)
    world.space.apply(chain("pinned", 2, **{"spec.recipe.seed": 77}))
    world.runs("pinned", "pinned-a-a1")
    old, new = IMAGE, IMAGE[:-1] + ("0" if IMAGE[-1] != "0" else "1")
    world.space.patch("pinned", {"runner": {"image": new}})
    world.again("pinned")
    records = [r["spec"] for r in world.space.list("sart") if r["spec"]["chain"] == "pinned"]
    assert {r["stage"]: r["image"] for r in records} == {"a": old, "b": new}
    assert world.attempts("pinned") == {"a": ["Succeeded"], "b": ["Succeeded"]}


def test_a_name_that_is_taken(world: World) -> None:
    """By a user's own job. The next attempt has the next number, and the job is left alone."""
    space = world.space
    world.apply("model", 1)
    job = space.wait(lambda: space.get("pytorchjob", "model-a-a1"), "a job to copy")
    space.until("Complete", "model")
    meta = {"name": "foreign-a-a1", "namespace": space.namespace}
    spec = job["spec"] | {"runPolicy": {"suspend": True}}
    space.apply(
        {"apiVersion": job["apiVersion"], "kind": job["kind"], "metadata": meta, "spec": spec}
    )
    uid = space.get("pytorchjob", "foreign-a-a1")["metadata"]["uid"]
    world.apply("foreign", 1)
    stage = space.until("Complete", "foreign")["stages"][0]
    assert world.attempts("foreign") == {"a": ["Suspended", "Succeeded"]}
    assert (stage["retries"], stage["disruptions"]) == (0, 0)
    assert space.get("pytorchjob", "foreign-a-a1")["metadata"]["uid"] == uid


def test_two_chains_whose_attempts_have_the_same_names(world: World) -> None:
    space = world.space
    world.apply("vit", 1, **{"spec.stages[0].name": "b-large"})
    world.apply("vit-b", 1, **{"spec.stages[0].name": "large"})
    for name in ("vit", "vit-b"):
        space.until("Complete", name)
    names = [name for name in space.names("pytorchjobs") if name.startswith("vit-b-large-")]
    assert names == ["vit-b-large-a1", "vit-b-large-a2"]
    said = [event["message"] for event in space.list("events") if "vit" in event["message"]]
    assert not [message for message in said if "kubectl delete" in message]


# -- deleted and made again ------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["up", "down"])
def test_delete_and_make_again(world: World, operator: str) -> None:
    """Children go, the claim and StageArtifacts stay; the new chain takes them up, epochs and
    ledger included.
    """
    space, name = world.space, f"phoenix-{operator}"
    allocated = {
        "spec.stages[1].epochs": DELETE,
        "spec.allocation.targetAcceleration": "1.5",
        "spec.runner.nodePool": "a100",
    }
    world.apply(name, 3, stalls=("c1",), **allocated)
    job = world.runs(name, f"{name}-c-a1")
    uid, before = space.get("mchain", name)["metadata"]["uid"], space.status(name)
    if operator == "down":
        world.operator.kill()
    space.kubectl("delete", "mchain", name)
    space.wait(lambda: not world.recorder.orphans(uid), "everything of it is gone")
    assert job and f"{name}-artifacts" in space.names("pvc")
    assert len(space.list("sart", f"modelchain.dev/chain={name}")) == 2
    if operator == "down":
        world.operator.start()
    world.apply(name, 3, **allocated)
    status = space.until("Complete", name)
    assert [s["cache"] for s in status["stages"]] == ["Hit", "Hit", "Miss"]
    assert [s["epochs"] for s in status["stages"]] == [s["epochs"] for s in before["stages"]]
    for then, now in zip(before["stages"][:2], status["stages"][:2], strict=True):
        assert (now["macs"], now["cost"], now["attempts"]) == (then["macs"], then["cost"], [])
        assert now["gpuSeconds"] == then["gpuSeconds"]
    assert world.kubelet.trained[status["stages"][2]["inputDigest"]] == [f"{name}-c-a1"] * 2, (
        "it was resumed"
    )


def test_another_claim_of_the_same_name(world: World) -> None:
    """The StageArtifacts lie elsewhere; nothing is trained again unasked."""
    space = world.space
    world.apply("moved", 2)
    space.until("Complete", "moved")
    space.kubectl(
        "delete", "pytorchjobs,jobs", "--selector=modelchain.dev/chain=moved"
    )  # finished pods hold it, too
    space.kubectl("delete", "pvc", "moved-artifacts", "--timeout=30s")
    world.edit("moved", b={"rerun": "x"})
    stalled = next(
        c for c in world.again("moved", "Stalled", 90)["conditions"] if c["type"] == "Stalled"
    )
    assert stalled["reason"] == "ArtifactMissing"
    label = f"modelchain.dev/input-digest={space.stage('a', 'moved')['inputDigest'][:63]}"
    [record] = [found["metadata"]["name"] for found in space.list("sart", label)]
    assert (
        f"to train the stage again: kubectl delete sart {record} -n {space.namespace}"
        in stalled["message"]
    )
    space.kubectl("delete", "sart", record)
    stages = world.again("moved", seconds=90)["stages"]
    assert stages[0]["reason"] == "Miss: its artifact is gone" and len(world.jobs("moved")) == 2
    assert "moved-artifacts" in space.names("pvc")


def test_a_claim_that_is_gone_is_seen_before_complete_is_said(world: World) -> None:
    """The operator has read the claim less than a minute ago."""
    space = world.space
    world.apply("hollow", 2)
    space.until("Complete", "hollow")
    space.kubectl("delete", "mchain", "hollow", "--wait")
    space.kubectl("delete", "pvc", "hollow-artifacts", "--timeout=30s")
    world.apply("hollow", 2)
    status = space.until("Stalled", "hollow")
    assert status["stages"][0]["reasonCode"] == "ArtifactMissing"
    told = [e for e in space.list("events") if e["involvedObject"]["name"] == "hollow"]
    uid = space.get("mchain", "hollow")["metadata"]["uid"]
    assert "StageSucceeded" not in [e["reason"] for e in told if e["involvedObject"]["uid"] == uid]


@pytest.mark.timeout(180)
def test_a_claim_that_is_gone_is_seen_within_a_minute(world: World) -> None:
    space = world.space
    world.apply("emptied", 1)
    space.until("Complete", "emptied")
    space.kubectl("delete", "pytorchjobs,jobs", "--selector=modelchain.dev/chain=emptied")
    space.kubectl("delete", "pvc", "emptied-artifacts", "--timeout=30s")
    stalled = space.until("Stalled", "emptied", timeout=65)
    assert stalled["stages"][0]["reasonCode"] == "ArtifactMissing"
    assert not any(c["type"] == "Complete" and c["status"] == "True" for c in stalled["conditions"])


def test_a_job_that_a_deleted_chain_left_behind(world: World) -> None:
    """It is named and waited for. The next attempt takes up its artifact and trains nothing."""
    space = world.space
    world.apply("left", 1)
    world.scripts["left"] = lambda pod: plays.usual(12.0)
    world.runs("left", "left-a-a1")
    space.kubectl("delete", "mchain", "left", "--cascade=orphan")
    world.apply("left", 1)
    world.scripts["left"] = lambda pod: plays.usual(1.0)
    stage = space.until("Stalled", "left")["stages"][0]
    assert stage["reasonCode"] == "OrphanedJob" and "PyTorchJob left-a-a1" in stage["reason"]
    stage = space.until("Complete", "left")["stages"][0]
    assert [a["name"] for a in stage["attempts"] if a["state"] == "Succeeded"] == ["left-a-a2"]
    assert world.kubelet.trained[stage["inputDigest"]] == ["left-a-a1"]
    space.kubectl("delete", "pytorchjob", "left-a-a1")  # it belongs to no chain any more


@pytest.mark.parametrize("moment", ["a runs", "b runs", "complete"])
def test_a_wiped_status(world: World, moment: str) -> None:
    space, name = world.space, f"wiped-{moment.replace(' ', '-')}"
    stalls = {"a runs": ("a1",), "b runs": ("b1",)}.get(moment, ())
    world.apply(name, 2, stalls=stalls)
    if stalls:
        world.runs(name, f"{name}-{moment[0]}-a1")
    else:
        space.until("Complete", name)
    space.kubectl(
        "patch", "mchain", name, "--subresource=status", "--type=merge", "-p", '{"status": null}'
    )
    status = space.until("Complete", name)
    numbers = {int(job.rpartition("-a")[2]) for job in world.jobs(name)}
    assert numbers == ({1} if moment == "complete" else {1, 2})
    assert all(world.kubelet.finished[s["inputDigest"]] == 1 for s in status["stages"])


@pytest.mark.parametrize(
    "accepts",
    [{"tolerance": "9"}, {"onMiss": "Continue"}, {"baseline": {"b": "40"}}],
    ids=["tolerance", "Continue", "baseline"],
)
def test_a_stage_that_missed_is_accepted_without_training(world: World, accepts: Object) -> None:
    space, name = world.space, f"gated-{next(iter(accepts)).lower()}"
    world.kubelet.accuracy = lambda pod: 45.0 if pod.chain == name else None
    gate = {"metric": "top1", "tolerance": "0.5", "baseline": {"b": "50"}, "onMiss": "Stop"}
    asked = [{"name": "top1", "kind": "Retrieval", "shards": "/data/val.tar"}]
    world.apply(name, 3, **{"spec.evaluation": asked, "spec.gate": gate})
    held = space.until("Stalled", name)
    assert space.condition("Stalled", name)["reason"] == "GateMissed"
    assert held["stages"][1]["gate"]["difference"] == "-5.00"
    assert world.jobs(name) == [f"{name}-a-a1", f"{name}-b-a1"]
    space.patch(name, {"gate": gate | accepts})
    done = space.until("Complete", name)
    assert world.jobs(name) == [f"{name}-{stage}-a1" for stage in "abc"]
    assert all(world.kubelet.finished[s["inputDigest"]] == 1 for s in done["stages"])
    assert [s["artifact"] for s in done["stages"][:2]] == [
        s["artifact"] for s in held["stages"][:2]
    ]


def test_a_shared_first_stage(world: World) -> None:
    space = world.space
    claim = space.get("pvc", "data")
    space.apply(
        {k: claim[k] for k in ("apiVersion", "kind")}
        | {
            "metadata": {"name": "shared"},
            "spec": {k: claim["spec"][k] for k in ("accessModes", "resources")},
        }
    )
    shared = {
        "spec.storage": {"claimName": "shared"},
        "spec.recipe.seed": 1234,
        "spec.stages[0].rerun": "shared",
    }
    world.apply("one", 2, stalls=("a1",), **shared)
    world.runs("one", "one-a-a1")
    world.apply("two", 2, **shared | {"spec.stages[1].rerun": "mine"})
    space.wait(lambda: space.stage("a", "two").get("state") == "Queued", "two waits")
    assert space.stage("a", "two")["reason"].startswith("SharedStage: chain one ")
    assert space.condition("Reconciling", "two")["reason"] == "SharedStage"
    space.kubectl("delete", "pod", "one-a-a1-master-0")
    one, two = space.until("Complete", "one"), space.until("Complete", "two")
    assert two["stages"][0]["cache"] == "Hit" and two["stages"][0]["attempts"] == []
    assert (
        two["stages"][0]["gpuSeconds"] == 0
        and world.kubelet.finished[one["stages"][0]["inputDigest"]] == 1
    )
    space.wait(
        lambda: not [n for n in space.names("lease") if n.startswith("mchain-")],
        "its Leases are dropped",
    )


def test_a_stage_that_is_renamed_removed_and_brought_back_keeps_what_it_spent(
    world: World,
) -> None:
    """Nothing is trained again, and nothing is counted twice. The API server keeps the ledger."""
    space, name = world.space, "renamed"
    world.apply(name, 2, **{"spec.runner.nodePool": "a100"})
    world.scripts[name] = lambda pod: plays.succeed(2.0)  # timed in whole seconds
    total = space.until("Complete", name)["total"]
    assert total["gpuSeconds"] > 0
    spec = space.get("mchain", name)["spec"]
    for stages, removed in (
        ([spec["stages"][0], spec["stages"][1] | {"name": "other"}], ["b"]),
        (spec["stages"][:1], ["b"]),
        (spec["stages"], []),
    ):
        space.patch(name, {"stages": stages})
        status = world.again(name)
        assert [s["name"] for s in status.get("removed", [])] == removed
        assert status["total"] == total
    assert world.jobs(name) == [f"{name}-a-a1", f"{name}-b-a1"]
    assert status["stages"][1]["attempts"][0]["state"] == "Succeeded"


def test_a_stage_removed_while_it_runs_is_accounted_until_its_pods_have_ended(
    world: World,
) -> None:
    space, name = world.space, "shortened"
    world.apply(name, 2, stalls=("b1",), **{"spec.runner.nodePool": "a100"})
    world.runs(name, f"{name}-b-a1")
    time.sleep(2)  # pods are timed in whole seconds
    space.patch(name, {"stages": space.get("mchain", name)["spec"]["stages"][:1]})
    world.again(name)

    def ended() -> Object | None:
        [kept] = space.status(name)["removed"]
        return kept if "finishedAt" in kept["attempts"][0] else None

    kept = space.wait(ended, "the attempt of the removed stage ends")
    assert kept["name"] == "b" and kept["attempts"][0]["state"] == "Suspended"
    total = space.status(name)["total"]
    assert kept["gpuSeconds"] == kept["spent"]["gpuSeconds"] > 0
    assert total["gpuSeconds"] == pytest.approx(
        kept["gpuSeconds"] + space.stage("a", name)["gpuSeconds"]
    )


def test_a_status_of_a_newer_version_is_left_alone(world: World) -> None:
    space, name = world.space, "newer"
    world.apply(name, 1, stalls=("a1",))
    job = world.runs(name, f"{name}-a-a1")
    path = "/status/stages/0/attempts/0/runner"
    patch = json.dumps([{"op": "replace", "path": path, "value": "NewerJob"}])
    change = ("patch", "mchain", name, "--subresource=status", "--type=json", "-p")
    space.kubectl(*change, patch)
    space.patch(name, {"suspend": True})
    space.wait(
        lambda: (space.condition("Stalled", name) or {}).get("reason") == "StatusUnreadable",
        "it is told",
    )
    assert "the runner NewerJob" in (space.condition("Stalled", name) or {})["message"]
    time.sleep(3)
    assert space.get("pytorchjob", f"{name}-a-a1")["metadata"]["uid"] == job["metadata"]["uid"]
    assert space.status(name)["stages"][0]["attempts"][0]["runner"] == "NewerJob"
    space.kubectl(*change, patch.replace("NewerJob", "PyTorchJob"))
    world.again(name, "Suspended")


# -- the budget ------------------------------------------------------------------------------------

GPUS, LOOK, GRACE = 8, 5, 120  # of the pool a100 and of the operator, in seconds


@pytest.mark.parametrize("operators", [1, 2])
def test_a_stage_is_stopped_at_a_checkpoint_when_the_budget_is_used_up(
    world: World, control_plane: ControlPlane, tmp_path: Path, operators: int
) -> None:
    """At most one look and the grace are spent beyond the limit. A raised limit goes on from the
    checkpoint. A second operator beside the first changes nothing.
    """
    name = f"budget{operators}"
    with contextlib.ExitStack() as others:
        for number in range(1, operators):
            namespaces = (world.space.namespace,)
            other = Operator(control_plane.kubeconfig, tmp_path, namespaces, name=f"other{number}")
            others.enter_context(other)
        world.apply(name, 2, stalls=("b1",), **{"spec.runner.nodePool": "a100"})
        world.runs(name, f"{name}-b-a1")
        limit = world.space.status(name)["total"]["gpuSeconds"] + 8 * GPUS
        world.space.patch(name, {"budget": {"gpuHours": f"{limit / 3600:.6f}"}})
        status = world.again(name, "Stalled")
        b = status["stages"][1]
        assert (b["reasonCode"], b["retries"], b["disruptions"]) == ("BudgetExceeded", 0, 0)
        assert [a["state"] for a in b["attempts"]] == ["Suspended"]
        assert b["attempts"][0]["checkpointStep"] == 3900, "it was stopped at a checkpoint"
        spent = status["total"]["gpuSeconds"]
        assert limit - 0.01 <= spent <= limit + (LOOK + GRACE) * GPUS
        assert world.jobs(name) == [f"{name}-a-a1"]
        world.space.patch(name, {"budget": {"gpuHours": "1"}})
        b = world.again(name)["stages"][1]
    assert [a["state"] for a in b["attempts"]] == ["Suspended", "Succeeded"]
    assert world.kubelet.trained[b["inputDigest"]] == [f"{name}-b-a1", f"{name}-b-a2"]


def test_a_budget_of_money_needs_prices(world: World) -> None:
    world.apply("unpriced", 1, **{"spec.budget": {"cost": "100"}})
    status = world.again("unpriced", "Stalled")
    assert status["stages"][0]["reasonCode"] == "NoPrice" and not world.jobs("unpriced")
    world.space.patch("unpriced", {"budget": None})
    assert [a["state"] for a in world.again("unpriced")["stages"][0]["attempts"]] == ["Succeeded"]


# -- the queue -------------------------------------------------------------------------------------


def test_a_queue_evicts_and_starts_again(world: World) -> None:
    """Kueue, played by hand: the label comes with the release; an eviction is no attempt and
    charges no budget.
    """
    space, job = world.space, "waits-a-a1"
    runner = {"queueName": "vision", "priorityClass": "high", "nodePool": "a100"}
    world.apply("waits", 1, **{f"spec.runner.{k}": v for k, v in runner.items()})
    runs: list[str] = []

    def script(pod: Pod) -> Play:
        runs.append(pod.uid)
        return plays.stall() if len(runs) == 1 else plays.succeed(2)

    world.scripts["waits"] = script

    def suspend(value: bool) -> None:
        change = json.dumps({"spec": {"runPolicy": {"suspend": value}}})
        space.kubectl("patch", "pytorchjob", job, "--type=merge", "-p", change)

    space.wait(lambda: space.stage("a", "waits").get("state") == "Queued", "it is queued")
    made = space.get("pytorchjob", job)
    assert (
        made["metadata"]["labels"][QUEUE] == "vision"
        and made["spec"]["runPolicy"]["suspend"] is True
    )
    assert (
        "waits for its turn in queue vision; look: kubectl get workloads"
        in space.stage("a", "waits")["reason"]
    )
    suspend(False)
    world.runs("waits", job)
    time.sleep(2)  # pods are timed in whole seconds
    suspend(True)
    space.wait(lambda: space.stage("a", "waits").get("state") == "Queued", "it is queued again")
    assert space.list("pods", "modelchain.dev/chain=waits,modelchain.dev/role=train") == []
    held = space.stage("a", "waits")["gpuSeconds"]
    suspend(False)
    stage = space.until("Complete", "waits")["stages"][0]
    assert [a["name"] for a in stage["attempts"]] == [job] and (
        stage["retries"],
        stage["disruptions"],
    ) == (0, 0)
    assert (
        space.get("pytorchjob", job)["metadata"]["uid"] == made["metadata"]["uid"]
        and len(runs) == 2
    )
    assert stage["gpuSeconds"] > held > 0


# -- the end ---------------------------------------------------------------------------------------


def test_nothing_is_written_while_nothing_changes(world: World) -> None:
    """Of chains that are complete, stalled, running without progress: two looks at trainers
    long. Once a minute GPU time is accounted where pods hold GPUs, and nothing else changes then.
    """
    space = world.space
    world.apply("still", 1, stalls=("a1",))
    world.runs("still", "still-a-a1")
    space.wait(
        lambda: space.status("still")["summary"]["progress"] == "50%", "the step at which it stalls"
    )
    space.at_rest("still", 6)
    before = {m["metadata"]["name"]: m for m in space.list("mchain")}
    time.sleep(12)
    for after in space.list("mchain"):
        known = before.pop(after["metadata"]["name"])
        if after["metadata"]["name"] == "still":
            known, after = (without_amounts(m["status"]) for m in (known, after))
        assert known == after
    assert not before
    space.patch("still", {"suspend": True})


AMOUNTS = {"gpuSeconds", "gpuMilliseconds", "cost", "accountedAt", "priced"}


def without_amounts(part: Any) -> Any:
    """A part of a status without the amounts that are accounted as time passes."""
    if isinstance(part, dict):
        return {k: without_amounts(value) for k, value in part.items() if k not in AMOUNTS}
    return [without_amounts(one) for one in part] if isinstance(part, list) else part


def test_the_namespace_is_deleted(control_plane: ControlPlane, tmp_path: Path) -> None:
    with fresh_namespace(control_plane) as namespace, Kubelet(control_plane.kubeconfig) as kubelet:
        space = Space(control_plane, namespace)
        kubelet.script = lambda pod: plays.stall()
        with Operator(control_plane.kubeconfig, tmp_path, (namespace,)) as operator:
            space.apply(chain())
            space.wait(lambda: space.stage("a").get("progress"), "it runs")
            control_plane.kubectl("delete", "namespace", namespace, "--timeout=60s")
            time.sleep(3)
            assert operator.alive()
            said = [
                line
                for line in operator.said().splitlines()
                if "WARNING" in line or "ERROR" in line
            ]
            assert (
                len([line for line in said if "again in" in line]) <= 3
                and "Traceback" not in operator.said()
            ), said
