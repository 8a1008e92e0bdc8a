"""Checkpoints: safetensors and JSON in a directory that is renamed into place last, written beside
the training.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modelchain.api.contracts import MANIFEST, Manifest
from modelchain.errors import WorkError
from modelchain.identity.digest import TRAINER_MATH
from modelchain.io.files import entry_of, seal, verify
from modelchain_trainer.runtime import failure_of

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
KEPT = 2


class Checkpointer:
    """Writes `<root>/<input digest>/<owner>-a<n>/step-<k>/`, one at a time, in a thread; used by
    rank 0 alone.
    """

    def __init__(
        self,
        attempt: Path,
        inputs: dict[str, Any],
        environment: dict[str, Any],
        saved_step: int = 0,
    ):
        self.attempt, self.saved_step = (
            attempt,
            saved_step,
        )  # the newest step that is on the disk; 0 if none is
        self.saved_at = 0.0  # when one was written last, in seconds since the epoch
        self.seconds: dict[
            str, float
        ] = {}  # what the last save took: `stall` of the loop, then `write`
        self._manifest = {
            "inputs": inputs,
            "input_digest": attempt.parent.name,
            "environment": environment,
        }
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._copies: dict[str, dict[str, Tensor]] = {
            MODEL: {},
            OPTIMIZER: {},
        }  # by file; made once
        self._verified: set[Path] = set()

    def prepare(self, student: nn.Module) -> None:
        """Make the copies' memory now, in the thread: to touch or pin a page takes longer than to
        copy it.
        """

        def make() -> None:
            for name, tensor in student.state_dict().items():
                self._copy_of(MODEL, name, tensor)
            for name, parameter in student.named_parameters():
                for kind in ("exp_avg", "exp_avg_sq"):
                    self._copy_of(OPTIMIZER, f"{kind}/{name}", parameter)

        self._pending = self._thread.submit(make)

    @property
    def busy(self) -> bool:
        """Whether a save would have to wait for the one before it."""
        return self._pending is not None and not self._pending.done()

    def save(
        self,
        step: int,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
    ) -> None:
        """Copy everything now, write it later. Waits for the write before it; raises WorkError if
        that one failed.

        On a GPU the copies are only queued, before whatever changes the weights next; the thread
        waits for them.
        """
        began, copied = time.monotonic(), None
        self.wait()
        for file, tensors in (
            (MODEL, student.state_dict()),
            (OPTIMIZER, _moments(student, optimizer)),
        ):
            for name, tensor in tensors.items():
                self._copy_of(file, name, tensor).copy_(tensor.detach(), non_blocking=True)
        if next(student.parameters()).is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self.seconds = {"stall": time.monotonic() - began}
        self._pending = self._thread.submit(self._write, step, dict(state), copied)

    def wait(self) -> None:
        """Until the last save is on the disk and verified."""
        if self._pending is not None:
            # a signal may end this wait: the copies are then the writer's still
            self._pending.exception()
            pending, self._pending = self._pending, None
            pending.result()

    def _copy_of(self, file: str, name: str, tensor: Tensor) -> Tensor:
        copies = self._copies[file]
        if name not in copies:
            copies[name] = torch.empty(
                tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
            ).zero_()
        return copies[name]

    def _write(self, step: int, state: dict[str, Any], copied: torch.cuda.Event | None) -> None:
        began, target = time.monotonic(), self.attempt / f"step-{step}"
        if copied is not None:
            copied.synchronize()
        if target.exists() and _verifies(target):
            self.saved_step = step
            return
        work = self.attempt / f".step-{step}"
        shutil.rmtree(work, ignore_errors=True)
        try:
            for tensors in self._copies.values():
                check_finite(tensors)
            work.mkdir()
            for file, tensors in self._copies.items():
                save_file(tensors, work / file)
            (work / STATE).write_text(json.dumps({**state, "step": step}))
            files = {name: entry_of(work / name) for name in (MODEL, OPTIMIZER, STATE)}
            manifest = Manifest(kind="checkpoint", step=step, files=files, **self._manifest)
            shutil.rmtree(target, ignore_errors=True)  # damaged, or it would have been kept
            seal(work, manifest, target)
            self.saved_step, self.saved_at = step, time.time()
            self.seconds = {
                **self.seconds,
                "write": time.monotonic() - began,
            }  # read by other threads
            self._prune()
        except Exception as error:
            shutil.rmtree(work, ignore_errors=True)
            raise as_work_error(error, f"checkpoint of step {step}") from error

    def _prune(self) -> None:
        """Keep the newest two that verify, by any attempt; what is newer and does not verify stays
        as evidence.

        What another TRAINER_MATH left counts for nothing, and goes as soon as two of ours are
        there.
        """
        kept, foreign = 0, []
        for directory in _newest_first(self.attempt.parent):
            if kept == KEPT:
                shutil.rmtree(directory, ignore_errors=True)
            elif directory in self._verified or _verifies(directory):
                self._verified.add(directory)
                kept += 1
            elif _math(directory) != TRAINER_MATH:
                foreign.append(directory)
        torsos = self.attempt.parent.glob(
            "*/.step-*"
        )  # of attempts that were killed while they wrote
        for directory in (*torsos, *(foreign if kept == KEPT else ())):
            shutil.rmtree(directory, ignore_errors=True)


def newest(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint under an input digest's directory that verifies; others are passed over
    with a word.
    """
    return next((step for step in _newest_first(directory) if _verifies(step, say)), None)


