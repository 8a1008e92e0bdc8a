"""Every query of every panel, asked of a real Prometheus that holds a simulated day.

The expected numbers are computed by hand, from the hours, GPUs and prices of the simulated day.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from boards import NAMES, documented_labels, panels, queries
from recorded_day import Server, served
from simulated_day import BEGIN, scrape

Expected = dict[tuple[str, ...], float]  # by the values of the answer's labels, sorted by name


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, promtool: Path, prometheus_server: Path
) -> Iterator[Server]:
    """Filled once. It needs both programs, whose fixtures skip where they are missing."""
    with served(tmp_path_factory.mktemp("day")) as running:
        yield running


def query(name: str, title: str, ref: str) -> dict[str, Any]:
    (found,) = (t for panel, t in queries(name) if (panel, t["refId"]) == (title, ref))
    return found


def last(found: list[dict[str, Any]]) -> Expected:
    """The last value of each series."""
    return {
        tuple(value for key, value in sorted(series["metric"].items()) if key != "__name__"): float(
            (series["values"][-1] if "values" in series else series["value"])[1]
        )
        for series in found
    }


@pytest.mark.parametrize("name", NAMES)
def test_every_query_has_an_answer(name: str, server: Server) -> None:
    empty = [
        (panel["title"], target["refId"])
        for panel in panels(name)
        for target in panel["targets"]
        if not server.query(target)
    ]
    assert not empty


# A GPU hour costs 3.75 on an A100, and 6 on an H100.
# vit: 64 A100 for 3 h, 6 h and 6 h so far: 720 + 1440 + 1440, and 8 h for a model alone: 1920.
# swin: 32 for 4 h and 7.95 h: 480 + 954. clip: 16 H100 for 3 h: 288, and a stage that an earlier
# chain has trained in 16 GPU h: 96.
SPENT = {"clip": 384.0, "swin": 1434.0, "vit": 5520.0}
PLANNED = {"clip": 16 * 6 + 160 * 6.0, "swin": 376 * 3.75, "vit": 2590 * 3.75}
OF_STAGES = {"clip": 16 * 6 + 192 * 6.0, "swin": 1434.0, "vit": (192 + 384 + 768 + 1280) * 3.75}
# With the model alone, which the budget counts too.
PROJECTED = OF_STAGES | {"vit": OF_STAGES["vit"] + 64 * 8 * 3.75}
ALONE = {"clip": 96.0 + 2400, "swin": 480.0 + 2400, "vit": 720.0 + 1920 + 9000 + 18000}
GPU_HOURS = 64 * (15 + 8) + 32 * 11.95 + 16 * 3 + 16
# Startups take 6 minutes. vit: five with 64 GPUs; swin: three with 32; clip: three with 16, and
# 1.6 GPU h of the stage that was found. Lost: 15 minutes of vit-s, an hour of clip-b. Stalled: 15
# minutes of swin-s.
STARTUP = 0.1 * (5 * 64 + 3 * 32 + 3 * 16) + 1.6
LOST = 0.25 * 64 + 1.0 * 16
STALLED = 0.25 * 32
# Of the stages: vit-t, vit-s with what was lost, half of vit-b; swin; clip-s, a fifth of clip-b and
# what was lost. The model alone took another 1.2e20.
MACS = 1.6e19 + 6.2e19 + 8e19 + 2.4e19 + 2e18 + 3e18
ALONE_MACS = (1.6e19 + 1.2e20 + 4.8e20 + 1e21) + (8e18 + 4.8e19) + (2e18 + 3e19)
PROJECTED_MACS = (1.6e19 + 6.2e19 + 1.6e20 + 2.4e20) + 2.4e19 + (2e18 + 1.1e19)


def by_chain(amounts: dict[str, float]) -> Expected:
    spaces = {"clip": "team-b", "swin": "vision", "vit": "vision"}
    return {(chain, spaces[chain]): amount for chain, amount in amounts.items()}


ANSWERS: dict[tuple[str, str, str], Expected] = {
    ("family", "Spent", "A"): {(): 7338},
    ("family", "Projected", "A"): {(): 12522 + 1920},
    ("family", "Planned", "A"): {(): 12178.5},
    ("family", "Alone", "A"): {(): 35016},
    ("family", "Saved", "A"): {(): 35016 - 12522},
    ("family", "Burn rate", "A"): {(): 64 * 3.75},
    ("family", "Acceleration", "A"): {(): ALONE_MACS / PROJECTED_MACS},
    ("family", "GPU time", "A"): {(): GPU_HOURS},
    ("family", "Waste", "A"): {(): (STARTUP + LOST + STALLED) / GPU_HOURS},
    ("family", "Lost work", "A"): {(): 3e18 / (MACS + 1.2e20)},
    # vit-b ends at 29.9 h, and vit-l 20 h later.
    ("family", "Time left", "A"): {(): 3600 * (29.9 + 20 - 24)},
    ("family", "Chains", "J"): by_chain({"vit": 1000 * (BEGIN + 3600 * (29.9 + 20))}),
    ("family", "Budget", "A"): {(): 0.552},
    ("family", "Chains", "A"): by_chain({"clip": 4 / 12, "swin": 1, "vit": 1.56 / 4.76}),
    ("family", "Chains", "B"): by_chain(PLANNED),
    ("family", "Chains", "C"): by_chain(SPENT),
    ("family", "Chains", "D"): by_chain(PROJECTED),
    ("family", "Chains", "E"): by_chain(ALONE),
    ("family", "Chains", "F"): by_chain({n: ALONE[n] - OF_STAGES[n] for n in ALONE}),
    ("family", "Chains", "I"): by_chain({"swin": 5.6 / 2.4}),
    ("family", "Burn rate by chain", "A"): by_chain({"clip": 0, "swin": 0, "vit": 240}),
    ("family", "Budgets", "A"): by_chain({"vit": 0.552}),
    ("family", "Budgets", "B"): by_chain({"vit": 1.176}),
    ("family", "MACs of the chains, and alone", "A"): {(): MACS},
    ("family", "MACs of the chains, and alone", "B"): {
        (): 1.6e19 + 1.2e20 + 2.4e20 + 5.6e19 + 2e18 + 0.2 * 3e19
    },
    ("family", "GPU time by node pool", "A"): {("a100-80gb",): GPU_HOURS - 64, ("h100",): 64},
    ("family", "Prices", "A"): {
        ("Any", "USD", "A100", "a100-80gb", "contract of 2026"): 3.75,
        ("Spot", "USD", "A100", "a100-80gb", "contract of 2026"): 1.5,
        ("Any", "USD", "H100", "h100", "contract of 2026"): 6,
    },
    ("chain", "Done", "A"): {(): (1.56e20 + 2.4e19 + 4e18) / (4.76e20 + 2.4e19 + 1.2e19)},
    ("chain", "GPUs held", "A"): {(): 64},
    ("chain", "Retries", "A"): {(): 4},
    ("chain", "Waiting for a person", "A"): {(): 1},
    ("chain", "Time left by stage", "A"): {
        ("vit", "modelchain-operator-metrics", "vision", "vit-b"): 21240
    },
    ("chain", "Better than alone", "A"): {
        ("swin", "modelchain-operator-metrics", "vision", "swin-s"): 0.55,
        ("vit", "modelchain-operator-metrics", "vision", "vit-s"): -0.15,
    },
    ("chain", "Lost work", "A"): {
        ("clip", "team-b", "clip-b"): 1e18,
        ("vit", "vision", "vit-s"): 2e18,
    },
    ("operator", "Leaders", "A"): {(): 1},
    ("operator", "Chains", "A"): {(): 3},
    ("operator", "Last list", "A"): {(): 20},
    ("operator", "API requests by code", "A"): {("200",): 3.5, ("409",): 0.01},
    ("operator", "Leader", "A"): {
        ("modelchain-system", "modelchain-operator-0"): 0,
        ("modelchain-system", "modelchain-operator-1"): 1,
    },
}


@pytest.mark.parametrize("panel", ANSWERS, ids="-".join)
def test_answers_are_those_computed_by_hand(panel: tuple[str, str, str], server: Server) -> None:
    found = last(server.query(query(*panel)))
    assert found == pytest.approx(ANSWERS[panel], rel=1e-6)


def test_uses_sum_up_to_all_time_that_is_settled(server: Server) -> None:
    found = last(server.query(query("family", "GPU time by use", "A")))
    assert sum(found.values()) == pytest.approx(GPU_HOURS)
    assert [found[use,] for use in ("startup", "lost", "stalled")] == pytest.approx(
        [STARTUP, LOST, STALLED]
    )


def test_growth_in_the_time_range_is_that_of_the_day(server: Server) -> None:
    """Prometheus extrapolates to the range's ends. What was found finished is not of this day."""
    found = last(server.query(query("family", "Dearest chains", "A")))
    assert found == pytest.approx(by_chain(SPENT | {"clip": 288}), rel=0.005)


