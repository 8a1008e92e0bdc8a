"""`GET /metrics` of the operator: it returns the figures of the statuses, and scraping changes
nothing.
"""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections import Counter
from typing import Any

import pytest
import travel
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from test_service import World

from modelchain.api.contracts import FailureClass
from modelchain.api.status import (
    AttemptStatus,
    ChainStatus,
    Condition,
    GateStatus,
    GateVerdict,
    Progress,
    Spent,
    SpentAt,
    StageLedger,
    StageStatus,
    State,
    Total,
)
from modelchain.api.uses import Uses
from modelchain.decide.transitions import with_attempts
from modelchain.plan.pools import PoolFile
from modelchain_operator.reconcile import handovers
from modelchain_operator.reconcile.figures import figures
from modelchain_operator.watch import metrics
from modelchain_operator.watch.service import Service

CONFIG = PoolFile.model_validate(
    {
        "nodePools": {
            "a100": {
                "gpu": "A100",
                "gpusPerNode": 8,
                "price": {"perGpuHour": "3.6", "currency": "EUR", "source": "made up"},
            }
        },
        "defaults": {"nodePool": "a100"},
    }
)
NOW = 1.8e9
Samples = dict[tuple[str, ...], float]
USES = ("startup", "productive", "evaluating", "stalled", "lost")


def stage(name: str, state: State, **more: Any) -> StageStatus:
    own = AttemptStatus(name=f"vit-{name}-a1", number=1, input_digest="d" * 64, state=State.FAILED)
    known = {
        "name": name,
        "state": state,
        "planned_macs": 4 * 10**20,
        "cost": "0.00",
        "attempts": [own],
    }
    return StageStatus(**{**known, **more})


STAGES = [
    stage(
        "s1",
        State.SUCCEEDED,
        macs=123456789012345678901234,
        gpu_seconds=0.1,
        gpu_milliseconds=Uses(productive=60, lost=40),
        cost="12.34",
        attempts=[],
    ),
    stage(
        "s2",
        State.SUCCEEDED,
        macs=7,
        gpu_seconds=3600.125,
        gpu_milliseconds=Uses(startup=125, productive=3_000_000, evaluating=600_000),
        cost="3.60",
        retried={FailureClass.PREEMPTED: 2},
        gate=GateStatus(
            verdict=GateVerdict.MISSED, metric="top1", baseline="30.16", difference="-1.06"
        ),
    ),
    stage(
        "s3",
        State.RUNNING,
        macs=10,
        gpu_seconds=0.25,
        gpu_milliseconds=Uses(stalled=200, unsaved=50),
        progress=Progress(step=3, steps=12, samples_per_second=1, eta_seconds=1),
        retried={FailureClass.NON_FINITE: 1},
        transition_seconds=1.25,
    ),
    stage("s4", State.PENDING, cost=None, attempts=[]),
]
STATUS = ChainStatus(
    observed_generation=1,
    stages=STAGES,
    total=Total(
        macs=sum(s.macs for s in STAGES),
        gpu_seconds=sum(s.gpu_seconds for s in STAGES),
        cost="15.94",
    ),
    conditions=[
        Condition(type=kind, status=status, reason="R", message="", last_transition_time="")  # type: ignore[arg-type]
        for kind, status in (("Reconciling", "True"), ("Ready", "False"))
    ],
)

SETTLED = STATUS.total.gpu_seconds - 0.05  # all but what is unsaved


def chain(name: str = "vit", status: ChainStatus = STATUS, version: int = 5) -> dict[str, Any]:
    return {
        "metadata": {
            "namespace": "ns",
            "name": name,
            "generation": 1,
            "resourceVersion": str(version),
        },
        "spec": {"runner": {"queueName": "night"}},
        "status": status.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


class Api(World):
    calls: Counter[tuple[str, str, int]]


def scraped(*chains: dict[str, Any], leads: bool = True) -> str:
    """The metrics of a new operator that has listed these chains."""

    async def main() -> str:
        api = Api(*chains)
        api.calls = Counter({("get", "modelchains", 200): 3, ("update", "modelchains", 0): 1})
        service = Service(api, api, (), None if leads else Waiting(), "http://localhost:1/")  # type: ignore[arg-type]
        await service._list(everything=False)
        service.queue.seconds.labels("ok").observe(0.2)
        made = metrics.registry(service, CONFIG, handovers.histogram(), lambda: NOW)
        return generate_latest(made).decode()

    return travel.run(main())


class Waiting:
    def __init__(self) -> None:
        self.leading = asyncio.Event()


def samples(text: str) -> dict[str, Samples]:
    """Values by metric and by label values, which are in the order of the labels' names."""
    found: dict[str, Samples] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for name, value in sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), f"{sample} appears twice"
            found[sample.name][labels] = sample.value
    return found


