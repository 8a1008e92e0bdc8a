"""A chain on a cluster for `decide`: its attempts run, are evicted and end. Every status that is
written is checked against the CRD.
"""

from __future__ import annotations

import copy
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pricelist import SOURCE, per_hour
from specs import with_changes
from stored import through_a_server, violations
from sums import check_sums
from yaml import safe_load

from modelchain.api.contracts import FailureClass, LastWord, Progress
from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus, PodTime
from modelchain.api.uses import NOT_USED, Uses
from modelchain.decide.conditions import MAX_BYTES
from modelchain.decide.decide import decide
from modelchain.decide.observed import (
    Artifact,
    Contact,
    Decision,
    Launch,
    Observed,
    RecordArtifact,
    Release,
    Seen,
    Stop,
)
from modelchain.plan.plan import Plan, plan
from modelchain.plan.pools import NodePool

ROOT = Path(__file__).parents[2]
SCHEMA = safe_load((ROOT / "crds" / "modelchains.yaml").read_text())["spec"]["versions"][0][
    "schema"
]["openAPIV3Schema"]["properties"]["status"]
MOST_STEPS = 12  # of one pass: writes and actions


@dataclass
class Run:
    """The truth about a job. `macs` and `step` count from its last start; a job that was evicted
    starts again, from its newest checkpoint.
    """

    stage: str
    digest: str
    released: bool = False
    stopped: bool = False
    over: bool = False
    step: int = 0
    macs: int = 0
    # What a checkpoint of its last start has kept of them, and how that start has used its time.
    saved_macs: int = 0
    told: Uses = NOT_USED
    # What its earlier starts have spent.
    earlier_macs: int = 0
    pods: dict[str, PodTime] = field(default_factory=dict)
    # Of pods that have ended, in GPU seconds.
    ended: float = 0.0
    word: LastWord | None = None


