"""The commands for a cluster, tested without one: tables, errors, and the message if packages are
missing.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import situations
from podshapes import T0, at
from rich.console import Console

from modelchain.api.reasons import Code, Reason
from modelchain.api.status import StageStatus, State
from modelchain.errors import InputError
from modelchain_operator.api.kube import Forbidden, Object
from modelchain_operator.cli import commands, session
from modelchain_operator.cli.listing import ChainRow, age, follow, row, table

MODELCHAIN = str(Path(sys.executable).with_name("modelchain"))
LONG = (
    "stage vit-b: OutOfMemory: pod vit-laion-vit-b-a4-master-0 ran out of memory (limit: 400Gi);"
    " raise memory"
)
ROWS = [
    ChainRow(
        "vision",
        "vit-cc3m",
        "2/4",
        "Running",
        "41%",
        "30.16",
        "212.40",
        "6h",
        "stage vit-s: Miss: never trained",
    ),
    ChainRow("vision", "vit-laion", "3/4", "Stalled", "", "31.80", "1894.02", "2d", LONG),
    ChainRow("vision", "digits", "3/3", "Complete", "100%", "97.22", "3.10", "9d", ""),
]


def drawn(rows: list[ChainRow], namespaces: bool, width: int) -> str:
    console = Console(width=width, record=True, file=Path(os.devnull).open("w"))  # noqa: SIM115
    console.print(table(rows, namespaces, width))
    return console.export_text()


@pytest.mark.parametrize("namespaces", [False, True])
def test_a_terminal_of_eighty_columns_shows_everything(namespaces: bool) -> None:
    text = drawn(ROWS, namespaces, 80)
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert " ".join(LONG.split()) in " ".join(text.split())
    assert text.splitlines()[1].split() == (["vision"] if namespaces else []) + list(ROWS[0][1:8])


def test_a_wide_terminal_has_one_line_per_chain() -> None:
    lines = drawn(ROWS, False, 150).splitlines()
    assert len(lines) == 4 and lines[2].rstrip().endswith("…")
    assert LONG in drawn(ROWS, False, 4096)


def test_empty_columns_are_left_out() -> None:
    new = ChainRow(
        "team", "family", "", "New", "", "", "", "3s", "no operator has looked at it yet"
    )
    assert drawn([new], False, 100).split()[:4] == ["name", "state", "age", "why"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (5, "5s"), (119, "119s"), (120, "2m"), (7199, "119m"), (7200, "2h"), (1e6, "11d")],
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text


def chain(observed: int = 1, *conditions: tuple[str, str], stages: Any = ({},)) -> Object:
    found = [{"type": kind, "status": "True", "message": message} for kind, message in conditions]
    status = {"observedGeneration": observed, "conditions": found, "stages": list(stages)}
    meta = {"name": "family", "namespace": "team", "generation": 1, "creationTimestamp": at(0)}
    return {"metadata": meta, "status": status}


IN_QUEUE = {
    "name": "b",
    "state": "Queued",
    "reason": "Queued: in q; look: kubectl get workloads -n y",
    "reasonCode": "Queued",
    "next": "kubectl get workloads -n y",
    "message": "in q",
}


def stalled(reason: str) -> dict[str, Any]:
    return {"name": "b", "state": "Failed", "reason": reason, "reasonCode": "Error"}


@pytest.mark.parametrize(
    ("thing", "why"),
    [
        (chain(-1, stages=()), "no operator has looked at it yet"),
        (chain(0), "it was changed, and no operator has looked at it since"),
        (
            chain(
                1, ("Stalled", "stage b: no; next: modelchain retry x -n y"), stages=[stalled("no")]
            ),
            "stage b: no",
        ),
        (
            chain(
                1,
                ("Reconciling", "stage b: Queued: in q; look: kubectl get workloads -n y"),
                stages=[IN_QUEUE],
            ),
            "stage b: Queued: in q",
        ),
        (
            chain(1, ("Stalled", "spec.stages: too few"), stages=[IN_QUEUE]),
            "spec.stages: too few",
        ),
        (chain(1, ("Complete", "3 of 3 stages have finished")), ""),
    ],
)
def test_the_why_column(thing: Object, why: str) -> None:
    assert row(thing, T0 + 60).why == why


@pytest.mark.parametrize("state", [State.PENDING, State.FAILED])
def test_why_a_spec_is_refused_while_a_stage_stalls(state: State) -> None:
    stage = situations.current(state, UNANSWERED, stalled=state is State.PENDING)
    thing = situations.refused(situations.chain(stage), "spec.stages: too few")
    assert row(thing, T0 + 60).why == "spec.stages: too few"


def printed(monkeypatch: pytest.MonkeyPatch, thing: Object, command: Callable[[str], None]) -> str:
    """What a command prints for a chain. The chain shows what the command wrote."""

    class Api:
        async def patch(self, resource: object, namespace: str, name: str, body: Object) -> None:
            for part in body:
                thing[part] |= body[part]

    async def get_chain(kube: object, namespace: str, name: str) -> Object:
        return thing

    def on_cluster(place: object, work: Any) -> Any:
        return asyncio.run(work(Api(), "team"))

    monkeypatch.setattr(session, "get_chain", get_chain)
    monkeypatch.setattr(session, "on_cluster", on_cluster)
    said: list[str] = []
    monkeypatch.setattr("typer.echo", said.append)
    command("family")
    [only] = said
    return only


def retry(monkeypatch: pytest.MonkeyPatch, thing: Object) -> str:
    """What `modelchain retry` prints for a chain."""
    return printed(monkeypatch, thing, commands.retry)


UNANSWERED = Reason(Code.VERIFY_UNANSWERED, message="it did not answer")


@pytest.mark.parametrize(
    "stage",
    [
        situations.current(State.FAILED, Reason(Code.NON_FINITE, message="the loss is nan")),
        situations.current(
            State.PENDING,
            Reason(Code.NON_FINITE, message="the loss is nan; tries again"),
            not_before=T0 + 40,
        ),
        situations.current(State.VERIFYING, UNANSWERED, stalled=True),
        situations.current(
            State.RUNNING,
            Reason(Code.SUSPENDED_BY_ANOTHER, message="another client"),
            stalled=True,
        ),
        situations.current(
            State.PENDING,
            Reason(Code.SAME_DEVICE_ERROR, message="the devices of nodes a, b failed alike"),
            stalled=True,
        ),
        situations.current(
            State.QUEUED, Reason(Code.NODES_AVOIDED, message="node-1 failed lately")
        ),
    ],
)
def test_retry_where_it_helps(stage: StageStatus, monkeypatch: pytest.MonkeyPatch) -> None:
    thing = situations.chain(stage, situations.condition("Stalled", "VerifyUnanswered"))
    assert retry(monkeypatch, thing).startswith(
        "stage b of family is tried again at once, with its budgets renewed"
    )
    assert "modelchain.dev/retry" in thing["metadata"]["annotations"]


def test_retry_of_a_stall_without_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version without codes wrote the code to the condition alone."""
    stage = situations.current(State.VERIFYING, UNANSWERED, stalled=True)
    stage = stage.changed(reason_code="", next="")
    thing = situations.chain(stage, situations.condition("Stalled", "VerifyUnanswered"))
    assert retry(monkeypatch, thing).startswith("stage b of family is tried again")
    thing = situations.chain(stage, situations.condition("Stalled", "NameTaken"))
    with pytest.raises(InputError, match="NameTaken has to be corrected"):
        retry(monkeypatch, thing)


