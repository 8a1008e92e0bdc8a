"""What a chain will have taken, and what is saved: `gate/outlook.py` and `modelchain cost`."""

from __future__ import annotations

import csv
import io
import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
from commandline import modelchain
from exploration import settle
from hypothesis import given
from hypothesis import strategies as st
from simulation import World
from test_baselines import world

from modelchain.api.status import (
    AttemptStatus,
    ChainStatus,
    Planned,
    Spent,
    StageLedger,
    StageStatus,
    State,
    Total,
)
from modelchain.api.uses import Uses
from modelchain.gate.outlook import Taken, added, less, outlooks, with_removed
from modelchain.local.root import Root
from modelchain.plan.plan import plan

HOUR = 3_600_000
FAMILY = {"a": 10**18, "b": 4 * 10**18, "c": 10**19}
PLANNED = {
    name: (Planned(macs=macs, gpu_seconds=macs / 1e13), Planned(macs=3 * macs))
    for name, macs in FAMILY.items()
}


def ledger(macs: int, hours: int, cost: str, lost: int = 0) -> Spent:
    uses = Uses(productive=(hours - lost) * HOUR, lost=lost * HOUR)
    return Spent(macs=macs, gpu_seconds=hours * 3600.0, gpu_milliseconds=uses, cost=cost)


def stage(name: str, state: State, spent: Spent | None = None, **fields: object) -> StageStatus:
    """A stage of which all was spent at its present inputs."""
    made = StageStatus.model_validate({"name": name, "state": state})
    if spent is None:
        return made
    shown = {key: value for key, value in spent if key != "seconds"}
    return made.model_copy(update={**shown, "spent": spent, "trained": spent, **fields})


def lab() -> ChainStatus:
    """a has finished at 100 PMACs a GPU hour, half of b is done at 80, and c has not begun."""
    a = stage("a", State.SUCCEEDED, ledger(10**18, 10, "20"))
    b = stage("b", State.RUNNING, ledger(2 * 10**18, 25, "50"))
    total = Total(gpu_seconds=35 * 3600.0, gpu_milliseconds=Uses(productive=35 * HOUR), cost="70")
    return ChainStatus(stages=[a, b, stage("c", State.PENDING)], total=total, currency="USD")


def hours(of: Taken) -> float | None:
    return None if of.gpu_seconds is None else float(of.gpu_seconds) / 3600


def test_by_hand() -> None:
    a, b, c = outlooks(lab(), PLANNED)
    assert a.projected == a.spent == Taken(10**18, Decimal(36_000), Decimal(20))
    # b goes on at its own rate: as much again.
    assert (b.projected.macs, hours(b.projected)) == (4 * 10**18, pytest.approx(50))
    assert b.projected.cost == pytest.approx(Decimal(100))
    # c has no rate: its plan is 277.8 hours, and b took 0.45 of what was planned for it.
    assert hours(c.projected) == pytest.approx(10**19 / 1e13 / 3600 * (25 / (2e18 / 1e13 / 3600)))
    # Alone, each takes three times the MACs, at the rate of the chain's stage.
    assert (hours(a.alone), hours(b.alone)) == (pytest.approx(30), pytest.approx(150))
    assert b.saved.cost == pytest.approx(Decimal(200))
    assert all(one.estimated for one in (a, b, c))


def test_the_sum_of_what_was_spent_is_known_before_the_last_stage_has_begun() -> None:
    """A stage that has held no GPU has cost nothing; without prices, its cost is not known."""
    found = outlooks(lab(), PLANNED)
    assert added([one.spent for one in found]).cost == Decimal(70)
    free = ChainStatus(stages=[stage(name, State.PENDING) for name in FAMILY])
    assert outlooks(free, PLANNED)[0].spent.cost is None


def test_a_baseline_that_was_trained_is_exact() -> None:
    row = stage("b", State.SUCCEEDED, ledger(12 * 10**18, 160, "320"))
    b = outlooks(lab().model_copy(update={"baselines": [row]}), PLANNED)[1]
    assert (b.alone, b.estimated) == (Taken(12 * 10**18, Decimal(576_000), Decimal(320)), False)
    row = stage("b", State.RUNNING, ledger(10**18, 16, "32"))
    assert outlooks(lab().model_copy(update={"baselines": [row]}), PLANNED)[1].estimated


def test_a_baseline_of_another_chain_does_not_look_free() -> None:
    """It costs this chain nothing, so its ledger does not say what the model takes alone."""
    row = StageStatus(name="b", state=State.SUCCEEDED, cache="Hit")
    b = outlooks(lab().model_copy(update={"baselines": [row]}), PLANNED)[1]
    assert b.estimated and hours(b.alone) == pytest.approx(150)


def test_what_was_lost_is_no_rate() -> None:
    """Ten of the hours were lost, with their MACs: what is left goes on as the rest did."""
    status = lab()
    lost = ledger(3 * 10**18, 35, "70", lost=10).model_copy(update={"lost_macs": 10**18})
    status.stages[1] = stage("b", State.RUNNING, lost, lost_macs=10**18)
    b = outlooks(status, PLANNED)[1]
    assert (b.projected.macs, hours(b.projected)) == (5 * 10**18, pytest.approx(60))


def test_without_prices_or_hours_only_macs_are_known() -> None:
    status = ChainStatus(stages=[stage(name, State.PENDING) for name in FAMILY])
    planned = {n: (Planned(macs=m), Planned(macs=3 * m)) for n, m in FAMILY.items()}
    for one, macs in zip(outlooks(status, planned), FAMILY.values(), strict=True):
        assert (one.projected.macs, one.alone.macs, one.saved.macs) == (macs, 3 * macs, 2 * macs)
        assert one.projected.gpu_seconds is one.alone.gpu_seconds is one.saved.cost is None


