"""Records are named by claim and inputs: which one is a hit, which is missed or ignored."""

from __future__ import annotations

import copy

import pytest
from lab import Lab

from modelchain.api.artifact import former_artifact_name, stage_artifact_name
from modelchain.api.reasons import Code
from modelchain.api.status import State
from modelchain_operator.api.kube import ARTIFACTS, CHAINS, CLAIMS, Object
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS

SHARED = {"spec.storage": {"claimName": "shared"}}
TO_DELETE = "to train the stage again: kubectl delete sart"


def trained(lab: Lab, name: str = "family", **changes: object) -> Object:
    """A chain of one stage that is complete; its record."""
    lab.apply(name, **changes)
    lab.passes(name)
    lab.finish(f"{name}-a-a1")
    lab.passes(name, 2)
    assert lab.status(name).is_true("Complete")
    [record] = [r for r in lab.records() if r["spec"]["chain"] == name]
    return record


def as_before(lab: Lab, record: Object) -> Object:
    """The record under the name that older versions gave it."""
    lab.drop(ARTIFACTS, record["metadata"]["name"])
    meta = record["metadata"] | {"name": former_artifact_name(record["spec"]["inputDigest"])}
    return lab.kube.put(ARTIFACTS, record | {"metadata": meta})


def test_a_record_has_the_name_and_the_labels_that_find_it() -> None:
    record = trained(Lab())
    digest, claim = record["spec"]["inputDigest"], record["spec"]["claimUID"]
    assert record["metadata"]["name"] == stage_artifact_name(claim, digest)
    assert record["metadata"]["labels"]["modelchain.dev/input-digest"] == digest[:63]
    # SHA-256 of "claim/" and 64 times "0", by sha256sum.
    assert stage_artifact_name("claim", "0" * 64) == "sa-7060795021e65f27ab8b"


def test_two_chains_with_equal_stages_on_claims_of_their_own_both_finish() -> None:
    lab = Lab()
    lab.apply("one")
    lab.passes("one")
    lab.apply("two")
    lab.passes("two")
    assert lab.names(PYTORCHJOBS) == ["one-a-a1", "two-a-a1"], "neither waits for the other"
    for name in ("one", "two"):
        lab.finish(f"{name}-a-a1")
        lab.passes(name, 2)
        assert lab.status(name).is_true("Complete")
    one, two = lab.records()
    assert one["spec"]["inputDigest"] == two["spec"]["inputDigest"]
    assert {one["spec"]["claimName"], two["spec"]["claimName"]} == {
        "one-artifacts",
        "two-artifacts",
    }


def test_chains_on_one_claim_still_share_a_record() -> None:
    lab = Lab()
    lab.claim("shared")
    trained(lab, "one", **SHARED)
    lab.apply("two", **SHARED)
    lab.passes("two")
    assert lab.status("two").is_true("Complete") and len(lab.records()) == 1
    assert lab.names(PYTORCHJOBS) == ["one-a-a1"]


def test_a_record_of_an_older_version_is_a_hit_on_its_claim_only() -> None:
    lab = Lab()
    old = as_before(lab, trained(lab, "one"))
    lab.restart()
    lab.apply("one", **{"metadata.annotations": {"note": "an edit"}})
    lab.passes("one")
    assert lab.status("one").is_true("Complete") and lab.records() == [old]
    lab.apply("two")
    lab.passes("two")
    assert lab.names(PYTORCHJOBS) == ["one-a-a1", "two-a-a1"]
    lab.finish("two-a-a1")
    lab.passes("two", 2)
    assert lab.status("two").is_true("Complete") and len(lab.records()) == 2


def test_a_record_that_an_older_operator_made_just_before_an_upgrade_is_found() -> None:
    """That operator ended between the record and the status, and the attempt is still open."""
    lab = Lab()
    lab.apply()
    lab.passes()
    del lab.get(PYTORCHJOBS, "family-a-a1")["metadata"]["labels"]["modelchain.dev/claim-uid"]
    lab.finish("family-a-a1")
    before = copy.deepcopy(lab.get(CHAINS, "family"))
    lab.passes()
    [record] = lab.records()
    old = as_before(lab, record)
    lab.kube.put(CHAINS, before)
    lab.restart()
    lab.passes(count=2)
    assert lab.status().is_true("Complete") and lab.records() == [old]


