"""`decide` at the sizes that users have: deciding again right after a pass changes nothing, and
every request is carried out.
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from specs import with_changes
from stored import through_a_server, violations
from yaml import safe_load

from modelchain.api.contracts import FailureClass, LastWord, Progress
from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus, PodTime, State
from modelchain.crd import definitions
from modelchain.decide.decide import decide
from modelchain.decide.observed import (
    Artifact,
    Contact,
    Launch,
    Observed,
    RecordArtifact,
    Release,
    Seen,
    Stop,
)
from modelchain.plan.plan import plan

EXAMPLES = Path(__file__).parents[2] / "examples"
SCHEMA = definitions()["modelchains.yaml"]["spec"]["versions"][0]["schema"]["openAPIV3Schema"][
    "properties"
]["status"]
MOST_STEPS = 12  # of one pass: writes and actions
MOMENTS = 12


@dataclass
class Run:
    """The truth about a job. `macs` and `step` count from its last start; a job that was evicted
    starts again.
    """

    digest: str
    released: bool = False
    stopped: bool = False
    over: bool = False
    step: int = 0
    macs: int = 0
    pods: dict[str, PodTime] = field(default_factory=dict)
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
    answers: bool = True
    pods_made: int = 0

    @property
    def chain(self) -> ModelChain:
        return ModelChain.model_validate(self.body)

    def copy(self) -> Life:
        return copy.deepcopy(self)

    def edit(self, **changes: Any) -> None:
        generation = self.body["metadata"]["generation"] + 1
        self.body = with_changes({"metadata.generation": generation, **changes}, self.body)

    # What `decide` sees and does.

    def seen(self, name: str) -> Seen:
        run = self.runs.get(name)
        if run is None:
            return Seen(live=False, started=False)
        live = run.released and not run.over
        stage, attempt = next(
            (s, a) for s in self.status.stages for a in s.attempts if a.name == name
        )
        gone = frozenset(list(run.pods)[: -self.nodes])  # remembered, from before an eviction
        summed_up = attempt.gone.gpu_seconds > 0
        pods = {
            u: pod
            for u, pod in run.pods.items()
            if u not in gone or not summed_up or u in attempt.pods
        }
        progress = Progress(
            step=run.step, steps=self.steps(stage.name), samples_per_second=1.0, eta_seconds=1.0
        )
        return Seen(
            live=live,
            started=True,
            uid=f"uid-{name}",
            unreleased=not run.released and not run.over,
            running=live,
            progress=progress if live else None,
            macs=run.macs if live else 0,
            pods=pods,
            gone_pods=gone,
            word=run.word if run.over else None,
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
            price="2.21",
            poll_seconds=30.0,
        )

    def reconcile(self) -> None:
        """One pass, until nothing is left to do. Deciding again must then change nothing."""
        for _ in range(MOST_STEPS):
            self.now += 0.01
            step = decide(self.chain, self.observed(), self.now)
            if step.write:
                self.store(step.status)
            elif not self.does(step.action):
                break
        else:
            raise AssertionError("the pass does not end")
        self.now += 0.01
        again = decide(self.chain, self.observed(), self.now)
        assert not again.write and again.status == self.status

    def store(self, status: ChainStatus) -> None:
        body = through_a_server(status.model_dump(mode="json", by_alias=True, exclude_none=True))
        assert list(violations(body, SCHEMA)) == []
        self.status = ChainStatus.model_validate_json(json.dumps(body))
        assert self.status == status, "a status is read back as written"
        assert len(json.dumps(body)) < 200_000

    def does(self, action: object) -> bool:
        match action:
            case Launch(attempt=attempt):
                assert attempt.name not in self.runs
                self.runs[attempt.name] = Run(attempt.input_digest)
            case Release(attempt):
                self.runs[attempt.name].released = True
                self.start(attempt.name)
            case Stop(name):
                was, self.runs[name].stopped = self.runs[name].stopped, True
                return not was
            case RecordArtifact(launch=launch, spent=spent):
                digest = launch.attempt.input_digest
                self.records[digest] = Artifact(
                    digest[::-1], f"{digest}/artifact", spent.macs, {"top1": 30.0}
                )
            case _:
                return False
        return True

    # What happens.

    @property
    def live(self) -> str | None:
        return next(
            (name for name, run in self.runs.items() if run.released and not run.over), None
        )

    def planned(self, stage: str) -> tuple[int, int]:
        """The steps of a stage, and the MACs of one step."""
        found = next(s for s in plan(self.chain, "analytic", {}).stages if s.name == stage)
        steps = found.samples // self.chain.spec.recipe.global_batch_size
        return steps, found.macs // steps

    def steps(self, stage: str) -> int:
        return self.planned(stage)[0]

    def stage_of(self, name: str) -> str:
        return next(s.name for s in self.status.stages for a in s.attempts if a.name == name)

    def start(self, name: str) -> None:
        run = self.runs[name]
        for rank in range(self.nodes):
            self.pods_made += 1
            run.pods[f"{self.pods_made:036}"] = PodTime(started=self.now, gpus=8, first=rank == 0)

    def end_pods(self, name: str) -> None:
        ended = {"finished": self.now}
        run = self.runs[name]
        run.pods = {
            uid: pod if pod.finished else pod.model_copy(update=ended)
            for uid, pod in run.pods.items()
        }

    def train(self, chance: random.Random) -> None:
        name = self.live
        assert name is not None
        run, (steps, macs) = self.runs[name], self.planned(self.stage_of(name))
        more = chance.randint(1, max(1, (steps - run.step) // 3))
        run.step, run.macs, self.now = (
            run.step + more,
            run.macs + more * macs,
            self.now + chance.uniform(30, 3000),
        )

    def evict(self) -> None:
        name = self.live
        assert name is not None
        self.now += 60.0
        self.end_pods(name)
        self.now += 60.0
        self.start(name)
        # The operator remembers as many pods.
        self.runs[name].pods = dict(list(self.runs[name].pods.items())[-4096:])

    def end(self, failure: FailureClass | None) -> None:
        name = self.live
        assert name is not None
        run, (steps, macs) = self.runs[name], self.planned(self.stage_of(name))
        self.end_pods(name)
        if failure is None:
            run.macs += max(0, steps - run.step) * macs
        run.word = LastWord(
            result="Failed" if failure else "Succeeded",
            failure=failure,
            message="as it was told",
            macs=run.macs,
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
    body = safe_load((EXAMPLES / f"{example}.yaml").read_text())
    body["metadata"] |= {"uid": "chain-uid", "generation": 1}
    return Life(
        with_changes(
            {"spec.retry": {"maxRetries": 100, "maxDisruptions": 10_000}, **changes}, body
        ),
        nodes,
    )


def random_life(chance: random.Random) -> Life:
    """A chain with up to about 1e21 MACs per stage."""
    macs = 10 ** chance.uniform(16, 21)
    per_sample = 1e11  # about the training MACs of ViT-S
    samples = int(min(99_999_999_999, macs / per_sample / 32))
    return life_of(
        chance.choice(["vit-cc3m", "swin-cc3m"]),
        chance.choice([1, 8, 100]),
        **{"spec.data.train.samples": samples},
        **{
            "spec.data.train.captionsPerSample": chance.randint(1, 64),
            "spec.recipe.seed": chance.randint(0, 999),
        },
    )


def check_requests(life: Life) -> None:
    """Makes every possible request at this moment; each is carried out within two passes."""
    name = life.live
    suspended = life.copy()
    suspended.edit(**{"spec.suspend": True})
    edited = life.copy()
    edited.edit(**{"spec.recipe.seed": 12345})
    for other in (suspended, edited):
        other.reconcile()
        other.reconcile()
        assert name is None or other.runs[name].stopped
        assert other.status.observed_generation == life.body["metadata"]["generation"] + 1
    asked = replace(life.copy(), retry="again")
    asked.reconcile()
    assert asked.status.retry == "again"
    if name is not None:
        late = life.copy()
        late.now += 1e6
        late.reconcile()
        late.reconcile()
        assert late.runs[name].stopped, "the trainer answers, but has taken no step for days"


@pytest.mark.parametrize("of", ["vit-cc3m", "swin-cc3m", "vit-merged15m", *range(5)])
def test_every_request_is_carried_out_at_any_moment(of: str | int) -> None:
    chance = random.Random(of)
    life = life_of(of) if isinstance(of, str) else random_life(chance)
    for _ in range(MOMENTS):
        life.reconcile()
        check_requests(life)
        life.happens(chance)
    life.reconcile()
    listed = sum(attempt.macs for stage in life.status.stages for attempt in stage.attempts)
    assert life.status.total.macs >= listed * (1 - 1e-12), (
        "the sum is smaller by rounding only: above 2^53 it is a double"
    )


@pytest.mark.parametrize(("nodes", "evictions"), [(1, 500), (8, 500), (130, 20), (256, 20)])
def test_gpu_seconds_are_right_after_any_number_of_evictions(nodes: int, evictions: int) -> None:
    life, chance = life_of("swin-cc3m", nodes), random.Random(nodes)
    life.reconcile()
    began = life.now
    for n in range(evictions):
        life.evict()
        if n % 7 == 0:
            life.train(chance)
        life.reconcile()
    check_requests(life)
    life.end(None)
    ended = life.now
    life.reconcile()
    first = life.status.stages[0]
    idle = evictions * 60.0  # after an eviction no pod holds a GPU for a minute
    assert first.state is State.SUCCEEDED
    # The tolerance is for the passes, which take time too.
    assert first.gpu_seconds == pytest.approx((ended - began - idle) * nodes * 8, abs=nodes)


@pytest.mark.parametrize("change", [{"spec.suspend": True}, {"spec.recipe.seed": 12345}])
def test_an_attempt_that_takes_steps_while_it_should_stop_is_stopped(
    change: dict[str, Any],
) -> None:
    """A step that is not in the status yet is written first. That must happen once only, or the
    stop would be put off for ever.
    """
    life, chance = life_of("swin-cc3m", nodes=8), random.Random(0)
    life.reconcile()
    for _ in range(2):  # the first step of an attempt, and another
        name = life.live
        assert name is not None
        life.train(chance)
        asked = life.copy()
        asked.edit(**change)
        asked.reconcile()
        asked.reconcile()
        assert asked.runs[name].stopped
        asked.train(chance)
        asked.reconcile()
        life.reconcile()
