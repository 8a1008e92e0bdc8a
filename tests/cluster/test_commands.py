"""`modelchain get|watch|logs|status|explain|suspend|resume|retry` against a real control plane and
a running operator. Pods are played, and so is what they print: the API server gets their logs from
the stand-in kubelet.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import plays
import pytest
from build import find_or_build
from commandline import modelchain
from controlplane import ControlPlane
from kubelet import Kubelet
from playedpod import Pod
from rig import CONFIG, IMAGE, Operator, Space, chain

from modelchain.api.contracts import FailureClass

MODELCHAIN = str(Path(sys.executable).with_name("modelchain"))
NOWHERE = {"gpu": "CPU", "gpusPerNode": 0, "nodeSelector": {"example.com/kind": "none"}}
SETTINGS = {**CONFIG, "nodePools": {**CONFIG["nodePools"], "nowhere": NOWHERE}}
ONCE = {"maxRetries": 0, "maxDisruptions": 0}


@pytest.fixture(scope="module")
def kubelet(control_plane: ControlPlane) -> Iterator[Kubelet]:
    certificate = control_plane.authority.server("kubelet", "IP:127.0.0.1")
    with Kubelet(control_plane.kubeconfig, certificate=certificate) as kubelet:
        yield kubelet


@pytest.fixture(scope="module")
def operator(
    control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operator]:
    """With a Lease, which is how a user's machine sees whether it lives."""
    directory = tmp_path_factory.mktemp("operator")
    with Operator(
        control_plane.kubeconfig, directory, leader_election=True, settings=SETTINGS
    ) as operator:
        yield operator
        operator.stop()  # the Lease is given back


class Cli:
    """The command line, in the test's namespace."""

    def __init__(self, space: Space):
        self.space = space

    def ended(self, *words: str) -> subprocess.CompletedProcess[str]:
        done = modelchain(*words, f"--kubeconfig={self.space.cluster.kubeconfig}")
        assert "Traceback" not in done.stderr
        return done

    def __call__(self, command: str, *words: str) -> str:
        done = self.ended(command, *words, "-n", self.space.namespace)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refused(self, *words: str, code: int) -> str:
        """The one line of an error."""
        done = self.ended(*words)
        assert done.returncode == code and done.stdout == "" and done.stderr.count("\n") == 1, done
        return done.stderr

    def uid(self, name: str) -> str:
        return str(self.space.get("mchain", name)["metadata"]["uid"])

    @contextmanager
    def begun(self, command: str, *words: str) -> Iterator[subprocess.Popen[str]]:
        """A command that goes on until the test, or what it follows, ends it."""
        line = [MODELCHAIN, command, *words, "-n", self.space.namespace]
        line.append(f"--kubeconfig={self.space.cluster.kubeconfig}")
        pipe = subprocess.PIPE
        with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def explain(self, reason: str) -> dict[str, Any]:
        """The explanation, once it has this reason."""

        def found() -> dict[str, Any] | None:
            answer = json.loads(self("explain", "family", "-o", "json"))
            return answer if answer["reason"] == reason else None

        return self.space.wait(found, f"explained as {reason}")


@pytest.fixture
def cli(
    control_plane: ControlPlane, kubelet: Kubelet, operator: Operator, namespace: str
) -> Iterator[Cli]:
    yield Cli(Space(control_plane, namespace))
    kubelet.script = lambda pod: None
    assert kubelet.logs is not None
    kubelet.logs.cut = None


def test_no_node_takes_it(cli: Cli) -> None:
    cli.space.apply(chain(spec__runner={"image": IMAGE, "nodePool": "nowhere"}))
    found = cli.explain("Unschedulable")
    assert "nodes are available" in found["cause"]
    assert found["next"] == f"kubectl describe pod family-a-a1-master-0 -n {cli.space.namespace}"
    assert {e["object"] for e in found["evidence"]} == {"pod/family-a-a1-master-0"}
    cli.space.kubectl(*found["next"].split()[1:-2])
    text = cli("explain", "family")
    assert text.splitlines()[-1] == found["next"] and text.splitlines()[-2] == ""
    # `explain` reads the pod itself, and may know it before the status does.
    cli.space.wait(lambda: "Unschedulable" in cli("get", "family"), "Unschedulable in the list")


def test_an_image_that_cannot_be_pulled(cli: Cli, kubelet: Kubelet) -> None:
    kubelet.script = lambda pod: plays.waiting("ImagePullBackOff", "401 Unauthorized")
    cli.space.apply(chain())
    found = cli.explain("Image")
    assert "cannot be pulled: 401 Unauthorized" in found["cause"]