@dataclass
class Life:
    """A chain on a cluster that carries out every action, with realistic numbers."""

    body: dict[str, Any]
    nodes: int = 1
    now: float = 1_700_000_000.0
    status: ChainStatus = field(default_factory=ChainStatus)
    runs: dict[str, Run] = field(default_factory=dict)
    records: dict[str, Artifact] = field(default_factory=dict)
    retry: str | None = None
    # Rank 0 answers, and it has taken a step by now.
    answers: bool = True
    tells: bool = True
    poll_seconds: float = 30.0
    price: str | None = "2.21"
    pods_made: int = 0
    # The sizes of all statuses that were written, and what deciding took, in bytes and seconds.
    written: list[int] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    # The bytes that no status may exceed.
    most: int = MAX_BYTES

    # The checked chain and its plan, by generation.
    checked: dict[int, tuple[ModelChain, Plan]] = field(default_factory=dict)

    @property
    def chain(self) -> ModelChain:
        return self._checked[0]

    @property
    def _checked(self) -> tuple[ModelChain, Plan]:
        generation = self.body["metadata"]["generation"]
        if generation not in self.checked:
            chain = ModelChain.model_validate(self.body)
            self.checked[generation] = chain, plan(chain, "analytic", {})
        return self.checked[generation]

    def copy(self) -> Life:
        return copy.deepcopy(self)

    def edit(self, **changes: Any) -> None:
        generation = self.body["metadata"]["generation"] + 1
        self.body = with_changes({"metadata.generation": generation, **changes}, self.body)

    # What `decide` sees and does.

    @property
    def pool(self) -> NodePool:
        said = {"perGpuHour": self.price, "currency": "USD", "source": SOURCE}
        price = {} if self.price is None else {"price": said}
        return NodePool.model_validate({"gpu": "A100", "gpusPerNode": 8, **price})

    def seen(self, name: str) -> Seen:
        run = self.runs.get(name)
        if run is None:
            return Seen(live=False, started=False)
        live = run.released and not run.over
        _, attempt = self.status.attempts[name]
        gone = frozenset(list(run.pods)[: -self.nodes])  # remembered, from before an eviction
        summed_up = attempt.gone.gpu_seconds > 0
        pods = {
            u: pod
            for u, pod in run.pods.items()
            if u not in gone or not summed_up or u in attempt.pods
        }
        progress = Progress(
            step=run.step, steps=self.steps(run.stage), samples_per_second=1.0, eta_seconds=1.0
        )
        return Seen(
            live=live,
            started=True,
            uid=f"uid-{name}",
            unreleased=not run.released and not run.over,
            running=live,
            progress=progress if live and self.tells else None,
            macs=run.macs if live and self.tells else 0,
            saved_macs=run.saved_macs if live and self.tells else 0,
            told=run.told if live and self.tells else NOT_USED,
            pods=pods,
            gone_pods=gone,
            word=run.word if run.over else None,
            prices=per_hour(self.price),
            contact=Contact(answered=self.now if self.answers else None),
        )

    def observed(self) -> Observed:
        live = frozenset(name for name, run in self.runs.items() if not run.over)
        return Observed(
            status=self.status,
            artifact=self.records.get,
            attempt=self.seen,
            live=live,
            retry=self.retry,
            records=True,
            pool=self.pool,
            poll_seconds=self.poll_seconds,
        )

    def decide(self) -> Decision:
        chain, observed, began = self.chain, self.observed(), time.perf_counter()
        decision = decide(chain, observed, self.now)
        self.took.append(time.perf_counter() - began)
        return decision

    def reconcile(self) -> Decision:
        """One pass, until nothing is left to do. Deciding again must then change nothing."""
        for _ in range(MOST_STEPS):
            self.now += 0.01
            decision = self.decide()
            if decision.write:
                self.store(decision.status)
            elif not self.does(decision.action):
                break
        else:
            raise AssertionError("the pass does not end")
        self.now += 0.01
        again = self.decide()
        assert not again.write and again.status == self.status
        return again

    def store(self, status: ChainStatus) -> None:
        body = through_a_server(status.model_dump(mode="json", by_alias=True, exclude_none=True))
        assert list(violations(body, SCHEMA)) == []
        self.written.append(len(json.dumps(body, ensure_ascii=False, separators=(",", ":"))))
        assert self.written[-1] <= 1.01 * self.most, "but for how a server spells numbers"
        self.status = ChainStatus.model_validate_json(json.dumps(body))
        assert self.status == status, "a status is read back as written"
        check_sums(status)

    def does(self, action: object) -> bool:
        match action:
            case Launch(attempt=attempt, stage=stage):
                assert attempt.name not in self.runs
                name = self.chain.spec.stages[stage].name
                self.runs[attempt.name] = Run(name, attempt.input_digest)
            case Release(attempt):
                self.runs[attempt.name].released = True
                self.start(attempt.name)
            case Stop(name):
                was, self.runs[name].stopped = self.runs[name].stopped, True
                return not was
            case RecordArtifact(launch=launch, spent=spent):
                digest = launch.attempt.input_digest
                self.records[digest] = Artifact(
                    digest[::-1],
                    f"{digest}/artifact",
                    spent.macs,
                    {"top1": 30.0},
                    gpu_milliseconds=spent.gpu_milliseconds,
                    cost=spent.cost,
                    own=True,
                )
            case _:
                return False
        return True

    # What is true.

    @property
    def macs(self) -> int:
        """What all attempts of the chain have spent."""
        return sum(run.earlier_macs + run.macs for run in self.runs.values())

    @property
    def gpu_seconds(self) -> float:
        running = (pod for run in self.runs.values() for pod in run.pods.values())
        open_ = sum((self.now - pod.begins) * pod.gpus for pod in running if not pod.finished)
        return open_ + sum(run.ended for run in self.runs.values())

    # What happens.

    @property
    def live(self) -> str | None:
        return next(
            (name for name, run in self.runs.items() if run.released and not run.over), None
        )

    def planned(self, stage: str) -> tuple[int, int]:
        """The steps of a stage, and the MACs of one step."""
        found = next(s for s in self._checked[1].stages if s.name == stage)
        steps = found.samples // self.chain.spec.recipe.global_batch_size
        return steps, found.macs // steps

    def steps(self, stage: str) -> int:
        named = any(s.name == stage for s in self.chain.spec.stages)
        return self.planned(stage)[0] if named else 10**9

    def start(self, name: str) -> None:
        run = self.runs[name]
        run.told = Uses()
        for rank in range(self.nodes):
            self.pods_made += 1
            run.pods[f"{self.pods_made:036}"] = PodTime(
                scheduled=self.now, started=self.now, gpus=8, first=rank == 0
            )

    def end_pods(self, name: str) -> None:
        """All pods end. Rank 0's last word says what it has spent."""
        run = self.runs[name]
        word = {"macs": run.macs, "saved_macs": run.saved_macs, "told": run.told, "over": True}
        for uid, pod in run.pods.items():
            if pod.finished is None:
                run.ended += (self.now - pod.begins) * pod.gpus
                said = word if pod.first else {}
                run.pods[uid] = pod.model_copy(update={"finished": self.now, **said})

    def train(self, chance: random.Random) -> None:
        name = self.live
        assert name is not None
        run, (steps, macs) = self.runs[name], self.planned(self.runs[name].stage)
        more, took = chance.randint(1, max(1, (steps - run.step) // 3)), chance.randint(30, 3000)
        run.step, run.macs, self.now = run.step + more, run.macs + more * macs, self.now + took
        first = 0 if run.told.startup else 20
        run.told += Uses(startup=1000 * first, unsaved=1000 * (took - first))
        if chance.random() < 0.7:
            run.told, run.saved_macs = run.told.kept, run.macs

    def evict(self) -> None:
        name = self.live
        assert name is not None
        run = self.runs[name]
        self.now += 60.0
        self.end_pods(name)
        run.earlier_macs, run.macs, run.step = run.earlier_macs + run.macs, 0, run.step * 9 // 10
        run.saved_macs = 0
        self.now += 60.0
        self.start(name)
        # The operator remembers as many pods.
        run.pods = dict(list(run.pods.items())[-4096:])

    def end(self, failure: FailureClass | None) -> None:
        name = self.live
        assert name is not None
        run, (steps, macs) = self.runs[name], self.planned(self.runs[name].stage)
        if failure is None:
            run.macs += max(0, steps - run.step) * macs
            run.told, run.saved_macs = run.told.kept, run.macs
        self.end_pods(name)
        run.word = LastWord(
            result="Failed" if failure else "Succeeded",
            failure=failure,
            message="as it was told",
            macs=run.macs,
            saved_macs=run.saved_macs,
            milliseconds=run.told,
            checkpoint_step=run.step,
            steps=steps,
            manifest_digest=None if failure else run.digest[::-1],
        )
        run.over = True

    def happens(self, chance: random.Random) -> None:
        """One random event."""
        if self.live is None:
            self.now += 700.0
            return
        match chance.choice(["train", "train", "train", "evict", "preempt", "fail", "succeed"]):
            case "train":
                self.train(chance)
            case "evict":
                self.evict()
            case "preempt":
                self.end(FailureClass.PREEMPTED)
            case "fail":
                self.end(FailureClass.ERROR)
            case "succeed":
                self.end(None)


def life_of(example: str, nodes: int = 1, **changes: Any) -> Life:
    """The chain of an example, with as many retries as the API allows."""
    return life_with(
        safe_load((ROOT / "examples" / f"{example}.yaml").read_text()), nodes, **changes
    )


def life_with(body: dict[str, Any], nodes: int = 1, **changes: Any) -> Life:
    body["metadata"] |= {"uid": "chain-uid", "generation": 1}
    retry = {"spec.retry": {"maxRetries": 100, "maxDisruptions": 10_000}}
    return Life(with_changes({**retry, **changes}, body), nodes)
