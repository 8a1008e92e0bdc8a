"""A day of three chains, as Prometheus would have scraped it from an operator and its trainers.

`vit` runs: two stages have finished, one is half done, one waits; its gate has trained one model
alone. `swin` is complete. `clip` has
found its first stage finished, and has failed at the second. Two replicas of the operator serve;
the Lease changes hands at 10:00, and for four minutes both of them report all chains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from modelchain.api.status import State

BEGIN = datetime(2026, 11, 29, 12, tzinfo=UTC).timestamp()
HOURS = 24
END = BEGIN + 3600 * HOURS
STEP = 120  # seconds between two scrapes
EARLIER = 30  # seconds; a scrape comes before the moment that it tells of, for the rules to see it
CHECKPOINT = 0.25  # hours between two
HAND_OVER = 10.0  # of the Lease, and for how long both replicas report
OVERLAP = 4 / 60

Labels = dict[str, str]
Sample = tuple[str, str, Labels, float]  # type, name, labels, value
Part = tuple[float, float, str]  # from an hour to an hour, what GPUs were used for


@dataclass(frozen=True)
class Pool:
    name: str
    gpu: str
    prices: dict[str, float]  # by capacity
    peak: float  # FLOP/s of a GPU

    @property
    def price(self) -> float:
        return self.prices["Any"]


A100 = Pool("a100-80gb", "A100", {"Any": 3.75, "Spot": 1.5}, 312e12)
H100 = Pool("h100", "H100", {"Any": 6.0}, 989e12)


@dataclass(frozen=True)
class Stage:
    """A stage, in hours since the day's begin, GPU hours, MACs and money."""

    name: str
    model: str
    gpus: int
    pool: Pool
    planned_macs: float
    alone_macs: float
    planned_hours: float
    projected_hours: float
    alone_cost: float
    due: float = 0.0  # when its predecessor ended
    parts: tuple[Part, ...] = ()
    ends: State = State.SUCCEEDED
    reused: float = 0.0  # GPU hours of an earlier chain; the stage is then not trained
    lost_macs: float = 0.0
    retries: tuple[tuple[float, str], ...] = ()  # when, and the class
    result: float | None = None
    alone_result: float | None = None
    predecessor: str = ""

    @property
    def begin(self) -> float:
        return self.parts[0][0] if self.parts else math.inf

    @property
    def end(self) -> float:
        return self.parts[-1][1] if self.parts else math.inf

    def hours(self, hour: float, use: str = "") -> float:
        """Hours until this one with a use, or with any."""
        return sum(
            max(0.0, min(hour, to) - since) for since, to, of in self.parts if use in ("", of)
        )

    def settled(self, hour: float) -> float:
        """Until when it is known what time was used for: the newest checkpoint, or the end."""
        if not self.begin <= hour < self.end:
            return hour
        return self.begin + (hour - self.begin) // CHECKPOINT * CHECKPOINT

    def progress(self, hour: float) -> float:
        if self.reused:
            return 1.0
        whole = self.hours(math.inf, "kept") / (0.2 if self.ends is State.FAILED else 1.0)
        return self.hours(hour, "kept") / whole if self.parts else 0.0

    def lost(self, hour: float) -> float:
        whole = self.hours(math.inf, "lost")
        return self.lost_macs * self.hours(hour, "lost") / whole if whole else 0.0

    def state(self, hour: float) -> State:
        if self.reused:
            return State.SUCCEEDED
        if hour >= self.end:
            return self.ends
        if hour < self.begin:
            return State.QUEUED if self.parts and hour >= self.due else State.PENDING
        (use,) = (of for since, to, of in self.parts if since <= hour < to)
        return State.STARTING if use == "startup" else State.RUNNING


@dataclass(frozen=True)
class Chain:
    namespace: str
    name: str
    stages: tuple[Stage, ...]
    saved_cost: float
    requested: float
    achieved: float | None = None
    budget: float | None = None
    pool: Pool = A100
    baselines: tuple[Stage, ...] = ()
    after: float = 0.0  # hours of later stages, after the one that runs

    @property
    def labels(self) -> Labels:
        return {"namespace": self.namespace, "chain": self.name}


