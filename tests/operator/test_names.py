"""Names of jobs: two chains whose attempts have the same names, and jobs of deleted chains."""

from __future__ import annotations

from lab import NAMESPACE, Lab, success

from modelchain.api.reasons import Code
from modelchain.api.status import State
from modelchain_operator.api.kube import CHAINS, JOBS, LEASES, Object
from modelchain_operator.explain.explain import explain
from modelchain_operator.explain.read import Situation
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS

SHARED = {"spec.storage": {"claimName": "shared"}}


def clashing(lab: Lab) -> None:
    """Chain `vit` with stage `b-large`, and chain `vit-b` with stage `large`."""
    lab.apply("vit", **{"spec.stages[0].name": "b-large"})
    lab.passes("vit")
    lab.apply("vit-b", **{"spec.stages[0].name": "large", "spec.recipe.seed": 7})
    lab.passes("vit-b", 3)


def test_two_chains_whose_attempts_have_the_same_names_both_finish() -> None:
    lab = Lab()
    clashing(lab)
    assert lab.names(PYTORCHJOBS) == ["vit-b-large-a1", "vit-b-large-a2"]
    passed_over, running = lab.stage("vit-b").attempts
    assert passed_over.state is State.SUSPENDED and passed_over.failure is None
    assert passed_over.message == (
        "PyTorchJob vit-b-large-a1 is chain vit's, so the next attempt takes another number"
    )
    assert running.name == "vit-b-large-a2"
    for chain, job in (("vit", "vit-b-large-a1"), ("vit-b", "vit-b-large-a2")):
        lab.finish(job)
        lab.passes(chain, 2)
        stage = lab.stage(chain)
        assert lab.status(chain).is_true("Complete") and (stage.retries, stage.disruptions) == (
            0,
            0,
        )


def test_nothing_advises_to_delete_the_other_chains_job() -> None:
    lab = Lab()
    clashing(lab)
    said = str(lab.statuses) + str(lab.events.told)
    assert "NameTaken" in said and "delete" not in said


def test_a_job_that_is_no_chains_is_passed_over() -> None:
    lab = Lab()
    meta = {"name": "family-a-a1", "namespace": NAMESPACE}
    spec = {"runPolicy": {"suspend": True}}
    lab.kube.put(PYTORCHJOBS, {"kind": "PyTorchJob", "metadata": meta, "spec": spec})
    lab.apply()
    lab.passes(count=2)
    assert lab.names(PYTORCHJOBS) == ["family-a-a1", "family-a-a2"]


def test_a_verify_job_of_another_chain_is_not_taken_for_ours() -> None:
    """An older version left it, after the job that it belongs to was deleted."""
    lab = Lab()
    lab.apply("vit", **{"spec.stages[0].name": "b-large"})
    lab.passes("vit")
    lab.end("vit-b-large-a1")  # without a last word
    lab.passes("vit", 2)
    theirs = lab.get(JOBS, "vit-b-large-a1-verify")
    lab.drop(PYTORCHJOBS, "vit-b-large-a1")
    lab.apply("vit-b", **{"spec.stages[0].name": "large", "spec.recipe.seed": 7})
    lab.passes("vit-b", 2)
    lab.end("vit-b-large-a1")
    lab.passes("vit-b", 2)
    assert lab.stage("vit-b").stalled and lab.stage("vit-b").code is Code.NAME_TAKEN
    assert lab.get(JOBS, "vit-b-large-a1-verify") == theirs
    lab.drop(JOBS, "vit-b-large-a1-verify")
    lab.passes("vit-b", 2)
    assert lab.stage("vit-b").code is Code.VERIFIES and lab.names(JOBS)


def test_a_verify_job_that_is_made_by_another_client_is_reported_and_kept() -> None:
    lab = Lab()
    lab.apply()
    lab.passes()
    meta = {"name": "family-a-a1-verify", "namespace": NAMESPACE}
    lab.kube.put(JOBS, {"kind": "Job", "metadata": meta, "spec": {}})
    lab.end("family-a-a1")
    lab.passes(count=2)
    stage = lab.stage()
    assert stage.stalled and stage.code is Code.NAME_TAKEN
    assert "family-a-a1-verify is not this chain's" in stage.message
    assert lab.get(JOBS, "family-a-a1-verify")["metadata"].get("labels") is None


