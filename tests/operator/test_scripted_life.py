"""One stage through two pools, a price change at noon, spot and on-demand nodes, an eviction, an
OOM kill, a stall and a lost node. Each second has one use, and the money is that of a computation
by hand. The operator restarts after each look.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from podshapes import Pod, disrupted, ended, running, word
from stagelife import Life
from sums import check_settled_stays, check_sums

from modelchain.api.contracts import FailureClass, LiveProgress
from modelchain.api.spec import Evaluation
from modelchain.api.status import StageStatus, State
from modelchain.api.uses import Resumed, Uses
from modelchain.identity.digest import short_key
from modelchain.io.load import parse
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import CHAINS, NODES, PODS

LABEL = "karpenter.sh/capacity-type"
NOON = 12 * 3600
CENT = Decimal("0.01")


def price(per_hour: str, valid_from: str, capacity: str | None = None) -> dict[str, str]:
    said = {"perGpuHour": per_hour, "validFrom": valid_from, "currency": "USD", "source": "list"}
    return said | ({"capacity": capacity} if capacity else {})


CONFIG = parse(
    PoolFile,
    {
        "nodePools": {
            "a100-80gb": {
                "gpu": "A100",
                "gpusPerNode": 8,
                "capacityLabel": LABEL,
                "prices": [
                    price("1.00", "2026-01-01", "Spot"),
                    price("1.20", "2026-09-01T12:00:00Z", "Spot"),
                    price("4.00", "2026-01-01", "OnDemand"),
                    price("4.40", "2026-09-01T14:00:00+02:00", "OnDemand"),
                ],
            },
            "h100": {
                "gpu": "H100",
                "gpusPerNode": 8,
                "price": {"perGpuHour": "10.00", "currency": "USD", "source": "contract"},
            },
        }
    },
    "operator.yaml",
)

# By attempt, the seconds of each use, and what they cost: (seconds, dollars for a GPU hour).
BY_HAND: list[tuple[dict[str, int], list[tuple[int, str]]]] = [
    ({"startup": 500, "productive": 35300, "evaluating": 60, "lost": 40}, [(35900, "1.00")]),
    ({"startup": 200, "productive": 9500, "lost": 1000}, [(7100, "4.00"), (3600, "4.40")]),
    ({"startup": 250, "productive": 2500, "stalled": 2000, "lost": 350}, [(5100, "4.40")]),
    ({"startup": 200, "productive": 6300, "evaluating": 100, "lost": 1300}, [(7900, "10.00")]),
    ({"startup": 100, "productive": 9000, "evaluating": 750, "lost": 50}, [(9900, "10.00")]),
]


def dollars(parts: list[tuple[int, str]]) -> Decimal:
    return sum((Decimal(s) * 8 / 3600 * Decimal(hour) for s, hour in parts), Decimal(0))


class Story(Life):
    """A life whose operator is another process at every look."""

    def until(self, when: float) -> StageStatus:
        before = self.status
        stage = self.look(when - self.now)
        after = self.status
        check_sums(after)
        known = {old.name: old for old in before.baselines}
        for old, new in zip(before.stages, after.stages, strict=bool(before.stages)):
            check_settled_stays(old, new)
        for row in after.baselines:
            check_settled_stays(known.get(row.name, row), row)
        self.restart()
        return stage

    def node(self, capacity: str) -> None:
        self.kube.put(NODES, {"metadata": {"name": "node-0", "labels": {LABEL: capacity}}})

    def answers(self, number: int, step: int, uses: Uses, resumed: Resumed | None = None) -> None:
        """Rank 0 answers the operator that is at work now."""
        self.answer(f"vit-vit-t-a{number}", step, uses, resumed)

    def answer(self, job: str, step: int, uses: Uses, resumed: Resumed | None = None) -> None:
        [pod] = (p for (kind, _), p in self.kube.objects.items() if kind == PODS.plural)
        live = LiveProgress(
            attempt=job,
            step=step,
            steps=12480,
            samples_per_second=1.0,
            eta_seconds=1.0,
            macs=1000 * step,
            milliseconds=uses,
            resumed=resumed or Resumed(),
        )
        self.controller.memory.note_answer(pod["metadata"]["uid"], live)

    def pod_ends(self, pod: Pod) -> None:
        """The pod of a job that was deleted ends."""
        [(key, known)] = ((k, p) for k, p in self.kube.objects.items() if k[0] == PODS.plural)
        self.kube.put(PODS, {**pod, "metadata": known["metadata"]})
        assert key in self.kube.objects


def uses(**seconds: int) -> Uses:
    return Uses(**{use: 1000 * time for use, time in seconds.items()})


def wrote(number: int, created: float, told: Uses) -> Resumed:
    """What a checkpoint of an attempt says."""
    attempt = f"vit-vit-t-a{number}"
    return Resumed(
        attempt=attempt,
        pod=f"vit-b-a1-master-0-{created}",
        milliseconds=told,
        macs=10,
        saved_macs=10,
    )


def told_by(
    result: str, failure: str | None, told: Uses, resumed: Resumed | None = None, **also: Any
) -> str:
    more: dict[str, Any] = also | {
        "milliseconds": told.model_dump(by_alias=True),
        "steps": 1,
        "macs": 5,
    }
    if resumed is not None:
        more["resumed"] = resumed.model_dump(by_alias=True)
    return word(result, failure, **more)


def told(story: Story) -> Iterator[tuple[str, dict[str, int]]]:
    return told_of(story.status.stages[0])


def told_of(stage: StageStatus) -> Iterator[tuple[str, dict[str, int]]]:
    for attempt in stage.attempts:
        assert not any(time % 8000 for _, time in attempt.gpu_milliseconds)
        yield attempt.name, {use: t // 8000 for use, t in attempt.gpu_milliseconds if t}


@pytest.fixture
def story() -> Story:
    retry = {"maxRetries": 10, "maxDisruptions": 10}
    made = Story(config=CONFIG, **{"spec.retry": retry})
    made.until(1)
    return made


def test_a_life(story: Story) -> None:
    evicted_from_a_spot_node(story)
    out_of_memory_over_noon(story)
    stalls(story)
    loses_its_node_in_another_pool(story)
    finishes(story)
    stage = story.status.stages[0]
    assert [a.failure for a in stage.attempts] == [
        FailureClass.PREEMPTED,
        FailureClass.OUT_OF_MEMORY,
        FailureClass.STALL_DEADLINE,
        FailureClass.NODE_LOST,
        None,
    ]
    assert [by for _, by in told(story)] == [by for by, _ in BY_HAND]
    for attempt, (_, parts) in zip(stage.attempts, BY_HAND, strict=True):
        assert Decimal(attempt.cost or 0) == pytest.approx(dollars(parts), abs=Decimal("1e-9"))
        assert (attempt.unpriced_seconds, attempt.unsettled) == (0.0, None)
    by_hand = sum((dollars(parts) for _, parts in BY_HAND), Decimal(0))
    assert by_hand.quantize(Decimal("0.01")) == Decimal("623.51")
    total, record = story.status.total, story.records[0]["spec"]
    assert story.status.summary.cost == "623.51" and story.status.currency == "USD"
    assert Decimal(record["cost"]) == Decimal(stage.cost or 0)
    assert record["gpuMilliseconds"] == stage.gpu_milliseconds.model_dump(by_alias=True)
    assert record["priceSources"] == ["list", "contract"] and record["unpricedSeconds"] == 0.0
    applied_again(story, total.gpu_milliseconds, by_hand)


def evicted_from_a_spot_node(story: Story) -> None:
    story.node("spot")
    story.until(50)
    story.pods(running(start=400, created=100))
    story.until(20_000)
    over = uses(startup=200, productive=35300, evaluating=60)
    stop = told_by("Failed", "Preempted", over, Resumed())
    story.pods(ended(code=75, start=400, end=36_000, created=100, message=stop))
    story.end_job("Failed")
    story.until(36_010)
    assert [by for _, by in told(story)] == [BY_HAND[0][0]]


def out_of_memory_over_noon(story: Story) -> None:
    job = "vit-vit-t-a2"
    story.node("on-demand")
    story.until(36_050)
    story.pods(running(start=36_200, created=36_100), job=job)
    story.now = 46_000
    resumes = wrote(1, 100, uses(startup=200, productive=35300, evaluating=60))
    story.answers(2, 500, uses(startup=100, productive=9000, unsaved=700), resumes)
    story.until(46_000)
    assert story.now > NOON and list(told(story))[1][1] == {
        "startup": 200, "productive": 9000, "unsaved": 700
    }  # fmt: skip
    killed = ended(code=137, reason="OOMKilled", start=36_200, end=46_800, created=36_100)
    story.pods(killed, job=job)
    story.end_job("Failed", job)
    story.until(46_810)
    assert list(told(story))[1][1] == {"startup": 200, "productive": 9000, "unsaved": 1500}


def stalls(story: Story) -> None:
    job = "vit-vit-t-a3"
    story.until(46_850)
    story.pods(running(start=47_000, created=46_900), job=job)
    story.now = 50_000
    resumes = wrote(2, 36_100, uses(startup=100, productive=9500))
    told_then = uses(startup=150, productive=2000, unsaved=850)
    story.answers(3, 700, told_then, resumes)
    story.until(50_000)
    assert list(told(story))[1][1] == BY_HAND[1][0], "the OOM kill is settled by who resumes"
    story.now = 51_900
    story.answers(3, 700, told_then, resumes)
    story.until(51_900)
    assert job not in story.jobs, "it is ended"
    story.pod_ends(ended(code=137, start=47_000, end=52_000, created=46_900))
    story.until(52_005)
    assert list(told(story))[2][1] == {
        "startup": 250, "productive": 2000, "stalled": 2000, "unsaved": 850
    }  # fmt: skip


def loses_its_node_in_another_pool(story: Story) -> None:
    job = "vit-vit-t-a4"
    story.edit(3, **{"spec.runner.nodePool": "h100"})
    story.until(52_090)
    story.pods(running(start=52_200, created=52_100), job=job)
    story.now = 59_000
    resumes = wrote(3, 46_900, uses(startup=150, productive=2500))
    story.answers(4, 900, uses(startup=100, productive=6000, evaluating=100, unsaved=600), resumes)
    story.until(59_000)
    assert list(told(story))[2][1] == BY_HAND[2][0]
    pod = disrupted(running(start=52_200, created=52_100), "DeletionByTaintManager", when=60_000)
    pod["status"]["phase"] = "Failed"
    story.pods(pod, job=job)
    story.end_job("Failed", job)
    story.until(60_010)


def finishes(story: Story) -> None:
    job = "vit-vit-t-a5"
    story.until(60_090)
    story.pods(running(start=60_150, created=60_100), job=job)
    story.until(61_000)
    resumes = wrote(4, 52_100, uses(startup=100, productive=6300, evaluating=100))
    done = told_by("Succeeded", None, uses(startup=50, productive=9000, evaluating=750), resumes)
    story.pods(ended(code=0, start=60_150, end=70_000, created=60_100, message=done), job=job)
    story.end_job("Succeeded", job)
    assert story.until(70_010).state is State.SUCCEEDED


def applied_again(story: Story, spent: Uses, cost: Decimal) -> None:
    """The finished stage's part is in its record."""
    again(story)
    stage = story.status.stages[0]
    assert stage.state is State.SUCCEEDED and stage.gpu_milliseconds == spent
    assert Decimal(stage.cost or 0) == pytest.approx(cost, abs=Decimal("1e-9"))