def restore(
    checkpoint: Path, student: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load weights and optimizer moments in place; returns the state that was saved with them."""
    device = next(student.parameters()).device
    student.load_state_dict(load_file(checkpoint / MODEL, device=str(device)))
    moments = load_file(checkpoint / OPTIMIZER)
    for name, parameter in student.named_parameters():
        kinds = {kind: moments[f"{kind}/{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
        # AdamW keeps its step count where its kernel wants it: beside the parameter when fused.
        optimizer.state[parameter] = {kind: tensor.to(device) for kind, tensor in kinds.items()}
    return dict(json.loads((checkpoint / STATE).read_text()))


def remove_checkpoints(directory: Path) -> None:
    """When the artifact verifies the steps go, and what killed attempts left half-written; logs and
    metrics stay.
    """
    for pattern in ("*/step-*", "*/.step-*", ".artifact-*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises WorkError of class NonFinite, naming the tensor: what is kept must be worth going on
    from.
    """
    for name, tensor in tensors.items():
        # The sum is not, if an element is not; and forty times as fast to ask as every element.
        if not bool(torch.isfinite(tensor.sum())):
            raise WorkError(f"{name} is not finite", "NonFinite")


def as_work_error(error: Exception, what: str) -> WorkError:
    """A failure to write, with the class that retry budgets go by."""
    return WorkError(f"{what}: {error}", getattr(error, "failure", None) or failure_of(error))


def _moments(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in student.named_parameters()}
    return {
        f"{kind}/{names[p]}": tensor
        for p, state in optimizer.state.items()
        for kind, tensor in state.items()
    }


def _newest_first(directory: Path) -> list[Path]:
    steps = [p for p in directory.glob("*/step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(
        steps, key=lambda p: (int(p.name.removeprefix("step-")), p.parent.name), reverse=True
    )


def _math(directory: Path) -> int | None:
    """The TRAINER_MATH of a checkpoint by its manifest, which may name none; ours where there is
    none to read.
    """
    try:
        manifest = Manifest.model_validate_json((directory / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return TRAINER_MATH  # whether it is damaged, `verify` says
    return manifest.trainer_math


def _verifies(directory: Path, say: Callable[[str], None] = lambda _: None) -> bool:
    if (math := _math(directory)) != TRAINER_MATH:  # before gigabytes are hashed
        say(f"passing over {directory}: its TRAINER_MATH is {math}, this trainer's {TRAINER_MATH}")
        return False
    try:
        manifest = verify(directory)
    except (OSError, WorkError) as error:
        say(f"passing over a checkpoint that does not verify: {error}")
        return False
    whole = manifest.kind == "checkpoint" and {MODEL, OPTIMIZER, STATE} <= manifest.files.keys()
    named = (
        manifest.input_digest == directory.parent.parent.name
        and f"step-{manifest.step}" == directory.name
    )
    if not whole or not named:
        say(f"passing over {directory}: it belongs to other inputs or another step")
        return False
    return True