@pytest.mark.parametrize(
    "reason", ["InvalidSpec", "PodsForbidden", "RunnerMissing", "ClaimMissing", "NameTaken"]
)
def test_retry_where_a_correction_is_needed(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = (
        situations.current(State.PENDING, Reason(Code(reason), message="no"), stalled=True)
        if reason != "InvalidSpec"
        else None
    )
    thing = situations.chain(stage, situations.condition("Stalled", reason))
    with pytest.raises(
        InputError, match=f"{reason} has to be corrected, and then it goes on by itself"
    ) as refused:
        retry(monkeypatch, thing)
    assert "\n" not in str(refused.value) and "annotations" not in thing["metadata"]


def test_retry_where_nothing_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="has nothing to try again"):
        retry(monkeypatch, situations.chain(situations.current()))


def test_a_list_is_followed_until_all_have_finished() -> None:
    other = chain(1, ("Finished", ""))
    other["metadata"]["name"] = "digits"
    told = [[chain(), other], [chain(), other], [chain(1, ("Finished", "")), other]]
    shown: list[list[str]] = []

    async def stream() -> AsyncIterator[list[Object]]:
        for chains in told:
            yield chains
            await asyncio.sleep(0.05)
        raise AssertionError("it is read on")

    ended = asyncio.run(follow(stream(), lambda rows: shown.append([r.name for r in rows])))
    assert len(ended) == 2 and shown[-1] == ["digits", "family"] and len(shown) == 3


def test_the_error_of_a_stream_ends_the_list() -> None:
    async def stream() -> AsyncIterator[list[Object]]:
        yield [chain()]
        raise Forbidden("no")

    with pytest.raises(Forbidden):
        asyncio.run(follow(stream(), lambda rows: None))


KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:1"}}]
users: [{name: u, user: {token: t}}]
contexts: [{name: c, context: {cluster: c, user: u, namespace: team}}]
current-context: c
"""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            "get --kubeconfig none",
            2,
            "there is no none; name a file with --kubeconfig or KUBECONFIG",
        ),
        ("get --kubeconfig list", 2, "the file is not a kubeconfig"),
        ("get --kubeconfig half", 2, "no API server to talk to"),
        ("get --kubeconfig file --context other", 2, "Expected object with name other"),
        (
            "get --kubeconfig file",
            1,
            "the API server at https://127.0.0.1:1 cannot be reached: GET /apis/",
        ),
        ("get A/b --kubeconfig file", 2, "'A/b' is not a valid name of a ModelChain"),
        ("get -n a/b --kubeconfig file", 2, "'a/b' is not a valid name of a namespace"),
        ("get -A x", 2, "leave out NAME and -n, or -A"),
        ("watch x --kubeconfig file", 1, "the API server at https://127.0.0.1:1 cannot be reached"),
        ("logs x --kubeconfig none", 2, "there is no none"),
        ("logs x --attempt 0 --kubeconfig none", 2, "Invalid value for '--attempt'"),
        ("get -w -o json", 2, "leave one of them out"),
        ("status", 2, "name one chain"),
        ("status x --root y", 2, "name one chain"),
        ("status --root y -n z", 2, "a local root has no namespace"),
    ],
)
def test_errors_are_one_line(words: str, code: int, said: str, tmp_path: Path) -> None:
    for name, text in {"list": "[]", "half": "{", "file": KUBECONFIG}.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [MODELCHAIN, *words.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert (
        said in done.stderr
        and done.stderr.startswith("modelchain: ")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    "words", ["get", "explain x", "suspend x", "retry x", "status x", "watch x", "logs x"]
)
def test_without_the_operators_packages(words: str, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['kubernetes'] = None; from modelchain.cli.app import main; main()"
    )
    command = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install 'modelchain[operator]'" in done.stderr


def test_other_commands_do_not_load_the_client() -> None:
    code = "import sys, modelchain.cli.app; print('kubernetes' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "False\n"
    )