def test_a_claim_that_is_not_there(cli: Cli) -> None:
    cli.space.apply(chain(spec__data__volume={"claimName": "nothing"}))
    found = cli.explain("ClaimMissing")
    assert found["cause"].startswith("Claim nothing is missing")


def test_a_queue_without_kueue(cli: Cli) -> None:
    cli.space.apply(chain(spec__runner={"image": IMAGE, "nodePool": "cpu", "queueName": "vision"}))
    assert "Kueue is not installed" in cli.explain("KueueMissing")["cause"]


def test_suspend_and_resume(cli: Cli, kubelet: Kubelet) -> None:
    namespace = cli.space.namespace
    kubelet.script = lambda pod: plays.stall()
    cli.space.apply(chain())
    running = cli.explain("Running")
    assert running["next"] == f"kubectl logs -f family-a-a1-master-0 -n {namespace}"
    cli.space.wait(lambda: "50%" in cli.explain("Running")["cause"], "the step at which it stalls")
    assert "50%" in cli("get", "family")
    said = cli("suspend", "family")
    assert said == (
        "family is suspended: stage a writes a checkpoint and stops, and nothing else is started; "
        f"watch: modelchain watch family -n {namespace}\n"
    )
    assert cli("suspend", "family") == "family is already suspended; nothing was changed\n"
    found = cli.explain("Suspended")
    assert found["next"] == f"modelchain resume family -n {namespace}"
    kubelet.script = lambda pod: None
    assert "resumes from its newest checkpoint" in cli(*found["next"].split()[1:3])
    cli.space.until("Complete")
    assert "not suspended" in cli("resume", "family")


def test_retries_are_used_up(cli: Cli, kubelet: Kubelet) -> None:
    kubelet.script = lambda pod: plays.fail(FailureClass.NON_FINITE, "the loss is nan")
    cli.space.apply(chain(spec__retry=ONCE))
    cli.space.until("Failed")
    found = cli.explain("NonFinite")
    assert "the loss is nan; 0 retries are allowed" in found["cause"]
    assert cli.ended("get", "family", "-n", cli.space.namespace, "--watch").returncode == 1
    assert found["next"] == f"kubectl edit mchain family -n {cli.space.namespace}"
    kubelet.script = lambda pod: None
    assert "stage a of family is tried again at once" in cli("retry", "family")
    cli.space.until("Complete")
    refused = cli.refused("retry", "family", "-n", cli.space.namespace, code=2)
    assert "has nothing to try again" in refused


def test_followed_to_its_end(cli: Cli, tmp_path: Path) -> None:
    cli.space.apply(
        chain(stages=2, spec__suspend=True)
    )  # a watch that began late would miss a stage
    words = [MODELCHAIN, "get", "family", "-w", "-n", cli.space.namespace]
    words.append(f"--kubeconfig={cli.space.cluster.kubeconfig}")
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        assert watch.stdout.readline().startswith("family")
        cli("resume", "family")
        lines = watch.stdout.read().splitlines()
    assert lines[-1].split()[:4] == ["family", "2/2", "Complete", "100%"]
    assert any(line.split()[1] == "1/2" for line in lines)
    found = cli.explain("Complete")
    artifacts = cli.space.kubectl(*found["next"].split()[1:-2])
    assert len(artifacts.splitlines()) == 3
    status = json.loads(cli("status", "family", "-o", "json"))
    assert [stage["state"] for stage in status["stages"]] == ["Succeeded"] * 2
    assert set(status) == {
        "observedGeneration",
        "conditions",
        "summary",
        "stages",
        "removed",
        "baselines",
        "relaxation",
        "total",
        "currency",
        "avoid",
        "retry",
    }
    assert "chain family" in cli("status", "family")
    cost = json.loads(cli("cost", "family", "-o", "json"))
    assert [one["stage"] for one in cost["stages"]] == ["a", "b"]
    assert cost["total"]["spent"]["macs"] == status["total"]["macs"]
    page = tmp_path / "family.html"
    assert cli("report", "family", "-o", str(page)) == f"report: {page}\n"
    report = page.read_text()
    assert all(f"family-{stage}-a1" in report for stage in "ab")  # from the records
    assert all(stage["artifact"]["digest"] in report for stage in status["stages"])
    edited = chain(stages=2)
    edited["spec"]["stages"][1]["rerun"] = "again"
    for spec, code, effects in (
        (chain(stages=2), 3, ["Hit"] * 2),
        (edited, 0, ["Hit", "Retrains"]),
    ):
        file = tmp_path / "chain.yaml"
        file.write_text(json.dumps(spec))
        done = cli.ended(
            *("plan", "-f", str(file), "--against", "family", "-o", "json"),
            *("-n", cli.space.namespace),
        )
        assert done.returncode == code, done.stderr
        assert [stage["effect"] for stage in json.loads(done.stdout)["stages"]] == effects