def _times(begin: float, *parts: tuple[float, str]) -> tuple[Part, ...]:
    """Parts that follow each other, each with its end."""
    starts = [begin, *(end for end, _ in parts)]
    return tuple((since, *part) for since, part in zip(starts, parts, strict=False))


VIT = Chain(
    "vision",
    "vit",
    (
        Stage(
            "vit-t",
            "ViT-T-16",
            64,
            A100,
            planned_macs=1.6e19,
            alone_macs=1.6e19,
            planned_hours=190,
            projected_hours=192,
            alone_cost=720,
            parts=_times(0, (0.1, "startup"), (3, "kept")),
            result=61.0,
        ),
        Stage(
            "vit-s",
            "ViT-S-16",
            64,
            A100,
            planned_macs=6e19,
            alone_macs=1.2e20,
            planned_hours=360,
            projected_hours=384,
            alone_cost=1920,
            due=3,
            parts=_times(
                3.1,
                (3.2, "startup"),
                (6, "kept"),
                (6.25, "lost"),
                (6.35, "startup"),
                (9.1, "kept"),
            ),
            lost_macs=2e18,
            retries=((6.25, "Preempted"),),
            result=68.95,
            alone_result=69.1,
            predecessor="vit-t",
        ),
        Stage(
            "vit-b",
            "ViT-B-16",
            64,
            A100,
            planned_macs=1.6e20,
            alone_macs=4.8e20,
            planned_hours=760,
            projected_hours=768,
            alone_cost=9000,
            due=17.5,
            parts=_times(18, (18.1, "startup"), (29.9, "kept")),
            alone_result=74.4,
            predecessor="vit-s",
        ),
        Stage(
            "vit-l",
            "ViT-L-16",
            64,
            A100,
            planned_macs=2.4e20,
            alone_macs=1e21,
            planned_hours=1280,
            projected_hours=1280,
            alone_cost=18000,
            predecessor="vit-b",
        ),
    ),
    saved_cost=19800,
    requested=3.4,
    budget=10000,
    baselines=(
        Stage(
            "vit-s alone",
            "ViT-S-16",
            64,
            A100,
            planned_macs=1.2e20,
            alone_macs=1.2e20,
            planned_hours=512,
            projected_hours=512,
            alone_cost=1920,
            due=9.4,
            parts=_times(9.5, (9.6, "startup"), (17.5, "kept")),
        ),
    ),
    after=20,
)
SWIN = Chain(
    "vision",
    "swin",
    (
        Stage(
            "swin-t",
            "Swin-T",
            32,
            A100,
            planned_macs=8e18,
            alone_macs=8e18,
            planned_hours=125,
            projected_hours=128,
            alone_cost=480,
            parts=_times(0, (0.1, "startup"), (4, "kept")),
            result=71.2,
        ),
        Stage(
            "swin-s",
            "Swin-S",
            32,
            A100,
            planned_macs=1.6e19,
            alone_macs=4.8e19,
            planned_hours=251,
            projected_hours=254.4,
            alone_cost=2400,
            due=4,
            parts=_times(
                4.05,
                (4.15, "startup"),
                (8, "kept"),
                (8.25, "stalled"),
                (8.35, "startup"),
                (12, "kept"),
            ),
            retries=((8.25, "StallDeadline"),),
            result=76.85,
            alone_result=76.3,
            predecessor="swin-t",
        ),
    ),
    saved_cost=1446,
    requested=2.4,
    achieved=5.6e19 / 2.4e19,
)
CLIP = Chain(
    "team-b",
    "clip",
    (
        Stage(
            "clip-s",
            "ViT-S-32",
            16,
            H100,
            planned_macs=2e18,
            alone_macs=2e18,
            planned_hours=16,
            projected_hours=16,
            alone_cost=96,
            reused=16,
            result=55.5,
        ),
        Stage(
            "clip-b",
            "ViT-B-32",
            16,
            H100,
            planned_macs=1e19,
            alone_macs=3e19,
            planned_hours=160,
            projected_hours=192,
            alone_cost=2400,
            due=1.9,
            parts=_times(
                2,
                (2.1, "startup"),
                (2.8, "kept"),
                (3, "lost"),
                (3.1, "startup"),
                (3.7, "kept"),
                (4.1, "lost"),
                (4.2, "startup"),
                (4.6, "kept"),
                (5, "lost"),
            ),
            ends=State.FAILED,
            lost_macs=1e18,
            retries=((3, "OutOfMemory"), (4.1, "OutOfMemory")),
            predecessor="clip-s",
        ),
    ),
    saved_cost=1248,
    requested=2.6,
    pool=H100,
)
CHAINS = (VIT, SWIN, CLIP)
CONDITIONS = ("Reconciling", "Stalled", "Complete", "Failed")
# Of each hand-over: when, and how long it took in seconds.
HAND_OVERS = ((3.1, 0.8), (4.05, 1.4), (9.2, 3.0))
LONGEST = ("0.5", "1", "2", "5", "10", "30", "60", "300", "+Inf")


