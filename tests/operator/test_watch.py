"""`modelchain watch`: when it ends and how, and what it prints to a pipe."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import situations
import watched

from modelchain.api.reasons import Code, Reason
from modelchain.api.status import StageStatus, State
from modelchain.errors import WorkError
from modelchain_operator.api.kube import CHAINS, Forbidden, Object, Resource
from modelchain_operator.cli import watching
from modelchain_operator.cli.followed import end_of
from modelchain_operator.cli.tree import Watched, watched_of
from modelchain_operator.cli.watching import StageLines, watch_chain
from modelchain_operator.reconcile.snapshot import RETRY

NAME = watched.name_of(2)
STALLED = watched.told(
    StageStatus(name=NAME), Reason(Code.BUDGET_EXCEEDED, NAME, "too much"), stalled=True
)
FAILED = watched.told(
    StageStatus(name=NAME, state=State.FAILED), Reason(Code.NON_FINITE, NAME, "the loss is nan")
)
SUSPENDED = watched.told(
    StageStatus(name=NAME, state=State.SUSPENDED), Reason(Code.SUSPENDED, NAME, "asked to stop")
)


EDITED = watched.chain(FAILED) | {"metadata": watched.spec(metadata__generation=4)["metadata"]}


def complete() -> Object:
    return watched.chain(at_stage=watched.STAGES)


def asked(thing: Object, retry: str, seen: str | None = None) -> Object:
    """The chain with a retry, and the one that the operator has seen."""
    meta = thing["metadata"] | {"annotations": {RETRY: retry}}
    return thing | {"metadata": meta, "status": thing["status"] | {"retry": seen}}


@pytest.mark.parametrize(
    ("thing", "end"),
    [
        (watched.spec(), None),
        (watched.chain(), None),
        (watched.chain(SUSPENDED), None),
        (complete(), ""),
        (
            watched.chain(STALLED),
            "family is stalled: stage c: BudgetExceeded: too much; next: kubectl edit mchain family"
            " -n vision",
        ),
        (
            watched.chain(FAILED),
            "family has failed: stage c: NonFinite: the loss is nan; next: kubectl edit mchain"
            " family -n vision",
        ),
        (
            situations.refused(watched.chain(), "spec.stages: too few"),
            "family is stalled: spec.stages: too few",
        ),
        # The operator has not seen an edit or a retry yet, or has.
        (
            watched.chain(FAILED) | {"metadata": watched.spec(metadata__generation=4)["metadata"]},
            None,
        ),
        (asked(watched.chain(FAILED), "now"), None),
        (asked(watched.chain(STALLED), "now", seen="before"), None),
        (asked(complete(), "now"), ""),
    ],
)
def test_when_a_watch_ends(thing: Object, end: str | None) -> None:
    assert end_of(thing) == end
    if end:
        seen = asked(thing, "now", seen="now")
        assert end_of(seen) == end


class Told:
    """Tells chains one after the other, and then nothing more. Pods may be forbidden."""

    def __init__(self, *told: list[Object], pods: list[Object] | None = None):
        self._told, self._pods = list(told), pods
        # Nothing more is told before this is so.
        self.seen: Callable[[], bool] = lambda: True

    async def list_at(
        self, resource: Resource, namespace: str, selector: str, fields: str
    ) -> tuple[list[Object], str]:
        if resource == CHAINS:
            assert (namespace, selector, fields) == ("vision", "", "metadata.name=family")
            return self._told.pop(0), "1"
        assert fields == "" and selector.startswith("modelchain.dev/chain=family,")
        if self._pods is None:
            raise Forbidden("pods")
        return self._pods, "1"

    async def watch(
        self, resource: Resource, namespace: str, version: str, *of: str
    ) -> AsyncIterator[tuple[str, Object]]:
        while resource == CHAINS and self._told:
            await asyncio.sleep(0.02)
            while not self.seen():
                await asyncio.sleep(0.02)
            told = self._told.pop(0)
            for one in told or [watched.spec()]:
                meta = one["metadata"] | {"resourceVersion": "2"}
                yield "MODIFIED" if told else "DELETED", one | {"metadata": meta}
        await asyncio.sleep(60)


def shown(*told: Object | None, pods: list[Object] | None = None) -> list[Watched]:
    """What is shown of a chain as it is told. None: it is deleted."""
    kube: Any = Told(*([one] if one else [] for one in told), pods=pods)
    found: list[Watched] = []
    asyncio.run(watch_chain(kube, "vision", told[0] or {}, found.append, 0.0))
    return found


def test_it_goes_on_until_the_chain_is_complete() -> None:
    found = shown(watched.spec(), watched.chain(SUSPENDED), watched.chain(), complete(), pods=[])
    states = [view.status.summary.state or "New" for view in found]
    assert states[0] == "New" and states[-1] == "Complete"


@pytest.mark.parametrize("pods", [None, watched.pods()])
def test_pods_are_shown_if_the_user_may_see_them(pods: list[Object] | None) -> None:
    """Those of a chain that had the name before are not."""
    other = watched.pods(1)[0]
    other["metadata"]["labels"]["modelchain.dev/chain-uid"] = "another"
    other["metadata"]["uid"] = "another"
    found = shown(watched.chain(), complete(), pods=None if pods is None else [*pods, other])
    assert {len(view.pods) for view in found} == {0 if pods is None else watched.NODES}


@pytest.mark.parametrize("stage", [STALLED, FAILED])
def test_what_cannot_go_on_is_an_error(stage: StageStatus) -> None:
    with pytest.raises(WorkError) as raised:
        shown(watched.chain(), watched.chain(stage), pods=[])
    assert str(raised.value) == end_of(watched.chain(stage)) and raised.value.exit_code == 1


def test_a_chain_that_is_deleted() -> None:
    with pytest.raises(WorkError, match=r"^family was deleted$"):
        shown(watched.chain(), None, pods=[])


def test_it_repaints_without_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "REPAINT_SECONDS", 0.001)
    kube, found = Told([watched.chain()], [complete()], pods=[]), list[Watched]()
    kube.seen = lambda: len(found) > 3
    api: Any = kube
    asyncio.run(watch_chain(api, "vision", watched.chain(), found.append, 0.0))
    assert len(found) > 4


def printed(capsys: pytest.CaptureFixture[str], *told: Object) -> list[str]:
    lines = StageLines()
    for thing in told:
        lines.show(watched_of(thing, [], watched.NOW))
    return capsys.readouterr().out.splitlines()


def test_a_pipe_gets_a_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    begun = watched.running(2)
    assert begun.progress is not None
    more = begun.changed(progress=begun.progress.model_copy(update={"step": 36_000}))
    same = begun.changed(progress=begun.progress.model_copy(update={"step": 36_001}))
    found = printed(
        capsys,
        watched.spec(),
        watched.chain(),
        watched.chain(),
        watched.chain(more),
        watched.chain(same),
        watched.chain(STALLED),
    )
    assert found == [
        "family  -  New  no operator has looked at it yet",
        "family  3/8  Running",
        "a  Succeeded  100%  family-a-a1",
        "b  Succeeded  100%  family-b-a1",
        "c  Running  50%  family-c-a1  stage c trains (never trained)",
        *(
            f"{s}  Pending  -  -  stage {s}: waits for stage {b}"
            for b, s in zip("cdefg", "defgh", strict=True)
        ),
        "c  Running  60%  family-c-a1  stage c trains (never trained)",
        "family  3/8  Stalled",
        "c  Stalled  -  -  stage c: BudgetExceeded: too much; next: kubectl edit mchain family -n"
        " vision",
    ]
