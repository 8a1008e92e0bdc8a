"""A simulated cluster: an API server, what acts on it, and operators whose passes are cut into
single requests.

The operators use the real `View`, `decide`, `Executor` and `Reader`. Only the loop around them is
written again here, request by request, so that anything may happen between two requests. Every
promise is checked when a write arrives.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import attrgetter

from cluster_objects import CONFIGS, NAMESPACE, Chain, Thing
from cluster_operator import Kept, Operator, answer_of, copied, one_of_a_kind
from cluster_world import World
from simulation import MAX_DISRUPTIONS, MAX_RETRIES, weights_of

from modelchain.api.status import AttemptStatus, ChainStatus, State
from modelchain.decide.decide import decide
from modelchain.decide.observed import Decision, Launch, Stop
from modelchain_operator.api.kube import PODS, ApiError
from modelchain_operator.api.objects import uid
from modelchain_operator.reconcile.controller import rests_on
from modelchain_operator.reconcile.execute import Executor
from modelchain_operator.reconcile.memory import Memory
from modelchain_operator.reconcile.observe import View
from modelchain_operator.reconcile.snapshot import Need, Reader, Snapshot
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS
from modelchain_operator.runners.template import CHAIN, CHAIN_UID

STEPS = 64  # of one pass; the controller's own bound
REASONS = (
    "SameDeviceError",
    "ArtifactMissing",
    "DigestConflict",
    "ClaimMissing",
    "ClaimTaken",
    "NameTaken",
    "VerifyUnanswered",
    "IndexFailed",
)


class OneByOne(Reader):
    """A reader that answers needs one after another: nothing in this simulation waits, so there is
    no concurrency.
    """

    async def each(self, facts: Snapshot, needs: Sequence[Need]) -> None:
        for need in needs:
            facts.read[need] = await self.one(facts, need)


@dataclass
class Cluster(World):
    """Operators in the world, each advanced by single requests, and what must be true once nothing
    changes any more.
    """

    def advance(self, operator: Operator) -> None:
        """Makes the operator's next request."""
        match operator.phase:
            case "idle":
                chain = self.chains.get(operator.chain)
                operator.rested, operator.again, operator.steps = True, None, 0
                if chain is not None:
                    operator.facts = Snapshot(chain.shown(), chain.spec(), chain.status, {}, [])
                    operator.phase = "jobs"
            case "jobs":
                facts = self._facts(operator)
                selector = f"{CHAIN_UID}={facts.uid}"
                jobs = answer_of(self.list(PYTORCHJOBS, NAMESPACE, selector))
                facts.jobs = {job["metadata"]["name"]: job for job in jobs}
                claim = self._claim(self.chains[operator.chain])
                said = (record.says.split() for record in self.records.values())
                operator.recorded = frozenset(digest for digest, _, uid in said if uid == claim)
                operator.phase = "pods"
            case "pods":
                facts = self._facts(operator)
                facts.pods = answer_of(self.list(PODS, NAMESPACE, f"{CHAIN_UID}={facts.uid}"))
                for pod in facts.pods:
                    operator.memory.remember(pod)
                self._decide(operator)
            case "write":
                self._write(operator)

    def _facts(self, operator: Operator) -> Snapshot:
        assert operator.facts is not None
        return operator.facts

    def _decide(self, operator: Operator) -> None:
        facts = self._facts(operator)
        reader = OneByOne(self, operator.memory, 30)  # type: ignore[arg-type]
        while True:
            view = View(facts, CONFIGS[self.config], operator.memory, self.now)
            decision = decide(facts.spec, view.observed(), self.now)
            if not facts.needs:
                break
            answer_of(reader.answer(facts))
        operator.steps += 1
        assert operator.steps < STEPS, "the pass does not end"
        if not decision.write and decision.action is None:
            operator.phase, operator.facts, operator.again = "idle", None, decision.again
        elif (digests := rests_on(facts.status, decision)) and not facts.fresh:
            reader.forget(facts, digests)
            facts.fresh = True
            if decision.write:
                self._decide(operator)
            else:
                operator.phase = "jobs"
        else:
            operator.decision = replace(decision, status=one_of_a_kind(decision.status))
            operator.phase = "write"

    def _write(self, operator: Operator) -> None:
        facts, decision = self._facts(operator), operator.decision
        assert decision is not None
        if isinstance(decision.action, Launch) and not decision.write:
            self._check_launch(operator, decision.action)
        operator.decision = None
        try:
            done = self._land(facts, decision, operator.memory)
        except ApiError:
            operator.phase, operator.facts, operator.rested = "idle", None, False
            return
        self._check_live()
        if not done:
            operator.phase, operator.facts, operator.again = "idle", None, decision.again
            return
        operator.rested = True
        self._decide(operator)

    def _land(self, facts: Snapshot, decision: Decision, memory: Memory) -> bool:
        executor = Executor(self, CONFIGS[self.config], memory)  # type: ignore[arg-type]
        facts.fresh = False
        if decision.write:
            facts.chain, facts.status = (
                answer_of(executor.write_status(facts.chain, decision.status)),
                decision.status,
            )
            return True
        assert decision.action is not None
        if isinstance(decision.action, Stop):
            self._note_stop(facts, decision.action)
        return answer_of(executor.act(facts, decision.action))

    def _note_stop(self, facts: Snapshot, stop: Stop) -> None:
        """Remembers that this job was stopped, so its end may charge no budget. A job whose pods
        ended before, or that a deadline ended, is left out: it is judged by how it ended.
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
        """A write of a dead operator arrives."""
        facts, decision = self.flying.pop(index)
        self.last_read = {uid(job): job for job in facts.jobs.values()}
        with suppress(ApiError):
            self._land(copied(facts), decision, Memory(artifacts=Kept(), claims=Kept()))
        self.last_read = None
        self._check_live()

    def die(self, operator: Operator, how: str) -> None:
        """The operator is killed before it sends its write ("unsent"), while the write is under way
        ("sent"), or when the write has been made ("answered").
        """
        if how == "answered":
            self.advance(operator)
        elif how == "sent":
            assert operator.facts is not None and operator.decision is not None
            self.flying.append((operator.facts, operator.decision))
        operator.crash()

    # Life without further faults.

    def calm_step(self) -> bool:
        """What happens next without a fault; False once nothing changes any more."""
        current = self.operators[self.turn]
        if current.phase != "idle":
            self.advance(current)
            return True
        # First an operator in the middle of a pass, then one that has a pass to make.
        for index, operator in enumerate(self.operators):
            if operator.phase != "idle":
                self.turn = index
                return True
        for index, operator in enumerate(self.operators):
            if not operator.rested and not operator.standby:
                self.turn = index
                self.advance(operator)
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
            (operator.again for operator in self.operators if operator.again is not None),
            default=None,
        )
        if self.waits == 3:
            return False
        waits = self.waits + 1
        # Every chain is reconciled again after at most ten minutes.
        self.wait(600.0 if soonest is None else max(soonest, 1.0))
        self.waits = waits
        return True

    def check_rest(self) -> None:
        """Every chain has ended for a stated reason and left nothing behind."""
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
            jobs += [v for v in self.verifiers.values() if v.indexes and not v.finished]
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
                        or (self.slow_index and failed.reason.startswith("UserError"))
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
        other.operators = [operator.copy() for operator in self.operators]
        other.flying = list(self.flying)
        return other

    def key(self) -> bytes:
        chains = [(replace(c, version=0), id(c.status)) for c in self.chains.values()]
        flying = [
            (
                facts.uid,
                self._is_current(facts),
                id(facts.status),
                id(decision.status),
                decision.write,
                repr(decision.action),
            )
            for facts, decision in self.flying
        ]
        by_uid = attrgetter("uid")
        parts = (
            chains,
            [operator.key(self.chains.get(operator.chain)) for operator in self.operators],
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
            self.sidecars,
            self.waits,
            self.refusals,
            self.config,
            sorted(self.by_hand),
            sorted(self.launched),
            self.slow_index,
            sorted(self.indexed),
        )
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()

    def _is_current(self, facts: Snapshot) -> bool:
        chain = self.chains.get(facts.chain["metadata"]["name"])
        return (
            chain is not None and str(chain.version) == facts.chain["metadata"]["resourceVersion"]
        )


def alone(
    stages: int = 2,
    *,
    operators: int = 1,
    queue: bool = False,
    sidecars: bool = False,
    slow_index: bool = False,
) -> Cluster:
    """One chain and one active operator. The other operators make a pass only when a test makes
    them.
    """
    chain = Chain("family", "family-0", stages, queue=queue, status=one_of_a_kind(ChainStatus()))
    active = [Operator("family", standby=n > 0) for n in range(operators)]
    return Cluster({"family": chain}, active, sidecars=sidecars, slow_index=slow_index)


def together(stages: int = 2, *, shared: bool = True, slow_index: bool = False) -> Cluster:
    """Two chains whose first stages have the same input digest: on one claim, or on claims of their
    own.
    """
    status = one_of_a_kind(ChainStatus())
    meta = {"name": "shared", "namespace": NAMESPACE, "labels": {CHAIN: ""}}
    claim = Thing("shared", "shared#1", "", "", {"metadata": meta})
    other = (("spec.stages[1].rerun", "mine"),)
    chains = {
        "one": Chain("one", "one-0", stages, shared=shared, status=status),
        "two": Chain(
            "two", "two-0", stages, shared=shared, edits=other if stages > 1 else (), status=status
        ),
    }
    active = [Operator("one"), Operator("two")]
    world = Cluster(chains, active, claims={"shared#1": claim}, slow_index=slow_index)
    world.made["shared"] = 1
    return world


def attempts(world: Cluster) -> dict[str, AttemptStatus]:
    return {a.name: a for c in world.chains.values() for s in c.status.stages for a in s.attempts}
