"""The operator dies at every write it makes, and is started again: the chain completes, and nothing
is done twice.

`MODELCHAIN_SWEEPS=all pytest tests/cluster/test_crashes.py` tries every write of both stories in
every way; without it a few are tried, by a seed that is printed and may be given as SEED.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import sweeps
from controlplane import ControlPlane
from faults import Action, kill, nth_write, reset
from trial import STORIES, Bench, Story, Trial

Way = Literal["killed before it is sent", "killed before its answer", "its answer is lost"]
WAYS: tuple[Way, ...] = Way.__args__  # type: ignore[attr-defined]
SAMPLED = 4


class Point(NamedTuple):
    story: str
    write: int
    way: Way

    def __str__(self) -> str:
        return f"{self.story}, write {self.write}, {self.way}"


@pytest.mark.timeout(3600)
def test_every_write(
    control_plane: ControlPlane, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    with Bench(control_plane, tmp_path) as bench:
        writes: dict[str, int] = {}

        def undisturbed(story: Story) -> str:
            with bench.trial(story) as trial:
                trial.operator()
                trial.apply()
                trial.finish()
                writes[story.name] = len(trial.proxy.writes())
            return f"{writes[story.name]} writes"

        def crash(point: Point) -> str:
            with bench.trial(STORIES[point.story]) as trial:
                rule = trial.proxy.on(nth_write(point.write), _action(trial, point.way))
                trial.operator()
                trial.apply()
                trial.finish()
                hit = next((str(r) for r in trial.proxy.writes() if r.write == point.write), "")
            return hit if rule.hits else f"no such write, {len(trial.proxy.writes())} this time"

        stories = sweeps.sample("stories of crashes", [*STORIES.values()], 1)
        lines = bench.each(undisturbed, stories)
        points = [
            Point(name, k, way)
            for name, count in writes.items()
            for k in range(1, count + 1)
            for way in WAYS
        ]
        chosen = sweeps.sample("crashes", points, SAMPLED)
        lines += bench.each(crash, chosen)
    with capsys.disabled():
        title = f"{len(chosen)} of {len(points)} points, {time.monotonic() - start:.0f} s"
        print(f"\n{title}", *lines, sep="\n")


def _action(trial: Trial, way: Way) -> Action:
    if way == "its answer is lost":
        return reset(commit=True)
    return kill(trial, "send" if way == "killed before it is sent" else "commit")
