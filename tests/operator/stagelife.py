"""A chain of two stages in an API server in memory, and pods as the controller of its jobs makes
them. Times are in seconds since `podshapes.T0`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from memorykube import MemoryKube, chain
from podshapes import T0, Pod, at, made_for, owned
from specs import with_changes

from modelchain.api.status import ChainStatus, StageStatus
from modelchain.io.load import status_of
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import CHAINS, CLAIMS, EVENTS, JOBS, PODS, Object
from modelchain_operator.reconcile.controller import Controller
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS

FIRST = "vit-vit-t-a1"


class Life:
    """The chain, its operator and its cluster. `said` has the texts of the operator's events."""

    def __init__(self, nodes: int = 1, config: PoolFile | None = None, **changes: Any):
        self.config = config or PoolFile()
        self.kube, self.now, self.said = MemoryKube(lambda status: None), 0.0, list[str]()
        self.kube.put(CLAIMS, {"metadata": {"name": "artifacts", "namespace": "team"}})
        self.edit(0, **{"spec.stages[0].resources": {"nodes": nodes}, **changes})
        self.restart()

    def restart(self) -> None:
        """Another process of the operator, which remembers nothing."""
        kube: Any = self.kube
        clock = lambda: T0 + self.now  # noqa: E731
        self.controller = Controller(kube, self, self.config, clock)  # type: ignore[arg-type]
        self.controller.reader.progress = _unheard  # type: ignore[method-assign]

    def tell(self, thing: Object, kind: str, code: str, text: str) -> None:
        self.said.append(text)

    def edit(self, generation: int = 2, **changes: Any) -> None:
        thing = self.kube.objects.get((CHAINS.plural, "vit")) or chain()
        if generation:
            changes |= {"metadata.generation": generation}
        self.kube.put(CHAINS, with_changes(changes, thing))

    def look(self, seconds: float = 0.0, passes: int = 3) -> StageStatus:
        """The first stage after so many seconds and a few passes."""
        self.now += seconds
        for _ in range(passes):
            asyncio.run(self.controller.reconcile(("team", "vit")))
        return self.status.stages[0]

    @property
    def status(self) -> ChainStatus:
        return status_of(self.kube.objects[CHAINS.plural, "vit"])

    @property
    def jobs(self) -> list[str]:
        return sorted(name for kind, name in self.kube.objects if kind == PYTORCHJOBS.plural)

    @property
    def records(self) -> list[Object]:
        return [o for (kind, _), o in self.kube.objects.items() if kind == "stageartifacts"]

    def job(self, name: str = FIRST) -> Object:
        return self.kube.objects[PYTORCHJOBS.plural, name]

    def end_job(self, how: str, name: str = FIRST) -> None:
        condition = {"type": how, "status": "True", "message": "as its pods"}
        self.kube.put(PYTORCHJOBS, self.job(name) | {"status": {"conditions": [condition]}})

    def suspend_job(self, suspended: bool, name: str = FIRST) -> None:
        """Another client suspends the job, or lets it go on."""
        job = with_changes({"spec.runPolicy.suspend": suspended}, self.job(name))
        self.kube.put(PYTORCHJOBS, job)

    def pods(self, *pods: Pod, job: str = FIRST) -> None:
        """These are the job's pods from now on."""
        for key in [key for key in self.kube.objects if key[0] == PODS.plural]:
            del self.kube.objects[key]
        for pod in pods:
            self.kube.put(PODS, made_for(self.job(job), pod))

    def verify_pod(self, pod: Pod, verify: str = f"{FIRST}-verify") -> None:
        """This is the verify Job's pod from now on."""
        job = self.kube.objects[JOBS.plural, verify]
        meta = job["metadata"]
        pod["metadata"] |= {
            "name": f"{verify}-x",
            "uid": "verify-pod",
            "labels": meta["labels"],
            "ownerReferences": [owned("Job", verify, meta["uid"])],
        }
        self.kube.put(PODS, pod)

    def event(self, reason: str, message: str, thing: Object | None = None) -> None:
        """An event of a job, by default of the first attempt's, now."""
        involved = {"uid": (thing or self.job())["metadata"]["uid"]}
        told = {"reason": reason, "message": message, "involvedObject": involved}
        told |= {"lastTimestamp": at(self.now), "metadata": {"name": reason}}
        self.kube.put(EVENTS, told)


async def _unheard(pods: object) -> None:
    """No trainer can be asked."""


def launched(nodes: int = 1, config: PoolFile | None = None, **changes: Any) -> Life:
    """The chain whose first attempt is released."""
    life = Life(nodes, config, **changes)
    life.look()
    assert life.jobs == [FIRST]
    return life


def beside_a_sidecar(pod: Pod) -> Pod:
    """The pod whose main container has ended, while another container runs on."""
    pod["status"]["phase"] = "Running"
    return pod