def of_chains(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r"modelchain_(?!operator|node)", line)]


def test_totals_are_those_of_the_status() -> None:
    found = samples(scraped(chain(), chain("swin")))
    for metric, total in (
        ("modelchain_stage_macs_total", float(STATUS.total.macs)),
        ("modelchain_stage_gpu_seconds_total", SETTLED),
        ("modelchain_stage_cost_total", float(STATUS.total.cost or 0)),
    ):
        own = [value for labels, value in found[metric].items() if "vit" in labels]
        assert abs(sum(own) - total) <= 1e-12 * total, metric
    for one in STAGES:
        assert found["modelchain_stage_planned_macs"]["vit", "ns", one.name] == float(
            one.planned_macs
        )
        shown = "trained" if one.attempts else "reused"
        if one.macs:
            assert found["modelchain_stage_macs_total"]["vit", "ns", shown, one.name] == float(
                one.macs
            )


def test_verdicts_of_the_gate() -> None:
    found = samples(scraped(chain()))
    assert found["modelchain_stage_gate"] == {("vit", "ns", "s2", "Missed"): 1.0}
    points = found["modelchain_stage_gate_difference_points"]
    assert points == {("vit", "ns", "s2"): -1.06}


def test_a_baseline_has_series_of_its_own() -> None:
    """It is no stage of the chain: neither its state nor its plan is exported as one's."""
    row = STAGES[1].changed(name="s3", gate=None, retried={})
    update = {"baselines": [row]}
    found = samples(scraped(chain(status=STATUS.model_copy(update=update))))
    spent = found["modelchain_stage_gpu_seconds_total"]

    def of(stage: str) -> float:
        return sum(value for labels, value in spent.items() if labels[3] == stage)

    assert of("s3 alone") == row.gpu_seconds - row.gpu_milliseconds.unsaved / 1000
    assert of("s3") == 0.2
    assert sum(found["modelchain_stages"].values()) == len(STAGES)


def test_reused_spending_is_separate_from_trained_spending() -> None:
    """If chains share a stage, the sum over `source="trained"` counts nothing twice. Its series
    begin at 0.
    """
    found = samples(scraped(chain()))["modelchain_stage_gpu_seconds_total"]
    spent = {
        ("reused", "s1", "productive"): 0.06,
        ("reused", "s1", "lost"): 0.04,
        ("trained", "s2", "startup"): 0.125,
        ("trained", "s2", "productive"): 3000.0,
        ("trained", "s2", "evaluating"): 600.0,
        ("trained", "s3", "stalled"): 0.2,
    }
    begun = {("trained", f"s{n}", use): 0.0 for n in range(1, 5) for use in USES}
    assert found == {("vit", "ns", *labels): value for labels, value in (begun | spent).items()}
    costs = samples(scraped(chain()))["modelchain_stage_cost_total"]
    assert ("vit", "EUR", "ns", "trained", "s2") in costs and not [
        c for c in costs if c[-1] == "s4"
    ], "a stage without a price has no cost"


