"""`kubectl apply` of the quickstart: three stages in real pods, as good to the last bit as on this
machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import open_clip
import pytest
from boards import NAMES, queries
from build import find_or_build
from lab import Lab
from node import ADDRESS, PROMETHEUS
from pages import REPOSITORY, commands
from recorded_day import filled
from system import CHART, EXAMPLE, HOME, NAMESPACE, Object, System, chain

from modelchain.io.files import sha256_of

MODELCHAIN = Path(sys.executable).with_name("modelchain")
OPERATORS = "app.kubernetes.io/name=modelchain"


def ask(path: str, **query: str) -> Any:
    """Prometheus's answer."""
    url = f"http://{ADDRESS}:{PROMETHEUS}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)["data"]


def value(query: str) -> float:
    (found,) = ask("query", query=query)["result"]
    return float(found["value"][1])


@pytest.fixture(scope="module")
def applied(system: System) -> System:
    """The quickstart in a namespace under the restricted standard; the Job's image is as a cluster
    of yours has it.
    """
    system.kubectl("apply", "-f", "-", input=system.example())
    return system


@pytest.fixture(scope="module")
def complete(applied: System) -> Object:
    return applied.until("quickstart", "Complete", 900)


@pytest.mark.timeout(900)
def test_its_pods_hold_no_token_and_write_where_they_may(applied: System) -> None:
    pod = applied.trains("quickstart", "small")["metadata"]["name"]
    look = (
        "import os; print(os.getuid(), os.path.exists('/var/run/secrets/kubernetes.io'),"
        " os.access('/opt', os.W_OK))"
    )
    assert applied.kubectl("exec", pod, "--", "python", "-c", look).split() == [
        "65532",
        "False",
        "False",
    ]


@pytest.mark.timeout(900)
def test_an_upgrade_of_the_chart_leaves_what_runs_alone(applied: System) -> None:
    pod = applied.trains("quickstart", "small")
    upgrade = ["upgrade", "modelchain", str(CHART), *applied.values(), "--wait"]
    applied.helm(*upgrade, "--set", "progressSeconds=6")
    applied.cluster.kubectl(
        "rollout", "status", "deployment", "-n", HOME, "-l", OPERATORS, "--timeout=60s"
    )
    after = applied.status("quickstart")["stages"][0]["attempts"]
    assert [a["name"] for a in after] == ["quickstart-small-a1"]
    there = applied.list("pods", "modelchain.dev/stage=small,modelchain.dev/role=train")
    assert [p["metadata"]["uid"] for p in there] == [pod["metadata"]["uid"]]


@pytest.mark.timeout(900)
def test_prometheus_sees_every_target(applied: System, lab: Lab, tmp_path: Path) -> None:
    lab.ask("start", "prometheus")

    def both() -> set[str] | None:
        targets = ask("targets")["activeTargets"]
        up = {t["labels"]["who"] for t in targets if t["health"] == "up"}
        return (
            up
            if up == {"operator", "trainer"} and all(t["health"] == "up" for t in targets)
            else None
        )

    applied.wait(both, "operator and a trainer are scraped, and nothing is down", 300)
    (pod,) = applied.pods("quickstart")
    operator = applied.cluster.kubectl(
        "get", "pods", "-n", HOME, "-l", OPERATORS, "-o", "name"
    ).split()[0]
    for text in (
        applied.metrics(NAMESPACE, pod["metadata"]["name"]),
        applied.metrics(HOME, operator.removeprefix("pod/")),
    ):
        linted = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True
        )
        assert linted.returncode == 0, linted.stdout + linted.stderr


def typed(lab: Lab, *words: str, exits: int = 0) -> str:
    """What a command prints that a person types with the node's kubectl and our plugin."""
    tools = f"{find_or_build().paths['kubectl'].parent}:{MODELCHAIN.parent}:{os.environ['PATH']}"
    environment = {**os.environ, "KUBECONFIG": str(lab.kubeconfig), "PATH": tools}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == exits, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.timeout(900)
def test_a_chain_is_watched_while_it_trains(applied: System, lab: Lab) -> None:
    here = ("quickstart", "-n", NAMESPACE)
    assert "Running" in typed(lab, "modelchain", "watch", *here, "--timeout", "5", exits=124)
    assert typed(lab, "kubectl", "modelchain", "logs", *here, "--tail", "5").count("\n") == 5
    assert "quickstart" in typed(lab, "kubectl", "modelchain", "explain", *here)


@pytest.mark.timeout(1200)
def test_three_stages_train_as_they_do_here(
    applied: System, complete: Object, lab: Lab, tmp_path: Path
) -> None:
    """Weights are bitwise those of `modelchain run` of the same file, on the same machine."""
    assert [s["state"] for s in complete["stages"]] == ["Succeeded"] * 3
    assert [len(s["attempts"]) for s in complete["stages"]] == [1] * 3
    records = {
        r["spec"]["stage"]: r["spec"]
        for r in applied.list("sart")
        if r["spec"]["chain"] == "quickstart"
    }
    data, root = tmp_path / "data", tmp_path / "root"
    here("pack", "digits", "--to", str(data / "digits"))
    here("run", "-f", str(EXAMPLE), "--root", str(root), "--data", str(data))
    status = json.loads(here("status", "--root", str(root), "-o", "json"))
    for stage in status["stages"]:
        record = records[stage["name"]]
        weights = root / stage["inputDigest"] / "artifact" / "open_clip_model.safetensors"
        assert sha256_of(weights) == record["artifactDigest"], f"stage {stage['name']}"
        assert stage["results"] == next(
            s["results"] for s in complete["stages"] if s["name"] == stage["name"]
        )


