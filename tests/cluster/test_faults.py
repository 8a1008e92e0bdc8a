"""Every kind of request the operator makes meets every fault, a few times each: the chain completes
soon after.

`MODELCHAIN_SWEEPS=all pytest tests/cluster/test_faults.py` tries all of them; without it a few are
tried, by a seed that is printed and may be given as SEED. Kinds are those that an undisturbed run
was seen to make.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import sweeps
from controlplane import ControlPlane
from faults import Action, Answer, Exchange, Match, Request, answer, failure, reset, stall
from trial import STORIES, WITHIN, Bench, Story, Trial

SAMPLED = 6
AT_ONCE = 12  # mostly they wait
TIMES = 5  # requests that meet the fault


def committed(status: int) -> Action:
    """Done, and answered as if it had not been."""

    async def act(exchange: Exchange) -> Answer:
        await exchange.forward()
        return failure(status, "by the fault proxy")

    return act


ANY: dict[str, Action] = {
    "409": answer(409),
    "429, Retry-After 1": answer(429, retry_after=1),
    "500": answer(500),
    "reset": reset(),
    "stall": stall(30),
}
READ = ANY | {"410": answer(410)}
WRITE = ANY | {"reset after commit": reset(commit=True), "500 after commit": committed(500)}

Watching = Callable[[Trial, str], None]


def _silent(trial: Trial, resource: str) -> None:
    for watch in trial.proxy.open_watches(resource):
        watch.silence()


def _dropped(trial: Trial, resource: str) -> None:
    kind = {
        "pytorchjobs": "PyTorchJob",
        "modelchains": "ModelChain",
        "stageartifacts": "StageArtifact",
    }
    wanted = kind.get(resource, resource.removesuffix("s").capitalize())
    trial.proxy.drop_event = lambda _, found: found.get("kind") == wanted
    time.sleep(20)
    trial.proxy.drop_event = None


def _late(trial: Trial, resource: str) -> None:
    trial.proxy.watch_lag = 10
    time.sleep(20)
    trial.proxy.watch_lag = 0


def _repeatedly(what: str) -> Watching:
    def act(trial: Trial, resource: str) -> None:
        for _ in range(TIMES):
            for watch in trial.proxy.open_watches(resource):
                getattr(watch, what)()
            time.sleep(1)

    return act


STREAM: dict[str, Watching] = {
    "silent": _silent,
    "events lost": _dropped,
    "events late": _late,
    "410 in stream": _repeatedly("expire"),
    "closed": _repeatedly("cut"),
}


class Point(NamedTuple):
    story: str
    verb: str
    what: str  # a resource, with its subresource, or a path
    fault: str

    def __str__(self) -> str:
        return f"{self.verb} {self.what}: {self.fault} ({self.story})"


@pytest.mark.timeout(7200)
def test_every_request(
    control_plane: ControlPlane, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    with Bench(control_plane, tmp_path) as bench:
        kinds: dict[tuple[str, str], str] = {}

        def undisturbed(story: Story) -> str:
            with bench.trial(story) as trial:
                trial.operator()
                trial.apply()
                trial.finish()
                mine = {(r.verb, _what(r)) for r in trial.proxy.log}
                for kind in mine:
                    kinds.setdefault(kind, story.name)
            return f"{len(mine)} kinds of request"

        stories = sweeps.sample("stories of faults", [*STORIES.values()], 1)
        lines = bench.each(undisturbed, stories, at_once=1)
        points = [
            Point(story, *kind, fault)
            for kind, story in sorted(kinds.items())
            for fault in _faults(kind[0])
        ]
        chosen = sweeps.sample("faults", points, SAMPLED)
        lines += bench.each(lambda point: _try(bench, point), chosen, AT_ONCE)
    with capsys.disabled():
        title = f"{len(chosen)} of {len(points)} points, {time.monotonic() - start:.0f} s"
        print(f"\n{title}", *lines, sep="\n")


def _faults(verb: str) -> list[str]:
    if verb == "watch":
        return [*READ, *STREAM]
    return [*(READ if verb in ("get", "list") else WRITE)]


def _what(request: Request) -> str:
    return (
        "/".join(part for part in (request.resource, request.subresource) if part) or request.path
    )


def _matching(point: Point) -> Match:
    return lambda request: (request.verb, _what(request)) == (point.verb, point.what)


def _try(bench: Bench, point: Point) -> str:
    with bench.trial(STORIES[point.story]) as trial:
        if point.fault in STREAM:
            trial.operator()
            trial.apply()
            trial.until(lambda chain: trial.made()["pytorchjobs"], "first job")
            STREAM[point.fault](trial, point.what)
            hits = 1
        else:
            times = 2 if point.fault == "stall" else TIMES
            rule = trial.proxy.on(_matching(point), (READ | WRITE)[point.fault], times)
            trial.operator()
            trial.apply()
            trial.until(
                lambda chain: rule.hits == times or trial.completed(chain), "end of the faults", 300
            )
            hits = rule.hits
        last = time.monotonic()
        trial.finish(WITHIN + (30 if point.fault == "stall" else 0))
        return f"{hits} times, then {time.monotonic() - last:.0f} s"
