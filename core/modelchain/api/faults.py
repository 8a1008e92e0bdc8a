"""Short names of device errors, from the messages of CUDA, NCCL and torch: equal errors have equal
names.

With them the operator tells a broken node from an image or a program that fails on every node.
"""

from __future__ import annotations

import re

# A collective failed. A link or a switch may be broken, so no node is avoided.
COLLECTIVE = "Collective"
# CUDA's error for a kernel that ended for an unknown cause: usually the hardware, sometimes the
# program.
LAUNCH_FAILURE = "LaunchFailure"

# Texts of cudaGetErrorString, of its older versions and of torch's own checks, in lower case.
_FAULTS = {
    "EccError": ("uncorrectable ecc error",),
    "NvlinkError": (
        "uncorrectable nvlink error",
        "peer gpu memory over nvlink or a hardware error",
    ),
    # Only where the device was not used yet. Later the work itself has run out of memory.
    "DeviceMemory": ("out of memory",),
    "DeviceLost": (
        "fallen off the bus",
        "gpu is lost",
        "device is lost",
        "driver shutting down",
        "hardware stack error",
        "cuda error: unknown error",
        "cuda driver error: unknown error",
        "cuda unknown error",
    ),
    "NoDevice": (
        "no cuda-capable device is detected",
        "no cuda gpus are available",
        "found no nvidia driver",
        "invalid device ordinal",
        "you might not have a cuda gpu",
    ),
    "DeviceBusy": ("busy or unavailable", "exclusive-thread device already in use"),
    "DriverTooOld": ("driver version is insufficient", "driver on your system is too old"),
    # The fabric manager does not run, or the driver's libraries and kernel module differ in
    # version.
    "DriverFailed": (
        "system not yet initialized",
        "unsupported display driver",
        "cuda error: initialization error",
    ),
    "NoKernels": (
        "no kernel image is available",
        "forward compatibility was attempted on non supported hw",
    ),
    "CpuBuild": ("torch not compiled with cuda enabled",),
    LAUNCH_FAILURE: ("unspecified launch failure",),
}
_XID = re.compile(r"\bxid\b")
# Errors of the program itself, whatever else CUDA says.
_PROGRAM = ("device-side assert triggered", "illegal memory access", "misaligned address")
# What the other ranks see when one has ended. Every error of gloo counts, since it uses no device;
# its messages name its source files.
_PEERS = (
    "ncclremoteerror",
    "remote process exited",
    "connection closed by remote peer",
    "connection closed by peer",
    "connection reset by peer",
    "third_party/gloo/",
)


def fault_of(text: str) -> str:
    """The name of the device error in `text`; empty if there is none."""
    text = text.lower()
    if any(word in text for word in _PROGRAM):
        return ""
    named = (name for name, words in _FAULTS.items() if any(word in text for word in words))
    return next(named, "DeviceLost" if _XID.search(text) else "")


def of_a_peer(text: str) -> bool:
    """Whether `text` says only that another process of the attempt has ended, which is never the
    cause.
    """
    text = text.lower()
    return any(word in text for word in _PEERS)
