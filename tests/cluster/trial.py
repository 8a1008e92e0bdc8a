"""A chain under faults: a namespace, a fault proxy and operators of its own, and what it must come
to whatever befell.

    with Bench(control_plane, tmp_path) as bench, bench.trial(RETRY) as trial:
        trial.proxy.on(nth_write(3), kill(trial.operator(), "commit"))
        trial.finish()

Many trials share one control plane, kubelet and recorder, and may go on at the same time.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from apiclient import Api, Json, run
from controlplane import ControlPlane
from faults import Request
from kubelet import Kubelet
from playedpod import Pod
from plays import Play, lost_message, preempt, stall
from proxy import FaultProxy
from recorder import Recorder
from rig import CONFIG, Operator, Space, chain
from specs import DELETE

T = TypeVar("T")

SHIPPED = {"nodePools": CONFIG["nodePools"]}  # every setting but the pools as we ship it
WITHIN = 120.0  # seconds from the last fault to the end of the chain
AT_ONCE = 4  # trials
_numbers = itertools.count(1)  # of trials
QUIET = re.compile(r"DEBUG|kopf\.objects|Handler ")


@dataclass(frozen=True)
class Story:
    """A chain of three stages and what happens to it, faults aside.

    `plays` by attempt, such as "b-a1"; `jobs` the attempts it takes; `paused`: the stage during
    which its owner suspends and resumes it; `made` how many objects of each kind it costs;
    `accuracy` what is measured of a model that is trained from these inputs, if the chain has a
    gate; `epochs` what its stages have in the end, if a gate lengthens them.
    """

    name: str
    spec: Mapping[str, Any]
    plays: Mapping[str, Play]
    jobs: tuple[str, ...]
    made: Mapping[str, int]
    paused: str = ""
    accuracy: Callable[[Mapping[str, Any]], float] | None = None
    epochs: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name


RETRY = Story(
    "retry",
    {},
    {"b-a1": preempt()},
    ("a-a1", "b-a1", "b-a2", "c-a1"),
    {"persistentvolumeclaims": 1, "jobs": 1, "pytorchjobs": 4, "stageartifacts": 3},
)
# Everything else an operator reads and writes: a share, a lost last word, a pause.
SHARED = Story(
    "shared",
    {"spec__storage": {"claimName": "results"}},
    {"a-a1": lost_message(), "b-a1": preempt(), "c-a1": stall()},
    ("a-a1", "b-a1", "b-a2", "c-a1", "c-a2"),
    {"leases": 4, "pytorchjobs": 5, "jobs": 2, "stageartifacts": 3},
    paused="c",
)


def _with_epochs(inputs: Mapping[str, Any]) -> float:
    """A model alone reaches 50. In the chain b does with 20 epochs, and c with 17."""
    layers = inputs["modelConfig"]["vision_cfg"]["layers"]
    if "predecessor" not in inputs:
        return 50.0
    return {3: 29.5, 4: 32.5}[layers] + float(inputs["epochs"])


# A gate: b is trained alone as well, b and c miss once and are trained for longer.
RELAX = Story(
    "relax",
    {
        "spec__evaluation": [{"name": "top1", "kind": "Retrieval", "shards": "/data/val.tar"}],
        "spec__gate": {
            "metric": "top1",
            "train": ["b"],
            "baseline": {"c": "50"},
            "onMiss": "Relax",
        },
        "spec__allocation": {"targetAcceleration": "1.5"},
        **{f"spec__stages[{index}]__epochs": DELETE for index in range(3)},
    },
    {},
    ("a-a1", "b-a1", "b-a2", "c-a1", "c-a2", "b-b1"),
    {"persistentvolumeclaims": 1, "jobs": 1, "pytorchjobs": 6, "stageartifacts": 6},
    accuracy=_with_epochs,
    epochs=(32, 20, 17),
)
STORIES = {story.name: story for story in (RETRY, SHARED, RELAX)}


class Bench:
    """What trials share."""

    def __init__(self, control_plane: ControlPlane, directory: Path):
        self.control_plane, self.directory = control_plane, directory
        self.api = Api(control_plane.kubeconfig)
        self.stories: dict[str, Story] = {}
        self.kubelet = Kubelet(control_plane.kubeconfig, script=self._script)
        self.kubelet.accuracy = self._accuracy
        self.recorder = Recorder(control_plane.etcd)

    def __enter__(self) -> Bench:
        self.kubelet.__enter__()
        self.recorder.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.recorder.__exit__(*error)
        self.kubelet.__exit__(*error)
        run(self.api.close())

    @contextmanager
    def trial(self, story: Story) -> Iterator[Trial]:
        """A trial; the chain is not applied yet."""
        number = next(_numbers)
        name = f"{story.name}-{number}"
        self.stories[name] = story
        namespace = f"trial-{os.getpid()}-{number}"
        directory = self.directory / name
        directory.mkdir()
        self.control_plane.create_namespace(namespace)
        with FaultProxy(self.control_plane.kubeconfig) as proxy:
            trial = Trial(
                self, story, name, number, Space(self.control_plane, namespace), proxy, directory
            )
            try:
                yield trial
            finally:
                for operator in trial.operators:
                    operator.kill()
        self.control_plane.delete_namespace(namespace)

    def each(
        self, work: Callable[[T], str], points: Iterable[T], at_once: int = AT_ONCE
    ) -> list[str]:
        """Call `work` for every point, some at a time. What it said, one line a point; raises with
        all that failed.
        """
        failures = []

        def guarded(point: T) -> str:
            start = time.monotonic()
            try:
                said = work(point)
            except Exception:
                said = f"FAILED: {traceback.format_exc()}"
                failures.append(f"{point}\n{said}")
            line = f"{point}: {said} ({time.monotonic() - start:.0f} s)"
            with (self.directory / "trials").open("a") as told:  # for who does not want to wait
                told.write(line + "\n")
            return line

        with ThreadPoolExecutor(at_once) as pool:
            lines = list(pool.map(guarded, points))
        failures += self.recorder.catch_up().violations
        assert not failures, "\n\n".join(["", *failures])
        return lines

    def _accuracy(self, pod: Pod) -> float | None:
        story = self.stories.get(pod.chain or "")
        asked = story.accuracy if story else None
        return asked(pod.task.inputs) if asked and pod.task else None

    def _script(self, pod: Pod) -> Play | None:
        story = self.stories.get(pod.chain or "")
        return (
            story.plays.get(f"{pod.stage}-a{pod.attempt}")
            if story and pod.role == "train"
            else None
        )


@dataclass
class Trial:
    bench: Bench
    story: Story
    name: str
    number: int
    space: Space
    proxy: FaultProxy
    directory: Path
    operators: list[Operator] = field(default_factory=list)
    kills: int = 0  # that a fault has seen to; a death more is the operator's own
    _restarts: int = 0
    _steps: set[str] = field(default_factory=set)

    def kill(self) -> None:
        """SIGKILL for the first operator; it is started again while the trial is waited for."""
        self.kills += 1
        self.operators[0].kill()

    def apply(self) -> None:
        """Its inputs are its own: what was trained is counted by input digest."""
        if "claimName" in self.story.spec.get("spec__storage", {}):
            meta = {"name": "results", "namespace": self.space.namespace}
            spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
            path = f"/api/v1/namespaces/{self.space.namespace}/persistentvolumeclaims"
            run(self.bench.api.request("POST", path, {"metadata": meta, "spec": spec}))
        self.space.apply(chain(self.name, spec__recipe__seed=self.number, **self.story.spec))

    def operator(self, **options: Any) -> Operator:
        """Start another operator behind the proxy."""
        client = f"operator-{len(self.operators)}"
        kubeconfig = self.proxy.kubeconfig(self.directory / f"{client}.kubeconfig", client=client)
        options = {"settings": SHIPPED, "name": client} | options
        operator = Operator(kubeconfig, self.directory, (self.space.namespace,), **options)
        operator.environment["POD_NAMESPACE"] = self.space.namespace  # where its Lease is
        operator.start()
        self.operators.append(operator)
        return operator

    def chain(self) -> Json:
        space = f"/apis/modelchain.dev/v1alpha1/namespaces/{self.space.namespace}"
        return run(self.bench.api.request("GET", f"{space}/modelchains/{self.name}"))

    def look(self) -> Json:
        """The chain now; what its owner does and what restarts an operator that was killed is done
        on the way.
        """
        found = self.chain()
        if self.operators and not self.operators[0].alive():
            self._restarts += 1
            assert self._restarts <= self.kills, (
                f"{self.name}: the operator died by itself\n{self._log()}"
            )
            self.operators[0].start()
        stages = {s["name"]: s for s in found.get("status", {}).get("stages", [])}
        paused = stages.get(self.story.paused, {})
        if "suspended" not in self._steps and paused.get("state") == "Running":
            self._steps.add("suspended")
            self.space.patch(self.name, {"suspend": True})
        if (
            "suspended" in self._steps
            and "resumed" not in self._steps
            and paused.get("state") == "Suspended"
        ):
            self._steps.add("resumed")
            self.space.patch(self.name, {"suspend": False})
        return found

    def until(self, what: Callable[[Json], T | None], why: str, seconds: float = WITHIN) -> T:
        """Wait for something to be true of the chain."""
        deadline = time.monotonic() + seconds
        while not (result := what(found := self.look())):
            if time.monotonic() > deadline:
                status = json.dumps(found.get("status", {}).get("stages"), indent=1)
                raise AssertionError(
                    f"{self.name}: no {why} within {seconds:.0f} s\n{status}\n{self._log()}"
                )
            time.sleep(0.2)
        return result

    def finish(self, seconds: float = WITHIN, late: Iterable[Request] = ()) -> None:
        """The chain completes as its story does without faults, nothing was done twice, and nothing
        is left of it.

        Of writes that came `late`, creates may be one more than without them.
        """
        found = self.until(
            lambda chain: chain if self.completed(chain) else None, "completion", seconds
        )
        stages, baselines = found["status"]["stages"], found["status"].get("baselines", [])
        attempts = [a["name"] for s in (*stages, *baselines) for a in s["attempts"]]
        assert attempts == [f"{self.name}-{job}" for job in self.story.jobs], (
            f"{attempts}\n{self._log()}"
        )
        digests = {a["inputDigest"] for s in (*stages, *baselines) for a in s["attempts"]}
        trained = [self.bench.kubelet.finished[digest] for digest in digests]
        assert set(trained) == {1}, f"{self.name}: stages were trained {trained} times"
        if self.story.epochs:
            assert tuple(s["epochs"] for s in stages) == self.story.epochs
            verdicts = [s["gate"]["verdict"] for s in stages]
            assert verdicts == ["Ungated", "Passed", "Passed"], verdicts
        more = self.made() - Counter(self.story.made)
        assert more <= _created(late), f"{self.name}: made {self.made()}\n{self._log()}"
        self.until(
            lambda _: all(map(_ended, self.space.list("pytorchjobs"))), "end of all jobs", 30
        )
        self.space.kubectl("delete", "mchain", self.name, "--wait=false")
        deadline = time.monotonic() + 60
        while left := self.bench.recorder.orphans(found["metadata"]["uid"]):
            assert time.monotonic() < deadline, f"{self.name}: left behind {left}"
            time.sleep(1)

    def completed(self, chain: Json) -> bool:
        conditions = chain.get("status", {}).get("conditions", [])
        return any(c["type"] == "Complete" and c["status"] == "True" for c in conditions)

    def made(self) -> Counter[str]:
        """Objects created in this namespace, by kind."""
        return _created(self.proxy.writes())

    def _log(self) -> str:
        """The last requests, and what the operators said that is no debugging."""
        lines = [
            line for o in self.operators for line in o.said().splitlines() if not QUIET.search(line)
        ]
        return "\n".join([*map(str, self.proxy.log[-80:]), *lines[-80:]])


def _created(requests: Iterable[Request]) -> Counter[str]:
    return Counter(r.resource for r in requests if r.verb == "create" and r.status == 201)


def _ended(job: Json) -> bool:
    conditions = job.get("status", {}).get("conditions") or []
    return any(c["type"] in ("Succeeded", "Failed") and c["status"] == "True" for c in conditions)
