"""`decide`: from a spec, what is seen and the time, the one next step. Pure; the same for a laptop and a cluster.

A step is at most one write. If the status must change, that is the step; an action is taken only from a status that
already says so. So whoever dies between two steps finds everything it needs in what was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from modelchain.contracts import FailureClass
from modelchain.digest import differing_fields, digest_of, stage_inputs
from modelchain.plan import plan
from modelchain.spec import ModelChain
from modelchain.status import ArtifactRef, AttemptStatus, ChainStatus, Condition, StageStatus, State, Total
from modelchain.world import Artifact, Damage, Launch, Observed, Seen, Step, Stop

KEPT_ATTEMPTS = 10
MAX_ATTEMPTS = 999


def decide(chain: ModelChain, observed: Observed, now: float) -> Step:
    """The next step of a chain.

    Args:
        chain: the checked spec.
        observed: live reads, the stored status among them.
        now: seconds since the epoch.
    """
    old = observed.status
    fresh = old.retry != observed.retry or old.observed_generation != (chain.metadata.generation or 0)
    stages = _resolved(chain, old, fresh)
    walk = _Walk(chain, observed, now, finished=not fresh and (old.is_true("Complete") or old.is_true("Failed")))
    stages = [walk.visit(index, stage) for index, stage in enumerate(stages)]
    stray = sorted(observed.live - walk.wanted)
    action: Launch | Stop | None = walk.action
    if stray:
        action = Stop(stray[0], walk.stopping or "the spec no longer asks for this attempt")
    status = ChainStatus(
        observed_generation=chain.metadata.generation or 0,
        stages=stages,
        total=Total(macs=sum(s.macs for s in stages), gpu_seconds=sum(s.gpu_seconds for s in stages)),
        retry=observed.retry,
        conditions=_conditions(old, stages, now),
    )
    if status != old:
        return Step(status, write=True, again=0.0)
    at_rest = not stray and walk.again is None and action is None
    return Step(status, write=False, action=action, again=None if at_rest else walk.again or 0.5)


def _resolved(chain: ModelChain, old: ChainStatus, fresh: bool) -> list[StageStatus]:
    """Stages in the spec's order with what is known of each; epochs frozen by an earlier launch stay."""
    known = {s.name: s for s in old.stages}
    frozen = old.frozen_epochs
    epochs = {s.name: s.epochs for s in plan(chain, "analytic", {}, frozen).stages}
    out = []
    for stage in chain.spec.stages:
        status = known.get(stage.name, StageStatus(name=stage.name))
        update: dict[str, Any] = {"epochs": epochs[stage.name], "frozen": stage.epochs is None and stage.name in frozen}
        if fresh:
            update |= {"cache": None, "reason": "", "retries": 0, "disruptions": 0, "not_before": None}
            if status.state is State.FAILED:
                update["state"] = State.PENDING
        out.append(status.model_copy(update=update))
    return out


