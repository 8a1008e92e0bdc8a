"""Checkpoints: safetensors and JSON in a directory that is renamed into place last. A thread writes
them beside the training.
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
from modelchain_trainer.state import TrainState

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
KEPT = 2  # checkpoints of an input digest, over all attempts


class Checkpointer:
    """Writes `<root>/<input digest>/<owner>-a<n>/step-<k>/`, one at a time. Only rank 0 saves."""

    def __init__(self, attempt: Path, inputs: dict[str, Any], environment: dict[str, Any]):
        self.attempt = attempt
        # The newest step on the disk, this attempt's or the one it resumed from.
        self.saved_step = 0
        self.saved_at = 0.0  # when this attempt last completed one, in seconds since the epoch
        # What the last save took: `stall` of the loop, then `write` in the thread. Other threads
        # read it, so it is replaced and never changed.
        self.seconds: dict[str, float] = {}
        self._manifest: dict[str, Any] = {
            "inputs": inputs,
            "input_digest": attempt.parent.name,
            "environment": environment,
        }
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        # Copies of all tensors by file and name, on the CPU. Made once and used by every save.
        self._copies: dict[str, dict[str, Tensor]] = {MODEL: {}, OPTIMIZER: {}}
        self._verified: set[Path] = set()

    def prepare(self, student: nn.Module) -> None:
        """Allocate the copies now, in the thread: to touch or pin a page for the first time takes
        longer than to copy it, and would stall the first save.
        """

        def allocate() -> None:
            for name, tensor in student.state_dict().items():
                self._copy_of(MODEL, name, tensor)
            for name, parameter in student.named_parameters():
                for kind in ("exp_avg", "exp_avg_sq"):
                    self._copy_of(OPTIMIZER, f"{kind}/{name}", parameter)

        self._pending = self._thread.submit(allocate)

    @property
    def busy(self) -> bool:
        """Whether a save would have to wait for the one before it."""
        return self._pending is not None and not self._pending.done()

    def save(self, student: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
        """Copy everything now, and have the thread write it. Waits for the save before; raises
        WorkError if that one failed.

        On a GPU the copies are only queued, ahead of whatever changes the weights next; the thread
        waits for them.
        """
        began = time.monotonic()
        self.wait()
        tensors = {MODEL: student.state_dict(), OPTIMIZER: _moments(student, optimizer)}
        for file, named in tensors.items():
            for name, tensor in named.items():
                self._copy_of(file, name, tensor).copy_(tensor.detach(), non_blocking=True)
        copied = None
        if next(student.parameters()).is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self.seconds = {"stall": time.monotonic() - began}
        # As JSON now, because the training changes the state while the thread writes.
        self._pending = self._thread.submit(self._write, state.step, state.to_json(), copied)

    def wait(self) -> None:
        """Return when the last save is on the disk; raises WorkError if it failed."""
        if self._pending is not None:
            # A signal may end this wait. `_pending` is then still set, and with it `busy`: the
            # copies belong to the thread until it is done.
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
        """In the thread: write, verify and rename one checkpoint, then remove superfluous ones."""
        began = time.monotonic()
        target = self.attempt / f"step-{step}"
        if copied is not None:
            copied.synchronize()
        if target.exists() and _verifies(target):
            self.saved_step = step
            return
        work = self.attempt / f".step-{step}"
        shutil.rmtree(work, ignore_errors=True)
        try:
            manifest = self._write_files(work, step, state)
            shutil.rmtree(target, ignore_errors=True)  # it is damaged, or it would have been kept
            seal(work, manifest, target)
            self.saved_step = step
            self.saved_at = time.time()
            self.seconds = {**self.seconds, "write": time.monotonic() - began}
            self._prune()
        except Exception as error:
            shutil.rmtree(work, ignore_errors=True)
            raise as_work_error(error, f"checkpoint of step {step}") from error

    def _write_files(self, work: Path, step: int, state: dict[str, Any]) -> Manifest:
        for tensors in self._copies.values():
            check_finite(tensors)
        work.mkdir()
        for file, tensors in self._copies.items():
            save_file(tensors, work / file)
        (work / STATE).write_text(json.dumps(state))
        files = {name: entry_of(work / name) for name in (MODEL, OPTIMIZER, STATE)}
        return Manifest(kind="checkpoint", step=step, files=files, **self._manifest)

    def _prune(self) -> None:
        """Keep the newest KEPT that verify, of any attempt, and remove what is older.

        What is newer and does not verify stays, so that its damage can be examined. Checkpoints of
        another TRAINER_MATH do not count, and are removed once KEPT of ours are there.
        """
        kept, of_other_math = 0, []
        for directory in _newest_first(self.attempt.parent):
            if kept == KEPT:
                shutil.rmtree(directory, ignore_errors=True)
            elif directory in self._verified or _verifies(directory):
                self._verified.add(directory)
                kept += 1
            elif _math(directory) != TRAINER_MATH:
                of_other_math.append(directory)
        if kept == KEPT:
            for directory in of_other_math:
                shutil.rmtree(directory, ignore_errors=True)
        # Left half-written by attempts that were killed.
        for directory in self.attempt.parent.glob("*/.step-*"):
            shutil.rmtree(directory, ignore_errors=True)


def newest(directory: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in an input digest's directory that verifies. `say` is told of those
    that are passed over.
    """
    return next((step for step in _newest_first(directory) if _verifies(step, say)), None)


