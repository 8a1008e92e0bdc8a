"""Two operators on the same chains: what one of them does twice, late or on old news does no harm.

`MODELCHAIN_SWEEPS=all pytest tests/cluster/test_two_operators.py` holds back every write; without
it a few are held, by a seed that is printed and may be given as SEED.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import sweeps
from apiclient import Json
from controlplane import ControlPlane
from faults import Hold, Match, Request, nth_write, request, stale
from trial import SHARED, STORIES, Bench, Story, Trial

SAMPLED = 3
AT_ONCE = 8
TAKEN_OVER = 30.0  # seconds


def _thirty_seconds(trial: Trial) -> None:
    end = time.monotonic() + 30
    trial.until(lambda chain: time.monotonic() > end, "30 s")


def _stage_over(trial: Trial) -> None:
    before = _done(trial.chain())
    trial.until(lambda chain: _done(chain) > before or trial.completed(chain), "end of its stage")


def _chain_over(trial: Trial) -> None:
    trial.until(trial.completed, "completion")


def _done(chain: Json) -> int:
    return sum(stage["state"] == "Succeeded" for stage in chain.get("status", {}).get("stages", []))


UNTIL: dict[str, Callable[[Trial], None]] = {
    "for 30 s": _thirty_seconds,
    "until its stage is over": _stage_over,
    "until the chain is over": _chain_over,
}


def _job_made(request: Request) -> str:
    """The name of the job that a request makes; empty if it makes none."""
    made = request.verb == "create" and request.resource == "pytorchjobs"
    return str(json.loads(request.body)["metadata"]["name"]) if made else ""


class Point(NamedTuple):
    story: str
    write: int
    until: str

    def __str__(self) -> str:
        return f"{self.story}, write {self.write} held {self.until}"


@pytest.mark.timeout(7200)
def test_a_write_that_comes_late(
    control_plane: ControlPlane, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first operator's write is held, the second goes on, and then the write is let through."""
    start = time.monotonic()
    with Bench(control_plane, tmp_path) as bench:
        writes: dict[str, int] = {}

        def together(story: Story) -> str:
            with bench.trial(story) as trial:
                trial.operator()
                trial.operator()
                trial.apply()
                trial.finish()
                conflicts = sum(r.status == 409 for r in trial.proxy.writes())
                writes[story.name] = len(trial.proxy.writes()) - conflicts
            return f"{writes[story.name]} writes by two, and {conflicts} conflicts"

        def hold_back(point: Point) -> str:
            hold = Hold()
            with bench.trial(STORIES[point.story]) as trial:
                trial.proxy.on(nth_write(point.write), hold)
                trial.operator()
                trial.apply()
                trial.until(lambda chain: hold.held or trial.completed(chain), "held write")
                trial.operator()
                UNTIL[point.until](trial)
                bench.recorder.history.late |= set(map(_job_made, hold.held))
                hold.release()
                trial.until(
                    lambda chain: all(r.status for r in hold.held), "answer to the held write"
                )
                trial.finish(late=hold.held)
            return str(hold.held[0]) if hold.held else "no such write this time"

        stories = sweeps.sample("stories of two operators", [*STORIES.values()], 1)
        lines = bench.each(together, stories)
        points = [
            Point(name, k, until)
            for name in writes
            for k in range(1, writes[name] + 1)
            for until in UNTIL
        ]
        chosen = sweeps.sample("writes held back", points, SAMPLED)
        lines += bench.each(hold_back, chosen, AT_ONCE)
    with capsys.disabled():
        title = f"{len(chosen)} of {len(points)} points, {time.monotonic() - start:.0f} s"
        print(f"\n{title}", *lines, sep="\n")


OLD: dict[str, Match] = {
    "chains": lambda r: r.resource == "modelchains",
    "lists": lambda r: r.verb == "list",
    "everything": lambda r: True,
}


class OldNews(NamedTuple):
    story: str
    what: str


@pytest.mark.timeout(900)
def test_one_of_them_reads_old_news(control_plane: ControlPlane, tmp_path: Path) -> None:
    """What the first operator reads is up to three versions old, for as long as the chain takes."""
    with Bench(control_plane, tmp_path) as bench:

        def old_news(case: OldNews) -> str:
            dice = random.Random(1)

            def old(r: Request) -> bool:
                return (
                    r.client == "operator-0"
                    and r.kind == "read"
                    and OLD[case.what](r)
                    and dice.random() < 0.4
                )

            with bench.trial(STORIES[case.story]) as trial:
                for versions in (1, 2, 3):
                    trial.proxy.on(old, stale(versions), times=None)
                trial.operator()
                trial.operator()
                trial.apply()
                trial.finish()
            return "complete"

        everything = [OldNews(story, what) for what in OLD for story in STORIES]
        cases = sweeps.sample("old news", everything, 2)
        print(*bench.each(old_news, cases, len(cases)), sep="\n")


@pytest.mark.timeout(600)
def test_the_other_takes_over(control_plane: ControlPlane, tmp_path: Path) -> None:
    """Leader election as shipped: of a leader that is killed, and of one that sleeps and wakes up
    much later.
    """
    with Bench(control_plane, tmp_path) as bench:

        def take_over(fate: signal.Signals) -> str:
            with bench.trial(SHARED) as trial:
                first = trial.operator(leader_election=True)
                trial.apply()
                trial.until(lambda chain: trial.made()["pytorchjobs"], "first job")
                trial.operator(leader_election=True)
                waits = request("get", "leases", client="operator-1")
                trial.until(
                    lambda chain: any(waits(r) for r in trial.proxy.log), "a second operator"
                )
                assert first.process is not None and first.process.pid is not None
                os.kill(first.process.pid, fate)
                trial.operators.remove(first)  # nothing starts it again
                start = time.monotonic()
                theirs = [r for r in trial.proxy.writes() if r.client == "operator-1"]
                assert not theirs, f"written without leading: {theirs[0]}"
                trial.until(
                    lambda chain: trial.proxy.writes()[-1].client == "operator-1",
                    "take-over",
                    TAKEN_OVER,
                )
                seconds = time.monotonic() - start
                trial.until(lambda chain: _done(chain) > 1, "progress")
                if fate == signal.SIGSTOP:
                    os.kill(first.process.pid, signal.SIGCONT)
                trial.finish()
                first.kill()
            return f"taken over after {seconds:.0f} s"

        fates = sweeps.sample("fates of a leader", [signal.SIGKILL, signal.SIGSTOP], 1)
        print(*bench.each(take_over, fates), sep="\n")
