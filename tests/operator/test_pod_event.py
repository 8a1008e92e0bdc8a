"""A pod event, from the watch to the write of a status: the files it passes through, in order."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import podshapes
from memorykube import MemoryKube
from specs import with_changes

from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import CHAINS, CLAIMS, PODS, Object
from modelchain_operator.reconcile.controller import Controller
from modelchain_operator.runners.pytorchjob import PyTorchJob
from modelchain_operator.watch.kopf_watch import _handler
from modelchain_operator.watch.service import Service

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
NOW = 1_767_225_700.0
IMAGE = "registry.example/trainer@sha256:" + "0" * 64
# Types, and arithmetic without a decision in it: code of theirs runs, but no path goes through.
LEAVES = (
    "core/modelchain/api/",
    "core/modelchain/plan/",
    "core/modelchain/identity/",
    "core/modelchain/families/",
    "core/modelchain/errors.py",
    "core/modelchain/io/load.py",
)


def chain() -> Object:
    spec = with_changes(
        {
            "metadata": {"name": "vit", "namespace": "team", "uid": "c" * 36, "generation": 1},
            "spec.runner": {"nodePool": "a100-80gb", "image": IMAGE},
            "spec.storage.claimName": "artifacts",
            "spec.data.volume.claimName": "data",
        }
    )
    return {**spec, "metadata": {**spec["metadata"], "creationTimestamp": "2026-01-01T00:00:00Z"}}


async def traced() -> list[str]:
    """Bring a chain to its first attempt, then deliver an event of its pod."""
    files: dict[str, None] = {}
    written = asyncio.Event()

    def enter(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith((f"{ROOT}/core/", f"{ROOT}/operator/")):
            files.setdefault(path.removeprefix(f"{ROOT}/"))

    def wrote(status: Object) -> None:
        if sys.getprofile() is not None:
            sys.setprofile(None)
            written.set()

    kube = MemoryKube(wrote)
    kube.put(CHAINS, chain())
    kube.put(CLAIMS, {"metadata": {"name": "artifacts", "namespace": "team"}})
    events: Any = SimpleNamespace(tell=lambda *_: None)
    controller = Controller(kube, events, PoolFile(), clock=lambda: NOW)  # type: ignore[arg-type]
    for _ in range(3):
        await controller.reconcile(("team", "vit"))
    (job,) = await kube.list(PyTorchJob.resource)
    kube.put(PyTorchJob.resource, _merged_status(job))
    await controller.reconcile(("team", "vit"))

    service = Service(kube, controller, (), None, "")  # type: ignore[arg-type]
    queue = asyncio.create_task(service.queue.run())
    pod = podshapes.running()
    pod["metadata"]["labels"] |= job["metadata"]["labels"]
    pod = kube.put(PODS, pod)
    on_event: Callable[..., Any] = _handler(asyncio.get_running_loop(), service._on_pod)
    sys.setprofile(enter)
    try:
        await on_event({"object": pod})
        await asyncio.wait_for(written.wait(), 30)
    finally:
        sys.setprofile(None)
        queue.cancel()
    return list(files)


def _merged_status(job: Object) -> Object:
    return job | {"status": {"conditions": [{"type": "Running", "status": "True"}]}}


def test_the_path_of_a_pod_event() -> None:
    path = [file for file in asyncio.run(traced()) if not file.startswith(LEAVES)]
    print(*path, sep="\n")
    listed = re.findall(r"`((?:core|operator)/[\w/]+\.py)`", PAGE.read_text())
    assert path == listed
    assert len(path) <= 12
