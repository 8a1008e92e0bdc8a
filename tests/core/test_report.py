"""`modelchain report`: what a chain's page shows, of chains of every kind and size."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from commandline import modelchain
from exploration import settle
from simulation import World
from test_baselines import world
from test_real_size import full_stage, largest

from modelchain.api.contracts import METRICS
from modelchain.api.spec import ModelChain
from modelchain.api.status import AttemptStatus, ChainStatus, StageStatus, State
from modelchain.cli import report as command
from modelchain.io.page import page
from modelchain.local.journals import POINTS, stage_files
from modelchain.local.root import Root
from modelchain.plan.plan import plan
from modelchain.report.model import (
    Curve,
    Known,
    Report,
    family_cells,
    report_of,
    scientific,
    times,
)

DAY = 86_400


def report(chain: World, known: dict[str, Known] | None = None) -> Report:
    planned = plan(chain.chain(), "analytic", {}, chain.status.epochs)
    return report_of(chain.chain(), chain.status, planned, known or {}, chain.now)


def column(of: Report, name: str) -> list[str]:
    """The cells of the stages, without that of their sum."""
    return [row[list(of.family.columns).index(name)] for row in of.family.rows[:-1]]


class Page(HTMLParser):
    """The tables of a page by their cells, and everything that a browser would load."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        names = ("src", "href", "xlink:href", "srcset", "data")
        self.loads += [value or "" for name, value in attributes if name in names]

    def handle_data(self, text: str) -> None:
        self.texts.append(text)


def test_the_family_cells_a_finished_chain() -> None:
    chain = settle(world(), 200)
    shown = report(chain)
    stages = chain.status.stages
    planned = plan(chain.chain(), "analytic", {}, chain.status.epochs)
    assert column(shown, "model") == ["a", "b", "c"]
    assert column(shown, "top1, %") == ["60.00", "59.80", "59.80"]
    assert column(shown, "alone, %") == ["", "60.00", "60.00"]
    assert column(shown, "difference") == ["", "-0.20", "-0.20"]
    assert column(shown, "gate") == ["Ungated", "Passed", "Passed"]
    assert column(shown, "MACs") == [scientific(stage.macs) for stage in stages]
    alone = [stage.individual.macs for stage in planned.stages]
    assert column(shown, "times less") == [
        f"{macs / stage.macs:.2f}" for macs, stage in zip(alone, stages, strict=True)
    ]
    together = dict(zip(shown.family.columns, shown.family.rows[-1], strict=True))
    spent = sum(stage.macs for stage in stages)
    assert together["MACs"] == scientific(spent)
    assert together["times less"] == f"{sum(alone) / spent:.2f}"
    assert times(sum(alone), spent) in shown.summary[1]


def test_what_models_trained_alone_have_cost() -> None:
    """Only where they were trained here: a baseline that was given has cost nothing."""
    chain = settle(world(**{"spec.gate.train": ("b",), "spec.gate.baseline.c": "60"}), 200)
    assert "alone: GPU hours" not in report(chain).family.columns, "a laptop has no prices"
    [row] = chain.status.baselines
    spent = row.model_copy(update={"gpu_seconds": 5400.0, "cost": "3.60"})
    chain.status = chain.status.model_copy(update={"baselines": [spent]})
    shown = report(chain)
    assert column(shown, "alone: GPU hours") == ["", "1.5", ""]
    assert column(shown, "alone: cost") == ["", "3.60", ""]
    assert shown.family == family_cells(chain.chain(), chain.status)


def test_the_points_are_at_the_macs_of_all_models_so_far() -> None:
    chain = settle(world(), 200)
    shown = report(chain)
    a, b, c = (stage.macs for stage in chain.status.stages)
    assert [point.macs for point in shown.together] == [a, a + b, a + b + c]
    planned = plan(chain.chain(), "analytic", {}, chain.status.epochs).stages
    first, second, third = (stage.individual.macs for stage in planned)
    assert [(p.stage, p.macs, p.accuracy) for p in shown.alone[1:]] == [
        ("b", first + second, 60.0),
        ("c", first + second + third, 60.0),
    ]


def test_a_chain_at_any_moment_has_a_report() -> None:
    chain = world()
    seen = set()
    for _ in range(60):
        chain.calm_step()
        if chain.status.stages and (shown := report(chain)).reasons:
            seen.add(shown.reasons[-1])
    assert len(seen) > 2
    assert "<h1>family</h1>" in page(shown, chain.now)


def test_an_attempt_that_is_open_ends_now() -> None:
    stage = StageStatus(
        name="a",
        state=State.RUNNING,
        attempts=[
            AttemptStatus(
                name="family-a-a1",
                number=1,
                input_digest="0" * 64,
                state=State.RUNNING,
                started_at="2026-11-30T00:00:00Z",
            )
        ],
    )
    chain = world()
    chain.status = ChainStatus(stages=[stage, *chain.status.stages[1:]])
    planned = plan(chain.chain(), "analytic", {})
    now = 1_796_000_000.0
    [span] = report_of(chain.chain(), chain.status, planned, {}, now).time_line
    assert (span.row, span.end) == ("a", now)
    assert span.start == pytest.approx(1_795_996_800.0, abs=30 * DAY)


