"""Last words and other programs' texts, as bad as they can be: each gives a class and a sentence
that is safe to print.
"""

from __future__ import annotations

import json
from typing import Any

import podshapes
import pytest
from podshapes import Pod, at, ended, evicted, word
from situations import NOW, chain, current, event, job, lease, mine
from stagelife import Life, launched

from modelchain.api.contracts import FailureClass, LastWord, LiveProgress
from modelchain.api.faults import fault_at_start
from modelchain.api.messages import one_line
from modelchain.api.status import State
from modelchain.api.uses import Uses
from modelchain_operator.explain.explain import explain
from modelchain_operator.explain.read import Situation
from modelchain_operator.runners import pods as podread

F = FailureClass
GOOD = {"result": "Succeeded", "manifestDigest": "a" * 64, "artifactDigest": "b" * 64}
ESCAPES = "\x1b[2J\x1b[31mall your base\x1b]0;title\x07\u202e"


def stopped(message: str, code: int = 1) -> Life:
    """The chain whose first attempt has ended with this termination message."""
    life = launched(**{"spec.retry": {"maxRetries": 0}})
    life.pods(ended(code=code, message=message))
    life.end_job("Failed" if code else "Succeeded")
    life.look(200)
    return life


def said(**fields: Any) -> str:
    return json.dumps({"result": "Failed", "class": "Error", "message": "it broke", **fields})


FAILED: dict[str, tuple[str, FailureClass]] = {
    "no JSON": ("\ufffd\ufffd\x01\x02 not json", F.UNKNOWN),
    "a list": ("[]", F.UNKNOWN),
    "a number": ("12", F.UNKNOWN),
    "cut": ('{"result":"Failed","class":"UserError","mess', F.UNKNOWN),
    "half a character": ('{"result":"Failed","message":"\\ud800"}', F.UNKNOWN),
    "an unknown class": (said(**{"class": "Frobnicated"}), F.ERROR),
    "no class": (said(**{"class": None}), F.ERROR),
    "NUL": (said(message="a\x00b"), F.ERROR),
    "escapes": (said(message=ESCAPES), F.ERROR),
    "a message that is none": (said(message=7), F.ERROR),
    "negative": (said(macs=-5, step=-3, checkpointStep=-2, gpuSeconds=-1), F.ERROR),
    "huge": (said(macs=10**400, step=10**30, seconds=1e300), F.ERROR),
    "no numbers": (said(macs="many", step=None, gpuSeconds=[], metrics=3), F.ERROR),
    "NaN": ('{"result":"Failed","class":"NonFinite","metrics":{"a":NaN},"macs":NaN}', F.NON_FINITE),
    "long": (said(message="\U0001f525" * 600), F.ERROR),
}


@pytest.mark.parametrize("name", FAILED)
def test_a_failure_with_bad_values_has_its_class(name: str) -> None:
    message, failure = FAILED[name]
    stage = stopped(message).status.stages[0]
    [attempt] = stage.attempts
    assert stage.state is State.FAILED and attempt.failure is failure
    assert attempt.macs == attempt.checkpoint_step == 0
    assert (stage.reason + attempt.message).isprintable()


@pytest.mark.parametrize(
    "wrong",
    [
        {"manifestDigest": "abc", "artifactDigest": "d"},
        {"manifestDigest": "A" * 64},
        {"artifactDigest": "b" * 63},
        {"artifactDigest": f"{'b' * 64}\n"},
        {"manifestDigest": "\x1b" * 3000},
        {"manifestDigest": 7},
        {"macs": -5},
        {"steps": -3},
        {"steps": 1.5},
        {"seconds": -1},
        {"gpuSeconds": -7},
        {"macs": 10**400},
        {"seconds": "long"},
        {"trainerMath": -1},
        {"metrics": {"m" * 300: 1e300}},
        {"metrics": {"top1": "high"}},
        {"metrics": {"\x1b[2J": 2.0}},
        {"metrics": [1, 2]},
        {"metrics": {"top1": float("nan")}},
    ],
    ids=str,
)
def test_a_success_with_a_value_that_cannot_be_true_is_a_failure(wrong: dict[str, Any]) -> None:
    """The artifact may be there all the same. Then the next attempt finds it and trains nothing."""
    life = stopped(json.dumps(GOOD | wrong), code=0)
    stage = life.status.stages[0]
    assert stage.attempts[0].failure is F.NO_ARTIFACT and life.records == []
    assert next(iter(wrong)) in stage.reason and stage.reason.isprintable()


