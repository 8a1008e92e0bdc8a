"""A chain in every phase in which no person has to act, as the operator writes it."""

from __future__ import annotations

from typing import Any

import yaml
from lab import Lab
from playing import (
    EVALUATION,
    REPOSITORY,
    SECOND,
    Family,
    complete,
    finish,
    gated,
    packing,
    phase,
    shown,
)
from playing import seen as after_passes
from podshapes import pending, unschedulable, word
from specs import DELETE

from modelchain.api.reasons import Code
from modelchain_operator.api.kube import CHAINS, Forbidden, Object

# -- before it trains ------------------------------------------------------------------------------


@phase("applied, not seen yet")
def applied() -> Object:
    lab = Lab()
    lab.apply(stages="ab")
    crd = yaml.safe_load((REPOSITORY / "crds" / "modelchains.yaml").read_text())
    [version] = crd["spec"]["versions"]
    status = version["schema"]["openAPIV3Schema"]["properties"]["status"]["default"]
    return shown(lab.get(CHAINS, "family") | {"status": status})


@phase("its claim is made")
def makes_its_claim() -> Object:
    lab = Lab()
    lab.apply(stages="ab")
    lab.passes()
    [first] = [s for s in lab.statuses if s["stages"][0]["reasonCode"] == Code.MAKES_CLAIM]
    return shown(lab.get(CHAINS, "family") | {"status": first})


@phase("its data is packed")
def packs() -> Object:
    return after_passes(packing("Suspended"))


@phase("its data is indexed")
def indexes() -> Object:
    lab = Lab()
    lab.kube.indexes_at_once = False
    lab.apply(stages="ab")
    return after_passes(lab)


@phase("another chain trains the same stage")
def shared() -> Object:
    lab = Lab()
    lab.claim("shared")
    for name in ("other", "family"):
        lab.apply(name, stages="ab", **{"spec.storage": {"claimName": "shared"}})
        lab.passes(name, 3)
    return after_passes(lab)


@phase("in a queue")
def queued() -> Object:
    lab = Lab()
    lab.apply(stages="ab", **{"spec.runner.queueName": "vision"})
    return after_passes(lab)


@phase("launched")
def launched() -> Object:
    return Family().shown


@phase("no node fits")
def waits_for_a_node() -> Object:
    life = Family()
    life.pods(unschedulable())
    life.look(60)
    return life.shown


@phase("its pods start")
def starts() -> Object:
    life = Family()
    life.pods(pending(created=50))
    life.look(60)
    return life.shown


# -- while it trains -------------------------------------------------------------------------------


@phase("trains")
def trains() -> Object:
    return Family().trains().shown


@phase("tries again after a failure")
def tries_again() -> Object:
    return Family().trains().ends(word()).shown


@phase("resumes after a disruption")
def resumes_after_a_disruption() -> Object:
    return Family().trains().ends(word("Failed", "Preempted", checkpointStep=4000), code=75).shown


@phase("its artifact is hashed again")
def verifies() -> Object:
    return Family().trains().ends(code=0).shown


@phase("between two stages")
def between() -> Object:
    return Family().finishes().shown


@phase("the second stage trains")
def trains_the_second() -> Object:
    return Family().finishes().trains(SECOND, at=11_000).shown


@phase("a baseline trains first")
def trains_a_baseline() -> Object:
    return after_passes(gated(baseline={}, train=["b"]))


@phase("the gate waits for a metric")
def measures_for_the_gate() -> Object:
    lab = gated("abc", percent=50)
    other = {"name": "other", "kind": "Retrieval", "shards": "/data/other.tar"}
    gate = {"metric": "other", "baseline": {"b": "50", "c": "50"}}
    lab.apply(stages="abc", **{"spec.evaluation": [EVALUATION, other], "spec.gate": gate})
    return after_passes(lab)


@phase("a round with more epochs begins")
def relaxes() -> Object:
    gate = {"metric": "top1", "baseline": {"b": "50", "c": "50"}, "onMiss": "Relax"}
    changes: dict[str, Any] = {f"spec.stages[{index}].epochs": DELETE for index in (1, 2)}
    changes |= {"spec.allocation": {"targetAcceleration": "1.5"}, "spec.gate": gate}
    lab = Lab()
    lab.apply(stages="abc", **{"spec.evaluation": [EVALUATION]}, **changes)
    lab.passes()
    finish(lab, "a-a1", 40)
    finish(lab, "b-a1", 48.5)
    return shown(lab.get(CHAINS, "family"))


# -- edited, suspended -----------------------------------------------------------------------------


@phase("edited while it trains, not seen yet")
def edited() -> Object:
    life = Family().trains()
    life.edit(2, **{"spec.stages[1].rerun": "again"})
    return life.shown


@phase("edited while it trains")
def retrains_the_running_stage() -> Object:
    life = Family().trains()
    life.edit(2, **{"spec.stages[0].rerun": "again"})
    life.look(10)
    return life.goes().shown


@phase("`suspend: true`, not seen yet")
def to_be_suspended() -> Object:
    life = Family().trains()
    life.edit(2, **{"spec.suspend": True})
    return life.shown


@phase("stops at a checkpoint")
def stops() -> Object:
    return Family().stopping().shown


@phase("suspended")
def suspended() -> Object:
    return Family().stopping().goes().shown


@phase("`suspend: false`, not seen yet")
def to_be_resumed() -> Object:
    life = Family().stopping().goes()
    life.edit(3, **{"spec.suspend": False})
    return life.shown


@phase("resumed")
def resumed() -> Object:
    life = Family().stopping().goes()
    life.edit(3, **{"spec.suspend": False})
    life.look(10)
    return life.shown


# -- at its end ------------------------------------------------------------------------------------


@phase("complete")
def completes() -> Object:
    return complete().shown


@phase("complete, a metric could not be measured")
def lacks_a_metric() -> Object:
    lab = Lab()
    lab.apply()
    lab.passes()
    lab.finish("family-a-a1")
    lab.passes(count=2)
    lab.apply(**{"spec.evaluation": [EVALUATION]})
    lab.kube.refuse["create", "jobs"] = Forbidden("403 exceeded quota: few", code=403)
    lab.passes(count=3)
    return after_passes(lab)


@phase("complete, edited, not seen yet")
def edited_after_its_end() -> Object:
    life = complete()
    life.edit(2, **{"spec.stages[1].rerun": "again"})
    return life.shown


@phase("complete, edited, retrains")
def retrains() -> Object:
    life = complete()
    life.edit(2, **{"spec.stages[1].rerun": "again"})
    life.look(10)
    return life.shown


@phase("complete, then suspended")
def suspended_after_its_end() -> Object:
    life = complete()
    life.edit(2, **{"spec.suspend": True})
    life.look(10)
    return life.shown


@phase("being deleted")
def deleted() -> Object:
    found = Family().trains().shown
    found["metadata"] |= {"deletionTimestamp": "2026-09-01T02:00:00Z"}
    return found
