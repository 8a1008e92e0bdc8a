"""What a job is made from: sizes, what cannot be made at all, and when a job is made anew."""

from __future__ import annotations

import json
from typing import Any

import pytest
from lab import POOLS, Lab
from specs import with_changes

from modelchain.api.contracts import Task
from modelchain.api.reasons import Code
from modelchain.identity.shards import MAX_SHARDS, paths
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import CHAINS, CLAIMS, Forbidden, Object
from modelchain_operator.runners import template
from modelchain_operator.runners.port import TASK_BYTES
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS
from modelchain_operator.runners.template import task_of

NO = Forbidden("POST /x: 403 no", code=403)

# -- sizes -----------------------------------------------------------------------------------------


def shards(count: int, **changes: Any) -> dict[str, Any]:
    pattern = f"/data/laion/train-{{{0:06}..{count - 1:06}}}.tar"
    return {
        "spec.data.train.shards": pattern,
        "spec.data.train.samples": count * 1000,
        "spec.evaluation": [{"name": "r1", "kind": "Retrieval", "shards": pattern}],
        **changes,
    }


def test_as_many_shards_as_the_spec_allows_fit_into_a_pod() -> None:
    """The pod gets the pattern, and its trainer expands it."""
    lab = Lab()
    lab.apply(stages="abcdefgh"[:4], **shards(MAX_SHARDS))
    lab.passes()
    job = lab.get(PYTORCHJOBS, "family-a-a1")
    task = Task.model_validate(task_of(job))
    assert len(paths(task.data.train.files)) == MAX_SHARDS
    assert len(paths(task.data.evaluation[0].files)) == MAX_SHARDS
    sizes = len(json.dumps(task_of(job))), len(json.dumps(job)), len(json.dumps(lab.statuses[-1]))
    print("task, job and status in bytes:", sizes)
    assert sizes[0] < 4_000 and sizes[1] < 10_000 and sizes[2] < 10_000


def too_large() -> dict[str, Any]:
    """Evaluations that a spec may have, and whose paths take more bytes than a task may have."""
    named = [{"name": f"e{i}", "kind": "Retrieval"} for i in range(16)]
    return {"spec.evaluation": [e | {"shards": f"/data/{'é' * 1000}.tar"} for e in named]}


def test_the_longest_paths_in_ascii_fit() -> None:
    lab = Lab()
    long = f"/data/{'a' * 1014}.tar"
    named = [{"name": f"e{i}", "kind": "Retrieval", "shards": long} for i in range(16)]
    lab.apply(**{"spec.evaluation": named, "spec.data.train.shards": long})
    lab.passes()
    size = len(json.dumps(task_of(lab.get(PYTORCHJOBS, "family-a-a1"))))
    print("a task with the longest paths:", size, "bytes")
    assert size <= TASK_BYTES


# -- what cannot be made ---------------------------------------------------------------------------

UNMAKEABLE: dict[str, tuple[dict[str, Any], str]] = {
    "a task that is too large": (too_large(), "spec.data: the task of stage a takes"),
    "a mount over /tmp": (
        {
            "spec.data.volume": {"claimName": "data", "mountPath": "/tmp/data"},
            "spec.data.train.shards": "/tmp/data/{00..07}.tar",
        },
        "/tmp/data would cover /tmp",
    ),
    "an image without a digest": ({"spec.runner.image": "trainer:1"}, "is not pinned"),
    "a pool that is not there": ({"spec.runner.nodePool": "none"}, "none is no node pool"),
}


@pytest.mark.parametrize(("changes", "said"), UNMAKEABLE.values(), ids=UNMAKEABLE)
def test_what_cannot_be_made_is_said_once(changes: dict[str, Any], said: str) -> None:
    lab = Lab()
    lab.apply(stages="ab", **changes)
    lab.passes()
    stage, stalled, written = lab.stage(), lab.status().condition("Stalled"), len(lab.statuses)
    assert stage.stalled and stage.code is Code.INVALID_SPEC and said in stage.message
    assert stalled is not None and stalled.reason == Code.INVALID_SPEC
    lab.passes(count=4)
    lab.restart()
    lab.passes(count=4)
    assert len(lab.statuses) == written and not lab.names(PYTORCHJOBS)
    assert len(lab.events.told) == 1
    lab.apply(stages="ab")
    lab.passes(count=2)
    assert not lab.stage().stalled and lab.names(PYTORCHJOBS) == ["family-a-a1"]


