"""A trainer that trains nothing, in the place of torchrun: it leaves a real trainer's files.

Everything else is real: the root, `decide`, and what carries its decisions out. At each of its
moments all of it may be killed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelchain.api.contracts import (
    CONFIG,
    LAST_WORD,
    METRICS,
    RESULTS,
    WEIGHTS,
    DataRequest,
    Manifest,
    Measured,
    Results,
    Task,
    TrainFiles,
)
from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus
from modelchain.decide.decide import decide
from modelchain.decide.observed import Decision
from modelchain.identity.digest import TRAINER_MATH, evaluation_key
from modelchain.io.files import entry_of, seal
from modelchain.io.lastword import success, write_last_word
from modelchain.local.root import Root
from modelchain.local.world import LocalWorld

PICTURES = 355
STEPS = 100
Accuracy = Callable[[Task], float]


class Killed(BaseException):
    """Every process of the run was killed at once."""


class Moments:
    """Counts what happens, and kills everything at one moment."""

    def __init__(self, last: int | None = None):
        self.last, self.count = last, 0

    def pass_(self) -> None:
        self.count += 1
        if self.count == self.last:
            raise Killed


class PlayedTrainer:
    """Stands for `TrainerProcess`. A look at it lets it take its next step."""

    def __init__(self, moments: Moments, accuracy: Accuracy, trained: Counter[str]):
        self.moments, self.accuracy, self.trained = moments, accuracy, trained
        self.attempt: str | None = None
        self._left: list[Callable[[], None]] = []

    def start(self, attempt: str, task: Path, processes: int, threads: int) -> None:
        self.attempt, self.folder = attempt, task.parent
        self.task = Task.model_validate_json(task.read_bytes())
        self._left = [self._step, self._checkpoint, self._artifact, self._last_word]

    def is_live(self) -> bool:
        if self._left:
            self._left.pop(0)()
            self.moments.pass_()
        if not self._left:
            self.attempt = None
        return bool(self._left)

    def stop(self) -> None:
        self._left = []

    @property
    def _stage(self) -> Path:
        return Path(self.task.root) / self.task.input_digest

    def _manifest(self, kind: Any, folder: Path, **more: Any) -> Manifest:
        files = {path.name: entry_of(path) for path in folder.iterdir()}
        return Manifest(
            kind=kind,
            input_digest=self.task.input_digest,
            step=STEPS,
            inputs=self.task.inputs,
            files=files,
            environment={"trainerMath": TRAINER_MATH},
            **more,
        )

    def _step(self) -> None:
        macs = STEPS * self.task.macs_per_step
        entry = {"event": "step", "step": STEPS, "steps": STEPS, "macs": macs}
        entry |= {"samplesPerSecond": 1.0, "etaSeconds": 0.0}
        (self.folder / METRICS).write_text(json.dumps(entry) + "\n")

    def _checkpoint(self) -> None:
        work, target = self.folder / ".work", self.folder / f"step-{STEPS}"
        work.mkdir(exist_ok=True)
        seal(work, self._manifest("checkpoint", work), target)

    def _artifact(self) -> None:
        """As the real one, it keeps an artifact that is already there."""
        if not (self._stage / "artifact").exists():
            self.trained[self.task.input_digest] += 1
            work = self._stage / ".work"
            work.mkdir(exist_ok=True)
            (work / WEIGHTS).write_bytes(hashlib.sha256(self.task.input_digest.encode()).digest())
            (work / CONFIG).write_text("{}")
            (work / RESULTS).write_text(self._results().model_dump_json(by_alias=True))
            digest = entry_of(work / WEIGHTS).sha256
            made = self._manifest("artifact", work, artifact_digest=digest)
            seal(work, made, self._stage / "artifact")

    def _results(self) -> Results:
        [evaluation] = self.task.data.evaluation
        measured = Measured(loss=1.0, metrics={evaluation.name: self.accuracy(self.task)})
        return Results(
            stage=self.task.stage,
            model=self.task.model,
            predecessor=self.task.predecessor.stage if self.task.predecessor else None,
            steps=STEPS,
            samples_seen=STEPS,
            macs=STEPS * self.task.macs_per_step,
            seconds=1.0,
            initial=measured,
            final=measured,
            growth=None,
            evaluations={evaluation.name: evaluation_key(evaluation)},
            pictures={evaluation.name: PICTURES},
        )

    def _last_word(self) -> None:
        folder = self._stage / "artifact"
        manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
        results = Results.model_validate_json((folder / RESULTS).read_bytes())
        word = success(folder, manifest, results, macs=results.macs, seconds=1.0)
        write_last_word(self.folder / LAST_WORD, word)


class PlayedWorld(LocalWorld):
    """The local world, which may be killed before and after each write and action."""

    moments: Moments

    def act(self, decision: Decision) -> None:
        self.moments.pass_()
        super().act(decision)
        self.moments.pass_()


def request(chain: ModelChain) -> DataRequest:
    """The data of a trainer that reads none."""
    train = TrainFiles(files=[], samples=1, captions_per_sample=1, fingerprint=None)
    asked = [{**e.model_dump(by_alias=True), "files": []} for e in chain.spec.evaluation]
    return DataRequest.model_validate(
        {"index": "", "file": "chain.yaml", "train": train, "evaluation": asked}
    )


def run(
    chain: ModelChain,
    path: Path,
    moments: Moments,
    accuracy: Accuracy,
    trained: Counter[str],
    only: str | None = None,
) -> ChainStatus:
    """`modelchain run` with a played trainer, until nothing is left to do, or all is killed.

    Args:
        trained: counts how often a model was trained from each input digest.
    """
    path.mkdir(exist_ok=True)
    root = Root(path)
    trainer: Any = PlayedTrainer(moments, accuracy, trained)
    world = PlayedWorld(chain, root, trainer, request(chain), "f" * 64, only)
    world.moments = moments
    status = root.read_status(chain)
    while True:
        decision = decide(chain, world.observe(status), time.time())
        if decision.write:
            moments.pass_()
            root.write_status(chain, decision.status)
            moments.pass_()
            status = decision.status
        elif decision.action is not None:
            world.act(decision)
        if decision.again is None:
            return status
