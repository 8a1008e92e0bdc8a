"""Evaluations that are added to a finished chain, on a real control plane."""

from __future__ import annotations

from pathlib import Path

import plays
from controlplane import ControlPlane
from kubelet import Kubelet
from playedpod import Pod
from plays import Play
from recorder import Recorder
from rig import Object, Operator, Space, chain

from modelchain.api.contracts import FailureClass

FOOD = {"name": "food", "kind": "Retrieval", "shards": "/data/food.tar"}
CARS = {"name": "cars", "kind": "Retrieval", "shards": "/data/cars.tar"}
OF_EVALUATION = "modelchain.dev/role=evaluate"


def fails() -> Play:
    async def play(pod: Pod) -> None:
        await pod.start(0)
        await pod.exit(2, pod.failure(FailureClass.USER_ERROR, "there is no such file"))

    return play


def test_an_added_evaluation_is_measured_once_and_shared(
    control_plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    """The operator is killed while a Job runs, another one fails, and a chain finds the metric."""
    space = Space(control_plane, namespace)
    ran: list[str] = []
    failing = {"cars"}

    def script(pod: Pod) -> Play | None:
        if pod.role != "evaluate":
            return None
        asked = next(name for name in ("food", "cars") if f'"names":["{name}"]' in task(pod))
        ran.append(f"{pod.stage} {asked}")
        return fails() if asked in failing else plays.evaluate(1.0)

    def measured(name: str) -> Object | None:
        found = space.condition("Measured", name)
        return found if found and found["status"] == "True" else None

    shared = {"spec.storage": {"claimName": "data"}, "spec.evaluation": [FOOD]}
    with (
        Kubelet(control_plane.kubeconfig) as kubelet,
        Recorder(control_plane.etcd) as recorder,
        Operator(control_plane.kubeconfig, tmp_path, (namespace,)) as operator,
    ):
        kubelet.script = script
        space.apply(chain("family", 2, **{"spec.storage": {"claimName": "data"}}))
        space.until("Measured")
        space.patch("family", {"evaluation": [FOOD]})
        space.wait(lambda: ran, "a pod measures")
        assert space.status()["summary"]["state"] == "Complete"
        operator.kill()
        operator.start()
        space.wait(lambda: "food" in space.stage("b").get("results", {}), "all are measured")
        assert measured("family") and ran == ["a food", "b food"]
        space.wait(lambda: not space.list("jobs", OF_EVALUATION), "the Jobs are deleted")
        records = {r["spec"]["stage"]: r for r in space.list("sart")}
        for stage, record in records.items():
            (later,) = record["status"]["metrics"].values()
            assert later["metrics"]["food"] == space.stage(stage)["results"]["food"]
            name, shown = record["metadata"]["name"], later["metrics"]["food"]
            head, row = space.kubectl("get", "sart", name).splitlines()
            assert row[head.index("LATER") :].split()[0] == shown, "training measured nothing"
            assert row[head.index("ACCURACY") : head.index("LATER")].strip() == ""

        space.apply(chain("other", 2, **shared))
        space.until("Complete", "other")
        assert measured("other") and len(ran) == 2, "the records have it"

        space.patch("other", {"evaluation": [FOOD, CARS]})
        failed = space.wait(
            lambda: (
                found
                if (found := space.condition("Measured", "other"))
                and found["reason"] == "MeasureFailed"
                else None
            ),
            "the failure is told",
        )
        assert "UserError: there is no such file" in failed["message"]
        space.wait(lambda: ran[2:] == ["a cars", "b cars"], "each is tried once")
        assert space.condition("Complete", "other")["status"] == "True"
        failing.clear()
        space.patch("other", annotations={"modelchain.dev/retry": "1"})
        space.wait(lambda: measured("other"), "a retry measures them")
        assert ran[4:] == ["a cars", "b cars"]
        assert {"food", "cars"} <= set(space.stage("a", "other")["results"])
        assert space.names("pytorchjobs") == ["family-a-a1", "family-b-a1"]
        recorder.verify()


def task(pod: Pod) -> str:
    return pod.env["MODELCHAIN_TASK"]
