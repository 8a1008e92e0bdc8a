"""Metrics of what chains will have taken: the numbers of `modelchain cost`. And of moments, prices,
GPUs and hand-overs; how many series there are, and how much memory they take.
"""

from __future__ import annotations

import json
import sys
import tracemalloc
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from commandline import modelchain
from podshapes import ended, running, word
from prometheus_client import generate_latest
from specs import with_changes
from stagelife import Life
from test_budget_life import CONFIG as PRICED
from test_operator_metrics import Samples, of_chains, samples, scraped

from modelchain.api.spec import ModelChain
from modelchain.api.status import StageStatus, State
from modelchain.decide.ledger import seconds
from modelchain.io.load import parse, status_of
from modelchain.local.root import Root
from modelchain.plan.pools import PoolFile
from modelchain_operator.reconcile import handovers
from modelchain_operator.reconcile.figures import figures
from modelchain_operator.watch import price_metrics

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import metrics_table

KEY = ("vit-cc3m", "vision")


def example(**changes: Any) -> dict[str, Any]:
    """The chain of docs/metrics.md: of four stages the first has finished, and the second runs."""
    return with_changes(changes, metrics_table.chain())


def told(**changes: Any) -> dict[str, Samples]:
    return samples(scraped(example(**changes)))


def test_metrics_and_the_command_tell_the_same_numbers(tmp_path: Path) -> None:
    chain = example(**{"status.stages[1].alone": {"macs": 10**18}})
    (tmp_path / "root").mkdir()
    spec = parse(ModelChain, {k: v for k, v in chain.items() if k != "status"}, "chain")
    Root(tmp_path / "root").write_status(spec, status_of(chain))
    done = modelchain("cost", "--root", "root", "-o", "json", folder=tmp_path)
    document, found = json.loads(done.stdout), samples(scraped(chain))
    parts = {"planned": "planned", "baseline": "alone", "projected": "projected"}
    for stage in document["stages"]:
        for metric, part in parts.items():
            same(found, f"modelchain_stage_{metric}", (stage["stage"],), stage[part])
    same(found, "modelchain_saved", (), document["total"]["saved"])
    assert found["modelchain_saved_macs"][KEY] < 0, "what is saved may be negative"


def same(
    found: dict[str, Samples], metric: str, stage: tuple[str, ...], figures: dict[str, Any]
) -> None:
    """The three metrics have these figures, and none where a figure is not known."""
    for unit, key in (("macs", "macs"), ("gpu_seconds", "gpuSeconds"), ("cost", "cost")):
        labels = (KEY[0], "USD", KEY[1], *stage) if unit == "cost" else (*KEY, *stage)
        value = found.get(f"{metric}_{unit}", {}).get(labels)
        if figures[key] is None:
            assert value is None, (metric, unit)
        else:
            assert value == pytest.approx(float(figures[key]), abs=0.006), (metric, unit)


def test_what_a_stage_is_and_when_it_ran() -> None:
    found = told(**{"spec.runner.nodePool": "a100"})
    about = found["modelchain_stage_info"]
    # chain, gpu, gpus, model, namespace, node pool, predecessor, stage
    asked = {labels[-1]: (labels[1], labels[2], labels[3], labels[6]) for labels in about}
    assert asked == {
        "vit-t": ("A100", "8", "ViT-T-16", ""),
        "vit-s": ("A100", "8", "ViT-S-16", "vit-t"),
        "vit-b": ("A100", "16", "ViT-B-16", "vit-s"),
        "vit-l": ("A100", "32", "ViT-L-16", "vit-b"),
    }
    begun = seconds("2026-07-01T00:00:00Z")
    assert found["modelchain_stage_start_timestamp_seconds"][*KEY, "vit-t"] == begun
    ends = found["modelchain_stage_completion_timestamp_seconds"]
    assert ends == {(*KEY, "vit-t"): begun + 8 * 3600}
    assert found["modelchain_stage_last_progress_timestamp_seconds"] == {(*KEY, "vit-s"): 1.8e9}
    assert found["modelchain_stage_eta_timestamp_seconds"] == {(*KEY, "vit-s"): 1.8e9 + 60}
    held = {labels[-1]: gpus for labels, gpus in found["modelchain_stage_allocated_gpus"].items()}
    assert held == {"vit-t": 0, "vit-s": 8, "vit-b": 0, "vit-l": 0}
    result = found["modelchain_stage_result"][KEY[0], "imagenet1k-top1", KEY[1], "vit-t"]
    assert result == 30.16
    alone = found["modelchain_stage_baseline_result"]
    assert alone[KEY[0], "imagenet1k-top1", KEY[1], "vit-t"] == 31.22


