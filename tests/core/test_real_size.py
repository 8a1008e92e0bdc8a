"""`decide`, the status and the CRD at the sizes of the paper, and at the largest of the API.

Every status that is written is valid against the generated CRD and below the size limit, and the
totals are right. What a pass costs is printed: `-s` shows it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from life import ROOT, SCHEMA, Life, life_of, life_with
from specs import config, with_changes
from stored import through_a_server, violations
from yaml import safe_load

from modelchain.api.artifact import StageArtifactSpec
from modelchain.api.contracts import FailureClass as F
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import ModelChain
from modelchain.api.status import (
    MOST_AVOIDED,
    MOST_DIGESTS,
    MOST_REMOVED,
    AttemptStatus,
    AvoidedNode,
    ChainStatus,
    PodTime,
    Spent,
    SpentAt,
    StageStatus,
    State,
)
from modelchain.decide.conditions import MAX_BYTES, completed
from modelchain.decide.ledger import KEPT_ATTEMPTS, MESSAGE_LENGTH
from modelchain.decide.transitions import explained, removed
from modelchain.identity.digest import digest_of, stage_inputs
from modelchain.identity.shards import MAX_SHARDS
from modelchain.plan.check import check

RECORD = safe_load((ROOT / "crds" / "stageartifacts.yaml").read_text())["spec"]["versions"][0][
    "schema"
]["openAPIV3Schema"]["properties"]["spec"]
EXAMPLES = ["vit-cc3m", "swin-cc3m", "vit-merged15m"]
MOST_STAGES, MOST_NODES = 32, 256
# No status is larger, whatever is in it. What can be left out of it is left out above MAX_BYTES.
LARGEST = 128 * 1024
HOUR, DAY = 3600.0, 86_400.0


@pytest.fixture(autouse=True)
def told(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> Iterator[list[Life]]:
    """The lives of a test, of which it is printed what their passes cost."""
    lives: list[Life] = []
    yield lives
    for life in lives:
        took = sorted(life.took)
        with capsys.disabled():
            print(
                f"\n[size] {request.node.name}: {len(took)} decisions, median"
                f" {1000 * took[len(took) // 2]:.1f} ms, longest {1000 * took[-1]:.1f} ms;"
                f" {len(life.written)} writes, largest {max(life.written)} bytes",
                end="",
            )


def right(life: Life) -> None:
    """The totals are what was spent. An API server rounds MACs, and passes take time."""
    total = life.status.total
    assert total.macs == pytest.approx(life.macs, rel=1e-12)
    # The trainer's clock goes on during a pass, which accounts whole seconds only.
    assert total.gpu_seconds == pytest.approx(life.gpu_seconds, rel=1e-6, abs=60 * 8 * life.nodes)


def finish(life: Life) -> None:
    """Train all stages that are left to their ends, in a single attempt each."""
    while not life.status.is_true("Complete"):
        life.reconcile()
        life.now += HOUR  # also a pause before a retry is over by then
        life.reconcile()
        if life.live is not None:
            life.end(None)
        life.reconcile()


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples(example: str, told: list[Life]) -> None:
    """All MACs, GPU seconds and money of a chain that is preempted, evicted and edited."""
    chance, life = random.Random(example), life_of(example, nodes=2)
    told.append(life)
    for _ in range(40):
        life.reconcile()
        if life.live is not None:
            chance.choice([life.evict, lambda: life.train(chance), lambda: life.end(F.PREEMPTED)])()
    life.reconcile()
    right(life)
    finish(life)
    right(life)
    before = life.status.total
    name = life.chain.spec.stages[-1].name
    life.edit(**{f"spec.stages[{len(life.chain.spec.stages) - 1}].name": "renamed"})
    life.reconcile()
    assert life.status.total == before and life.status.is_true("Complete")
    assert [stage.name for stage in life.status.removed] == [name]
    price = before.gpu_seconds / 3600 * 2.21
    assert float(before.cost or 0) == pytest.approx(price, abs=1)


def largest(**changes: Any) -> dict[str, Any]:
    """A chain of the most stages, with 1e21 MACs in each of them and more."""
    shapes = [config(vision={"layers": 2 + n, "width": 2048, "head_width": 64}) for n in range(32)]
    stages = [
        {"name": f"stage-of-the-n{n:02}", "modelConfig": shape, "epochs": 32}
        for n, shape in enumerate(shapes)
    ]
    body = {
        "metadata.name": "a-chain-of-24-characters",
        "metadata.namespace": "n" * 63,
        "spec.stages": stages,
        "spec.data.train.samples": 99_999_999_999,
        "spec.recipe.globalBatchSize": 65_536,
        "spec.data.train.shards": "/data/train-{00000..99999}.tar",
    }
    return with_changes({**body, **changes})


def test_a_chain_of_32_stages_on_256_nodes(told: list[Life]) -> None:
    """More than 1e21 MACs a stage: the total is beyond any integer of an API server."""
    life = life_with(largest(), MOST_NODES)
    told.append(life)
    life.reconcile()
    for _ in range(3):
        life.train(random.Random(0))
        life.reconcile()
        life.evict()
        life.reconcile()
    finish(life)
    right(life)
    assert min(stage.macs for stage in life.status.stages) > 1e21
    assert life.status.total.macs > 2**64
    assert len(life.status.stages) == MOST_STAGES


@pytest.mark.sweep(1)
@pytest.mark.parametrize(("nodes", "evictions"), [(8, 500), (MOST_NODES, 80)])
def test_many_evictions(nodes: int, evictions: int, told: list[Life]) -> None:
    """Each start counts from 0. `test_ledger.py` has 500 evictions of 256 pods."""
    chance, life = random.Random(nodes), life_of("swin-cc3m", nodes)
    told.append(life)
    life.reconcile()
    for n in range(evictions):
        life.train(chance)
        if n % 10 == 0:
            life.reconcile()
        life.evict()
        life.reconcile()
    right(life)
    life.end(None)
    life.reconcile()
    right(life)
    assert life.status.stages[0].state is State.SUCCEEDED


def test_a_history_of_20_days(told: list[Life]) -> None:
    """A price that changes each day, preemptions, edits that are taken back, a stage that is
    renamed, and hours in which nothing happens.
    """
    chance, life = random.Random(20), life_of("vit-cc3m", nodes=4)
    told.append(life)
    cost, price = 0.0, 2.21
    for hour in range(20 * 24):
        before = life.gpu_seconds
        life.reconcile()
        if hour % 24 == 5:
            life.edit(**{"spec.recipe.seed": hour // 24 % 3})
        elif hour % 24 == 6 and life.live is not None:
            life.end(F.PREEMPTED)
        elif hour == 200:
            life.edit(**{"spec.stages[2].name": "other"})
        life.now += HOUR
        life.reconcile()
        cost += (life.gpu_seconds - before) / 3600 * price
        if hour % 24 == 23:
            price = chance.choice([1.5, 2.21, 3.75])
            life.price = str(price)
    right(life)
    assert float(life.status.total.cost or 0) == pytest.approx(cost, rel=1e-3)
    assert sum(s.attempt_count for s in life.status.stages) > 20


def full_stage(n: int, nodes: int) -> StageStatus:
    """A stage with the longest lists and texts that a status may hold."""
    text = "é" * MESSAGE_LENGTH
    spent = Spent(macs=10**23 + n, gpu_seconds=123456789.123, seconds=9876543.21, cost="9876543.21")
    attempts = [
        AttemptStatus(
            name=f"a-chain-of-24-characters-stage-of-the-n{n:02}-a{990 + k}",
            number=990 + k,
            input_digest="0" * 64,
            runner="PyTorchJob",
            state=State.FAILED,
            failure=F.CORRUPT_PREDECESSOR,
            message=text,
            uid="u" * 36,
            macs=10**21 + k,
            gpu_seconds=12345678.123,
            cost="1234567.89",
            node="n" * 63,
            fault="LaunchFailure",
            checkpoint_step=10**9,
            started_at="2026-01-01T00:00:00Z",
            finished_at="2026-01-01T00:00:00Z",
            gone=Spent(seconds=1234567.891),
        )
        for k in range(KEPT_ATTEMPTS)
    ]
    if nodes:
        pods = {
            f"{pod:036}": PodTime(started=1.7e9 + pod, gpus=8, first=pod == 0)
            for pod in range(nodes)
        }
        attempts[-1] = attempts[-1].changed(
            finished_at=None, pods=pods, price="2.21", priced_seconds=1e8, priced_cost="9876543.21"
        )
    before = [SpentAt(input_digest=f"{k:064}", spent=spent) for k in range(MOST_DIGESTS)]
    stage = StageStatus(
        name=f"stage-of-the-n{n:02}",
        state=State.RUNNING if nodes else State.FAILED,
        attempts=attempts,
        attempt_count=999,
        input_digest="0" * 64,
        last_digest="1" * 64,
        cache="Miss",
        epochs=32,
        spent=spent,
        trained=spent,
        trained_before=before,
        macs=10**23,
        gpu_seconds=1e10,
        cost="9999999999.99",
        planned_macs=10**22,
        retried=dict.fromkeys(F, 999),
        results={f"evaluation-of-the-number-{k}": "41.20" for k in range(8)},
    )
    return explained(stage, Reason(Code.CLAIM_MISSING, "claim", "é" * 2000))


@pytest.mark.parametrize("nodes", [0, MOST_NODES])
@pytest.mark.parametrize("stages", [3, MOST_STAGES])
def test_the_largest_status(stages: int, nodes: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Every list is full. The newest attempt of each stage and the whole ledger stay."""
    body = largest()
    body["metadata"]["generation"] = 1
    body["spec"]["stages"] = body["spec"]["stages"][:stages]
    full = [full_stage(n, nodes if n == 0 else 0) for n in range(stages)]
    ledgers = [removed(full_stage(n, 0)) for n in range(MOST_REMOVED)]
    avoid = [AvoidedNode(node="n" * 253, until=1.7e9, fault="EccError")] * MOST_AVOIDED
    chain, retry = ModelChain.model_validate(body), "r" * 63
    status = completed(chain, ChainStatus(), full, retry, 1.7e9, avoid, ledgers)
    stored = through_a_server(status.model_dump(mode="json", by_alias=True, exclude_none=True))
    assert list(violations(stored, SCHEMA)) == []
    size = len(json.dumps(stored, ensure_ascii=False, separators=(",", ":")).encode())
    with capsys.disabled():
        print(f"\n[size] the largest status, {stages} stages, {nodes} nodes: {size} bytes", end="")
    assert size <= (MAX_BYTES if stages < MOST_STAGES and not nodes else LARGEST)
    for kept, was in zip([*status.stages, *status.removed], [*full, *ledgers], strict=True):
        assert kept.spent == was.spent and kept.attempts[-1].number == was.attempts[-1].number
        assert kept.attempts[-1].pods == was.attempts[-1].pods
    again = completed(
        ModelChain.model_validate(body),
        status,
        status.stages,
        "r" * 63,
        1.7e9,
        avoid,
        status.removed,
    )
    assert again == status, "a status that was shortened is not shortened further"


