"""`python benchmarks/operator_scale.py --chains 200`: figures of an operator with many chains on a
real control plane.

API server, etcd, controllers, scheduler and training-operator are real, on the operator's machine.
Pods are played. The API server's audit log counts the calls. `--write` puts the table into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from markers import between
from modelchain_bench.machine import processor

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests" / "core"), str(ROOT / "tests" / "cluster")]

from controlplane import ControlPlane, new_directory  # noqa: E402
from kubelet import Kubelet  # noqa: E402
from playedpod import Pod  # noqa: E402
from plays import Play  # noqa: E402
from rig import CONFIG, Operator, Space, chain  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"
USER = "modelchain-operator"
PODS_PER_NODE = 110
GOALS = {"handover_p99_seconds": 5.0, "calls_per_stage": 40.0, "memory_mb": 200.0}
Json = dict[str, Any]


class Audited(ControlPlane):
    """The API server's audit log: every request of the operator's user, with the time and code of
    its answer.
    """

    def _api_server(self, port: int) -> Any:
        component = super()._api_server(port)
        policy = self.directory / "audit.json"
        rules = [{"level": "Metadata", "users": [USER]}, {"level": "None"}]
        kind = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy"}
        policy.write_text(json.dumps({**kind, "omitStages": ["RequestReceived"], "rules": rules}))
        component.command += [f"--audit-policy-file={policy}", f"--audit-log-path={self.audit_log}"]
        component.command += ["--audit-log-maxsize=1000", "--audit-log-mode=blocking"]
        return component

    @property
    def audit_log(self) -> Path:
        return self.directory / "audit.log"

    def audit(self, start: int = 0) -> Iterator[Json]:
        """The requests from that byte on."""
        with self.audit_log.open() as log:
            log.seek(start)
            lines = (json.loads(line) for line in log if line.endswith("\n"))
            yield from (line for line in lines if "objectRef" in line)


class Trainers:
    """Plays trainers that take a given time. `ended` holds the time at which each one ended."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.ended: dict[str, float] = {}  # by attempt
        self._random = random.Random(0)

    def __call__(self, pod: Pod) -> Play:
        seconds = self.seconds * self._random.uniform(0.5, 1.5)

        async def play(pod: Pod) -> None:
            await pod.start()
            word = await pod.train(seconds)
            assert pod.task is not None
            self.ended[pod.task.attempt] = time.time()
            await pod.exit(0, word)

        return play


def run(chains: int, stages: int, seconds: float) -> Json:
    """The figures of one run of `chains` chains with `stages` stages, each training for about
    `seconds`.
    """
    plane = Audited(new_directory()).start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _run(plane, Path(folder), chains, stages, seconds)
    finally:
        plane.stop()


