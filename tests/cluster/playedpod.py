"""One pod of the stand-in kubelet: what its trainer does in memory, and what the kubelet reports of
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from aiohttp import web
from apiclient import Json
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from modelchain.api.contracts import EvaluationTask, FailureClass, LastWord, LiveProgress, Task
from modelchain.api.spec import Evaluation
from modelchain.api.uses import Resumed, Uses
from modelchain.identity.digest import short_key
from modelchain_trainer.metrics import Meter

if TYPE_CHECKING:
    from kubelet import Kubelet

GROUP = "modelchain.dev"
TRAINING = ("train", "baseline")
JOB, REPLICA = "training.kubeflow.org/job-name", "training.kubeflow.org/replica-type"
INDEX = "batch.kubernetes.io/job-completion-index"  # of a pod of an Indexed Job
METRICS_PORT, PROGRESS_PORT = 9090, 9091
TORCHRUN_FAILED = 1  # whatever code its worker left with
_addresses = itertools.count(random.randrange(2**22))  # other test processes begin elsewhere


@dataclass
class Volume:
    """What lies on a claim, by input digest."""

    artifacts: dict[str, LastWord] = field(default_factory=dict)
    checkpoints: dict[str, int] = field(default_factory=dict)
    # What each checkpoint says of its writer.
    written: dict[str, Resumed] = field(default_factory=dict)


class Gang:
    """The pods of one job: rank 0 waits for all before its first step, workers end with it."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def end(self, code: int) -> None:
        """Rank 0 has ended."""
        if not self.ended.done():
            self.ended.set_result(code)


class Gone(Exception):
    """The pod is no longer there, or another has its name."""


