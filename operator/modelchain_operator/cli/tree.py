"""What `modelchain watch` shows: a chain, its stages, the attempt and its pods. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import cached_property
from typing import Literal

from pydantic import ValidationError
from rich.console import Group, RenderableType
from rich.text import Text

from modelchain.api.contracts import Progress
from modelchain.api.reasons import EXPLAIN, command_of, filled, known
from modelchain.api.spec import ModelChain
from modelchain.api.status import AttemptStatus, ChainStatus, StageLedger, StageStatus, State
from modelchain.decide.conditions import current
from modelchain.errors import InputError
from modelchain.gate.budget import SECONDS_PER_HOUR
from modelchain.gate.outlook import Outlook, Taken, gpu_seconds_to_come, taken, with_removed
from modelchain.io.load import status_of
from modelchain.io.table import COLOURS
from modelchain.io.table import rows as rows_of
from modelchain.io.units import age, human
from modelchain.plan.plan import Plan, plan
from modelchain.report.cost import PARTS, charged, outlook_columns, outlooks_of, units
from modelchain.report.model import seconds_of
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import (
    condition,
    is_deleting,
    is_refused,
    name,
    true_condition,
)
from modelchain_operator.cli.columns import Column, fitting, rows, width_of
from modelchain_operator.cli.listing import why
from modelchain_operator.runners.pods import created_at, state
from modelchain_operator.runners.registry import pods_made_by, runner_for

# The most pods of an attempt that are listed by name.
MOST_PODS = 8
BAR = 10
# Fewer characters of a note say nothing.
LEAST_NOTE = 16
STYLES = {str(state): colour for state, colour in COLOURS.items()} | {
    "Complete": "green",
    "Stalled": "red",
    "InvalidSpec": "red",
}


@dataclass(frozen=True)
class Signs:
    """What the tree is drawn with."""

    done: str = "✔"
    going: str = "●"
    waits: str = "·"
    suspended: str = "‖"
    stalled: str = "⚠"
    failed: str = "✖"
    full: str = "━"
    empty: str = "─"
    branch: str = "├─ "
    last: str = "└─ "
    more: str = "…"
    # How a line that is too long ends.
    cut: Literal["ellipsis", "crop"] = "ellipsis"


UNICODE = Signs()
ASCII = Signs("+", "*", ".", "=", "!", "x", "#", "-", "|- ", "`- ", "...", "crop")


@dataclass(frozen=True)
class Watched:
    """A chain and its pods at one moment."""

    chain: Object
    status: ChainStatus
    # Those of the chain that the user may see.
    pods: Sequence[Object]
    # Seconds since the epoch.
    now: float
    # None if the spec is one of another version, or cannot be planned.
    spec: ModelChain | None = None
    plan: Plan | None = None

    @cached_property
    def outlooks(self) -> list[Outlook]:
        return [] if self.plan is None else outlooks_of(self.plan, self.status)

    @property
    def current(self) -> StageStatus | None:
        """The stage that stands for the chain; None once all have finished."""
        return current(self.status.stages)


def watched_of(chain: Object, pods: Sequence[Object], now: float) -> Watched:
    """The view of a stored chain. Raises WorkError if another version wrote its status."""
    status = status_of(chain)
    try:
        spec = ModelChain.model_validate(chain)
        planned = plan(spec, "analytic", {}, status.epochs) if status.stages else None
    except (ValidationError, InputError):
        return Watched(chain, status, pods, now)
    return Watched(chain, status, pods, now, spec, planned)


def tree(view: Watched, width: int, signs: Signs = UNICODE) -> RenderableType:
    """The whole picture. Only commands to copy are longer than `width` characters."""
    texts = [*_heading(view), Text(), *_accounts(view, width), *_stages(view, width, signs)]
    for text in texts:
        text.no_wrap, text.overflow = True, signs.cut
    return Group(*texts, *_next(view))


# -- the chain ------------------------------------------------------------------------------------


def _heading(view: Watched) -> Iterator[Text]:
    meta, summary = view.chain["metadata"], view.status.summary
    seen = view.status.observed_generation == meta.get("generation")
    faster = f", acceleration {view.plan.acceleration:.2f} by the plan" if view.plan else ""
    told = f"generation {meta.get('generation')}{'' if seen else ', not observed yet'}"
    yield _field("Chain", f"{meta['namespace']}/{meta['name']}, {told}{faster}")
    word = summary.state or "New"
    line = _field("State", "")
    line.append(f"{word} {summary.stage}".rstrip(), STYLES.get(word, ""))
    because = why(view.chain)
    yield line.append(f"  {because}" if because else "", "red" if word in _BAD else "")
    yield from _pool(view)
    if (left := seconds_left(view)) is not None:
        yield _field("Finish", f"in {_long(left)}, {_clock(view.now + left, view.now)}")


_BAD = ("Failed", "Stalled", "InvalidSpec")


def _field(title: str, text: str) -> Text:
    return Text.assemble((f"{title:9}", "bold"), text)


def _pool(view: Watched) -> Iterator[Text]:
    """Where the open attempts run, and how many GPUs they hold."""
    going = [attempt for _, attempt in _open(view.status)]
    runner = (view.chain.get("spec") or {}).get("runner") or {}
    pools = sorted({a.pool for a in going if a.pool} or {str(runner.get("nodePool") or "")})
    told = [pool for pool in pools if pool]
    if held := sum(map(_gpus, going)):
        told.append(f"{held} GPUs held")
    if queue := runner.get("queueName"):
        told.append(f"queue {queue}")
    if told:
        yield _field("Pool", ", ".join(told))


def _open(status: ChainStatus) -> list[tuple[StageLedger, AttemptStatus]]:
    """The attempts that have not ended, each with its stage or baseline."""
    return [(s, attempt) for s, attempt in status.attempts.values() if not attempt.finished_at]


def _gpus(attempt: AttemptStatus) -> int:
    """How many GPUs the attempt's pods hold now."""
    return sum(pod.gpus for pod in attempt.pods.values() if pod.finished is None)


