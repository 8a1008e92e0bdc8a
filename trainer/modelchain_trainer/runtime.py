"""What every rank shares: the process group, agreeing to stop, the learning-rate schedule, the
environment's record.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from modelchain.api.contracts import FailureClass
from modelchain.api.faults import fault_of, of_a_peer
from modelchain.identity.digest import TRAINER_MATH
from modelchain.io import watchdog
from modelchain_trainer import devices


def join(threads: int | None, kind: str) -> tuple[int, int, torch.device]:
    """Join torchrun's process group, if there is one: (rank, world size, device of that kind).
    Raises devices.Faulty.

    Pins the threads of torch, which are those that decode pictures, too; by default an equal share
    of the cores.
    """
    # A broken device is told of by its own process, before peers wait for it.
    device, world = devices.this_device(kind), int(os.environ.get("WORLD_SIZE", "1"))
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // beside))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        devices.check_collective(device)
    return int(os.environ.get("RANK", "0")), world, device


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[object]]:
    """What a forward pass runs in: weights stay fp32, bf16 is autocast around it."""
    return (
        partial(torch.autocast, device.type, torch.bfloat16) if precision == "bf16" else nullcontext
    )


def compiles(device: torch.device, cache: Path, say: Callable[[str], None]) -> bool:
    """Whether layers are compiled here, with compiled code kept in `cache` for later attempts and
    stages.

    On a CPU it does not pay: docs/performance.md has the numbers.
    """
    if device.type != "cuda":
        return False
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        say("no C compiler on this machine: layers run as they are, not compiled")
        return False
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "compiled"))
    return True


def ranks() -> tuple[int, int]:
    """This process's rank and the number of all; (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Agreement:
    """Ranks act on a wish at the same step: each step's are summed behind the step after it, so
    nobody waits for it.
    """

    def __init__(self, world: int):
        self.world = world
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def reached(self, *wishes: bool, at_once: bool = False) -> list[bool]:
        """For each, whether any rank wished for it: a step ago, or now if that is worth waiting for
        (or alone).
        """
        if self.world == 1:
            return list(wishes)
        totals = torch.tensor([int(wish) for wish in wishes])
        before, self._pending = self._pending, (dist.all_reduce(totals, async_op=True), totals)
        if at_once:
            before = self._pending
        if before is None:
            return [False] * len(wishes)
        work, totals = before
        work.wait()
        return [bool(total) for total in totals.tolist()]


@contextmanager
def rank_0_first() -> Iterator[None]:
    """The block runs on rank 0 first; the others wait for it, hours if need be, and still hear
    SIGTERM.
    """
    rank, world = ranks()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if world > 1 else None
    if rank == 0:
        yield
    if group is not None:
        work = dist.barrier(group, async_op=True)
        while not work.is_completed():
            time.sleep(0.2)
            watchdog.beat()  # rank 0 has a watchdog of its own
        work.wait()
    if rank != 0:
        yield


def failure_of(error: Exception) -> FailureClass:
    """The class of a failure nobody foresaw; Unknown if only other processes, which are gone, could
    know the cause.
    """
    text = str(error)  # safetensors hides errno in it
    spent = any(
        words in text for words in ("out of memory", "t allocate memory")
    )  # CUDA, NCCL; torch on a CPU
    if spent or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return FailureClass.OUT_OF_MEMORY
    if "No space left" in text or "quota exceeded" in text:
        return FailureClass.VOLUME_FULL
    if of_a_peer(text):
        return FailureClass.UNKNOWN
    if fault_of(text):
        return FailureClass.HARDWARE
    return FailureClass.UNKNOWN if isinstance(error, dist.DistError) else FailureClass.ERROR


def broadcast_text(text: str, length: int = 4096) -> str:
    """Rank 0's text on every rank, without pickle."""
    if not dist.is_initialized():
        return text
    buffer = torch.frombuffer(bytearray(text.encode().ljust(length, b"\0")), dtype=torch.uint8)
    dist.broadcast(buffer, src=0)
    return bytes(buffer.tolist()).rstrip(b"\0").decode()


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then cosine to 0 (Table C), as open_clip's `cosine_lr`; `step` counts
    from 0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def environment(world: int, device: torch.device) -> dict[str, str | int]:
    """What the bits depend on beside the inputs; recorded, not hashed."""
    return {
        "trainerMath": TRAINER_MATH,
        "torch": version("torch"),
        "open_clip": version("open_clip_torch"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": world,
        "threads": torch.get_num_threads(),
    }
