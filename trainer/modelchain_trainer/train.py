"""Training one stage: from a task to an artifact, or to a checkpoint that the next attempt goes on
from.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modelchain.api.contracts import (
    FailureClass,
    Growth,
    LastWord,
    LiveProgress,
    Manifest,
    Measured,
    Results,
    Task,
)
from modelchain.errors import InputError, WorkError
from modelchain.identity.digest import evaluation_key
from modelchain.io import watchdog
from modelchain.io.lastword import success
from modelchain.io.stop import Preempted, StopRequest
from modelchain_data.batches import Batch, Batches
from modelchain_data.request import IndexingLine, open_data
from modelchain_trainer import artifact, checkpoint, growth, models, progress, runtime
from modelchain_trainer.evaluate import Evaluator
from modelchain_trainer.metrics import Meter
from modelchain_trainer.record import Done, Recorder
from modelchain_trainer.step import Step

LOG_SECONDS = 1.0
GROWTH_SAMPLE = 16  # pictures, to look at what growth has kept
# batches in a row whose loss or gradients are not finite, before a checkpoint is gone back to
SKIPS = 3


class Trainer:
    """One rank of one attempt. `train()` reads as the life of a stage; the rest are its parts, in
    order of use.
    """

    def __init__(
        self, task: Task, stop: StopRequest, report: dict[str, Any], say: Callable[[str], None]
    ):
        self.task, self.stop, self.report = task, stop, report
        self.inputs = task.inputs
        self.directory = Path(task.root) / task.input_digest
        self.attempt = self.directory / task.owner
        self.rank, self.world, self.device = runtime.join(task.threads, task.device)
        sizes = {
            "globalBatchSize": self.inputs["globalBatchSize"],
            "microBatchSize": task.micro_batch_size,
        }
        for name, size in sizes.items():
            if size is not None and size % self.world:
                message = f"{size} is not divisible by {self.world} processes"
                raise InputError(message, file=task.data.file, field=f"spec.recipe.{name}")
        self.say: Callable[[str], None] = say if self.rank == 0 else lambda _: None
        self.steps_per_epoch = self.inputs["data"]["samples"] // self.inputs["globalBatchSize"]
        self.steps = self.inputs["epochs"] * self.steps_per_epoch
        self.state: dict[str, Any] = {"step": 0, "seconds": 0.0, "initial": None}
        self.at, self.steps_done = (
            0,
            0,
        )  # steps done: of the stage; by this attempt, with those it repeats
        self.skips, self.gone_back = 0, False
        self.unseen: list[Done] = []  # steps that nobody has looked at yet
        self.started = time.monotonic()
        self.environment = runtime.environment(self.world, self.device)
        self.meter = Meter(task, self.environment)
        self.recorder = Recorder(self.attempt, active=self.rank == 0)
        self.report_progress(0)
        if self.rank == 0:
            progress.serve(self.meter, self.say)

    def train(self) -> LastWord:
        """Run the stage to its end: the last word of success. Raises InputError, WorkError or
        Preempted otherwise.
        """
        found = artifact.find(self.directory) if self.rank == 0 else None
        if runtime.broadcast_text("whole" if found else ""):
            self.say("an artifact of these inputs is already there and whole; nothing to train")
            return self._success(found, spent=0)
        with runtime.rank_0_first():
            train_set, evaluations = open_data(self.task.data, self.say, IndexingLine())
        self._build()
        self._resume()
        config = self.inputs["modelConfig"]
        context_length = config["text_cfg"]["context_length"]
        evaluate = Evaluator(
            evaluations, context_length, self.device, torch.get_num_threads(), self.step.precision
        )
        if self.state["initial"] is None:
            self.state["initial"] = {"loss": None, "metrics": evaluate(self.student.clip)}
            self.recorder.write(
                event="evaluation", step=0, metrics=self.state["initial"]["metrics"]
            )
        self.batches = Batches(
            data=train_set,
            image_size=config["vision_cfg"]["image_size"],
            context_length=context_length,
            global_batch_size=self.inputs["globalBatchSize"],
            captions_per_sample=self.inputs["captionsPerSample"],
            seed=self.inputs["seed"],
            rank=self.rank,
            world_size=self.world,
            threads=torch.get_num_threads(),
            pinned=self.device.type == "cuda",
        )
        try:
            with self.stop.loop():
                while (
                    self.at < self.steps
                ):  # not so if stopped after the last one, before the artifact
                    self._loop(evaluate)
            watchdog.beat(watchdog.Phase.STEPPED)
            self.stop.check()
            metrics = evaluate(self.student.clip)
            self.saver.wait()
        except Preempted:
            self._keep()
            raise
        except Exception as error:
            # Other ranks are gone; what was learned need not be. On a GPU it is behind a sum that
            # they left unfinished.
            if self.device.type == "cpu" and runtime.failure_of(error) is FailureClass.UNKNOWN:
                self._keep()
            raise
        self.recorder.write(event="evaluation", step=self.steps, metrics=metrics)
        return self._finish(metrics)

    def _build(self) -> None:
        """The student as it starts, and the frozen teacher if alpha is not 0."""
        clip = models.build(self.inputs["modelConfig"], self.inputs["seed"])
        self.grown, self.teacher, alpha, dim = None, None, 0.0, None
        if self.task.predecessor is not None:
            config, weights = artifact.load_predecessor(self.task.predecessor)
            transfer = self.inputs["transfer"]
            self.grown = growth.grow(clip, weights, transfer["width"], transfer["depth"])
            if alpha := float(transfer["distillation"]["alpha"]):
                self.teacher, dim = self._frozen(config, weights), config["embed_dim"]
        self.student = models.Student(clip, dim).to(self.device)
        if runtime.compiles(self.device, Path(self.task.root) / "cache", self.say):
            models.compile_layers(self.student, self.teacher)
        micro = self.task.micro_batch_size and self.task.micro_batch_size // self.world
        self.step = Step(
            self.student,
            self.teacher,
            self.inputs,
            steps=self.steps,
            alpha=alpha,
            micro_batch=micro,
        )
        self.optimizer = self.step.optimizer

    def _frozen(self, config: dict[str, Any], weights: dict[str, Tensor]) -> models.CLIP:
        """The predecessor, for evaluation alone."""
        predecessor = models.build(config, self.inputs["seed"])
        predecessor.load_state_dict(weights)
        return predecessor.to(self.device).eval().requires_grad_(False)

    def _resume(self) -> None:
        """From the newest checkpoint of these inputs that verifies, by whichever attempt; or from
        the start.
        """
        self.attempt.mkdir(parents=True, exist_ok=True)
        if not self._restore():
            self.recorder.go_on(-1)
        self.seconds_before = self.state["seconds"]
        self.saver = checkpoint.Checkpointer(
            self.attempt, self.inputs, self.environment, saved_step=self.at
        )
        self.meter.saver = self.saver
        if self.rank == 0:
            self.saver.prepare(self.student)
        self.report_progress(self.at)

    def _restore(self) -> bool:
        """Whether there is a checkpoint that verifies; rank 0 chooses for all."""
        chosen = str(checkpoint.newest(self.directory, self.say) or "") if self.rank == 0 else ""
        if not (chosen := runtime.broadcast_text(chosen)):
            return False
        self.state = checkpoint.restore(Path(chosen), self.student, self.optimizer)
        self.at, self.skips = self.state["step"], self.state.get("skips", 0)
        self.say(f"goes on from step {self.at} ({chosen})")
        self.recorder.go_on(self.at)
        return True

    def _loop(self, evaluate: Evaluator) -> None:
        """Step by step to the last one, or back to a checkpoint. Raises Preempted at the step the
        ranks agree on.
        """
        agreement, saved, due = runtime.Agreement(self.world), time.monotonic(), False
        self.looked = saved, self.at
        for batch in self.meter.waiting(self.batches.from_step(self.at)):
            epoch, within = divmod(self.at, self.steps_per_epoch)
            if epoch and not within:  # it has ended, perhaps with an earlier attempt
                self._evaluate(evaluate, epoch)
            if self.at == 0 and self.rank == 0 and self.grown is not None:
                self._tell_growth(self.grown, batch)
            numbers = self.step(batch)
            self.at, self.steps_done = self.at + 1, self.steps_done + 1
            watchdog.beat(watchdog.Phase.STEPPING)
            self.unseen.append(Done(self.at, numbers, self.step.tokens, self.step.learning_rate))
            ends, last, now = (
                within + 1 == self.steps_per_epoch,
                self.at == self.steps,
                time.monotonic(),
            )
            stopping, astray = agreement.reached(self.stop.asked, self.skips >= SKIPS, at_once=ends)
            due = due or ends or now - saved >= self.task.checkpoint_seconds
            save = stopping or last or (due and not self.saver.busy)  # nobody waits for a slow disk
            # Always before a save: nothing is saved after a loss that nobody has looked at.
            if save or astray or self.at == 1 or now - self.looked[0] >= LOG_SECONDS:
                self._log()
            if (astray or last) and self.skips >= min(
                SKIPS, self.steps
            ):  # here all ranks have looked
                return self._go_back()
            if stopping:
                self._keep()
                if self.world > 1:
                    dist.barrier()  # the first to leave may take the others with it
                self.report_progress(self.at)
                raise Preempted(
                    f"stopped at step {self.at} of {self.steps}; its checkpoint is complete"
                )
            if save and (
                last or not self.skips
            ):  # weights of before a skipped batch are no place to go back to
                saved, due = now, False
                if self.rank == 0:
                    self._save()
            if last:
                return

    def _evaluate(self, evaluate: Evaluator, epoch: int) -> None:
        """What is due after that many epochs. Minutes, perhaps: it need not end if the trainer is
        to stop.
        """
        if evaluate.due(epoch):
            with self.stop.loop(inside=False):
                metrics = evaluate(self.student.clip, epoch)
            self.recorder.write(event="evaluation", step=self.at, metrics=metrics)

    def _save(self) -> None:
        """Rank 0's to do."""
        state = {
            **self.state,
            "seconds": self.seconds_before + self._time()["seconds"],
            "skips": self.skips,
        }
        self.saver.save(self.at, self.student, self.optimizer, state)

    def _keep(self) -> None:
        """This very step, on the disk; others cannot say."""
        if self.rank == 0:
            self.saver.wait()
            if self.saver.saved_step != self.at:
                self._log()
                self._save()
                self.saver.wait()
            self.report_progress(self.at)

    def _go_back(self) -> None:
        """To the newest checkpoint, once an attempt: after SKIPS batches in a row that could not be
        learned from.

        Raises WorkError of class NonFinite, naming the first of them: there is no checkpoint, or it
        led here again.
        """
        self.saver.wait()
        bad, was = self.at - self.skips + 1, self.at
        message = (
            f"the loss or a gradient is not finite at step {bad} of {self.steps} and all others to"
            f" step {was}"
        )
        if self.gone_back or not self._restore():
            end = (
                "after going back to a checkpoint"
                if self.gone_back
                else "there is no checkpoint to go back to"
            )
            raise WorkError(f"{message}; {end}", "NonFinite")
        self.say(message)
        self.gone_back, self.saver.saved_step = True, self.at
        self.recorder.write(event="wentBack", step=self.at, nonFiniteFrom=bad, nonFiniteTo=was)

    def _tell_growth(self, grown: growth.GrowthReport, batch: Batch) -> None:
        """What was inherited, and how alike the layers are before the first step."""
        assert self.task.predecessor is not None
        predecessor = self.teacher or self._frozen(
            *artifact.load_predecessor(self.task.predecessor)
        )
        piece = self.step.to_device(batch.pieces(GROWTH_SAMPLE)[0])
        # Shapes no step has, as in an evaluation: to compile takes longer than to run them.
        with self.step.precision(), torch.compiler.set_stance("force_eager"):
            cosines = growth.agreement(
                self.student.clip, predecessor, lambda clip: models.Student(clip)(*piece)
            )
        for line in grown.lines(self.task.predecessor.stage, cosines):
            self.say(line)
        self.recorder.write(
            event="growth", step=0, **grown.to_dict(), stacks=grown.stacks, cosines=cosines
        )

    def _log(self) -> None:
        """One record a step, one progress line; the only place where the host waits for the
        device.
        """
        if not (done := self.unseen):
            return
        (before, step), now = self.looked, time.monotonic()
        rate = (self.at - step) / max(now - before, 1e-9)
        self.unseen, self.looked = [], (now, self.at)
        values = torch.stack([entry.numbers for entry in done]).cpu().double().tolist()
        live = self.report_progress(self.saver.saved_step, rate)
        counters = self.state.setdefault("counters", {})
        for entry, numbers in zip(done, values, strict=True):
            record = entry.record(numbers, self.teacher is not None)
            self.skips = self.skips + 1 if record["skipped"] else 0
            counters["skippedBatches"] = counters.get("skippedBatches", 0) + record["skipped"]
            self.meter.skipped += record["skipped"]
            if not record["skipped"]:
                self.state["finalLoss"] = record["taskLoss"]
                if self.state["initial"]["loss"] is None:
                    self.state["initial"]["loss"] = record["taskLoss"]
            self.recorder.write(
                **record,
                steps=self.steps,
                macs=self._spent(entry.step),
                etaSeconds=live.eta_seconds,
                samplesPerSecond=live.samples_per_second,
            )
        replaced = max(self.batches.replaced, counters.get("replacedPictures", 0))
        counters |= {"replacedPictures": replaced, "scarceCaptions": self.batches.scarce}
        self.meter.last, self.meter.replaced = record, replaced
        at = (
            f"{self.task.stage} step {self.at}/{self.steps} epoch"
            f" {self.at / self.steps_per_epoch:.1f}"
        )
        speed = (
            f"{live.samples_per_second:.0f} samples/s, {timedelta(seconds=round(live.eta_seconds))}"
            " left"
        )
        loss = "not finite, skipped" if self.skips else f"{self.state['finalLoss']:.4f}"
        self.say(f"{at} loss {loss} {speed}")

    def _spent(self, step: int) -> int:
        """By this attempt, when the stage was, or is, at `step` and has not gone back since."""
        return (self.steps_done - self.at + step) * self.task.macs_per_step

    def _time(self) -> dict[str, float]:
        """Of this attempt until now: seconds, and those of all its GPUs."""
        seconds = round(time.monotonic() - self.started, 3)
        return {
            "seconds": seconds,
            "gpu_seconds": seconds * self.world * (self.device.type == "cuda"),
        }

    def report_progress(self, checkpoint_step: int, rate: float = 0.0) -> LiveProgress:
        """Keep the last word, so that it is true whenever the end comes, and what is served; `rate`
        is steps/s.
        """
        done = {"step": self.at, "macs": self._spent(self.at)}
        self.report |= {**done, **self._time(), "checkpoint_step": checkpoint_step or None}
        watchdog.tell(self.report)
        speed, left = (
            rate * self.inputs["globalBatchSize"],
            (self.steps - self.at) / rate if rate else 0.0,
        )
        of = {"attempt": self.task.attempt, "steps": self.steps, "checkpoint_step": checkpoint_step}
        self.meter.live = LiveProgress(**of, **done, samples_per_second=speed, eta_seconds=left)
        return self.meter.live

    def _finish(self, metrics: dict[str, float]) -> LastWord:
        """Rank 0 writes the artifact and removes what it makes superfluous; the others wait for
        it.
        """
        found = None
        with runtime.rank_0_first():  # a shared volume may take longer than NCCL would wait
            if self.rank == 0:
                found = self._export(metrics)
                checkpoint.remove_checkpoints(self.directory)
        return self._success(found, spent=self._spent(self.steps))

    def _export(self, metrics: dict[str, float]) -> tuple[Manifest, Results]:
        predecessor = self.task.predecessor
        results = Results(
            stage=self.task.stage,
            model=self.task.model,
            predecessor=predecessor.stage if predecessor else None,
            steps=self.steps,
            samples_seen=self.steps * self.inputs["globalBatchSize"],
            macs=self.steps * self.task.macs_per_step,
            seconds=round(self.seconds_before + self._time()["seconds"], 3),
            growth=Growth.model_validate(self.grown.to_dict()) if self.grown else None,
            initial=Measured(**self.state["initial"]),
            final=Measured(loss=self.state["finalLoss"], metrics=metrics),
            evaluations={e.name: evaluation_key(e) for e in self.task.data.evaluation},
            counters=self.state.get("counters", {}),
        )
        manifest = Manifest(
            kind="artifact",
            input_digest=self.task.input_digest,
            step=self.steps,
            inputs=self.inputs,
            files={},
            environment=self.environment,
        )
        clip, config = self.student.clip, self.inputs["modelConfig"]
        return artifact.export(clip, config, results, manifest, self.directory, self.task.owner)

    def _success(self, found: tuple[Manifest, Results] | None, spent: int) -> LastWord:
        """Rank 0's word on what it found; of the others nobody asks more than that."""
        if found is None:
            return LastWord(result="Succeeded")
        return success(self.directory / "artifact", *found, macs=spent, **self._time())
