"""`modelchain logs`: whose logs are printed, how they are followed over attempts and stages, and
streams that break.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import podshapes
import pytest
import watched
from podshapes import at

from modelchain.api.contracts import FailureClass
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import AttemptStatus, ChainStatus, StageStatus, State
from modelchain.errors import InputError, WorkError
from modelchain.io.load import status_of
from modelchain_operator.api.kube import Forbidden, Invalid, NotFound, Object, Unavailable
from modelchain_operator.api.objects import uid
from modelchain_operator.cli import log_streams, session
from modelchain_operator.cli.changes import Feeds
from modelchain_operator.cli.log_streams import Following, Printed, Printer
from modelchain_operator.cli.logs import (
    Choice,
    Source,
    check,
    chosen,
    gone,
    not_yet,
    prefix,
    print_logs,
    sources,
)
from modelchain_operator.cli.session import Place, on_cluster
from modelchain_operator.runners.template import CHAIN_UID

HERE = Choice()


def attempt(stage: str, number: int, *, over: bool = False, kind: str = "a") -> AttemptStatus:
    return AttemptStatus(
        name=f"family-{stage}-{kind}{number}",
        number=number,
        input_digest=stage * 64,
        runner="PyTorchJob",
        state=State.FAILED if over else State.RUNNING,
        uid=f"job-{stage}-{kind}{number}",
        started_at=at(100 * ord(stage) + number),
        finished_at=at(100 * ord(stage) + number + 50) if over else None,
    )


def stage(name: str, *attempts: AttemptStatus, state: State = State.RUNNING) -> StageStatus:
    return StageStatus(name=name, state=state, attempts=list(attempts))


DONE = stage("a", attempt("a", 1, over=True), state=State.SUCCEEDED)
WAITS = stage("c", state=State.PENDING)


def status(*stages: StageStatus, baselines: list[StageStatus] | None = None) -> ChainStatus:
    return ChainStatus(stages=list(stages), baselines=baselines or [])


def pod(of: AttemptStatus, rank: int = 0, made: Object | None = None) -> Object:
    made = made or podshapes.running(rank)
    kind, number = ("master", 0) if rank == 0 else ("worker", rank - 1)
    made["metadata"] |= {"uid": f"{of.name}-{rank}", "name": f"{of.name}-{kind}-{number}"}
    made["metadata"]["ownerReferences"] = [podshapes.owned("PyTorchJob", of.name, str(of.uid))]
    return made


def chain(*conditions: str, **status: Any) -> Object:
    found = [{"type": kind, "status": "True", "message": "why"} for kind in conditions]
    return watched.spec() | {
        "status": {"observedGeneration": 3, "conditions": found, **status},
    }


@pytest.mark.parametrize(
    ("stages", "choice", "name"),
    [
        # The newest attempt of the stage that the chain is at; with a stage, of that one.
        ([DONE, stage("b", attempt("b", 1, over=True), attempt("b", 2)), WAITS], HERE, "b-a2"),
        ([DONE, stage("b", attempt("b", 1, over=True)), WAITS], HERE, "b-a1"),
        ([DONE, stage("b", attempt("b", 1)), WAITS], Choice("a"), "a-a1"),
        ([DONE, stage("b", attempt("b", 7, over=True), attempt("b", 8))], Choice("b", 7), "b-a7"),
        # The stage that it is at has no attempt; a complete chain has the last one.
        ([DONE, stage("b", state=State.QUEUED), WAITS], HERE, None),
        ([DONE, stage("b", attempt("b", 1, over=True), state=State.SUCCEEDED)], HERE, "b-a1"),
        ([stage("a", state=State.PENDING)], HERE, None),
    ],
)
def test_the_attempt_that_is_chosen(
    stages: list[StageStatus], choice: Choice, name: str | None
) -> None:
    found = chosen(status(*stages), choice)
    assert (found.name if found else None) == (name and f"family-{name}")


def test_a_baseline_that_trains_is_what_the_chain_is_at() -> None:
    alone = stage("b", attempt("b", 1, kind="b"))
    waits = stage("b", state=State.PENDING)
    found = chosen(status(DONE, waits, baselines=[alone]), HERE)
    assert found is not None and found.name == "family-b-b1"
    other = chosen(status(DONE, waits, baselines=[alone]), Choice("b"))
    assert other == found


def test_a_stage_or_attempt_that_is_not_there() -> None:
    of = status(DONE, stage("b", attempt("b", 7)))
    with pytest.raises(InputError, match=r"^family has no stage x; its stages are a, b, c, d"):
        check(chain(), of, Choice("x"))
    with pytest.raises(InputError, match=r"no attempt 1 of that stage; it has 7$"):
        check(chain(), of, Choice("b", 1))
    with pytest.raises(InputError, match=r"it has none yet$"):
        check(chain(), of, Choice("c", 1))
    check(chain(), of, Choice("b", 7))


def test_rank_0_or_all_of_them() -> None:
    """A pod's number is that of its node: the name of a pod or its labels do not make it ours."""
    of = attempt("b", 1)
    pods = [pod(of, rank) for rank in (2, 0, 1)] + [pod(attempt("b", 2), 0)]
    assert [one.number for one in sources(of, pods, Choice(all_ranks=True))] == [0, 1, 2]
    assert [one.number for one in sources(of, pods, HERE)] == [0]
    assert prefix("family", sources(of, pods, HERE)[0]) == "[b-a1/0] "


