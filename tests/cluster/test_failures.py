"""The failure matrix: what may befall a stage, a chain each, all at once; who is charged, what is
said, how it ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import plays
import pytest
from controlplane import ControlPlane
from kubelet import Kubelet
from playedpod import Pod
from plays import Play
from recorder import Recorder
from rig import CONFIG, Object, Operator, Space, apply_all, chain, fresh_namespace

Script = Callable[[Pod], Play | None]

# Nodes by pool; no node has the label of "none".
NODES = {"main": 4, "lossy": 3, "narrow": 1}
CPU = {"main": "1", "lossy": "1", "narrow": "40", "none": "1"}  # a node has 64
PRICE = {"perGpuHour": "3600", "currency": "USD", "source": "a dollar a GPU second, for the tests"}
POOL = {"gpu": "A100", "gpusPerNode": 1, "graceSeconds": 30, "price": PRICE}
SETTINGS = CONFIG | {
    "nodePools": {
        name: POOL | {"nodeSelector": {"pool": name}, "cpu": cpu} for name, cpu in CPU.items()
    }
}


@dataclass(frozen=True)
class Case:
    """A chain whose stage "a", or the last one, is in trouble, and what is to become of that stage.

    `says` is in the message of the first attempt's failure, `ends` in the condition's where the
    chain fails.
    """

    script: Script = lambda pod: None
    changes: Object = field(default_factory=dict)
    stages: int = 1
    failures: tuple[str, ...] = ()
    retries: int = 0
    disruptions: int = 0
    says: str = ""
    ends: str = ""


def first(play: Play) -> Script:
    """The first attempt is played so, every other pod as usual."""
    return lambda pod: play if pod.attempt == 1 and pod.role == "train" else None


def always(play: Play) -> Script:
    return lambda pod: play if pod.role == "train" else None


def preempted_at_once() -> Play:
    async def play(pod: Pod) -> None:
        await pod.start()
        await pod.disrupt("PreemptionByScheduler", "default-scheduler: preempting")

    return play


def exits(code: int) -> Play:
    """Without a last word, and without any work done."""

    async def play(pod: Pod) -> None:
        await pod.start()
        await pod.exit(code)

    return play


def deadlines(**seconds: int) -> Object:
    return {"spec.deadlines": {f"{name}Seconds": value for name, value in seconds.items()}}


def pool(name: str, nodes: int = 1) -> Object:
    return {
        "spec.runner.nodePool": name,
        "spec.stages[0].resources": {"nodes": nodes},
        "spec.recipe.globalBatchSize": 6,
    }


def allowed(**counts: int) -> Object:
    return {"spec.retry": counts}


UNREACHABLE = plays.waiting(
    "ImagePullBackOff", 'Back-off pulling image "trainer": ErrImagePull: dial tcp: i/o timeout'
)

ALONE: dict[str, Case] = {
    "user-error": Case(
        always(plays.user_error()),
        stages=2,
        failures=("UserError",),
        retries=1,
        says="warmupSteps is not below",
        ends="stage a: UserError: warmupSteps is not below .*;"
        " next: kubectl edit mchain user-error -n ",
    ),
    "corrupt": Case(
        lambda pod: plays.corrupt_predecessor() if pod.stage == "b" else None,
        stages=2,
        failures=("CorruptPredecessor",),
        retries=1,
        says="the predecessor's weights",
        ends="stage b: CorruptPredecessor: .*; next: modelchain retry corrupt -n ",
    ),
    "oom": Case(
        first(plays.oom()),
        failures=("OutOfMemory",),
        retries=1,
        says="pod oom-a-a1-master-0 on node .* ran out of memory .*raise memory of the node pool",
    ),
    "oom-again": Case(
        always(plays.oom()),
        allowed(maxRetries=1),
        failures=("OutOfMemory",) * 2,
        retries=2,
        says="ran out of memory",
        ends=r"1 retry is allowed \(spec.retry.maxRetries\);"
        " next: kubectl edit mchain oom-again -n ",
    ),
    "nan": Case(
        first(plays.nan()),
        failures=("NonFinite",),
        retries=1,
        says="pod nan-a-a1-master-0 on node .*: the loss is nan",
    ),
    "full": Case(
        first(plays.volume_full()),
        failures=("VolumeFull",),
        retries=1,
        says="No space left on device",
    ),
    "preempted": Case(
        first(plays.preempt()),
        failures=("Preempted",),
        disruptions=1,
        says="pod preempted-a-a1-master-0 on node .* was preempted by a pod of higher priority",
    ),
    "preempted-again": Case(
        always(plays.preempt()),
        allowed(maxDisruptions=1),
        failures=("Preempted",) * 2,
        retries=1,
        disruptions=2,
        says="higher priority",
        ends=r"higher priority; 1 disruption is allowed \(spec.retry.maxDisruptions\); next:",
    ),
    "preempted-idle": Case(
        always(preempted_at_once()),
        allowed(maxRetries=0),
        failures=("Preempted",),
        retries=1,
        disruptions=1,
        says="higher priority",
        ends=r"higher priority; 0 retries are allowed \(spec.retry.maxRetries\); next:",
    ),
    "evicted": Case(
        first(plays.evict()),
        failures=("Preempted",),
        disruptions=1,
        says=(
            "was evicted by its node: The node was low on resource: ephemeral-storage.*; raise"
            " ephemeralStorage"
        ),
    ),
    "killed": Case(
        first(plays.killed()),
        failures=("Unknown",),
        retries=1,
        disruptions=1,
        says=(
            r"left no last word, exit code 137 \(killed\); see: kubectl logs"
            r" killed-a-a1-master-0 -n"
        ),
    ),
    "no-image": Case(
        always(plays.image_error()),
        allowed(maxRetries=0),
        failures=("Image",),
        retries=1,
        says="there is no image example.com/trainer@.*; correct runner.image",
        ends="0 retries are allowed",
    ),
    "bad-image": Case(
        first(plays.image_error("InvalidImageName")),
        failures=("Image",),
        retries=1,
        says="is no image name; correct runner.image",
    ),
    "registry": Case(
        first(UNREACHABLE),
        deadlines(start=3),
        failures=("Image",),
        retries=1,
        says=(
            r"cannot be pulled: dial tcp: i/o timeout; given up after 3 s"
            r" \(spec.deadlines.startSeconds\)"
        ),
    ),
    "init": Case(
        lambda pod: plays.init_error() if pod.attempt == 1 and pod.rank == 1 else None,
        pool("main", 2),
        failures=("Init",),
        retries=1,
        disruptions=1,
        says=(
            "init container init-pytorch of pod init-a-a1-worker-0 on node .* failed with exit code"
            " 1.*kubectl logs"
        ),
    ),
    "start": Case(
        first(plays.hang()),
        deadlines(start=3),
        failures=("StartDeadline",),
        retries=1,
        disruptions=1,
        says=r"no first step within 3 s \(spec.deadlines.startSeconds\)",
    ),
    "half": Case(
        changes=pool("narrow", 2) | deadlines(start=3) | allowed(maxRetries=0),
        failures=("StartDeadline",),
        retries=1,
        disruptions=1,
        says=(
            "no first step within 3 s .*: Unschedulable: 1 of 2 pods run, half-a-a1-.* waits:"
            " .*Insufficient cpu"
        ),
        ends="0 retries are allowed",
    ),
    "stall": Case(
        first(plays.stall()),
        deadlines(stall=6),
        failures=("StallDeadline",),
        retries=1,
        says=r"no step after 166660 for 6 s \(spec.deadlines.stallSeconds\)",
    ),
    "too-long": Case(
        always(plays.stall()),
        deadlines(stage=6),
        failures=("StageDeadline",),
        retries=1,
        says="has run for 6 s; raise spec.deadlines.stageSeconds to go on",
        ends="raise spec.deadlines.stageSeconds",
    ),
    "lost-word": Case(first(plays.lost_message()), stages=2),
    "no-artifact": Case(
        first(exits(0)),
        failures=("NoArtifact",),
        retries=1,
        says="the volume holds no artifact of these inputs",
    ),
}

# What the tests have a hand in.
PROMPTED: dict[str, Case] = {
    "silent": Case(lambda pod: exits(1) if pod.role == "verify" else plays.lost_message()),
    "nowhere": Case(changes=pool("none") | deadlines(start=1)),
    "job-gone": Case(first(plays.stall())),
    "pod-gone": Case(first(plays.stall())),
    "stuck": Case(first(plays.stuck())),
    "node-gone": Case(first(plays.stall()), pool("lossy", 3)),
}
CASES = ALONE | PROMPTED


class Matrix:
    """The chains, applied and on their way, and who plays their pods."""

    def __init__(self, space: Space, kubelet: Kubelet, recorder: Recorder):
        self.space, self.kubelet, self.recorder = space, kubelet, recorder

    def begin(self) -> None:
        """Apply all, and do at once what takes longest to be noticed."""
        base = {"spec.runner.nodePool": "main", "spec.recipe.globalBatchSize": 6}
        things = [
            chain(name, case.stages, **(base | {"spec.recipe.seed": seed} | case.changes))
            for seed, (name, case) in enumerate(CASES.items())
        ]
        apply_all(self.space, things)
        for name in ("stuck", "node-gone", "job-gone", "pod-gone"):
            self.space.wait(
                lambda name=name: self.space.stage("a", name).get("state") == "Running",
                f"{name} runs",
            )
        self.space.kubectl(
            "delete", "pod", "stuck-a-a1-master-0", "--wait=false", "--grace-period=1"
        )
        self.space.wait(
            lambda: "waits until pod stuck-a" in self.space.stage("a", "stuck")["reason"],
            "it says so",
        )
        silent = "node-gone-a-a1-worker-0"  # a stage runs with its master: workers may come later
        self.lost = self.space.wait(
            lambda: self.space.get("pod", silent)["spec"].get("nodeName"), "its worker is placed"
        )
        self.kubelet.lose_node(self.lost)
        self.space.kubectl("delete", "pytorchjob", "job-gone-a-a1", "--wait=false")
        self.space.kubectl("delete", "pod", "pod-gone-a-a1-master-0", "--wait=false")
        self.space.wait(
            lambda: "deletionTimestamp" in self.space.get("pod", silent)["metadata"],
            "it is evicted",
        )
        self.space.kubectl(
            "delete", "pod", silent, "--wait=false", "--grace-period=1"
        )  # shorter than its own

    def events(self, name: str) -> list[tuple[str, str, str]]:
        found = self.space.list("events")
        return [
            (e["type"], e["reason"], e["message"])
            for e in found
            if e["involvedObject"]["name"] == name
        ]


@pytest.fixture(scope="module")
def matrix(
    control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Matrix]:
    directory = tmp_path_factory.mktemp("failures")
    with (
        fresh_namespace(control_plane) as namespace,
        Kubelet(
            control_plane.kubeconfig,
            sum(NODES.values()),
            script=lambda pod: CASES[str(pod.chain)].script(pod),
        ) as kubelet,
        Recorder(control_plane.etcd) as recorder,
    ):
        names = iter(kubelet.nodes)
        for label, count in NODES.items():
            control_plane.kubectl(
                "label", "nodes", *(next(names) for _ in range(count)), f"pool={label}"
            )
        space = Space(control_plane, namespace)
        with Operator(control_plane.kubeconfig, directory, (namespace,), settings=SETTINGS):
            matrix = Matrix(space, kubelet, recorder)
            matrix.begin()
            yield matrix
        recorder.verify()


@pytest.mark.parametrize("name", ALONE)
def test_what_befalls_a_stage(matrix: Matrix, name: str) -> None:
    case = ALONE[name]
    status = matrix.space.until("Finished", name)
    stage = status["stages"][-1 if name == "corrupt" else 0]
    failed = [a for a in stage["attempts"] if a["state"] == "Failed"]
    assert [a["failure"] for a in failed] == list(case.failures)
    assert (stage["retries"], stage["disruptions"]) == (case.retries, case.disruptions)
    if failed:
        assert matches(case.says, failed[0]["message"])
    news = matrix.events(name)
    if case.ends:
        said = {c["type"]: c for c in status["conditions"]}
        assert (
            said["Failed"]["status"] == said["Stalled"]["status"] == "True"
            and "Reconciling" not in said
        )
        assert said["Stalled"]["reason"] == case.failures[-1]
        assert matches(case.ends, said["Failed"]["message"]), said["Failed"]["message"]
        assert any(kind == "Warning" and reason == "StageFailed" for kind, reason, _ in news)
    else:
        assert {s["state"] for s in status["stages"]} == {"Succeeded"}
        assert any(reason == "StageSucceeded" for _, reason, _ in news)
    for attempt in failed[: None if not case.ends else -1]:
        kinds = (
            {"Warning" if case.retries else "Normal"} if not case.ends else {"Warning", "Normal"}
        )
        retried = [
            text for kind, reason, text in news if kind in kinds and reason == "StageRetrying"
        ]
        assert any(attempt["message"] in text for text in retried), news
    spent = sum(a["gpuSeconds"] for s in status["stages"] for a in s["attempts"])
    assert status["total"]["gpuSeconds"] == pytest.approx(spent, abs=0.01)
    assert float(status["total"].get("cost", 0)) == pytest.approx(spent, abs=0.1)


def test_a_lost_word_costs_no_training(matrix: Matrix) -> None:
    status = matrix.space.until("Complete", "lost-word")
    assert [len(s["attempts"]) for s in status["stages"]] == [1, 1]
    digest = status["stages"][0]["inputDigest"]
    assert matrix.kubelet.finished[digest] == 1
    matrix.space.get("jobs", "lost-word-a-a1-verify")
    absent = matrix.space.until("Complete", "no-artifact")["stages"][0]
    assert [a["state"] for a in absent["attempts"]] == ["Failed", "Succeeded"]


def test_verify_without_an_answer_is_asked_again(matrix: Matrix) -> None:
    space = matrix.space
    stalled = space.until("Stalled", "silent")["conditions"][0]
    assert (
        stalled["reason"] == "VerifyUnanswered" and "nothing is trained again" in stalled["message"]
    )
    PROMPTED["silent"] = CASES["silent"] = Case()  # verify can be answered now
    before = space.get("jobs", "silent-a-a1-verify")["metadata"]["uid"]
    space.patch("silent", annotations={"modelchain.dev/retry": "1"})
    stage = space.until("Complete", "silent")["stages"][0]
    assert space.get("jobs", "silent-a-a1-verify")["metadata"]["uid"] != before
    assert [a["state"] for a in stage["attempts"]] == ["Succeeded"] and stage["retries"] == 0


def test_no_deadline_runs_in_a_queue(matrix: Matrix) -> None:
    space = matrix.space
    space.wait(lambda: space.stage("a", "nowhere")["state"] == "Queued", "queued")
    stage = space.stage("a", "nowhere")
    assert matches(
        "Unschedulable: nowhere-a-a1-master-0 waits: .*; see: kubectl describe pod nowhere",
        stage["reason"],
    )
    reconciling = space.condition("Reconciling", "nowhere")
    assert reconciling and reconciling["reason"] == "Unschedulable"
    space.cluster.kubectl("label", "node", matrix.kubelet.nodes[0], "pool=none", "--overwrite")
    stage = space.until("Complete", "nowhere")["stages"][0]
    assert len(stage["attempts"]) == 1 and (stage["retries"], stage["disruptions"]) == (0, 0)


@pytest.mark.parametrize(
    ("name", "says"), [("job-gone", "its job job-gone-a-a1"), ("pod-gone", "pod .* on node .*")]
)
def test_deleted_by_hand(matrix: Matrix, name: str, says: str) -> None:
    stage = matrix.space.until("Complete", name)["stages"][0]
    first, second = stage["attempts"]
    assert (first["failure"], first["checkpointStep"] > 0, second["state"]) == (
        "Preempted",
        True,
        "Succeeded",
    )
    assert matches(f"{says} was deleted", first["message"])
    assert (stage["retries"], stage["disruptions"]) == (0, 1)


def test_a_pod_that_does_not_end(matrix: Matrix) -> None:
    space, pod = matrix.space, "stuck-a-a1-master-0"
    stalled = space.until("Stalled", "stuck", 90)["conditions"][0]
    force = f"kubectl delete pod {pod} -n {space.namespace} --force --grace-period=0"
    assert stalled["reason"] == "NodeLost" and force in stalled["message"]
    assert len(space.stage("a", "stuck")["attempts"]) == 1
    space.kubectl(*force.split()[1:3], pod, "--force", "--grace-period=0")
    stage = space.until("Complete", "stuck")["stages"][0]
    assert len(stage["attempts"]) == 2 and stage["disruptions"] == 1


def test_a_node_that_is_lost(matrix: Matrix) -> None:
    """One of three: nothing is launched while its pod may still train; with the node's object the
    pod goes.
    """
    space = matrix.space
    stalled = space.until("Stalled", "node-gone", 120)["conditions"][0]
    assert stalled["reason"] == "NodeLost" and matrix.lost in stalled["message"]
    assert len(space.stage("a", "node-gone")["attempts"]) == 1
    space.cluster.kubectl("delete", "node", matrix.lost)
    space.cluster.kubectl("label", "node", matrix.kubelet.nodes[1], "pool=lossy", "--overwrite")
    stage = space.until("Complete", "node-gone", 90)["stages"][0]
    first, second = stage["attempts"]
    assert (first["failure"], second["state"]) == ("NodeLost", "Succeeded")
    assert (stage["retries"], stage["disruptions"]) == (0, 1) and first["gpuSeconds"] > second[
        "gpuSeconds"
    ]


def matches(pattern: str, text: str) -> bool:
    """Somewhere in it."""
    assert re.search(pattern, text), text
    return True