def test_100_000_shards_stay_small(told: list[Life]) -> None:
    """Inputs, task and record hold a digest of the list, and not the list."""
    body = largest()
    chain = ModelChain.model_validate(body)
    check(chain)
    inputs = stage_inputs(chain.spec, 0, epochs=32, fingerprint=None, predecessor=None)
    assert inputs["data"]["count"] == MAX_SHARDS and len(json.dumps(inputs)) < 2000
    life = life_with(body)
    told.append(life)
    life.reconcile()
    assert max(life.written) < MAX_BYTES
    digest = digest_of(inputs)
    record = StageArtifactSpec(
        chain=chain.metadata.name,
        stage=chain.spec.stages[0].name,
        model="inline",
        input_digest=digest,
        artifact_digest=digest,
        manifest_digest=digest,
        path=f"{digest}/artifact",
        claim_name="artifacts",
        claim_uid="u" * 36,
        image="registry.example/trainer@sha256:" + "0" * 64,
        epochs=32,
        inputs=inputs,
        steps=10**9,
        macs=10**22,
        seconds=1e8,
        gpu_seconds=1e9,
        cost="123456789.12",
        metrics={"top1": "41.20"},
        attempt=next(iter(life.runs)),
        finished_at="2026-01-01T00:00:00Z",
    )
    stored = through_a_server(record.model_dump(mode="json", by_alias=True, exclude_none=True))
    assert list(violations(stored, RECORD, "spec")) == []


def test_idle_chains_write_nothing(told: list[Life]) -> None:
    life = life_of("vit-cc3m", nodes=MOST_NODES)
    told.append(life)
    life.reconcile()
    life.now += 45.0
    life.reconcile()
    written = len(life.written)
    for _ in range(20):
        life.now += 1.0
        life.reconcile()
    assert len(life.written) <= written + 1, "at most once a minute while nothing but time goes by"
    life.edit(**{"spec.suspend": True})
    life.reconcile()
    life.end(F.PREEMPTED)
    life.reconcile()
    written = len(life.written)
    for _ in range(20):
        life.now += DAY
        assert life.reconcile().again is None
    assert len(life.written) == written
