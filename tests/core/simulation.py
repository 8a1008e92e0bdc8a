"""A world for `decide`: trainers finish, fail and vanish, users edit, operators crash. The world
checks every step that `decide` takes.

It is small enough to be explored exhaustively: its whole state is in `World`, and everything that
can happen is a method.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cache
from typing import Any

from specs import DELETE, config, inline, with_changes
from sums import check_sums

from modelchain.api.contracts import FailureClass, LastWord, Progress
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import Gate, ModelChain
from modelchain.api.status import (
    AttemptStatus,
    ChainStatus,
    GateVerdict,
    Spent,
    StageLedger,
    StageStatus,
    State,
)
from modelchain.decide.decide import decide
from modelchain.decide.observed import Artifact, Damage, Decision, Launch, Observed, Seen, Stop
from modelchain.decide.relaxation import remembered
from modelchain.gate.relaxation import Schedule, Trained
from modelchain.identity.digest import digest_of, short_key

MAX_RETRIES, MAX_DISRUPTIONS = 1, 2
# The MACs that an artifact says its training took.
TRAINING_COST = 1000
# What a gate compares.
TOP1 = {"name": "top1", "kind": "Retrieval", "shards": "/data/val.tar"}


@cache
def chain_of(
    stages: int, edits: tuple[tuple[str, Any], ...], suspend: bool, generation: int | None
) -> ModelChain:
    """A chain of that many stages, with edits by path, as the API server would store it."""
    shapes = (config(vision={"layers": 2 + i}) for i in range(stages))
    retry = {"maxRetries": MAX_RETRIES, "maxDisruptions": MAX_DISRUPTIONS}
    changes = {
        "spec.suspend": suspend,
        "metadata.generation": generation,
        "spec.retry": retry,
        **({"spec.evaluation": [TOP1]} if any("spec.gate" in path for path, _ in edits) else {}),
        **{path: list(v) if isinstance(v, tuple) else v for path, v in edits},
    }
    return ModelChain.model_validate(with_changes(inline(*shapes, **changes)))


def ledgers(status: ChainStatus) -> list[StageLedger]:
    """The stages of a status, and those that were removed."""
    return [*status.stages, *status.removed]


def attempts_of_the_chain(status: ChainStatus) -> list[AttemptStatus]:
    """The attempts of stages and removed stages, without those of baselines."""
    return [attempt for stage in ledgers(status) for attempt in stage.attempts]


def weights_of(input_digest: str) -> str:
    """Training is deterministic: the same inputs give the same bytes."""
    return hashlib.sha256(input_digest.encode()).hexdigest()


def always_accurate(inputs: Mapping[str, Any]) -> dict[str, float]:
    """What is measured of any model."""
    return {"top1": 91.5}


@dataclass(frozen=True)
class Trainer:
    """The truth about one attempt: what it has spent, and from which checkpoint it began
    (`began_at`).
    """

    stage: str
    number: int
    digest: str
    live: bool = True
    asked_to_stop: bool = False
    word: LastWord | None = None
    macs: int = 0
    steps: int = 0
    began_at: int = 0
    # It trains a baseline.
    alone: bool = False


@dataclass
class World:
    """On a cluster (`cluster`) an edit raises the generation. On a laptop the user edits and starts
    `run` again, which brings a new retry token.
    """

    stages: int
    cluster: bool = False
    edits: dict[str, Any] = field(default_factory=dict)
    suspend: bool = False
    generation: int | None = None
    retry: int = 0
    interrupted: bool = False
    # `run --alone`.
    only: str | None = None
    now: float = 1_700_000_000.0
    backoff: float = 0.0
    status: ChainStatus = field(default_factory=ChainStatus)
    trainers: dict[str, Trainer] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    checkpoints: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    # What records tell of the epochs of finished stages, the newest at the end.
    records: tuple[Trained, ...] = ()
    # What is measured of a model that was trained from these inputs.
    metrics_of: Callable[[Mapping[str, Any]], dict[str, float]] = always_accurate
    # On how many pictures; 0 if no trainer says it.
    pictures: int = 0
    # Attempts that began before the budgets were last renewed.
    forgiven: frozenset[str] = frozenset()
    # The status was lost, and the ledger with it.
    forgetful: bool = False
    # Nothing has happened that gives a reason to stop an attempt.
    undisturbed: bool = True

    def __post_init__(self) -> None:
        if self.cluster and self.generation is None:
            self.generation = 1

    # What `decide` sees.

    def chain(self) -> ModelChain:
        edits = sorted(self.edits.items(), key=lambda edit: (edit[1] is DELETE, edit[0]))
        return chain_of(self.stages, tuple(edits), self.suspend, self.generation)

    def artifact(self, digest: str) -> Artifact | Damage | None:
        match self.artifacts.get(digest):
            case None:
                return None
            case "damaged":
                return Damage(Reason(Code.CORRUPT_ARTIFACT, digest, "a byte is flipped"))
        metrics = self.metrics_of(self.inputs.get(digest, {}))
        keys = [short_key(e) for e in self.chain().spec.evaluation] if self.pictures else []
        return Artifact(
            weights_of(digest),
            f"{digest}/artifact",
            macs=TRAINING_COST,
            metrics=metrics,
            pictures=dict.fromkeys(keys, self.pictures),
        )

    def seen(self, name: str) -> Seen:
        trainer = self.trainers.get(name)
        if trainer is None:
            return Seen(live=False, started=False)
        progress = Progress(step=trainer.steps, steps=100, samples_per_second=1.0, eta_seconds=1.0)
        return Seen(
            live=trainer.live,
            started=True,
            word=None if trainer.live else trainer.word,
            progress=progress if trainer.live and trainer.steps else None,
            checkpoint_step=self.checkpoints.get(trainer.digest, 0),
            macs=trainer.macs,
        )

    def highest_number(self, unnumbered: str, digest: str) -> int:
        used = (
            trainer.number
            for name, trainer in self.trainers.items()
            if name.rstrip("0123456789") == unnumbered or digest == trainer.digest
        )
        return max(used, default=0)

    def observed(self) -> Observed:
        lost = not self.status.stages
        return Observed(
            status=remembered(self.chain(), self.records) if lost else self.status,
            artifact=self.artifact,
            attempt=self.seen,
            live=frozenset(name for name, trainer in self.trainers.items() if trainer.live),
            inputs=self.inputs,
            retry=str(self.retry),
            interrupted=self.interrupted,
            only=self.only,
            backoff_seconds=self.backoff,
            highest_number=self.highest_number,
        )

    # What `decide` does.

    def step(self) -> Decision:
        """Decides once and carries the step out; every promise is checked on the way."""
        decision = decide(self.chain(), self.observed(), self.now)
        if decision.write:
            self._write(decision.status)
        elif isinstance(decision.action, Launch):
            self._launch(decision.action)
        elif isinstance(decision.action, Stop):
            self._stop(decision.action)
        return decision

    def must_stop(self) -> bool:
        return self.suspend or self.interrupted

    def ended(self) -> bool:
        """The chain is finished, and no edit or retry has been requested since."""
        asked = self.status.retry != str(self.retry) or self.status.observed_generation != (
            self.generation or 0
        )
        asked = asked or self.only is not None
        return not asked and (self.status.is_true("Complete") or self.status.is_true("Failed"))

    def _write(self, status: ChainStatus) -> None:
        text = status.model_dump_json(by_alias=True)
        assert ChainStatus.model_validate_json(text) == status, "a status is read back as written"
        before = {s.name: s for s in ledgers(self.status)}
        kept = {s.name for s in ledgers(status)}
        assert all(s.name in kept for s in before.values() if s.attempts), "no ledger is dropped"
        for stage in status.stages:
            old = before.get(stage.name, StageStatus(name=stage.name))
            assert stage.attempt_count >= old.attempt_count, "attempt numbers never fall"
            assert stage.macs >= old.macs or not old.attempts, "spending never falls"
            begun = {a.name for a in stage.attempts} - {a.name for a in old.attempts}
            assert not (begun and self.ended()), "a finished chain starts work only when asked"
            assert not (begun and self.must_stop())
            assert len({a.name for a in stage.attempts}) == len(stage.attempts)
            assert all(a.finished_at is not None for a in stage.attempts[:-1]), (
                "only the newest attempt may be open"
            )
            assert (stage.state is State.SUCCEEDED) <= (stage.artifact is not None)
            assert (
                stage.artifact is None
                or stage.state is State.FAILED
                or self.artifact_is_whole(stage.input_digest)
            )
        check_sums(status)
        assert sum(s.macs for s in ledgers(status)) == status.total.macs
        if not self.forgetful and all(s.attempts or not s.macs for s in status.stages):
            listed = attempts_of_the_chain(status)
            so_far = sum(a.macs for a in listed if a.finished_at is None)
            closed = [self.trainers[name] for name in self.closed(status)]
            closed = [trainer for trainer in closed if not trainer.alone]
            assert status.total.macs == so_far + sum(t.macs for t in closed)
            for stage in ledgers(status):
                mine = [t for t in closed if t.stage == stage.name]
                at_these = sum(t.macs for t in mine if t.digest == stage.last_digest)
                assert stage.trained.macs == at_these, "what a record would say of these inputs"
        self.status = status

    def closed(self, status: ChainStatus) -> list[str]:
        """Attempts that began and are closed, in the status or already trimmed from its history."""
        open_ = {name for name, (_, a) in status.attempts.items() if a.finished_at is None}
        return [name for name in self.trainers if name not in open_]

    def artifact_is_whole(self, digest: str | None) -> bool:
        return self.artifacts.get(digest or "") == "whole"

    def _launch(self, launch: Launch) -> None:
        attempt, stage = launch.attempt, self.chain().spec.stages[launch.stage]
        known = next(s for s in self.rows(launch.alone) if s.name == stage.name)
        assert not any(trainer.live for trainer in self.trainers.values()), (
            "there are never two live attempts"
        )
        assert not self.must_stop() and not self.ended()
        assert known.attempts[-1] == attempt and known.input_digest == attempt.input_digest, (
            "the intent is in the status before the launch"
        )
        assert known.state is State.STARTING, "the status says that the stage starts"
        assert digest_of(launch.inputs) == attempt.input_digest
        assert attempt.input_digest not in self.artifacts, "an existing artifact is not retrained"
        assert attempt.name not in self.trainers, "a name is used once"
        assert all(
            t.number < attempt.number
            for t in self.trainers.values()
            if (t.stage, t.alone) == (stage.name, launch.alone)
        )
        assert self.only is None or (launch.alone and stage.name == self.only)
        if launch.alone:
            assert launch.inputs["epochs"] == self.chain().spec.recipe.baseline_epochs
        if launch.stage == 0 or launch.alone:
            assert launch.predecessor is None and "predecessor" not in launch.inputs
        else:
            before = next(
                s
                for s in self.status.stages
                if s.name == self.chain().spec.stages[launch.stage - 1].name
            )
            assert self.artifact_is_whole(before.input_digest), (
                "a successor starts only after its predecessor's artifact is complete"
            )
            assert not self.held_by_gate(launch.stage), "a stage before it missed its baseline"
            assert not self.awaits_baseline(stage.name), "its baseline comes first"
            assert launch.predecessor is not None
            assert (
                launch.inputs["predecessor"]
                == launch.predecessor.digest
                == weights_of(before.input_digest or "")
            )
        self._check_budgets(known, attempt)
        self.inputs[attempt.input_digest] = launch.inputs
        self.trainers[attempt.name] = Trainer(
            stage.name,
            attempt.number,
            attempt.input_digest,
            began_at=self.checkpoints.get(attempt.input_digest, 0),
            alone=launch.alone,
        )

    def rows(self, alone: bool) -> list[StageStatus]:
        return self.status.baselines if alone else self.status.stages

    def awaits_baseline(self, stage: str) -> bool:
        """Whether the gate asks for a baseline of the stage that is not there."""
        gate = self.chain().spec.gate
        rows = {row.name: row for row in self.status.baselines}
        digest = rows[stage].input_digest if stage in rows else None
        return gate is not None and stage in gate.train and not self.artifact_is_whole(digest)

    def held_by_gate(self, stage: int) -> bool:
        """Whether a stage before this one is not good enough, or is not measured, by the spec."""
        gate, chain = self.chain().spec.gate, self.chain().spec
        if gate is None or gate.on_miss == "Continue":
            return False
        known = {s.name: s for s in self.status.stages}
        for before in chain.stages[:stage]:
            if before.name in (*gate.baseline, *gate.train):
                baseline = self._baseline(gate, before.name)
                inputs = self.inputs.get(known[before.name].input_digest or "")
                metric = self.metrics_of(inputs).get(gate.metric) if inputs else None
                if metric is None or baseline is None:
                    return True
                if Decimal(f"{metric:.2f}") < baseline - Decimal(gate.tolerance):
                    return True
        return False

    def _baseline(self, gate: Gate, stage: str) -> Decimal | None:
        if stage in gate.baseline:
            return Decimal(gate.baseline[stage])
        if self.awaits_baseline(stage):
            return None
        row = next(row for row in self.status.baselines if row.name == stage)
        metric = self.metrics_of(self.inputs[row.input_digest or ""]).get(gate.metric)
        return None if metric is None else Decimal(f"{metric:.2f}")

    def _check_budgets(self, stage: StageStatus, attempt: AttemptStatus) -> None:
        judged = [
            a
            for a in stage.attempts
            if a.failure is not None
            and a.input_digest == attempt.input_digest
            and a.name not in self.forgiven
        ]
        failures = [a.failure for a in judged if a.failure is not None and a.state is State.FAILED]
        assert not any(failure.permanent for failure in failures), (
            "a permanent failure is not tried again"
        )
        limits = self.chain().spec.retry
        assert sum(failure.disruption for failure in failures) <= limits.max_disruptions
        assert sum(not failure.disruption for failure in failures) <= limits.max_retries

    def _stop(self, stop: Stop) -> None:
        trainer = self.trainers[stop.attempt]
        assert trainer.live
        assert not self.undisturbed, "nothing is stopped without a reason"
        self.trainers[stop.attempt] = replace(trainer, asked_to_stop=True)

    # What happens to it.

    def live(self) -> str | None:
        return next((name for name, trainer in self.trainers.items() if trainer.live), None)

    def train(self, *, checkpoint: bool = True) -> None:
        """The live attempt takes a step, and may write a checkpoint."""
        name = self.live()
        assert name is not None
        trainer = self.trainers[name]
        self.trainers[name] = replace(trainer, macs=trainer.macs + 10, steps=trainer.steps + 1)
        if checkpoint:
            self.checkpoints[trainer.digest] = self.checkpoints.get(trainer.digest, 0) + 1

    def make_artifact(self) -> None:
        """The live attempt publishes its artifact and keeps running. Over all attempts, at least
        the planned MACs have then been spent.
        """
        name = self.live()
        assert name is not None
        trainer = self.trainers[name]
        rows = self.rows(trainer.alone)
        planned = next((s.planned_macs for s in rows if s.name == trainer.stage), 0)
        done = sum(t.macs for t in self.trainers.values() if t.digest == trainer.digest)
        self.trainers[name] = replace(trainer, macs=trainer.macs + max(0, planned - done))
        if trainer.digest not in self.artifacts:
            self.artifacts[trainer.digest] = "whole"
            self._record(trainer)

    def _record(self, trainer: Trainer) -> None:
        known = {stage.name: stage for stage in ledgers(self.status)}.get(trainer.stage)
        epochs = int(self.inputs[trainer.digest]["epochs"])
        schedule = Schedule(epochs)
        if known is not None and known.epochs == epochs and not trainer.alone:
            schedule = Schedule(epochs, known.round, known.first_epochs)
        alone = "predecessor" not in self.inputs[trainer.digest]
        spent = Spent(macs=TRAINING_COST)
        self.records += (Trained(trainer.stage, trainer.digest, schedule, alone, spent),)

    def end(self, failure: FailureClass | None = None, *, word: bool = True) -> None:
        """The live attempt exits: with success, with a failure, or without a last word."""
        name = self.live()
        assert name is not None
        trainer = self.trainers[name]
        said = LastWord(
            result="Succeeded" if failure is None else "Failed",
            failure=failure,
            message="as it was told",
            checkpoint_step=self.checkpoints.get(trainer.digest),
            macs=trainer.macs // 2,  # as of its last report; more was spent since
        )
        self.trainers[name] = replace(trainer, live=False, word=said if word else None)

    def tear_launch(self, decision: Decision) -> None:
        """The launcher dies half-way: the task is written, but no process was started."""
        assert isinstance(decision.action, Launch)
        self._launch(decision.action)
        name = decision.action.attempt.name
        self.trainers[name] = replace(self.trainers[name], live=False)

    def restart(self) -> None:
        """The process that decides restarts. On a laptop the user has started the command again,
        which renews the budgets and ends an interruption.
        """
        self.interrupted = False
        if not self.cluster:
            self.ask_again()

    def ask_again(self) -> None:
        self.retry += 1
        self._forgive()

    def _forgive(self) -> None:
        self.forgiven |= set(self.status.attempts)

    def edit(self, **changes: Any) -> None:
        """Edits the spec: `suspend`, or paths with their values."""
        self.undisturbed = False
        self.suspend = changes.pop("suspend", self.suspend)
        self.edits.update(changes)
        self._forgive()
        if self.cluster:
            assert self.generation is not None
            self.generation += 1
        else:
            self.restart()

    def toggle(self, path: str, value: Any) -> None:
        """Makes an edit, or reverts it."""
        if path in self.edits:
            del self.edits[path]
            self.edit()
        else:
            self.edit(**{path: value})

    def drop_last_stage(self) -> None:
        """The last stage is dropped from the spec, or comes back."""
        self.toggle(f"spec.stages[{self.stages - 1}]", DELETE)

    def interrupt(self) -> None:
        self.undisturbed = False
        self.interrupted = True

    def lose_status(self) -> None:
        self.undisturbed, self.forgetful = False, True
        self.status = ChainStatus()

    def hurt(self, stage: int, how: str | None) -> None:
        """The artifact of a stage is removed (None) or damaged."""
        self.undisturbed = False
        digest = self.status.stages[stage].input_digest
        if how is None:
            self.artifacts.pop(digest or "", None)
        elif digest in self.artifacts:
            self.artifacts[digest] = how

    # Life without further faults.

    def calm_step(self) -> bool:
        """One step of `decide`; while it waits, the world goes on. False at rest."""
        before = dict(self.trainers)
        decision = self.step()
        if decision.write or self.trainers != before:
            assert decision.again is not None
            return True
        name = self.live()
        if decision.again is None:
            assert name is None, "`decide` rests while an attempt runs"
            return False
        if name is None:
            assert decision.again > 0 and self.backoff, "`decide` waits without a reason"
            self.now += decision.again
        elif self.trainers[name].digest in self.artifacts:
            self.end()
        elif self.trainers[name].asked_to_stop:
            self.end(FailureClass.PREEMPTED)
        else:
            self.train()
            self.make_artifact()
        return True

    def check_rest(self) -> None:
        """At rest `decide` writes nothing more, and the status says why the chain rests."""
        again = decide(self.chain(), self.observed(), self.now + 1000)
        assert (
            not again.write
            and again.action is None
            and again.again is None
            and again.status == self.status
        )
        conditions = [
            kind for kind in ("Complete", "Failed", "Suspended") if self.status.is_true(kind)
        ]
        states = [stage.state for stage in self.status.stages]
        verdicts = [stage.gate.verdict for stage in self.status.stages if stage.gate]
        if not conditions and (
            self.held_by_gate(len(states)) or GateVerdict.UNMEASURED in verdicts
        ):
            conditions = ["Held"]
        assert len(conditions) == 1, conditions
        assert all(
            a.finished_at or not self.seen(a.name).started
            for s in self.status.stages
            for a in s.attempts
        )
        match conditions[0]:
            case "Complete":
                assert set(states) == {State.SUCCEEDED}
                assert all(self.artifact_is_whole(s.input_digest) for s in self.status.stages)
            case "Held":
                held = states.count(State.SUCCEEDED)
                assert states[:held] == [State.SUCCEEDED] * held and held > 0
                assert {s.reason_code for s in self.status.stages[held:]} <= {
                    Code.WAITS_FOR_GATE,
                    Code.WAITS_FOR_STAGE,
                    Code.BASELINE_FAILED,
                }
            case "Suspended":
                assert self.must_stop()
                assert State.SUSPENDED in states and State.FAILED not in states
            case "Failed":
                self._check_failed(next(s for s in self.status.stages if s.state is State.FAILED))
        if not self.forgetful and all(s.attempts or not s.macs for s in self.status.stages):
            spent = (t.macs for t in self.trainers.values() if not t.alone)
            assert self.status.total.macs == sum(spent), "the ledger equals what was spent"

    def _check_failed(self, stage: StageStatus) -> None:
        """A stage fails for one of these reasons: a damaged artifact, a permanent failure, an
        exhausted budget, or an artifact that is gone while no retraining was requested.
        """
        last = stage.attempts[-1].failure if stage.attempts else None
        limits = self.chain().spec.retry
        assert (
            self.artifacts.get(stage.input_digest or "") == "damaged"
            or (last is not None and last.permanent)
            or stage.retries > limits.max_retries
            or stage.disruptions > limits.max_disruptions
            or stage.reason.startswith(("CorruptArtifact", "NoArtifact"))
            or stage.attempt_count == 999
        ), stage.reason

    # For a search.

    def copy(self) -> World:
        other = copy.copy(self)
        other.edits, other.trainers = dict(self.edits), dict(self.trainers)
        other.artifacts, other.checkpoints, other.inputs = (
            dict(self.artifacts),
            dict(self.checkpoints),
            dict(self.inputs),
        )
        return other

    def key(self) -> bytes:
        parts = (
            self.stages,
            self.cluster,
            sorted(self.edits.items(), key=str),
            self.suspend,
            self.generation,
            self.retry,
            self.interrupted,
            self.only,
            sorted(self.trainers.items()),
            sorted(self.artifacts.items()),
            self.forgetful,
            self.now,
            sorted(self.checkpoints.items()),
            sorted(self.forgiven),
            self.undisturbed,
            self.metrics_of.__name__,
            self.records,
        )
        return hashlib.blake2b((repr(parts) + self.status.model_dump_json()).encode()).digest()