def test_what_is_said_of_pods_that_are_gone() -> None:
    of = attempt("b", 2, over=True).changed(
        failure=FailureClass.OUT_OF_MEMORY, message="the trainer ran out of memory"
    )
    assert list(gone(chain(), of)) == [
        "the pods of family-b-a2 are gone; its last word: OutOfMemory: the trainer ran out of"
        " memory",
        f"its records are on claim family-artifacts, in {'b' * 64}/chain-ui-a2: metrics.jsonl",
    ]


def test_why_there_is_nothing_to_show() -> None:
    reason = Reason(Code.QUEUED, message="in queue research")
    waits = watched.told(stage("b", state=State.QUEUED), reason)
    said = not_yet(chain(), status(DONE, waits), HERE)
    assert said == "family has no attempt to show yet: stage b: Queued: in queue research"


# -- which logs come next -------------------------------------------------------------------------


def names(found: list[Source | AttemptStatus]) -> list[str]:
    """Of logs, the attempt and the pod's number; of attempts without any, the name alone."""
    return [
        f"{one.attempt.name}/{one.number}" if isinstance(one, Source) else one.name for one in found
    ]


def test_a_hand_over() -> None:
    following = Following(HERE)
    b = attempt("b", 1)
    starting = pod(b, made=podshapes.scheduled())
    assert following.due(status(DONE, stage("b", b), WAITS), [starting]) == []
    assert names(following.due(status(DONE, stage("b", b), WAITS), [pod(b)])) == ["family-b-a1/0"]
    assert following.due(status(DONE, stage("b", b), WAITS), [pod(b)]) == []
    ended = stage("b", attempt("b", 1, over=True), state=State.SUCCEEDED)
    assert following.due(status(DONE, ended, WAITS), []) == []
    c = attempt("c", 1)
    going = status(DONE, ended, stage("c", c))
    assert not following.over(chain(), going)
    assert names(following.due(going, [pod(c)])) == ["family-c-a1/0"]
    last = status(DONE, ended, stage("c", attempt("c", 1, over=True), state=State.SUCCEEDED))
    assert following.due(last, []) == []
    assert not following.over(chain(), last) and following.over(chain("Complete"), last)


def test_a_retry_is_followed_and_earlier_attempts_are_not() -> None:
    following = Following(HERE)
    first, second = attempt("b", 1, over=True), attempt("b", 2)
    at_b = status(DONE, stage("b", first, second))
    assert names(following.due(at_b, [pod(first), pod(second)])) == ["family-b-a2/0"]
    third = attempt("b", 3)
    at_b = status(DONE, stage("b", first, attempt("b", 2, over=True), third))
    assert names(following.due(at_b, [pod(second), pod(third)])) == ["family-b-a3/0"]


