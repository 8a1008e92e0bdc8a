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

import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from markers import between, print_or_write
from modelchain.api.contracts import LiveProgress
from modelchain.plan.pools import PoolFile
from modelchain_operator.reconcile import handovers
from modelchain_operator.watch import metrics
from modelchain_operator.watch.service import Service
from modelchain_trainer.metrics import Meter

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "metrics.md"

ATTEMPT = {
    "name": "vit-cc3m-vit-t-a1",
    "number": 1,
    "inputDigest": "d",
    "state": "Succeeded",
    "startedAt": "2026-07-01T00:00:00Z",
    "finishedAt": "2026-07-01T08:00:00Z",
}
PLAN = {"macs": 10**19, "gpuSeconds": 2e5, "cost": "200.00"}
SPENT = {
    "macs": 10**19,
    "gpuSeconds": 230_400.0,
    "gpuMilliseconds": {"startup": 400_000, "productive": 230_000_000},
    "cost": "230.40",
}
FINISHED = {
    "name": "vit-t",
    "state": "Succeeded",
    "attempts": [ATTEMPT],
    "lastDigest": "d",
    "plannedMacs": 10**19,
    "plan": PLAN,
    "alone": PLAN,
    **SPENT,
    "spent": SPENT,
    "trained": SPENT,
    "retried": {"Preempted": 1},
    "reasonCode": "Trained",
    "results": {"imagenet1k-top1": "30.16"},
    "gate": {
        "verdict": "Missed",
        "metric": "imagenet1k-top1",
        "result": "30.16",
        "baseline": "31.22",
        "difference": "-1.06",
    },
}
OPEN = {
    **ATTEMPT,
    "state": "Running",
    "finishedAt": None,
    "steppedAt": 1.8e9,
    "pods": {"u": {"scheduled": 1.8e9, "gpus": 8}},
}
RUNNING = {
    **FINISHED,
    "name": "vit-s",
    "state": "Running",
    "attempts": [OPEN],
    "progress": {"step": 1, "steps": 4, "samplesPerSecond": 9.0, "etaSeconds": 60.0},
    "transitionSeconds": 1.0,
}
LAST = {"taskLoss": 2.0, "distillationLoss": 1.0, "ratio": 0.5, "tokenEfficiency": 0.7}
# A chain of which everything is known: its first stage has finished, and its second one runs.
SPEC = ROOT / "examples" / "vit-cc3m.yaml"
META = {"namespace": "vision", "resourceVersion": "1"}
BUDGET = {"cost": "5000", "gpuHours": "4000"}
LATER = [
    {"name": name, "state": "Pending", "plan": PLAN, "alone": PLAN} for name in ("vit-b", "vit-l")
]
STATUS = {"stages": [FINISHED, RUNNING, *LATER], "total": SPENT, "currency": "USD"}
POOL = {
    "gpu": "A100",
    "gpusPerNode": 8,
    "price": {"perGpuHour": "3.6", "currency": "USD", "source": "an example"},
}


def chain() -> dict[str, Any]:
    """As an API server returns it."""
    whole: dict[str, Any] = yaml.safe_load(SPEC.read_text())
    whole["metadata"] |= META
    whole["spec"]["allocation"] = {"targetAcceleration": "4"}
    whole["spec"]["budget"] = BUDGET
    return whole | {"status": STATUS}


def of_operator() -> str:
    """The metrics of an operator that knows one chain."""

    async def page() -> str:
        kube, look = (
            SimpleNamespace(calls=Counter({("get", "modelchains", 200): 1})),
            SimpleNamespace(reconcile=None),
        )
        service = Service(kube, look, (), None, "")  # type: ignore[arg-type]
        service.listed_at = 1.0
        service._know(chain())
        service.queue.seconds.labels("ok").observe(0.1)
        config = PoolFile.model_validate({"nodePools": {"a100-80gb": POOL}})
        served = metrics.registry(service, config, handovers.histogram(), lambda: 1.8e9)
        return generate_latest(served).decode()

    return asyncio.run(page())


def of_trainer() -> str:
    """The metrics of rank 0 during a successor's training."""
    task: Any = SimpleNamespace(
        chain="vit",
        stage="s1",
        model="vit-b-16",
        attempt="vit-s1-a1",
        macs_per_step=10**15,
        inputs={"globalBatchSize": 8},
    )
    device = "NVIDIA A100-SXM4-80GB"
    meter = Meter(task, {"torch": "2", "device": device, "ranks": 8}, last=LAST)
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
