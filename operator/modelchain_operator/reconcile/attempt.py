"""Tells `decide` what one attempt does.

It puts together the attempt's job, the pods that exist and what is remembered of pods that are
gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from modelchain.api.contracts import FailureClass, Progress
from modelchain.api.reasons import Code, Reason
from modelchain.api.spec import KIND
from modelchain.api.status import AttemptStatus, Capacity, ChainStatus, Spent, State
from modelchain.decide.observed import Contact, Seen
from modelchain.plan.pools import NodePool, PoolFile
from modelchain.plan.prices import NO_PRICES, Prices, capacity_of
from modelchain_operator.api import refusals
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import (
    annotation,
    is_deleting,
    label,
    seconds,
    true_condition,
    uid,
)
from modelchain_operator.api.objects import name as name_of
from modelchain_operator.reconcile.job_requests import NODE_POOL, pool_name
from modelchain_operator.reconcile.memory import Asked, Memory
from modelchain_operator.reconcile.pod_evidence import (
    OF_SERVICES,
    Evidence,
    evidence,
    refusal,
    stuck,
)
from modelchain_operator.reconcile.snapshot import RETRY, Snapshot
from modelchain_operator.runners import cpu_job, verify
from modelchain_operator.runners import pods as podread
from modelchain_operator.runners.port import JobState
from modelchain_operator.runners.registry import (
    job_uid_of,
    pods_made_by,
    runner_for,
    runner_of,
    state_of,
)
from modelchain_operator.runners.template import (
    CHAIN,
    CHAIN_UID,
    INPUT_DIGEST,
    PROGRESS_PORT,
    ROLE,
    TRAINING,
    attempt_of,
)

# Pods normally appear within this many seconds after a release. If one has not come by then, we
# look for a reason in the events.
PODS_COME_WITHIN = 5.0
# A job normally ends within this many seconds after its pods.
JOB_ENDS_WITHIN = 10.0
# The state that stands for a job that does not exist any more.
GONE = JobState(released=True, suspended=False, finished=None, deleting=False, message="")


@dataclass(frozen=True)
class _Launched:
    """An open attempt that has a job, or had one that is gone (`job` None)."""

    attempt: AttemptStatus
    job: Object | None
    state: JobState
    found: Evidence
    # Seconds since the epoch.
    now: float

    @property
    def live(self) -> bool:
        """Whether a pod is live, or the job may still make one.

        A job that is being deleted counts, since its controller may not have noticed yet.
        """
        makes_pods = self.state.finished is None and (
            self.state.deleting or not self.state.suspended
        )
        return self.found.live or (self.job is not None and makes_pods)

    @property
    def over(self) -> bool:
        """Whether the attempt has ended: its job is finished or gone, and no pod is live."""
        return (self.job is None or self.state.finished is not None) and not self.found.live

    @property
    def trained(self) -> bool:
        """Whether the attempt's trainers have ended, although its job or a pod has not.

        A sidecar may run on, or the job's controller may be kept from its work, for example by a
        refused Service. While the job is suspended or deleted, pods end for that.
        """
        state, since = self.state, self.found.ended
        if self.job is None or since is None or self.over:
            return False
        if not state.released or state.suspended or state.deleting:
            return False
        return self.found.live or self.now - since >= JOB_ENDS_WITHIN

    @property
    def succeeded(self) -> bool:
        """Whether the job or every main container said that it succeeded.

        The status then says Verifying, so this stays known after job and pods were deleted.
        """
        verifying = self.attempt.state is State.VERIFYING
        return self.state.finished == "Succeeded" or self.found.completed or verifying

    @property
    def left_artifact(self) -> bool:
        """Whether the attempt ended with an artifact: by rank 0's last word, else by its job."""
        word = self.found.word
        ended = self.over or self.trained
        return ended and (self.succeeded if word is None else word.result == "Succeeded")

    @property
    def unproven(self) -> bool:
        """Whether the job says that it succeeded, and no pod left a last word to prove it."""
        return self.left_artifact and self.found.word is None

    @property
    def unreleased(self) -> bool:
        """Whether the job exists and was never allowed to run."""
        state = self.state
        unfinished = state.finished is None and not state.deleting
        return self.job is not None and not state.released and unfinished

    @property
    def idle(self) -> bool:
        """Whether another client has suspended the job, which is in no queue.

        In a queue, Kueue suspends and resumes jobs, so a suspended job there only waits.
        """
        state = self.state
        suspended = state.released and state.suspended and not state.deleting
        return suspended and state.queue is None and not self.over

    @property
    def queued(self) -> bool:
        """Whether the job was released and waits, in its queue or for the scheduler."""
        in_queue = self.state.suspended and self.state.queue is not None
        waits = in_queue or _unscheduled(self.found)
        return waits and self.state.released and self.found.running == 0 and not self.over

    @property
    def failure(self) -> tuple[FailureClass, str] | None:
        """Why the attempt failed, by its pods and its job. It is used if there is no last word."""
        if self.found.failure is None and self.job is None:
            return FailureClass.KILLED, f"its job {self.attempt.name} was deleted"
        return self.found.failure


