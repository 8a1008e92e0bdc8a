"""Training one stage: from a task to an artifact, or to a checkpoint that the next attempt resumes
from.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from modelchain.api.contracts import (
    FailureClass,
    Findings,
    LastWord,
    LiveProgress,
    Manifest,
    Results,
    Task,
    TaskEvaluation,
)
from modelchain.api.uses import Resumed
from modelchain.errors import InputError, WorkError
from modelchain.io import watchdog
from modelchain.io.lastword import success
from modelchain.io.stop import Preempted, StopRequest
from modelchain_data.batches import Batch, Batches
from modelchain_data.index import ShardSet
from modelchain_data.request import IndexingLine, open_data
from modelchain_trainer import artifact, checkpoint, journal, progress, runtime
from modelchain_trainer.cadence import SKIPS, Action, Cadence, Moment
from modelchain_trainer.evaluate import Evaluator
from modelchain_trainer.hyperparameters import Hyperparameters
from modelchain_trainer.metrics import Meter
from modelchain_trainer.reporter import Reporter
from modelchain_trainer.stage import StageParts, build_stage, growth_cosines
from modelchain_trainer.state import AttemptWork, TrainState


class Trainer:
    """One rank of one attempt. `train()` is the life of a stage; the other methods are its parts,
    in the order of their use.
    """

    def __init__(
        self, task: Task, stop: StopRequest, report: dict[str, Any], say: Callable[[str], None]
    ):
        """Join the other ranks and begin to serve progress.

        Args:
            report: kept up to date with what the last word of a failure has to say.
            say: prints a line; used on rank 0 alone.
        Raises:
            InputError: the batch cannot be divided among the ranks.
            devices.Faulty: the device, or the link between devices, does not work.
        """
        self.task = task
        self.stop = stop
        self.hyper = Hyperparameters.of(task.inputs)
        self.directory = Path(task.root) / task.input_digest
        self.attempt = self.directory / task.owner
        self.rank, self.world, self.device = runtime.join(task.threads, task.device)
        self._check_divisible("globalBatchSize", self.hyper.global_batch_size)
        self._check_divisible("microBatchSize", task.micro_batch_size)

        self.say: Callable[[str], None] = say if self.rank == 0 else lambda _: None
        self.state = TrainState()
        self.work = AttemptWork()
        self.went_back = False
        self.unread: list[journal.Unread] = []  # steps whose losses the host has not read
        self.cadence = Cadence(
            steps=self.hyper.steps,
            steps_per_epoch=self.hyper.steps_per_epoch,
            checkpoint_seconds=task.checkpoint_seconds,
        )

        self.environment = runtime.environment(self.world, self.device)
        self.meter = Meter(task, self.environment)
        self.journal = journal.Journal(self.attempt, active=self.rank == 0)
        gpus = self.world if self.device.type == "cuda" else 0
        self.reporter = Reporter(task, self.journal, self.meter, report, self.say, gpus)
        self.reporter.progress(self.state, self.work, checkpoint_step=0)
        if self.rank == 0:
            progress.serve(self.meter, self.say)

    def train(self) -> LastWord:
        """Run the stage to its end and return the last word of success.

        Raises InputError, WorkError or Preempted otherwise.
        """
        found = artifact.find(self.directory) if self.rank == 0 else None
        if runtime.broadcast_text("whole" if found else ""):
            self.say("an artifact of these inputs is already there and whole; nothing to train")
            return self._success(found, macs=0)

        train_set, evaluations = self._open_data()
        self.stage = self._build()
        self._resume()
        evaluate = self._evaluator(evaluations)
        if self.state.initial_metrics is None:
            self.state.initial_metrics = evaluate(self.stage.student.clip)
            self.reporter.evaluation(0, self.state.initial_metrics)
        self.batches = self._batches(train_set)

        try:
            with self.stop.loop():
                # `_loop` also returns when it has gone back to a checkpoint. There is no step left
                # if an attempt was stopped between the last one and the artifact.
                while self.state.step < self.hyper.steps:
                    self._loop(evaluate)
            watchdog.beat(watchdog.Phase.STEPPED)
            self.reporter.keeper.ends()
            self.stop.check()
            self.meter.activities.begins("evaluation")
            metrics = evaluate(self.stage.student.clip)
            self.meter.activities.begins("export")
            self.stage.saver.wait()
        except Preempted:
            self._keep()
            raise
        except Exception as error:
            self._keep_after(error)
            raise
        self.reporter.evaluation(self.hyper.steps, metrics)
        return self._finish(Findings(metrics=metrics, pictures=evaluate.pictures))

    # Before the first step.

    def _check_divisible(self, name: str, size: int | None) -> None:
        if size is not None and size % self.world:
            message = f"{size} is not divisible by {self.world} processes"
            raise InputError(message, file=self.task.data.file, field=f"spec.recipe.{name}")

    def _open_data(self) -> tuple[ShardSet, list[tuple[TaskEvaluation, ShardSet]]]:
        """Open the shards with their indexes. If these are not there, rank 0 builds them. It checks
        all their bytes, and the other ranks then use them.
        """
        with runtime.rank_0_first():
            return open_data(self.task.data, self.say, IndexingLine(), check=self.rank == 0)

    def _build(self) -> StageParts:
        saver = checkpoint.Checkpointer(self.attempt, self.task.inputs, self.environment)
        self.meter.saver = saver
        return build_stage(self.task, self.hyper, saver, self.device, self.world, self.say)

    def _resume(self) -> None:
        """Continue from the newest checkpoint of these inputs that verifies, whichever attempt
        wrote it; else from the start.
        """
        self.attempt.mkdir(parents=True, exist_ok=True)
        if not self._restore():
            self.journal.resume(-1)
        self.reporter.resumed = self.state.written_by or Resumed()
        self.seconds_before = self.state.seconds
        if self.rank == 0:
            self.stage.saver.prepare(self.stage.student)
        self._progress(self.state.step)

    def _restore(self) -> bool:
        """Load the newest checkpoint that verifies; False if there is none. Rank 0 chooses for
        all, so that ranks never load different ones.
        """
        chosen = str(checkpoint.newest(self.directory, self.say) or "") if self.rank == 0 else ""
        chosen = runtime.broadcast_text(chosen)
        if not chosen:
            return False
        self.state = checkpoint.restore(Path(chosen), self.stage.student, self.stage.step.optimizer)
        self.stage.saver.saved_step = self.state.step
        self.say(f"resumes from step {self.state.step} ({chosen})")
        self.journal.resume(self.state.step)
        return True

    def _evaluator(self, evaluations: list[tuple[TaskEvaluation, ShardSet]]) -> Evaluator:
        return Evaluator(
            evaluations,
            context_length=self.hyper.context_length,
            device=self.device,
            threads=torch.get_num_threads(),
            precision=self.stage.step.autocast,
        )

    def _batches(self, train_set: ShardSet) -> Batches:
        return Batches(
            data=train_set,
            image_size=self.hyper.image_size,
            context_length=self.hyper.context_length,
            global_batch_size=self.hyper.global_batch_size,
            captions_per_sample=self.hyper.captions_per_sample,
            seed=self.hyper.seed,
            rank=self.rank,
            world_size=self.world,
            threads=torch.get_num_threads(),
            pinned=self.device.type == "cuda",
        )

    # The loop.

    def _loop(self, evaluate: Evaluator) -> None:
        """Train until the last step is done, or until all ranks have gone back to a checkpoint.

        Raises Preempted at the step the ranks agree to stop at.
        """
        agreement = runtime.Agreement(self.world)
        self.saved_step = self.read_step = self.state.step
        self.saved_at = self.read_at = time.monotonic()
        for batch in self.meter.waiting(self.batches.from_step(self.state.step)):
            self._before_step(evaluate, batch)
            self._step(batch)
            moment = self._moment(agreement)
            if self.cadence.read_due(moment):
                self._log()
            match self.cadence.decide(moment, self.state.skips):
                case Action.GO_BACK:
                    return self._go_back()
                case Action.STOP:
                    self._stop()
                case Action.SAVE:
                    self._save()
                case Action.FINISH:
                    return self._save()

    def _before_step(self, evaluate: Evaluator, batch: Batch) -> None:
        # An epoch is evaluated before the step after it: an attempt that was stopped in between,
        # or in the evaluation itself, leaves it to the next one.
        epoch, step_of_epoch = divmod(self.state.step, self.hyper.steps_per_epoch)
        if epoch and step_of_epoch == 0 and evaluate.due(epoch):
            # It may take minutes: a stop need not wait for it.
            with (
                self.stop.loop(inside=False),
                self.reporter.keeper.evaluation(),
                self.meter.activities.during("evaluation"),
            ):
                metrics = evaluate(self.stage.student.clip, epoch)
            self.reporter.evaluation(self.state.step, metrics)
        if self.state.step == 0 and self.rank == 0 and self.stage.grown is not None:
            assert self.task.predecessor is not None
            cosines = growth_cosines(self.stage, self.task.predecessor, batch)
            self.reporter.growth(self.stage.grown, self.task.predecessor.stage, cosines)

    def _step(self, batch: Batch) -> None:
        """One update. It is only queued on a GPU, and the numbers stay there until `_log`."""
        step = self.stage.step
        numbers = step(batch)
        self.state.step += 1
        self.work.steps += 1
        self.reporter.keeper.stepped()
        self.meter.activities.stepped()
        self.work.samples += len(batch.ids) * self.world
        watchdog.beat(watchdog.Phase.STEPPING)
        self.unread.append(
            journal.Unread(self.state.step, numbers, step.tokens, step.current_learning_rate)
        )

    def _moment(self, agreement: runtime.Agreement) -> Moment:
        now = time.monotonic()
        stop_agreed, astray = agreement.reached(
            self.stop.asked,
            self.state.skips >= SKIPS,
            # After an epoch's end there may be an evaluation, or no further step to hear it at.
            at_once=self.state.step % self.hyper.steps_per_epoch == 0,
        )
        return Moment(
            step=self.state.step,
            saved_step=self.saved_step,
            since_saved=now - self.saved_at,
            since_read=now - self.read_at,
            saving=self.stage.saver.busy,
            stop_agreed=stop_agreed,
            astray=astray,
        )

    def _log(self) -> None:
        """Read the losses of the steps since the last time, then tell of them."""
        if not self.unread:
            return
        rate = self._rate()
        numbers = self._read()
        live = self._progress(self.stage.saver.saved_step, rate)
        has_teacher = self.stage.teacher is not None
        self.reporter.steps(numbers, self.state, self.work, live, has_teacher)

    def _rate(self) -> float:
        """Steps a second since the last reading."""
        now = time.monotonic()
        rate = (self.state.step - self.read_step) / max(now - self.read_at, 1e-9)
        self.read_step = self.state.step
        self.read_at = now
        return rate

    def _read(self) -> list[journal.StepNumbers]:
        """Take the losses into the state. The only place where the host waits for the device."""
        steps, self.unread = self.unread, []
        numbers = journal.read(steps)
        for one in numbers:
            self.state.count(one.task_loss, one.skipped)
        counters = self.state.counters
        counters.replaced_pictures = max(self.batches.replaced, counters.replaced_pictures)
        counters.scarce_captions = self.batches.scarce
        self.meter.replaced = self.batches.replaced
        return numbers

    def _progress(self, checkpoint_step: int, rate: float = 0.0) -> LiveProgress:
        return self.reporter.progress(self.state, self.work, checkpoint_step, rate)

    # Checkpoints, and ways out of the loop.

    def _save(self) -> None:
        """Begin a checkpoint of this step. Rank 0 writes it; the others keep the same rhythm."""
        self.saved_step = self.state.step
        self.saved_at = time.monotonic()
        self.reporter.keeper.saves(self.state.step)
        if self.rank == 0:
            # A later attempt resumes here: the entries until here must be there.
            self.journal.wait()
            state = replace(
                self.state,
                seconds=self.seconds_before + self.reporter.seconds(),
                written_by=self.reporter.written(),
            )
            with self.meter.activities.during("checkpoint"):
                self.stage.saver.save(self.stage.student, self.stage.step.optimizer, state)

    def _keep(self) -> None:
        """See that rank 0 has a checkpoint of this very step on the disk. Waits for no other rank,
        which may be gone.
        """
        if self.rank == 0:
            self._wait_for_checkpoint()
            if self.stage.saver.saved_step != self.state.step:
                self._log()
                self._save()
                self._wait_for_checkpoint()
            self.journal.wait()
            self._progress(self.state.step)

    def _wait_for_checkpoint(self) -> None:
        with self.meter.activities.during("checkpoint"):
            self.stage.saver.wait()

    def _keep_after(self, error: Exception) -> None:
        """Keep what was learned if only other ranks, which are gone, can know the cause. Not on a
        GPU: there the weights wait behind a collective that those ranks left unfinished.
        """
        with suppress(OSError):  # the error itself is what counts
            self.journal.wait()
        if self.device.type == "cpu" and runtime.failure_of(error) is FailureClass.UNKNOWN:
            self._keep()

    def _stop(self) -> NoReturn:
        self._keep()
        if self.world > 1:
            dist.barrier()  # the first process to leave may take the others with it
        self._progress(self.state.step)
        step = f"step {self.state.step} of {self.hyper.steps}"
        raise Preempted(f"stopped at {step}; its checkpoint is complete")

    def _go_back(self) -> None:
        """Return all ranks to the newest checkpoint, after SKIPS batches in a row that could not be
        learned from. Once an attempt.

        Raises WorkError of class NonFinite, naming the first of these batches, if there is no
        checkpoint or it led here again.
        """
        self._wait_for_checkpoint()
        bad_to = self.state.step
        bad_from = bad_to - self.state.skips + 1
        message = (
            f"the loss or a gradient is not finite at step {bad_from} of {self.hyper.steps} and all"
            f" others to step {bad_to}"
        )
        if self.went_back:
            raise WorkError(f"{message}; after going back to a checkpoint", "NonFinite")
        if not self._restore():
            raise WorkError(f"{message}; there is no checkpoint to go back to", "NonFinite")
        self.say(message)
        self.went_back = True
        self.reporter.keeper.went_back()
        self.reporter.went_back(self.state.step, bad_from, bad_to)

    # After the last step.

    def _finish(self, measured: Findings) -> LastWord:
        """Rank 0 writes the artifact and removes the checkpoints, which it makes superfluous."""
        found = None
        # The others wait without NCCL, whose patience a shared volume may exceed.
        with runtime.rank_0_first():
            if self.rank == 0:
                self.journal.wait()
                found = self._export(measured)
                checkpoint.remove_checkpoints(self.directory)
        return self._success(found, macs=self.reporter.macs(self.work))

    def _export(self, measured: Findings) -> tuple[Manifest, Results]:
        seconds = round(self.seconds_before + self.reporter.seconds(), 3)
        results = artifact.results_of(
            self.task, self.hyper, self.state, self.stage.grown, measured, seconds
        ).model_copy(update={"made_by": self.reporter.written()})
        manifest = Manifest(
            kind="artifact",
            input_digest=self.task.input_digest,
            step=self.hyper.steps,
            inputs=self.task.inputs,
            files={},
            environment=self.environment,
        )
        return artifact.export(
            self.stage.student.clip,
            self.hyper.model_config,
            results,
            manifest,
            self.directory,
            self.task.owner,
        )

    def _success(self, found: tuple[Manifest, Results] | None, macs: int) -> LastWord:
        """The last word on what rank 0 found or left. Those of other ranks are not read."""
        if found is None:
            return LastWord(result="Succeeded")
        manifest, results = found
        spent = self.reporter.spent(self.hyper.steps, self.hyper.steps)
        return success(self.directory / "artifact", manifest, results, macs=macs, **spent)