def seconds_left(view: Watched) -> float | None:
    """Until the last stage has finished, if nothing fails; None if that is not known.

    The running stage's trainer says how long it takes. Of later ones, the GPU time is projected, as
    `modelchain cost` shows it, and they are taken to get the same GPUs on each node.
    """
    outlooks = {one.name: one for one in view.outlooks}
    per_node = _gpus_per_node(view.status)
    total, known = 0.0, False
    for stage in view.status.stages:
        if stage.done:
            continue
        if stage.progress is not None:
            total, known = total + stage.progress.eta_seconds, True
            continue
        one = outlooks.get(stage.name)
        left = None if one is None else _to_come(view, one)
        if left is None or not per_node:
            return None
        total += float(left) / (per_node * _nodes(view, stage.name))
    return total if known else None


def _to_come(view: Watched, one: Outlook) -> Decimal | None:
    gate = view.spec.spec.gate if view.spec else None
    alone = gate is not None and one.name in gate.train
    return gpu_seconds_to_come(one, view.status, trained_alone=alone)


def _gpus_per_node(status: ChainStatus) -> int:
    """The GPUs of a pod of an open attempt; 0 if there is none."""
    pods = [pod.gpus for _, attempt in _open(status) for pod in attempt.pods.values()]
    return max(pods, default=0)


def _nodes(view: Watched, stage: str) -> int:
    stages = view.spec.spec.stages if view.spec else []
    return next((one.resources.nodes for one in stages if one.name == stage), 1)


def _accounts(view: Watched, width: int) -> Iterator[Text]:
    """What the chain has spent and will take, in each unit that is known, as `cost` shows it."""
    found = view.outlooks
    if not found:
        return
    chain = name(view.chain)
    shown = list(units(chain, view.status))
    found = with_removed(found, view.status)
    sums = [outlook_columns(found, unit, estimates) for _, unit, estimates in shown]
    columns = [
        Column("", [title.removeprefix(f"{chain}, ") for title, _, _ in shown]),
        *(Column(part, [one[part][-1] for one in sums], True, _SPARE[part]) for part in PARTS),
        Column("budget", [_limit(view, unit) for _, unit, _ in shown], True, 1),
    ]
    yield from rows(fitting(columns, width))
    yield Text()


# Which sums are left out first where there is no room for all.
_SPARE = {"planned": 3, "spent": 0, "projected": 2, "alone": 4, "saved": 5}


def _limit(view: Watched, unit: Callable[[Taken], str]) -> str:
    """The budget in a unit, and how much of it is used; empty without one."""
    budget = view.spec.spec.budget if view.spec else None
    if budget is None:
        return ""
    used = charged(view.status)
    cost, hours = budget.cost, budget.gpu_hours
    if cost is not None and (text := unit(Taken(cost=Decimal(cost)))):
        return f"{text} ({_share(used.cost, Decimal(cost))})"
    seconds = None if hours is None else Decimal(hours) * SECONDS_PER_HOUR
    if seconds is not None and (text := unit(Taken(gpu_seconds=seconds))):
        return f"{text} ({_share(used.gpu_seconds, seconds)})"
    return ""


def _share(used: Decimal | None, limit: Decimal) -> str:
    return "all used" if not limit else f"{(used or Decimal(0)) / limit:.0%} used"


# -- stages ---------------------------------------------------------------------------------------