def openmetrics() -> str:
    """All samples of the day, as `promtool tsdb create-blocks-from openmetrics` reads them."""
    kinds: dict[str, str] = {}
    rows: dict[str, dict[tuple[str, str], list[str]]] = {}
    for tick in range(1 + round(3600 * HOURS / STEP)):
        for kind, name, labels, value in scrape(tick * STEP / 3600):
            family = _family(kind, name)
            kinds[family] = kind
            shown = ",".join(f'{key}="{value}"' for key, value in labels.items())
            found = rows.setdefault(family, {}).setdefault((name, shown), [])
            found.append(f"{name}{{{shown}}} {value!r} {BEGIN + tick * STEP - EARLIER:.0f}\n")
    text = (
        f"# TYPE {family} {kinds[family]}\n" + "".join(line for s in series.values() for line in s)
        for family, series in rows.items()
    )
    return "".join(text) + "# EOF\n"


def _family(kind: str, name: str) -> str:
    if kind == "histogram":
        return name.rsplit("_", 1)[0]
    return name.removesuffix("_total") if kind == "counter" else name


def scrape(hour: float) -> Iterator[Sample]:
    """All that is scraped at one time, in hours since the day's begin."""
    for replica in (0, 1):
        own = {"job": "modelchain-operator-metrics", "pod": f"modelchain-operator-{replica}"}
        own["instance"] = f"10.0.0.{replica}:9090"
        first = hour < HAND_OVER + OVERLAP
        leads = first if replica == 0 else hour >= HAND_OVER
        yield from _told(_operator(hour, leads, replica), own | {"namespace": "modelchain-system"})
        if leads:
            yield from _told(_prices(), own | {"namespace": "modelchain-system"})
            for chain in CHAINS:
                behind = replica == 0 and hour >= HAND_OVER
                yield from _told(_chain(chain, hour, behind), own | chain.labels)
    for chain in CHAINS:
        for stage in (*chain.stages, *chain.baselines):
            yield from _told(_trainer(stage, hour), _pod(chain, stage, hour))


def _told(samples: Iterator[Sample], labels: Labels) -> Iterator[Sample]:
    return ((kind, name, labels | more, value) for kind, name, more, value in samples)


def _gauge(name: str, value: float, **labels: str) -> Sample:
    return "gauge", f"modelchain_{name}", labels, float(value)


def _counter(name: str, value: float, **labels: str) -> Sample:
    return "counter", f"modelchain_{name}", labels, float(value)