def test_watched_to_its_end(cli: Cli) -> None:
    cli.space.apply(chain(stages=2, spec__suspend=True))
    with cli.begun("watch", "family") as watch:
        assert watch.stdout is not None
        assert watch.stdout.readline().startswith("family")
        cli("resume", "family")
        lines = watch.stdout.read().splitlines()
    assert watch.returncode == 0
    words = [line.split() for line in lines]
    assert ["family", "1/2", "Running"] in words or ["family", "1/2", "Starting"] in words
    assert ["family", "2/2", "Complete"] in words
    of_b = [line for line in words if line[0] == "b"]
    assert {line[3] for line in of_b} == {"-", "family-b-a1"}
    assert of_b[-1][:4] == ["b", "Succeeded", "100%", "family-b-a1"]
    # Each line says something new.
    assert all(one != other for one, other in pairwise(lines))


def test_a_watch_lists_once(cli: Cli, control_plane: ControlPlane, tmp_path: Path) -> None:
    """It follows a chain over its whole life with one LIST of chains and one of pods."""
    cli.space.apply(chain(stages=2))
    code = (
        "import sys; from modelchain.cli.app import main\n"
        "from modelchain_operator.api import kube\n"
        "calls, init = [], kube.Kube.__init__\n"
        "def count(self, api): init(self, api); calls.append(self.calls)\n"
        "kube.Kube.__init__ = count\n"
        "try: main()\n"
        "finally: print(sorted((*k[:2], n) for c in calls for k, n in c.items()), file=sys.stderr)"
    )
    words = [sys.executable, "-c", code, "watch", "family", "-n", cli.space.namespace]
    words.append(f"--kubeconfig={control_plane.kubeconfig}")
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    calls = {(verb, plural): n for verb, plural, n in ast.literal_eval(done.stderr)}
    assert calls == {
        ("get", "modelchains"): 1,
        ("list", "modelchains"): 1,
        ("list", "pods"): 1,
        ("watch", "modelchains"): 1,
        ("watch", "pods"): 1,
    }


def test_a_stalled_chain_ends_its_watch(cli: Cli) -> None:
    namespace = cli.space.namespace
    cli.space.apply(chain(spec__storage={"claimName": "nothing"}))
    done = cli.ended("watch", "family", "-n", namespace, "--timeout=60")
    assert done.returncode == 1
    assert done.stderr == (
        "modelchain: family is stalled: stage a: ClaimMissing: there is no claim nothing; create"
        f" it, or correct spec.storage.claimName; next: kubectl get pvc -n {namespace}\n"
    )


def test_a_failed_chain_is_watched_after_a_retry(cli: Cli, kubelet: Kubelet) -> None:
    """The watch may begin before the operator has seen the retry."""
    kubelet.script = lambda pod: plays.fail(FailureClass.NON_FINITE, "the loss is nan")
    cli.space.apply(chain(stages=1, spec__retry=ONCE))
    done = cli.ended("watch", "family", "-n", cli.space.namespace, "--timeout=60")
    assert done.returncode == 1 and "family has failed: stage a: NonFinite" in done.stderr
    kubelet.script = lambda pod: None
    said = cli("retry", "family")
    watch = said.strip().rpartition("watch: modelchain ")[2].split()
    done = cli.ended(*watch, "--timeout=60")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_watch_with_a_time_limit(cli: Cli) -> None:
    cli.space.apply(chain(spec__suspend=True))
    space = ("-n", cli.space.namespace)
    done = cli.ended("watch", "family", *space, "--timeout", "1.5")
    assert done.returncode == 124
    assert done.stderr == "modelchain: family has not finished within 1.5 s\n"


def test_a_chain_that_is_deleted_ends_its_watch(cli: Cli) -> None:
    cli.space.apply(chain(spec__suspend=True))
    with cli.begun("watch", "family") as watch:
        assert watch.stdout is not None and watch.stderr is not None
        assert watch.stdout.readline().startswith("family")
        cli.space.kubectl("delete", "mchain", "family")
        assert watch.wait(60) == 1
        assert watch.stderr.read() == "modelchain: family was deleted\n"


