"""What all ranks have in common: the process group, agreement on a stop, the learning-rate
schedule, and the description of their environment.
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
from typing import Any

import torch
import torch.distributed as dist

from modelchain.api.contracts import FailureClass
from modelchain.api.faults import fault_of, of_a_peer
from modelchain.identity.digest import TRAINER_MATH
from modelchain.io import watchdog
from modelchain_trainer import devices


def join(threads: int | None, kind: str) -> tuple[int, int, torch.device]:
    """Join torchrun's process group, if there is one: (rank, world size, device of that kind).

    Fixes the number of torch's threads, which is also the number of threads that decode pictures.
    By default the ranks of a node divide its cores among them.

    Raises devices.Faulty.
    """
    # Checked before the process group is joined: a broken device is then reported by its own
    # process, and not by ranks that wait for it.
    device = devices.this_device(kind)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // ranks_here))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        devices.check_collective(device)
    return int(os.environ.get("RANK", "0")), world, device


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[object]]:
    """Makes the context of a forward pass: weights stay fp32, bf16 is autocast around it."""
    if precision == "bf16":
        return partial(torch.autocast, device.type, torch.bfloat16)
    return nullcontext


def compiles(device: torch.device, cache: Path, say: Callable[[str], None]) -> bool:
    """Whether to compile layers on this device. Compiled code is kept in `cache` for later attempts
    and stages.

    On a CPU it does not pay; docs/performance.md has the numbers.
    """
    if device.type != "cuda":
        return False
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        say("no C compiler on this machine: layers run as they are, not compiled")
        return False
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "compiled"))
    return True


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Agreement:
    """All ranks act on a request at the same step.

    The requests of a step are summed while the next step runs, so that no rank waits for the sum;
    they take effect one step later.
    """

    def __init__(self, world: int):
        self.world = world
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def reached(self, *requests: bool, at_once: bool = False) -> list[bool]:
        """For each request, whether any rank made it at the step before; with `at_once` (or a
        single rank), at this step, and then ranks wait for each other.
        """
        if self.world == 1:
            return list(requests)
        totals = torch.tensor([int(request) for request in requests])
        earlier = self._pending
        self._pending = (dist.all_reduce(totals, async_op=True), totals)
        due = self._pending if at_once else earlier
        if due is None:  # the first step
            return [False] * len(requests)
        work, totals = due
        work.wait()
        return [bool(total) for total in totals.tolist()]


@contextmanager
def rank_0_first() -> Iterator[None]:
    """The block runs on rank 0 first. The other ranks wait for it, hours if need be, and can be
    stopped meanwhile.
    """
    rank, world = ranks()
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if world > 1 else None
    if rank == 0:
        yield
    if group is not None:
        # Polled: while a process waits inside a barrier, Python handles no signal.
        work: Any = dist.barrier(group, async_op=True)
        while not work.is_completed():
            time.sleep(0.2)
            watchdog.beat()  # if rank 0 hangs, its own watchdog ends it
        work.wait()
    if rank != 0:
        yield


def failure_of(error: Exception) -> FailureClass:
    """The class of an unexpected exception; Unknown if only other processes, which are gone, can
    know the cause.
    """
    text = str(error)
    # "out of memory" is what CUDA and NCCL say, the other what torch says on a CPU.
    out_of_memory = "out of memory" in text or "t allocate memory" in text
    if out_of_memory or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return FailureClass.OUT_OF_MEMORY
    # By text, because safetensors' errors have no errno.
    if "No space left" in text or "quota exceeded" in text:
        return FailureClass.VOLUME_FULL
    if of_a_peer(text):
        return FailureClass.UNKNOWN
    if fault_of(text):
        return FailureClass.HARDWARE
    return FailureClass.UNKNOWN if isinstance(error, dist.DistError) else FailureClass.ERROR


def broadcast_text(text: str, length: int = 4096) -> str:
    """Rank 0's text on every rank; `length` is the most bytes. torch's own broadcast of objects
    would use pickle.
    """
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
    """What the bits of the weights depend on beside the inputs. It is recorded in manifests and not
    part of the input digest.
    """
    return {
        "trainerMath": TRAINER_MATH,
        "torch": version("torch"),
        "open_clip": version("open_clip_torch"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": world,
        "threads": torch.get_num_threads(),
    }