class _Walk:
    """One pass along the chain: every stage before the current one is done, every one after it waits."""

    def __init__(self, chain: ModelChain, observed: Observed, now: float, finished: bool):
        self.spec, self.seen, self.now, self.finished = chain.spec, observed, now, finished
        self.chain_name = chain.metadata.name
        self.previous: Artifact | None = None
        self.blocked: str | None = None  # the stage the rest waits for
        self.wanted: set[str] = set()
        self.action: Launch | Stop | None = None
        self.again: float | None = None
        self.stopping: str | None = None  # why nothing may run
        if observed.interrupted:
            self.stopping = "interrupted; the same command goes on from the newest checkpoint"
        elif chain.spec.suspend:
            self.stopping = "spec.suspend is true; set it to false to go on"

    def visit(self, index: int, stage: StageStatus) -> StageStatus:
        if self.blocked is not None:
            failed = stage.state is State.FAILED
            return stage.model_copy(
                update={
                    "state": State.FAILED if failed else State.PENDING,
                    "reason": stage.reason if failed else f"waits for stage {self.blocked}",
                    "input_digest": None,
                    "cache": None,
                    "artifact": None,
                    "results": {},
                    "progress": None,
                    **self._ledger(stage, self._settle(stage)),
                }
            )
        assert stage.epochs is not None
        inputs = stage_inputs(
            self.spec,
            index,
            epochs=stage.epochs,
            fingerprint=self.seen.fingerprint,
            predecessor=self.previous.digest if self.previous else None,
        )
        digest = digest_of(inputs)
        miss = self._why_missed(stage, digest, inputs)
        if stage.input_digest != digest:
            stage = stage.model_copy(update={"input_digest": digest, "cache": None, "results": {}})
        elif stage.reason.startswith("Miss: "):
            miss = stage.reason
        if not stage.attempts or stage.attempts[-1].input_digest != digest:
            stage = stage.model_copy(
                update={"retries": 0, "disruptions": 0, "checkpoint_step": 0, "not_before": None, "artifact": None}
            )
        found = self.seen.artifact(digest)
        if isinstance(found, Artifact):
            return self._done(index, stage, found, miss)
        self.blocked = stage.name
        if isinstance(found, Damage):
            return self._failed(stage, FailureClass.CORRUPT_ARTIFACT, found.message)
        stage = stage.model_copy(update={"cache": "Miss", "artifact": None, "results": {}})
        return self._train(index, stage, inputs, miss)

    def _why_missed(self, stage: StageStatus, digest: str, inputs: Mapping[str, Any]) -> str:
        """The field a miss is owed to, by comparing with the newest other inputs this stage is known to have had."""
        mine = [a for a in stage.attempts if a.input_digest == digest]
        if any(a.state is State.SUCCEEDED for a in mine) or (not mine and stage.last_digest == digest):
            return "Miss: its artifact is gone"
        known = [*(a.input_digest for a in stage.attempts), stage.last_digest]
        before = next((d for d in reversed(known) if d not in (digest, None)), None)
        if before is None:
            return "Miss: never trained"
        old = self.seen.inputs.get(before)
        return f"Miss: {', '.join(differing_fields(old, inputs))} changed" if old else "Miss: its inputs changed"

    def _settle(self, stage: StageStatus) -> list[AttemptStatus]:
        """Close attempts that no longer run: superseded ones charge nobody."""
        out = []
        for attempt in stage.attempts:
            seen = self.seen.attempt(attempt.name)
            if attempt.finished_at is None and not seen.live:
                attempt = self._closed(attempt, seen, State.SUSPENDED, None, "superseded")
            out.append(attempt)
        return out[-KEPT_ATTEMPTS:]

    def _closed(
        self, attempt: AttemptStatus, seen: Seen, state: State, failure: FailureClass | None, message: str
    ) -> AttemptStatus:
        return attempt.model_copy(
            update={
                "state": state,
                "failure": failure,
                "message": message,
                "finished_at": timestamp(self.now),
                # A last word that had to be brief may hold less than what was seen before it.
                "macs": max(seen.macs, seen.word.macs if seen.word else 0),
                "gpu_seconds": max(seen.gpu_seconds, seen.word.gpu_seconds if seen.word else 0.0),
            }
        )

    def _ledger(self, stage: StageStatus, attempts: list[AttemptStatus]) -> dict[str, Any]:
        """What was really spent: attempts closed in this step are added once, so trimming the history loses nothing."""
        was_open = {a.name for a in stage.attempts if a.finished_at is None}
        closed = [a for a in attempts if a.finished_at is not None and a.name in was_open]
        return {
            "attempts": attempts,
            "macs": stage.macs + sum(a.macs for a in closed),
            "gpu_seconds": stage.gpu_seconds + sum(a.gpu_seconds for a in closed),
        }

    def _done(self, index: int, stage: StageStatus, found: Artifact, miss: str) -> StageStatus:
        self.previous = found
        attempts, leaving = [], False
        for attempt in stage.attempts:
            seen = self.seen.attempt(attempt.name)
            ours = attempt.input_digest == stage.input_digest
            if attempt.finished_at is None and not seen.live:
                state = State.SUCCEEDED if ours and seen.started else State.SUSPENDED
                attempt = self._closed(attempt, seen, state, None, "")
            elif attempt.finished_at is None and ours:
                self.wanted.add(attempt.name)  # it made the artifact and is about to exit
                leaving = True
            attempts.append(attempt)
        ledger = self._ledger(stage, attempts[-KEPT_ATTEMPTS:])
        if not stage.attempts:
            ledger["macs"] = found.macs
        if leaving:
            self.blocked, self.again = stage.name, 0.2
        return stage.model_copy(
            update={
                "state": State.VERIFYING if leaving else State.SUCCEEDED,
                "reason": miss if stage.cache == "Miss" else "unchanged since it was trained",
                "cache": stage.cache or "Hit",
                "last_digest": stage.input_digest,
                "frozen": self.spec.stages[index].epochs is None,
                "artifact": ArtifactRef(path=found.path, digest=found.digest),
                "results": {name: f"{value:.2f}" for name, value in found.metrics.items()},
                "progress": None,
                "not_before": None,
                **ledger,
            }
        )

    def _failed(self, stage: StageStatus, failure: FailureClass, message: str) -> StageStatus:
        return stage.model_copy(
            update={
                "state": State.FAILED,
                "reason": f"{failure}: {message}",
                "progress": None,
                **self._ledger(stage, self._settle(stage)),
            }
        )

    def _train(self, index: int, stage: StageStatus, inputs: Mapping[str, Any], miss: str) -> StageStatus:
        last = stage.attempts[-1] if stage.attempts else None
        if last is not None and last.finished_at is None and last.input_digest == stage.input_digest:
            return self._follow(index, stage, last, inputs, miss)
        stage = stage.model_copy(update=self._ledger(stage, self._settle(stage)))
        if stage.state is State.FAILED:
            return stage
        if self.finished:
            return self._failed(
                stage, FailureClass.NO_ARTIFACT, "the chain had ended before; run again to train this stage"
            )
        if self.seen.live - self.wanted:
            self.again = 0.5
            return stage.model_copy(
                update={"state": State.PENDING, "reason": "waits for an earlier attempt to stop", "progress": None}
            )
        if self.stopping:
            return stage.model_copy(update={"state": State.SUSPENDED, "reason": self.stopping, "progress": None})
        if stage.not_before is not None and self.now < stage.not_before:
            self.again = stage.not_before - self.now
            return stage.model_copy(update={"state": State.PENDING, "progress": None})
        assert stage.input_digest is not None
        number = 1 + max(stage.attempt_count, self.seen.highest_number(stage.name, stage.input_digest))
        if number > MAX_ATTEMPTS:
            return self._failed(
                stage, FailureClass.ERROR, f"{MAX_ATTEMPTS} attempts were made; rename the stage to go on"
            )
        intent = AttemptStatus(
            name=f"{self.chain_name}-{stage.name}-a{number}",
            number=number,
            input_digest=stage.input_digest,
            state=State.PENDING,
        )
        self.wanted.add(intent.name)
        self.again = 0.0
        return stage.model_copy(
            update={
                "state": State.STARTING,
                "reason": miss,
                "attempts": [*stage.attempts, intent][-KEPT_ATTEMPTS:],
                "attempt_count": number,
                "last_digest": stage.input_digest,
                "frozen": self.spec.stages[index].epochs is None,
                "not_before": None,
            }
        )

    def _follow(
        self, index: int, stage: StageStatus, attempt: AttemptStatus, inputs: Mapping[str, Any], miss: str
    ) -> StageStatus:
        """The attempt named in the status: launch it, watch it, or judge its end."""
        seen = self.seen.attempt(attempt.name)
        if seen.live:
            if self.stopping:
                self.again = 0.5
                return stage.model_copy(update={"state": State.RUNNING, "reason": f"stopping: {self.stopping}"})
            self.wanted.add(attempt.name)
            self.again = 0.5
            running = attempt.model_copy(
                update={"state": State.RUNNING, "started_at": attempt.started_at or timestamp(self.now)}
            )
            return stage.model_copy(
                update={
                    "state": State.RUNNING if seen.progress else State.STARTING,
                    "reason": miss,
                    "progress": seen.progress,
                    "attempts": [*stage.attempts[:-1], running],
                }
            )
        if not seen.started:
            if self.stopping:
                return stage.model_copy(update={"state": State.SUSPENDED, "reason": self.stopping})
            self.wanted.add(attempt.name)
            self.action = Launch(index, attempt, inputs, self.previous)
            self.again = 0.5
            return stage.model_copy(update={"state": State.STARTING, "reason": miss})
        return self._judge(stage, attempt, seen)

    def _judge(self, stage: StageStatus, attempt: AttemptStatus, seen: Seen) -> StageStatus:
        """An attempt that ended and left no valid artifact: which budget pays, and what comes next."""
        word = seen.word
        if word is None:
            failure, message = FailureClass.KILLED, "died without a last word"
        elif word.result == "Succeeded":
            failure, message = FailureClass.NO_ARTIFACT, "reported success, but left no artifact"
        else:
            failure, message = word.failure or FailureClass.ERROR, word.message
        stopped = self.stopping if failure.disruption else None
        state = State.SUSPENDED if stopped else State.FAILED
        attempts = [*stage.attempts[:-1], self._closed(attempt, seen, state, failure, message)]
        checkpoint = max(seen.checkpoint_step, (word.checkpoint_step or 0) if word else 0)
        advanced = checkpoint > stage.checkpoint_step
        update: dict[str, Any] = {**self._ledger(stage, attempts), "progress": None}
        update["checkpoint_step"] = max(checkpoint, stage.checkpoint_step)
        if stopped:
            return stage.model_copy(update={**update, "state": State.SUSPENDED, "reason": stopped})
        charge_disruption = failure.disruption and advanced
        disruptions = stage.disruptions + (1 if failure.disruption else 0)
        retries = stage.retries + (0 if charge_disruption else 1)
        update |= {"disruptions": disruptions, "retries": retries}
        limits = self.spec.retry
        if failure.permanent:
            verdict = message
        elif failure.disruption and disruptions > limits.max_disruptions:
            verdict = f"{message}; {limits.max_disruptions} disruptions are allowed (spec.retry.maxDisruptions)"
        elif not charge_disruption and retries > limits.max_retries:
            verdict = f"{message}; {limits.max_retries} retries are allowed (spec.retry.maxRetries)"
        else:
            wait = 0.0 if failure.disruption else self.seen.backoff_seconds * 2 ** min(retries - 1, 6)
            self.again = wait
            return stage.model_copy(
                update={
                    **update,
                    "state": State.PENDING,
                    "reason": f"{failure}: {message}; tries again",
                    "not_before": self.now + wait,
                }
            )
        return stage.model_copy(update={**update, "state": State.FAILED, "reason": f"{failure}: {verdict}"})