class Pod:
    """One pod as its play sees it."""

    def __init__(self, kubelet: Kubelet, body: Json):
        meta, spec = body["metadata"], body["spec"]
        self.kubelet, self.body = kubelet, body
        self.namespace, self.name, self.uid, self.node = (
            meta["namespace"],
            meta["name"],
            meta["uid"],
            spec["nodeName"],
        )
        self.labels, self.annotations = meta.get("labels", {}), meta.get("annotations", {})
        self.path = f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"
        env = [e for c in spec["containers"] for e in c.get("env", [])]
        self.env = {
            e["name"]: e.get("value", "").replace("$$", "$") for e in env
        }  # as a kubelet expands it
        self.role = self.labels.get(f"{GROUP}/role")
        self.chain, self.stage = (
            self.labels.get(f"{GROUP}/chain"),
            self.labels.get(f"{GROUP}/stage"),
        )
        self.attempt = int(self.labels.get(f"{GROUP}/attempt", 0))
        rank = self.labels.get(INDEX) or self.env.get("RANK", 0)
        self.rank = 0 if self.labels.get(REPLICA) == "master" else int(rank)
        text = self.env.get("MODELCHAIN_TASK")
        self.task = Task.model_validate_json(text) if text and self.role in TRAINING else None
        self.digest = (
            self.task.input_digest
            if self.task
            else self.annotations.get(f"{GROUP}/input-digest", "")
        )
        self.gang = kubelet.gang(self)
        self.stuck = False  # SIGKILL does not end it: it stays Terminating
        self.ip: str | None = None
        self._site: web.AppRunner | None = None
        self._phase, self._report = "Pending", Json()
        self._trainer: Json | None = None  # how it ended, if a sidecar has not
        self._conditions: dict[str, Json] = {}
        self._seen = self._since = now()
        self._inits: list[Json] = list(spec.get("initContainers", []))
        self._init_states: list[Json] = [
            {"waiting": {"reason": "PodInitializing"}} for _ in self._inits
        ]
        self._first, self._until, self._saved = (
            0,
            0,
            0,
        )  # steps: resumed from, the end, the last word's checkpoint
        self._rate, self._began = 0.0, 0.0
        self._runs = time.monotonic()  # since when its container runs
        self._resumed: Resumed | None = None
        # What its main container has printed, each line with its time; and whether it may go on.
        self.printed: list[tuple[str, str]] = []
        self.prints = True

    def say(self, text: str) -> None:
        """A line in the log of the main container."""
        self.printed.append((datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z"), text))

    # Training.

    @property
    def steps(self) -> int:
        """Steps of the whole stage."""
        assert self.task is not None, f"{self.name} is no trainer"
        inputs = self.task.inputs
        return int(inputs["epochs"]) * (
            int(inputs["data"]["samples"]) // int(inputs["globalBatchSize"])
        )

    @property
    def nodes(self) -> int:
        return int(self.env.get("PET_NNODES", 1))

    @property
    def step(self) -> int:
        """The last finished step; it moves with the clock and stops where the play says."""
        if not self._rate:
            return self._first
        return min(self._until, self._first + int(self._rate * (time.monotonic() - self._began)))

    @property
    def checkpoint_step(self) -> int:
        """The newest checkpoint: one every tenth of the stage, and one at SIGTERM."""
        every = max(1, self.steps // 10)
        return max(self._first, self._saved, self.step // every * every)

    @property
    def volume(self) -> Volume:
        """The volume of the claim at /artifacts."""
        spec = self.body["spec"]
        claims = {
            v["name"]: v["persistentVolumeClaim"]["claimName"]
            for v in spec.get("volumes", [])
            if "persistentVolumeClaim" in v
        }
        for mount in (m for c in spec["containers"] for m in c.get("volumeMounts", [])):
            if mount["mountPath"].startswith("/artifacts") and mount["name"] in claims:
                return self.kubelet.volume(self.namespace, claims[mount["name"]])
        return Volume()

    async def train(self, seconds: float, until: float = 1.0) -> LastWord:
        """Train at a speed of `seconds` for a whole stage, up to the share `until`; an artifact is
        reported at once.
        """
        assert self.task is not None, f"{self.name} is no trainer"
        if found := self.volume.artifacts.get(self.digest):
            nothing = {"macs": 0, "saved_macs": 0, "seconds": 0.0, "gpu_seconds": 0.0}
            startup = Uses(startup=round(1000 * (time.monotonic() - self._runs)))
            return found.model_copy(update=nothing | {"milliseconds": startup, "resumed": None})
        while len(self.gang.running) < self.nodes:
            await asyncio.sleep(0.05)
        self._first = min(self.volume.checkpoints.get(self.digest, 0), self.steps)
        self._resumed = self.volume.written.get(self.digest, Resumed())
        self._until = max(self._first, int(until * self.steps))
        if self._until > self._first:
            self.kubelet.trained[self.digest].append(self.task.attempt)
            self._began, self._rate = time.monotonic(), self.steps / max(seconds, 1e-3)
            await asyncio.sleep((self._until - self._first) / self._rate)
        if self._until < self.steps:
            return self.failure(FailureClass.ERROR, "")
        self.kubelet.finished[self.digest] += 1
        return self.volume.artifacts.setdefault(self.digest, self._success())

    def _success(self) -> LastWord:
        assert self.task is not None
        return LastWord(
            result="Succeeded",
            step=self.steps,
            steps=self.steps,
            manifest_digest=_sha256("manifest" + self.digest),
            artifact_digest=_sha256("weights" + self.digest),
            metrics=self._measured(self.task.data.evaluation),
            evaluations={e.name: short_key(e) for e in self.task.data.evaluation},
            **self._spent(),
        )

    def _measured(self, evaluations: Iterable[Evaluation]) -> dict[str, float]:
        """What the kubelet is told to measure, else any numbers, the same for the same inputs."""
        told = self.kubelet.accuracy(self)
        return {
            e.name: int(_sha256(e.name + self.digest)[:4], 16) % 10000 / 100
            if told is None
            else told
            for e in evaluations
        }

    def evaluate(self) -> LastWord:
        """The last word of an evaluation Job's pod that measures what its task asks for."""
        task = EvaluationTask.model_validate_json(self.env["MODELCHAIN_TASK"])
        found = self.volume.artifacts.get(self.digest)
        if found is None or found.artifact_digest != task.artifact_digest:
            return self.failure(FailureClass.CORRUPT_ARTIFACT, "the artifact is another one")
        asked = [e for e in task.data.evaluation if e.name in (task.names or ())]
        return LastWord(result="Succeeded", metrics=self._measured(asked))

    def checkpointed(self) -> LastWord:
        """SIGTERM: the trainer stops here, saves its work and says so."""
        self._until = self._saved = self.step
        return self.failure(FailureClass.PREEMPTED, "stopped by SIGTERM")

    def failure(self, failure: FailureClass, message: str) -> LastWord:
        """The last word of an attempt that ended without an artifact."""
        at: Json = (
            {}
            if self.task is None
            else {"step": self.step, "checkpoint_step": self.checkpoint_step or None}
        )
        return LastWord(result="Failed", failure=failure, message=message, **at, **self._spent())

    def _spent(self) -> dict[str, Any]:
        """Of this attempt: MACs, and times as if a step took 10 ms."""
        if self.task is None:
            return {}
        done = self.step - self._first
        limits = self.body["spec"]["containers"][0].get("resources", {}).get("limits", {})
        gpus = int(limits.get("nvidia.com/gpu", 0)) * self.nodes
        return {
            "macs": done * self.task.macs_per_step,
            "seconds": done / 100,
            "gpu_seconds": done / 100 * gpus,
            **self._used(),
        }

    def _used(self) -> dict[str, Any]:
        """How it has used its time, by the clock; all steps up to a checkpoint are kept."""
        assert self.task is not None
        now = time.monotonic()
        began = self._began if self._rate else now
        stepping, done = round(1000 * (now - began)), self.step - self._first
        saved = self.steps if self.step == self.steps else self.checkpoint_step
        kept = min(1.0, (saved - self._first) / done) if done else 0.0
        productive = round(stepping * kept)
        uses = Uses(
            startup=round(1000 * (began - self._runs)),
            productive=productive,
            unsaved=stepping - productive,
        )
        saved_macs = max(0, saved - self._first) * self.task.macs_per_step
        return {"saved_macs": saved_macs, "milliseconds": uses, "resumed": self._resumed}

    def _leaves_a_checkpoint(self) -> None:
        assert self.task is not None
        self.volume.checkpoints[self.digest] = self.checkpoint_step
        if self.rank == 0 and self.checkpoint_step > self._first:
            used = self._used()
            self.volume.written[self.digest] = Resumed(
                attempt=self.task.attempt,
                pod=self.uid,
                milliseconds=used["milliseconds"].model_copy(update={"unsaved": 0}),
                macs=used["saved_macs"],
                saved_macs=used["saved_macs"],
            )

    # What the kubelet reports.

    async def start(self, delay: float = 0.1) -> None:
        """Init containers complete, then the containers run; rank 0 of a trainer answers on its own
        address.
        """
        await asyncio.sleep(delay)
        self._init_states = [{"terminated": _terminated(0, self._since)} for _ in self._inits]
        if self.task and self.rank == 0:
            await self._serve()
        self.ip = self.ip or _address()
        self._since, self._runs = now(), time.monotonic()
        self.say(f"{self.name} starts")
        await self.report("Running", {"running": {"startedAt": self._since}})
        self.gang.running.add(self.name)

    async def exit(
        self,
        code: int,
        word: LastWord | None = None,
        reason: str = "",
        *,
        conditions: Sequence[Json] = (),
        status: Json | None = None,
    ) -> None:
        """The containers end, for `reason`; `conditions` and `status` are added to the pod's
        own.
        """
        policy, deleted = (
            self.body["spec"]["restartPolicy"],
            "deletionTimestamp" in self.body["metadata"],
        )
        assert not code or deleted or policy == "Never", (
            f"with restartPolicy {policy} {self.name} would run again"
        )
        if self.task and code:
            self._leaves_a_checkpoint()
        await self.stop_serving()
        self.say(f"{self.name} exits with {code}")
        self.prints = False
        ended = _terminated(
            code, self._since, reason, word.model_dump_json(by_alias=True) if word else ""
        )
        await self.report(
            "Failed" if code else "Succeeded", {"terminated": ended}, conditions, status
        )
        if self.rank == 0:
            self.gang.end(code)

    async def exit_beside_a_sidecar(self, code: int, word: LastWord | None = None) -> None:
        """The trainer ends, and the containers that a webhook has added run on."""
        if self.task and code:
            self._leaves_a_checkpoint()
        await self.stop_serving()
        said = word.model_dump_json(by_alias=True) if word else ""
        self._trainer = {"terminated": _terminated(code, self._since, "", said)}
        await self.report("Running", self._trainer, others={"running": {"startedAt": self._since}})
        if self.rank == 0:
            self.gang.end(code)

    async def waiting(self, reason: str, message: str = "") -> None:
        """The containers do not start, for this reason."""
        await self.report("Pending", {"waiting": {"reason": reason, "message": message}})

    async def init_failed(self, code: int, message: str = "") -> None:
        """The first init container ends badly: with restartPolicy Never that is the pod's end, else
        it is restarted.
        """
        assert self._inits, f"{self.name} has no init container that could fail"
        never = self.body["spec"]["restartPolicy"] == "Never"
        back_off = {
            "reason": "CrashLoopBackOff",
            "message": "back-off 5m0s restarting failed container",
        }
        ended = {"terminated": _terminated(code, self._since, message=message)}
        self._init_states[0] = ended if never else {"waiting": back_off}
        await self.report(
            "Failed" if never else "Pending", {"waiting": {"reason": "PodInitializing"}}
        )

    async def report(
        self,
        phase: str,
        state: Json,
        conditions: Sequence[Json] = (),
        status: Json | None = None,
        others: Json | None = None,
    ) -> None:
        """PATCH the status as a kubelet does, fenced by the pod's UID: `state` of every container,
        or `others` of those after the first, and more.
        """
        self._phase = phase
        running = phase == "Running"
        initialized = all(s.get("terminated", {}).get("exitCode") == 0 for s in self._init_states)
        completed = {"reason": "PodCompleted"} if phase == "Succeeded" else {}
        why = {"Pending": "ContainersNotReady", "Succeeded": "PodCompleted", "Failed": "PodFailed"}
        ready = {} if running else {"reason": why[phase]}
        patch = {
            "phase": phase,
            "conditions": [
                self._kept(condition("PodScheduled", True)),
                self._kept(condition("PodReadyToStartContainers", running)),
                self._kept(condition("Initialized", initialized, **completed)),
                self._kept(condition("Ready", running, **ready)),
                self._kept(condition("ContainersReady", running, **ready)),
                *conditions,
            ],
            "initContainerStatuses": [
                _container(c, s) for c, s in zip(self._inits, self._init_states, strict=True)
            ],
            "containerStatuses": [
                _container(c, others if n and others else state)
                for n, c in enumerate(self.body["spec"]["containers"])
            ],
            "hostIP": "127.0.0.1",
            "startTime": self._seen,
            **({"podIP": self.ip, "podIPs": [{"ip": self.ip}]} if self.ip else {}),
            **(status or {}),
        }
        self._report = {"metadata": {"uid": self.uid}, "status": patch}
        await self.resend()

    async def resend(self) -> None:
        """Of a lost node nothing is heard until it comes back."""
        if self._report and self.node not in self.kubelet.lost:
            await self._write("PATCH", f"{self.path}/status", self._report)

    def _kept(self, new: Json) -> Json:
        """A condition that has not changed keeps its time."""
        old = self._conditions.get(new["type"])
        if old and old["status"] == new["status"]:
            new["lastTransitionTime"] = old["lastTransitionTime"]
        self._conditions[new["type"]] = new
        return new

    async def stop(self) -> None:
        """What follows a deletion: SIGTERM, a checkpoint, the last word; then the object goes."""
        if self._phase == "Running" and self._trainer:
            code = self._trainer["terminated"]["exitCode"]
            others = {"terminated": _terminated(0, self._since)}
            await self.report("Failed" if code else "Succeeded", self._trainer, others=others)
        elif self._phase == "Running":
            grace = self.body["metadata"].get("deletionGracePeriodSeconds", 30)
            word = self.checkpointed() if self.task else None
            await asyncio.sleep(min(self.kubelet.stop_delay, grace))
            if self.stuck:
                return
            await self.exit(TORCHRUN_FAILED, word)
        if self.node not in self.kubelet.lost:
            options = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}}
            await self._write("DELETE", self.path, options)

    async def disrupt(self, reason: str, message: str) -> None:
        """The scheduler makes room: it says so in a condition and deletes the pod."""
        body = {
            "status": {
                "conditions": [condition("DisruptionTarget", True, reason=reason, message=message)]
            }
        }
        await self._write("PATCH", f"{self.path}/status", body)
        await self._write("DELETE", self.path)

    async def _write(self, method: str, path: str, body: Json | None = None) -> None:
        """A pod that is gone, or is another by now, needs no report; an API server that is away is
        asked again.
        """
        with contextlib.suppress(Gone):
            await self.kubelet.write(method, path, body)

    # What rank 0 answers.

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_get("/progress", self._progress)
        app.router.add_get("/metrics", self._metrics)
        self._site = web.AppRunner(app, access_log=None)
        await self._site.setup()
        while True:
            self.ip = _address()
            try:
                for port in (PROGRESS_PORT, METRICS_PORT):
                    await web.TCPSite(self._site, self.ip, port).start()
                return
            except OSError:  # another test run has it
                continue

    async def stop_serving(self) -> None:
        if self._site:
            await self._site.cleanup()
            self._site = None

    async def _progress(self, request: web.Request) -> web.Response:
        return web.json_response(text=self.progress().model_dump_json(by_alias=True))

    async def _metrics(self, request: web.Request) -> web.Response:
        assert self.task is not None, f"{self.name} is no trainer"
        meter, registry = (
            Meter(self.task, {"torch": "none", "device": "played", "ranks": 1}),
            CollectorRegistry(),
        )
        meter.live = self.progress()
        steps = meter.live.macs // self.task.macs_per_step
        meter.samples = steps * self.task.inputs["globalBatchSize"]
        registry.register(meter)
        return web.Response(
            body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    def progress(self) -> LiveProgress:
        """As rank 0 tells it: a rate of 0 while nothing moves."""
        assert self.task is not None, f"{self.name} is no trainer"
        rate = self._rate if self.step < self._until else 0.0
        return LiveProgress(
            attempt=self.task.attempt,
            step=self.step,
            steps=self.steps,
            samples_per_second=rate * self.task.inputs["globalBatchSize"],
            eta_seconds=(self.steps - self.step) / rate if rate else 0.0,
            checkpoint_step=self.checkpoint_step,
            macs=self._spent()["macs"],
            **self._used(),
        )


def _terminated(code: int, started: str, reason: str = "", message: str = "") -> Json:
    ended = {
        "exitCode": code,
        "reason": reason or ("Error" if code else "Completed"),
        "message": message,
    }
    return ended | {"startedAt": started, "finishedAt": now()}


def _container(container: Json, state: Json) -> Json:
    running = "running" in state
    done = state.get("terminated", {}).get("exitCode") == 0
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": "" if "waiting" in state else container["image"],
        "ready": running or done,
        "started": running,
        "restartCount": 0,
        "state": state,
    }


def condition(kind: str, true: bool, **more: str) -> Json:
    """A condition of a pod or node, changed now."""
    return {
        "type": kind,
        "status": "True" if true else "False",
        "lastTransitionTime": now(),
        **more,
    }


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _address() -> str:
    """The next loopback address outside 127.0.0.0/10."""
    n = next(_addresses) % (192 * 2**16)
    return f"127.{64 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