def test_logs_are_followed_over_a_hand_over(cli: Cli, kubelet: Kubelet) -> None:
    """Each stream is also cut off while its container runs: no line is lost or comes twice."""
    assert kubelet.logs is not None
    kubelet.logs.cut = 0.7
    goes_on = threading.Event()

    async def play(pod: Pod) -> None:
        pod.say(f"{pod.name} loads")
        await pod.start()
        while not goes_on.is_set():
            await asyncio.sleep(0.05)
        await pod.exit(0, await pod.train(2.0))

    kubelet.script = lambda pod: play if pod.role == "train" else None
    cli.space.apply(chain(stages=2))
    cli.space.wait(lambda: cli.space.states() == ["Running", "Pending"], "the first stage runs")
    with cli.begun("logs", "family", "-f") as logs:
        assert logs.stdout is not None and logs.stderr is not None
        first = [logs.stdout.readline().strip() for _ in range(2)]
        goes_on.set()
        lines = [*first, *logs.stdout.read().splitlines()]
        said = logs.stderr.read().splitlines()
    assert logs.returncode == 0, said
    pods = [f"family-{stage}-a1-master-0" for stage in "ab"]
    does = ("loads", "starts", "exits with 0")
    assert lines == [f"{pod} {what}" for pod in pods for what in does]
    assert said == [f"modelchain: the log of pod {pod}" for pod in pods]


def test_logs_of_every_rank_and_of_pods_that_are_gone(cli: Cli, kubelet: Kubelet) -> None:
    namespace = cli.space.namespace
    two = chain(stages=1)
    two["spec"]["stages"][0]["resources"] = {"nodes": 2}
    kubelet.script = lambda pod: plays.stall()
    cli.space.apply(two)
    refused = cli.refused("logs", "family", "b", "-n", namespace, code=2)
    assert refused == "modelchain: family has no stage b; its stages are a\n"
    cli.space.wait(lambda: cli.space.states() == ["Running"], "the stage runs")
    assert cli("logs", "family") == "family-a-a1-master-0 starts\n"
    assert cli("logs", "family", "a", "--all-ranks", "--attempt=1").splitlines() == [
        "[a-a1/0] family-a-a1-master-0 starts",
        "[a-a1/1] family-a-a1-worker-0 starts",
    ]
    assert cli("logs", "family", "--tail", "0") == ""
    refused = cli.refused("logs", "family", "--attempt=7", "-n", namespace, code=2)
    assert refused == "modelchain: the status knows no attempt 7 of that stage; it has 1\n"
    cli("suspend", "family")
    cli.space.until("Suspended")
    trainers = "modelchain.dev/role=train"
    cli.space.wait(lambda: not cli.space.list("pods", trainers), "the pods are gone")
    attempt = cli.space.stage("a")["attempts"][0]
    directory = f"{attempt['inputDigest']}/{cli.uid('family')[:8]}-a1"
    word = f"Preempted: {attempt['message']}"
    assert attempt["message"] and cli("logs", "family").splitlines() == [
        f"the pods of family-a-a1 are gone; its last word: {word}",
        f"its records are on claim family-artifacts, in {directory}: metrics.jsonl",
    ]