@pytest.mark.parametrize("former", [False, True], ids=["its name", "the name of before"])
@pytest.mark.parametrize("again", [False, True], ids=["the claim is gone", "it was replaced"])
def test_a_claim_that_was_replaced_is_not_trained_on_unasked(again: bool, former: bool) -> None:
    lab = Lab()
    record = trained(lab)
    if former:
        record = as_before(lab, record)
    lab.drop(CLAIMS, "family-artifacts")
    if again:
        lab.claim("family-artifacts", uid="another")
    lab.restart()
    lab.passes(count=2)
    stage, name = lab.stage(), record["metadata"]["name"]
    assert stage.stalled and stage.code is Code.ARTIFACT_MISSING
    assert f"{TO_DELETE} {name} -n team" in stage.message
    assert lab.names(PYTORCHJOBS) == ["family-a-a1"]
    lab.drop(ARTIFACTS, name)
    lab.apply()  # a finished chain trains only what is asked for
    lab.passes(count=2)
    assert lab.names(PYTORCHJOBS) == ["family-a-a1", "family-a-a2"]


def test_a_chain_that_is_made_again_on_another_claim_reports_its_own_record() -> None:
    lab = Lab()
    record = trained(lab)
    lab.drop(CHAINS, "family")
    lab.drop(PYTORCHJOBS, "family-a-a1")
    lab.claim("shared")
    lab.apply(uid="made-again", **SHARED)
    lab.passes(count=2)
    stage = lab.stage()
    assert stage.code is Code.ARTIFACT_MISSING and record["metadata"]["name"] in stage.message
    assert "this chain has claim shared (shared-uid)" in stage.message


def test_a_chain_that_is_made_again_with_another_stage_makes_no_new_claim() -> None:
    """Its first stage was trained on a claim that is gone. A new one would be filled unasked."""
    lab = Lab()
    record = trained(lab)
    lab.drop(CHAINS, "family")
    lab.drop(PYTORCHJOBS, "family-a-a1")
    lab.drop(CLAIMS, "family-artifacts")
    lab.apply(stages="ab", uid="made-again")
    lab.passes(count=3)
    first, second = lab.status().stages
    assert first.stalled and first.code is Code.ARTIFACT_MISSING
    assert record["metadata"]["name"] in first.message and second.code is Code.WAITS_FOR_STAGE
    assert lab.names(CLAIMS) == ["data"] and lab.names(PYTORCHJOBS) == []


def test_a_claim_of_the_same_name_that_other_chains_used_is_reported() -> None:
    lab = Lab()
    lab.claim("shared")
    trained(lab, "one", **SHARED)
    lab.drop(CLAIMS, "shared")
    lab.claim("shared", uid="restored")
    lab.restart()
    lab.apply("two", **SHARED)
    lab.passes("two", 2)
    assert lab.stage("two").code is Code.ARTIFACT_MISSING


def test_a_record_under_another_records_name_is_a_conflict() -> None:
    lab = Lab()
    record = trained(lab)
    other = {**record["spec"], "inputDigest": "f" * 64}
    lab.kube.put(ARTIFACTS, record | {"spec": other})
    lab.restart()
    lab.passes(count=2)
    stage, name = lab.stage(), record["metadata"]["name"]
    assert stage.stalled and stage.code is Code.DIGEST_CONFLICT
    assert f"kubectl delete sart {name} -n team" in stage.message


def test_only_rivals_on_the_same_claim_are_waited_for() -> None:
    lab = Lab()
    lab.claim("shared")
    lab.claim("other")
    lab.apply("one", **SHARED)
    lab.passes("one")
    job = lab.get(PYTORCHJOBS, "one-a-a1")
    template = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    for labels in (job["metadata"]["labels"], template["metadata"]["labels"]):
        assert labels["modelchain.dev/claim-uid"] == "shared-uid"
    lab.apply("two", **{"spec.storage": {"claimName": "other"}})
    lab.passes("two")
    assert "two-a-a1" in lab.names(PYTORCHJOBS)
    lab.apply("three", **SHARED)
    lab.passes("three")
    assert lab.stage("three").code is Code.SHARED_STAGE
    assert lab.stage("three").state is State.QUEUED


def test_a_rival_of_an_older_version_is_waited_for() -> None:
    """Its job does not say on which claim it trains."""
    lab = Lab()
    lab.apply("one")
    lab.passes("one")
    job = lab.get(PYTORCHJOBS, "one-a-a1")
    del job["metadata"]["labels"]["modelchain.dev/claim-uid"]
    lab.apply("two")
    lab.passes("two")
    assert lab.stage("two").code is Code.SHARED_STAGE
    lab.finish("one-a-a1")
    lab.passes("one", 2)
    lab.passes("two", 2)
    assert lab.names(PYTORCHJOBS) == ["one-a-a1", "two-a-a1"]
