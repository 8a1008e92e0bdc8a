"""One pass over one chain: it reads, decides and writes, until nothing is left to do."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from pydantic import ValidationError

from modelchain.api.reasons import Code
from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus, GateVerdict, StageStatus, State
from modelchain.decide.conditions import refused, sentence, unreadable
from modelchain.decide.decide import decide
from modelchain.decide.observed import (
    Action,
    Decision,
    Discard,
    DropShare,
    Launch,
    Measure,
    RecordMetrics,
)
from modelchain.errors import InputError
from modelchain.gate.verdict import in_words
from modelchain.io.load import spec_of
from modelchain.plan.check import check, check_epochs
from modelchain.plan.pools import PoolFile
from modelchain.plan.prices import shown
from modelchain_operator.api.kube import CHAINS, ApiError, Forbidden, Kube, NotFound, Object
from modelchain_operator.api.objects import is_deleting
from modelchain_operator.api.objects import uid as uid_of
from modelchain_operator.api.refusals import is_refusal
from modelchain_operator.reconcile import handovers, measuring
from modelchain_operator.reconcile.events import Events
from modelchain_operator.reconcile.execute import Executor
from modelchain_operator.reconcile.memory import Memory
from modelchain_operator.reconcile.observe import View
from modelchain_operator.reconcile.snapshot import Reader, Snapshot
from modelchain_operator.runners.registry import RUNNERS

log = logging.getLogger(__name__)

Key = tuple[str, str]  # namespace, name of a chain
# The most decisions of one pass. A chain that needs more gets its next pass after `SOON` seconds,
# so that other chains have their turn.
MOST_DECISIONS = 64
SOON = 0.5
# The seconds after which it is told again that a status cannot be read.
TELL_AGAIN = 600.0
# Reasons that make a Warning event although the stage has not failed.
WARNINGS = (
    Code.PROGRESS_UNKNOWN,
    Code.NODES_AVOIDED,
    Code.LAUNCH_REFUSED,
    Code.RELEASE_REFUSED,
    Code.GATE_RELAXED,
)
# Events of a stage that say what it has cost.
PAID = (Code.STAGE_SUCCEEDED, Code.STAGE_FAILED, Code.GATE_RELAXED)


class Controller:
    """Brings chains to what their specs say.

    Passes over different chains may run at the same time, but only one over each chain.
    """

    def __init__(
        self, kube: Kube, events: Events, config: PoolFile, clock: Callable[[], float] = time.time
    ):
        self.kube = kube
        self.events = events
        self.config = config
        self.clock = clock
        self.memory = Memory(clock=clock)
        self.reader = Reader(kube, self.memory, config.progress_seconds)
        self.executor = Executor(kube, config, self.memory)
        self.hand_overs = handovers.histogram()
        # By chain UID, when it was told that the status cannot be read.
        self._told: dict[str, float] = {}

    def remember(self, pod: Object) -> bool:
        """Keep how a pod ended, because the pod may be gone at the next pass.

        Returns whether it has ended, and this was not known.
        """
        return self.memory.remember(pod)

    def artifact_changed(self, record: Object) -> None:
        """Forget what was cached of a StageArtifact, so that the next pass reads it again."""
        self.memory.artifacts.drop((record["metadata"]["namespace"], record["spec"]["inputDigest"]))

    def claim_changed(self, claim: Key, uid: str | None) -> bool:
        """Whether a claim is gone, or is another one than passes have read. Then it is forgotten.

        Args:
            claim: its namespace and name.
            uid: as it was just listed; None if it was not.
        """
        known = self.memory.claims.last(claim)
        changed = uid is None or (known is not None and uid_of(known) != uid)
        if changed:
            self.memory.claims.drop(claim)
        return changed

    async def reconcile(self, key: Key) -> float | None:
        """Make one pass over a chain.

        Returns the seconds until the next pass is due if no event comes before; None if none is.
        Raises any `ApiError`. The caller may then simply retry, since each write is whole.
        """
        namespace, name = key
        try:
            chain = await self.kube.get(CHAINS, namespace, name)
        except NotFound:
            return None
        if is_deleting(chain):
            return None  # the garbage collector deletes its objects; there is nothing to write
        try:
            return await self._pass(chain)
        except Forbidden as error:
            if error.namespace_terminating:
                return None
            raise

    async def _pass(self, chain: Object) -> float | None:
        try:
            status = _status_of(chain)
        except _Unreadable as error:
            await self._cannot_read(chain, error)
            return None
        try:
            snapshot = Snapshot(chain, _checked(chain, status), status, jobs={}, pods=[])
        except InputError as error:
            await self._refuse(chain, status, error)
            return None
        try:
            return await self._decide_and_act(snapshot)
        except InputError as error:
            await self._refuse(snapshot.chain, snapshot.status, error)
            return None

    async def _decide_and_act(self, snapshot: Snapshot) -> float | None:
        """Decide and act until nothing is left to do now."""
        await self.reader.jobs_and_pods(snapshot)
        await self.reader.records_ahead(snapshot)
        for _ in range(MOST_DECISIONS):
            decision = await self._decide(snapshot)
            digests = rests_on(snapshot.status, decision)
            if digests and not snapshot.fresh:
                # What the decision depends on is read again before it is carried out: another
                # client may have changed it meanwhile.
                if not decision.write:
                    await self.reader.jobs_and_pods(snapshot)
                self.reader.forget(snapshot, digests)
                snapshot.fresh = True
            elif decision.write:
                snapshot.fresh = False
                await self._write(snapshot, decision.status)
            elif decision.action is None:
                return decision.again
            else:
                snapshot.fresh = False
                if not await self._act(snapshot, decision.action):
                    return decision.again
        return SOON

    async def _act(self, snapshot: Snapshot, action: Action) -> bool:
        """Carry out an action.

        The status tells of a refusal only what keeps a stage from going on, so an event tells what
        cannot be tidied up.
        """
        try:
            return await self.executor.act(snapshot, action)
        except ApiError:
            refusal = self.memory.refusal(snapshot.uid, action)
            if refusal is not None and isinstance(action, Discard | DropShare):
                self.events.tell(
                    snapshot.chain, "Warning", refusal.reason.code, refusal.reason.message
                )
            raise

    async def _decide(self, snapshot: Snapshot) -> Decision:
        """Decide, and read what the decision turns out to need, until it needs nothing more."""
        while True:
            view = View(snapshot, self.config, self.memory, self.clock())
            await self.reader.progress(view.sightings.rank_0_pods())
            decision = decide(snapshot.spec, view.observed(), view.now)
            if not snapshot.needs:
                return decision
            await self.reader.answer(snapshot)

    async def _write(self, snapshot: Snapshot, status: ChainStatus) -> None:
        before = snapshot.status
        snapshot.chain = await self._put(snapshot.chain, status)
        snapshot.status = status
        # An older CRD lets the server drop fields it does not know. Every pass would write again.
        if _status_of(snapshot.chain) != status:
            raise RuntimeError(
                "the API server keeps less of a status than was written; apply this version's CRDs"
            )
        for stage, known in _with_before(status.stages, before.stages):
            handovers.observe(self.hand_overs, known, stage)
            if news(known) != news(stage):
                self._send_event(snapshot, stage, "stage")
            if _has_missed(stage) and not _has_missed(known):
                self._send_miss(snapshot, stage)
            for kind, code, text in measuring.news(known, stage):
                self.events.tell(snapshot.chain, kind, code, text)
        for row, known in _with_before(status.baselines, before.baselines):
            if news(known) != news(row):
                self._send_event(snapshot, row, "baseline")

    async def _put(self, chain: Object, status: ChainStatus) -> Object:
        """PUT the status. If the server refuses it, only an event can tell."""
        try:
            return await self.executor.write_status(chain, status)
        except ApiError as error:
            if is_refusal(error):
                self.events.tell(chain, "Warning", Code.STATUS_REFUSED, str(error))
            raise

    def _send_event(
        self, snapshot: Snapshot, stage: StageStatus, what: Literal["stage", "baseline"]
    ) -> None:
        """Send an event for a stage's transition. A stage that waits for its turn is no news."""
        quiet = not stage.attempts and not stage.stalled and stage.code not in WARNINGS
        if stage.state is State.PENDING and quiet:
            return
        retrying = stage.state is State.PENDING and stage.retries > 0
        bad = stage.stalled or stage.state is State.FAILED or retrying or news(stage) in WARNINGS
        text = sentence(stage, what=what)
        if stage.state is State.SUCCEEDED and stage.results:
            text += "; " + ", ".join(
                f"{name} {value}" for name, value in stage.results.items() if "/" not in name
            )
        if news(stage) in PAID:
            text += money(stage, snapshot.status, what)
        self.events.tell(snapshot.chain, "Warning" if bad else "Normal", news(stage), text)

    def _send_miss(self, snapshot: Snapshot, stage: StageStatus) -> None:
        gate, found = snapshot.spec.spec.gate, stage.gate
        assert gate is not None and found is not None
        text = f"stage {stage.name} missed its baseline: {in_words(gate, found)}"
        text += money(stage, snapshot.status, "stage")
        self.events.tell(snapshot.chain, "Warning", Code.GATE_MISSED, text)

    async def _refuse(self, chain: Object, status: ChainStatus, error: InputError) -> None:
        """Write in the status why the spec cannot be run, and do nothing else.

        A CRD cannot express all checks, so the API server may accept such a spec.
        """
        message = "; ".join(str(problem) for problem in error.problems)
        advice = f"{message}; correct it and apply it again"
        new = refused(status, chain["metadata"]["generation"], advice, self.clock())
        if new != status:
            chain = await self._put(chain, new)
            self.events.tell(chain, "Warning", Code.INVALID_SPEC, message)
        for lease in await self.reader.idle_shares(chain):
            await self.executor.give_back(lease)

    async def _cannot_read(self, chain: Object, error: _Unreadable) -> None:
        """Say in the conditions that another version wrote the status, and do nothing else.

        To act on a part of it could train a stage twice. If that version runs as well, it takes
        these conditions away again. So they are written only once in a while.
        """
        meta, now = chain["metadata"], self.clock()
        new = unreadable(chain["status"], meta["generation"], str(error), now)
        if new == chain["status"] or now < self._told.get(meta["uid"], 0.0) + TELL_AGAIN:
            return
        self._told[meta["uid"]] = now
        chain = await self.executor.replace_status(chain, new)
        self.events.tell(chain, "Warning", Code.STATUS_UNREADABLE, str(error))
        log.error("chain %s in %s: %s", meta["name"], meta["namespace"], error)