def test_a_pool_that_nobody_knows_says_nothing_of_gpus() -> None:
    found = told()
    [(labels, _), *_] = found["modelchain_stage_info"].items()
    assert labels[1:3] == ("", ""), "the configuration has no such pool"
    assert "modelchain_eta_timestamp_seconds" not in found


def test_the_chains_end_follows_from_what_is_left() -> None:
    """Stages that have not begun take what is projected of them, divided by their GPUs."""
    pool = {"spec.runner.nodePool": "a100"}
    found = told(**pool)
    left = [
        found["modelchain_stage_projected_gpu_seconds"][*KEY, name] for name in ("vit-b", "vit-l")
    ]
    expected = 1.8e9 + 60 + left[0] / 16 + left[1] / 32
    assert found["modelchain_eta_timestamp_seconds"] == {KEY: pytest.approx(expected)}
    for change in (
        {"status.stages[1].state": "Starting"},
        {"status.stages[1].progress.etaSeconds": 0.0},
        {"status.stages": metrics_table.STATUS["stages"][:3]},
    ):
        assert "modelchain_eta_timestamp_seconds" not in told(**pool, **change)


def test_limits_of_the_budget_and_the_accelerations() -> None:
    found = told()
    assert found["modelchain_budget_cost"] == {(KEY[0], "USD", KEY[1]): 5000}
    assert found["modelchain_budget_gpu_seconds"] == {KEY: 4000 * 3600}
    kinds = {labels[1]: value for labels, value in found["modelchain_acceleration_ratio"].items()}
    assert kinds.keys() == {"requested", "relaxed"} and kinds["requested"] == 4
    without = samples(scraped(example(**{"spec.budget": {"cost": "1"}})))
    assert "modelchain_budget_gpu_seconds" not in without


@pytest.mark.parametrize(
    "change", [{"spec.recipe.globalBatchSize": 10**9}, {"status.stages[0].attempts[0].number": "?"}]
)
def test_a_chain_that_cannot_be_read_keeps_its_other_metrics(change: dict[str, Any]) -> None:
    found = told(**change)
    assert "modelchain_saved_macs" not in found
    assert found["modelchain_stage_macs_total"][KEY[0], KEY[1], "trained", "vit-t"] == 1e19
    assert found["modelchain_stage_planned_macs"][*KEY, "vit-t"] == 1e19


def test_lost_work_and_waits_are_counted_by_source() -> None:
    found = told(
        **{
            "status.stages[1].lostMacs": 10**18,
            "status.stages[1].queueSeconds": 90.5,
            "status.stages[1].pods": {},
        }
    )
    of_second = (KEY[0], KEY[1], "trained", "vit-s")
    assert found["modelchain_stage_lost_macs_total"][of_second] == 1e18
    assert found["modelchain_stage_queue_seconds_total"][of_second] == 90.5


def test_prices_in_force_at_a_moment() -> None:
    """The newest of each capacity; one that does not hold yet is not told."""
    said = {"currency": "USD", "source": "a contract"}
    dated = [
        {"validFrom": "2026-01-01", "perGpuHour": "3", **said},
        {"validFrom": "2026-01-01", "perGpuHour": "1", "capacity": "Spot", **said},
        {"validFrom": "2026-07-01", "perGpuHour": "1.5", "capacity": "Spot", **said},
        {"validFrom": "2026-07-01", "perGpuHour": "2", "capacity": "OnDemand", **said},
    ]
    pool = {"gpu": "H100", "gpusPerNode": 8, "prices": dated, "capacityLabel": "c"}
    config = PoolFile.model_validate({"nodePools": {"h100": pool, "free": {**pool, "prices": []}}})

    def at(day: str) -> dict[str, float]:
        family = price_metrics.family(config, seconds(f"{day}T00:00:00Z"))
        assert all(sample.labels["node_pool"] == "h100" for sample in family.samples)
        return {sample.labels["capacity"]: sample.value for sample in family.samples}

    assert at("2025-12-31") == {}
    assert at("2026-06-30") == {"Any": 3, "Spot": 1}
    assert at("2026-07-02") == {"Any": 3, "Spot": 1.5, "OnDemand": 2}


