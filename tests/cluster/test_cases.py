"""What went wrong once on a user's cluster: a chain each, all side by side, behind one operator
and a fault proxy.

`MODELCHAIN_SWEEPS=all pytest tests/cluster/test_cases.py -k launch` tries every change at every
request of a launch; without it a few are tried, by a seed that is printed and may be given as SEED.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import plays
import pytest
import sweeps
from aiohttp import web
from apiclient import Api, loop, run
from commandline import modelchain
from controlplane import ControlPlane, KubectlError
from faults import Action, Answer, Exchange, Request
from kubelet import Kubelet
from playedpod import Pod, now
from plays import Play
from pricelist import per_hour
from proxy import FaultProxy
from recorder import Recorder
from rig import CONFIG, IMAGE, Object, Operator, Space, apply_all, chain, fresh_namespace
from specs import config

from modelchain.api.contracts import FailureClass, LastWord, Progress
from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus, PodTime
from modelchain.decide.decide import decide
from modelchain.decide.observed import Action as NextAction
from modelchain.decide.observed import (
    Artifact,
    Launch,
    Observed,
    RecordArtifact,
    Release,
    Seen,
)
from modelchain.io.load import load_yaml, parse

T = TypeVar("T")

CHAINS = "/apis/modelchain.dev/v1alpha1/namespaces/%s/modelchains/%s"
RETRY = "modelchain.dev/retry"
SAMPLED = 8

# Nodes by pool.
NODES = {"main": 2, "gpu": 4, "pair": 2, "single": 1}
GPUS = {"main": 0, "gpu": 8, "pair": 1, "single": 1}
PRICE = {"perGpuHour": "3600", "currency": "USD", "source": "a dollar a GPU second, for the tests"}
SETTINGS = CONFIG | {
    "nodePools": {
        name: {
            "gpu": "A100" if gpus else "CPU",
            "gpusPerNode": gpus,
            "graceSeconds": 30,
            "nodeSelector": {"pool": name},
        }
        | ({"price": PRICE} if gpus else {})
        for name, gpus in GPUS.items()
    }
}


def pool(name: str) -> Object:
    return {"spec.runner.nodePool": name}


# -- plays -----------------------------------------------------------------------------------------

DRIVER = (
    "OCI runtime create failed: nvidia-container-cli: initialization error: nvml error: driver not"
    " loaded: unknown"
)
NEVER = "1970-01-01T00:00:00Z"
NO_DEVICE = (
    "Pod was rejected: Allocate failed due to no healthy devices present; cannot allocate unhealthy"
    " devices nvidia.com/gpu, which is unexpected"
)


def not_started(reason: str = "StartError", **times: str | None) -> Play:
    """containerd knows no start of a container that could not be started, and the kubelet writes
    the year 1970.
    """

    async def play(pod: Pod) -> None:
        await asyncio.sleep(0.3)
        ended = {
            "exitCode": 128,
            "reason": reason,
            "message": DRIVER,
            "startedAt": NEVER,
            "finishedAt": now(),
        }
        await pod.report(
            "Failed", {"terminated": {**ended, **times, "containerID": "containerd://0"}}
        )

    return play


def rejected(reason: str, message: str) -> Play:
    """The kubelet refuses a pod that was bound to its node: nothing is said of containers."""

    async def play(pod: Pod) -> None:
        said = {"phase": "Failed", "reason": reason, "message": message, "startTime": now()}
        await pod.kubelet.write(
            "PATCH", f"{pod.path}/status", {"metadata": {"uid": pod.uid}, "status": said}
        )

    return play


def on_a_node_whose_clock_is_off(seconds: float) -> Play:
    def there() -> str:
        return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")

    async def play(pod: Pod) -> None:
        pod._seen = there()
        await pod.start()
        pod._since = there()
        await pod.report("Running", {"running": {"startedAt": pod._since}})
        await asyncio.sleep(6)  # it loads, and is asked how far it is
        word = await pod.train(5)
        await pod.stop_serving()
        ended = {
            "exitCode": 0,
            "reason": "Completed",
            "message": word.model_dump_json(by_alias=True),
        }
        await pod.report(
            "Succeeded", {"terminated": ended | {"startedAt": pod._since, "finishedAt": there()}}
        )

    return play


def told(pod: Pod, then: Callable[[], Awaitable[None]] | None = None) -> asyncio.Event:
    """Set once rank 0 has told of a step; what it does from then on instead of answering."""
    answer, over = pod._progress, asyncio.Event()

    async def progress(request: web.Request) -> web.Response:
        if over.is_set() and then:
            await then()
            return web.Response(status=503)
        if pod.step > 0:
            over.set()
        return await answer(request)

    pod._progress = progress  # type: ignore[method-assign]
    return over


def unreachable(done: asyncio.Event, *, at_first: bool) -> Play:
    """It trains until it is told to end, and its port is closed: at first, or once it has told of a
    step.
    """

    async def play(pod: Pod) -> None:
        heard = told(pod)
        await pod.start()
        work = asyncio.create_task(pod.train(100))
        if not at_first:
            await heard.wait()
        await pod.stop_serving()
        await done.wait()
        work.cancel()
        await pod.exit(0, await pod.train(0.1))

    return play


def mute() -> Play:
    """It stands still half-way, and takes connections without a word once it has told of a step."""

    async def play(pod: Pod) -> None:
        told(pod, lambda: asyncio.sleep(4))  # longer than any caller waits
        await plays.stall()(pod)

    return play


MACS = 3 * 10**21 + 7  # from 10**21 on an API server writes them with an exponent


def huge(pod: Pod) -> Play:
    """As many MACs as no float counts exactly; the first attempt stands still half-way."""
    progress = pod.progress

    async def play(pod: Pod) -> None:
        pod.progress = lambda: progress().model_copy(update={"macs": MACS})  # type: ignore[method-assign]
        if pod.attempt == 1:
            await plays.stall()(pod)
            return
        await pod.start()
        word = await pod.train(1)
        await pod.exit(0, word.model_copy(update={"macs": MACS}))

    return play


# -- changes of a launch ---------------------------------------------------------------------------

CHANGES = ("suspend", "image", "recipe", "retry")
REQUESTS = ("its intent", "its job", "its UID", "its label", "its release")


class Point(NamedTuple):
    """A change of a chain that comes before or after a request of its launch, and may be taken back
    at the next one.
    """

    number: int
    change: str
    request: str
    after: bool
    back: bool

    def __str__(self) -> str:
        back = ", and back" if self.back else ""
        return f"{self.change}{back}, {'after' if self.after else 'before'} {self.request}"

    @property
    def name(self) -> str:
        return f"launch-{self.number:03}"

    @property
    def seed(self) -> int:
        return 1000 + self.number

    def body(self, *, back: bool = False) -> Object:
        """The change, or what takes it back."""
        return {
            "suspend": {"spec": {"suspend": not back}},
            "image": {"spec": {"runner": {"image": IMAGE if back else IMAGE[:-1] + "1"}}},
            "recipe": {"spec": {"recipe": {"seed": self.seed + (0 if back else 4000)}}},
            "retry": {"metadata": {"annotations": {RETRY: None if back else "1"}}},
        }[self.change]

    def of(self, r: Request) -> bool:
        """Whether a request is this chain's."""
        return r.name == self.name or r.name.startswith(f"{self.name}-a-a")

    def wants(self, r: Request) -> bool:
        """The first attempt's request."""
        if not self.of(r) or r.kind != "write":
            return False
        body = json.loads(r.body)
        if (r.resource, r.subresource) == ("modelchains", "status"):
            attempts = [a for s in body["status"].get("stages", []) for a in s["attempts"]]
            return bool(attempts) and self.request == (
                "its UID" if attempts[0].get("uid") else "its intent"
            )
        if (r.verb, r.resource) == ("create", "pytorchjobs"):
            return self.request == "its job"
        if (r.verb, r.resource) == ("patch", "pytorchjobs"):
            return self.request == (
                "its release" if "annotations" in body["metadata"] else "its label"
            )
        return False