amounts = st.builds(
    Taken,
    st.integers(0, 10**24),
    st.decimals(0, 10**12, places=3),
    st.decimals(0, 10**12, places=12),
)


@given(st.lists(amounts, max_size=32))
def test_sums_are_exact(parts: list[Taken]) -> None:
    total = added(parts)
    assert total.macs == sum(part.macs or 0 for part in parts)
    for part in parts:
        total = less(total, part)
    assert (total.macs, total.gpu_seconds, total.cost) == (0, 0, 0)


def test_what_is_not_known_of_one_is_not_known_of_all() -> None:
    assert added([Taken(1, Decimal(1), None), Taken(1, None, Decimal(1))]) == Taken(2, None, None)


def stored(chain: World, root: Path) -> None:
    root.mkdir()
    Root(root).write_status(chain.chain(), chain.status)


def on_gpus(folder: Path) -> None:
    """The root of a chain that has spent GPU time and money, with a removed stage."""
    chain = settle(world(cluster=False), 200)
    spent = ledger(10**18, 10, "20.125")
    rows = [stage(s.name, s.state, spent, epochs=s.epochs) for s in chain.status.stages]
    attempt = AttemptStatus(name="family-a-a1", number=1, input_digest="0", state=State.SUCCEEDED)
    rows[0] = rows[0].changed(attempts=[attempt.changed(gpu_seconds=36000.0, cost="20.125")])
    gone = StageLedger(name="old").changed(spent=spent, gpu_seconds=36000.0, cost="20.125")
    gone = gone.changed(gpu_milliseconds=spent.gpu_milliseconds)
    total = Total(gpu_seconds=4 * 36000.0, cost="80.5", gpu_milliseconds=Uses(productive=40 * HOUR))
    update = {"stages": rows, "removed": [gone], "total": total, "currency": "EUR"}
    chain.status = chain.status.model_copy(update=update)
    stored(chain, folder / "root")


def test_tables(tmp_path: Path) -> None:
    on_gpus(tmp_path)
    done = modelchain("cost", "--root", "root", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for title in ("family, EUR", "family, GPU hours", "family, MACs", "GPU hours by use"):
        assert title in done.stdout
    assert "old (removed)" in done.stdout and "  family-a-a1" in done.stdout
    assert "60.38" in done.stdout and "~ estimated" in done.stdout
    assert re.search(r"b +Succeeded +20\.13 +20\.13", done.stdout), "a half is always rounded up"


def test_the_page_has_the_tables(tmp_path: Path) -> None:
    on_gpus(tmp_path)
    done = modelchain("report", "--root", "root", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.html").read_text()
    for title in ("family, EUR", "family, GPU hours", "GPU hours by use"):
        assert f"<h2>{title}</h2>" in text
    assert "old (removed)" in text and "family, MACs" not in text


def test_a_document_and_its_lines_say_the_same(tmp_path: Path) -> None:
    on_gpus(tmp_path)
    told = json.loads(modelchain("cost", "--root", "root", "-o", "json", folder=tmp_path).stdout)
    assert told["currency"] == "EUR"
    assert told["total"]["spent"] == {
        "macs": 3 * 10**18,
        "gpuSeconds": 108000.0,
        "cost": "60.38",
    }
    printed = modelchain("cost", "--root", "root", "-o", "csv", folder=tmp_path).stdout
    lines = list(csv.DictReader(io.StringIO(printed)))
    assert [line["name"] for line in lines] == [one["name"] for one in told["ledgers"]]
    assert lines[0]["cost"] == "20.125" and lines[0]["productiveMilliseconds"] == "36000000"
    assert lines[0]["spentMacs"] == str(10**18) and lines[1]["spentMacs"] == ""


def test_on_a_cpu_there_are_only_macs(tmp_path: Path) -> None:
    stored(settle(world(cluster=False), 200), tmp_path / "root")
    done = modelchain("cost", "--root", "root", folder=tmp_path)
    assert done.returncode == 0 and "MACs" in done.stdout
    assert "GPU hours" not in done.stdout and "~" not in done.stdout


def test_what_removed_stages_have_spent_is_part_of_the_sum() -> None:
    """A renamed stage has spent under its old name, and saves nothing by that."""
    spent = Total(macs=7 * 10**18, gpu_seconds=3600.0, gpu_milliseconds=Uses(productive=3_600_000))
    gone = StageLedger(name="b", **dict(spent) | {"cost": "2.50"})
    status = ChainStatus(currency="USD", removed=[gone], total=spent)
    (removed,) = with_removed([], status)
    assert removed.state is None and removed.spent == removed.projected
    assert (removed.spent.macs, removed.saved.macs) == (7 * 10**18, -7 * 10**18)
    assert removed.spent.cost == Decimal("2.50")
    assert with_removed([], ChainStatus()) == []


def test_stages_that_were_never_launched_have_a_plan() -> None:
    """So the plans of all stages sum up to the plan of the chain, in each unit that is known."""
    chain = World(3, cluster=True)
    chain.calm_step()
    stages = chain.status.stages
    planned = plan(chain.chain(), "analytic", {})
    assert [s.plan and s.plan.macs for s in stages] == [s.macs for s in planned.stages]
    assert [s.alone and s.alone.macs for s in stages] == [s.individual.macs for s in planned.stages]
    chain.edit(**{"spec.stages[2].epochs": 5})
    chain.calm_step()
    shorter = plan(chain.chain(), "analytic", {}).stages[2].macs
    assert chain.status.stages[2].plan == Planned(macs=shorter), "it is the plan of now"