def test_a_hand_over_is_counted_once_by_the_process_that_writes_it() -> None:
    life = Life(config=PRICED, **{"spec.runner.nodePool": "h100"})
    first = life.controller
    life.look()
    life.pods(running(start=110, created=100))
    told = {"startup": 50_000, "productive": 850_000}
    done = word("Succeeded", steps=1, macs=5, milliseconds=told)
    life.pods(ended(code=0, start=110, end=1010, created=100, message=done))
    life.end_job("Succeeded")
    life.look(1012)
    life.look(3)
    assert "vit-vit-s-a1" in life.jobs
    taken = life.status.stages[1].transition_seconds
    assert taken is not None and taken >= 2
    assert counted(first.hand_overs) == {"count": 1, "sum": taken}
    life.restart()
    life.look(60)
    assert counted(life.controller.hand_overs) == {"count": 0, "sum": 0}


def counted(seen: Any) -> dict[str, float]:
    [family] = seen.collect()
    return {
        sample.name.rpartition("_")[2]: sample.value
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def test_a_hand_over_without_a_job_is_not_counted() -> None:
    seen = handovers.histogram()
    waits = StageStatus(name="b", inherits_at=1.0, transition_seconds=4.0)
    handovers.observe(seen, waits, waits.changed(inherits_at=None, state=State.SUSPENDED))
    assert counted(seen)["count"] == 0
    handovers.observe(seen, waits, waits.changed(inherits_at=None, transition_seconds=0.7))
    assert counted(seen) == {"count": 1, "sum": 0.7}
    text = generate_latest(type("One", (), {"collect": seen.collect})).decode()  # type: ignore[arg-type]
    assert 'bucket{le="0.5"} 0.0' in text and 'bucket{le="1.0"} 1.0' in text


# What docs/metrics.md says of the number of series.
PER_CHAIN, PER_STAGE, PER_TRAINER = 27, 53, 26


def test_the_number_of_series_is_what_the_page_says() -> None:
    """Those of a chain of which everything is known, and of a stage that is trained, with one
    evaluation.
    """
    text = scraped(example(**{"spec.runner.nodePool": "a100"}))
    own = [line for line in of_chains(text) if "stage=" not in line and "node_pool_" not in line]
    assert "modelchain_eta_timestamp_seconds" in str(own) and len(own) == PER_CHAIN
    assert len([line for line in of_chains(text) if 'stage="vit-s"' in line]) == PER_STAGE
    trainer = [x for x in metrics_table.of_trainer().splitlines() if x.startswith("modelchain_")]
    assert len(trainer) == PER_TRAINER
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for count, what in ((PER_CHAIN, "chain"), (PER_STAGE, "stage"), (PER_TRAINER, "trainer")):
        assert f"| a {what} | {count} |" in page


def test_a_thousand_chains_take_little_memory() -> None:
    """No object and no status is kept of them, however many pods and attempts it lists."""
    pods = {f"uid-{n}": {"scheduled": 1.8e9, "gpus": 8} for n in range(256)}
    whole = example(**{"status.stages[1].attempts[0].pods": pods})
    whole["metadata"]["uid"] = "u"
    text = json.dumps(whole)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        kept = [figures(json.loads(text)) for _ in range(100)]
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    each = (after - before) / len(kept)
    assert each < 16_000, f"{each:.0f} bytes a chain"


def test_figures_of_the_size_of_the_paper_are_exact() -> None:
    """MACs of 1e24 and money of a long training keep 15 digits."""
    spent = {"macs": 10**24, "gpuSeconds": 3.6e9, "cost": "12345678.91"}
    found = told(**{f"status.stages[0].{key}": value for key, value in spent.items()})
    labels = (KEY[0], "USD", KEY[1], "trained", "vit-t")
    assert Decimal(str(found["modelchain_stage_cost_total"][labels])) == Decimal("12345678.91")
    assert found["modelchain_stage_macs_total"][KEY[0], KEY[1], "trained", "vit-t"] == 1e24