def _run(plane: Audited, folder: Path, chains: int, stages: int, seconds: float) -> Json:
    plane.create_namespace("scale")
    space, trainers = Space(plane, "scale"), Trainers(seconds)
    made = [chain(f"chain-{i:03d}", stages, spec__recipe__seed=i) for i in range(chains)]
    kubeconfig = plane.kubeconfig_for(USER, ["system:masters"])
    # Without requests for progress, whose number depends only on how long a stage trains.
    settings = CONFIG | {"progressSeconds": 3600}
    operator = Operator(kubeconfig, folder, leader_election=True, settings=settings)
    operator.arguments.remove("--verbose")
    with (
        Kubelet(plane.kubeconfig, 1 + chains // PODS_PER_NODE, script=trainers) as kubelet,
        operator,
    ):
        began = time.time()
        space.apply({"apiVersion": "v1", "kind": "List", "items": made})
        trained = kubelet.finished  # kubectl takes CPU time itself, so it runs last
        _until(
            lambda: trained.total() >= chains * stages and _complete(space) == chains,
            120 + 4 * stages * (seconds + chains / 2),
        )
        took = time.time() - began
        memory = _memory(operator)
        assert trained.total() == len(trained) == chains * stages, "a stage was trained twice"
        lines = list(plane.audit())
        operator.stop()
        started, before = time.time(), plane.audit_log.stat().st_size
        operator.start()
        _until(lambda: len(_looked_at(plane.audit(before))) == chains, 120)
        startup = max(_looked_at(plane.audit(before)).values()) - started
    return {
        "chains": chains,
        "stages": stages,
        "stage_seconds": seconds,
        "took_seconds": took,
        "chains_per_minute": chains / took * 60,
        **_handovers(lines, trainers.ended, stages),
        **_calls(lines, chains * stages),
        "memory_mb": memory,
        "startup_seconds": startup,
    }


def _until(done: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < deadline, f"not within {timeout:.0f} s"
        time.sleep(1)


def _complete(space: Space) -> int:
    path = "{range .items[*]}{.status.conditions[?(@.type=='Complete')].status}{'\\n'}{end}"
    return space.kubectl("get", "mchain", "-o", f"jsonpath={path}").split().count("True")


def _memory(operator: Operator) -> float:
    """The largest resident size of the operator, in MB."""
    assert operator.process is not None
    status = Path(f"/proc/{operator.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1000


def _at(line: Json) -> float:
    return datetime.fromisoformat(line["stageTimestamp"]).timestamp()


def _looked_at(lines: Iterator[Json]) -> dict[str, float]:
    """For each chain, when it was last read by a request of its own."""
    return {
        line["objectRef"]["name"]: _at(line)
        for line in lines
        if line["verb"] == "get" and line["objectRef"]["resource"] == "modelchains"
    }


def _handovers(lines: list[Json], ended: dict[str, float], stages: int) -> Json:
    """Seconds from the end of a trainer until the API server had its successor's job."""
    created = {
        line["objectRef"]["name"]: _at(line)
        for line in lines
        if line["verb"] == "create" and line["objectRef"]["resource"] == "pytorchjobs"
    }
    names = [f"-{stage}-a1" for stage in "abcdefgh"[:stages]]
    took = [
        created[attempt.removesuffix(a) + b] - moment
        for a, b in itertools.pairwise(names)
        for attempt, moment in ended.items()
        if attempt.endswith(a)
    ]
    cut = statistics.quantiles(took, n=100, method="inclusive")
    return {f"handover_p{p}_seconds": cut[p - 1] for p in (50, 95, 99)}


def _calls(lines: list[Json], stages: int) -> Json:
    """Calls for each stage, without watches, Events and the Lease of leader election."""
    reads, writes = Counter[str](), Counter[str]()
    for line in lines:
        about, verb = line["objectRef"], line["verb"]
        resource = "/".join(about[key] for key in ("resource", "subresource") if key in about)
        if verb == "watch" or resource == "events" or about.get("name") == "modelchain-operator":
            continue
        (reads if verb in ("get", "list") else writes)[f"{verb} {resource}"] += 1
    return {
        "calls_per_stage": (reads.total() + writes.total()) / stages,
        "reads_per_stage": reads.total() / stages,
        "writes_per_stage": writes.total() / stages,
        "calls": {name: round(n / stages, 2) for name, n in (reads + writes).most_common()},
    }


def table(figures: Json) -> str:
    rows = [
        ("chains x stages", f"{figures['chains']} x {figures['stages']}, all complete", ""),
        (
            "a stage trains for",
            f"{0.5 * figures['stage_seconds']:.0f} to {1.5 * figures['stage_seconds']:.0f} s",
            "",
        ),
        (
            "whole run",
            f"{figures['took_seconds']:.0f} s, {figures['chains_per_minute']:.1f} chains a minute",
            "",
        ),
        (
            "a trainer's end to its successor's job, p50 / p95 / p99",
            " / ".join(f"{figures[f'handover_p{p}_seconds']:.2f}" for p in (50, 95, 99)) + " s",
            f"p99 <= {GOALS['handover_p99_seconds']:.0f} s",
        ),
        (
            "API calls a stage, without watches, Events and the leader's Lease",
            f"{figures['calls_per_stage']:.1f} ({figures['reads_per_stage']:.1f} reads, "
            f"{figures['writes_per_stage']:.1f} writes)",
            f"<= {GOALS['calls_per_stage']:.0f}",
        ),
        (
            "memory of the operator, at most",
            f"{figures['memory_mb']:.0f} MB",
            f"<= {GOALS['memory_mb']:.0f} MB",
        ),
        ("start to every chain looked at", f"{figures['startup_seconds']:.1f} s", ""),
    ]
    lines = ["| | measured | goal |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    machine = f"{os.cpu_count()} cores ({processor()}), Python {platform.python_version()}"
    return "\n".join(
        [
            *lines,
            "",
            f"Machine: {machine}; the whole control plane and the simulated pods run on it, too.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chains", type=int, default=200)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument(
        "--stage-seconds", type=float, default=60.0, help="how long a trainer trains, on average"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the figures as one JSON document"
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    given = parser.parse_args()
    figures = run(given.chains, given.stages, given.stage_seconds)
    print(json.dumps(figures, indent=1) if given.json else table(figures))
    if given.write:
        PAGE.write_text(between(PAGE.read_text(), "operator_scale.py", table(figures)))


if __name__ == "__main__":
    main()