def test_the_largest_chain_fits_into_a_page() -> None:
    """32 stages with MACs of 1e21 and long curves: below 1 MB, and nothing is loaded."""
    chain = ModelChain.model_validate(largest())
    many = {"macs": 10**21, "gpu_seconds": 9e8, "cost": "123456.78", "state": State.SUCCEEDED}
    stages = [full_stage(n, 256).model_copy(update=many) for n in range(32)]
    steps = [(step, 10 / (1 + step)) for step in range(POINTS)]
    known = {stage.name: Known(Curve(steps, steps)) for stage in stages}
    planned = plan(chain, "analytic", {})
    shown = report_of(chain, ChainStatus(stages=stages), planned, known, 1.8e9)
    text = page(shown, 1.8e9)
    assert len(text.encode()) < 1_000_000
    read = Page(text)
    assert [target for target in read.loads if not target.startswith("#")] == []
    assert not read.tags & {"script", "link", "img", "iframe", "object"}
    assert "url(http" not in text and "@import" not in text
    assert "1.00e21" in text and "3.20e22" in text
    assert "250,000.0" in text and "3950616.96" in text


def test_ids_are_those_of_one_drawing() -> None:
    """A drawing that refers to a part of another one would be wrong."""
    chain = settle(world(), 200)
    steps = [(step, 1.0) for step in range(9)]
    text = page(report(chain, {"a": Known(Curve(steps, steps))}), chain.now)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        used = re.findall(r'(?:url\(#|href="#)([^")]+)', drawing)
        assert used and all(f'id="{name}"' in drawing for name in used)
        others = "".join(other for other in drawings if other is not drawing)
        assert not [name for name in used if f'id="{name}"' in others]


def test_what_others_said_is_only_text() -> None:
    chain = settle(world(), 200)
    said = "<script>alert(1)</script>"
    stages = [stage.changed(reason=said, stalled=True) for stage in chain.status.stages]
    chain.status = chain.status.model_copy(update={"stages": stages})
    read = Page(page(report(chain), chain.now))
    assert "script" not in read.tags
    assert said in "".join(read.texts)


def journal(folder: Path, *entries: object) -> None:
    folder.mkdir(parents=True)
    lines = [e if isinstance(e, str) else json.dumps(e) for e in entries]
    (folder / METRICS).write_text("\n".join(lines))


def step(number: int, loss: float | None, ratio: float | None = None) -> dict[str, object]:
    return {"event": "step", "step": number, "loss": loss, "ratio": ratio}


def of_one(root: Path) -> Curve:
    stage = StageStatus(name="a", input_digest="d")
    return stage_files(root, ChainStatus(stages=[stage]))["a"].curve


def test_an_attempt_that_resumed_has_the_last_word(tmp_path: Path) -> None:
    journal(tmp_path / "d" / "local-a1", step(1, 4.0), step(2, 3.0), step(3, 9.0))
    journal(tmp_path / "d" / "local-a10", step(4, 1.0, 0.5))
    journal(tmp_path / "d" / "local-a2", step(3, 2.0), step(4, 8.0, 7.0))
    curve = of_one(tmp_path)
    assert curve.losses == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    assert curve.ratios == [(4, 0.5)]


def test_a_journal_that_was_cut_or_skipped(tmp_path: Path) -> None:
    cut = '{"event": "step", "step": 4, "lo'
    journal(
        tmp_path / "d" / "local-a1", {"event": "growth"}, step(1, 4.0), step(2, None), "[]", cut
    )
    assert of_one(tmp_path).losses == [(1, 4.0)]


def test_a_long_training_is_thinned(tmp_path: Path) -> None:
    journal(tmp_path / "d" / "local-a1", *(step(n, 1 / n, 0.1) for n in range(1, 100_001)))
    curve = of_one(tmp_path)
    assert POINTS / 2 < len(curve.losses) <= POINTS
    assert curve.losses[0] == (1, 1.0) and curve.losses[-1][0] > 99_000


def stored(chain: World, root: Path) -> Path:
    root.mkdir()
    Root(root).write_status(chain.chain(), chain.status)
    return root


def test_the_command_writes_the_page_and_names_it(tmp_path: Path) -> None:
    root = stored(settle(world(cluster=False), 200), tmp_path / "root")
    done = modelchain("report", "--root", str(root), "-o", "family.html", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "report: family.html\n"), done.stderr
    assert "<h1>family</h1>" in (tmp_path / "family.html").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name one chain"),
        (["--root", "nowhere"], "holds no chain"),
        (["--root", "root", "-n", "lab"], "a local root has no namespace"),
        (["--root", "root", "-o", "no/such/folder.html"], "no/such/folder.html: cannot be written"),
    ],
)
def test_the_wrong_words(words: list[str], told: str, tmp_path: Path) -> None:
    stored(settle(world(cluster=False), 200), tmp_path / "root")
    done = modelchain("report", *words, folder=tmp_path)
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.glob("*.html")) == []


def test_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(command, "import_module", absent)
    root = stored(settle(world(cluster=False), 200), tmp_path / "root")
    done = modelchain("report", "--root", str(root), folder=tmp_path)
    assert done.returncode == 2 and "pip install 'modelchain[report]'" in done.stderr