def restore(checkpoint: Path, student: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Load weights and optimizer moments in place; returns the state that was saved with them."""
    device = next(student.parameters()).device
    student.load_state_dict(load_file(checkpoint / MODEL, device=str(device)))
    moments = load_file(checkpoint / OPTIMIZER)
    for name, parameter in student.named_parameters():
        kinds = {kind: moments[f"{kind}/{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
        # Fused AdamW keeps its step count on the parameter's device, like the moments.
        optimizer.state[parameter] = {kind: tensor.to(device) for kind, tensor in kinds.items()}
    return TrainState.from_json(json.loads((checkpoint / STATE).read_text()))


def remove_checkpoints(directory: Path) -> None:
    """Once the artifact verifies: remove the checkpoints, and what killed attempts left
    half-written. Logs and metrics stay.
    """
    for pattern in ("*/step-*", "*/.step-*", ".artifact-*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises WorkError of class NonFinite, naming the first tensor with an element that is not
    finite: such weights are not worth resuming from.
    """
    for name, tensor in tensors.items():
        # A sum is not finite if one of its elements is not, and is forty times as fast as a test
        # of each element.
        if not bool(torch.isfinite(tensor.sum())):
            raise WorkError(f"{name} is not finite", "NonFinite")


def as_work_error(error: Exception, what: str) -> WorkError:
    """A failure to write, with the class that decides which retry budget pays."""
    return WorkError(f"{what}: {error}", getattr(error, "failure", None) or failure_of(error))


def _moments(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {tensor: name for name, tensor in student.named_parameters()}
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
    """The TRAINER_MATH in a checkpoint's manifest, None if it names none. Ours if there is no
    readable manifest: whether the checkpoint is damaged is for `verify` to find.
    """
    try:
        manifest = Manifest.model_validate_json((directory / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return TRAINER_MATH
    return manifest.trainer_math


def _verifies(directory: Path, say: Callable[[str], None] = lambda _: None) -> bool:
    # Before gigabytes are hashed.
    if (math := _math(directory)) != TRAINER_MATH:
        say(f"passing over {directory}: its TRAINER_MATH is {math}, this trainer's {TRAINER_MATH}")
        return False
    try:
        manifest = verify(directory)
    except (OSError, WorkError) as error:
        say(f"passing over a checkpoint that does not verify: {error}")
        return False
    complete = manifest.kind == "checkpoint" and {MODEL, OPTIMIZER, STATE} <= manifest.files.keys()
    in_its_place = (
        manifest.input_digest == directory.parent.parent.name
        and f"step-{manifest.step}" == directory.name
    )
    if not complete or not in_its_place:
        say(f"passing over {directory}: it belongs to other inputs or another step")
        return False
    return True
