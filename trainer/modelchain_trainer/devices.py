"""Checks the device that a task promises, before any data is read, so that a broken device costs
seconds and not hours.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from modelchain.api.contracts import FailureClass
from modelchain.api.faults import COLLECTIVE, fault_of, of_a_peer
from modelchain.errors import WorkError
from modelchain.io.lastword import node

# Side of the multiplied matrices. Their elements are 0 to 6, exact in TF32; sums of 512 products of
# such numbers are exact in fp32.
SIDE = 512
PATTERN = 0x5A  # alternating bits, written to memory and read back
PATTERN_BYTES = 256 << 20
FREE_PART = 0.1  # of the memory; if less is free, another process uses the device
# Eight GPUs start slowly without nvidia-persistenced; a dead one never answers.
CHECK_SECONDS = 120.0


class Faulty(WorkError):
    """A device, or the link between devices, does not work. `fault` is a short name of the error,
    the same on every node.
    """

    def __init__(self, message: str, fault: str):
        super().__init__(message, FailureClass.HARDWARE)
        self.fault = fault


def this_device(kind: str | None = None) -> torch.device:
    """This process's device, set up as the trainer computes: a GPU with TF32, or the CPU with
    deterministic algorithms.

    With a `kind`, which a task promises, it is of that kind, and a GPU is checked; raises Faulty.
    Without one it is a GPU if there is one.
    """
    if kind == "cuda" or (kind is None and torch.cuda.is_available()):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if kind is not None:
            check_device(device)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        return device
    torch.use_deterministic_algorithms(True)
    # Filling new memory is meant for debugging, and costs a third of a small step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return torch.device("cpu")


def check_device(device: torch.device, seconds: float = CHECK_SECONDS) -> None:
    """Raises Faulty, which names this node, unless the device computes and its memory keeps what is
    written to it.
    """
    try:
        _within(seconds, _test, device)
    except (Faulty, RuntimeError, AssertionError, TimeoutError) as error:
        text = str(error) or f"it has not answered for {seconds:.0f} s"
        fault = getattr(error, "fault", "") or fault_of(text) or "SelfTest"
        what = (
            f"no usable GPU {device.index} on node {node()} for torch's CUDA {torch.version.cuda}"
        )
        raise Faulty(f"{what}: {text.splitlines()[0]}", fault) from error


def _test(device: torch.device) -> None:
    # Without a usable GPU this raises an error that says why, which is_available() hides.
    torch.cuda.init()
    if (count := torch.cuda.device_count()) <= device.index:
        why = f"it has {count}, and this process needs the one with index {device.index}"
        raise Faulty(why, "NoDevice")
    torch.cuda.set_device(device)  # each thread has a current device of its own
    free, total = torch.cuda.mem_get_info(device)
    if free < total * FREE_PART:
        raise Faulty(
            f"only {free >> 20} of {total >> 20} MiB of its memory are free", "DeviceMemory"
        )
    _compute(device)
    torch.cuda.empty_cache()


def _compute(device: torch.device) -> None:
    numbers = torch.arange(SIDE * SIDE, dtype=torch.float32).remainder(7).reshape(SIDE, SIDE)
    on_device = numbers.to(device)
    product = (on_device @ on_device.T).cpu().double()
    if not torch.equal(product, numbers.double() @ numbers.double().T):
        raise Faulty("a matrix product comes out wrong", "SelfTest")
    memory = torch.full((PATTERN_BYTES,), PATTERN, dtype=torch.uint8, device=device)
    if not bool((memory == PATTERN).all()):
        raise Faulty("its memory does not keep what is written to it", "DeviceMemory")


def check_collective(device: torch.device, seconds: float = CHECK_SECONDS) -> None:
    """Raises Faulty, which blames no node, unless a sum over all ranks is right and in time."""
    world = dist.get_world_size()
    try:
        found = _within(seconds, _sum_of_ranks, device)
    except (RuntimeError, TimeoutError) as error:
        text = str(error)
        # Either the consequence of another rank's end, or an error of this process's own device.
        if of_a_peer(text) or fault_of(text):
            raise
        why = text or f"no answer for {seconds:.0f} s"
        raise Faulty(
            f"a sum over {world} processes failed: {why.splitlines()[0]}", COLLECTIVE
        ) from error
    if found != world * (world + 1) // 2:  # 1 + 2 + ... + world
        raise Faulty(f"a sum over {world} processes came out wrong", COLLECTIVE)


def _sum_of_ranks(device: torch.device) -> int:
    number = torch.tensor([dist.get_rank() + 1], device=device)
    dist.all_reduce(number)
    return int(number)


def _within(
    seconds: float, work: Callable[[torch.device], int | None], device: torch.device
) -> int | None:
    """Run `work` in a thread, because a hanging driver or collective cannot be interrupted. Raises
    TimeoutError after `seconds` and abandons the thread.
    """
    thread = ThreadPoolExecutor(1, "check")
    try:
        return thread.submit(work, device).result(seconds)
    finally:
        thread.shutdown(wait=False)