class Sightings:
    """What is seen of each attempt of a chain.

    Attempts are those of the status, and those of which only pods are left.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        status: ChainStatus,
        config: PoolFile,
        memory: Memory,
        now: float,
    ):
        self.snapshot, self.config = snapshot, config
        self.memory = memory
        self.now = now
        self.spec = snapshot.spec.spec
        self.attempts, self.currency = status.attempts, status.currency
        # By the attempt's name, the pods that a job of any kind has made for it. Pods of which a
        # user has taken away their owner count if they counted before.
        self.pods: dict[str, list[Object]] = {}
        counted = {pod for _, attempt in self.attempts.values() for pod in attempt.pods}
        for pod in snapshot.pods:
            if label(pod, ROLE) in TRAINING and (job_uid_of(pod) or uid(pod) in counted):
                self.pods.setdefault(attempt_of(pod), []).append(pod)
        self._seen: dict[str, Seen] = {}

    def seen(self, name: str) -> Seen:
        if name not in self._seen:
            self._seen[name] = self._see(name)
        return self._seen[name]

    def _see(self, name: str) -> Seen:
        _, attempt = self.attempts[name]
        job = self._job(attempt)
        if attempt.finished_at is not None:
            return self._closed(attempt, job)
        if job is None and attempt.uid is None:
            return self._not_started(attempt)
        state = state_of(job) if job is not None else GONE
        found = self._evidence(attempt, job)
        return self._launched(_Launched(attempt, job, state, found, self.now))

    def _closed(self, attempt: AttemptStatus, job: Object | None) -> Seen:
        """An attempt that the status says has ended. Its job or a pod may not have ended yet."""
        live = any(podread.is_live(pod) for pod in self.pods.get(attempt.name, ()))
        unfinished = job is not None and state_of(job).finished is None
        return Seen(live=live or unfinished, started=True)

    def _launched(self, launched: _Launched) -> Seen:
        attempt, found = launched.attempt, launched.found
        ended = launched.over or launched.trained
        pool = self._pool(attempt, launched.job)
        return Seen(
            live=launched.live,
            started=True,
            trained=launched.trained,
            uid=uid(launched.job) if launched.job is not None else attempt.uid,
            pool=self._pool_name(attempt, launched.job),
            unreleased=launched.unreleased,
            queued=launched.queued,
            waiting=None if ended else self._waiting(launched),
            stalled=self._stalled(launched),
            running=found.running > 0,
            waits=self._waits(self._own_pods(attempt, launched.job), found),
            hopeless=found.permanent,
            word=found.word if ended else None,
            evidence=launched.failure,
            succeeded=launched.succeeded,
            verify=self._verify(attempt) if launched.unproven else None,
            pods=found.pods,
            gone_pods=found.gone,
            prices=self._prices(pool),
            bad_nodes=found.bad_nodes,
            idle=launched.idle,
            **self._progress(attempt, found),
        )

    def _stalled(self, launched: _Launched) -> Reason | None:
        """Why a user must act before this attempt can go on."""
        if launched.idle:
            return self._suspended_by_another(launched.attempt)
        if launched.left_artifact:
            lost = self._lost(launched)
            return lost or (self._unverifiable(launched) if launched.unproven else None)
        if launched.job is not None and launched.live and not launched.trained:
            return self._refusal(launched.job, launched)
        return None

    def _unverifiable(self, launched: _Launched) -> Reason | None:
        return self._not_ours(launched) or self._verify_refused(launched)

    def _not_ours(self, launched: _Launched) -> Reason | None:
        """Why no verify Job can be made: another client has made one of its name."""
        job = self.snapshot.want("verify", launched.attempt.name)
        if job is None or self.is_ours(job, launched.attempt):
            return None
        named = name_of(job)
        message = f"Job {named} is not this chain's, so the artifact cannot be verified"
        look = f"kubectl describe job {named} -n {self.snapshot.namespace}"
        return Reason(Code.NAME_TAKEN, named, message, look)

    def _not_started(self, attempt: AttemptStatus) -> Seen:
        """An intent without a job. Another object may have its name."""
        other = self.snapshot.want("name", attempt.name)
        if other is None or self.is_ours(other, attempt):
            return Seen(live=False, started=False)
        if is_deleting(other) or self._belongs_to_the_chain_before(other):
            message = f"waits until an earlier {name_of(other)} is gone"
            waiting = Reason(Code.NAME_GOING, attempt.name, message)
            return Seen(live=True, started=False, waiting=waiting)
        return Seen(live=False, started=False, taken=self._name_taken(attempt, other))

    def _belongs_to_the_chain_before(self, thing: Object) -> bool:
        """Whether a deleted chain of this name owns an object, which is soon deleted, too."""
        owners = thing["metadata"].get("ownerReferences") or []
        same_name = [
            owner
            for owner in owners
            if (owner["kind"], owner["name"]) == (KIND, self.snapshot.spec.metadata.name)
        ]
        return any(owner["uid"] != self.snapshot.uid for owner in same_name)

    def _name_taken(self, attempt: AttemptStatus, other: Object) -> Reason:
        chain = label(other, CHAIN)
        whose = f"chain {chain}'s" if chain else "not this chain's"
        return Reason(
            Code.NAME_TAKEN,
            attempt.name,
            f"{other['kind']} {name_of(other)} is {whose}, so the next attempt takes another"
            " number",
            runner_for(attempt.runner).describe(attempt.name, self.snapshot.namespace),
        )

    def _suspended_by_another(self, attempt: AttemptStatus) -> Reason:
        chain = f"{self.snapshot.spec.metadata.name} -n {self.snapshot.namespace}"
        kind = runner_for(attempt.runner).kind
        return Reason(
            Code.SUSPENDED_BY_ANOTHER,
            attempt.name,
            f"another client has suspended {kind} {attempt.name}, which is in no queue; it is left"
            " as it is. Set spec.runner.queueName if jobs have to be in a queue here; to"
            f" launch it anew: modelchain retry {chain}",
        )

    def _job(self, attempt: AttemptStatus) -> Object | None:
        """The attempt's job. A job of the same name does not count if it is another's.

        Without a UID in the status, a job that is being deleted is taken for an earlier one: to
        take up its UID would lose the name to it.
        """
        job = self.snapshot.jobs.get(attempt.name)
        if job is None or not self.is_ours(job, attempt) or attempt.uid not in (None, uid(job)):
            return None
        if attempt.uid is None and is_deleting(job):
            return None
        return job

    def is_ours(self, job: Object, attempt: AttemptStatus) -> bool:
        """Whether this chain made the job, for the attempt's inputs."""
        return (
            label(job, CHAIN_UID) == self.snapshot.uid
            and annotation(job, INPUT_DIGEST) == attempt.input_digest
        )

    def _evidence(self, attempt: AttemptStatus, job: Object | None) -> Evidence:
        """What the pods tell that the attempt's own job has made."""
        stage, _ = self.attempts[attempt.name]
        runner, pool = runner_for(attempt.runner), self._pool(attempt, job)
        asked = next((s.resources.nodes for s in self.spec.stages if s.name == stage.name), 1)
        return evidence(
            self._own_pods(attempt, job),
            self._made_by(attempt, job, self.memory.pods_of(self.snapshot.uid)),
            job=state_of(job) if job is not None else GONE,
            gang=podread.Gang(
                nodes=asked if job is None else runner.nodes(job),
                runner=runner,
                gpu_resource=pool.gpu_resource if pool else "nvidia.com/gpu",
            ),
            now=self.now,
            capacity=lambda one: self._capacity(attempt, pool, one),
            known=attempt.pods if attempt.gone != Spent() else None,
        )

    def _pool_name(self, attempt: AttemptStatus, job: Object | None) -> str | None:
        """The name of the node pool in which the attempt runs.

        The spec may name another one by now. It counts only for a job of an older version.
        """
        made_for = annotation(job, NODE_POOL) if job is not None else None
        return made_for or attempt.pool or pool_name(self.snapshot.spec, self.config)

    def _pool(self, attempt: AttemptStatus, job: Object | None) -> NodePool | None:
        """That pool; None if the configuration has it no longer."""
        return self.config.node_pools.get(self._pool_name(attempt, job) or "")

    def _prices(self, pool: NodePool | None) -> Prices:
        """What a GPU hour costs. Prices in another currency than the ledger's do not count."""
        currency = self.currency or self.config.currency
        same = currency == self.config.currency
        return pool.price_list if pool and same else NO_PRICES

    def _capacity(
        self, attempt: AttemptStatus, pool: NodePool | None, pod: Object
    ) -> Capacity | None:
        """How the pod's node is bought, by the label that its pool names; None if not known."""
        known = attempt.pods.get(uid(pod))
        if known is not None and known.capacity is not None:
            return known.capacity
        named, node = pool.label_for_prices if pool else None, pod["spec"].get("nodeName")
        if named is None or not node:
            return None
        found = self.snapshot.want("node", node)
        return capacity_of(label(found, named)) if found else None

    def _own_pods(self, attempt: AttemptStatus, job: Object | None) -> list[Object]:
        """The pods that exist and that the attempt's own job has made."""
        return self._made_by(attempt, job, self.pods.get(attempt.name, ()))

    def _made_by(
        self, attempt: AttemptStatus, job: Object | None, pods: Iterable[Object]
    ) -> list[Object]:
        """Those of the pods that the attempt's own job has made, or that counted before."""
        return pods_made_by(uid(job) if job is not None else attempt.uid, attempt, pods)

    def stuck(self) -> Reason | None:
        """Why a pod of any attempt still exists although its grace period is over."""
        pods = [pod for pods in self.pods.values() for pod in pods]
        return stuck(pods, self.now, self.memory.deleting_since)

    def _waiting(self, launched: _Launched) -> Reason | None:
        """Why nothing of an attempt runs yet."""
        if not launched.state.released:
            return None
        if launched.state.suspended:
            look = f"kubectl get workloads -n {self.snapshot.namespace}"
            message = f"waits for its turn in queue {launched.state.queue}"
            return Reason(Code.QUEUED, str(launched.state.queue), message, look, shown="look")
        return launched.found.waiting

    def _refusal(self, job: Object, launched: _Launched) -> Reason | None:
        """Why the API server refuses to create parts of the attempt's job.

        Only an event shows that. In most cases pods come soon, so events are read only if one has
        not come for some seconds, or if one waits until rank 0's pod can be reached.
        """
        state, found = launched.state, launched.found
        runner = runner_of(job)
        missing = found.count < runner.nodes(job)
        meets = found.waiting is not None and found.waiting.code is Code.INIT
        if not (missing or meets) or state.suspended or state.deleting or state.finished:
            return None
        released = seconds(launched.attempt.started_at)
        if released is None or self.now < released + PODS_COME_WITHIN:
            return None
        # All are asked for at once, so that one round of reading answers them all.
        events = [self.snapshot.want("events", subject) or [] for subject in runner.event_uids(job)]
        told = [event for each in events for event in each]
        message = refusal(told) if missing else refusal(told, OF_SERVICES)
        return self._refused(launched.attempt.name, message)

    def _refused(self, subject: str, message: str) -> Reason | None:
        """The reason of a job whose parts are refused with this message; None without one."""
        if not message:
            return None
        look = refusals.next_command(message, self.snapshot.namespace)
        return Reason(Code.PODS_FORBIDDEN, subject, message, look)

    def _verify_refused(self, launched: _Launched) -> Reason | None:
        """Why the API server refuses to create the pod of the attempt's verify Job."""
        if launched.found.word is not None or self._verify(launched.attempt) != "Pending":
            return None
        job = self.snapshot.want("verify", launched.attempt.name)
        there = any(podread.is_live(pod) for pod in self._verify_pods(job))
        if there or self.now < podread.created_at(job) + PODS_COME_WITHIN:
            return None
        events = self.snapshot.want("events", uid(job)) or []
        return self._refused(str(job["metadata"]["name"]), refusal(events))

    def _lost(self, launched: _Launched) -> Reason | None:
        """Why an artifact cannot be recorded: its claim is gone, or is younger than the attempt.

        A younger claim replaced the one that the attempt wrote to, and does not hold the artifact.
        """
        claim = self.snapshot.want("claim")
        name, began = launched.attempt.name, seconds(launched.attempt.started_at)
        if launched.job is not None:
            began = podread.created_at(launched.job)
        if claim is not None and (began is None or podread.created_at(claim) <= began):
            return None
        return Reason(
            Code.ARTIFACT_MISSING,
            name,
            f"attempt {name} succeeded, but its claim is gone or was replaced since;"
            " bring it back, or set stages[].rerun to train the stage again",
        )

    def _waits(self, pods: Iterable[Object], found: Evidence) -> tuple[FailureClass, float] | None:
        """The failure class to charge if pods start too late, and since when they occupy nodes.

        A pod occupies its node from the moment it is bound to it, whether it runs or not.
        """
        times = [
            since
            for pod in pods
            if not podread.has_ended(pod)
            and podread.started_at(pod) is None
            and (bound := true_condition(pod, "PodScheduled")) is not None
            and (since := seconds(bound.get("lastTransitionTime"))) is not None
        ]
        if not times:
            return None
        pulls = found.waiting is not None and found.waiting.code is Code.IMAGE
        return FailureClass.IMAGE if pulls else FailureClass.START_DEADLINE, min(times)

    def _verify(self, attempt: AttemptStatus) -> Any:
        """The verify Job's answer, "Pending" or "Unanswered". None if the Job is to be made."""
        job = self.snapshot.want("verify", attempt.name)
        if job is None:
            return None
        pods = self._verify_pods(job)
        if (answer := verify.answer(pods)) is not None:
            return answer
        if not cpu_job.finished(job) and not cpu_job.silent(pods):
            return "Pending"
        # A new value of the retry annotation asks for a new Job. Removing the annotation does not.
        retry = annotation(self.snapshot.chain, RETRY)
        return None if retry and annotation(job, RETRY) != retry else "Unanswered"

    def _verify_pods(self, job: Object) -> list[Object]:
        """The pods of a verify Job, and what is remembered of those that are gone."""
        pods = [*self.snapshot.pods, *self.memory.pods_of(self.snapshot.uid)]
        return [pod for pod in pods if cpu_job.made(job, pod)]

    def _progress(self, attempt: AttemptStatus, found: Evidence) -> dict[str, Any]:
        """The fields of `Seen` that rank 0 itself answers; none if rank 0 does not run."""
        rank_0 = next(self._rank_0(attempt), None)
        if rank_0 is None or not found.running:
            return {}
        asked = self.memory.progress.get(uid(rank_0), Asked())
        contact = Contact(
            answered=asked.answered,
            silent=asked.silent,
            ignored=len(asked.ignored),
            ignored_for=asked.ignored[-1] - asked.ignored[0] if asked.ignored else 0.0,
            address=(
                f"{rank_0['status'].get('podIP')}:{PROGRESS_PORT}, pod {rank_0['metadata']['name']}"
            ),
        )
        live = asked.answer
        # A pod's IP may be used again, so the answer may be another attempt's.
        if live is None or live.attempt != attempt.name:
            return {"contact": contact}
        progress = Progress(
            step=live.step,
            steps=live.steps,
            samples_per_second=live.samples_per_second,
            eta_seconds=live.eta_seconds,
        )
        return {
            "contact": contact,
            "progress": progress,
            "checkpoint_step": live.checkpoint_step,
            "macs": live.macs,
            "saved_macs": live.saved_macs,
            "told": live.milliseconds,
            "resumed": live.resumed,
        }

    def _rank_0(self, attempt: AttemptStatus) -> Iterator[Object]:
        """Rank 0's pod if it runs. There may be two while an old one is not seen to be gone; the
        newest comes first.
        """
        node_rank = runner_for(attempt.runner).node_rank
        pods = self._own_pods(attempt, self._job(attempt))
        for pod in sorted(pods, key=podread.created_at, reverse=True):
            if podread.is_running(pod) and node_rank(pod) == 0:
                yield pod

    def rank_0_pods(self) -> Iterator[Object]:
        """Running pods of rank 0, which can be asked for the progress of their attempts."""
        for _, attempt in self.attempts.values():
            if attempt.finished_at is None:
                yield from self._rank_0(attempt)


def _unscheduled(found: Evidence) -> bool:
    return found.waiting is not None and found.waiting.code in (
        Code.UNSCHEDULABLE,
        Code.SCHEDULING_GATED,
    )
