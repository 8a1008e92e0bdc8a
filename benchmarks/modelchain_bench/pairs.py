"""Timing two loops against each other on a machine with other work, and describing the machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from modelchain_bench.machine import processor
from modelchain_trainer import runtime

# Dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets.
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12}


class Pair(NamedTuple):
    """Seconds of one turn of each loop."""

    ours: float
    stock: float

    @property
    def ratio(self) -> float:
        return self.stock / self.ours


def interleaved(
    ours: Callable[[], object],
    stock: Callable[[], object],
    pairs: int,
    device: torch.device,
    warm_up: int = 1,
) -> list[Pair]:
    """Turns of both loops in alternating order, after `warm_up` turns that are not counted."""
    found: list[Pair] = []
    for turn in range(-warm_up, pairs):
        first, second = (ours, stock) if turn % 2 else (stock, ours)
        a, b = seconds(first, device), seconds(second, device)
        if turn >= 0:
            found.append(Pair(a, b) if first is ours else Pair(b, a))
    return found


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one turn, including the device's work."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def summary(pairs: list[Pair], per_turn: float) -> dict[str, Any]:
    """The median ratio of the pairs and the median rates, for `per_turn` samples a turn."""
    rates = {
        "ours": [per_turn / pair.ours for pair in pairs],
        "stock": [per_turn / pair.stock for pair in pairs],
    }
    return {
        "ratio": round(statistics.median(pair.ratio for pair in pairs), 4),
        "samplesPerSecond": {who: round(statistics.median(rate), 3) for who, rate in rates.items()},
        "pairs": [
            {"ours": round(p.ours, 5), "stock": round(p.stock, 5), "ratio": round(p.ratio, 4)}
            for p in pairs
        ],
    }


def environment(device: torch.device) -> dict[str, Any]:
    """The versions and hardware that the figures depend on."""
    return {**runtime.environment(1, device), "processor": processor(), "cores": os.cpu_count()}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device, if known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK.items() if part in name), None)
