"""The API server of `cluster_simulation`: its objects, its verbs, and what the operator promises,
checked whenever a write arrives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster_objects import CONFIGS, Chain, Job, Pod, Thing, Verifier, shown
from cluster_operator import Operator, one_of_a_kind
from simulation import MAX_DISRUPTIONS, MAX_RETRIES, always_accurate, ledgers, weights_of
from sums import check_settled_stays, check_sums

from modelchain.api.status import ChainStatus, StageStatus, State
from modelchain.decide.observed import Decision, Launch
from modelchain_operator.api.kube import (
    ARTIFACTS,
    CHAINS,
    CLAIMS,
    EVENTS,
    JOBS,
    LEASES,
    PODS,
    AlreadyExists,
    Conflict,
    Forbidden,
    NotFound,
    Object,
    Resource,
)  # fmt: skip
from modelchain_operator.reconcile.job_requests import MADE_FROM, index_name
from modelchain_operator.reconcile.snapshot import Snapshot
from modelchain_operator.runners.kueue import LOCAL_QUEUES, QUEUE, RELEASED, UNRELEASED_QUEUE
from modelchain_operator.runners.pytorchjob import PYTORCHJOBS
from modelchain_operator.runners.template import (
    CHAIN_UID,
    INPUT_DIGEST,
    ROLE,
    TRAINING,
    TRAINS,
)


@dataclass
class ApiServer:
    """All objects, by UID. At most one object of a kind has a given name at a time."""

    chains: dict[str, Chain]
    operators: list[Operator]
    turn: int = 0
    now: float = 1_700_000_000.0
    jobs: dict[str, Job] = field(default_factory=dict)
    pods: dict[str, Pod] = field(default_factory=dict)
    verifiers: dict[str, Verifier] = field(default_factory=dict)
    records: dict[str, Thing] = field(default_factory=dict)
    claims: dict[str, Thing] = field(default_factory=dict)
    leases: dict[str, Thing] = field(default_factory=dict)
    # (claim UID, input digest) of every complete artifact.
    disk: frozenset[tuple[str, str]] = frozenset()
    checkpoints: dict[str, int] = field(default_factory=dict)
    # What is measured of a model that was trained from these inputs; and the inputs, by digest.
    metrics_of: Callable[[Mapping[str, Any]], dict[str, float]] = always_accurate
    inputs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    # Writes of dead operators that may still arrive.
    flying: list[tuple[Snapshot, Decision]] = field(default_factory=list)
    # How often time has passed since the last change.
    waits: int = 0

    # What happened, for the checks; `made` also numbers UIDs.
    made: dict[str, int] = field(default_factory=dict)
    # Released jobs: (chain UID, job UID).
    freed: frozenset[tuple[str, str]] = frozenset()
    # Created jobs: (chain UID, name).
    launched: frozenset[tuple[str, str]] = frozenset()
    # UIDs of jobs that a status has named.
    noted: frozenset[str] = frozenset()
    # UIDs of jobs that an operator deleted; their ends charge no budget.
    stopped: frozenset[str] = frozenset()
    # Names of attempts that began before the budgets were last renewed.
    forgiven: frozenset[str] = frozenset()
    # A status was lost.
    wiped: bool = False
    # Digests whose record was deleted, which permits training them again.
    permitted: frozenset[str] = frozenset()
    # Digests that have ever had a record.
    recorded: frozenset[str] = frozenset()
    # The jobs that a dead operator had read, while a write of it arrives.
    last_read: dict[str, Object] | None = None
    # How many of the next creations are refused.
    refusals: int = 0
    # Verify Jobs end without an answer.
    mute: bool = False
    # Index Jobs take a while; otherwise they have finished once they are created.
    slow_index: bool = False
    # Names of index Jobs that have finished.
    indexed: frozenset[str] = frozenset()
    # A webhook adds a sidecar to every trainer's pod.
    sidecars: bool = False
    # The index of the operator's current configuration.
    config: int = 0
    # A change was requested while an attempt was launched.
    changed: bool = False
    # UIDs of jobs that another client deleted.
    by_hand: frozenset[str] = frozenset()
    # What has happened, for the message of a failed check.
    trace: tuple[str, ...] = ()

    # The API server.

    async def get(self, resource: Resource, namespace: str, name: str) -> Object:
        if self.last_read is not None:
            things = [job for job in self.last_read.values() if job["metadata"]["name"] == name]
            if resource is not PYTORCHJOBS or not things:
                raise NotFound("the operator that read this is dead")
            return things[0]
        if resource is CHAINS and name in self.chains:
            return self.chains[name].shown()
        for thing in self._kind(resource).values():
            if thing.name == name:
                return shown(thing)
        raise NotFound(f"{resource.plural} {name}")

    async def list(
        self, resource: Resource, namespace: str, selector: str = "", fields: str = ""
    ) -> list[Object]:
        if resource is EVENTS:
            return []
        things = [*self.pods.values()] if resource is PODS else [*self._kind(resource).values()]
        return [
            seen for seen in map(shown, things) if _selected(seen["metadata"]["labels"], selector)
        ]

    async def create(self, resource: Resource, body: Object) -> Object:
        name, kind = body["metadata"]["name"], self._kind(resource)
        if any(thing.name == name for thing in kind.values()):
            raise AlreadyExists(name)
        if self.refusals:
            self.refusals -= 1
            raise Forbidden(f"{name}: exceeded quota")
        self.made[name] = self.made.get(name, 0) + 1
        uid = f"{name}#{self.made[name]}"
        labels = body["metadata"].get("labels", {})
        owner = labels.get(CHAIN_UID, "")
        self._check_made(resource, owner, name)
        thing: Any
        if resource is PYTORCHJOBS:
            assert body["spec"]["runPolicy"]["suspend"] and labels[QUEUE] == UNRELEASED_QUEUE, (
                "a job is created suspended and in no real queue"
            )
            notes = body["metadata"]["annotations"]
            thing = Job(name, uid, owner, notes[INPUT_DIGEST], notes[MADE_FROM], body, self.now)
        elif resource is JOBS:
            digest = body["metadata"]["annotations"].get(INPUT_DIGEST, "")
            thing = Verifier(name, uid, owner, digest, body)
            if thing.indexes and not self.slow_index:
                thing, self.indexed = replace(thing, finished=True), self.indexed | {name}
        elif resource is ARTIFACTS:
            where = body["spec"]["claimUID"], body["spec"]["inputDigest"]
            assert where in self.disk, "only an artifact that exists is recorded"
            self.recorded |= {where[1]}
            says = (
                f"{body['spec']['inputDigest']} {body['spec']['artifactDigest']}"
                f" {body['spec']['claimUID']}"
            )
            thing = Thing(name, uid, owner, says, body, self.now)
        else:
            thing = Thing(
                name, uid, owner, str(body["metadata"].get("annotations", "")), body, self.now
            )
        kind[uid] = thing
        self.touched()
        return shown(thing)

    async def patch(self, resource: Resource, namespace: str, name: str, body: Object) -> Object:
        """A release, the only patch the operator sends; it takes one step or two."""
        assert resource is PYTORCHJOBS
        job = next((job for job in self.jobs.values() if job.name == name), None)
        if job is None:
            raise NotFound(name)
        meta = body["metadata"]
        if (meta["uid"], meta["resourceVersion"]) != (job.uid, str(job.version)):
            raise Conflict(name)
        labels, spec = meta.get("labels", {}), body.get("spec")
        assert job.suspended or not labels, (
            "Kueue refuses to change the queue of a job that is not suspended"
        )
        assert spec is None or job.queue is None, (
            "the queue is removed before the suspension is lifted"
        )
        assert job.uid in self.noted, "a job is not patched before a status has named its UID"
        released = RELEASED in meta.get("annotations", {})
        if released and not job.released:
            self._check_release(job)
            self.freed |= {(job.owner, job.uid)}
        update = {"queue": labels.get(QUEUE, job.queue), "released": job.released or released}
        self.jobs[job.uid] = job = job.changed(**update, **({"suspended": False} if spec else {}))
        self.touched()
        return shown(job)

    async def delete(
        self, resource: Resource, namespace: str, name: str, uid: str, propagation: str = "Fore"
    ) -> None:
        kind = self._kind(resource)
        thing = next((thing for thing in kind.values() if thing.name == name), None)
        if thing is None:
            raise NotFound(name)
        if thing.uid != uid:
            raise Conflict(name)
        if isinstance(thing, Job):
            self._check_deleted(thing)
        if isinstance(thing, Job | Verifier):
            kind[uid] = (
                thing.changed(deleting=True)
                if isinstance(thing, Job)
                else replace(thing, deleting=True)
            )
        else:
            del kind[uid]
        self.touched()

    async def replace_status(self, resource: Resource, body: Object) -> Object:
        meta = body["metadata"]
        chain = self.chains.get(meta["name"])
        if chain is None or chain.uid != meta["uid"]:
            raise NotFound(meta["name"])
        if str(chain.version) != meta["resourceVersion"]:
            raise Conflict(meta["name"])
        status = one_of_a_kind(ChainStatus.model_validate_json(json.dumps(body["status"])))
        if status == chain.status:  # like the API server: no new version, and no watch event
            return chain.shown()
        self._check_status(chain, status)
        self.chains[chain.name] = chain = replace(chain, status=status, version=chain.version + 1)
        self.noted |= {a.uid for _, a in status.attempts.values() if a.uid}
        self.touched()
        return chain.shown()

    def _kind(self, resource: Resource) -> dict[str, Any]:
        if resource is CHAINS or resource in LOCAL_QUEUES:
            return {}
        kinds = {
            PYTORCHJOBS: self.jobs,
            JOBS: self.verifiers,
            ARTIFACTS: self.records,
            CLAIMS: self.claims,
        }
        return {**kinds, LEASES: self.leases}[resource]

    def touched(self) -> None:
        """Something changed, and watches report it: every operator needs another pass."""
        self.waits = 0
        for operator in self.operators:
            operator.rested = False

    def _owner(self, uid: str) -> Chain | None:
        return next((chain for chain in self.chains.values() if chain.uid == uid), None)

    def _claim(self, chain: Chain) -> str:
        name = "shared" if chain.shared else f"{chain.name}-artifacts"
        return next((claim.uid for claim in self.claims.values() if claim.name == name), "")

    # The promises.

    def _check_made(self, resource: Resource, owner: str, name: str) -> None:
        """The job of an attempt is created once, unless another client deleted it: an operator
        writes the end of an attempt before it deletes the job.
        """
        if resource is PYTORCHJOBS and not self.wiped:
            uid = f"{name}#{self.made[name] - 1}"
            assert (owner, name) not in self.launched or uid in self.by_hand, (
                f"{name} is created again"
            )
            self.launched |= {(owner, name)}

    def _check_deleted(self, job: Job) -> None:
        """The job of an intent is not deleted before a status has named its UID. Otherwise its name
        would be free, and the job would be created a second time.
        """
        chain = self._owner(job.owner)
        for _, attempt in chain.status.attempts.values() if chain else ():
            assert attempt.name != job.name or attempt.finished_at or job.uid in self.noted, (
                f"{job.uid} is in no status"
            )
            stops = attempt.finished_at or attempt.ending or attempt.state is State.SUSPENDED
            assert attempt.uid != job.uid or stops or self.wiped, f"{job.uid} is wanted"

    def _check_release(self, job: Job) -> None:
        assert job.uid in self.noted, "a job is released only after a status has named its UID"
        assert not job.finished and not job.deleting
        chain = self._owner(job.owner)
        if chain is not None and not self.wiped:
            # A slow operator may release a job late, but never one whose attempt is closed.
            named = [a for _, a in chain.status.attempts.values() if a.uid == job.uid]
            assert named, "the status still names the job"
            assert not any(a.finished_at for a in named), "the job of a closed attempt never starts"
        same = [
            uid for owner, uid in self.freed if owner == job.owner and uid.split("#")[0] == job.name
        ]
        assert self.wiped or not same, f"{job.name} has run before as {same}"

    def _check_live(self) -> None:
        for chain in self.chains.values():
            going = {
                j.uid
                for j in self.jobs.values()
                if j.owner == chain.uid and not j.finished and not j.suspended
            }
            going |= {
                p.job
                for p in self.pods.values()
                if p.live and p.trains and dict(p.labels)[CHAIN_UID] == chain.uid
            }
            assert len(going) <= 1, f"two live attempts: {sorted(going)}"

    def _check_status(self, chain: Chain, status: ChainStatus) -> None:
        before = {s.name: s for s in ledgers(chain.status)}
        after = {s.name: s for s in ledgers(status)}
        for name, old in before.items():
            spent = after[name].gpu_seconds if name in after else -1.0
            assert self.wiped or not old.attempts or spent >= old.gpu_seconds - 1e-6, name
            if old.attempts and not self.wiped:
                check_settled_stays(old, after[name])
        assert sum(s.macs for s in after.values()) == status.total.macs
        check_sums(status)
        suspended = chain.suspend and status.observed_generation == chain.generation
        kinds = [c.type for c in status.conditions]
        assert not {"Stalled", "Reconciling"} <= set(kinds) and len(set(kinds)) == len(kinds)
        for index, stage in enumerate(status.stages):
            old = before.get(stage.name, StageStatus(name=stage.name))
            assert stage.attempt_count >= old.attempt_count, "attempt numbers never fall"
            assert all(a.finished_at for a in stage.attempts[:-1]), (
                "only the newest attempt may be open"
            )
            if not self.wiped:
                assert (
                    stage.gpu_seconds >= old.gpu_seconds - 1e-6 and stage.macs >= old.macs
                ) or not old.attempts
            if stage.attempts and stage.attempts[-1].name not in {a.name for a in old.attempts}:
                assert not suspended, "a suspended chain starts nothing"
                self._check_intent(chain, status, index, old)
            self._check_closed(stage, old)

    def _check_intent(
        self, chain: Chain, status: ChainStatus, index: int, old: StageStatus
    ) -> None:
        stage = status.stages[index]
        new = stage.attempts[-1]
        asked = (
            chain.status.observed_generation != chain.generation
            or chain.status.retry != chain.retry
        )
        over = chain.status.is_true("Complete") or chain.status.is_true("Failed")
        assert asked or not over, "a finished chain starts no work by itself"
        assert self._is_indexed(chain), f"{new.name} begins before its data is indexed"
        for _, other in chain.status.attempts.values():
            job = self.jobs.get(other.uid or "")
            assert job is None or job.finished, f"{new.name} begins before {other.name} has ended"
        pods = [
            p
            for p in self.pods.values()
            if p.live and p.trains and dict(p.labels)[CHAIN_UID] == chain.uid
        ]
        assert self.wiped or not pods, f"{new.name} begins while {pods} are live"
        names = {uid.split("#")[0] for owner, uid in self.freed if owner == chain.uid}
        assert new.name not in names or self.wiped, "an attempt number is used once"
        if index:
            first = status.stages[index - 1]
            assert first.state is State.SUCCEEDED and first.artifact is not None
            assert weights_of(first.input_digest or "") == first.artifact.digest
        last = old.attempts[-1] if old.attempts else None
        job = self.jobs.get(last.uid or "") if last else None
        if (
            job is not None
            and job.finished == "Succeeded"
            and job.digest == new.input_digest
            and not self._edited(old)
        ):
            claim = self._claim(chain)
            known = (
                claim,
                new.input_digest,
            ) in self.disk and new.input_digest not in self.permitted
            assert not known, "a lost last word is no reason to train again"
        judged = [
            a
            for a in old.attempts
            if a.input_digest == new.input_digest and a.name not in self.forgiven
        ]
        judged += [a for a in stage.attempts if a.name not in {o.name for o in old.attempts}]
        failures = [a.failure for a in judged if a.failure is not None and a.state is State.FAILED]
        assert not any(failure.permanent for failure in failures)
        assert sum(failure.disruption for failure in failures) <= MAX_DISRUPTIONS
        assert sum(not failure.disruption for failure in failures) <= MAX_RETRIES

    def _edited(self, old: StageStatus) -> bool:
        return bool(old.attempts) and old.attempts[-1].state is State.SUSPENDED

    def _is_indexed(self, chain: Chain) -> bool:
        """Whether an index Job has finished for this chain's data, on its claim as it is or was."""
        claim = "shared" if chain.shared else f"{chain.name}-artifacts"
        claims = [f"{claim}#{n}" for n in range(1, self.made[claim] + 1)]
        names = {index_name(chain.spec(), config, uid) for config in CONFIGS for uid in claims}
        return bool(names & self.indexed)

    def _check_closed(self, stage: StageStatus, old: StageStatus) -> None:
        open_ = {a.name for a in old.attempts if a.finished_at is None}
        for attempt in stage.attempts:
            if attempt.finished_at is None or attempt.name not in open_:
                continue
            if attempt.uid in self.stopped:
                assert attempt.state in (
                    State.SUSPENDED,
                    State.SUCCEEDED,
                ), f"{attempt.name} was stopped: {attempt}"
            if attempt.state is State.SUCCEEDED:
                assert attempt.input_digest in self.recorded, (
                    "the artifact is recorded before its attempt is closed"
                )

    def _check_launch(self, operator: Operator, launch: Launch) -> None:
        facts = operator.facts
        assert facts is not None and facts.fresh, "the cluster is read again before a launch"
        assert launch.attempt.input_digest not in operator.recorded, (
            "a digest that has a record is not trained again"
        )
        if launch.stage and not launch.alone:
            assert launch.predecessor is not None
            before = facts.status.stages[launch.stage - 1]
            assert (
                launch.inputs["predecessor"]
                == launch.predecessor.digest
                == weights_of(before.input_digest or "")
            )
            assert before.input_digest in operator.recorded, "its predecessor is recorded"


def _selected(labels: dict[str, str], selector: str) -> bool:
    trains = labels.get(ROLE) in TRAINING
    if TRAINS in selector and not trains:
        return False
    rest = selector.replace(TRAINS, "")
    terms = [term.split("=") for term in rest.split(",") if term]
    return all(
        (labels.get(name.rstrip("!")) == value) != name.endswith("!") for name, value in terms
    )
