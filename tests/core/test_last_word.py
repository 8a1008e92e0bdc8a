"""What is believed of a last word. Only one function reads it, on a cluster and on a laptop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored import violations

from modelchain.api.artifact import StageArtifactSpec
from modelchain.api.contracts import LAST_WORD, MOST_METRICS, FailureClass, LastWord
from modelchain.api.status import AttemptStatus, State
from modelchain.crd import definitions
from modelchain.io.lastword import read_last_word
from modelchain.local.root import Root

GOOD = {"result": "Succeeded", "artifactDigest": "0" * 64, "manifestDigest": "1" * 64}
SCHEMA = definitions()["stageartifacts.yaml"]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
SPEC = SCHEMA["properties"]["spec"]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"manifestDigest": "abc"}, "'abc' as manifestDigest"),
    ({"artifactDigest": "A" * 64}, "as artifactDigest"),
    ({"artifactDigest": "", "manifestDigest": "0" * 63}, "as artifactDigest"),
    ({"artifactDigest": "\x1b[2J" + "x" * 999}, "..."),
    ({"steps": -1}, "-1 as steps"),
    ({"step": 2**60}, "as step"),
    ({"macs": -5}, "-5 as macs"),
    ({"macs": 10**400}, "as macs"),
    ({"seconds": -1.5}, "-1.5 as seconds"),
    ({"metrics": {"top1": 1e300}}, "1e+300} as metrics"),
    ({"pictures": {"top1": 0}}, "as pictures"),
    ({"pictures": {"top1": 2.5}}, "as pictures"),
    ({"metrics": {str(n): 1.0 for n in range(MOST_METRICS + 1)}}, "as metrics"),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG, ids=lambda value: str(value)[:40])
def test_a_success_with_a_value_that_cannot_be_true_is_a_failure(
    wrong: dict[str, Any], says: str
) -> None:
    """The next attempt finds the artifact, if there is one, and reports it."""
    word = read_last_word(json.dumps({**GOOD, **wrong}))
    assert word is not None and word.failure is FailureClass.NO_ARTIFACT
    assert says in word.message and len(word.message) < 200 and word.message.isprintable()


@pytest.mark.parametrize("wrong", [wrong for wrong, _ in WRONG], ids=lambda value: str(value)[:40])
def test_a_laptop_reads_it_as_a_cluster_does(wrong: dict[str, Any], tmp_path: Path) -> None:
    attempt = AttemptStatus(name="a", number=1, input_digest="d", state=State.RUNNING)
    root, text = Root(tmp_path), json.dumps({**GOOD, **wrong})
    assert root.last_word(attempt) is None
    root.attempt_directory(attempt).mkdir(parents=True)
    (root.attempt_directory(attempt) / LAST_WORD).write_text(text)
    assert root.last_word(attempt) == read_last_word(text)


def test_bytes_that_are_no_text_are_no_last_word(tmp_path: Path) -> None:
    attempt = AttemptStatus(name="a", number=1, input_digest="d", state=State.RUNNING)
    root = Root(tmp_path)
    root.attempt_directory(attempt).mkdir(parents=True)
    (root.attempt_directory(attempt) / LAST_WORD).write_bytes(b"\xff\xfe\x00")
    assert root.last_word(attempt) is None


NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([2**53, 10**15, 10**24, 10**30]))
WORDS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("step", "steps", "macs", "seconds", "gpuSeconds", "trainerMath"), NUMBERS),
        "metrics": st.dictionaries(st.text(max_size=9), NUMBERS, max_size=5),
        "artifactDigest": st.sampled_from([None, "", "2" * 64, "2" * 65]),
    },
)


@given(WORDS)
def test_a_record_can_hold_every_success_that_is_believed(fields: dict[str, Any]) -> None:
    word = read_last_word(json.dumps({**GOOD, **fields}))
    assert word is not None
    if word.result == "Succeeded":
        body = record(word).model_dump(mode="json", by_alias=True, exclude_none=True)
        assert list(violations(body, SPEC, "spec")) == []


def record(word: LastWord) -> StageArtifactSpec:
    """The record that the operator makes of a last word."""
    return StageArtifactSpec.model_validate(
        {
            **dict.fromkeys(("chain", "stage", "model", "path", "claimName", "claimUID"), "x"),
            **dict.fromkeys(("image", "attempt", "finishedAt"), "x"),
            "inputDigest": "3" * 64,
            "artifactDigest": word.left,
            "manifestDigest": word.manifest_digest,
            "epochs": 1,
            "inputs": {},
            "steps": word.steps or word.step,
            "macs": word.macs,
            "seconds": word.seconds,
            "gpuSeconds": word.gpu_seconds,
            "metrics": {name: f"{value:.2f}" for name, value in word.metrics.items()},
            "trainerMath": word.trainer_math,
        }
    )
