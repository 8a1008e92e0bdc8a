"""The files whose code handles a pod event, from the watch to the write of a status, in order."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import podshapes
from memorykube import MemoryKube, chain

from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import CHAINS, CLAIMS, PODS, Object
from modelchain_operator.reconcile.controller import Controller
from modelchain_operator.runners.pytorchjob import PyTorchJob
from modelchain_operator.watch.kopf_watch import _handler
from modelchain_operator.watch.service import Service

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
NOW = 1_767_225_700.0


@dataclass
class Trace:
    """The project's files in the order in which their code first ran, and for each file the files
    whose code called it.
    """

    order: list[str] = field(default_factory=list)
    callers: dict[str, set[str]] = field(default_factory=dict)

    def enter(self, frame: FrameType, event: str, _: Any) -> None:
        file = _of_the_project(frame)
        if event != "call" or file is None:
            return
        caller = frame.f_back
        while caller is not None and _of_the_project(caller) in (None, file):
            caller = caller.f_back
        if file not in self.callers:
            self.order.append(file)
        by = _of_the_project(caller) if caller is not None else None
        self.callers.setdefault(file, set()).update({by} if by else ())


def _of_the_project(frame: FrameType) -> str | None:
    path = frame.f_code.co_filename
    if path.startswith((f"{ROOT}/core/", f"{ROOT}/operator/")):
        return path.removeprefix(f"{ROOT}/")
    return None


async def traced() -> Trace:
    """Bring a chain to its first attempt, then deliver an event of its pod."""
    trace, written = Trace(), asyncio.Event()

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
    kube.put(PyTorchJob.resource, _running(job))
    await controller.reconcile(("team", "vit"))

    service = Service(kube, controller, (), None, "")  # type: ignore[arg-type]
    queue = asyncio.create_task(service.queue.run())
    await asyncio.sleep(0.01)  # its workers wait for a key now
    pod = kube.put(PODS, podshapes.made_for(job, podshapes.running()))
    on_event: Callable[..., Any] = _handler(asyncio.get_running_loop(), service._on_pod)
    sys.setprofile(trace.enter)
    try:
        await on_event({"object": pod})
        await asyncio.wait_for(written.wait(), 30)
    finally:
        sys.setprofile(None)
        queue.cancel()
    return trace


def _running(job: Object) -> Object:
    return job | {"status": {"conditions": [{"type": "Running", "status": "True"}]}}


def test_the_path_of_a_pod_event() -> None:
    """The steps of docs/architecture.md run in the page's order. Every other file that runs is a
    helper, and never calls a step.
    """
    trace = asyncio.run(traced())
    steps = re.findall(r"^\| \d+ \| `([\w/]+\.py)` \|", PAGE.read_text(), re.M)
    assert [file for file in trace.order if file in steps] == steps and len(steps) <= 12
    helpers = [file for file in trace.order if file not in steps]
    print("helpers:", *helpers, sep="\n")
    for step in steps:
        assert trace.callers[step] <= set(steps), f"{step} is called by a helper"