def test_removed_stages_keep_their_series() -> None:
    """A stage that leaves the spec is counted as before. The sum of those that left long ago has a
    source of its own: their own series have counted it already.
    """
    gone = StageLedger(
        name="s3",
        attempts=STAGES[2].attempts,
        macs=10,
        gpu_seconds=0.25,
        gpu_milliseconds=STAGES[2].gpu_milliseconds,
        cost="0.00",
        retried={FailureClass.NON_FINITE: 1},
    )
    found_once = gone.model_copy(update={"name": "s0", "attempts": [], "macs": 3})
    lost = Uses(lost=7500)
    long_ago = StageLedger(name="", macs=5, gpu_seconds=7.5, gpu_milliseconds=lost, cost="1.00")
    removed = [long_ago, found_once, gone]
    total = Total(
        macs=sum(s.macs for s in [*STAGES[:2], *removed]), gpu_seconds=3608.225, cost="16.94"
    )
    before = samples(scraped(chain()))
    update = {"stages": STAGES[:2], "removed": removed, "total": total}
    after = samples(scraped(chain(status=STATUS.model_copy(update=update))))
    macs = after["modelchain_stage_macs_total"]
    for metric, use in (("macs", ()), ("gpu_seconds", ("stalled",))):
        name, own = f"modelchain_stage_{metric}_total", ("vit", "ns", "trained", "s3", *use)
        assert after[name][own] == before[name][own] > 0
    assert macs["vit", "ns", "removed", ""] == 5 and ("vit", "ns", "trained", "") not in macs
    assert (macs["vit", "ns", "trained", "s0"], macs["vit", "ns", "reused", "s0"]) == (0, 3)
    assert sum(macs.values()) == pytest.approx(float(total.macs))
    times = sum(after["modelchain_stage_gpu_seconds_total"].values())
    assert times == pytest.approx(total.gpu_seconds - 2 * 0.05), "all that is settled"
    retries = after["modelchain_stage_retries_total"]
    assert retries["vit", "NonFinite", "ns", "s3"] == 1
    assert sum(v for k, v in after["modelchain_stages"].items()) == 2, "they are in no state"


def test_a_stage_that_trains_again_keeps_what_it_had_found() -> None:
    """A round of relaxation replaced the record of an earlier chain. Both have cost money."""
    record = SpentAt(input_digest="d0", spent=Spent(macs=10**19, gpu_seconds=3.0, cost="0.10"))
    here = Spent(macs=7, gpu_seconds=0.5, gpu_milliseconds=Uses(lost=500), cost="0.20")
    stage = StageStatus(name="s0", spent=here, reused=[record])
    found = samples(scraped(chain(status=ChainStatus(stages=[with_attempts(stage, [])]))))
    for name, trained, reused in (("macs", 7, 1e19), ("cost", 0.2, 0.1)):
        said = found[f"modelchain_stage_{name}_total"]
        assert sorted(said.values()) == sorted([trained, reused]), said


def test_states_conditions_and_progress() -> None:
    found = samples(scraped(chain()))
    states = {labels[-1]: value for labels, value in found["modelchain_stages"].items()}
    assert states == {str(s): {"Succeeded": 2, "Running": 1, "Pending": 1}.get(s, 0) for s in State}
    true = [labels[1] for labels, value in found["modelchain_condition"].items() if value]
    assert true == ["Reconciling"] and len(found["modelchain_condition"]) == 9
    ratios = {
        labels[-1]: value for labels, value in found["modelchain_stage_progress_ratio"].items()
    }
    assert ratios == {"s1": 1, "s2": 1, "s3": 0.25}
    assert found["modelchain_stage_transition_seconds"] == {("vit", "ns", "s3"): 1.25}
    of_stages = found["modelchain_stage_state"]
    assert len(of_stages) == len(STAGES) * len(State)
    assert {labels[2:]: 1.0 for labels, value in of_stages.items() if value} == {
        (one.name, str(one.state)): 1.0 for one in STAGES
    }
    assert found["modelchain_info"] == {("vit", "ns", "a100", "night", "PyTorchJob"): 1}


def test_retries_are_those_of_the_status_and_begin_at_0_while_a_stage_is_trained() -> None:
    found = samples(scraped(chain()))["modelchain_stage_retries_total"]
    assert {k: v for k, v in found.items() if v} == {
        ("vit", "Preempted", "ns", "s2"): 2,
        ("vit", "NonFinite", "ns", "s3"): 1,
    }
    zeros = [labels for labels, value in found.items() if not value]
    assert {labels[-1] for labels in zeros} == {"s3"} and len(zeros) == 13


