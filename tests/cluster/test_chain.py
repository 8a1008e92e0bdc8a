"""A chain from `kubectl apply` to Complete, on a real control plane: by the real training-operator,
and by plain Jobs, a second runner.
"""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
from controlplane import ControlPlane
from kubelet import Kubelet
from plays import preempt
from prometheus_client.parser import text_string_to_metric_families
from recorder import Recorder
from rig import Object, Operator, Space, chain

PLAIN_JOBS = str(Path(__file__).parents[1] / "operator" / "plainjob.py")
# The kind of the jobs, and what Python is told to run for an operator that makes them.
both = pytest.mark.parametrize(
    ("jobs", "program"),
    [("pytorchjobs", ("-m", "modelchain_operator")), ("jobs", (PLAIN_JOBS,))],
    ids=["PyTorchJob", "PlainJob"],
)


def trainers(space: Space, kind: str) -> list[str]:
    """The jobs of attempts. The index Job may be of the same kind."""
    found = space.list(kind, "modelchain.dev/role=train")
    return sorted(job["metadata"]["name"] for job in found)


@both
def test_three_stages_in_order(
    control_plane: ControlPlane,
    namespace: str,
    tmp_path: Path,
    jobs: str,
    program: tuple[str, ...],
) -> None:
    space = Space(control_plane, namespace)
    with (
        Kubelet(control_plane.kubeconfig) as kubelet,
        Operator(control_plane.kubeconfig, tmp_path, (namespace,), program=program),
        Recorder(control_plane.etcd) as recorder,
    ):
        space.apply(chain())
        status = space.until("Complete")
        assert [s["state"] for s in status["stages"]] == ["Succeeded"] * 3
        assert trainers(space, jobs) == ["family-a-a1", "family-b-a1", "family-c-a1"]
        assert len(space.list("sart")) == 3 and len(kubelet.trained) == 3
        recorder.verify()
        uid = space.get("mchain", "family")["metadata"]["uid"]
        found = recorder.history.jobs_of[uid].values()
        assert [f"/{jobs}/" in job.key for job in found if job.released] == [True] * 3
        assert [job.predecessor is not None for job in found] == [False, True, True]


Series = dict[tuple[str, str, str], float]  # by metric, stage, and what else there is


def scrape(operator: Operator) -> Series:
    """What an operator says of chains; empty while it does not answer."""
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{operator.metrics_port}/metrics", timeout=5
        ) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    except OSError:
        return {}
    samples = [sample for family in families for sample in family.samples]
    rest = ("source", "state", "class", "condition", "currency", "use")
    return {
        (
            s.name,
            s.labels.get("stage", ""),
            " ".join(s.labels[name] for name in rest if name in s.labels),
        ): s.value
        for s in samples
        if s.labels.get("chain") == "family"
    }


def agrees(series: Series, status: Object) -> bool:
    """Every number is that of the status."""
    for stage in status["stages"]:
        cost = ("modelchain_stage_cost_total", stage["name"], "trained USD")
        for at, value in (
            (("modelchain_stage_macs_total", stage["name"], "trained"), stage["macs"]),
            (("modelchain_stage_planned_macs", stage["name"], ""), stage["plannedMacs"]),
            (cost, float(stage["cost"])),
        ):
            if series.get(at) != value:
                return False
        for use in ("startup", "productive", "evaluating", "stalled", "lost"):
            time = stage.get("gpuMilliseconds", {}).get(use, 0) / 1000
            metric = "modelchain_stage_gpu_seconds_total"
            if series.get((metric, stage["name"], f"trained {use}")) != time:
                return False
    return True


@both
def test_what_is_scraped_is_the_status_before_and_after_a_restart(
    control_plane: ControlPlane,
    namespace: str,
    tmp_path: Path,
    jobs: str,
    program: tuple[str, ...],
) -> None:
    space = Space(control_plane, namespace)
    script = lambda pod: preempt() if (pod.stage, pod.attempt) == ("b", 1) else None  # noqa: E731
    with (
        Kubelet(control_plane.kubeconfig, script=script),
        Operator(control_plane.kubeconfig, tmp_path, (namespace,), program=program) as operator,
    ):
        space.apply(chain(spec__runner__nodePool="a100"))
        status = space.until("Complete")
        series = space.wait(
            lambda: agrees(found := scrape(operator), status) and found,
            "the status in a scrape",
            30,
        )
        assert status["total"]["gpuSeconds"] > 0 and float(status["total"]["cost"]) > 0
        assert series["modelchain_stage_retries_total", "b", "Preempted"] == 1
        assert [s for s in status["stages"] if s.get("transitionSeconds") is not None] == status[
            "stages"
        ][1:]
        assert (
            series["modelchain_stages", "", "Succeeded"] == 3
            and series["modelchain_condition", "", "Complete"] == 1
        )
        operator.kill()
        operator.start()
        again = space.wait(lambda: scrape(operator), "an answer", 30)
        assert again == series
        names = ["family-a-a1", "family-b-a1", "family-b-a2", "family-c-a1"]
        assert trainers(space, jobs) == names
        space.kubectl("delete", "mchain", "family")