def _operator(hour: float, leads: bool, replica: int) -> Iterator[Sample]:
    since = hour if replica == 0 else hour - HAND_OVER
    seconds = 3600 * max(0.0, since if leads else 0.0)
    yield _gauge("operator_build_info", 1, version="0.1.0")
    yield _gauge("operator_leader", leads)
    if leads:
        yield _gauge("operator_last_list_timestamp_seconds", BEGIN + 3600 * hour - 20)
    due = round(2 + 2 * math.sin(40 * hour)) if round(2 * hour) % 4 == 1 else 0
    yield _gauge("operator_queue_depth", due if leads else 0)
    for verb, resource, code, rate in (
        ("get", "modelchains", "200", 2.0),
        ("patch", "modelchains", "200", 0.5),
        ("list", "pods", "200", 1.0),
        ("patch", "modelchains", "409", 0.01),
    ):
        yield _counter(
            "operator_api_requests_total",
            seconds * rate,
            verb=verb,
            resource=resource,
            code=code,
        )
    for result, rate in (("ok", 0.5), ("failed", 0.005)):
        passes = [(le, part * seconds * rate) for le, part in (("0.1", 0.9), ("1", 1), ("+Inf", 1))]
        yield from _histogram("operator_reconcile_duration_seconds", passes, 0.05, result=result)
    took = [seconds for at, seconds in HAND_OVERS if at <= hour] if replica == 0 else []
    told = [(le, float(sum(s <= float(le) for s in took))) for le in LONGEST]
    yield from _histogram("operator_transition_duration_seconds", told, 1.0)
    led = max(0.0, hour - HAND_OVER) if replica == 1 else min(hour, HAND_OVER)
    yield "gauge", "process_resident_memory_bytes", {}, 9e7 + 6e7 * (1 - math.exp(-led))
    yield "counter", "process_cpu_seconds_total", {}, 3600 * (0.01 * hour + 0.07 * led)


def _histogram(
    name: str, buckets: list[tuple[str, float]], mean: float, **labels: str
) -> Iterator[Sample]:
    count = buckets[-1][1]
    parts = [("bucket", {"le": le}, value) for le, value in buckets]
    parts += [("count", {}, count), ("sum", {}, mean * count)]
    for part, more, value in parts:
        yield "histogram", f"modelchain_{name}_{part}", labels | more, value


def _prices() -> Iterator[Sample]:
    for pool in (A100, H100):
        for capacity, price in pool.prices.items():
            yield _gauge(
                "node_pool_gpu_hour_price",
                price,
                node_pool=pool.name,
                gpu=pool.gpu,
                capacity=capacity,
                currency="USD",
                source="contract of 2026",
            )


def _chain(chain: Chain, hour: float, behind: bool) -> Iterator[Sample]:
    """What a replica tells of a chain. One that is behind has not seen that swin left the pool of
    H100.
    """
    states = [stage.state(hour) for stage in chain.stages]
    complete, failed = set(states) == {State.SUCCEEDED}, State.FAILED in states
    true = {
        "Reconciling": not complete and not failed,
        "Stalled": failed,
        "Complete": complete,
        "Failed": failed,
    }
    pool = H100 if behind and chain is SWIN else chain.pool
    yield _gauge("info", 1, node_pool=pool.name, queue="vision", runner="PyTorchJob")
    for condition in CONDITIONS:
        yield _gauge("condition", true[condition], condition=condition)
    for state in State:
        yield _gauge("stages", states.count(state), state=state)
    yield _gauge("saved_cost", chain.saved_cost, currency="USD")
    yield _gauge("acceleration_ratio", chain.requested, kind="requested")
    if chain.achieved and complete:
        yield _gauge("acceleration_ratio", chain.achieved, kind="achieved")
    if chain.budget:
        yield _gauge("budget_cost", chain.budget, currency="USD")
    for stage, state in zip(chain.stages, states, strict=True):
        if state is State.RUNNING:
            last = stage is chain.stages[-1]
            end = stage.end + (0 if last else chain.after)
            yield _gauge("eta_timestamp_seconds", BEGIN + 3600 * end)
        yield from _told(_stage(stage, hour, state), {"stage": stage.name})
    for stage in chain.baselines:
        yield from _told(_baseline(stage, hour), {"stage": stage.name})