def again(story: Story) -> None:
    """The chain is deleted and applied again."""
    thing = story.kube.objects[CHAINS.plural, "vit"]
    for key in [key for key in story.kube.objects if key[0] in ("pods", "pytorchjobs")]:
        del story.kube.objects[key]
    thing.pop("status")
    thing["metadata"]["uid"] = "n" * 36
    story.kube.put(CHAINS, thing)
    story.look(10)


# Of the baseline's attempts, and of those of the chain's two stages.
ALONE = [
    ({"startup": 150, "productive": 2000, "lost": 850}, [(3000, "10.00")]),
    ({"startup": 80, "productive": 5800, "evaluating": 100, "lost": 20}, [(6000, "10.00")]),
]
STAGES = [({"startup": 60, "productive": 900, "evaluating": 40}, [(1000, "10.00")])] * 2
EVALUATION = {"name": "top1", "kind": "Retrieval", "shards": "/data/val.tar"}
KEYS = {"top1": short_key(Evaluation.model_validate(EVALUATION))}


def test_a_baseline() -> None:
    """It has a ledger of its own, also after it was killed, and after the chain was re-created."""
    gate = {"metric": "top1", "train": ["vit-s"]}
    changes = {"spec.evaluation": [EVALUATION], "spec.gate": gate, "spec.runner.nodePool": "h100"}
    story = Story(config=CONFIG, **changes)
    story.until(1)
    ends_well(story, "vit-vit-t-a1", 100)
    story.until(1990)
    story.pods(running(start=2100, created=2000), job="vit-vit-s-b1")
    story.now = 4000
    begun = uses(startup=50, productive=1500, unsaved=350)
    story.answer("vit-vit-s-b1", 300, begun, Resumed())
    story.until(4000)
    killed = ended(code=137, reason="OOMKilled", start=2100, end=5000, created=2000)
    story.pods(killed, job="vit-vit-s-b1")
    story.end_job("Failed", "vit-vit-s-b1")
    story.until(5010)
    story.until(5500)
    story.pods(running(start=6060, created=6000), job="vit-vit-s-b2")
    story.until(7000)
    saved = Resumed(
        attempt="vit-vit-s-b1",
        pod="vit-b-a1-master-0-2000",
        milliseconds=uses(startup=50, productive=2000),
    )
    then = uses(startup=20, productive=5800, evaluating=100)
    done = told_by("Succeeded", None, then, saved, metrics={"top1": 60.0}, evaluations=KEYS)
    story.pods(
        ended(code=0, start=6060, end=12_000, created=6000, message=done), job="vit-vit-s-b2"
    )
    story.end_job("Succeeded", "vit-vit-s-b2")
    story.until(12_010)
    story.until(12_090)
    ends_well(story, "vit-vit-s-a1", 12_100)
    [row], total = story.status.baselines, story.status.total
    assert [by for _, by in told_of(row)] == [by for by, _ in ALONE]
    by_hand = [sum((dollars(p) for _, p in parts), Decimal(0)) for parts in (ALONE, STAGES)]
    assert Decimal(row.cost or 0).quantize(CENT) == by_hand[0].quantize(CENT) == Decimal("200.00")
    assert Decimal(total.cost or 0).quantize(CENT) == by_hand[1].quantize(CENT)
    spent = [(total.gpu_milliseconds, total.cost), (row.gpu_milliseconds, row.cost)]
    again(story)
    after = [story.status.total, *story.status.baselines]
    assert [(one.gpu_milliseconds, one.cost) for one in after] == spent


def ends_well(story: Story, job: str, at: int) -> None:
    """An attempt of 1000 seconds."""
    story.pods(running(start=at + 50, created=at), job=job)
    story.until(at + 500)
    told = uses(startup=10, productive=900, evaluating=40)
    metrics = {"metrics": {"top1": 59.8}, "evaluations": KEYS}
    word = told_by("Succeeded", None, told, Resumed(), **metrics)
    pod = ended(code=0, start=at + 50, end=at + 1000, created=at, message=word)
    story.pods(pod, job=job)
    story.end_job("Succeeded", job)
    story.until(at + 1010)
