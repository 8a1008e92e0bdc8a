"""Turns a snapshot into the `Observed` that `decide` is given.

Pure: it reads nothing itself. What is needed and was not read yet is noted with `Snapshot.want`.
The caller reads it, and then decides again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from modelchain.api import messages
from modelchain.api.artifact import stage_artifact_name
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import ChainStatus, Spent
from modelchain.api.uses import Uses
from modelchain.decide.ledger import spent_on
from modelchain.decide.observed import Artifact, Damage, Launch, Observed, Share
from modelchain.decide.relaxation import remembered
from modelchain.errors import InputError
from modelchain.gate.relaxation import Schedule, Trained
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import annotation, is_deleting, label, true_condition, uid
from modelchain_operator.api.objects import name as name_of
from modelchain_operator.reconcile import job_requests as requests
from modelchain_operator.reconcile.attempt import Sightings
from modelchain_operator.reconcile.indexing import Indexer
from modelchain_operator.reconcile.measuring import Measurements
from modelchain_operator.reconcile.memory import Memory
from modelchain_operator.reconcile.snapshot import RETRY, Inputs, Snapshot
from modelchain_operator.runners import pods as podread
from modelchain_operator.runners.registry import RUNNERS, UNNAMED, state_of
from modelchain_operator.runners.template import (
    ATTEMPT,
    CHAIN,
    CHAIN_UID,
    CLAIM_UID,
    INPUT_DIGEST,
    LABEL_LENGTH,
    STAGE,
    check_mount_path,
    label_of,
    unnumbered_of,
)

# Finished jobs of a stage that are kept for their logs.
KEPT_JOBS = 3


class View:
    """One chain, as it is shown to `decide`."""

    def __init__(self, snapshot: Snapshot, config: PoolFile, memory: Memory, now: float):
        self.snapshot = snapshot
        self.config = config
        self.memory = memory
        self.now = now
        self.spec = snapshot.spec.spec
        self.status = self._status()
        self.sightings = Sightings(snapshot, self.status, config, memory, now)
        self.attempts = self.sightings.attempts
        self.indexer = Indexer(snapshot, config, memory, now)
        self.measurements = Measurements(snapshot, memory, now)

    def observed(self) -> Observed:
        snapshot = self.snapshot
        obstacle = self._obstacle()
        pool = requests.pool_name(snapshot.spec, self.config)
        strays = dict(self._strays())
        unfinished = {
            name
            for name, job in snapshot.jobs.items()
            if state_of(job).finished is None and uid(job) not in strays
        }
        pods = self.sightings.pods
        with_pods = {name for name in pods if any(podread.is_live(pod) for pod in pods[name])}
        return Observed(
            status=self.status,
            artifact=self.artifact,
            attempt=self.sightings.seen,
            live=frozenset(unfinished | with_pods),
            inputs=Inputs(snapshot),
            fingerprint=self.spec.data.train.fingerprint,
            retry=_retry(snapshot.chain),
            poll_seconds=float(self.config.progress_seconds),
            highest_number=self._highest_number,
            records=True,
            obstacle=obstacle,
            stuck=self.sightings.stuck(),
            strays=strays | dict(self.indexer.strays()),
            spent_jobs=dict(self._spent_jobs()),
            claim_missing=self._own_claim() and snapshot.want("claim") is None,
            loading=self.loading,
            indexing=self.indexer.seen,
            share=self.share,
            outdated=self.outdated,
            shares=frozenset((snapshot.want("shares") or {}) if self._shared() else ()),
            measurement=self.measurements.seen,
            evaluation_jobs=self.measurements.jobs(),
            currency=self.config.currency,
            pool=self.config.node_pools.get(pool or ""),
            refused=lambda action: self.memory.refusal(snapshot.uid, action),
        )

    def _status(self) -> ChainStatus:
        """The stored status. If it is empty, one with the epochs of the chain's StageArtifacts."""
        status = self.snapshot.status
        if status.stages:
            return status
        records: list[Object] = self.snapshot.want("records") or []
        trained = sorted(records, key=lambda record: str(record["spec"]["finishedAt"]))
        known = remembered(self.snapshot.spec, map(self._trained, trained))
        update = {"stages": known.stages, "relaxation": known.relaxation}
        return status.model_copy(update=update)

    def _trained(self, record: Object) -> Trained:
        """What a StageArtifact tells of its stage's epochs, and of what they have cost."""
        spec = record["spec"]
        schedule = Schedule(spec["epochs"], spec.get("round") or 0, spec.get("firstEpochs"))
        alone, own = not spec.get("predecessor"), label(record, CHAIN_UID) == self.snapshot.uid
        spent = Spent() if own else spent_on(self._recorded(record))
        return Trained(spec["stage"], spec["inputDigest"], schedule, alone, spent)

    # -- what prevents a launch --------------------------------------------------------------------

    def _obstacle(self) -> Reason | None:
        """Why nothing can be launched; None if nothing is in the way."""
        try:
            self._check_for_a_cluster()
        except InputError as error:
            return requests.cannot_build(error)
        if (unbuildable := self._unbuildable()) is not None:
            return unbuildable
        if (kind := self._next_kind()) in self.snapshot.missing:
            runner = RUNNERS[kind]
            message = f"{runner.kind} is not installed; {runner.install}"
            return Reason(Code.RUNNER_MISSING, runner.kind, message, runner.install)
        if self.snapshot.orphans:
            return self._left_behind(self.snapshot.orphans[0])
        return self._claim_obstacle()

    def _next_kind(self) -> str:
        """The kind of job that is made next: an intent's, if its job is still to be made.

        An intent keeps the kind that it was written with, whatever the spec says by now.
        """
        intents = (a for _, a in self.attempts.values() if a.uid is None and a.finished_at is None)
        intent = next(intents, None)
        return self.spec.runner.kind if intent is None else intent.runner or UNNAMED

    def _check_for_a_cluster(self) -> None:
        """Check what only a cluster needs. Raises InputError, naming the field.

        The spec may be valid on a laptop. Or it may name a pool that this operator does not have.
        """
        spec, chain = self.spec, self.snapshot.spec
        if spec.runner.kind not in RUNNERS:
            raise InputError(messages.LOCAL, field="spec.runner.kind")
        pool = requests.pool_of(chain, self.config)
        requests.image_of(chain, self.config)
        for index, stage in enumerate(spec.stages):
            try:
                pool.processes(stage.resources.processes_per_node)
            except InputError as error:
                field = f"spec.stages[{index}].resources"
                raise InputError(error.problems[0].message, field=field) from error
        if spec.storage is None:
            message = "say where artifacts are kept: claimTemplate or claimName"
            raise InputError(message, field="spec.storage")
        if spec.data.volume.claim_name is None:
            message = "name the claim that holds the data"
            raise InputError(message, field="spec.data.volume.claimName")
        check_mount_path(spec.data.volume.mount_path)

    def _unbuildable(self) -> Reason | None:
        """Why the job of some stage cannot be made. It is found once for each spec of a chain."""
        meta = self.snapshot.spec.metadata
        spec = self.snapshot.uid, meta.generation
        if spec not in self.memory.buildable:
            reason = None
            try:
                requests.check_jobs(self.snapshot.spec, self.config, self.status.epochs)
            except InputError as error:
                reason = requests.cannot_build(error)
            self.memory.note_buildable(spec, reason)
        return self.memory.buildable[spec]

    def _claim_obstacle(self) -> Reason | None:
        claim, name = self.snapshot.want("claim"), requests.claim_name(self.snapshot.spec)
        if claim is None and not self._shared():
            return None  # it will be created
        if claim is None:
            message = f"there is no claim {name}; create it, or correct spec.storage.claimName"
            return Reason(Code.CLAIM_MISSING, name, message)
        if is_deleting(claim):
            look = f"kubectl describe pvc {name} -n {self.snapshot.namespace}"
            message = f"claim {name} is being deleted; what still uses it: {look}"
            return Reason(Code.CLAIM_MISSING, name, message, look)
        if not self._shared() and label(claim, CHAIN) != self.snapshot.spec.metadata.name:
            message = (
                f"claim {name} was not made for this chain (label {CHAIN}); to use it all the same,"
                " name it in spec.storage.claimName"
            )
            return Reason(Code.CLAIM_TAKEN, name, message)
        return None

    def loading(self) -> Reason | None:
        """Why the data is not there yet: a Job still fills its claim, or has failed to.

        Such a Job names the claim in its label `modelchain.dev/fills`.
        """
        claim, here = self.spec.data.volume.claim_name, f"-n {self.snapshot.namespace}"
        if claim is None or len(claim) > LABEL_LENGTH:
            return None  # a longer name cannot be a label's value, so no Job names it
        for job in self.snapshot.want("loaders", claim) or []:
            packs = job["metadata"]["name"]
            if true_condition(job, "Failed"):
                message = (
                    f"job {packs} was to fill claim {claim} and has failed: kubectl logs"
                    f" job/{packs} {here}; then delete it, or make it anew"
                )
                return Reason(Code.DATA_FAILED, packs, message)
            if not true_condition(job, "Complete"):
                return Reason(Code.DATA_LOADING, packs, f"job {packs} fills claim {claim}")
        return None

    def _shared(self) -> bool:
        return self.spec.storage is not None and self.spec.storage.claim_name is not None

    def _own_claim(self) -> bool:
        return self.spec.storage is not None and not self._shared()

    # -- artifacts and shares ----------------------------------------------------------------------

    def artifact(self, digest: str) -> Artifact | Damage | None:
        """The artifact that a StageArtifact records for this input digest; None if none does.

        `Damage` if this chain had trained the digest on a claim that is gone or was replaced: that
        artifact is a user's result, and is not trained again unasked.
        """
        claim: Object | None = self.snapshot.want("claim")
        named: Object | None = self.snapshot.want("artifact", digest)
        records = self._records_of(digest) if named is None else [named]
        if (record := self.snapshot.recorded(digest)) is not None:
            return self._recorded(record)
        if claim is not None:
            taken = stage_artifact_name(uid(claim), digest)
            if (other := next((r for r in records if name_of(r) == taken), None)) is not None:
                return self._conflict(other)
        lost = [record for record in records if self._was_ours(record["spec"])]
        return self._lost(lost, claim) if lost else None

    def _records_of(self, digest: str) -> list[Object]:
        """The records of an input digest on all claims.

        They do not matter once a job trains the digest on the present claim: its record will have
        the name that was read already. A job of an older version does not say on which claim it
        trains, and may have left a record of the name of before.
        """
        for name, (_, attempt) in self.attempts.items():
            job = self.snapshot.jobs.get(name)
            here = job is not None and label(job, CLAIM_UID)
            if here and attempt.finished_at is None and attempt.input_digest == digest:
                return []
        return self.snapshot.want("records of", digest) or []

    def _recorded(self, record: Object) -> Artifact:
        spec, later = record["spec"], (record.get("status") or {}).get("metrics") or {}
        # What another chain spent is in that chain's ledger. Here it would be counted twice.
        ours = spec["chain"] == self.snapshot.spec.metadata.name
        return Artifact(
            digest=spec["artifactDigest"],
            path=spec["path"],
            metrics=_percents(spec.get("metrics") or {}),
            evaluations=spec.get("evaluations") or {},
            later={key: _percents(measured["metrics"]) for key, measured in later.items()},
            pictures=_pictures(spec, later),
            trainer_math=spec.get("trainerMath"),
            own=label(record, CHAIN_UID) == self.snapshot.uid,
            **(self._cost_of(spec) if ours else {"macs": 0}),
        )

    def _cost_of(self, spec: Object) -> dict[str, Any]:
        """What a record says that its training has cost."""
        # A record of an older version does not tell the uses, and names no currency.
        untold = {"lost": round(1000 * float(spec["gpuSeconds"]))}
        uses = Uses.model_validate(spec.get("gpuMilliseconds", untold))
        cost = spec.get("cost") if self._counts(spec.get("currency")) else None
        unpriced = uses.total / 1000 if cost is None else float(spec.get("unpricedSeconds", 0.0))
        return {
            "macs": int(spec["macs"]),
            "lost_macs": int(spec.get("lostMacs", 0)),
            "gpu_milliseconds": uses,
            "queue_seconds": float(spec.get("queueSeconds", 0.0)),
            "cost": cost,
            "unpriced_seconds": unpriced,
        }

    def _counts(self, currency: str | None) -> bool:
        """Whether a cost in this currency may be added to this chain's."""
        return currency in (None, self.snapshot.status.currency or self.config.currency)

    def _was_ours(self, spec: Object) -> bool:
        """Whether a record on another claim is one of this chain, or one on a claim that had the
        name of this chain's. Other chains' records on claims of their own do not matter here.
        """
        mine = requests.claim_name(self.snapshot.spec) if self.spec.storage else None
        chain, claim = str(spec["chain"]), str(spec["claimName"])
        return chain == self.snapshot.spec.metadata.name or claim == mine

    def _conflict(self, record: Object) -> Damage:
        """The name of this chain's record belongs to a record of something else."""
        spec, named = record["spec"], name_of(record)
        message = (
            f"{named} records {spec['inputDigest']} on claim {spec['claimName']}"
            f" ({spec['claimUID']}), which has another name; save it, then:"
            f" kubectl delete sart {named} -n {self.snapshot.namespace}"
        )
        return self._unusable(Code.DIGEST_CONFLICT, named, message)

    def _lost(self, records: list[Object], claim: Object | None) -> Damage:
        """What to do about records whose artifact lies on a claim that is gone or was replaced."""
        names = " ".join(sorted(map(name_of, records)))
        where = ", ".join(
            sorted({f"{r['spec']['claimName']} ({r['spec']['claimUID']})" for r in records})
        )
        mine = requests.claim_name(self.snapshot.spec) if self.spec.storage else "none"
        have = f"claim {mine} ({uid(claim)})" if claim else f"claim {mine}, which is not there"
        message = (
            f"{names} lies on claim {where}, and this chain has {have}; bring that claim back, or"
            f" to train the stage again: kubectl delete sart {names} -n {self.snapshot.namespace}"
        )
        return self._unusable(Code.ARTIFACT_MISSING, names, message)

    def _unusable(self, code: Code, record: str, message: str) -> Damage:
        describe = f"kubectl describe sart {record} -n {self.snapshot.namespace}"
        return Damage(Reason(code, record, message, describe), stalls=True)

    def outdated(self, launch: Launch) -> bool:
        """Whether the attempt's job would be made differently today.

        An edit may have changed its kind, pool, claim, image or queue. Where no new job could be
        made, the old one is kept: the next launch reports what is missing.
        """
        job, claim = self.snapshot.jobs.get(launch.attempt.name), self.snapshot.want("claim")
        kind = self.spec.runner.kind
        if job is None or claim is None or kind not in RUNNERS or kind in self.snapshot.missing:
            return False
        stamp = annotation(job, requests.MADE_FROM) or ""
        try:
            now = requests.made_from(self.snapshot.spec, self.config, launch, uid(claim))
        except InputError:
            return False
        changed = stamp.startswith(requests.FORMULA) and stamp != now
        return changed or (launch.attempt.runner or UNNAMED) != kind

    def share(self, digest: str) -> Share:
        """Who has the share of this input digest.

        None if this chain does not use a shared claim and no other chain trains this digest. A
        rival counts without a Lease, too: its chain may have been deleted before its pods ended.
        """
        for rival in self.snapshot.want("rivals", digest) or []:
            return self._rival(rival)
        if not self._shared():
            return None
        if digest in (self.snapshot.want("shares") or {}):
            return "Mine"
        lease = self.snapshot.want("lease", digest)
        if lease is None or self._without_chain(lease):
            return "Free"
        holder = str(lease["spec"]["holderIdentity"])
        return _shared_stage(holder)

    def _rival(self, rival: Object) -> Reason:
        """Why the stage waits for the job or pod of another chain that trains the same."""
        if not self._without_chain(rival):
            return _shared_stage(label(rival, CHAIN))
        return self._left_behind(rival)

    def _without_chain(self, thing: Object) -> bool:
        """Whether the chain of a job, a pod or a Lease exists no longer."""
        name = label(thing, CHAIN)
        if name == self.snapshot.spec.metadata.name:
            return label(thing, CHAIN_UID) != self.snapshot.uid
        chain = self.snapshot.want("chain", name)
        return chain is None or uid(chain) != label(thing, CHAIN_UID)

    def _left_behind(self, thing: Object) -> Reason:
        """Why the stage waits for a job or pod of a chain that was deleted."""
        kind = thing["kind"]
        named = name_of(thing)
        space = self.snapshot.namespace
        return Reason(
            Code.ORPHANED_JOB,
            named,
            f"{kind} {named} has not ended, and chain {label(thing, CHAIN)}, which made it, was"
            f" deleted; wait until it has, or: kubectl delete {kind.lower()} {named} -n {space}",
            f"kubectl describe {kind.lower()} {named} -n {space}",
        )

    # -- jobs that are not needed ------------------------------------------------------------------

    def _strays(self) -> Iterator[tuple[str, str]]:
        """By UID, unfinished jobs that belong to no attempt in the status.

        A job belongs to the attempt that holds its UID, or to an intent with its name and digest.
        """
        for name, job in self.snapshot.jobs.items():
            if state_of(job).finished is not None or is_deleting(job):
                continue
            _, attempt = self.attempts.get(name, (None, None))
            intended = attempt is not None and attempt.uid is None and attempt.finished_at is None
            if attempt is None or not (
                attempt.uid == uid(job) or (intended and self.sightings.is_ours(job, attempt))
            ):
                yield uid(job), name

    def _spent_jobs(self) -> Iterator[tuple[str, str]]:
        """By UID, the finished jobs to delete. The last three of a stage stay for their logs."""
        finished: dict[str, list[tuple[int, str, str]]] = {}
        for name, job in self.snapshot.jobs.items():
            _, attempt = self.attempts.get(name, (None, None))
            closed = attempt is None or attempt.finished_at is not None
            if closed and state_of(job).finished is not None and not is_deleting(job):
                finished.setdefault(label(job, STAGE), []).append(
                    (int(label(job, ATTEMPT)), uid(job), name)
                )
        for jobs in finished.values():
            yield from ((uid, name) for _, uid, name in sorted(jobs)[:-KEPT_JOBS])

    def _highest_number(self, unnumbered: str, digest: str) -> int:
        """The highest attempt number in the labels of jobs and pods.

        If the status was lost, only these tell which numbers, and so which names, have been used.
        """
        pods = [pod for pods in self.sightings.pods.values() for pod in pods]
        numbers = [
            int(label(thing, ATTEMPT))
            for thing in [*self.snapshot.jobs.values(), *pods]
            if unnumbered_of(thing) == unnumbered or label(thing, INPUT_DIGEST) == label_of(digest)
        ]
        return max(numbers, default=0)


def _percents(metrics: Object) -> dict[str, float]:
    """The metrics of a record, which has them as decimals in texts."""
    return {name: float(value) for name, value in metrics.items()}


def _pictures(spec: Object, later: Object) -> dict[str, int]:
    """By an evaluation's short key, on how many pictures it was measured, if that was recorded."""
    keys, counts = spec.get("evaluations") or {}, spec.get("pictures") or {}
    known = {keys[name]: int(count) for name, count in counts.items() if name in keys}
    added = {key: int(one["pictures"]) for key, one in later.items() if one.get("pictures")}
    return known | added


def _retry(chain: Object) -> str | None:
    """The retry annotation, or its hash if it is too long to be copied into the status."""
    value = annotation(chain, RETRY)
    if value is None or len(value) <= LABEL_LENGTH:
        return value
    return hashlib.sha256(value.encode()).hexdigest()


def _shared_stage(chain: str) -> Reason:
    message = f"chain {chain} trains the same stage; this one waits until that has ended"
    return Reason(Code.SHARED_STAGE, chain, message)