def test_a_verify_job_goes_with_the_job_it_belongs_to() -> None:
    """Kubernetes deletes it with its owner, so as many are kept as jobs are."""
    lab = Lab()
    lab.apply()
    lab.passes()
    lab.end("family-a-a1")
    lab.passes(count=2)
    job = lab.get(PYTORCHJOBS, "family-a-a1")
    [owner] = lab.get(JOBS, "family-a-a1-verify")["metadata"]["ownerReferences"]
    assert owner == {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "name": "family-a-a1",
        "uid": job["metadata"]["uid"],
    }


# -- jobs of chains that were deleted --------------------------------------------------------------


def orphaned(lab: Lab, name: str) -> Object:
    """The job after its chain was deleted with `--cascade=orphan`: it has no owner any more."""
    job = lab.get(PYTORCHJOBS, name)
    meta = {**job["metadata"], "ownerReferences": []}
    return lab.kube.put(PYTORCHJOBS, {**job, "metadata": meta})


def made_again(lab: Lab, **changes: object) -> None:
    lab.drop(CHAINS, "family")
    lab.apply(uid="made-again", **changes)
    lab.passes(count=3)


def test_an_orphaned_job_is_named_and_waited_for() -> None:
    lab = Lab()
    lab.apply()
    lab.passes()
    orphaned(lab, "family-a-a1")
    made_again(lab)
    stage = lab.stage()
    assert stage.stalled and stage.code is Code.ORPHANED_JOB
    assert stage.message == (
        "PyTorchJob family-a-a1 has not ended, and chain family, which made it, was deleted; wait"
        " until it has, or: kubectl delete pytorchjob family-a-a1 -n team"
    )
    found = explain(Situation(chain=lab.get(CHAINS, "family"), now=lab.now))
    assert found.reason == Code.ORPHANED_JOB and "family-a-a1" in found.next
    assert lab.names(PYTORCHJOBS) == ["family-a-a1"]
    lab.finish("family-a-a1")
    lab.passes(count=3)
    assert lab.names(PYTORCHJOBS) == ["family-a-a1", "family-a-a2"], "the next number"
    lab.finish("family-a-a2")
    lab.passes(count=2)
    assert lab.status().is_true("Complete")


def test_an_orphaned_job_of_other_inputs_is_named_as_well() -> None:
    lab = Lab()
    lab.apply()
    lab.passes()
    orphaned(lab, "family-a-a1")
    made_again(lab, **{"spec.recipe.seed": 7})
    assert lab.stage().code is Code.ORPHANED_JOB
    lab.drop(PYTORCHJOBS, "family-a-a1")
    lab.passes(count=2)
    assert lab.names(PYTORCHJOBS) == ["family-a-a1"]


def test_a_job_that_goes_with_its_deleted_chain_is_waited_for() -> None:
    """Its owner is gone, so the garbage collector is about to delete it."""
    lab = Lab()
    lab.apply(**{"spec.recipe.seed": 7})
    lab.passes()
    made_again(lab)
    stage = lab.stage()
    assert stage.code is Code.NAME_GOING and not stage.stalled
    lab.drop(PYTORCHJOBS, "family-a-a1")
    lab.passes(count=2)
    assert [a.name for a in lab.stage().attempts] == ["family-a-a1"]
    assert lab.names(PYTORCHJOBS) == ["family-a-a1"]


def test_an_orphaned_job_of_another_chain_on_the_claim_is_named() -> None:
    lab = Lab()
    lab.claim("shared")
    lab.apply("one", **SHARED)
    lab.passes("one")
    lab.apply("two", **SHARED)
    lab.passes("two", 2)
    assert lab.stage("two").code is Code.SHARED_STAGE
    orphaned(lab, "one-a-a1")
    lab.drop(CHAINS, "one")
    lab.passes("two", 2)
    assert lab.stage("two").code is Code.ORPHANED_JOB
    assert "PyTorchJob one-a-a1 has not ended, and chain one" in lab.stage("two").message


def test_a_share_of_a_deleted_chain_is_free() -> None:
    """Its Lease has lost its owner, too, so nothing deletes it."""
    lab = Lab()
    lab.claim("shared")
    lab.apply("one", **SHARED)
    lab.passes("one")
    [lease] = lab.names(LEASES)
    lab.drop(PYTORCHJOBS, "one-a-a1")
    lab.drop(CHAINS, "one")
    lab.apply("two", **SHARED)
    lab.passes("two", 2)
    assert lab.names(LEASES) == [lease] and lab.names(PYTORCHJOBS) == ["two-a-a1"]
    assert lab.get(LEASES, lease)["spec"]["holderIdentity"] == "two"
    lab.end("two-a-a1", success())
    lab.passes("two", 2)
    assert lab.status("two").is_true("Complete") and not lab.names(LEASES)