def test_a_job_that_turns_out_to_be_unmakeable_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even if the check before the first launch has missed it."""
    monkeypatch.setattr(
        "modelchain_operator.reconcile.job_requests.check_jobs", lambda *arguments: None
    )
    lab = Lab()
    lab.apply(**too_large())
    lab.passes(count=2)
    written = len(lab.statuses)
    assert lab.stage().stalled and lab.stage().code is Code.INVALID_SPEC
    lab.passes(count=4)
    assert len(lab.statuses) == written


def test_a_later_stage_that_cannot_be_made_is_said_before_the_first_is_launched() -> None:
    lab = Lab(PoolFile.model_validate({"nodePools": {"cpu": {"gpu": "A100", "gpusPerNode": 2}}}))
    resources = {"nodes": 1, "processesPerNode": 4}
    lab.apply(stages="ab", **{"spec.stages[1].resources": resources})
    lab.passes()
    assert lab.stage().code is Code.INVALID_SPEC and not lab.names(PYTORCHJOBS)
    assert "spec.stages[1].resources" in lab.stage().message


def test_a_claim_that_is_gone_when_a_job_is_to_be_made() -> None:
    """The intent is in the status, and the claim is made again before its job."""
    lab = Lab()
    lab.apply()
    lab.kube.refuse["create", "pytorchjobs"] = NO
    lab.passes()
    lab.drop(CLAIMS, "family-artifacts")
    lab.restart()
    lab.kube.refuse.clear()
    lab.passes(count=2)
    assert lab.names(CLAIMS) == ["data", "family-artifacts"]
    assert lab.names(PYTORCHJOBS) == ["family-a-a1"]


# -- when a job is made anew -----------------------------------------------------------------------

QUEUED = {"spec.runner.queueName": "vision"}
IMAGE = "registry.example/trainer@sha256:" + "1" * 64
EVALUATION = [{"name": "r1", "kind": "Retrieval", "shards": "/data/val.tar"}]
MADE_ANEW: dict[str, dict[str, Any]] = {
    "image": {"spec.runner.image": IMAGE},
    "queue": {"spec.runner.queueName": "other"},
    "priority": {"spec.runner.priorityClass": "high"},
    "nodes": {"spec.stages[0].resources": {"nodes": 2}},
    "folder of the data": {"spec.data.train.shards": "/data/here/train-{00..07}.tar"},
    "claim of the data": {"spec.data.volume": {"claimName": "other"}},
    "mount path": {
        "spec.data.volume": {"claimName": "data", "mountPath": "/mnt"},
        "spec.data.train.shards": "/mnt/train-{00..07}.tar",
    },
    "evaluation": {"spec.evaluation": EVALUATION},
    "micro-batch": {"spec.recipe.microBatchSize": 8},
    "checkpoints": {"spec.checkpoint": {"everySeconds": 5}},
    "start deadline": {"spec.deadlines": {"startSeconds": 5}},
}
KEPT: dict[str, dict[str, Any]] = {
    "stage deadline": {"spec.deadlines": {"stageSeconds": 5}},
    "retries": {"spec.retry": {"maxRetries": 9}},
    "another stage": {"spec.stages[1].resources": {"nodes": 2}},
    "a default that is written out": {"spec.checkpoint": {"everySeconds": 60}},
}


def queued() -> Lab:
    """A lab with a released job that waits in its queue."""
    lab = Lab()
    lab.claim("other")
    lab.apply(stages="ab", **QUEUED)
    lab.passes(count=2)
    assert lab.stage().code is Code.QUEUED
    return lab


def anew(lab: Lab) -> bool:
    """Whether the job is replaced within a few passes."""
    uid = lab.get(PYTORCHJOBS, "family-a-a1")["metadata"]["uid"]
    lab.passes(count=4)
    names = lab.names(PYTORCHJOBS)
    kept = names == ["family-a-a1"] and lab.get(PYTORCHJOBS, names[0])["metadata"]["uid"] == uid
    assert kept or names == ["family-a-a2"]
    return not kept


@pytest.mark.parametrize("changes", MADE_ANEW.values(), ids=MADE_ANEW)
def test_an_edit_of_what_a_queued_job_is_made_from_replaces_it(changes: dict[str, Any]) -> None:
    lab = queued()
    lab.apply(stages="ab", **{**QUEUED, **changes})
    assert anew(lab)


@pytest.mark.parametrize("changes", KEPT.values(), ids=KEPT)
def test_other_edits_leave_a_queued_job_in_its_queue(changes: dict[str, Any]) -> None:
    lab = queued()
    lab.apply(stages="ab", **{**QUEUED, **changes})
    assert not anew(lab)


def pools(**changes: Any) -> PoolFile:
    whole: Object = POOLS.model_dump(mode="json", by_alias=True, exclude_none=True)
    return PoolFile.model_validate(
        with_changes({f"nodePools.cpu.{k}": v for k, v in changes.items()}, whole)
    )


@pytest.mark.parametrize(
    ("changes", "replaced"),
    [
        ({"memory": "1Gi"}, True),
        ({"env": {"A": "b"}}, True),
        ({"price": {"perGpuHour": "1", "currency": "EUR", "source": "a list"}}, False),
        ({"gpu": "Xeon"}, False),
        ({"shmSize": "8Gi"}, False),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_node_pool(changes: dict[str, Any], replaced: bool) -> None:
    lab = queued()
    lab.pools = pools(**changes)
    lab.restart()
    assert anew(lab) is replaced


def test_another_claim_of_artifacts_replaces_a_queued_job() -> None:
    """Its label has the claim's UID, by which other chains know where it trains."""
    lab = queued()
    lab.drop(CLAIMS, "family-artifacts")
    lab.claim("family-artifacts", uid="another")
    lab.restart()
    assert anew(lab)


