"""`python benchmarks/watch_picture.py`: draw what `modelchain watch` shows as docs/watch.svg.

The chain is examples/vit-cc3m.yaml with a price and a budget. It has not been trained: what it has
spent is what its plan says.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

from rich.console import Console

from modelchain.api.contracts import Progress
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import ModelChain
from modelchain.api.status import (
    AttemptStatus,
    ChainStatus,
    ExpenseFields,
    PodTime,
    StageStatus,
    State,
)
from modelchain.api.uses import Uses
from modelchain.decide.budget import as_planned
from modelchain.decide.conditions import completed
from modelchain.decide.transitions import explained
from modelchain.io.load import load_chain
from modelchain.plan.plan import StagePlan, plan
from modelchain.plan.pools import NodePool
from modelchain.plan.prices import kept
from modelchain_operator.api.kube import Object
from modelchain_operator.cli.tree import tree, watched_of

WIDTH = 112
REPOSITORY = Path(__file__).parent.parent
PRICE = {"perGpuHour": "2.50", "currency": "USD", "source": "made up"}
POOL = NodePool.model_validate({"gpu": "A100", "gpusPerNode": 8, "price": PRICE})
NOW = time.time()
HOUR = 3600


def at(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat()


def spent(planned: StagePlan, part: float) -> ExpenseFields:
    """This part of what is planned for a stage."""
    assert planned.gpu_hours is not None and planned.cost is not None
    seconds = planned.gpu_hours * HOUR * part
    cost = kept(Decimal(planned.cost) * Decimal(str(part)))
    uses = Uses(productive=round(seconds * 1000))
    return ExpenseFields(
        macs=int(planned.macs * part), gpu_seconds=seconds, gpu_milliseconds=uses, cost=cost
    )


def attempt(planned: StagePlan, begun: float, part: float, nodes: int = 0) -> AttemptStatus:
    """The stage's first attempt, with this part of its work. It runs if it has nodes."""
    pods = {
        f"uid-{rank}": PodTime(scheduled=begun, started=begun, gpus=8, first=rank == 0)
        for rank in range(nodes)
    }
    made = AttemptStatus(
        name=f"vit-cc3m-{planned.name}-a1",
        number=1,
        input_digest=f"{planned.name[-1]}" * 64,
        runner="PyTorchJob",
        pool="a100-80gb",
        uid="job",
        state=State.RUNNING if nodes else State.SUCCEEDED,
        started_at=at(begun),
        finished_at=None if nodes else at(begun + 1),
        checkpoint_step=24_000 if nodes else 0,
        pods=pods,
    )
    return made.changed(**spent(planned, part))


def stage(planned: StagePlan, *attempts: AttemptStatus, part: float, top1: str = "") -> StageStatus:
    made = StageStatus(name=planned.name, plan=as_planned(planned), attempts=list(attempts))
    if not attempts:
        return made.changed(alone=as_planned(planned.individual))
    digest = attempts[-1].input_digest
    return made.changed(
        state=attempts[-1].state,
        input_digest=digest,
        last_digest=digest,
        attempt_count=1,
        alone=as_planned(planned.individual),
        results={"imagenet1k-top1": top1} if top1 else {},
        transition_seconds=None if planned.name == "vit-t" else 0.8,
        **spent(planned, part),
    )


def stages(chain: ModelChain) -> list[StageStatus]:
    """Two of the stages have finished, the third one has done half of its steps."""
    tiny, small, base, large = plan(chain, "analytic", {"a100-80gb": POOL}).stages
    progress = Progress(step=24_197, steps=48_394, samples_per_second=4_012, eta_seconds=6_176)
    trains = stage(base, attempt(base, NOW - 2 * HOUR, 0.5, nodes=2), part=0.5)
    waits = Reason(Code.WAITS_FOR_STAGE, "vit-b", "waits for stage vit-b")
    return [
        stage(tiny, attempt(tiny, NOW - 9 * HOUR, 1), part=1, top1="33.04"),
        stage(small, attempt(small, NOW - 6 * HOUR, 1), part=1, top1="38.12"),
        explained(
            trains.changed(progress=progress),
            Reason(Code.MISS, message="never trained", never_trained=True),
        ),
        explained(stage(large, part=0), waits),
    ]


def pod(job: str, rank: int) -> Object:
    kind, number = ("master", 0) if rank == 0 else ("worker", rank - 1)
    replica = {"replica-type": kind, "replica-index": str(number)}
    return {
        "metadata": {
            "name": f"{job}-{kind}-{number}",
            "uid": f"uid-{rank}",
            "creationTimestamp": at(NOW - 2 * HOUR),
            "labels": {f"training.kubeflow.org/{key}": value for key, value in replica.items()},
        },
        "spec": {"nodeName": f"gpu-{7 + rank:02d}", "containers": [{"name": "pytorch"}]},
        "status": {"containerStatuses": [{"name": "pytorch", "state": {"running": {}}}]},
    }


def main() -> None:
    chain = load_chain(REPOSITORY / "examples" / "vit-cc3m.yaml")
    body: Object = chain.model_dump(mode="json", by_alias=True, exclude_none=True)
    body["spec"]["budget"] = {"cost": "1000"}
    body["metadata"] |= {"namespace": "vision", "generation": 3, "creationTimestamp": at(NOW)}
    seen = ModelChain.model_validate(body)
    status = completed(seen, ChainStatus(), stages(seen), None, NOW, currency="USD")
    body["status"] = status.model_dump(mode="json", by_alias=True)
    pods = [pod("vit-cc3m-vit-b-a1", rank) for rank in range(2)]
    console = Console(record=True, width=WIDTH, file=Path("/dev/null").open("w"))  # noqa: SIM115
    console.print("$ modelchain watch vit-cc3m -n vision", style="bold", highlight=False)
    console.print(tree(watched_of(body, pods, NOW), WIDTH))
    console.save_svg(str(REPOSITORY / "docs" / "watch.svg"), title="ModelChain")


if __name__ == "__main__":
    main()
