"""`python benchmarks/checkpoint.py`: how long a checkpoint of ViT-L stops the training loop,
compared with a memcpy of its bytes.

The stall is `Checkpointer.save`, as the loop calls it. The memcpy is libc's, tensor by tensor, from
and to the same memory. Both are measured in turns, each after the checkpoint before is durable.
`--write` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from open_clip import get_model_config

from markers import between
from modelchain_bench.machine import processor
from modelchain_trainer.checkpoint import Checkpointer
from modelchain_trainer.models import Student, build
from modelchain_trainer.state import TrainState

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
GOAL = 1.2  # stall / memcpy, on a CPU
Json = dict[str, Any]


def run(model: str, pairs: int, folder: Path) -> Json:
    """Seconds of `pairs` checkpoints of `model` in training, written below `folder`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student, optimizer = _training(model, device)
    saver = Checkpointer(folder / ("0" * 64) / "local-a1", {}, {})
    saver.attempt.mkdir(parents=True)
    began = time.monotonic()
    saver.prepare(student)
    saver.wait()
    prepared = time.monotonic() - began
    stalls: list[float] = []
    durable: list[float] = []
    memcpys: list[float] = []
    for step in range(1, pairs + 1):
        began = time.monotonic()
        saver.save(student, optimizer, TrainState(step=step))
        stalls.append(time.monotonic() - began)
        saver.wait()
        durable.append(time.monotonic() - began)
        memcpys.append(_memcpy(saver, student, optimizer) if device.type == "cpu" else float("nan"))
    copies = [copy for file in saver._copies.values() for copy in file.values()]
    return {
        "model": model,
        "prepareSeconds": prepared,
        "stalls": stalls,
        "durable": durable,
        "bytes": sum(copy.nbytes for copy in copies),
        "tensors": len(copies),
        "memcpys": memcpys,
        "ratio": statistics.median(a / b for a, b in zip(stalls, memcpys, strict=True)),
        "environment": {
            "device": _device(device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
    }


def _training(model: str, device: torch.device) -> tuple[Student, torch.optim.Optimizer]:
    """A student of `model`, and an optimizer that has its moments."""
    config = get_model_config(model)
    config.pop("custom_text", None)
    student = Student(build(config, seed=0)).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, fused=True)
    for parameter in student.parameters():
        moments = {kind: torch.rand_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=device), **moments}
    return student, optimizer


def _memcpy(saver: Checkpointer, student: Student, optimizer: torch.optim.Optimizer) -> float:
    """Seconds of libc's memcpy of what `save` has just copied."""
    names = {parameter: name for name, parameter in student.named_parameters()}
    model, moments = saver._copies.values()
    pairs = [(model[name], tensor) for name, tensor in student.state_dict().items()]
    for parameter, state in optimizer.state.items():
        pairs += [(moments[f"{kind}/{names[parameter]}"], tensor) for kind, tensor in state.items()]
    began = time.monotonic()
    for copy, tensor in pairs:
        ctypes.memmove(copy.data_ptr(), tensor.data_ptr(), tensor.nbytes)
    return time.monotonic() - began


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores ({processor()})"


def table(figures: Json) -> str:
    def median(name: str) -> str:
        return f"{statistics.median(figures[name]):.2f} s"

    rows = [
        ("state", f"{figures['bytes'] / 1e9:.2f} GB in {figures['tensors']} tensors", ""),
        (f"stall of the loop, median of {len(figures['stalls'])}", median("stalls"), ""),
        ("memcpy of the same bytes", median("memcpys"), ""),
        ("stall / memcpy, median of the pairs", f"{figures['ratio']:.2f}", f"<= {GOAL}"),
        ("from the stall's begin until it is durable", median("durable"), ""),
        (
            "memory for the copies, made once beside the first steps",
            f"{figures['prepareSeconds']:.2f} s",
            "",
        ),
    ]
    lines = [
        f"| {figures['model']} | measured | goal |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    about = figures["environment"]
    return "\n".join(
        [
            *lines,
            "",
            f"Machine: {about['device']}, torch {about['torch']}, threads {about['threads']}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="ViT-L-16",
        help="an open_clip config; memory of twice its state is needed",
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints go; a temporary directory by default"
    )
    parser.add_argument(
        "-o", "--output", choices=["json"], help="print the figures as one JSON document"
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=given.folder))
    try:
        figures = run(given.model, given.pairs, folder)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(figures, indent=1) if given.output else table(figures))
    if given.write:
        PAGE.write_text(between(PAGE.read_text(), "checkpoint.py", table(figures)))


if __name__ == "__main__":
    main()