def rests_on(status: ChainStatus, decision: Decision) -> frozenset[str]:
    """The input digests whose records a decision must not take from a cache; often empty.

    A launch depends on the records of its stage and of the one before, a chain that is said to be
    complete on those of all its stages, and a measurement on the record that it completes.

    Args:
        status: the stored status.
        decision: what `decide` has returned for it.
    """
    if decision.write:
        complete = decision.status.is_true("Complete") and not status.is_true("Complete")
        stages = decision.status.stages if complete else []
        return frozenset(stage.input_digest for stage in stages if stage.input_digest)
    match decision.action:
        case Launch(attempt=attempt, predecessor=before):
            digests = {attempt.input_digest, before.input_digest if before else None}
            return frozenset(digest for digest in digests if digest)
        case Measure(artifact=artifact) | RecordMetrics(measure=Measure(artifact=artifact)):
            return frozenset({artifact.input_digest})
    return frozenset()


def news(stage: StageStatus) -> Code:
    """The reason of the event that is sent when a stage enters this state."""
    if stage.stalled:
        return Code.STAGE_STALLED
    if stage.code is Code.STOPPING:
        return Code.STAGE_STOPPING
    if stage.code in WARNINGS:
        return stage.code
    return Code.STAGE_RETRYING if stage.not_before is not None else Code(f"Stage{stage.state}")