def test_a_success_that_was_cut_is_verified() -> None:
    life = stopped(json.dumps(GOOD)[:60], code=0)
    assert life.status.stages[0].state is State.VERIFYING


def test_an_answer_with_a_figure_that_cannot_be_true_is_no_answer() -> None:
    good = {"step": 1, "steps": 9, "samplesPerSecond": 2.0, "etaSeconds": 4.0, "attempt": "a"}
    assert LiveProgress.model_validate_json(json.dumps(good)).step == 1
    for bad in ({"step": -1}, {"steps": 0}, {"macs": 10**400}, {"etaSeconds": float("nan")}):
        with pytest.raises(ValueError, match="validation error"):
            LiveProgress.model_validate_json(json.dumps(good | bad))


# -- what is printed -------------------------------------------------------------------------------


def test_control_characters_are_escaped() -> None:
    assert one_line(ESCAPES) == r"\x1b[2J\x1b[31mall your base\x1b]0;title\x07\u202e"
    assert one_line("two\n lines\tand a tab\x00") == r"two lines and a tab\x00"
    assert one_line(one_line(ESCAPES)) == one_line(ESCAPES)
    assert one_line("é \U0001f525 漢字") == "é \U0001f525 漢字"
    assert LastWord(result="Failed", message=ESCAPES).message.isprintable()


def test_explain_prints_no_control_character() -> None:
    """Neither of an event nor of a pod nor of a status that an older operator wrote."""
    thing, waiting = job(), mine(podshapes.waiting(0, "CreateContainerError", ESCAPES))
    refused = event(thing, f"Error creating: {ESCAPES}", "PyTorchJob")
    refused["involvedObject"]["name"] = ESCAPES
    old = chain(current())
    old["status"]["stages"][1] |= {"reason": ESCAPES, "reasonCode": "Miss"}
    for situation in (
        Situation(chain(current()), NOW, jobs=[thing], events=[refused], leases=[lease()]),
        Situation(chain(current()), NOW, jobs=[thing], pods=[waiting], leases=[lease()]),
        Situation(old, NOW, leases=[lease()]),
    ):
        found = explain(situation)
        assert "all your base" in found.cause
        assert str(found).isprintable() and (found.state + found.cause + found.next).isprintable()


def test_the_end_of_a_long_message_is_kept() -> None:
    long = "OCI runtime create failed: " + "x " * 500 + "nvml error: driver not loaded"
    assert len(podread.short(long)) <= podread.QUOTED
    assert podread.short(long).startswith("OCI runtime create failed")
    assert podread.short(long).endswith("nvml error: driver not loaded")


# -- the container runtime and the kubelet ---------------------------------------------------------

OCI = (
    "failed to create containerd task: failed to create shim task: OCI runtime create failed: runc"
    " create failed: unable to start container process: error during container init: "
)
HOOK = OCI + "error running hook #0: error running hook: exit status 1, stdout: , stderr: "
MODE = HOOK + "Auto-detected mode as 'legacy'\n"
STARTS: dict[str, tuple[str, FailureClass, str]] = {
    "driver": (
        f"{MODE}nvidia-container-cli: initialization error: nvml error: driver not loaded: unknown",
        F.HARDWARE,
        "nvml error: driver not loaded",
    ),
    "library": (
        f"{MODE}nvidia-container-cli: initialization error: load library failed:"
        " libnvidia-ml.so.1: cannot open shared object file: no such file or directory: unknown",
        F.HARDWARE,
        "load library failed",
    ),
    "device": (
        f"{MODE}nvidia-container-cli: device error: GPU-0: unknown device: unknown",
        F.HARDWARE,
        "unknown device",
    ),
    "too old": (
        f"{MODE}nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.8,"
        " please update your driver to a newer version: unknown",
        F.HARDWARE,
        "unsatisfied condition",
    ),
    "no runtime": (
        f'{OCI}exec: "nvidia-container-runtime": executable file not found in $PATH: unknown',
        F.HARDWARE,
        "nvidia-container-runtime",
    ),
    "CDI": (
        "failed to create containerd task: CDI device injection failed: unresolvable CDI devices"
        " nvidia.com/gpu=0",
        F.HARDWARE,
        "unresolvable CDI devices",
    ),
    "a file of the image": (
        f"{MODE}nvidia-container-cli: mount error: file creation failed: /run/merged/usr/bin/"
        "nvidia-smi: file exists: unknown",
        F.IMAGE,
        "file exists",
    ),
    "a volume": (
        f'{OCI}error mounting "/var/lib/kubelet/pods/0a/volumes/kubernetes.io~nfs/x" to rootfs at'
        ' "/artifacts": mount src=/var/lib, dst=/artifacts: stale NFS file handle: unknown',
        F.UNKNOWN,
        "a volume of pod vit-vit-t-a1-master-0 on node node-0 cannot be used",
    ),
    "a file in the volume's place": (
        f'{OCI}error mounting "/var/lib/kubelet/pods/0a/volumes/kubernetes.io~nfs/x" to rootfs at'
        ' "/artifacts": mount src=/var/lib, dst=/artifacts: not a directory: unknown',
        F.IMAGE,
        "not a directory",
    ),
    "no program": (
        f'{OCI}exec: "python": executable file not found in $PATH: unknown',
        F.IMAGE,
        'exec: "python": executable file not found',
    ),
}