def test_stages_have_their_states(server: Server) -> None:
    found = last(server.query(query("chain", "Stages", "A")))
    (panel,) = (panel for panel in panels("chain") if panel["title"] == "Stages")
    (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
    states = {key[-1]: mapping["options"][f"{value:g}"]["text"] for key, value in found.items()}
    assert states == {
        "vit-t": "Succeeded",
        "vit-s": "Succeeded",
        "vit-b": "Running",
        "vit-l": "Pending",
        "swin-t": "Succeeded",
        "swin-s": "Succeeded",
        "clip-s": "Succeeded",
        "clip-b": "Failed",
    }


def test_a_model_that_is_trained_alone_burns_money_too(server: Server) -> None:
    """12 and a half hours after the begin, when only the gate's baseline runs."""
    found = last(server.query(query("family", "Burn rate", "A"), BEGIN + 12.5 * 3600))
    assert found == {(): 64 * 3.75}


@pytest.mark.parametrize(
    ("title", "number"),
    [
        ("Losses", 5 / (1 + (12.5 - 9.6) / 2)),
        ("Samples a second", 16384),
        ("Data wait", 0.03),
        ("Age of the newest checkpoint", 0),
    ],
)
def test_a_model_that_is_trained_alone_has_lines_of_its_own(
    title: str, number: float, server: Server
) -> None:
    """At the same time: its loss has begun at 5, and halves in 2 hours; the newest checkpoint is of
    this moment.
    """
    asked = query("chain", title, "A")
    assert "{{stage}}" in asked["legendFormat"]
    everything = server.query(asked, BEGIN + 12.5 * 3600)
    now = max(float(series["values"][-1][0]) for series in everything)
    (found,) = (series for series in everything if float(series["values"][-1][0]) == now)
    assert found["metric"]["stage"] == "vit-s alone"
    assert float(found["values"][-1][1]) == pytest.approx(number, rel=1e-3, abs=1e-3)


def test_a_chosen_chain_is_the_only_one(server: Server) -> None:
    spent = query("chain", "Spent", "A")
    assert last(server.query(spent, chain="swin")) == pytest.approx({(): SPENT["swin"]})
    assert last(server.query(spent, namespace="team-b")) == pytest.approx({(): SPENT["clip"]})


def test_two_replicas_that_report_the_same_chains_count_once(server: Server) -> None:
    """10 hours and 2 minutes after the begin, while the Lease changes hands."""
    at = BEGIN + 10 * 3600 + 120
    both = {"expr": "count by (chain) (count by (chain, pod) (modelchain_info))", "instant": True}
    assert set(last(server.query(both, at)).values()) == {2}
    found = last(server.query(query("family", "Chains", "C"), at))
    hours = {"vit": 64 * (9 + 10 + 2 / 60 - 9.5), "swin": 32 * (4 + 10 + 2 / 60 - 4.05)}
    expected = {name: 3.75 * of for name, of in hours.items()} | {"clip": 384}
    assert found == pytest.approx(by_chain(expected))
    assert last(server.query(query("family", "Planned", "A"), at)) == {(): 12178.5}


@pytest.mark.parametrize("name", NAMES)
def test_two_replicas_that_know_different_node_pools_break_no_query(
    name: str, server: Server
) -> None:
    """At the same time: the one that is behind has not seen that swin is in another pool."""
    at = BEGIN + 10 * 3600 + 120
    pools = {
        "expr": 'count by (chain) (count by (chain, node_pool) (modelchain_info{chain="swin"}))',
        "instant": True,
    }
    assert last(server.query(pools, at)) == {("swin",): 2}
    for panel in panels(name):
        for target in panel["targets"]:
            server.query(target, at)


def test_the_gpus_of_a_chain_are_counted_in_one_pool(server: Server) -> None:
    """At the same time, swin holds 32 GPUs of one of two pools, and vit trains a model alone."""
    found = last(server.query(query("family", "Burn rate by chain", "A"), BEGIN + 36120))
    assert found["vit", "vision"] == 64 * 3.75
    assert found["swin", "vision"] in (32 * 3.75, 32 * 6)


def test_the_simulated_day_has_the_metrics_and_labels_that_are_documented() -> None:
    told = {(name, frozenset(labels)) for hour in range(25) for _, name, labels, _ in scrape(hour)}
    documented = documented_labels()
    by_the_scrape = {"job", "pod", "instance", "namespace", "chain", "stage", "role"}
    for name, labels in told:
        if name.startswith("modelchain_"):
            family = name if name in documented else re.sub(r"_(bucket|count|sum)$", "", name)
            assert labels - by_the_scrape - {"le"} == documented[family] - by_the_scrape, name
