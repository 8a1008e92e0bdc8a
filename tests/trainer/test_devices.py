"""devices.py and core's faults.py: a task that promises a GPU never trains on a CPU, and the last
word says which device is to blame.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.faults import fault_of, of_a_peer
from modelchain.errors import WorkError
from modelchain.io.lastword import blame, node
from modelchain_trainer import devices, runtime
from modelchain_trainer.checkpoint import as_work_error

NO_GPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a trainer would find the GPU of this machine"
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.data(tmp_path_factory.mktemp("data") / "digits")


def forked_trainer(work: Path, environment: dict[str, str]) -> int | None:
    arguments = [str(work / "task.json")]
    trainer = forked.Program(["-m", "modelchain_trainer"], arguments, work / "log", environment)
    return trainer.wait(120)


def two_ranks(work: Path, environment: dict[str, str]) -> int:
    """Under torchrun, as in a pod."""
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    ranks = ["--nproc-per-node=2", "-m", "modelchain_trainer", str(work / "task.json")]
    return subprocess.run(
        [sys.executable, "-m", *torchrun, *ranks],
        env=os.environ | environment,
        timeout=120,
        check=False,
    ).returncode


@NO_GPU
@pytest.mark.parametrize("start", [forked_trainer, two_ranks])
def test_without_the_gpu_its_task_promises_a_trainer_ends_at_once_and_names_its_node(
    folder: Path, tmp_path: Path, start: Callable[[Path, dict[str, str]], int | None]
) -> None:
    """It indexes no data first. Of two ranks neither waits for the other, and the last word is that
    of the cause.
    """
    told = {"device": "cuda", "last_word": str(tmp_path / "word")}
    task = tiny.task(tiny.spec(), folder, tmp_path / "root").model_copy(update=told)
    (tmp_path / "task.json").write_text(task.model_dump_json(by_alias=True))
    began = time.monotonic()
    assert start(tmp_path, {"OMP_NUM_THREADS": "1", "MODELCHAIN_NODE": "gpu-7"}) == 1
    assert time.monotonic() - began < (60 if start is two_ranks else 30), (
        "30 s for one; two run beside torchrun on the same cores"
    )
    word = LastWord.model_validate_json((tmp_path / "word").read_bytes())
    assert (word.failure, word.node, word.fault) == (FailureClass.HARDWARE, "gpu-7", "NoDevice")
    assert word.failure.disruption
    for part in ("gpu-7", "Found no NVIDIA driver", str(torch.version.cuda)):
        assert part in word.message
    assert not Path(task.data.index).exists() and word.checkpoint_step is None and word.macs == 0


def test_a_task_for_a_cpu_uses_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: pytest.fail("a GPU was used"))
    deterministic = torch.are_deterministic_algorithms_enabled()
    assert runtime.join(1, "cpu") == (0, 1, CPU)
    torch.use_deterministic_algorithms(deterministic)


class Stub:
    """Replaces torch.cuda: it has `count` devices, and the CPU computes for them."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        count: int = 1,
        free: int = 70,
        init: Exception | None = None,
    ):
        def start() -> None:
            if init is not None:
                raise init

        for name, value in {
            "init": start,
            "device_count": lambda: count,
            "set_device": lambda _: None,
            "empty_cache": lambda: None,
            "mem_get_info": lambda _: (free << 30, 80 << 30),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        compute = devices._compute
        monkeypatch.setattr(devices, "_compute", lambda _: compute(CPU))
        monkeypatch.setattr(devices, "PATTERN_BYTES", 1 << 20)
        monkeypatch.setenv("MODELCHAIN_NODE", "gpu-7")


def found(index: int = 0, seconds: float = 30.0) -> tuple[str, str]:
    """The fault and the message of a check that must fail."""
    with pytest.raises(devices.Faulty) as raised:
        devices.check_device(torch.device("cuda", index), seconds)
    assert raised.value.failure == "Hardware" and "gpu-7" in str(raised.value)
    assert blame(raised.value, raised.value.failure) == {
        "node": "gpu-7",
        "fault": raised.value.fault,
    }
    return raised.value.fault, str(raised.value)


def test_a_working_device_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    Stub(monkeypatch)
    devices.check_device(torch.device("cuda", 0))


def test_there_must_be_a_device_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    Stub(monkeypatch, count=1)
    fault, message = found(index=3)
    assert fault == "NoDevice" and "GPU 3" in message and "it has 1" in message


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("Found no NVIDIA driver on your system. Please check", "NoDevice"),
        ("No CUDA GPUs are available", "NoDevice"),
        ("The NVIDIA driver on your system is too old (found version 11040).", "DriverTooOld"),
        (
            "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
            "DriverFailed",
        ),
        (
            "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be",
            "EccError",
        ),
        ("CUDA error: out of memory\nmore", "DeviceMemory"),
        ("CUDA error: an illegal memory access was encountered", "SelfTest"),
        ("something new", "SelfTest"),
    ],
)
def test_the_message_quotes_the_driver(
    monkeypatch: pytest.MonkeyPatch, said: str, fault: str
) -> None:
    Stub(monkeypatch, init=RuntimeError(said))
    name, message = found()
    assert name == fault and said.splitlines()[0] in message and "\n" not in message


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    Stub(monkeypatch, init=AssertionError("Torch not compiled with CUDA enabled"))
    assert found()[0] == "CpuBuild"


