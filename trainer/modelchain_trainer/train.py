"""Training one stage: from a task to an artifact, or to a checkpoint that the next attempt goes on from."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from modelchain.contracts import METRICS, Growth, LastWord, LiveProgress, Manifest, Measured, Results, Task
from modelchain.digest import evaluation_key
from modelchain.errors import InputError, WorkError
from modelchain_data.batches import Batch, Batches, Chunk
from modelchain_data.request import IndexingLine, open_data
from modelchain_trainer import artifact, checkpoint, growth, models, progress, runtime
from modelchain_trainer.evaluate import Evaluator
from modelchain_trainer.metrics import Meter
from modelchain_trainer.runtime import Preempted, Stop
from modelchain_trainer.step import Step
from modelchain_trainer.verify import success

LOG_SECONDS = 1.0
GROWTH_SAMPLE = 16  # pictures, to look at what growth has kept


class Trainer:
    """One rank of one attempt. `train()` reads as the life of a stage; the rest are its parts, in order of use."""

    def __init__(self, task: Task, stop: Stop, report: dict[str, Any], say: Callable[[str], None]):
        self.task, self.stop, self.report = task, stop, report
        self.inputs = task.inputs
        self.directory = Path(task.root) / task.input_digest
        self.attempt = self.directory / task.owner
        self.rank, self.world, self.device = runtime.join(task.threads)
        sizes = {"globalBatchSize": self.inputs["globalBatchSize"], "microBatchSize": task.micro_batch_size}
        for name, size in sizes.items():
            if size is not None and size % self.world:
                message = f"{size} is not divisible by {self.world} processes"
                raise InputError(message, file=task.data.file, field=f"spec.recipe.{name}")
        self.say: Callable[[str], None] = say if self.rank == 0 else lambda _: None
        self.precision = runtime.autocast(self.device, self.inputs["precision"])
        data = self.inputs["data"]
        self.steps_per_epoch = data["samples"] // self.inputs["globalBatchSize"]
        self.steps = self.inputs["epochs"] * self.steps_per_epoch
        self.state: dict[str, Any] = {"step": 0, "seconds": 0.0, "initial": None}
        self.started, self.first_step = time.monotonic(), 0
        self.meter = Meter(task, runtime.environment(self.world, self.device))
        self.report_progress(0, 0)
        if self.rank == 0:
            progress.serve(self.meter, self.say)

    def train(self) -> LastWord:
        """Run the stage to its end.

        Returns:
            The last word of success. Raises InputError, WorkError or Preempted otherwise.
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
        evaluate = Evaluator(evaluations, context_length, self.device, self.task.threads or 1, self.precision)
        if self.state["initial"] is None:
            self.state["initial"] = {"loss": None, "metrics": evaluate(self.student.clip)}
            self._record(event="evaluation", step=0, metrics=self.state["initial"]["metrics"])
        batches = Batches(
            data=train_set, image_size=config["vision_cfg"]["image_size"], context_length=context_length,
            global_batch_size=self.inputs["globalBatchSize"], captions_per_sample=self.inputs["captionsPerSample"],
            seed=self.inputs["seed"], rank=self.rank, world_size=self.world, threads=self.task.threads or 1,
            pinned=self.device.type == "cuda",
        )  # fmt: skip
        if self.first_step < self.steps:  # else stopped after the last step, before the artifact
            self._loop(batches, evaluate)
        metrics = evaluate(self.student.clip)
        self._record(event="evaluation", step=self.steps, metrics=metrics)
        return self._finish(metrics)

    def _build(self) -> None:
        """The student as it starts, and the frozen teacher if alpha is not 0."""
        config, seed = self.inputs["modelConfig"], self.inputs["seed"]
        clip = models.build(config, seed)
        self.teacher, self.growth, self.alpha = None, None, 0.0
        dim = None
        if self.task.predecessor is not None:
            teacher_config, weights = artifact.load_predecessor(self.task.predecessor)
            transfer = self.inputs["transfer"]
            self.grown = growth.grow(clip, weights, transfer["width"], transfer["depth"])
            self.growth = Growth.model_validate(self.grown.to_dict())
            self.alpha = float(transfer["distillation"]["alpha"])
            if self.alpha:
                dim = teacher_config["embed_dim"]
                self.teacher = self._frozen(teacher_config, weights)
        self.student = models.Student(clip, dim).to(self.device)
        if runtime.compiles(self.device, Path(self.task.root) / "cache", self.say):
            models.compile_layers(self.student, self.teacher)
        self.step = Step(
            self.student, self.teacher, self.inputs, steps=self.steps, alpha=self.alpha, device=self.device,
            micro_batch=self.task.micro_batch_size and self.task.micro_batch_size // self.world,
        )  # fmt: skip
        self.optimizer = self.step.optimizer

    def _frozen(self, config: dict[str, Any], weights: dict[str, Tensor]) -> models.CLIP:
        """The predecessor, for evaluation alone."""
        predecessor = models.build(config, self.inputs["seed"])
        predecessor.load_state_dict(weights)
        return predecessor.to(self.device).eval().requires_grad_(False)

    def _resume(self) -> None:
        """From the newest checkpoint of these inputs that verifies, by whichever attempt; rank 0 chooses for all."""
        self.attempt.mkdir(parents=True, exist_ok=True)
        chosen = str(checkpoint.newest(self.directory, self.say) or "") if self.rank == 0 else ""
        if chosen := runtime.broadcast_text(chosen):
            self.state = checkpoint.restore(Path(chosen), self.student, self.optimizer)
            self.say(f"goes on from step {self.state['step']} ({chosen})")
        self.first_step = self.state["step"]
        self.seconds_before = self.state["seconds"]
        self.report_progress(self.first_step, self.first_step)

    def _loop(self, batches: Batches, evaluate: Evaluator) -> None:
        environment = runtime.environment(self.world, self.device)
        saver = checkpoint.Checkpointer(self.attempt, self.inputs, self.task.input_digest, environment, self.first_step)
        self.meter.saver, agreement = saver, runtime.Agreement(self.world)
        losses: list[tuple[int, Tensor]] = []
        logged = saved = time.monotonic()
        logged_step, step = self.first_step, self.first_step
        self.stop.in_loop = True
        for batch in self.meter.waiting(batches.from_step(step)):
            if step == 0 and self.rank == 0 and self.growth is not None:
                self._tell_growth(self.step.to_device(batch.pieces(GROWTH_SAMPLE)[0]))
            losses.append((step, self._step(batch)))
            step += 1
            stopping = agreement.reached(self.stop.asked)
            now, epoch_ends, last = time.monotonic(), step % self.steps_per_epoch == 0, step == self.steps
            save = stopping or ((epoch_ends or now - saved >= self.task.checkpoint_seconds) and not last)
            # Always before a save: nothing is saved after a loss that nobody has looked at.
            if save or last or losses[0][0] == 0 or now - logged >= LOG_SECONDS:
                rate = (step - logged_step) / max(now - logged, 1e-9)
                self.report_progress(step, saver.saved_step, rate)
                self._log(losses, rate, batches)
                losses, logged, logged_step = [], now, step
            if save:
                saved = now
                if self.rank == 0:
                    state = {**self.state, "seconds": self.seconds_before + self._seconds()}
                    saver.save(step, self.student, self.optimizer, state)
            if stopping and not last:
                saver.wait()
                if self.world > 1:
                    dist.barrier()  # the first to leave may take the others with it
                self.report_progress(step, step)
                raise Preempted(f"stopped at step {step} of {self.steps}; its checkpoint is complete")
            if epoch_ends and not last and (metrics := evaluate(self.student.clip, step // self.steps_per_epoch)):
                self._record(event="evaluation", step=step, metrics=metrics)
            if last:
                break
        self.stop.in_loop = False
        saver.wait()

    def _tell_growth(self, piece: tuple[Tensor, list[Chunk]]) -> None:
        """What was inherited, and how alike the layers are before the first step."""
        assert self.task.predecessor is not None
        predecessor = self.teacher or self._frozen(*artifact.load_predecessor(self.task.predecessor))
        images, chunks = piece

        def run(model: Any) -> None:
            with self.precision():
                models.encode_image(model, images)
                models.encode_text_chunks(model, chunks)

        cosines = growth.agreement(self.student.clip, predecessor, run)
        for line in self.grown.lines(self.task.predecessor.stage, cosines):
            self.say(line)
        self._record(event="growth", step=0, **self.grown.to_dict(), stacks=self.grown.stacks, cosines=cosines)

    def _step(self, batch: Batch) -> Tensor:
        return self.step(batch)

    def _log(self, losses: list[tuple[int, Tensor]], rate: float, batches: Batches) -> None:
        """One line a step in metrics.jsonl, one progress line; the only place where the host waits for the device."""
        values = torch.stack([value for _, value in losses]).cpu().double()
        step = losses[-1][0] + 1
        if not bool(torch.isfinite(values).all()):
            bad = next(s for (s, _), row in zip(losses, values, strict=True) if not bool(torch.isfinite(row).all()))
            raise WorkError(f"the loss is not finite at step {bad + 1} of {self.steps}", "NonFinite")
        if losses[0][0] == 0:
            self.state["initial"]["loss"] = float(values[0, 1])
        self.state["finalLoss"] = float(values[-1, 1])
        eta = (self.steps - step) / rate
        for (s, _), (total, task, pull) in zip(losses, values.tolist(), strict=True):
            self._record(
                event="step", step=s + 1, steps=self.steps, loss=total, taskLoss=task, distillationLoss=pull,
                samplesPerSecond=rate * self.inputs["globalBatchSize"], etaSeconds=eta, macs=self._spent(s + 1),
            )  # fmt: skip
        self.meter.losses = {"task": task} | ({"distillation": pull} if self.teacher is not None else {})
        at = f"{self.task.stage} step {step}/{self.steps} epoch {step / self.steps_per_epoch:.1f}"
        speed = f"{rate * self.inputs['globalBatchSize']:.0f} samples/s, {timedelta(seconds=round(eta))} left"
        self.say(f"{at} loss {self.state['finalLoss']:.4f} {speed}")
        replaced = max(batches.replaced, self.state.get("counters", {}).get("replacedPictures", 0))
        self.state["counters"] = {"replacedPictures": replaced, "scarceCaptions": batches.scarce}
        self.meter.replaced = replaced

    def _record(self, **record: Any) -> None:
        if self.rank == 0:
            with (self.attempt / METRICS).open("a") as file:
                file.write(json.dumps(record) + "\n")

    def _spent(self, step: int) -> int:
        return (step - self.first_step) * self.task.macs_per_step

    def _seconds(self) -> float:
        return time.monotonic() - self.started

    def _gpu_seconds(self) -> float:
        return round(self._seconds() * self.world, 3) if self.device.type == "cuda" else 0.0

    def report_progress(self, step: int, checkpoint_step: int, rate: float = 0.0) -> None:
        """Keep the last word, so that it is true whenever the end comes, and what is served; `rate` is steps/s."""
        done = {"step": step, "macs": self._spent(step)}
        spent = {"seconds": round(self._seconds(), 3), "gpu_seconds": self._gpu_seconds()}
        self.report |= {**done, **spent, "checkpoint_step": checkpoint_step or None}
        speed, left = rate * self.inputs["globalBatchSize"], (self.steps - step) / rate if rate else 0.0
        of = {"attempt": self.task.attempt, "steps": self.steps, "checkpoint_step": checkpoint_step}
        self.meter.live = LiveProgress(**of, **done, samples_per_second=speed, eta_seconds=left)

    def _finish(self, metrics: dict[str, float]) -> LastWord:
        """Rank 0 writes the artifact and removes what it makes superfluous; the others wait for it."""
        found = None
        if self.rank == 0:
            samples = self.steps * self.inputs["globalBatchSize"]
            predecessor = self.task.predecessor
            results = Results(
                stage=self.task.stage, model=self.task.model, predecessor=predecessor.stage if predecessor else None,
                steps=self.steps, samples_seen=samples, macs=self.steps * self.task.macs_per_step,
                seconds=round(self.seconds_before + self._seconds(), 3), growth=self.growth,
                initial=Measured(**self.state["initial"]),
                final=Measured(loss=self.state["finalLoss"], metrics=metrics),
                evaluations={e.name: evaluation_key(e) for e in self.task.data.evaluation},
                counters=self.state.get("counters", {}),
            )  # fmt: skip
            manifest = Manifest(
                kind="artifact", input_digest=self.task.input_digest, step=self.steps, inputs=self.inputs, files={},
                environment=runtime.environment(self.world, self.device),
            )  # fmt: skip
            clip, config = self.student.clip, self.inputs["modelConfig"]
            found = artifact.export(clip, config, results, manifest, self.directory, self.task.owner)
            checkpoint.remove_checkpoints(self.directory)
        if self.world > 1:
            dist.barrier()
        return self._success(found, spent=self._spent(self.steps))

    def _success(self, found: tuple[Manifest, Results] | None, spent: int) -> LastWord:
        """Rank 0's word on what it found; of the others nobody asks more than that."""
        if found is None:
            return LastWord(result="Succeeded")
        seconds, gpu_seconds = round(self._seconds(), 3), self._gpu_seconds()
        return success(self.directory / "artifact", *found, macs=spent, seconds=seconds, gpu_seconds=gpu_seconds)