@pytest.mark.parametrize("name", STARTS)
def test_why_a_container_could_not_be_started(name: str) -> None:
    """A GPU's driver is the node's, and the next attempt avoids it. The cause is quoted whole."""
    message, failure, cause = STARTS[name]
    life = launched()
    life.pods(ended(code=128, reason="StartError", message=message))
    life.end_job("Failed")
    [attempt] = life.look(200).attempts
    assert attempt.failure is failure and cause in attempt.message
    avoided = [node.node for node in life.status.avoid]
    assert avoided == (["node-0"] if failure is F.HARDWARE else [])
    assert attempt.gpu_milliseconds == Uses(startup=8000 * 100), "its node was held for that time"


def test_faults_of_the_container_runtime() -> None:
    assert fault_at_start(STARTS["driver"][0]) == "DriverFailed"
    assert fault_at_start(STARTS["no program"][0]) == ""


DISK = [
    ('Container pytorch exceeded its local ephemeral storage limit "10Gi". ', "ephemeralStorage"),
    ('Container istio-proxy exceeded its local ephemeral storage limit "1Gi". ', "istio-proxy"),
    ("Pod ephemeral local storage usage exceeds the total limit of containers 10Gi. ", "pool"),
    ('Usage of EmptyDir volume "shm" exceeds the limit "8Gi". ', "shmSize"),
    ('Usage of EmptyDir volume "tmp" exceeds the limit "8Gi". ', "ephemeralStorage"),
]


@pytest.mark.parametrize(("message", "advice"), DISK)
def test_a_limit_of_ephemeral_storage_is_a_full_volume(message: str, advice: str) -> None:
    life = launched()
    life.pods(evicted(ended(code=137), message))
    life.end_job("Failed")
    [attempt] = life.look(200).attempts
    assert attempt.failure is F.VOLUME_FULL and message.strip() in attempt.message
    assert advice in attempt.message.partition("exceed")[2]


LOW = [
    "The node was low on resource: memory. Threshold quantity: 100Mi, available: 80Mi. Container"
    " pytorch was using 20Gi, request is 0, has larger consumption of memory. ",
    "The node was low on resource: ephemeral-storage. Container pytorch was using 34260Ki, which"
    " exceeds its request of 0. ",
    "The node was low on resource: memory. Container pytorch was using 20Gi, which exceeds its"
    " request of 0. ",
    "The node was low on resource: ephemeral-storage. Threshold quantity: 10, available: 5."
    " Container pytorch was using 34260Ki, which exceeds its request of 0. ",
    "The node was low on resource: memory. Container pytorch was using 20Gi, request is 0, has"
    " larger consumption of memory. ",
]


@pytest.mark.parametrize("message", LOW)
def test_a_node_that_is_low_on_a_resource_preempts(message: str) -> None:
    life = launched()
    life.pods(evicted(ended(code=137), message))
    life.end_job("Failed")
    assert life.look(200).attempts[0].failure is F.PREEMPTED


def odd() -> list[Pod]:
    """Pods whose statuses lack what one would expect."""
    bare = ended(code=1)
    bare["status"]["containerStatuses"][1]["state"]["terminated"] = {"exitCode": 1}
    return [bare, ended(message=word("Failed", "Error", at(0)))]


def test_statuses_that_lack_what_one_expects() -> None:
    for pod in odd():
        life = launched()
        life.pods(pod)
        life.end_job("Failed")
        assert life.look(200).attempts[0].finished_at