def _conditions(old: ChainStatus, stages: list[StageStatus], now: float) -> list[Condition]:
    """Complete, Failed and Suspended, each with one sentence of why; times change only with the status."""
    done = sum(s.state is State.SUCCEEDED for s in stages)
    failed = next((s for s in stages if s.state is State.FAILED), None)
    held = next((s for s in stages if s.state is State.SUSPENDED), None)
    count = f"{done} of {len(stages)} stages have finished"
    facts = [
        ("Complete", done == len(stages), "AllStagesFinished" if done == len(stages) else "InProgress", count),
        ("Failed", failed is not None, "StageFailed" if failed else "NoFailure",
         f"stage {failed.name}: {failed.reason}" if failed else "no stage has failed"),
        ("Suspended", held is not None, "Stopped" if held else "NotSuspended", held.reason if held else "it is not"),
    ]  # fmt: skip
    out = []
    for kind, true, reason, message in facts:
        before = old.condition(kind)
        status = "True" if true else "False"
        since = before.last_transition_time if before and before.status == status else timestamp(now)
        out.append(Condition(type=kind, status=status, reason=reason, message=message, last_transition_time=since))  # type: ignore[arg-type]
    return out


def timestamp(now: float) -> str:
    """RFC 3339 in UTC, whole seconds, as Kubernetes writes times."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