def here(*words: str) -> str:
    """`modelchain` on this machine."""
    done = subprocess.run([str(MODELCHAIN), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(300)
def test_prometheus_has_the_totals_of_the_status(
    applied: System, complete: Object, lab: Lab
) -> None:
    total = complete["total"]["macs"]
    query = 'sum(max without (instance, pod) (modelchain_stage_macs_total{chain="quickstart"}))'
    applied.wait(lambda: value(query) == total, "the last scrape has all MACs", 60)
    seconds = (
        'sum(max without (instance, pod) (modelchain_stage_gpu_seconds_total{chain="quickstart"}))'
    )
    assert value(seconds) == complete["total"]["gpuSeconds"]
    assert value('count(min_over_time(up{who="operator"}[2m]) == 0) or vector(0)') == 0


@pytest.mark.timeout(1200)
def test_commands_tell_of_a_finished_chain(applied: System, complete: Object, lab: Lab) -> None:
    here = ("quickstart", "-n", NAMESPACE)
    assert "Complete" in typed(lab, "kubectl", "modelchain", "watch", *here)
    assert "Complete" in typed(lab, "kubectl", "modelchain", "get", *here)
    assert typed(lab, "modelchain", "logs", *here[:1], "small", *here[1:])
    told = json.loads(typed(lab, "kubectl", "modelchain", "cost", *here, "-o", "json"))
    assert told["total"]["spent"]["macs"] == complete["total"]["macs"]
    completions = typed(lab, "kubectl_complete-modelchain", "watch", "-n", NAMESPACE, "qui")
    assert "quickstart" in completions


# Panels of a chain without GPUs, a price, a gate, a queue and a failure. The simulated day of
# tests/charts fills the others.
FILLED = {
    "operator": {title for title, _ in queries("operator")},
    "family": {"Acceleration", "MACs of the chains, and alone"},
    "chain": {
        "Done",
        "Stages",
        "Progress",
        "Losses",
        "Distillation ratio r",
        "Samples a second",
        "Data wait",
        "Time by activity",
        "Age of the newest checkpoint",
        "Time of a checkpoint",
        "Hand-over",
    },
}


@pytest.mark.timeout(1200)
def test_panels_show_what_prometheus_has_scraped(complete: Object, lab: Lab) -> None:
    for name in NAMES:
        empty = {title for title, target in queries(name) if not asked(target)}
        print(f"{name}, empty: {', '.join(sorted(empty))}")
        assert FILLED[name] & empty == set(), name


def asked(target: Object) -> list[Object]:
    """The answer to a panel's query, over the last hour."""
    hour = {"__rate_interval": "30s", "__range": "1h"}
    expression = filled(
        target["expr"], hour | dict.fromkeys(("namespace", "chain", "operator"), ".*")
    )
    if target.get("instant"):
        return list(ask("query", query=expression)["result"])
    now = time.time()
    span = {"start": str(now - 3600), "end": str(now), "step": "5"}
    return list(ask("query_range", query=expression, **span)["result"])


@pytest.mark.timeout(300)
def test_the_model_is_taken_out_as_the_page_says(
    system: System, complete: Object, lab: Lab, tmp_path: Path
) -> None:
    """docs/first-chain.md, typed in another namespace than the page's; its image is the node's."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    tools = f"{find_or_build().paths['kubectl'].parent}:{os.environ['PATH']}"
    environment = {**os.environ, "KUBECONFIG": str(lab.kubeconfig), "PATH": tools}
    for line in commands("first-chain", after="Take the model out", before="Delete it"):
        typed = line.replace("vision", NAMESPACE)
        done = subprocess.run(
            typed, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{typed}\n{done.stdout}{done.stderr}"
    (record,) = system.list("sart", "modelchain.dev/chain=quickstart,modelchain.dev/stage=large")
    assert (
        sha256_of(tmp_path / "model" / "open_clip_model.safetensors")
        == record["spec"]["artifactDigest"]
    )
    model = open_clip.create_model(f"local-dir:{tmp_path}/model")
    assert sum(p.numel() for p in model.visual.parameters()) > 500_000


@pytest.mark.timeout(900)
def test_a_stage_of_two_pods(system: System, complete: Object) -> None:
    """Master and worker under torchrun, under the restricted standard, init container included."""
    pair = chain("pair", epochs=4)
    pair["spec"]["stages"][0]["resources"] = {"nodes": 2}
    system.apply(pair)
    system.trains("pair", "small")
    kinds = [
        pod["metadata"]["labels"]["training.kubeflow.org/replica-type"]
        for pod in system.pods("pair")
    ]
    assert sorted(kinds) == ["master", "worker"]
    status = system.until("pair", "Complete", 420)
    assert [len(s["attempts"]) for s in status["stages"]] == [1]