def _stage(stage: Stage, hour: float, state: State) -> Iterator[Sample]:
    for each in State:
        yield _gauge("stage_state", state is each, state=each)
    yield _gauge(
        "stage_info",
        1,
        model=stage.model,
        gpu=stage.pool.gpu,
        node_pool=stage.pool.name,
        gpus=str(stage.gpus),
        predecessor=stage.predecessor,
    )
    holds = state in (State.STARTING, State.RUNNING)
    yield _gauge("stage_allocated_gpus", stage.gpus if holds else 0)
    yield from _outlook(stage)
    yield from _times_of(stage, hour, state)
    yield from _spent(stage, hour)
    yield from _judged(stage, state)


def _baseline(stage: Stage, hour: float) -> Iterator[Sample]:
    """What is told of a model that the gate trains alone: less than of a stage."""
    if stage.begin <= hour < stage.end:
        yield _gauge("stage_allocated_gpus", stage.gpus)
    yield from _spent(stage, hour)


def _outlook(stage: Stage) -> Iterator[Sample]:
    price = stage.pool.price
    amounts = {
        "planned": (stage.planned_macs, stage.planned_hours, price * stage.planned_hours),
        "projected": (
            stage.planned_macs + stage.lost_macs,
            stage.projected_hours,
            price * stage.projected_hours,
        ),
        "baseline": (stage.alone_macs, stage.alone_cost / price, stage.alone_cost),
    }
    for kind, (macs, hours, cost) in amounts.items():
        yield _gauge(f"stage_{kind}_macs", macs)
        yield _gauge(f"stage_{kind}_gpu_seconds", 3600 * hours)
        yield _gauge(f"stage_{kind}_cost", cost, currency="USD")


def _times_of(stage: Stage, hour: float, state: State) -> Iterator[Sample]:
    if state not in (State.PENDING, State.QUEUED):
        yield _gauge("stage_progress_ratio", stage.progress(stage.settled(hour)))
    if not stage.parts or hour < stage.begin:
        return
    yield _gauge("stage_start_timestamp_seconds", BEGIN + 3600 * stage.begin)
    if hour >= stage.end:
        yield _gauge("stage_completion_timestamp_seconds", BEGIN + 3600 * stage.end)
    if state is State.RUNNING:
        yield _gauge("stage_eta_timestamp_seconds", BEGIN + 3600 * stage.end)
        yield _gauge("stage_last_progress_timestamp_seconds", BEGIN + 3600 * hour - 30)
    if stage.due and stage.predecessor != "clip-s":
        yield _gauge("stage_transition_seconds", dict(HAND_OVERS).get(stage.begin, 3.0))


def _spent(stage: Stage, hour: float) -> Iterator[Sample]:
    settled = stage.settled(hour)
    kept = stage.hours(settled, "kept")
    uses = {use: stage.hours(settled, use) for use in ("startup", "stalled", "lost")}
    uses |= {"productive": 0.95 * kept, "evaluating": 0.05 * kept}
    macs = 0.0 if stage.reused else stage.planned_macs * stage.progress(settled)
    cost = stage.pool.price * stage.gpus * stage.hours(hour)
    trained = "trained"
    for use, hours in uses.items():
        seconds = 3600 * stage.gpus * hours
        yield _counter("stage_gpu_seconds_total", seconds, source=trained, use=use)
    yield _counter("stage_macs_total", macs + stage.lost(hour), source=trained)
    yield _counter("stage_lost_macs_total", stage.lost(hour), source=trained)
    yield _counter("stage_cost_total", cost, source=trained, currency="USD")
    waited = max(0.0, min(hour, stage.begin) - stage.due) if stage.parts else 0.0
    yield _counter("stage_queue_seconds_total", 3600 * waited, source=trained)
    for kind in ("Preempted", "OutOfMemory", "StallDeadline"):
        count = sum(of == kind and at <= hour for at, of in stage.retries)
        yield _counter("stage_retries_total", count, **{"class": kind})
    if stage.reused:
        yield from _reused(stage)