def _stages(view: Watched, width: int, signs: Signs) -> Iterator[Text]:
    """A line for each stage and baseline, and below each its open attempts and their pods."""
    found = list(rows_of(view.status))
    if not found:
        return
    heading, *lines = _table(view, found, width, signs)
    yield heading
    for (_, stage), line in zip(found, lines, strict=True):
        yield line
        for attempt in stage.attempts:
            if attempt.finished_at is None:
                yield from _attempt(view, attempt, signs)


def _table(
    view: Watched, found: Sequence[tuple[str, StageStatus]], width: int, signs: Signs
) -> list[Text]:
    stages = [stage for _, stage in found]
    unit_name, spent, projected = _amounts(view, found)
    columns = [
        Column("", [_sign(stage, signs) for stage in stages]),
        Column("stage", [title for title, _ in found]),
        Column("model", [_model(view, stage) for stage in stages], spare=6),
        Column("state", [Text(state_of(s), _style(s)) for s in stages]),
        Column("progress", [_bar(stage, signs) for stage in stages]),
        Column("left", [_left(stage.progress) for stage in stages], True),
        Column(f"spent, {unit_name}", spent, True, 4),
        Column("projected", projected, True, 5),
        Column("accuracy", [_accuracy(stage) for stage in stages], True, 1),
        Column(
            "gate", [str(stage.gate.verdict) if stage.gate else "" for stage in stages], False, 2
        ),
        Column("attempts", _attempts(stages), True, 3),
    ]
    kept = fitting(columns, width)
    if width - width_of(kept) >= LEAST_NOTE:
        kept.append(Column("", [Text(_note(stage), "dim") for stage in stages]))
    return rows(kept)


def _amounts(
    view: Watched, found: Sequence[tuple[str, StageStatus]]
) -> tuple[str, list[str], list[str]]:
    """The name of the first unit that is known, and in it what each row has spent and will have.

    The figures are those of `modelchain cost`.
    """
    title, unit, _ = next(units(name(view.chain), view.status))
    projected = {one.name: unit(one.projected) for one in view.outlooks}
    return (
        title.removeprefix(f"{name(view.chain)}, "),
        [unit(taken(stage)) if stage.macs or stage.gpu_seconds else "" for _, stage in found],
        [projected.get(title, "") for title, _ in found],
    )


def _sign(stage: StageStatus, signs: Signs) -> Text:
    return Text(_which(stage, signs), _style(stage))


def _which(stage: StageStatus, signs: Signs) -> str:
    if stage.stalled:
        return signs.stalled
    if stage.state in (State.PENDING, State.QUEUED):
        return signs.waits
    ends = {
        State.SUCCEEDED: signs.done,
        State.FAILED: signs.failed,
        State.SUSPENDED: signs.suspended,
    }
    return ends.get(stage.state, signs.going)


def state_of(stage: StageStatus) -> str:
    """The stage's state, or that it waits for a person."""
    return "Stalled" if stage.stalled else str(stage.state)


def _style(stage: StageStatus) -> str:
    return "red" if stage.stalled else COLOURS.get(stage.state, "dim")


def _attempts(stages: Sequence[StageStatus]) -> list[str]:
    """How many each stage has had; nothing if none was repeated."""
    counts = [stage.attempt_count for stage in stages]
    return [str(count or "") if max(counts) > 1 else "" for count in counts]


def _model(view: Watched, stage: StageStatus) -> str:
    models = {one.name: one.model for one in view.plan.stages} if view.plan else {}
    return models.get(stage.name, "")


def _bar(stage: StageStatus, signs: Signs) -> Text:
    """A bar and the percent of the steps; empty for a stage that has taken none."""
    part = progress_of(stage)
    if part is None:
        return Text()
    full = int(part * BAR)
    rest = (signs.empty * (BAR - full), "dim")
    return Text.assemble((signs.full * full, _style(stage)), rest, f" {int(part * 100):3d}%")


def progress_of(stage: StageStatus) -> float | None:
    """The part of the stage's steps that are done, from 0 to 1; None if it has taken none."""
    if stage.state is State.SUCCEEDED:
        return 1.0
    at = stage.progress
    return None if at is None or not at.steps else min(1.0, at.step / at.steps)


def _left(progress: Progress | None) -> str:
    return "" if progress is None else _long(progress.eta_seconds)


def _accuracy(stage: StageStatus) -> str:
    """The first metric in percent. A name with a slash is a secondary metric."""
    return next((value for key, value in stage.results.items() if "/" not in key), "")


