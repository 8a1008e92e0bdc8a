"""Chains that the operator's own controller passes over, in an API server in memory. Their jobs and
pods are played.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab import NAMESPACE, Lab, success
from podshapes import ended, running, word
from stagelife import FIRST, Life

from modelchain.api.contracts import LiveProgress
from modelchain.api.uses import Resumed, Uses
from modelchain.io.load import parse
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import CHAINS, JOBS, PODS, Object
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS

REPOSITORY = Path(__file__).parents[2]
SECOND = "vit-vit-s-a1"
EVALUATION = {"name": "top1", "kind": "Retrieval", "shards": "/data/val.tar"}
PRICED = parse(
    PoolFile,
    {
        "nodePools": {
            "a100-80gb": {
                "gpu": "A100",
                "gpusPerNode": 8,
                "price": {"perGpuHour": "2.50", "currency": "USD", "source": "contract"},
            },
            "free": {"gpu": "A100", "gpusPerNode": 8},
        }
    },
    "operator.yaml",
)

Make = Callable[[], Object]
# By the name of a phase, what makes a chain that is in it.
PHASES: dict[str, Make] = {}


def phase(name: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        assert name not in PHASES
        PHASES[name] = make
        return make

    return add


def shown(chain: Object) -> Object:
    """The chain as a client reads it from the API server."""
    found = copy.deepcopy(chain)
    return found | {"apiVersion": "modelchain.dev/v1alpha1", "kind": "ModelChain"}


# -- without GPUs, by small steps ------------------------------------------------------------------


def seen(lab: Lab, passes: int = 3) -> Object:
    """The lab's chain after a few passes."""
    lab.passes(count=passes)
    return shown(lab.get(CHAINS, "family"))


def gated(stages: str = "ab", percent: float = 48.5, **gate: Any) -> Lab:
    """The second stage reaches so many percent, where the gate asks for 50."""
    lab = Lab()
    whole = {"metric": "top1", "baseline": dict.fromkeys(stages[1:], "50"), **gate}
    lab.apply(stages=stages, **{"spec.evaluation": [EVALUATION], "spec.gate": whole})
    lab.passes()
    finish(lab, "a-a1", 40)
    if "family-b-a1" in lab.names(PYTORCHJOBS):
        finish(lab, "b-a1", percent)
    return lab


def finish(lab: Lab, job: str, percent: float) -> None:
    """The job's trainer leaves an artifact that reaches so many percent."""
    digest = job.encode().hex().ljust(64, "0")
    known = {"metrics": {"top1": percent}, "artifact_digest": digest}
    lab.end(f"family-{job}", success().model_copy(update=known))
    lab.passes(count=2)


def packing(condition: str) -> Lab:
    """The Job that fills the claim of data has this condition."""
    lab = Lab()
    meta = {"name": "pack", "namespace": NAMESPACE, "labels": {"modelchain.dev/fills": "data"}}
    status = {"conditions": [{"type": condition, "status": "True"}]}
    lab.kube.put(JOBS, {"metadata": meta, "status": status})
    lab.apply(stages="ab")
    return lab


# -- on GPUs that cost money -----------------------------------------------------------------------


class Family(Life):
    """A chain of two stages. Times are in seconds since it was applied."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(config=PRICED, **changes)
        self.look()

    @property
    def shown(self) -> Object:
        return shown(self.kube.objects[CHAINS.plural, "vit"])

    def trains(self, job: str = FIRST, at: float = 100) -> Family:
        """Its pod has run for an hour, and rank 0 tells how far it is."""
        self.pods(running(start=at + 60, created=at), job=job)
        self.look(at + 3600 - self.now)
        live = LiveProgress(
            attempt=job,
            step=4100,
            steps=10_000,
            samples_per_second=900.0,
            eta_seconds=5080.0,
            macs=10**15,
            milliseconds=Uses(startup=60_000, productive=3_000_000, unsaved=480_000),
            resumed=Resumed(),
        )
        self.controller.memory.note_answer(self._pod["metadata"]["uid"], live)
        self.look(30)
        return self

    def finishes(self, job: str = FIRST, at: float = 100) -> Family:
        """It trains for three hours and leaves an artifact."""
        told = Uses(startup=60_000, productive=10_700_000).model_dump(by_alias=True)
        message = word("Succeeded", steps=1, macs=5 * 10**15, milliseconds=told)
        pod = ended(code=0, start=at + 60, end=at + 10_800, created=at, message=message)
        self.pods(pod, job=job)
        self.end_job("Succeeded", job)
        self.look(at + 10_810 - self.now)
        return self

    def ends(self, message: str = "", code: int = 1) -> Family:
        """It ends after an hour, without an artifact."""
        last = max(self.now, 3700)
        self.pods(ended(code=code, start=160, end=last, created=100, message=message))
        self.end_job("Succeeded" if code == 0 else "Failed")
        self.look(last + 10 - self.now)
        return self

    def stopping(self) -> Family:
        """It trains, and is suspended; its trainer still writes a checkpoint."""
        self.trains().edit(2, **{"spec.suspend": True})
        self.look(1)
        return self

    def goes(self) -> Family:
        """Its pod, whose job was deleted, ends within its grace period."""
        told = Uses(startup=60_000, productive=3_400_000).model_dump(by_alias=True)
        stop = word("Failed", "Preempted", milliseconds=told, checkpointStep=4000)
        known = self._pod["metadata"]
        over = ended(code=75, start=160, end=self.now + 20, created=100, message=stop)
        self.kube.put(PODS, over | {"metadata": known})
        self.look(30)
        return self

    def look_on(self) -> None:
        """A few passes, also where no status can be read."""
        for _ in range(3):
            asyncio.run(self.controller.reconcile(("team", "vit")))

    @property
    def _pod(self) -> Object:
        [pod] = (found for (kind, _), found in self.kube.objects.items() if kind == PODS.plural)
        return pod


def complete() -> Family:
    """Both stages are trained."""
    return Family().finishes().finishes(SECOND, at=11_000)
