"""The peak of GPUs: floating-point operations a second, of dense matrices in bf16.

The makers print them with sparsity, which is twice as much, unless they say otherwise. Sources are
NVIDIA's data sheets: A100 (June 2021), A30, A10, L4 and L40S, H100 (2023: SXM, PCIe and NVL), H200
(2024: SXM and NVL), GH200, and HGX B200.
"""

from __future__ import annotations

import re

# By the name that CUDA gives to the device. The first that matches counts.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bB200\b", 2250e12),
    (r"\bGH200\b", 989e12),
    (r"\bH200 NVL\b", 835e12),
    (r"\bH200\b", 989e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 80GB HBM3\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL4\b", 121e12),
)


def peak_of(device: str) -> float | None:
    """The peak of one device in FLOP a second, by its name; None if it is not known, as of a CPU,
    or of a part of a GPU (MIG).
    """
    if "MIG" in device:
        return None
    return next((peak for name, peak in _PEAKS if re.search(name, device)), None)
