"""Finds device errors in the messages of CUDA, NCCL and torch, and gives them short names.

Equal errors get equal names. So the operator can tell a broken node from an image or a program that
fails in the same way on every node.
"""

from __future__ import annotations

import re

# The fault of a collective that failed. A link or a switch may be broken, so no node is avoided.
COLLECTIVE = "Collective"
# The fault of a kernel that ended for a cause unknown to CUDA: usually the hardware, sometimes the
# program.
LAUNCH_FAILURE = "LaunchFailure"

# By fault, texts of cudaGetErrorString, of its older versions and of torch's checks, in lower case.
_FAULTS = {
    "EccError": ("uncorrectable ecc error",),
    "NvlinkError": (
        "uncorrectable nvlink error",
        "peer gpu memory over nvlink or a hardware error",
    ),
    # This counts only before the first use of the device. Later it is the work that needs too much.
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
# NVIDIA's programs and libraries that a container runtime calls, in lower case.
_TOOLKIT = ("nvidia-container", "nvidia-ctk", "nvml error", "cdi device")
# Their error if a file of the image is in the way of one of the driver's.
_IN_THE_IMAGE = "mount error: file creation failed"
# What a container runtime says of a volume that is mounted on the node, and that cannot
# be used there: a file server that is away, for example.
_VOLUME = re.compile(
    r'error mounting "[^"]*/volumes/[^"]*".*(stale nfs file handle|stale file handle'
    r"|input/output error|transport endpoint is not connected|connection timed out|host is down"
    r"|no such device)"
)
# NVIDIA's driver numbers its device errors as Xids.
_XID = re.compile(r"\bxid\b")
# Errors of the program itself. They rule out a device error, whatever else the message says.
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


def fault_at_start(text: str) -> str:
    """The name of the device error for which a container could not be started; else empty.

    `text` is the container runtime's. NVIDIA's programs give the container its devices, and they
    fail without a working driver, whatever the image is.
    """
    text = text.lower()
    if not any(word in text for word in _TOOLKIT) or _IN_THE_IMAGE in text:
        return ""
    return fault_of(text) or "DriverFailed"


def is_of_a_volume(text: str) -> bool:
    """Whether a container could not be started because of one of its volumes.

    `text` is the container runtime's. The image may be in order.
    """
    return _VOLUME.search(text.lower()) is not None


def of_a_peer(text: str) -> bool:
    """Whether `text` says that another process of the attempt has ended.

    That is a consequence of the failure and never its cause.
    """
    text = text.lower()
    return any(word in text for word in _PEERS)
