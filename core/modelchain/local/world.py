"""Fills `Observed` on a laptop, and carries out what `decide` decides there.

A local run has a root directory, and at most one trainer with its processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from modelchain.api.contracts import (
    LAST_WORD,
    TASK,
    DataRequest,
    EvaluationTask,
    RelaxedEpochs,
)
from modelchain.api.spec import ModelChain
from modelchain.api.status import AttemptStatus, ChainStatus
from modelchain.decide.measure import missing
from modelchain.decide.observed import Artifact, Decision, Launch, Observed, Seen, Stop
from modelchain.decide.task import Placement, task_for
from modelchain.identity.digest import evaluation_key
from modelchain.io.files import write_atomic
from modelchain.local.launch import TrainerProcess, gpus, measure, processes_for, threads_for
from modelchain.local.root import OWNER, Root, progress_of

BACKOFF_SECONDS = 1.0


class LocalWorld:
    """Reads the state of this machine into `Observed`, and carries out a `Decision`."""

    def __init__(
        self,
        chain: ModelChain,
        root: Root,
        trainer: TrainerProcess,
        data: DataRequest,
        fingerprint: str,
        only: str | None = None,
    ):
        self.chain = chain
        self.root = root
        self.trainer = trainer
        self.data, self.fingerprint = data, fingerprint
        self.only = only  # train only this stage's model, alone
        self.inputs, self.numbers = root.known_inputs(), root.attempt_numbers()
        # A new value for each run of the command, so that each renews the budgets once.
        self.retry = f"{time.time():.6f}"
        self.interrupted = False

    def observe(self, status: ChainStatus) -> Observed:
        attempts = {name: attempt for name, (_, attempt) in status.attempts.items()}
        live = {self.trainer.attempt} if self.trainer.is_live() and self.trainer.attempt else set()
        return Observed(
            status=status,
            artifact=self.root.artifact,
            attempt=lambda name: self._seen(attempts[name], name in live),
            live=frozenset(live),
            inputs=self.inputs,
            highest_number=lambda unnumbered, digest: max(
                self.numbers.get(unnumbered, 0), self.numbers.get(digest, 0)
            ),
            fingerprint=self.fingerprint,
            retry=self.retry,
            only=self.only,
            interrupted=self.interrupted,
            backoff_seconds=BACKOFF_SECONDS,
        )

    def _seen(self, attempt: AttemptStatus, live: bool) -> Seen:
        if attempt.finished_at is not None:
            return Seen(live=live, started=True)
        entry = self.root.last_step(attempt)
        return Seen(
            live=live,
            started=self.root.started(attempt),
            word=None if live else self.root.last_word(attempt),
            progress=progress_of(entry) if entry else None,
            checkpoint_step=self.root.checkpoint_step(attempt.input_digest),
            macs=int(entry["macs"]) if entry else 0,
        )

    def evaluate_added(self, status: ChainStatus, say: Callable[[str], None]) -> bool:
        """Run evaluations that were added to the spec after a stage finished. Nothing is trained.

        Returns whether there were any.
        """
        measured = False
        alone = [row for row in status.baselines if self.only in (None, row.name)]
        for stage in (*(status.stages if self.only is None else []), *alone):
            found = self.root.artifact(stage.input_digest) if stage.input_digest else None
            if not isinstance(found, Artifact):
                continue
            for evaluation in missing(self.chain.spec.evaluation, found):
                say(f"{stage.name}: measuring {evaluation.name}")
                task = EvaluationTask(
                    artifact=str(self.root.path / found.path),
                    artifact_digest=found.digest,
                    data=self.data,
                    names=[evaluation.name],
                )
                key = evaluation_key(evaluation)
                self.root.add_evaluation(found.input_digest, key, measure(task))
                measured = True
        return measured

    def act(self, decision: Decision) -> None:
        match decision.action:
            case Launch() as launch:
                self._launch(launch, decision.status)
            case Stop():
                self.trainer.stop()

    def _launch(self, launch: Launch, status: ChainStatus) -> None:
        stage = self.chain.spec.stages[launch.stage]
        processes = processes_for(stage.resources.processes_per_node)
        threads = threads_for(processes)
        directory = self.root.attempt_directory(launch.attempt)
        directory.mkdir(parents=True, exist_ok=True)
        placement = Placement(
            root=str(self.root.path),
            predecessors=str(self.root.path),
            owner=OWNER,
            last_word=str(directory / LAST_WORD),
            data=self.data,
            threads=threads,
            device="cuda" if gpus() else "cpu",
        )
        known = status.stages[launch.stage]
        if known.first_epochs is not None and not launch.alone:
            relaxed = RelaxedEpochs(round=known.round, first_epochs=known.first_epochs)
            self.root.write_relaxation(launch.attempt.input_digest, relaxed)
        task = task_for(self.chain, status.epochs, launch, placement)
        write_atomic(directory / TASK, task.model_dump_json(by_alias=True, indent=1).encode())
        self.inputs[task.input_digest] = task.inputs
        self.trainer.start(launch.attempt.name, directory / TASK, processes, threads)