def _reused(stage: Stage) -> Iterator[Sample]:
    source = "reused"
    for use, part in (("startup", 0.1), ("productive", 0.9)):
        seconds = 3600 * part * stage.reused
        yield _counter("stage_gpu_seconds_total", seconds, source=source, use=use)
    yield _counter("stage_macs_total", stage.planned_macs, source=source)
    cost = stage.pool.price * stage.reused
    yield _counter("stage_cost_total", cost, source=source, currency="USD")


def _judged(stage: Stage, state: State) -> Iterator[Sample]:
    if stage.alone_result is not None:
        yield _gauge("stage_baseline_result", stage.alone_result, metric="imagenet1k-top1")
    if state is not State.SUCCEEDED or stage.result is None:
        return
    yield _gauge("stage_result", stage.result, metric="imagenet1k-top1")
    yield _gauge("stage_result", stage.result + 17, metric="imagenet1k-top5")
    yield _gauge("stage_gate", 1, verdict="Ungated" if stage.alone_result is None else "Passed")
    if stage.alone_result is not None:
        yield _gauge("stage_gate_difference_points", round(stage.result - stage.alone_result, 2))


def _pod(chain: Chain, stage: Stage, hour: float) -> Labels:
    attempt = 1 + sum(at <= hour for at, _ in stage.retries)
    pod = f"{chain.name}-{stage.name}-a{attempt}-master-0"
    labels = {"job": "modelchain-trainers", "instance": f"{pod}:9090", "pod": pod}
    # The pods of a model that is trained alone have the name of its stage, and another role.
    role = "baseline" if stage in chain.baselines else "train"
    return labels | chain.labels | {"stage": stage.name.removesuffix(" alone"), "role": role}


def _trainer(stage: Stage, hour: float) -> Iterator[Sample]:
    """Rank 0 of the attempt that runs, from its start on; its counters begin at 0."""
    if not stage.begin <= hour < stage.end:
        return
    since = max([stage.begin, *(at for at, _ in stage.retries if at <= hour)])
    running = 3600 * (hour - since)
    rate = stage.planned_macs / (3600 * stage.hours(math.inf, "kept"))  # MACs a second
    peak = stage.gpus * stage.pool.peak
    done = 3600 * stage.hours(hour, "kept")
    yield _gauge("trainer_step", round(4 * done))
    yield _gauge("trainer_planned_steps", round(4 * 3600 * stage.hours(math.inf, "kept")))
    yield _counter("trainer_macs_total", rate * running)
    yield _counter("trainer_samples_total", 16384 * running)
    yield _gauge("trainer_samples_per_second", 16384)
    yield _gauge("trainer_peak_flops_per_second", peak)
    yield _gauge("trainer_mfu_ratio", 2 * rate / peak)
    yield _gauge("trainer_loss", 5 / (1 + done / 7200), component="task")
    if stage.predecessor:
        yield _gauge("trainer_loss", 2 / (1 + done / 7200), component="distillation")
        yield _gauge("trainer_distillation_ratio", 0.4)
    yield _counter("trainer_data_wait_seconds_total", 0.03 * running)
    yield _gauge("trainer_text_token_efficiency", 0.66)
    yield _counter("trainer_skipped_batches_total", 0)
    yield _counter("trainer_replaced_pictures_total", running // 3600)
    yield from _activities(running)
    yield from _saves(running, hour)


def _activities(running: float) -> Iterator[Sample]:
    shares = {"startup": 0.02, "step": 0.86, "data": 0.03, "checkpoint": 0.02, "evaluation": 0.06}
    for activity, share in (shares | {"export": 0.01}).items():
        yield _counter("trainer_seconds_total", share * running, activity=activity)


def _saves(running: float, hour: float) -> Iterator[Sample]:
    pause = 3600 * CHECKPOINT
    yield _gauge("trainer_checkpoint_step", 4 * (running // pause) * pause)
    if running >= pause:
        saved = BEGIN + 3600 * hour - running % pause
        yield _gauge("trainer_last_checkpoint_timestamp_seconds", saved)
        for phase, seconds in (("stall", 0.4), ("write", 6)):
            yield _gauge("trainer_last_checkpoint_duration_seconds", seconds, phase=phase)
