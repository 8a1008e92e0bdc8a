"""`python benchmarks/metrics_table.py --write`: the table of docs/metrics.md, from what an operator
and a trainer serve.

Both serve an example that has a sample of every metric.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from markers import between, print_or_write
from modelchain.api.contracts import LiveProgress
from modelchain.plan.pools import PoolFile
from modelchain_operator.watch import metrics
from modelchain_operator.watch.service import Service
from modelchain_trainer.metrics import Meter

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"

STAGE = {
    "name": "s1",
    "state": "Running",
    "attempts": [{}],
    "plannedMacs": 4,
    "macs": 1,
    "gpuSeconds": 8.0,
    "cost": "0.01",
    "progress": {"step": 1, "steps": 4},
    "transitionSeconds": 1.0,
    "retried": {"Preempted": 1},
    "reasonCode": "Miss",
    "gate": {"verdict": "Missed", "difference": "-1.06"},
}
LAST = {"taskLoss": 2.0, "distillationLoss": 1.0, "ratio": 0.5, "tokenEfficiency": 0.7}
META = {"namespace": "vision", "name": "vit", "resourceVersion": "1"}
CHAIN = {"metadata": META, "spec": {}, "status": {"stages": [STAGE]}}


def of_operator() -> str:
    """The metrics of an operator that knows one chain."""

    async def page() -> str:
        kube, look = (
            SimpleNamespace(calls=Counter({("get", "modelchains", 200): 1})),
            SimpleNamespace(reconcile=None),
        )
        service = Service(kube, look, (), None, "")  # type: ignore[arg-type]
        service.listed_at = 1.0
        service._know(CHAIN)
        service.queue.seconds.labels("ok").observe(0.1)
        return generate_latest(metrics.registry(service, PoolFile())).decode()

    return asyncio.run(page())


def of_trainer() -> str:
    """The metrics of rank 0 during a successor's training."""
    task: Any = SimpleNamespace(
        chain="vit",
        stage="s1",
        model="vit-b-16",
        attempt="vit-s1-a1",
        macs_per_step=1,
        inputs={"globalBatchSize": 8},
    )
    meter = Meter(task, {"torch": "2", "device": "cpu", "ranks": 1}, last=LAST)
    meter.live = LiveProgress(
        attempt="vit-s1-a1", step=1, steps=4, samples_per_second=1.0, eta_seconds=1.0
    )
    meter.saver = SimpleNamespace(saved_at=1.0, seconds={"stall": 0.1, "write": 1.0})  # type: ignore[assignment]
    registry = CollectorRegistry()
    registry.register(meter)
    return generate_latest(registry).decode()


def table() -> str:
    lines = ["| name | type | labels | |", "|---|---|---|---|"]
    for family in text_string_to_metric_families(of_operator() + of_trainer()):
        if not family.name.startswith("process_"):
            labels = dict.fromkeys(
                name for sample in family.samples for name in sample.labels if name != "le"
            )
            name = family.name + ("_total" if family.type == "counter" else "")
            shown = ", ".join(f"`{label}`" for label in labels)
            lines.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    return between(page, "metrics_table.py", table())


if __name__ == "__main__":
    print_or_write(__doc__, PAGE, table, with_table)