def test_a_plugin_of_kubectl(cli: Cli, control_plane: ControlPlane) -> None:
    """kubectl finds the commands and what completes them by their names in the PATH."""
    cli.space.apply(chain("one", stages=2, spec__suspend=True))
    cli.space.apply(chain("two", spec__suspend=True))
    kubectl = str(find_or_build().paths["kubectl"])
    place = ["-n", cli.space.namespace, f"--kubeconfig={control_plane.kubeconfig}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def typed(*words: str) -> list[str]:
        done = subprocess.run(
            [kubectl, *words],
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout.splitlines()

    def completed(*words: str) -> list[str]:
        return [line.split("\t")[0] for line in typed("__complete", "modelchain", *words)]

    assert typed("modelchain", "get", "one", *place)[1].startswith("one")
    assert completed("watch", *place, "") == ["one", "two", ":4"]
    assert completed("get", *place, "tw") == ["two", ":4"]
    assert completed("logs", *place, "one", "") == ["a", "b", ":4"]
    assert completed("logs", *place, "none", "") == [":0"]
    assert completed("wa") == ["watch", ":4"]


def test_no_operator(cli: Cli, operator: Operator) -> None:
    operator.stop()
    try:
        cli.space.apply(chain())
        found = cli.explain("NoOperator")
        assert "its Lease in namespace default was given back" in found["cause"]
        assert found["next"] == "kubectl get pods -n default"
        assert "no operator has looked at it yet" in cli("get", "family")
        assert json.loads(cli("status", "family", "-o", "json"))["observedGeneration"] == -1
    finally:
        operator.start()
    cli.space.until("Complete")


def test_lists_and_what_is_not_there(cli: Cli) -> None:
    namespace = cli.space.namespace
    assert cli("get") == ""
    cli.space.apply(chain("one", spec__suspend=True))
    cli.space.apply(chain("two", spec__suspend=True))
    rows = json.loads(cli("get", "-o", "json"))
    assert [row["name"] for row in rows] == ["one", "two"]
    assert namespace in cli.ended("get", "-A").stdout
    said = cli.refused("explain", "family", "-n", namespace, code=2)
    assert (
        said
        == f"modelchain: there is no ModelChain family in namespace {namespace}; it has one, two\n"
    )
    assert "there is no namespace nowhere" in cli.refused("get", "-n", "nowhere", code=2)
    assert "there is no namespace nowhere" in cli.refused("suspend", "one", "-n", "nowhere", code=2)
    assert "there is no ModelChain" in cli.refused("status", "one", code=2)
    for command in ("watch", "logs"):
        said = cli.refused(command, "family", "-n", namespace, code=2)
        assert "there is no ModelChain family" in said


def test_a_user_who_may_not(cli: Cli, control_plane: ControlPlane) -> None:
    """May read chains and nothing else: what cannot be seen is said."""
    namespace = cli.space.namespace
    cli.space.kubectl(
        "create", "role", "reader", "--verb=get,list", "--resource=modelchains.modelchain.dev"
    )
    cli.space.kubectl("create", "rolebinding", "reader", "--role=reader", "--user=jane")
    # On nodes that do not exist, so that it is not complete before it is explained.
    cli.space.apply(chain(spec__runner={"image": IMAGE, "nodePool": "nowhere"}))
    cli.space.wait(lambda: cli.space.stage("a").get("attempts"), "the first attempt")
    admin, control_plane.kubeconfig = control_plane.kubeconfig, control_plane.kubeconfig_for("jane")
    try:
        found = json.loads(cli("explain", "family", "-o", "json"))
        hidden = {e["object"] for e in found["evidence"] if "may not read" in e["message"]}
        assert hidden >= {"pods", "events", "pytorchjobs", "leases"}
        assert "refuses this" in cli.refused("suspend", "family", "-n", namespace, code=1)
        assert "refuses this" in cli.refused("get", "-n", "default", code=1)
        # Without the right to watch, and to see pods and their logs.
        done = cli.ended("watch", "family", "-n", namespace)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "refuses this: GET" in done.stderr and "cannot watch resource" in done.stderr
        assert "refuses this" in cli.refused("logs", "family", "-n", namespace, code=1)
    finally:
        control_plane.kubeconfig = admin


def test_the_role_view_is_enough_to_watch_and_for_logs(
    cli: Cli, kubelet: Kubelet, control_plane: ControlPlane
) -> None:
    """With what the chart adds to it: chains may be read."""
    kubelet.script = lambda pod: plays.stall()
    cli.space.apply(chain(stages=1))
    verbs, resource = "--verb=get,list,watch", "--resource=modelchains.modelchain.dev"
    cli.space.kubectl("create", "role", "chains", verbs, resource)
    cli.space.kubectl("create", "rolebinding", "chains", "--role=chains", "--user=joe")
    cli.space.kubectl("create", "rolebinding", "view", "--clusterrole=view", "--user=joe")
    cli.space.wait(lambda: cli.space.states() == ["Running"], "the stage runs")
    admin, control_plane.kubeconfig = control_plane.kubeconfig, control_plane.kubeconfig_for("joe")
    try:
        assert cli("logs", "family") == "family-a-a1-master-0 starts\n"
        done = cli.ended("watch", "family", "-n", cli.space.namespace, "--timeout=3")
        assert done.returncode == 124 and "a  Running" in done.stdout
        done = cli.ended("explain", "family", "-n", cli.space.namespace, "-o", "json")
        found = json.loads(done.stdout)["evidence"]
        hidden = {e["object"] for e in found if "may not read" in e["message"]}
        assert hidden <= {"leases", "pytorchjobs"}
    finally:
        control_plane.kubeconfig = admin


def test_ctrl_c_ends_a_watch(cli: Cli) -> None:
    cli.space.apply(chain(spec__suspend=True))
    heard = [
        "env",
        "--default-signal=INT",
    ]  # in tests that run in the background it is ignored
    words = [
        *heard,
        MODELCHAIN,
        "get",
        "-n",
        cli.space.namespace,
        "-w",
        f"--kubeconfig={cli.space.cluster.kubeconfig}",
    ]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as watch:
        assert watch.stdout is not None and watch.stderr is not None
        assert watch.stdout.readline().startswith("family")
        time.sleep(0.2)
        watch.send_signal(signal.SIGINT)
        assert watch.wait(30) == 130
        assert watch.stderr.read() == ""