POINTS = [
    Point(number, *point)
    for number, point in enumerate(product(CHANGES, REQUESTS, (False, True), (False, True)))
]


# -- the world -------------------------------------------------------------------------------------

STARTS: dict[str, Play] = {
    "start-error": not_started(),
    "start-limit": not_started(),
    "start-no-end": not_started(finishedAt=None),
    "start-1970": not_started(finishedAt=NEVER),
    "start-cannot": not_started("ContainerCannotRun"),
}
CLOCKS = {"clock-right": 0, "clock-behind": -300, "clock-ahead": 300, "clock-far": -1900}


class World:
    """Chains in one namespace by name, and who plays the pods of each."""

    def __init__(
        self,
        space: Space,
        kubelet: Kubelet,
        proxy: FaultProxy,
        operator: Operator,
        recorder: Recorder,
    ):
        self.space, self.kubelet, self.proxy = space, kubelet, proxy
        self.operator, self.recorder = operator, recorder
        self.api = Api(space.cluster.kubeconfig)
        self.done = asyncio.Event()
        self.points = sweeps.sample("changes of a launch", POINTS, SAMPLED)
        first: dict[str, Play] = STARTS | {"mute": mute(), "still": plays.stall()}
        self.scripts: dict[str, Callable[[Pod], Play | None]] = {
            name: lambda pod, play=play: play if pod.attempt == 1 else None
            for name, play in first.items()
        }
        self.scripts |= {
            name: lambda pod, by=by: on_a_node_whose_clock_is_off(by) for name, by in CLOCKS.items()
        }
        for name in ("blocked", "closed"):
            self.scripts[name] = lambda pod, name=name: unreachable(
                self.done, at_first=name == "blocked"
            )
        self.scripts["device"] = lambda pod: (
            rejected("UnexpectedAdmissionError", NO_DEVICE) if pod.attempt < 3 else None
        )
        self.scripts["single"] = lambda pod: (
            rejected("UnexpectedAdmissionError", NO_DEVICE) if pod.attempt < 2 else None
        )
        self.scripts["shutdown"] = lambda pod: (
            rejected("NodeShutdown", "Pod was rejected: Node is shutting down")
            if pod.attempt < 3
            else None
        )
        self.scripts["fails"] = lambda pod: plays.oom()
        self.scripts["huge"] = huge
        kubelet.script = lambda pod: self.scripts.get(str(pod.chain), lambda pod: None)(pod)

    def begin(self) -> None:
        """Apply all: what they wait for, they wait for together."""
        changes: dict[str, Object] = {name: pool("gpu") for name in (*STARTS, *CLOCKS)}
        changes["start-limit"] |= {"spec.deadlines.stageSeconds": 86400}
        for name in CLOCKS:
            changes[name] |= {"spec.deadlines": {"startSeconds": 900, "stageSeconds": 900}}
        changes |= {
            "device": pool("pair"),
            "single": pool("single"),
            "shutdown": {},
            "fails": {"spec.retry": {"maxRetries": 0}},
            "corrected": {},
            "huge": {},
            "mute": {"spec.deadlines": {"stallSeconds": 20}},
            "still": {"spec.deadlines": {"stallSeconds": 6}},
            "blocked": {"spec.deadlines": {"startSeconds": 8, "stallSeconds": 6}},
            "closed": {"spec.deadlines": {"stallSeconds": 6}},
        }
        for point in self.points:
            changes[point.name] = {"spec.recipe.seed": point.seed}
            self.proxy.on(point.wants, self.disturb(point))
        things = [
            chain(
                name,
                2 if name == "corrected" else 1,
                **(pool("main") | {"spec.recipe.seed": seed} | change),
            )
            for seed, (name, change) in enumerate(changes.items())
        ]
        apply_all(self.space, things)

    # What may be asked of a chain.

    async def change(self, name: str, body: Object) -> None:
        path = self.api.server + CHAINS % (self.space.namespace, name)
        headers = {"Content-Type": "application/merge-patch+json"}
        async with self.api.session.patch(path, data=json.dumps(body), headers=headers) as answer:
            assert answer.status == 200, await answer.text()

    def disturb(self, point: Point) -> Action:
        """The change comes just before or just after the request, and is taken back once it was
        acted on.
        """

        async def act(exchange: Exchange) -> Answer:
            answer = await exchange.forward() if point.after else None
            await self.change(point.name, point.body())
            since = len(self.proxy.log)

            def read(r: Request) -> bool:
                """The chain's next write after that."""
                asked = ("get", "modelchains", point.name)
                return (
                    r.kind == "write"
                    and point.of(r)
                    and asked in {_what(r) for r in self.proxy.log[since:]}
                )

            if point.back:
                self.proxy.on(read, self.undo(point))
            return answer or await exchange.forward()

        return act

    def undo(self, point: Point) -> Action:
        async def act(exchange: Exchange) -> Answer:
            answer = await exchange.forward()
            await self.change(point.name, point.body(back=True))
            return answer

        return act

    # What is seen.

    def wait(self, name: str, what: Callable[[], T | None], why: str, seconds: float = 120.0) -> T:
        """Until `what` is truthy of a chain; fails with its status and with what was written of
        it.
        """
        deadline = time.monotonic() + seconds
        while not (found := _try(what)):
            if time.monotonic() > deadline:
                writes = [
                    str(r)
                    for r in self.proxy.writes()
                    if r.name == name or r.name.startswith(f"{name}-a-a")
                ]
                status = json.dumps(self.space.status(name), indent=1)
                raise AssertionError(
                    "\n".join([f"{name}: not within {seconds:.0f} s: {why}", status, *writes])
                )
            time.sleep(0.25)
        return found

    def failed(self, name: str, attempts: int = 1) -> Object:
        """The status as it was written when that many attempts had failed and the next one was to
        wait.
        """

        def seen() -> Object | None:
            for status in self.written(name):
                stage = status["stages"][0]
                if [a["state"] for a in stage["attempts"]] == [
                    "Failed"
                ] * attempts and "notBefore" in stage:
                    return status
            return None

        return self.wait(name, seen, f"attempt {attempts} has failed and the next one waits")

    def written(self, name: str) -> Iterator[Object]:
        """Every status of the chain, in order."""
        for r in list(self.proxy.log):
            if _what(r) == ("update", "modelchains", name) and r.status == 200:
                yield json.loads(r.body)["status"]

    def again(self, name: str, *kinds: str) -> Object:
        """The status, once the spec as it is now was looked at and one of the conditions holds,
        Complete by default.
        """

        def seen() -> Object | None:
            found = self.space.get("mchain", name)
            status: Object = found.get("status", {})
            true = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
            current = status.get("observedGeneration") == found["metadata"]["generation"]
            return status if current and true & set(kinds or ["Complete"]) else None

        return self.wait(name, seen, f"{kinds} of it as it is now")

    def looked(self, name: str) -> None:
        """Wait until a look at the chain that begins after this is over."""
        for n in range(
            2
        ):  # looks at one chain do not overlap: once the second begins, the first is over
            since = len(self.proxy.log)
            self.space.kubectl("label", "mchain", name, f"look={n}", "--overwrite")

            def asked(since: int = since) -> bool:
                return ("get", "modelchains", name) in {_what(r) for r in self.proxy.log[since:]}

            self.wait(name, asked, "it is looked at")

    def jobs(self, name: str) -> Counter[str]:
        """How often each of its jobs was made."""
        return Counter(
            r.name
            for r in self.proxy.log
            if (r.verb, r.resource, r.status) == ("create", "pytorchjobs", 201)
            and r.name.startswith(f"{name}-a-a")
        )

    def cli(self, *words: str) -> str:
        space = self.space
        words = (*words, "-n", space.namespace, f"--kubeconfig={space.cluster.kubeconfig}")
        done = modelchain(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def explained(self, name: str) -> Object:
        return dict(json.loads(self.cli("explain", name, "-o", "json")))


def _what(r: Request) -> tuple[str, str, str]:
    return r.verb, r.resource, r.name


def _try(what: Callable[[], T | None]) -> T | None:
    try:
        return what()
    except (KeyError, IndexError, KubectlError):
        return None


def waits(stage: Object) -> float:
    """Seconds from the end of its last attempt to its next."""
    ended = datetime.fromisoformat(stage["attempts"][-1]["finishedAt"]).timestamp()
    return float(stage["notBefore"]) - ended


def bills(stage: Object) -> tuple[int, int]:
    return stage["retries"], stage["disruptions"]


@pytest.fixture(scope="module")
def world(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("cases")
    with ExitStack() as stack:
        namespace = stack.enter_context(fresh_namespace(control_plane))
        kubelet = stack.enter_context(Kubelet(control_plane.kubeconfig, sum(NODES.values())))
        proxy = stack.enter_context(FaultProxy(control_plane.kubeconfig))
        recorder = stack.enter_context(Recorder(control_plane.etcd))
        names = iter(kubelet.nodes)
        for label, count in NODES.items():
            control_plane.kubectl(
                "label", "nodes", *(next(names) for _ in range(count)), f"pool={label}"
            )
        space = Space(control_plane, namespace)
        kubeconfig = proxy.kubeconfig(directory / "proxy")
        operator = stack.enter_context(
            Operator(kubeconfig, directory, (namespace,), settings=SETTINGS)
        )
        world = World(space, kubelet, proxy, operator, recorder)
        world.begin()
        yield world
        recorder.verify()
        run(world.api.close())


@pytest.fixture(autouse=True)
def _promises(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "world" in request.fixturenames:
        request.getfixturevalue("world").recorder.verify()


# -- a launch that is disturbed --------------------------------------------------------------------


@pytest.mark.timeout(1200)
def test_changes_of_a_launch(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Each attempt has one job, made once. What is resumed or edited completes, and no budget is
    charged.
    """
    said = []
    for point in world.points:
        if point.change == "suspend" and not point.back:
            world.again(
                point.name, "Suspended", "Complete"
            )  # some stop sooner than others are told to
            world.space.patch(point.name, {"suspend": False})
    for point in world.points:
        stage = world.again(point.name)["stages"][0]
        jobs, attempts = world.jobs(point.name), [a["name"] for a in stage["attempts"]]
        said.append(
            f"{point}: {', '.join(a['state'] for a in stage['attempts'])}; {jobs.total()} jobs"
        )
        assert set(jobs.values()) == {1} and jobs.keys() <= set(attempts), f"{said[-1]}: {jobs}"
        assert bills(stage) == (0, 0) and len(attempts) <= (3 if point.back else 2), said[-1]
        assert world.kubelet.finished[stage["inputDigest"]] == 1, said[-1]
        undisturbed = point.change == "retry"
        assert not undisturbed or attempts == [f"{point.name}-a-a1"], said[-1]
    with capsys.disabled():
        print(f"\n{len(said)} of {len(POINTS)} points", *said, sep="\n")


# -- times that cannot be --------------------------------------------------------------------------


def test_a_container_that_never_started(world: World) -> None:
    """Only the time for which it held its node is billed, as startup. No deadline is over, and the
    next attempt is an ordinary one, on another node: the driver of this one has failed.
    """
    for name in STARTS:
        stage = world.failed(name)["stages"][0]
        attempt = stage["attempts"][0]
        assert attempt["failure"] == "Hardware", attempt
        assert "driver not loaded" in attempt["message"], attempt
        held = attempt["gpuSeconds"]
        assert held == stage["gpuSeconds"] < 600 and not attempt.get("gone"), name
        assert attempt.get("gpuMilliseconds", {}) == (
            {"startup": round(1000 * held)} if held else {}
        ), name
        assert 9 <= waits(stage) <= 11
    for name in STARTS:
        status = world.again(name)
        stage = status["stages"][0]
        assert [a["state"] for a in stage["attempts"]] == ["Failed", "Succeeded"]
        assert bills(stage) == (1, 1) and len(status["avoid"]) == 1
        record = next(r["spec"] for r in world.space.list("sart") if r["spec"]["chain"] == name)
        for seconds, cost in (
            (a["gpuSeconds"], a["cost"]) for a in (status["total"], stage, record)
        ):
            assert 0 <= seconds < 600 and float(cost) < 600, (
                f"{name}: {seconds} GPU seconds, {cost}"
            )
    with urllib.request.urlopen(
        f"http://127.0.0.1:{world.operator.metrics_port}/metrics"
    ) as answer:
        lines = [line for line in answer.read().decode().splitlines() if 'chain="start-' in line]
    counters = ("modelchain_stage_gpu_seconds_total", "modelchain_stage_cost_total")
    spent = [float(line.split()[-1]) for line in lines if line.startswith(counters)]
    assert len(spent) >= 2 * len(STARTS) and max(spent) < 600


@pytest.mark.parametrize("name", CLOCKS)
def test_a_node_whose_clock_is_off(world: World, name: str) -> None:
    """Its own start and end are of one clock, and what lies between them is what is billed; no
    deadline is over.
    """
    stage = world.again(name)["stages"][0]
    ended = world.space.get("pod", f"{name}-a-a1-master-0")["status"]["containerStatuses"][0][
        "state"
    ]["terminated"]
    began, over = (datetime.fromisoformat(ended[f"{what}At"]) for what in ("started", "finished"))
    real = 8 * (over - began).total_seconds()
    record = next(r["spec"] for r in world.space.list("sart") if r["spec"]["chain"] == name)
    # It also held its GPUs from its binding to the node to the start of its container.
    spent = record["gpuSeconds"]
    assert real >= 80 and spent == stage["gpuSeconds"] and real - 8 <= spent <= real + 8 * 20
    assert float(record["cost"]) == pytest.approx(spent, abs=0.01)
    assert bills(stage) == (0, 0) and len(stage["attempts"]) == 1
    while_it_ran = [status["stages"][0]["gpuSeconds"] for status in world.written(name)]
    assert max(while_it_ran) <= real + 8 * 20, (
        f"the longest it can have been at work: {while_it_ran}"
    )


# -- nodes that refuse -----------------------------------------------------------------------------


def test_a_node_that_shuts_down(world: World) -> None:
    """Its retries are not burnt in seconds: an attempt without progress waits, longer each time."""
    for attempt, seconds in ((1, 10), (2, 20)):
        stage = world.failed("shutdown", attempt)["stages"][0]
        assert stage["attempts"][-1]["failure"] == "NodeLost" and bills(stage) == (attempt, attempt)
        assert seconds - 1 <= waits(stage) <= seconds + 1
    assert world.again("shutdown")["stages"][0]["attempts"][-1]["state"] == "Succeeded"
    assert (
        "avoid" not in world.space.status("shutdown")
        or world.space.status("shutdown")["avoid"] == []
    )


def test_a_node_without_a_healthy_device(world: World) -> None:
    """It is avoided; the same fault on a second node is no node's fault, and a retry tries all
    nodes again.
    """
    space, nodes = world.space, []
    for attempt in (1, 2):
        status = world.failed("device", attempt)
        last = status["stages"][0]["attempts"][-1]
        nodes.append(last["node"])
        assert last["failure"] == "Hardware" and "got no device" in last["message"]
        assert [one["node"] for one in status["avoid"]] == nodes and len(set(nodes)) == attempt
        job = space.get("pytorchjob", f"device-a-a{attempt}")
        spec = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
        assert [e["values"] for e in _away(spec)] == [[node] for node in nodes[:-1]]
    [away] = _away(spec)
    _away(spec).extend(away | {"values": [f"other-{n}"]} for n in range(15))
    many = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "many"}, "spec": spec}
    space.kubectl(
        "create", "--dry-run=server", "-f", "-", input=json.dumps(many)
    )  # as many as are ever avoided
    stalled = space.until("Stalled", "device")["conditions"][0]
    assert stalled["reason"] == "SameDeviceError" and all(
        node in stalled["message"] for node in nodes
    )
    assert world.explained("device")["next"] == f"modelchain retry device -n {space.namespace}"
    assert set(world.jobs("device")) == {"device-a-a1", "device-a-a2"}
    world.cli("retry", "device")
    status = world.again("device")
    assert [a["state"] for a in status["stages"][0]["attempts"]] == [
        "Failed",
        "Failed",
        "Succeeded",
    ]
    assert status["avoid"] == []


def _away(pod: Object) -> list[Object]:
    """The requirements of its node affinity."""
    required = (
        (pod.get("affinity") or {})
        .get("nodeAffinity", {})
        .get("requiredDuringSchedulingIgnoredDuringExecution")
    )
    terms = required["nodeSelectorTerms"] if required else [{"matchFields": []}]
    assert len(terms) == 1
    fields: list[Object] = terms[0]["matchFields"]
    return fields


def test_nothing_but_a_node_that_is_avoided(world: World) -> None:
    """No deadline runs, no budget is charged, the status names the node; a retry uses it again."""
    space = world.space
    node = world.failed("single")["stages"][0]["attempts"][0]["node"]
    world.wait(
        "single",
        lambda: space.stage("a", "single")["reason"].startswith("NodesAvoided: "),
        "it has no node",
    )
    stage, bill = space.stage("a", "single"), (1, 1)
    assert (stage["state"], bills(stage)) == ("Queued", bill) and node in stage["reason"]
    found = world.explained("single")
    assert found["reason"] == "NodesAvoided" and node in found["cause"]
    assert found["next"] == f"modelchain retry single -n {space.namespace}"
    world.cli(*found["next"].split()[1:3])
    status = world.again("single")
    assert [a["state"] for a in status["stages"][0]["attempts"]] == [
        "Failed",
        "Suspended",
        "Succeeded",
    ]
    assert status["avoid"] == []


# -- objects as others write them ------------------------------------------------------------------


def test_a_name_that_the_api_server_completes(world: World, tmp_path: Path) -> None:
    """It is run, and what `kubectl get -o yaml` prints of it can be checked and planned."""
    thing = chain("sweep", 2, **pool("main") | {"spec.recipe.seed": 4321})
    del thing["metadata"]["name"]
    thing["metadata"]["generateName"] = "sweep-"
    name = (
        world.space.kubectl("create", "-f", "-", "-o", "name", input=json.dumps(thing))
        .strip()
        .rpartition("/")[2]
    )
    world.again(name)
    file = tmp_path / "sweep.yaml"
    file.write_text(world.space.kubectl("get", "mchain", name, "-o", "yaml"))
    assert "generateName: sweep-" in file.read_text()
    for command in ("validate", "plan"):
        done = modelchain(command, "-f", str(file))
        assert done.returncode == 0, done.stderr


def test_the_annotation_of_a_retry_is_taken_away(world: World) -> None:
    """A GitOps tool removes what it does not know: that asks for nothing."""
    space = world.space
    space.until("Failed", "fails")
    world.cli("retry", "fails")
    world.wait(
        "fails", lambda: len(space.stage("a", "fails")["attempts"]) == 2, "it is tried again"
    )
    space.until("Failed", "fails")
    for value in (None, ""):
        space.patch("fails", annotations={RETRY: value})
        world.looked("fails")
        assert space.condition("Failed", "fails")["status"] == "True"
        assert set(world.jobs("fails")) == {"fails-a-a1", "fails-a-a2"}
    space.patch("fails", annotations={RETRY: "very long " * 1000})
    world.wait(
        "fails",
        lambda: len(space.stage("a", "fails")["attempts"]) == 3,
        "a new value asks for it again",
    )


def test_a_complete_chain_is_edited_to_what_cannot_be_run(world: World) -> None:
    """It is not complete while its spec asks for something else, and complete again without
    training.
    """
    space = world.space
    world.again("corrected")
    stages = space.get("mchain", "corrected")["spec"]["stages"]
    open_ended = [{k: v for k, v in s.items() if k != "epochs"} for s in stages]
    space.patch("corrected", {"stages": open_ended, "allocation": {"targetAcceleration": "900000"}})
    status = world.again("corrected", "Stalled")
    said = {c["type"]: c for c in status["conditions"]}
    assert said["Stalled"]["reason"] == "InvalidSpec"
    assert [said[kind]["status"] for kind in ("Complete", "Finished", "Ready")] == ["False"] * 3
    space.patch("corrected", {"stages": stages, "allocation": None})
    assert [s["cache"] for s in world.again("corrected")["stages"]] == ["Hit", "Hit"]
    made = [
        r
        for r in world.proxy.log
        if r.resource == "pytorchjobs" and r.verb == "create" and "corrected" in r.name
    ]
    assert len(made) == 2


# -- large numbers and long texts ------------------------------------------------------------------


def test_very_many_macs(world: World) -> None:
    """They are written once and read back as they were written, and the operator still acts on
    everything else.
    """
    space = world.space
    told = lambda: (  # noqa: E731
        space.stage("a", "huge")["progress"]["step"]
        and space.stage("a", "huge")["macs"] == float(MACS)
    )
    world.wait("huge", told, "it stands still")
    before = len(world.proxy.writes())
    world.looked("huge")
    assert [r for r in world.proxy.writes()[before:] if r.name == "huge"] == []
    space.patch("huge", {"suspend": True})
    world.again("huge", "Suspended")
    space.patch("huge", {"suspend": False})
    status = world.again("huge")
    record = next(r["spec"] for r in space.list("sart") if r["spec"]["chain"] == "huge")
    for macs in (record["macs"], status["stages"][0]["macs"], status["total"]["macs"]):
        assert macs == pytest.approx(2 * MACS, rel=1e-9)


PODS = 256
NODE, FAULT, TEXT = "n" * 250, "é" * 400, "\u2014 " * 2500


class Life:
    """A chain as `decide` sees it when all is as large as it can be: every stage fails on eight
    nodes, twice, and ends.

    `stored` writes a status and gives it as it is read back.
    """

    def __init__(self, spec: ModelChain, stored: Callable[[ChainStatus], ChainStatus]):
        self.spec, self.stored, self.status, self.now = spec, stored, ChainStatus(), 1_800_000_000.0
        self.seen = Seen(live=False, started=False)
        self.artifacts: dict[str, Artifact] = {}

    def look(self, **seen: Any) -> NextAction | None:
        """What is to be done once nothing is to be written any more, of the status as it is read
        back.
        """
        known = {"live": False, "started": True, "uid": "u" * 36, "prices": per_hour("3.75")}
        self.seen = Seen(**(known | seen))
        for _ in range(9):
            names = [a.name for s in self.status.stages for a in s.attempts if not a.finished_at]
            decision = decide(self.spec, self._observed(names if self.seen.there else []), self.now)
            if not decision.write:
                return decision.action
            self.status = decision.status
        raise AssertionError("it is written again and again")

    def _observed(self, live: list[str]) -> Observed:
        return Observed(
            status=self.status,
            artifact=self.artifacts.get,
            attempt=lambda name: self.seen,
            live=frozenset(live),
            records=True,
            poll_seconds=5.0,
        )

    def keep(self) -> None:
        read = self.stored(self.status)
        assert read == self.status
        self.status = read

    def stage(self, number: int, failures: int) -> None:
        started = {
            f"{number:04}{i:032}": PodTime(started=self.now, gpus=8, first=not i)
            for i in range(PODS)
        }
        at = Progress(step=10**15 - 1, steps=10**15, samples_per_second=1e6, eta_seconds=1.0)
        for failure in range(failures + 1):
            assert isinstance(self.look(live=False, started=False, uid=None), Launch)
            assert isinstance(self.look(unreleased=True), Release)
            self.now += 100
            self.look(live=True, running=True, pods=started, progress=at, macs=10**21 + failure)
            self.keep()
            pods = {
                uid: pod.model_copy(update={"finished": self.now}) for uid, pod in started.items()
            }
            if failure < failures:
                bad = {f"{NODE}{failure}{i}": f"{FAULT}{failure}{i}" for i in range(8)}
                word = LastWord(
                    result="Failed",
                    failure=FailureClass.HARDWARE,
                    message=TEXT,
                    macs=10**21,
                    step=7,
                )
                self.look(pods=pods, gone_pods=frozenset(pods), word=word, bad_nodes=bad)
                self.keep()
                self.now += 1000
        digest = "d" * 64
        word = LastWord(
            result="Succeeded",
            manifest_digest=digest,
            artifact_digest=digest,
            macs=10**21,
            steps=10**15,
        )
        done = self.look(pods=pods, word=word, succeeded=True)
        assert isinstance(done, RecordArtifact)
        key, metrics = (
            done.launch.attempt.input_digest,
            {f"{'m' * 50}-{i}": 1e300 for i in range(16)},
        )
        self.artifacts[key] = Artifact(
            digest,
            f"{key}/artifact",
            done.spent.macs,
            metrics,
            gpu_milliseconds=done.spent.gpu_milliseconds,
            cost="1",
        )
        self.look(pods=pods, word=word, succeeded=True)
        self.keep()


EXAMPLES = ("vit-cc3m", "vit-merged15m", "swin-cc3m")


@pytest.mark.parametrize("name", [*EXAMPLES, "stages-32"])
def test_a_status_as_large_as_it_can_be(
    control_plane: ControlPlane, namespace: str, repository: Path, name: str
) -> None:
    """The API server takes it, and gives it back as it was."""
    thing = (
        chain(name) if name not in EXAMPLES else load_yaml(repository / "examples" / f"{name}.yaml")
    )
    if name not in EXAMPLES:
        shapes = (config(vision={"layers": 2 + i}) for i in range(32))
        thing["spec"]["stages"] = [
            {"name": f"{'s' * 14}{i:02}", "modelConfig": shape, "epochs": 20}
            for i, shape in enumerate(shapes)
        ]
    control_plane.kubectl("create", "-f", "-", f"--namespace={namespace}", input=json.dumps(thing))
    api, path = Api(control_plane.kubeconfig), CHAINS % (namespace, name)
    found = run(api.request("GET", path))
    writes = 0

    def stored(status: ChainStatus) -> ChainStatus:
        nonlocal found, writes
        body = status.model_dump(mode="json", by_alias=True, exclude_none=True)
        found, writes = (
            run(api.request("PUT", f"{path}/status", {**found, "status": body})),
            writes + 1,
        )
        return ChainStatus.model_validate_json(json.dumps(run(api.request("GET", path))["status"]))

    spec = parse(ModelChain, {key: value for key, value in found.items() if key != "status"}, name)
    life = Life(spec, stored)
    for number in range(len(spec.spec.stages)):
        life.stage(number, failures=2 if number in (0, 31) or name in EXAMPLES else 0)
    assert (
        life.status.is_true("Complete")
        and len(life.status.avoid) == 16
        and writes >= 4 * len(EXAMPLES)
    )
    assert max(stage.macs for stage in life.status.stages) >= 10**21
    run(api.close())


# -- progress that cannot be asked for -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [("still", "for 6 s"), ("mute", "for 20 s")],
    ids=["answers and stands still", "says nothing"],
)
def test_a_stall_that_is_seen(world: World, name: str, says: str) -> None:
    stage = world.again(name)["stages"][0]
    assert [a.get("failure") for a in stage["attempts"]] == ["StallDeadline", None] and bills(
        stage
    ) == (1, 0)
    assert says in stage["attempts"][0]["message"]


def test_a_port_that_is_closed(world: World) -> None:
    """No attempt is ended for it, not even by an operator that has just started. The operator
    reports it, and the stage finishes.

    This test is the last one. An operator that has just started has heard no trainer yet, so it
    could not tell which of them has fallen silent.
    """
    space, names = world.space, ("blocked", "closed")
    for name in names:
        said = lambda name=name: space.stage("a", name)["reason"].startswith("ProgressUnknown: ")  # noqa: E731
        world.wait(name, said, "it is told")
        reason = space.stage("a", name)["reason"]
        assert (
            ":9091" in reason
            and "NetworkPolicy" in reason
            and space.condition("Stalled", name) is None
        )
        found = world.explained(name)
        assert (
            found["reason"] == "ProgressUnknown" and "kubectl get networkpolicies" in found["next"]
        )
        news = [e for e in space.list("events") if e["involvedObject"]["name"] == name]
        assert any((e["type"], e["reason"]) == ("Warning", "ProgressUnknown") for e in news)
    world.operator.kill()
    since = len(world.proxy.log)
    world.operator.start()

    def told_again() -> bool:
        mine = [
            r for r in world.proxy.log[since:] if (r.verb, r.resource) == ("update", "modelchains")
        ]
        return {r.name for r in mine if b"ProgressUnknown" in r.body and r.status == 200} >= set(
            names
        )

    world.wait("closed", told_again, "the next operator tells of both, too")
    loop().call_soon_threadsafe(world.done.set)
    for name in names:
        stage = world.again(name)["stages"][0]
        assert [a["state"] for a in stage["attempts"]] == ["Succeeded"] and bills(stage) == (0, 0)
