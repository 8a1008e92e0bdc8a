"""One pass over one chain: read, decide, write one thing, and again until nothing is left to do."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable

from pydantic import ValidationError

from modelchain.api.reasons import Code
from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus, StageStatus, State
from modelchain.decide.conditions import refused, sentence
from modelchain.decide.decide import decide
from modelchain.decide.observed import Launch, Step
from modelchain.errors import InputError
from modelchain.io.load import parse
from modelchain.plan.check import check, check_epochs
from modelchain.plan.pools import PoolFile
from modelchain_operator.api.kube import CHAINS, Forbidden, Kube, NotFound, Object
from modelchain_operator.api.objects import is_deleting
from modelchain_operator.reconcile.events import Events
from modelchain_operator.reconcile.execute import Executor
from modelchain_operator.reconcile.memory import Memory
from modelchain_operator.reconcile.observe import View
from modelchain_operator.reconcile.snapshot import Reader, Snapshot
from modelchain_operator.runners.registry import RUNNERS

log = logging.getLogger(__name__)

Key = tuple[str, str]  # namespace, name of a chain
MOST_STEPS = 64  # in one pass; a chain that needs more gets another pass soon
SOON = 0.5
WARNINGS = (Code.PROGRESS_UNKNOWN, Code.NODES_AVOIDED)  # of a stage that is not failing


class Controller:
    """Brings chains to what their specs say. Any number of passes may be under way, one at a time
    for each chain.
    """

    def __init__(
        self, kube: Kube, events: Events, config: PoolFile, clock: Callable[[], float] = time.time
    ):
        self.kube, self.events, self.config, self.clock = kube, events, config, clock
        self.memory = Memory(clock=clock)
        self.reader = Reader(kube, self.memory, config.progress_seconds)
        self.executor = Executor(kube, config, self.memory)

    def remember(self, pod: Object) -> None:
        """Keep what a pod said at its end: it may be gone at the next pass."""
        self.memory.remember(pod)

    def artifact_changed(self, record: Object) -> None:
        self.memory.artifacts.drop((record["metadata"]["namespace"], record["spec"]["inputDigest"]))

    async def reconcile(self, key: Key) -> float | None:
        """One pass over a chain. Seconds until the next is due without an event, None for
        never.

        Raises any `ApiError`: nothing is half done, and the caller should retry.
        """
        namespace, name = key
        try:
            chain = await self.kube.get(CHAINS, namespace, name)
        except NotFound:
            return None
        if is_deleting(chain):
            return None  # its children go with it; there is nothing to write any more
        try:
            return await self._pass(chain)
        except Forbidden as error:
            if error.namespace_terminating:
                return None
            raise

    async def _pass(self, chain: Object) -> float | None:
        status = _status_of(chain)
        try:
            snapshot = Snapshot(chain, _checked(chain, status), status, jobs={}, pods=[])
        except InputError as error:
            await self._refuse(chain, status, error)
            return None
        try:
            return await self._steps(snapshot)
        except InputError as error:
            await self._refuse(snapshot.chain, snapshot.status, error)
            return None

    async def _steps(self, snapshot: Snapshot) -> float | None:
        """Decide and write, one thing at a time, until nothing is left to do now."""
        await self.reader.jobs_and_pods(snapshot)
        for _ in range(MOST_STEPS):
            step = await self._decide(snapshot)
            if step.write:
                snapshot.fresh = False
                await self._write(snapshot, step.status)
            elif step.action is None:
                return step.again
            elif isinstance(step.action, Launch) and not snapshot.fresh:
                # The intent is in the status. What it rests on is read again before the job is
                # made: another client may have changed it since.
                await self.reader.jobs_and_pods(snapshot)
                self.reader.forget(snapshot, step.action)
                snapshot.fresh = True
            else:
                snapshot.fresh = False
                if not await self.executor.act(snapshot, step.action):
                    return step.again
        return SOON

    async def _decide(self, snapshot: Snapshot) -> Step:
        """Decide, reading what the decision turns out to need."""
        while True:
            view = View(snapshot, self.config, self.memory, self.clock())
            await self.reader.progress(view.sightings.rank_0_pods())
            step = decide(snapshot.spec, view.observed(), view.now)
            if not snapshot.needs:
                return step
            await self.reader.answer(snapshot)

    async def _write(self, snapshot: Snapshot, status: ChainStatus) -> None:
        before = {stage.name: stage for stage in snapshot.status.stages}
        snapshot.chain = await self.executor.write_status(snapshot.chain, status)
        snapshot.status = status
        if _status_of(snapshot.chain) != status:
            raise RuntimeError(
                "the API server keeps less of a status than was written; apply this version's CRDs"
            )
        for stage in status.stages:
            if news(before.get(stage.name, StageStatus(name=stage.name))) != news(stage):
                self._tell(snapshot.chain, stage)

    def _tell(self, chain: Object, stage: StageStatus) -> None:
        """One event a transition; what only waits for its turn is no news."""
        if stage.state is State.PENDING and not stage.attempts and not stage.stalled:
            return
        retrying = stage.state is State.PENDING and stage.retries > 0
        bad = stage.stalled or stage.state is State.FAILED or retrying or news(stage) in WARNINGS
        text = sentence(stage)
        if stage.state is State.SUCCEEDED and stage.results:
            text += "; " + ", ".join(
                f"{name} {value}" for name, value in stage.results.items() if "/" not in name
            )
        self.events.tell(chain, "Warning" if bad else "Normal", news(stage), text)

    async def _refuse(self, chain: Object, status: ChainStatus, error: InputError) -> None:
        """A spec that the CRD let through and that cannot be run: said in the status, and nothing
        is touched.
        """
        message = "; ".join(str(problem) for problem in error.problems)
        meta = chain["metadata"]
        said = refused(
            status, meta["generation"], f"{message}; correct it and apply it again", self.clock()
        )
        if said != status:
            chain = await self.executor.write_status(chain, said)
            self.events.tell(chain, "Warning", Code.INVALID_SPEC, message)


def news(stage: StageStatus) -> Code:
    """The reason of the event that tells of a stage's state."""
    if stage.stalled:
        return Code.STAGE_STALLED
    if stage.code is Code.STOPPING:
        return Code.STAGE_STOPPING
    if stage.code in WARNINGS:
        return stage.code
    return Code.STAGE_RETRYING if stage.not_before is not None else Code(f"Stage{stage.state}")


def _status_of(chain: Object) -> ChainStatus:
    """The stored status. Raises RuntimeError for one this version cannot read: nothing is done on a
    guess.
    """
    another = f"the status of {chain['metadata']['name']} was written by another version"
    try:
        status = ChainStatus.model_validate_json(json.dumps(chain.get("status") or {}))
    except ValidationError as error:
        raise RuntimeError(f"{another}: {error}") from error
    for attempt in (a for stage in status.stages for a in stage.attempts):
        if attempt.runner not in (None, *RUNNERS):
            raise RuntimeError(f"{another}: it names the runner {attempt.runner}")
    return status


def _checked(chain: Object, status: ChainStatus) -> ModelChain:
    """The chain, checked as the command line checks it. Raises InputError naming every problem."""
    name = f"ModelChain {chain['metadata']['name']}"
    spec = parse(ModelChain, {key: value for key, value in chain.items() if key != "status"}, name)
    check(spec, name)
    check_epochs(spec, name, status.frozen_epochs)
    return spec
