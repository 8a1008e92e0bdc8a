"""Operators of `cluster_simulation`: how far an operator is in its pass, what it has read, and what
it remembers.
"""

from __future__ import annotations

import copy
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from cluster_objects import Chain

from modelchain.api.status import ChainStatus
from modelchain.decide.observed import Decision
from modelchain_operator.api.kube import Object
from modelchain_operator.reconcile.memory import Cache, Memory
from modelchain_operator.reconcile.snapshot import Snapshot

T = TypeVar("T")


def answer_of(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns; nothing in this simulation ever waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("the coroutine waits")


class Kept(Cache):
    """A cache without expiry: tests drop what an operator should forget."""

    def get(self, key: Any) -> Object | None:
        return self._kept.get(key, (0.0, None))[1]

    def copy(self) -> Kept:
        other = Kept()
        other._kept = dict(self._kept)
        return other


@dataclass
class Operator:
    """One operator, reconciling one chain: how far it is in its pass, what it has read, and what it
    is about to write.
    """

    chain: str
    # It makes a pass only when a test makes it.
    standby: bool = False
    # The next request: idle (reads the chain), jobs, pods, write.
    phase: str = "idle"
    facts: Snapshot | None = None
    decision: Decision | None = None
    steps: int = 0
    memory: Memory = field(
        default_factory=lambda: Memory(artifacts=Kept(), claims=Kept(), clock=lambda: 0.0)
    )
    # It has made a pass since the last change, and there was nothing to do.
    rested: bool = False
    again: float | None = None
    # Digests that had a StageArtifact on the chain's claim when it last read the jobs.
    recorded: frozenset[str] = frozenset()

    def copy(self) -> Operator:
        other = copy.copy(self)
        memory = self.memory
        assert isinstance(memory.artifacts, Kept) and isinstance(memory.claims, Kept)
        other.memory = Memory(
            pods=memory.pods.copy(),
            artifacts=memory.artifacts.copy(),
            claims=memory.claims.copy(),
            refused=dict(memory.refused),
            buildable=memory.buildable,
            indexed=dict(memory.indexed),
            clock=memory.clock,
        )
        other.facts = copied(self.facts) if self.facts else None
        return other

    def crash(self) -> None:
        """The process restarts: it forgets everything."""
        self.phase, self.facts, self.decision, self.rested, self.again = (
            "idle",
            None,
            None,
            False,
            None,
        )
        self.memory = Memory(artifacts=Kept(), claims=Kept(), clock=lambda: 0.0)

    def key(self, now: Chain | None) -> tuple[Any, ...]:
        facts = self.facts
        known: tuple[Any, ...] = ()
        if facts is not None:
            current = now is not None and facts.uid == now.uid
            fresh = (
                current
                and now is not None
                and facts.chain["metadata"]["resourceVersion"] == str(now.version)
            )
            read = sorted(
                (need.what, need.which, _identity(value)) for need, value in facts.read.items()
            )
            known = (
                current,
                fresh,
                id(facts.spec),
                id(facts.status),
                facts.fresh,
                facts.patched is not None,
                sorted(map(id, facts.jobs.values())),
                sorted(map(id, facts.pods)),
                read,
                self.recorded,
            )
        decision = (
            (id(self.decision.status), self.decision.write, repr(self.decision.action))
            if self.decision
            else None
        )
        pods = sorted((uid, pod["status"]["phase"]) for uid, pod in self.memory.pods.items())
        caches = [
            sorted((str(k), id(v)) for k, (_, v) in c._kept.items())
            for c in (self.memory.artifacts, self.memory.claims)
        ]
        refused = sorted((key, str(why.reason)) for key, why in self.memory.refused.items())
        indexed = sorted(self.memory.indexed)
        doing = self.phase, self.rested, self.again, self.steps
        return *doing, known, decision, pods, caches, refused, indexed


def copied(facts: Snapshot) -> Snapshot:
    """A copy with dicts of its own. Their values are shared, because they are never changed."""
    read = {
        need: dict(value) if need.what == "shares" else value for need, value in facts.read.items()
    }
    return replace(
        facts, jobs=dict(facts.jobs), pods=list(facts.pods), read=read, needs=set(facts.needs)
    )


def _identity(value: Any) -> Any:
    if isinstance(value, list):
        return str(sorted(map(id, value)))
    if isinstance(value, dict) and "metadata" not in value:
        return str(sorted((key, id(thing)) for key, thing in value.items()))
    return str(id(value))


_statuses: dict[str, ChainStatus] = {}


def one_of_a_kind(status: ChainStatus) -> ChainStatus:
    """The same object for equal statuses. Also checks that a status is read back as written."""
    text = status.model_dump_json(by_alias=True, exclude_none=True)
    if text not in _statuses:
        assert ChainStatus.model_validate_json(text) == status, "a status is read back as written"
        _statuses[text] = status
    return _statuses[text]
