"""Training one stage of an arm in a worker process, and all stages of a report,
predecessors first.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from modelchain.api.contracts import LAST_WORD, MANIFEST, RESULTS, Task
from modelchain.api.spec import ModelChain
from modelchain.api.status import AttemptStatus, State
from modelchain.decide.observed import Artifact, Launch
from modelchain.decide.task import Placement, task_for
from modelchain.errors import EXIT_PREEMPTED, WorkError
from modelchain.identity.digest import TRAINER_MATH, canonical, digest_of, stage_inputs
from modelchain.io.files import write_atomic
from modelchain.io.guard import die_with_parent
from modelchain.io.paths import DataFolder
from modelchain.plan.plan import plan

Json = dict[str, Any]
OWNER = "method"


@dataclass(frozen=True)
class Setup:
    """A data set, its evaluation, and what all trainings on it have in common."""

    name: str
    folder: str  # of --data
    shards: str
    samples: int
    evaluation: tuple[Json, ...]
    models: dict[str, Json]  # by name, smallest first
    epochs: int  # of a model trained alone
    batch: int
    captions: int
    rate: str
    warmup: tuple[int, int]  # steps of a first stage, and of a successor
    lists: dict[str, str]  # files that the evaluation names, as JSON

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True)
class ArmStage:
    """One training. Equal stages of several arms are trained once."""

    setup: Setup
    model: str
    epochs: int
    seed: int
    rate: str
    warmup: int
    before: ArmStage | None = None
    width: str = "Insert"
    alpha: str = "500"
    variant: str = ""  # the part of the trainer that is replaced, see `replaced`

    @property
    def key(self) -> str:
        """A digest of all that decides its figures."""
        setup = self.setup
        about = [
            setup.folder,
            setup.shards,
            setup.evaluation,
            setup.batch,
            setup.captions,
            setup.lists,
        ]
        own = [self.epochs, self.seed, self.rate, self.warmup, self.width, self.alpha, self.variant]
        before = self.before.key if self.before else None
        return digest_of({"of": [about, setup.models[self.model], own, before, TRAINER_MATH]})[:20]

    @property
    def label(self) -> str:
        grown = (
            f" {self.variant or self.width}, alpha {self.alpha}, after {self.before.model}"
            if self.before
            else ""
        )
        return f"{self.setup.name} {self.model} seed {self.seed}, {self.epochs} epochs{grown}"

    def chain(self) -> ModelChain:
        """A chain that ends in this stage, as a user would write it."""
        setup, path = self.setup, [self] if self.before is None else [self.before, self]
        warmup = {"first": self.warmup, "successors": self.warmup}
        return ModelChain.model_validate(
            {
                "apiVersion": "modelchain.dev/v1alpha1",
                "kind": "ModelChain",
                "metadata": {"name": setup.name},
                "spec": {
                    "stages": [
                        {"name": s.model, "epochs": s.epochs, "modelConfig": setup.models[s.model]}
                        | ({"rerun": s.variant} if s.variant else {})
                        for s in path
                    ],
                    "data": {
                        "train": (
                            {"shards": f"/data/{setup.shards}", "samples": setup.samples}
                            | {"captionsPerSample": setup.captions}
                        )
                    },
                    "evaluation": list(setup.evaluation),
                    "recipe": {
                        "baselineEpochs": setup.epochs,
                        "globalBatchSize": setup.batch,
                        "learningRate": self.rate,
                        "warmupSteps": warmup,
                        "precision": "fp32",
                        "seed": self.seed,
                    },
                    "transfer": {"width": self.width, "distillation": {"alpha": self.alpha}},
                    "checkpoint": {"everySeconds": 86_400},
                },
            }
        )


@contextmanager
def replaced(variant: str) -> Iterator[None]:
    """Replace one part of the trainer, which no spec can change."""
    import torch

    from modelchain_trainer import growth, models
    from modelchain_trainer.growth.report import REST

    def nothing(
        student: torch.nn.Module, predecessor: Json, width: str, depth: str
    ) -> growth.GrowthReport:
        count = sum(parameter.numel() for parameter in student.parameters())
        method = {"width": width, "depth": depth}
        return growth.GrowthReport(method, 0, 0, count, {REST: Counter(new=count)})

    def random_projection(own: int, predecessor: int) -> torch.nn.Linear:
        return torch.nn.Linear(own, predecessor, bias=False)

    targets: dict[str, tuple[Any, str, Any]] = {
        "random init": (growth, "grow", nothing),
        "random T": (models, "_projection", random_projection),
    }
    if not variant:
        yield
        return
    module, name, replacement = targets[variant]
    original = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)


@dataclass(frozen=True)
class Folders:
    data: Path  # the shards of all data sets
    root: Path  # artifacts by digest, one root a data set, and results of finished stages

    def of(self, setup: Setup) -> Path:
        return self.root / setup.name

    def prepare(self, setup: Setup) -> Path:
        """The folder that stands for mountPath: links to the shards, and the lists beside them."""
        folder = self.of(setup) / "data"
        folder.mkdir(parents=True, exist_ok=True)
        for source in (self.data / setup.folder).resolve().iterdir():
            if source.is_dir() and not (folder / source.name).exists():
                (folder / source.name).symlink_to(source)
        for name, text in setup.lists.items():
            write_atomic(folder / name, text.encode())
        return folder

    def result(self, stage: ArmStage) -> Path:
        return self.root / "results" / f"{stage.key}.json"

    def known(self, stage: ArmStage) -> Json | None:
        """The result of a stage that failed, or whose artifact still exists."""
        if not self.result(stage).is_file():
            return None
        result: Json = json.loads(self.result(stage).read_bytes())
        whole = (
            "failure" in result
            or (self.of(stage.setup) / result["digest"] / "artifact" / MANIFEST).is_file()
        )
        return result if whole else None


def train(stage: ArmStage, folders: Folders, before: Json | None) -> Json:
    """Train a stage. Returns its result: `digest`, `artifact` and the figures of `results.json`; or
    `failure`.

    `before` is its predecessor's result. The trainer finds a stage that is already trained. Raises
    KeyboardInterrupt when asked to stop, after a checkpoint.
    """
    from modelchain.io.stop import Preempted, StopRequest
    from modelchain_trainer.train import Trainer

    parent = os.getppid()
    task = _task(stage, folders, before)
    stop = StopRequest()  # on Ctrl-C: a checkpoint, which the same command resumes
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, stop.on_signal)
    result: Json = {"digest": task.input_digest}
    try:
        with replaced(stage.variant):
            word = Trainer(task, stop, {}, lambda _: None).train()
    except Preempted:
        if os.getppid() != parent:  # the parent has ended
            os._exit(EXIT_PREEMPTED)
        raise KeyboardInterrupt from None
    except WorkError as error:
        if error.failure != "NonFinite":
            raise
        result |= {"failure": str(error)}
    else:
        artifact = Path(task.root) / task.input_digest / "artifact"
        results = json.loads((artifact / RESULTS).read_bytes())
        result |= {
            "artifact": word.artifact_digest,
            "macs": results["macs"],
            "seconds": results["seconds"],
        }
        result |= {at: results[at]["metrics"] for at in ("initial", "final")}
    finally:
        _idle()
    write_atomic(folders.result(stage), canonical(result))
    return result


def _task(stage: ArmStage, folders: Folders, before: Json | None) -> Task:
    """The trainer's task; its directory is made. `before` is the predecessor's result."""
    root, chain = folders.of(stage.setup), stage.chain()
    data = DataFolder(chain, root / "data", Path("method.py")).request(root / "index")
    predecessor = None
    if before is not None:
        path = f"{before['digest']}/artifact"
        predecessor = Artifact(before["artifact"], path, before["macs"], before["final"])
    index = len(chain.spec.stages) - 1
    inputs = stage_inputs(
        chain.spec,
        index,
        epochs=stage.epochs,
        fingerprint=None,
        predecessor=predecessor and predecessor.digest,
    )
    digest = digest_of(inputs)
    attempt = AttemptStatus(name=stage.model, number=1, input_digest=digest, state=State.RUNNING)
    directory = root / digest / f"{OWNER}-a1"
    directory.mkdir(parents=True, exist_ok=True)
    placement = Placement(
        root=str(root),
        predecessors=str(root),
        owner=OWNER,
        last_word=str(directory / LAST_WORD),
        data=data,
        threads=1,
        device="cpu",
    )
    return task_for(chain, {}, Launch(index, attempt, inputs, predecessor), placement)


@dataclass
class _Progress:
    """Says how far a report is, after each stage."""

    say: Callable[[str], None]
    stages: int
    # Seconds, by `estimate`, of all stages that this command trains and of those it has trained.
    total: float
    spent: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def trained(self, stage: ArmStage, result: Json, done: int) -> None:
        self.spent += estimate(stage)
        took = time.monotonic() - self.started
        eta = took / self.spent * (self.total - self.spent)
        times = f"{timedelta(seconds=round(took))} gone, {timedelta(seconds=round(eta))} left"
        metric = stage.setup.evaluation[0]["name"]
        score = result.get("failure") or f"{result['final'][metric]:.2f}"
        self.say(f"[{done}/{self.stages}] {times} | {stage.label}: {score}")


def run(
    stages: Sequence[ArmStage], folders: Folders, workers: int, say: Callable[[str], None]
) -> dict[ArmStage, Json]:
    """The results of these stages and of those before them. A trained stage is not run again."""
    wanted = list(dict.fromkeys(s for stage in stages for s in lineage(stage)))
    (folders.root / "results").mkdir(parents=True, exist_ok=True)
    for setup in {stage.setup for stage in wanted}:
        folders.prepare(setup)
    done = {stage: result for stage in wanted if (result := folders.known(stage)) is not None}
    left = sorted((s for s in wanted if s not in done), key=estimate, reverse=True)
    say(f"{len(done)} of {len(wanted)} stages are there already")
    progress = _Progress(say, len(wanted), sum(map(estimate, left)))
    running: dict[Future[Json], ArmStage] = {}
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _worker, (os.getpid(),))
    try:
        while left or running:
            ready = [s for s in left if s.before is None or s.before in done]
            for stage in ready[: workers - len(running)]:
                left.remove(stage)
                before = done[stage.before] if stage.before else None
                if before and "failure" in before:
                    done[stage] = {"failure": f"its predecessor: {before['failure']}"}
                    continue
                running[pool.submit(train, stage, folders, before)] = stage
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                stage = running.pop(future)
                done[stage] = future.result()
                progress.trained(stage, done[stage], len(done))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return done


def lineage(stage: ArmStage) -> list[ArmStage]:
    """The stages that lead to this one, in order."""
    return [*(lineage(stage.before) if stage.before else []), stage]


def estimate(stage: ArmStage) -> float:
    """About how many seconds a stage takes, with evaluations, on one core of the
    report's machine.
    """
    planned = plan(stage.chain(), "analytic", {}).stages[-1]
    return 8 + planned.samples * 6e-4 + planned.macs * 3.9e-11


def _worker(parent: int) -> None:
    die_with_parent(signal.SIGTERM, parent)
    _idle()


def _idle() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent handles a terminal's Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