def test_all_ranks_of_an_attempt_as_they_start() -> None:
    following, b = Following(Choice(all_ranks=True)), attempt("b", 1)
    of = status(DONE, stage("b", b))
    assert names(following.due(of, [pod(b, 1), pod(b, 0)])) == ["family-b-a1/0", "family-b-a1/1"]
    assert names(following.due(of, [pod(b, 1), pod(b, 0), pod(b, 2)])) == ["family-b-a1/2"]


def test_an_attempt_whose_pods_are_gone_is_named_once_and_not_at_first_sight() -> None:
    following = Following(HERE)
    ended = attempt("b", 1, over=True)
    of = status(DONE, stage("b", ended, state=State.FAILED))
    assert following.due(of, []) == [] and not following.over(chain("Failed"), of)
    assert names(following.due(of, [])) == ["family-b-a1"]
    assert following.due(of, []) == [] and following.over(chain("Failed"), of)


def test_one_attempt_or_one_stage_alone() -> None:
    b, c = attempt("b", 1), attempt("c", 1)
    alone = Following(Choice("b", 1))
    assert names(alone.due(status(DONE, stage("b", b)), [pod(b)])) == ["family-b-a1/0"]
    ended = stage("b", attempt("b", 1, over=True), state=State.SUCCEEDED)
    later = status(DONE, ended, stage("c", c))
    assert alone.due(later, [pod(c)]) == [] and alone.over(chain(), later)
    of_b = Following(Choice("b"))
    assert names(of_b.due(status(DONE, stage("b", b)), [pod(b)])) == ["family-b-a1/0"]
    assert of_b.due(later, [pod(c)]) == [] and of_b.over(chain(), later)
    waits = status(DONE, stage("b", attempt("b", 1, over=True), state=State.PENDING))
    assert not of_b.over(chain(), waits)


# -- streams --------------------------------------------------------------------------------------


def test_lines_that_come_again_are_not_printed_again() -> None:
    printed = Printed()
    lines = [f"2026-01-01T00:00:0{second}Z {text}" for second, text in ((1, "a"), (2, "b"))]
    same = "2026-01-01T00:00:02Z c"
    assert [printed.take(line) for line in [*lines, same]] == ["a", "b", "c"]
    printed.reopened()
    again = [*lines, same, "2026-01-01T00:00:02Z d", "2026-01-01T00:00:03Z e", ""]
    assert [printed.take(line) for line in again] == [None, None, None, "d", "e", None]
    assert printed.stamp == "2026-01-01T00:00:03Z"
    assert Printed().take("2026-01-01T00:00:03Z ") == ""  # an empty line is one, too


class Logs:
    """Serves one log: each answer is a list of lines, with an error at its end if it breaks."""

    def __init__(self, *answers: list[Any]):
        self.answers = list(answers)
        self.asked: list[dict[str, str]] = []

    async def log(
        self, namespace: str, pod: str, container: str, query: dict[str, str]
    ) -> AsyncIterator[str]:
        assert (namespace, container) == ("vision", "pytorch")
        self.asked.append({key: value for key, value in query.items() if value})
        for line in self.answers.pop(0):
            if isinstance(line, Exception):
                raise line
            yield line


class Told:
    """What the watches have told: the pod runs in each of the first `turns` looks."""

    def __init__(self, turns: int):
        self.chain, self._turns = watched.spec(), turns

    @property
    def pods(self) -> list[Object]:
        self._turns -= 1
        b = attempt("b", 1)
        return [pod(b) if self._turns >= 0 else pod(b, made=podshapes.ended(code=0))]


def followed(
    monkeypatch: pytest.MonkeyPatch, turns: int, *answers: list[Any], tail: int | None = None
) -> tuple[list[str], list[dict[str, str]]]:
    """What is printed of a log, and what the server was asked for."""
    monkeypatch.setattr(log_streams, "PAUSE_SECONDS", 0.0)
    kube: Any = Logs(*answers)
    told: Any = Told(turns)
    said: list[str] = []
    b = attempt("b", 1)

    async def main() -> None:
        printer = Printer(kube, told, HERE, tail, said.append)
        async with Feeds() as feeds:
            printer.begin(feeds, [Source(b, pod(b), 0)])
            while printer.reading:
                await feeds.wait()

    asyncio.run(main())
    assert not kube.answers
    return said, kube.asked