def test_an_operator_that_words_jobs_otherwise_leaves_them_in_their_queues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab = queued()
    monkeypatch.setattr(template, "HOME", "/home/another")
    monkeypatch.setattr(template, "SHUTDOWN_SECONDS", 5)
    lab.restart()
    assert not anew(lab)


def test_a_job_of_an_operator_that_hashed_otherwise_stays_in_its_queue() -> None:
    lab = queued()
    job = lab.get(PYTORCHJOBS, "family-a-a1")
    job["metadata"]["annotations"]["modelchain.dev/made-from"] = "0123456789abcdef"
    lab.restart()
    assert not anew(lab)


# -- a claim that is gone while a chain is complete ------------------------------------------------


def complete() -> Lab:
    lab = Lab()
    lab.apply()
    lab.passes()
    lab.finish("family-a-a1")
    lab.passes(count=2)
    assert lab.status().is_true("Complete")
    return lab


def test_a_claim_that_is_gone_is_seen_before_complete_is_said() -> None:
    """The operator has read the claim less than a minute ago."""
    lab = complete()
    chain = lab.drop(CHAINS, "family")
    lab.drop(CLAIMS, "family-artifacts")
    lab.apply(uid="made-again")
    lab.statuses.clear()
    lab.passes(count=3)
    assert lab.stage().code is Code.ARTIFACT_MISSING and chain["metadata"]["uid"] != "made-again"
    for status in lab.statuses:
        [said] = [c for c in status["conditions"] if c["type"] == "Complete"]
        assert said["status"] == "False"


def test_a_claim_that_is_gone_ends_complete_at_the_next_pass() -> None:
    lab = complete()
    claim = lab.drop(CLAIMS, "family-artifacts")
    assert lab.controller.claim_changed(("team", "family-artifacts"), None)
    lab.passes()
    assert lab.stage().code is Code.ARTIFACT_MISSING and not lab.status().is_true("Complete")
    lab.kube.put(CLAIMS, claim)  # brought back
    lab.passes()
    assert lab.status().is_true("Complete")


def test_which_claims_count_as_changed() -> None:
    lab, claim = complete(), ("team", "family-artifacts")
    uid = lab.get(CLAIMS, "family-artifacts")["metadata"]["uid"]
    assert not lab.controller.claim_changed(claim, uid)
    assert lab.controller.claim_changed(claim, "another")
    assert not lab.controller.claim_changed(claim, "another"), "it is read anew by the next pass"
    assert not lab.controller.claim_changed(("team", "of no chain"), "x")
    assert lab.controller.claim_changed(("team", "of no chain"), None)
