"""One pass along a chain: what each stage becomes, and the first action that is due."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.spec import ModelChain
from modelchain.api.status import ArtifactRef, AttemptStatus, AvoidedNode, Spent, StageStatus, State
from modelchain.decide.conditions import constant
from modelchain.decide.ledger import (
    account,
    booked,
    closed,
    ended,
    least,
    plus,
    shown,
    timestamp,
    whole,
)
from modelchain.decide.nodes import avoided, nodes_avoided, same_everywhere, without_faults
from modelchain.decide.observed import (
    Action,
    Artifact,
    Damage,
    Launch,
    MakeClaim,
    Observed,
    RecordArtifact,
    Release,
    Seen,
    TakeShare,
    Verify,
)
from modelchain.decide.stages import accounted, after, behind
from modelchain.decide.verdict import deadline, judge, progress_unknown, why_missed
from modelchain.identity.digest import digest_of, stage_inputs

MAX_ATTEMPTS = 999
_STOPS = "; waits for an earlier attempt to stop"


class Walk:
    """One pass along the chain: every stage before the current one is done, every one after it
    waits.
    """

    def __init__(
        self,
        chain: ModelChain,
        observed: Observed,
        now: float,
        *,
        finished: bool,
        retried: bool,
        avoid: list[AvoidedNode],
    ):
        self.spec, self.seen, self.now, self.finished = chain.spec, observed, now, finished
        self.chain_name, self.retried, self.avoid = chain.metadata.name, retried, avoid
        self.previous: Artifact | None = None
        self.handed_over: float | None = (
            None  # when the trainer ended that made `previous`, if this look says so
        )
        self.blocked: str | None = None  # the stage the rest waits for
        self.wanted: set[str] = set()
        self.shares: set[str] = set()
        self.action: Action | None = None
        self.again: float | None = None
        self.stopping: str | None = None  # why nothing may run
        if observed.interrupted:
            self.stopping = "interrupted; the same command goes on from the newest checkpoint"
        elif chain.spec.suspend:
            self.stopping = "spec.suspend is true; set it to false to go on"

    def visit(self, index: int, stage: StageStatus) -> StageStatus:
        """What this stage becomes; to be called in the chain's order."""
        if self.blocked is not None:
            return behind(stage, self.blocked, self._settle(stage))
        assert stage.epochs is not None
        inputs = stage_inputs(
            self.spec,
            index,
            epochs=stage.epochs,
            fingerprint=self.seen.fingerprint,
            predecessor=self.previous.digest if self.previous else None,
        )
        digest = digest_of(inputs)
        miss = why_missed(stage, digest, inputs, self.seen.inputs)
        if stage.input_digest != digest:
            stage = stage.model_copy(update={"input_digest": digest, "cache": None, "results": {}})
        elif stage.reason.startswith("Miss: "):
            miss = stage.reason.removesuffix(_STOPS)
        if not stage.attempts or stage.attempts[-1].input_digest != digest:
            stage = stage.model_copy(
                update={
                    "retries": 0,
                    "disruptions": 0,
                    "checkpoint_step": 0,
                    "not_before": None,
                    "artifact": None,
                }
            )
        if self.handed_over is not None:
            stage = stage.model_copy(update={"inherits_at": self.handed_over})
        found = self.seen.artifact(digest)
        if isinstance(found, Artifact):
            return self._done(index, stage, found, miss)
        self.blocked = stage.name
        if isinstance(found, Damage):
            if found.stalls:
                return self._stalled(stage, found.message)
            return self._failed(stage, FailureClass.CORRUPT_ARTIFACT, found.message)
        stage = stage.model_copy(update={"cache": "Miss", "artifact": None, "results": {}})
        return self._train(index, stage, inputs, miss)

    def _settle(self, stage: StageStatus) -> list[AttemptStatus]:
        """Close attempts that are no longer there, and mark those that are: superseded ones charge
        nobody.
        """
        out = []
        for attempt in stage.attempts:
            seen = self.seen.attempt(attempt.name)
            if attempt.finished_at is None and attempt.uid is None and seen.uid is not None:
                attempt = attempt.model_copy(
                    update={"uid": seen.uid}
                )  # before anything is decided about it
            elif attempt.finished_at is None and not seen.there:
                attempt = self._closed(attempt, seen, State.SUSPENDED, message="superseded")
            elif (
                attempt.finished_at is None and seen.started
            ):  # also if it is asked for again before it is gone
                attempt = attempt.model_copy(update={"state": State.SUSPENDED})
            out.append(attempt)
        return out

    def _closed(
        self,
        attempt: AttemptStatus,
        seen: Seen,
        state: State,
        failure: FailureClass | None = None,
        message: str = "",
    ) -> AttemptStatus:
        return closed(attempt, seen, self.now, self.seen.price, state, failure, message)

    def _done(self, index: int, stage: StageStatus, found: Artifact, miss: str) -> StageStatus:
        attempts, leaving, self.handed_over = [], False, None
        for attempt in stage.attempts:
            seen = self.seen.attempt(attempt.name)
            ours = attempt.input_digest == stage.input_digest
            if attempt.finished_at is None and not seen.there:
                said = seen.word.left if seen.word else None
                if ours and said not in (None, found.digest):
                    self.blocked = stage.name
                    return self._stalled(
                        stage,
                        f"DigestConflict: attempt {attempt.name} made weights {said}, but"
                        f" {found.digest} are recorded for the same inputs; keep those, or delete"
                        " the record to train again",
                    )
                state = State.SUCCEEDED if ours and seen.started else State.SUSPENDED
                over = self._closed(attempt, seen, state)
                if state is State.SUCCEEDED:
                    over, self.handed_over = whole(stage, over), ended(attempt, seen, self.now)
                attempt = over
            elif attempt.finished_at is None and ours and seen.live:
                self.wanted.add(attempt.name)  # it made the artifact and is about to exit
                leaving = True
            attempts.append(attempt)
        self.previous = found
        ledger = booked(stage, attempts)
        if stage.last_digest != stage.input_digest:
            ledger["trained"] = Spent()
        if not stage.attempts:
            ledger |= {"macs": found.macs, "gpu_seconds": found.gpu_seconds, "cost": found.cost}
        if leaving:
            self.blocked, self.again = stage.name, min(0.2, self.seen.poll_seconds)
        return stage.model_copy(
            update={
                "state": State.VERIFYING if leaving else State.SUCCEEDED,
                "reason": miss if stage.cache == "Miss" else "unchanged since it was trained",
                "cache": stage.cache or "Hit",
                "last_digest": stage.input_digest,
                "frozen": self.spec.stages[index].epochs is None,
                "artifact": ArtifactRef(
                    path=found.path, digest=found.digest, trainer_math=found.trainer_math
                ),
                "results": {name: f"{value:.2f}" for name, value in found.metrics.items()},
                "progress": None,
                "not_before": None,
                "inherits_at": None,
                **ledger,
            }
        )

    def _failed(self, stage: StageStatus, failure: FailureClass, message: str) -> StageStatus:
        return stage.model_copy(
            update={
                "state": State.FAILED,
                "reason": f"{failure}: {message}",
                "progress": None,
                "inherits_at": None,
                **booked(stage, self._settle(stage)),
            }
        )

    def _stalled(self, stage: StageStatus, reason: str) -> StageStatus:
        """It waits for somebody; looked at again, since whoever mends it need not tell us."""
        self.again = self.seen.poll_seconds
        state = State.PENDING if stage.state in (State.SUCCEEDED, State.FAILED) else stage.state
        return stage.model_copy(update={"state": state, "reason": reason, "stalled": True})

    def _train(
        self, index: int, stage: StageStatus, inputs: Mapping[str, Any], miss: str
    ) -> StageStatus:
        last = stage.attempts[-1] if stage.attempts else None
        if (
            last is not None
            and last.finished_at is None
            and last.input_digest == stage.input_digest
        ):
            avoid = tuple(known.node for known in self.avoid)
            return self._follow(
                stage, last, Launch(index, last, inputs, self.previous, avoid), miss
            )
        stage = stage.model_copy(update=booked(stage, self._settle(stage)))
        if stage.state is State.FAILED:
            return stage
        if self.finished:
            again = "type `modelchain retry`" if self.seen.records else "run again"
            return self._failed(
                stage, FailureClass.NO_ARTIFACT, f"the chain had ended before; {again} to train it"
            )
        if self.seen.live - self.wanted:
            self.again = self.seen.poll_seconds
            if (
                not self.stopping and stage.input_digest is not None
            ):  # once it is gone, nobody else knows its number
                known = self.seen.highest_number(stage.name, stage.input_digest)
                stage = stage.model_copy(update={"attempt_count": max(stage.attempt_count, known)})
            stage = self._waits(stage, miss + _STOPS)
            return self._stalled(stage, self.seen.stuck) if self.seen.stuck else stage
        if self.stopping:
            update = {
                "state": State.SUSPENDED,
                "reason": self.stopping,
                "progress": None,
                "inherits_at": None,
            }
            return stage.model_copy(update=update)
        if stage.not_before is not None and self.now < stage.not_before:
            assert stage.input_digest is not None
            self.shares.add(stage.input_digest)
            self.again = stage.not_before - self.now
            return self._waits(stage, stage.reason)
        return self._intend(index, stage, miss)

    def _waits(self, stage: StageStatus, reason: str) -> StageStatus:
        return stage.model_copy(update={"state": State.PENDING, "reason": reason, "progress": None})

    def _intend(self, index: int, stage: StageStatus, miss: str) -> StageStatus:
        """Write the intent of a new attempt, once nothing is in its way."""
        digest = stage.input_digest
        assert digest is not None
        if self.seen.obstacle:
            return self._stalled(self._waits(stage, ""), self.seen.obstacle)
        if everywhere := same_everywhere(self.avoid):
            return self._stalled(self._waits(stage, ""), everywhere)
        if self.seen.claim_missing:
            self.action = MakeClaim()
            return self._waits(stage, "makes the claim for its artifacts")
        loading, failed = self.seen.loading()
        if loading:
            self.again = 5.0
            return (
                self._stalled(self._waits(stage, ""), loading)
                if failed
                else self._waits(stage, loading)
            )
        if (waiting := self._unshared(stage, digest)) is not None:
            return waiting
        number = 1 + max(stage.attempt_count, self.seen.highest_number(stage.name, digest))
        if number > MAX_ATTEMPTS:
            message = f"{MAX_ATTEMPTS} attempts were made; rename the stage to go on"
            return self._failed(stage, FailureClass.ERROR, message)
        intent = AttemptStatus(
            name=f"{self.chain_name}-{stage.name}-a{number}",
            number=number,
            input_digest=digest,
            runner=self.spec.runner.kind if self.seen.records else "Local",
            state=State.PENDING,
        )
        before = [a for a in stage.attempts if a.input_digest == digest]
        self.wanted.add(intent.name)
        self.again = 0.0
        return stage.model_copy(
            update={
                "state": State.STARTING,
                "reason": miss,
                **booked(stage, [*stage.attempts, intent]),
                "trained": stage.trained if digest == stage.last_digest else plus(Spent(), before),
                "attempt_count": number,
                "last_digest": digest,
                "frozen": self.spec.stages[index].epochs is None,
                "not_before": None,
                "progress": None,
            }
        )

    def _unshared(self, stage: StageStatus, digest: str) -> StageStatus | None:
        """The stage as it waits until no other chain trains it (then maybe a hit); None once this
        one may.
        """
        holder = self.seen.share(digest)
        if holder in (None, "Mine"):
            self.shares.add(digest)
            return None
        self.again = self.seen.poll_seconds
        if not holder:
            self.shares.add(digest)
            self.action = TakeShare(digest)
            return self._waits(stage, "claims the stage it may share with other chains")
        reason = f"SharedStage: {holder} trains the same stage; this one waits until that has ended"
        return stage.model_copy(
            update={"state": State.QUEUED, "cache": None, "reason": reason, "progress": None}
        )

    def _follow(
        self, stage: StageStatus, attempt: AttemptStatus, launch: Launch, miss: str
    ) -> StageStatus:
        """The attempt named in the status: launch it, release it, watch it, or judge its end."""
        seen = self.seen.attempt(attempt.name)
        self.again = self.seen.poll_seconds
        if seen.started:
            self.shares.add(attempt.input_digest)
        if attempt.uid is None and seen.uid is not None:
            # Before anything else: a job that was stopped without this would free its name, and be
            # made again.
            return self._identified(stage, attempt, seen.uid)
        if seen.there:
            stage = accounted(stage, seen, self.now, self.seen.price)
            attempt = stage.attempts[-1]
        asked = attempt.ending is not None or attempt.state is State.SUSPENDED
        if seen.idle and self.retried and not asked:
            new = attempt.model_copy(
                update={"state": State.SUSPENDED, "message": "it was asked for again"}
            )
            return self._with(stage, new, reason=f"stopping: {new.message}")
        if seen.there and (self.stopping or asked):
            reason = f"stopping: {self.stopping or attempt.message or 'it was asked to'}"
            if not asked:
                attempt = attempt.model_copy(update={"state": State.SUSPENDED})
            stage = self._with(stage, attempt, state=State.RUNNING, reason=reason)
            return self._stalled(stage, self.seen.stuck) if self.seen.stuck else stage
        podless = seen.there and seen.started and not (seen.running or attempt.pods or seen.pods)
        if (podless or seen.idle) and self.seen.outdated(launch):
            new = attempt.model_copy(
                update={"state": State.SUSPENDED, "message": "what its job was made from changed"}
            )
            return self._with(stage, new, state=State.STARTING, reason=f"stopping: {new.message}")
        if stalled := seen.stalled or (self.seen.stuck if seen.there else ""):
            self.wanted.add(attempt.name)
            return self._stalled(stage, stalled)
        if not seen.started:
            if asked:  # nothing of it was ever there; a job that still comes is a stray
                return self._judged(stage, attempt, seen)
            if self.stopping:
                self.again = None
                return stage.model_copy(update={"state": State.SUSPENDED, "reason": self.stopping})
            self.wanted.add(attempt.name)
            if self.seen.obstacle and not seen.there:
                return self._stalled(self._waits(stage, ""), self.seen.obstacle)
            if (waiting := self._unshared(stage, attempt.input_digest)) is not None:
                return waiting
            self.action = (
                None if seen.there else launch
            )  # a name is free only once its last owner is gone
            stage = stage.model_copy(
                update={"state": State.STARTING, "reason": seen.waiting or miss}
            )
            return stage.model_copy(update={"stalled": bool(seen.waiting) and not seen.there})
        if seen.there:
            self.wanted.add(attempt.name)
            if seen.held:
                self.action = Release(attempt)
                update = {
                    "state": State.STARTING,
                    "reason": seen.waiting or miss,
                    "stalled": bool(seen.waiting),
                }
                return stage.model_copy(update=update)
            return self._watch(stage, attempt, seen, miss)
        return self._ended(stage, attempt, seen, launch)

    def _identified(self, stage: StageStatus, attempt: AttemptStatus, uid: str) -> StageStatus:
        """The attempt has a job, which will be known by its UID from now on."""
        self.wanted.add(attempt.name)
        taken = (
            None if stage.inherits_at is None else round(max(0.0, self.now - stage.inherits_at), 3)
        )
        took = {
            "inherits_at": None,
            "transition_seconds": taken if taken is not None else stage.transition_seconds,
        }
        return self._with(stage, attempt.model_copy(update={"uid": uid}), **took)

    def _watch(
        self, stage: StageStatus, attempt: AttemptStatus, seen: Seen, miss: str
    ) -> StageStatus:
        """It was released: waits in a queue, starts or runs."""
        progress = seen.progress or (stage.progress if seen.running else None)
        state, reason = (State.RUNNING if seen.progress else State.STARTING), miss
        if seen.queued:
            state, reason = State.QUEUED, nodes_avoided(self.avoid, seen.waiting)
        elif seen.waiting:
            state, reason = State.STARTING, seen.waiting
        elif unheard := progress_unknown(self.spec.deadlines, seen, self.now):
            state, reason = State.RUNNING, unheard
        attempt = attempt.model_copy(
            update={
                "state": State.QUEUED if seen.queued else State.RUNNING,
                "started_at": attempt.started_at or (None if seen.queued else timestamp(self.now)),
            }
        )
        late = deadline(self.spec.deadlines, stage, attempt, seen, self.now)
        if isinstance(late, float):
            self.again = min(self.again or late, late)
        elif late is not None:
            attempt = attempt.model_copy(update={"ending": late[0], "message": late[1]})
        return self._with(stage, attempt, state=state, reason=reason, progress=progress)

    def _with(self, stage: StageStatus, attempt: AttemptStatus, **update: Any) -> StageStatus:
        attempts = [*stage.attempts[:-1], attempt]
        return stage.model_copy(
            update={**update, "attempts": attempts, **shown(stage.spent, attempts)}
        )

    def _ended(
        self, stage: StageStatus, attempt: AttemptStatus, seen: Seen, launch: Launch
    ) -> StageStatus:
        """No longer there, and no artifact is recorded: record it, ask for its last word again, or
        judge.
        """
        word = seen.word
        if self.seen.records and (word.result == "Succeeded" if word else seen.succeeded):
            if word is None and isinstance(seen.verify, LastWord):
                word = seen.verify
            if word is not None and word.result == "Succeeded":
                final = whole(stage, account(attempt, seen, self.now, self.seen.price))
                # All attempts at these inputs; those of a chain that was deleted meanwhile are
                # known by the work alone.
                total = plus(stage.trained, [final])
                total = total.model_copy(
                    update={"macs": max(total.macs, word.macs, least(stage, word.steps))}
                )
                self.action = RecordArtifact(launch, word, total)
                refused = seen.waiting or (
                    stage.reason if constant(stage.reason) == "RecordRefused" else ""
                )
                return (
                    self._stalled(self._verifying(stage, attempt, ""), refused)
                    if refused
                    else stage
                )
            if seen.verify == "Unanswered":
                return self._stalled(
                    self._verifying(stage, attempt, ""),
                    f"VerifyUnanswered: {attempt.name} ended without a last word, and"
                    f" {attempt.name}-verify could not say whether its artifact is whole; nothing"
                    " is trained again before that is known",
                )
            if not isinstance(seen.verify, LastWord):
                stage = self._verifying(
                    stage, attempt, "its last word was lost; its artifact is re-hashed"
                )
                if seen.verify is None and self.seen.obstacle:
                    return self._stalled(stage, self.seen.obstacle)
                self.action = Verify(launch) if seen.verify is None else None
                return stage
        return self._judged(stage, attempt, seen)

    def _judged(self, stage: StageStatus, attempt: AttemptStatus, seen: Seen) -> StageStatus:
        """It ended and left nothing: close it, charge whom it is owed by, and try again, wait or
        give up.
        """
        verdict = judge(self.spec.retry, stage, attempt, seen, bool(self.stopping))
        state = State.SUSPENDED if verdict.stopped else State.FAILED
        attempt = self._closed(attempt, seen, state, verdict.failure, verdict.message)
        if verdict.advanced:
            self.avoid = without_faults(self.avoid)
        if verdict.failure is FailureClass.HARDWARE and not verdict.stopped:
            self.avoid = avoided(self.avoid, seen.bad_nodes, self.now)
        return after(stage, attempt, verdict, self.now, self.seen.backoff_seconds, self.stopping)

    def _verifying(self, stage: StageStatus, attempt: AttemptStatus, reason: str) -> StageStatus:
        attempt = attempt.model_copy(update={"state": State.VERIFYING})
        return self._with(stage, attempt, state=State.VERIFYING, reason=reason, progress=None)
