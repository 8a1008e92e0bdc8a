"""`modelchain logs --follow`: follows a chain's logs over attempts and stages."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from modelchain.api.messages import one_line
from modelchain.api.status import AttemptStatus, ChainStatus, State
from modelchain.io.load import status_of
from modelchain_operator.api.kube import Invalid, Kube, NotFound, Object, Throttled, Unavailable
from modelchain_operator.api.objects import name, uid
from modelchain_operator.cli.changes import Feeds
from modelchain_operator.cli.followed import Followed, end_of
from modelchain_operator.cli.logs import (
    Choice,
    Say,
    Source,
    address,
    by_node,
    check,
    chosen,
    gone,
    node_away,
    prefix,
    query,
    sources,
)
from modelchain_operator.runners.pods import has_ended

# Seconds before a stream that ended is opened again while its container runs.
PAUSE_SECONDS = 1.0
# The most logs that are read at once: a stage has at most 256 pods.
MOST_STREAMS = 256


class Following:
    """Which logs are to be opened next. Pure: it is told the chain and its pods again and again."""

    def __init__(self, choice: Choice):
        self._choice = choice
        # The names of the attempts that are not followed, or not any more; None at first.
        self._passed: set[str] | None = None
        # The UIDs of the pods whose logs were opened, and the names of their attempts.
        self._opened: set[str] = set()
        self._shown: set[str] = set()
        # The attempts that had ended without a log when this was asked last. Their pods may be told
        # a moment later than their end.
        self._missing: set[str] = set()

    def due(self, status: ChainStatus, pods: Sequence[Object]) -> list[Source | AttemptStatus]:
        """What is to be printed now: logs that have begun, and attempts whose pods are gone."""
        if self._passed is None:
            first = chosen(status, self._choice)
            self._passed = status.attempts.keys() - {first.name if first else ""}
        found: list[Source | AttemptStatus] = []
        missed, self._missing = self._missing, set()
        for attempt in self._wanted(status):
            found += self._new(sources(attempt, pods, self._choice))
            if attempt.finished_at is None:
                continue
            if attempt.name in self._shown | missed:
                self._passed.add(attempt.name)
                found += [] if attempt.name in self._shown else [attempt]
            else:
                self._missing.add(attempt.name)
        return found

    def _wanted(self, status: ChainStatus) -> list[AttemptStatus]:
        """The attempts to follow, those that have begun first."""
        passed = self._passed or set()
        wanted = [one for one in self._asked(status) if one.name not in passed]
        return sorted(wanted, key=lambda one: one.started_at or "~")

    def _asked(self, status: ChainStatus) -> list[AttemptStatus]:
        if self._choice.attempt is not None:
            first = chosen(status, self._choice)
            return [] if first is None else [first]
        stage = self._choice.stage
        return [one for row, one in status.attempts.values() if stage in (None, row.name)]

    def _new(self, logs: Sequence[Source]) -> list[Source]:
        new = [s for s in logs if s.has_started and uid(s.pod) not in self._opened]
        self._opened |= {uid(source.pod) for source in new}
        self._shown |= {source.attempt.name for source in new}
        return new

    def over(self, chain: Object, status: ChainStatus) -> bool:
        """Whether nothing more can come."""
        going = any(attempt.finished_at is None for attempt in self._asked(status))
        if going or self._missing:
            return False
        if self._choice.attempt is not None or end_of(chain) is not None:
            return True
        stage = next((s for s in status.stages if s.name == self._choice.stage), None)
        return stage is not None and stage.state in (State.SUCCEEDED, State.FAILED)


class Printed:
    """How far a log was printed, by the times of its lines."""

    def __init__(self) -> None:
        self.stamp = ""
        # How many lines have this time, and how many of them are to come again.
        self._count, self._again = 0, 0

    def reopened(self) -> None:
        """The lines since `stamp` come again."""
        self._again = self._count

    def take(self, line: str) -> str | None:
        """The line without its time; None if it was printed before."""
        stamp, _, text = line.partition(" ")
        if stamp < self.stamp:
            return None
        if stamp == self.stamp and self._again:
            self._again -= 1
            return None
        self._count, self._again = (self._count + 1, 0) if stamp == self.stamp else (1, 0)
        self.stamp = stamp
        return text


def _note(text: str) -> None:
    print(f"modelchain: {text}", file=sys.stderr, flush=True)


class Printer:
    """Prints logs while they are written.

    Args:
        followed: tells whether a container still runs.
        tail: the most lines of the first logs, their last ones.
        say: prints a line of a log. What there is to say beside them goes to standard error.
    """

    def __init__(self, kube: Kube, followed: Followed, choice: Choice, tail: int | None, say: Say):
        self._kube, self._followed = kube, followed
        self._choice, self._tail = choice, tail
        self._say = say
        # The logs of one pod after another. Those of several pods are read side by side.
        self._turn = asyncio.Semaphore(MOST_STREAMS if choice.all_ranks else 1)
        self.reading = 0

    def begin(self, feeds: Feeds, due: Sequence[Source | AttemptStatus]) -> None:
        for one in due:
            self.reading += 1
            feeds.run(self._print(one, self._tail))
        if due:
            self._tail = None

    async def _print(self, one: Source | AttemptStatus, tail: int | None) -> None:
        async with self._turn:
            if isinstance(one, AttemptStatus):
                for line in gone(self._followed.chain, one):
                    _note(line)
            else:
                if not self._choice.all_ranks:
                    _note(f"the log of pod {name(one.pod)}")
                await self._follow(one, tail)
        self.reading -= 1

    async def _follow(self, source: Source, tail: int | None) -> None:
        """Print a log until its container has ended."""
        chain = self._followed.chain
        before = prefix(name(chain), source) if self._choice.all_ranks else ""
        place = address(chain["metadata"]["namespace"], source)
        said, printed = "", Printed()
        while True:
            runs, asked = self._runs(source), query(follow=True, tail=tail, since=printed.stamp)
            try:
                async for line in self._kube.log(*place, asked):
                    tail = None
                    if (text := printed.take(line)) is not None:
                        self._say(before + text)
            except NotFound:
                return
            except (Invalid, Throttled, Unavailable) as error:
                if str(error) != said:
                    said = str(error)
                    cause = node_away(source, error) if by_node(error) else one_line(said)
                    _note(f"a log broke off and is asked for again: {cause}")
            if not runs:
                return
            printed.reopened()
            await asyncio.sleep(PAUSE_SECONDS)

    def _runs(self, source: Source) -> bool:
        """Whether the container runs, as far as is known."""
        same = (pod for pod in self._followed.pods if uid(pod) == uid(source.pod))
        return any(not has_ended(pod) for pod in same)


async def follow_logs(
    kube: Kube, namespace: str, chain: Object, choice: Choice, tail: int | None, say: Say
) -> None:
    """Print the logs of attempts, one after the other, until no more can come.

    It waits for what has not started. Of the first logs there are at most `tail` lines. Raises
    InputError if there is no such stage or attempt, and WorkError if the chain is deleted.
    """
    check(chain, status_of(chain), choice)
    followed, following = Followed(chain), Following(choice)
    printer = Printer(kube, followed, choice, tail, say)
    async with Feeds() as feeds:
        followed.follow(feeds, kube, namespace, need_pods=True)
        while True:
            await feeds.wait(PAUSE_SECONDS)
            if not followed.ready:
                continue
            status = status_of(followed.chain)
            printer.begin(feeds, following.due(status, followed.pods))
            if not printer.reading and following.over(followed.chain, status):
                return