ONE, TWO, THREE = (f"2026-01-01T00:00:0{n}Z line {n}" for n in (1, 2, 3))


def test_a_log_is_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the end of a container's stream its last lines are asked for once more."""
    said, asked = followed(monkeypatch, 1, [ONE, TWO], [TWO, THREE], tail=10)
    assert said == ["line 1", "line 2", "line 3"]
    assert asked == [
        {"follow": "true", "tailLines": "10"},
        {"follow": "true", "sinceTime": "2026-01-01T00:00:02Z"},
    ]
    assert capsys.readouterr().err == "modelchain: the log of pod family-b-a1-master-0\n"


def test_a_stream_that_breaks_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    away = Unavailable("GET /log: 500 dial tcp: connection refused")
    starts = Invalid("container is waiting to start")
    said, _ = followed(monkeypatch, 4, [starts], [ONE, away], [away], [ONE, TWO, away], [TWO])
    assert said == ["line 1", "line 2"]
    assert capsys.readouterr().err.count("broke off") == 2  # each error once


REFUSED = (
    'GET /api/v1/namespaces/vision/pods/family-b-a1-master-0/log: 500 Get "https://198.18.77.2:10250'
    '/containerLogs/vision/family-b-a1-master-0/pytorch?timestamps=true": dial tcp'
    " 198.18.77.2:10250: connect: connection refused"
)
NODE = (
    "node node-0 did not answer the API server, so the log of pod family-b-a1-master-0 cannot be"
    " read; next: kubectl describe node node-0"
)


class Listed(Logs):
    """A server that also lists the pods of the chain."""

    async def list(self, *_: Any) -> list[Object]:
        one = pod(attempt("b", 1))
        one["metadata"].setdefault("labels", {})[CHAIN_UID] = uid(chain())
        return [one]


def printed(monkeypatch: pytest.MonkeyPatch, error: Exception) -> str:
    """What the command says if a log ends with this error."""
    kube: Any = Listed([ONE, error])
    kube.api = SimpleNamespace(configuration=SimpleNamespace(host="https://api:6443"))

    @asynccontextmanager
    async def connected(place: Place) -> AsyncIterator[tuple[Any, str]]:
        yield kube, "vision"

    monkeypatch.setattr(session, "_connect", connected)
    of = status(DONE, stage("b", attempt("b", 1))).model_dump(mode="json", by_alias=True)
    said: list[str] = []

    async def work(kube: Any, space: str) -> None:
        await print_logs(kube, space, chain(**of), HERE, None, said.append)

    with pytest.raises(WorkError) as caught:
        on_cluster(Place(), work)
    assert said == ["line 1"]
    return str(caught.value)


def test_a_node_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told = printed(monkeypatch, Unavailable(REFUSED, code=500))
    assert told == f"{NODE} ({REFUSED})"


def test_an_api_server_that_answered_is_not_called_unreachable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = printed(monkeypatch, Unavailable("GET /x: 500 etcdserver: leader changed", code=500))
    assert told.startswith("the API server at https://api:6443 answered with an error: GET /x: 500")


def test_a_node_that_does_not_answer_is_named_while_it_is_followed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    away = Unavailable(REFUSED, code=500)
    assert followed(monkeypatch, 2, [ONE, away], [away], [ONE])[0] == ["line 1"]
    told = capsys.readouterr().err
    assert told.count(NODE) == 1 and "broke off and is asked for again" in told


def test_a_pod_that_is_gone_ends_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    assert followed(monkeypatch, 9, [ONE, Unavailable("x")], [NotFound("gone")])[0] == ["line 1"]


def test_a_log_of_a_container_that_has_ended_is_asked_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert followed(monkeypatch, 0, [Unavailable("its node is gone")])[0] == []


def test_without_the_right_to_logs_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Forbidden):
        followed(monkeypatch, 9, [Forbidden("pods/log")])


def test_logs_at_real_size() -> None:
    """256 pods are found and numbered, and the status is that of eight stages."""
    thing = watched.chain()
    of = chosen(status_of(thing), HERE)
    assert of is not None and of.name == "family-c-a1"
    found = sources(of, watched.pods(), Choice(all_ranks=True))
    assert [one.number for one in found] == list(range(watched.NODES))
