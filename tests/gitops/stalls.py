"""A chain for each reason for which a person has to act, as the operator writes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lab import NAMESPACE, Lab, success
from playing import EVALUATION, Family, complete, gated, packing, phase, seen, shown
from podshapes import ended, running, word
from specs import with_changes
from stagelife import beside_a_sidecar

from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import ModelChain
from modelchain.api.status import AvoidedNode, ChainStatus
from modelchain.decide.decide import decide
from modelchain.decide.observed import Observed, Seen
from modelchain_operator.api.kube import (
    ARTIFACTS,
    CHAINS,
    CLAIMS,
    JOBS,
    Forbidden,
    NotFound,
    Object,
)
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS

NOW = 1_790_000_000.0

# -- failed ----------------------------------------------------------------------------------------


@phase("failed: UserError")
def fails() -> Object:
    return Family().trains().ends(word("Failed", "UserError", "no such shard")).shown


@phase("failed: Error, without a retry left")
def fails_at_last() -> Object:
    return Family(**{"spec.retry": {"maxRetries": 0}}).trains().ends(word()).shown


@phase("failed: BudgetExceeded, by `onExceed: Fail`")
def fails_for_the_budget() -> Object:
    return over_budget("Fail")


@phase("failed, a retry is asked for")
def is_tried_again() -> Object:
    life = Family().trains().ends(word("Failed", "UserError", "no such shard"))
    asked = {"modelchain.dev/retry": "2026-09-01T02:00:00Z"}
    life.edit(0, **{"metadata.annotations": asked})
    life.look(10)
    return life.shown


# -- the gate and the budget -----------------------------------------------------------------------


@phase("stalled: GateMissed")
def misses() -> Object:
    return seen(gated("abc"))


@phase("stalled: BaselineFailed")
def has_no_baseline() -> Object:
    gate = {"metric": "top1", "train": ["b"]}
    lab = Lab()
    lab.apply(
        stages="ab",
        **{
            "spec.evaluation": [EVALUATION],
            "spec.gate": gate,
            "spec.retry": {"maxRetries": 0},
        },
    )
    lab.passes()
    lab.finish("family-a-a1")
    lab.passes(count=2)
    lab.end("family-b-b1", None, code=1)
    return seen(lab)


@phase("stalled: BudgetExceeded")
def exceeds() -> Object:
    return over_budget("Suspend")


def over_budget(on_exceed: str) -> Object:
    """The first stage has spent more than the budget."""
    life = Family(**{"spec.budget": {"cost": "50", "onExceed": on_exceed}}).finishes()
    life.look(60)
    return life.shown


@phase("stalled: NoPrice")
def has_no_price() -> Object:
    return Family(**{"spec.budget": {"cost": "20"}, "spec.runner.nodePool": "free"}).shown


# -- the spec, the status --------------------------------------------------------------------------


@phase("stalled: InvalidSpec")
def is_invalid() -> Object:
    lab = Lab()
    lab.apply(stages="ab", **{"spec.stages[1].name": "a"})
    return seen(lab)


@phase("stalled: InvalidSpec, after it was complete")
def becomes_invalid() -> Object:
    life = complete()
    life.edit(2, **{"spec.stages[1].name": "vit-t"})
    life.look_on()
    return life.shown


@phase("stalled: StatusUnreadable")
def is_unreadable() -> Object:
    """A newer version has written the status."""
    life = Family().trains()
    chain = life.kube.objects[CHAINS.plural, "vit"]
    chain["status"]["stages"][0]["state"] = "Distilling"
    life.kube.put(CHAINS, chain)
    life.look_on()
    return life.shown


# -- what must be there ----------------------------------------------------------------------------


@phase("stalled: ClaimMissing")
def lacks_its_claim() -> Object:
    lab = Lab()
    lab.apply(stages="ab", **{"spec.storage": {"claimName": "families"}})
    return seen(lab)


@phase("stalled: ClaimTaken")
def finds_another_claim() -> Object:
    lab = Lab()
    meta = {"name": "family-artifacts", "namespace": NAMESPACE}
    lab.kube.put(CLAIMS, {"metadata": meta | {"labels": {"modelchain.dev/chain": "another"}}})
    lab.apply(stages="ab")
    return seen(lab)


@phase("stalled: RunnerMissing")
def lacks_its_runner() -> Object:
    lab = Lab()
    found = lab.kube.list

    async def listed(resource: Any, *rest: Any, **more: Any) -> list[Object]:
        if resource == PYTORCHJOBS:
            raise NotFound("the server could not find the requested resource", code=404)
        return await found(resource, *rest, **more)

    lab.kube.list = listed  # type: ignore[method-assign]
    lab.apply(stages="ab")
    return seen(lab)


@phase("stalled: DataFailed")
def lacks_packed_data() -> Object:
    return seen(packing("Failed"))


@phase("stalled: IndexFailed")
def lacks_an_index() -> Object:
    lab = Lab()
    lab.kube.indexes_at_once = False
    lab.apply(stages="ab")
    lab.passes()
    [name] = lab.names(JOBS)
    job = lab.get(JOBS, name)
    failed = [{"type": "Failed", "status": "True", "reason": "DeadlineExceeded"}]
    lab.kube.put(JOBS, job | {"status": {"conditions": failed}})
    return seen(lab)


# -- artifacts and records -------------------------------------------------------------------------


@phase("stalled: ArtifactMissing")
def lost_its_artifact() -> Object:
    lab = trained()
    lab.drop(CHAINS, "family")
    lab.drop(CLAIMS, "family-artifacts")
    lab.claim("family-artifacts", uid="another")
    lab.restart()
    lab.apply(stages="ab", uid="made-again")
    return seen(lab)


@phase("stalled: DigestConflict")
def conflicts() -> Object:
    lab = trained()
    [record] = lab.records()
    lab.kube.put(ARTIFACTS, record | {"spec": record["spec"] | {"inputDigest": "f" * 64}})
    lab.restart()
    return seen(lab)


def trained() -> Lab:
    """A chain of one stage is complete."""
    lab = Lab()
    lab.apply()
    lab.passes()
    lab.finish("family-a-a1")
    lab.passes(count=2)
    return lab


@phase("stalled: VerifyUnanswered")
def is_not_verified() -> Object:
    life = Family().trains().ends(code=0)
    life.verify_pod(beside_a_sidecar(ended(code=1)))
    life.look(10)
    return life.shown


@phase("stalled: NameTaken")
def finds_its_name_taken() -> Object:
    """Another client made a Job of the name that the verify Job should have."""
    lab = Lab()
    lab.apply(stages="ab")
    lab.passes()
    meta = {"name": "family-a-a1-verify", "namespace": NAMESPACE}
    lab.kube.put(JOBS, {"kind": "Job", "metadata": meta, "spec": {}})
    lab.end("family-a-a1")
    return seen(lab)


# -- jobs, pods and nodes --------------------------------------------------------------------------


@phase("stalled: SuspendedByAnother")
def is_suspended_by_another() -> Object:
    life = Family()
    life.pods(running(start=160, created=100))
    life.look(200)
    life.pods()
    life.suspend_job(True)
    life.look(200)
    return life.shown


def observed(**seen: Any) -> Object:
    """What `decide` writes for a new chain, of which this was read."""
    meta = {"name": "family", "namespace": "team", "uid": "family-uid", "generation": 1}
    chain = with_changes({"metadata": meta})
    known: dict[str, Any] = {
        "status": ChainStatus(),
        "artifact": lambda digest: None,
        "attempt": lambda name: Seen(live=False, started=False),
        "records": True,
    }
    status = decide(ModelChain.model_validate(chain), Observed(**known | seen), NOW).status
    return shown(chain | {"status": status.model_dump(mode="json", by_alias=True)})


@phase("stalled: NodeLost")
def waits_for_a_lost_node() -> Object:
    stuck = Reason(Code.NODE_LOST, "n1", "pod vit-vit-t-a1-master-0 should have ended on node n1")
    return observed(live=frozenset({"vit-vit-t-a1"}), stuck=stuck)


@phase("stalled: OrphanedJob")
def finds_an_orphan() -> Object:
    message = "job family-vit-t-a1 of a deleted chain may train the same stage"
    taken = Reason(Code.ORPHANED_JOB, "family-vit-t-a1", message)
    return observed(obstacle=taken)


@phase("stalled: SameDeviceError")
def distrusts_all_nodes() -> Object:
    alike = [AvoidedNode(node=name, until=2 * NOW, fault="NoDevice") for name in ("n1", "n2")]
    return observed(status=ChainStatus(avoid=alike, observed_generation=1))


# -- what the API server refuses -------------------------------------------------------------------


def refused(verb: str, kind: str, before: Callable[[Lab], None], **changes: Any) -> Object:
    """Such a write was refused for more than a minute, from what comes before it."""
    lab = Lab()
    lab.claim("shared")
    lab.apply(stages="ab", **changes)
    before(lab)
    lab.kube.refuse[verb, kind] = Forbidden("403 exceeded quota: few", code=403)
    for _ in range(3):
        lab.passes()
        lab.now += 40
    return seen(lab)


def nothing(lab: Lab) -> None:
    """It is refused from the beginning."""


def ended_well(lab: Lab) -> None:
    lab.passes()
    lab.end("family-a-a1", success())


def ended_without_a_word(lab: Lab) -> None:
    lab.passes()
    lab.end("family-a-a1")


def suspended(lab: Lab) -> None:
    lab.passes()
    lab.apply(stages="ab", **{"spec.suspend": True})


SHARED = {"spec.storage": {"claimName": "shared"}}
QUEUED = {"spec.runner.queueName": "vision"}
REFUSED: dict[Code, tuple[str, str, Callable[[Lab], None], dict[str, Any]]] = {
    Code.CLAIM_REFUSED: ("create", "persistentvolumeclaims", nothing, {}),
    Code.SHARE_REFUSED: ("create", "leases", nothing, SHARED),
    Code.INDEX_REFUSED: ("create", "jobs", nothing, {}),
    Code.LAUNCH_REFUSED: ("create", "pytorchjobs", nothing, {}),
    Code.RELEASE_REFUSED: ("patch", "pytorchjobs", nothing, QUEUED),
    Code.QUEUE_REQUIRED: ("patch", "pytorchjobs", nothing, {}),
    Code.RECORD_REFUSED: ("create", "stageartifacts", ended_well, {}),
    Code.VERIFY_REFUSED: ("create", "jobs", ended_without_a_word, {}),
    Code.DELETE_REFUSED: ("delete", "pytorchjobs", suspended, {}),
}
for code, (verb, kind, before, changes) in REFUSED.items():
    phase(f"stalled: {code}")(partial(refused, verb, kind, before, **changes))


@phase("stalled: PodsForbidden")
def lacks_its_pods() -> Object:
    life = Family()
    message = 'Error creating: pods "vit-vit-t-a1-master-0" is forbidden: exceeded quota: few'
    life.event("FailedCreatePod", message)
    life.look(120)
    return life.shown