def money(stage: StageStatus, status: ChainStatus, what: Literal["stage", "baseline"]) -> str:
    """What a stage or a baseline has cost, to end an event's sentence.

    It is empty without a price, and for a stage whose artifact was there before.
    """
    if stage.cost is None or stage.cache == "Hit":
        return ""
    text = f"; it has cost {shown(stage.cost)} {status.currency}"
    if what == "baseline" or status.total.cost is None:
        return text
    return f"{text}, all stages {shown(status.total.cost)} {status.currency}"


def _with_before(
    after: Iterable[StageStatus], before: Iterable[StageStatus]
) -> Iterator[tuple[StageStatus, StageStatus]]:
    """Each stage with what it was before; a new one with an empty status."""
    known = {stage.name: stage for stage in before}
    for stage in after:
        yield stage, known.get(stage.name, StageStatus(name=stage.name))


def _has_missed(stage: StageStatus) -> bool:
    return stage.gate is not None and stage.gate.verdict is GateVerdict.MISSED


class _Unreadable(Exception):
    """This version cannot read all of a stored status."""

    def __init__(self, what: str):
        super().__init__(
            f"another version of the operator wrote the status, and this one cannot read {what}:"
            " install that version again. Nothing is launched, stopped or deleted meanwhile"
        )


def _status_of(chain: Object) -> ChainStatus:
    """The stored status. Raises _Unreadable."""
    try:
        status = ChainStatus.model_validate_json(json.dumps(chain.get("status") or {}))
    except ValidationError as error:
        places = [".".join(map(str, problem["loc"])) for problem in error.errors()]
        raise _Unreadable(", ".join(places[:3]) or "it") from error
    for _, attempt in status.attempts.values():
        if attempt.runner not in (None, *RUNNERS):
            raise _Unreadable(f"the runner {attempt.runner}")
    return status


def _checked(chain: Object, status: ChainStatus) -> ModelChain:
    """The chain, checked as the command line checks it. Raises InputError naming every problem."""
    name = f"ModelChain {chain['metadata']['name']}"
    spec = spec_of(chain, name)
    check(spec, name)
    check_epochs(spec, name, status.frozen_epochs)
    return spec
