"""Metrics along random lives of the paper's chains: evictions, preemptions, failures and resumes,
with their real MACs and money.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from life import Life, life_of
from prometheus_client import Metric

from modelchain.api.status import ChainStatus
from modelchain.plan.pools import PoolFile
from modelchain_operator.reconcile.figures import Figures, figures
from modelchain_operator.watch import chain_metrics, outlook_metrics, spending_metrics
from modelchain_operator.watch import stage_metrics as of_stages

CONFIG = PoolFile.model_validate({"nodePools": {"a100-80gb": {"gpu": "A100", "gpusPerNode": 8}}})


def families(chain: Figures) -> Iterator[Metric]:
    yield from chain_metrics.families([chain], CONFIG)
    yield from of_stages.families([chain], CONFIG)
    yield from outlook_metrics.families([chain], "USD")
    yield from spending_metrics.families([chain], "USD")


@dataclass
class Watched:
    """What Prometheus has seen of a chain."""

    figures: Figures | None = None
    counters: dict[Any, float] = field(default_factory=dict)
    passes: int = 0

    def sees(self, body: dict[str, Any], status: ChainStatus) -> None:
        self.passes += 1
        version = {"namespace": "n", "resourceVersion": str(self.passes)}
        meta = {**body["metadata"], **version}
        told = status.model_dump(mode="json", by_alias=True, exclude_none=True)
        self.figures = figures({**body, "metadata": meta, "status": told}, self.figures)
        seen = set()
        for family in families(self.figures):
            for sample in family.samples:
                at = (sample.name, *sorted(sample.labels.items()))
                assert at not in seen, f"twice: {at}"
                seen.add(at)
                if family.type == "counter":
                    known = self.counters.get(at, 0.0)
                    assert sample.value >= known, f"{at} falls from {known} to {sample.value}"
                    self.counters[at] = sample.value

    def sum_of(self, counter: str) -> float:
        return sum(v for at, v in self.counters.items() if at[0] == f"modelchain_stage_{counter}")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("example", ["vit-cc3m", "swin-cc3m"])
def test_no_counter_falls_and_all_sums_are_those_of_the_status(example: str, seed: int) -> None:
    watched = Watched()

    class Seen(Life):
        def store(self, status: ChainStatus) -> None:
            super().store(status)
            watched.sees(self.body, self.status)

    life = life_of(example, nodes=2)
    life.__class__ = Seen
    chance = random.Random(seed)
    life.reconcile()
    for _ in range(80):
        life.happens(chance)
        life.reconcile()
    total, chain = life.status.total, watched.figures
    assert chain is not None and chain.outlook is not None and watched.passes >= 20
    assert watched.sum_of("macs_total") == pytest.approx(float(total.macs))
    assert watched.sum_of("lost_macs_total") == pytest.approx(float(total.lost_macs))
    assert watched.sum_of("cost_total") == pytest.approx(float(total.cost or 0))
    settled = total.gpu_seconds - total.gpu_milliseconds.unsaved / 1000
    assert watched.sum_of("gpu_seconds_total") == pytest.approx(settled)
    assert any(value for at, value in watched.counters.items() if ("use", "lost") in at)
    for stage in chain.stages:
        projected = chain.outlook.stages[stage.name].projected
        spent = stage.trained.macs if stage.trained else 0.0
        assert projected.macs is not None and projected.macs >= spent
