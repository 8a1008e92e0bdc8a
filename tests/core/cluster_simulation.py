"""A small API server, what acts on it, and operators that look at it request by request.

The operators are the real `View`, `decide`, `Executor` and `Reader`; only the loop around them is
told here again, cut into single requests, so that anything may happen between two of them. Every
promise is checked where a write lands.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import attrgetter

from cluster_objects import NAMESPACE, Chain, Thing
from cluster_operator import Kept, Looker, answer_of, copied, one_of_a_kind
from cluster_world import World
from simulation import MAX_DISRUPTIONS, MAX_RETRIES, weights_of

from modelchain.api.status import AttemptStatus, ChainStatus, State
from modelchain.decide.decide import decide
from modelchain.decide.observed import Launch, Step, Stop
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import PODS, ApiError
from modelchain_operator.api.objects import uid
from modelchain_operator.reconcile.execute import Executor
from modelchain_operator.reconcile.memory import Memory
from modelchain_operator.reconcile.observe import View
from modelchain_operator.reconcile.snapshot import Need, Reader, Snapshot
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS
from modelchain_operator.runners.template import CHAIN, CHAIN_UID

CONFIGS = [
    PoolFile.model_validate(
        {
            "nodePools": {"small": {"gpu": "A100", "gpusPerNode": 1}},
            "defaults": {
                "nodePool": "small",
                "image": "registry.example/trainer@sha256:" + digit * 64,
            },
        }
    )
    for digit in "01"
]
STEPS = 64  # of one look; the controller's own bound
REASONS = (
    "SameDeviceError",
    "ArtifactMissing",
    "DigestConflict",
    "ClaimMissing",
    "ClaimTaken",
    "NameTaken",
    "VerifyUnanswered",
)


class OneByOne(Reader):
    """Nothing here ever waits, so nothing goes on beside it."""

    async def each(self, facts: Snapshot, needs: Sequence[Need]) -> None:
        for need in needs:
            facts.read[need] = await self.one(facts, need)


@dataclass
class Cluster(World):
    """Operators in the world, each one request at a time, and what must hold when all has come to
    rest.
    """

    def advance(self, looker: Looker) -> None:
        """Its next request."""
        match looker.phase:
            case "idle":
                chain = self.chains.get(looker.chain)
                looker.rested, looker.again, looker.steps = True, None, 0
                if chain is not None:
                    looker.facts = Snapshot(chain.shown(), chain.spec(), chain.status, {}, [])
                    looker.phase = "jobs"
            case "jobs":
                facts = self._facts(looker)
                selector = f"{CHAIN_UID}={facts.uid}"
                jobs = answer_of(self.list(PYTORCHJOBS, NAMESPACE, selector))
                facts.jobs = {job["metadata"]["name"]: job for job in jobs}
                looker.recorded = frozenset(r.says.split()[0] for r in self.records.values())
                looker.phase = "pods"
            case "pods":
                facts = self._facts(looker)
                facts.pods = answer_of(self.list(PODS, NAMESPACE, f"{CHAIN_UID}={facts.uid}"))
                for pod in facts.pods:
                    looker.memory.remember(pod)
                self._decide(looker)
            case "write":
                self._write(looker)

    def _facts(self, looker: Looker) -> Snapshot:
        assert looker.facts is not None
        return looker.facts

    def _decide(self, looker: Looker) -> None:
        facts = self._facts(looker)
        reader = OneByOne(self, looker.memory, 30)  # type: ignore[arg-type]
        while True:
            view = View(facts, CONFIGS[self.config], looker.memory, self.now)
            step = decide(facts.spec, view.observed(), self.now)
            if not facts.needs:
                break
            answer_of(reader.answer(facts))
        looker.steps += 1
        assert looker.steps < STEPS, "a look that does not end"
        if not step.write and step.action is None:
            looker.phase, looker.facts, looker.again = "idle", None, step.again
        elif isinstance(step.action, Launch) and not step.write and not facts.fresh:
            reader.forget(facts, step.action)
            facts.fresh = True
            looker.phase = "jobs"
        else:
            looker.step, looker.phase = replace(step, status=one_of_a_kind(step.status)), "write"

    def _write(self, looker: Looker) -> None:
        facts, step = self._facts(looker), looker.step
        assert step is not None
        if isinstance(step.action, Launch) and not step.write:
            self._check_launch(looker, step.action)
        looker.step = None
        try:
            done = self._land(facts, step, looker.memory)
        except ApiError:
            looker.phase, looker.facts, looker.rested = "idle", None, False
            return
        self._check_live()
        if not done:
            looker.phase, looker.facts, looker.again = "idle", None, step.again
            return
        looker.rested = True
        self._decide(looker)

    def _land(self, facts: Snapshot, step: Step, memory: Memory) -> bool:
        executor = Executor(self, CONFIGS[self.config], memory)  # type: ignore[arg-type]
        facts.fresh = False
        if step.write:
            facts.chain, facts.status = (
                answer_of(executor.write_status(facts.chain, step.status)),
                step.status,
            )
            return True
        assert step.action is not None
        if isinstance(step.action, Stop):
            self._note_stop(facts, step.action)
        return answer_of(executor.act(facts, step.action))

    def _note_stop(self, facts: Snapshot, stop: Stop) -> None:
        """What ends by itself before the stop comes, or of a deadline, is judged by how it
        ended.
        """
        job = (
            self.jobs.get(facts.jobs[stop.attempt]["metadata"]["uid"])
            if stop.attempt in facts.jobs
            else None
        )
        ending = [
            a
            for s in facts.status.stages
            for a in s.attempts
            if a.name == stop.attempt and a.ending
        ]
        if job is not None and not job.finished and not ending:
            pods = [p for p in self.pods.values() if p.job == job.uid]
            if all(p.live for p in pods) and (pods or not job.ran):
                self.stopped |= {job.uid}

    def land(self, index: int) -> None:
        """A write of an operator that is gone arrives."""
        facts, step = self.flying.pop(index)
        self.last_read = {uid(job): job for job in facts.jobs.values()}
        with suppress(ApiError):
            self._land(copied(facts), step, Memory(artifacts=Kept(), claims=Kept()))
        self.last_read = None
        self._check_live()

    def die(self, looker: Looker, how: str) -> None:
        """The operator is killed: before its write was sent, with the write under way, or with the
        answer.
        """
        if how == "answered":
            self.advance(looker)
        elif how == "sent":
            assert looker.facts is not None and looker.step is not None
            self.flying.append((looker.facts, looker.step))
        looker.crash()

    # Without more faults.

    def calm_step(self) -> bool:
        """What happens next if nothing is in the way; False at rest."""
        current = self.lookers[self.turn]
        if current.phase != "idle":
            self.advance(current)
            return True
        for index, looker in enumerate(
            self.lookers
        ):  # who is in the middle of a look, then who has one to take
            if looker.phase != "idle":
                self.turn = index
                return True
        for index, looker in enumerate(self.lookers):
            if not looker.rested and not looker.standby:
                self.turn = index
                self.advance(looker)
                return True
        for name, happen in self.natural():
            self.trace += (name,)
            happen(self)
            self.touched()
            self._check_live()
            return True
        if self.flying:
            self.land(0)
            self.touched()
            return True
        soonest = min(
            (looker.again for looker in self.lookers if looker.again is not None), default=None
        )
        if self.waits == 3:
            return False
        waits = self.waits + 1
        self.wait(
            600.0 if soonest is None else max(soonest, 1.0)
        )  # all chains are looked at again by and by
        self.waits = waits
        return True

    def check_rest(self) -> None:
        """It ended, for a stated reason, and left nothing behind."""
        for chain in self.chains.values():
            status = chain.status
            assert status.observed_generation == chain.generation and chain.retry in (
                status.retry,
                None,
                "",
            )
            kinds = [kind for kind in ("Complete", "Failed", "Suspended") if status.is_true(kind)]
            stalled = next((s for s in status.stages if s.stalled), None)
            assert len(kinds) == 1 or (stalled is not None and not kinds), [
                c.type for c in status.conditions
            ]
            jobs = [j for j in self.jobs.values() if j.owner == chain.uid and not j.finished]
            assert not jobs, f"left behind: {jobs}"
            claim = self._claim(chain)
            match kinds:
                case ["Complete"]:
                    for stage in status.stages:
                        assert stage.artifact and stage.artifact.digest == weights_of(
                            stage.input_digest or ""
                        )
                        assert any(
                            r.says == f"{stage.input_digest} {stage.artifact.digest} {claim}"
                            for r in self.records.values()
                        )
                case ["Suspended"]:
                    assert chain.suspend
                case ["Failed"]:
                    failed = next(s for s in status.stages if s.state is State.FAILED)
                    last = failed.attempts[-1].failure if failed.attempts else None
                    assert (
                        (last is not None and last.permanent)
                        or failed.retries > MAX_RETRIES
                        or failed.disruptions > MAX_DISRUPTIONS
                        or failed.reason.startswith("NoArtifact")
                    ), failed
                case _:
                    assert stalled is not None and stalled.reason.startswith(REASONS), stalled
                    if stalled.reason.startswith("VerifyUnanswered"):
                        assert self.mute
            if kinds:
                mine = [lease for lease in self.leases.values() if lease.owner == chain.uid]
                assert not mine, f"leases left: {mine}"
        strays = [j.uid for j in self.jobs.values() if self._owner(j.owner) is None]
        assert not strays and not any(p.live for p in self.pods.values())

    # For a search.

    def copy(self) -> Cluster:
        other = copy.copy(self)
        for name in (
            "chains",
            "jobs",
            "pods",
            "verifiers",
            "records",
            "claims",
            "leases",
            "checkpoints",
            "made",
        ):
            setattr(other, name, dict(getattr(self, name)))
        other.lookers = [looker.copy() for looker in self.lookers]
        other.flying = list(self.flying)
        return other

    def key(self) -> bytes:
        chains = [(replace(c, version=0), id(c.status)) for c in self.chains.values()]
        flying = [
            (
                facts.uid,
                self._is_current(facts),
                id(facts.status),
                id(step.status),
                step.write,
                repr(step.action),
            )
            for facts, step in self.flying
        ]
        by_uid = attrgetter("uid")
        parts = (
            chains,
            [looker.key(self.chains.get(looker.chain)) for looker in self.lookers],
            self.turn,
            self.now,
            sorted(self.jobs.values(), key=by_uid),
            sorted(self.pods.values(), key=by_uid),
            sorted(self.verifiers.values(), key=by_uid),
            sorted(self.records.values(), key=by_uid),
            sorted(self.claims.values(), key=by_uid),
            sorted(self.leases.values(), key=by_uid),
            sorted(self.disk),
            sorted(self.checkpoints.items()),
            flying,
            sorted(self.made.items()),
            sorted(self.freed),
            sorted(self.noted),
            sorted(self.stopped),
            sorted(self.forgiven),
            sorted(self.permitted),
            sorted(self.recorded),
            self.wiped,
            self.mute,
            self.waits,
            self.refusals,
            self.config,
            sorted(self.by_hand),
            sorted(self.launched),
        )
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()

    def _is_current(self, facts: Snapshot) -> bool:
        chain = self.chains.get(facts.chain["metadata"]["name"])
        return (
            chain is not None and str(chain.version) == facts.chain["metadata"]["resourceVersion"]
        )


def alone(stages: int = 2, *, operators: int = 1, queue: bool = False) -> Cluster:
    """One chain, and one operator that looks, and others that only look when they are made to."""
    chain = Chain("family", "family-0", stages, queue=queue, status=one_of_a_kind(ChainStatus()))
    return Cluster({"family": chain}, [Looker("family", standby=n > 0) for n in range(operators)])


def together(stages: int = 2) -> Cluster:
    """Two chains on one claim; their first stages are the same work."""
    status = one_of_a_kind(ChainStatus())
    meta = {"name": "shared", "namespace": NAMESPACE, "labels": {CHAIN: ""}}
    claim = Thing("shared", "shared#1", "", "", {"metadata": meta})
    other = (("spec.stages[1].rerun", "mine"),)
    chains = {
        "one": Chain("one", "one-0", stages, shared=True, status=status),
        "two": Chain(
            "two", "two-0", stages, shared=True, edits=other if stages > 1 else (), status=status
        ),
    }
    world = Cluster(chains, [Looker("one"), Looker("two")], claims={"shared#1": claim})
    world.made["shared"] = 1
    return world


def attempts(world: Cluster) -> dict[str, AttemptStatus]:
    return {a.name: a for c in world.chains.values() for s in c.status.stages for a in s.attempts}