def _note(stage: StageStatus) -> str:
    """What else there is to say of a stage, in one line."""
    if stage.progress is not None:
        return f"{human(stage.progress.samples_per_second)} samples/s"
    if stage.state is not State.SUCCEEDED or stage.stalled:
        return stage.without_command
    ends = [f"{count} {failure}" for failure, count in stage.retried.items()]
    if stage.transition_seconds is not None:
        ends.append(f"hand-over {stage.transition_seconds:.1f} s")
    return ", ".join(ends)


# -- an attempt and its pods ----------------------------------------------------------------------


def _attempt(view: Watched, attempt: AttemptStatus, signs: Signs) -> Iterator[Text]:
    since = seconds_of(attempt.started_at) if attempt.started_at else attempt.queued_at
    parts = [attempt.name, attempt.runner or "", str(attempt.state)]
    parts += [] if since is None else [age(view.now - since)]
    if attempt.checkpoint_step:
        parts.append(f"checkpoint at step {attempt.checkpoint_step:,}")
    yield Text(signs.last + "  ".join(part for part in parts if part))
    shown = [_pod(pod, view.now) for pod in listed(attempt, view.pods)]
    rest = unlisted(attempt, view.pods)
    shown += [Text(f"{signs.more} and {rest}", "dim")] if rest else []
    for number, line in enumerate(shown, start=1):
        branch = signs.last if number == len(shown) else signs.branch
        yield Text(" " * len(signs.last) + branch).append(line)


def in_order(attempt: AttemptStatus, pods: Sequence[Object]) -> list[Object]:
    """The attempt's pods. Those that do not run come first, and then it goes by rank."""
    made = pods_made_by(attempt.uid, attempt, pods)
    runner = runner_for(attempt.runner)
    return sorted(made, key=lambda pod: (pod_state(pod) == RUNNING, runner.node_rank(pod) or 0))


def listed(attempt: AttemptStatus, pods: Sequence[Object]) -> list[Object]:
    """The pods that are shown by name."""
    return in_order(attempt, pods)[:MOST_PODS]


def unlisted(attempt: AttemptStatus, pods: Sequence[Object]) -> str:
    """How many other pods are in which state; empty if there are no others."""
    counts = Counter(pod_state(pod) for pod in in_order(attempt, pods)[MOST_PODS:])
    if len(counts) == 1:
        [(state, count)] = counts.items()
        return f"{count} more {state}"
    each = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    return f"{counts.total()} more: {each}" if counts else ""


RUNNING = "Running"


def pod_state(pod: Object) -> str:
    """The state of a pod in one word, as `kubectl get pods` would say it."""
    if is_deleting(pod):
        return "Terminating"
    ended, waits = state(pod, "terminated"), state(pod, "waiting")
    if ended is not None:
        return str(ended.get("reason") or ("Error" if ended.get("exitCode") else "Completed"))
    if waits is not None and waits.get("reason"):
        return str(waits["reason"])
    if state(pod, "running") is not None:
        return RUNNING
    scheduled = condition(pod, "PodScheduled") or {}
    if scheduled.get("status") == "False":
        return str(scheduled.get("reason") or "Unschedulable")
    return str(pod.get("status", {}).get("phase") or "Pending")


def _pod(pod: Object, now: float) -> Text:
    node = pod["spec"].get("nodeName")
    where = f"  node {node}" if node else ""
    text = Text(f"{name(pod)}  ")
    text.append(pod_state(pod), "cyan" if pod_state(pod) == RUNNING else "yellow")
    return text.append(f"{where}  {age(now - created_at(pod))}")


# -- what comes next ------------------------------------------------------------------------------


def _next(view: Watched) -> list[Text]:
    """The command to type next. It is folded and not cut: users copy it."""
    command = next_command(view)
    return [Text(), Text(f"next: {command}", overflow="fold")] if command else []


def next_command(view: Watched) -> str:
    """The command to type next, by the reason of the stage that stands for the chain."""
    meta, stage = view.chain["metadata"], view.current
    place = (meta["name"], meta["namespace"])
    stalled = true_condition(view.chain, "Stalled")
    if view.status.observed_generation != meta.get("generation"):
        return filled(EXPLAIN, *place)
    if stage is not None and not is_refused(view.chain):
        return stage.next
    return filled(command_of(known(str(stalled["reason"]))), *place) if stalled else ""


def _long(seconds: float) -> str:
    """A time with two units: 2h05m, 3d04h; 45s, 12m."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m" if minutes >= 2 else f"{max(0, int(seconds))}s"


def _clock(moment: float, now: float) -> str:
    """The time of day at which that is here, and the day if it is another one."""
    then, today = (datetime.fromtimestamp(one).astimezone() for one in (moment, now))
    return f"{then:%H:%M}" if then.date() == today.date() else f"{then:%Y-%m-%d %H:%M}"