def test_a_restart_changes_nothing() -> None:
    first, second = scraped(chain(), chain("swin")), scraped(chain("swin"), chain())
    assert sorted(of_chains(first)) == sorted(of_chains(second)) != []


def test_an_operator_that_waits_for_the_lease_exports_no_chain() -> None:
    waiting = scraped(chain(), leads=False)
    assert not of_chains(waiting) and samples(waiting)["modelchain_operator_leader"] == {(): 0}
    assert "modelchain_node_pool" not in waiting
    assert samples(scraped(chain()))["modelchain_operator_leader"] == {(): 1}


def test_a_chain_without_a_status_and_no_chain_at_all() -> None:
    new = {"metadata": chain()["metadata"], "spec": {}}
    assert samples(scraped(new))["modelchain_info"] == {("vit", "ns", "a100", "", "PyTorchJob"): 1}
    assert not of_chains(scraped())


@pytest.mark.parametrize("late", ["list", "watch"])
def test_an_old_version_that_comes_late_changes_nothing_and_a_deleted_chain_is_forgotten(
    late: str,
) -> None:
    """A counter that falls for a moment would be counted twice by Prometheus."""
    before, now = (
        chain(),
        chain(status=STATUS.model_copy(update={"stages": STAGES[:1]}), version=10),
    )

    async def main() -> None:
        api = Api(before if late == "list" else now)
        service = Service(api, api, (), None, "http://localhost:1/")  # type: ignore[arg-type]
        if late == "list":
            service._on_chain(now)
        await service._list(everything=False)
        if late == "watch":
            service._on_chain(before)
        assert len(service.known["ns", "vit"].stages) == 1
        api.chains[:] = [chain(version=11)]
        await service._list(everything=False)
        assert len(service.known["ns", "vit"].stages) == 4
        api.chains.clear()
        await service._list(everything=False)
        assert not service.known

    travel.run(main())


def test_the_operators_own_metrics() -> None:
    found = samples(scraped(chain()))
    assert found["modelchain_operator_api_requests_total"] == {
        ("200", "modelchains", "get"): 3,
        ("none", "modelchains", "update"): 1,
    }
    assert found["modelchain_operator_reconcile_duration_seconds_count"] == {("ok",): 1}
    assert found["modelchain_operator_queue_depth"] == {(): 0}
    assert found["modelchain_operator_last_list_timestamp_seconds"][()] > 1.7e9
    assert found["process_resident_memory_bytes"][()] > 0


def test_metrics_are_served() -> None:
    made = CollectorRegistry()
    server = metrics.serve(0, made)
    with urllib.request.urlopen(
        f"http://127.0.0.1:{server.server_port}/metrics", timeout=10
    ) as answer:
        assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain")
    server.shutdown()
    server.server_close()


def test_a_counter_does_not_fall_when_an_estimate_is_corrected() -> None:
    """Prometheus takes a counter that falls for a new one, and adds its whole value again. So a
    small correction is not exported, but a large one is.
    """

    def spent(gpu_seconds: float, cost: str) -> dict[str, Any]:
        attempt = AttemptStatus(name="vit-a-a1", number=1, input_digest="d", state=State.RUNNING)
        uses = Uses(startup=round(1000 * gpu_seconds), unsaved=5)
        stage = StageStatus(name="a", attempts=[attempt], gpu_milliseconds=uses, cost=cost)
        stage = stage.changed(lost_macs=int(gpu_seconds), queue_seconds=gpu_seconds)
        return chain(status=ChainStatus(stages=[stage]))

    before = figures(spent(1000.0, "10.00"))
    for now, told in ((999.0, 1000.0), (1001.0, 1001.0), (3.0, 3.0)):
        [stage] = figures(spent(now, f"{now / 100:.2f}"), before).stages
        assert stage.trained is not None
        assert sum(stage.trained.uses.values()) == told
        assert stage.trained.cost == pytest.approx(told / 100)
        assert stage.trained.lost_macs == stage.trained.queue_seconds == told
    other = spent(999.0, "9.99")
    other["metadata"]["uid"] = "of another chain"
    [stage] = figures(other, before).stages
    assert stage.trained is not None and stage.trained.uses["startup"] == 999.0