def test_memory_that_another_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    Stub(monkeypatch, free=2)
    assert found()[0] == "DeviceMemory"


def test_a_wrong_product_and_memory_that_loses_what_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Stub(monkeypatch)
    product, full = torch.Tensor.__matmul__, torch.full

    def off_by_one(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        right = product(a, b)
        if a.dtype is torch.float32:
            right[300, 77] += 1
        return right

    monkeypatch.setattr(torch.Tensor, "__matmul__", off_by_one)
    fault, message = found()
    assert fault == "SelfTest" and "matrix product" in message
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)

    def forgets(*arguments: object, **options: object) -> torch.Tensor:
        memory = full(*arguments, **options)
        memory[12345] ^= 1
        return memory

    monkeypatch.setattr(torch, "full", forgets)
    assert found()[0] == "DeviceMemory"


def test_a_device_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    Stub(monkeypatch)
    monkeypatch.setattr(torch.cuda, "init", lambda: time.sleep(3))
    fault, message = found(seconds=0.2)
    assert fault == "SelfTest" and "not answered" in message


# The collective.


def summing_rank(rank: int, port: int, how: str, files: list[str]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if rank == 1 and how == "wrong":
        dist.all_reduce = lambda number, sum_all=dist.all_reduce: (sum_all(number), number.add_(1))
    if rank == 1 and how in ("late", "lost"):
        dist.all_reduce = lambda _: os._exit(9) if how == "lost" else time.sleep(600)
    check = devices.check_collective
    devices.check_collective = lambda device: check(device, 3.0 if how == "late" else 60.0)
    try:
        runtime.join(1, "cpu")
        Path(files[rank]).write_text(json.dumps(["fine", ""]))
    except Exception as error:
        failure = error.failure if isinstance(error, WorkError) else runtime.failure_of(error)
        Path(files[rank]).write_text(json.dumps([failure, blame(error, failure)]))
    if rank == 0:
        time.sleep(1)
    os._exit(0)


@pytest.mark.parametrize("how", ["right", "wrong", "late", "lost"])
def test_a_failing_collective_blames_no_node_and_a_lost_peer_is_not_the_cause(
    tmp_path: Path, how: str
) -> None:
    files = [str(tmp_path / name) for name in "01"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.start_processes(
        summing_rank, (port, how, files), 2, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + 100
    seen = {"right": 0, "wrong": 1, "late": 0, "lost": 0}[how]
    while not Path(files[seen]).exists() or not Path(files[seen]).read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for process in context.processes:
        process.kill()
        process.join()
    hardware, consequence = ["Hardware", {"fault": "Collective"}], ["Unknown", {}]
    expected = {"right": ["fine", ""], "wrong": hardware, "late": hardware, "lost": consequence}
    assert json.loads(Path(files[seen]).read_bytes()) == expected[how]


# Errors later in the run.

HELP = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the"
    " stacktrace below might be incorrect.\nFor debugging consider passing"
    " CUDA_LAUNCH_BLOCKING=1\nDevice-side assertions were explicitly omitted for this error check;"
    " the error probably arose while initializing the DSA handlers."
)
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, "
LATER = {
    "uncorrectable ECC error encountered": ("Hardware", "EccError"),
    "uncorrectable NVLink error detected during the execution": ("Hardware", "NvlinkError"),
    "Invalid access of peer GPU memory over nvlink or a hardware error": (
        "Hardware",
        "NvlinkError",
    ),
    "unspecified launch failure": ("Hardware", "LaunchFailure"),
    "hardware stack error": ("Hardware", "DeviceLost"),
    "driver shutting down": ("Hardware", "DeviceLost"),
    "unknown error": ("Hardware", "DeviceLost"),
    "no CUDA-capable device is detected": ("Hardware", "NoDevice"),
    "CUDA-capable device(s) is/are busy or unavailable": ("Hardware", "DeviceBusy"),
    "CUDA driver version is insufficient for CUDA runtime version": ("Hardware", "DriverTooOld"),
    "system not yet initialized": ("Hardware", "DriverFailed"),
    "system has unsupported display driver / cuda driver combination": ("Hardware", "DriverFailed"),
    "no kernel image is available for execution on the device": ("Hardware", "NoKernels"),
    "out of memory": ("OutOfMemory", ""),
    "device-side assert triggered": ("Error", ""),
    "an illegal memory access was encountered": ("Error", ""),
    "misaligned address": ("Error", ""),
    "invalid argument": ("Error", ""),
}


@pytest.mark.parametrize("said", LATER)
def test_errors_of_cuda_and_nccl_have_their_classes(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELCHAIN_NODE", "gpu-7")
    failure, fault = LATER[said]
    told = {"fault": fault, "node": "gpu-7"} if failure == "Hardware" else {}
    for error in (
        torch.AcceleratorError(f"CUDA error: {said}{HELP}"),
        RuntimeError(f"CUDA error: {said}{HELP}"),
        dist.DistBackendError(
            f"{NCCL}unhandled cuda error, NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA"
            f" function failed.\nLast error:\nCuda failure 1 'CUDA error: {said}'"
        ),
    ):
        expected = (
            "Unknown" if failure == "Error" and isinstance(error, dist.DistError) else failure
        )
        assert runtime.failure_of(error) == expected
        assert blame(error, expected) == told
    assert as_work_error(RuntimeError(f"CUDA error: {said}"), "a checkpoint").failure == failure


def test_the_texts_are_those_of_the_cuda_library() -> None:
    """cudaGetErrorString returns them without a device."""
    try:
        from nvidia import cu13

        library = ctypes.CDLL(str(next(Path(cu13.__path__[0]).glob("lib/libcudart.so*"))))
    except (ImportError, StopIteration):
        pytest.skip("torch's CUDA is not of version 13 here")
    library.cudaGetErrorString.restype = ctypes.c_char_p
    texts = {library.cudaGetErrorString(number).decode() for number in range(1000)}
    assert LATER.keys() <= texts
    named = {text for text in texts if fault_of(f"CUDA error: {text}")}
    hardware = {text for text, (failure, _) in LATER.items() if failure != "Error"}
    others = {
        "invalid device ordinal",
        "initialization error",
        "exclusive-thread device already in use by a different thread",
        "forward compatibility was attempted on non supported HW",
        "unspecified launch failure in prior launch",
    }
    assert named == hardware | others


@pytest.mark.parametrize(
    "said",
    [
        (
            f"{NCCL}remote process exited or there was a network error, NCCL version"
            " 2.21.5\nncclRemoteError: A call failed possibly due to a network error or a remote"
            " process exiting prematurely."
        ),
        "NCCL WARN Net : Connection closed by remote peer node-3<47861>",
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"
            " [127.0.0.1]:7"
        ),
    ],
)
def test_the_loss_of_a_peer_is_a_consequence_and_not_a_cause(said: str) -> None:
    assert of_a_peer(said) and runtime.failure_of(RuntimeError(said)) is FailureClass.UNKNOWN


def test_other_messages_of_a_lost_device() -> None:
    assert fault_of("NVRM: Xid (PCI:0000:cb:00): 79, GPU has fallen off the bus.") == "DeviceLost"
    assert fault_of("NVRM: Xid (PCI:0000:cb:00): 63, Row Remapper") == "DeviceLost"
    assert fault_of("all CUDA-capable devices are busy or unavailable") == "DeviceBusy"
    assert fault_of("shapes differ") == fault_of("maxid taxidermy") == ""
    assert node() == (os.environ.get("MODELCHAIN_NODE") or socket.gethostname())
