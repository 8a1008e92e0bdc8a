"""Explains why a chain does not run, or what it does.

An explanation is one sentence on the state, one on the cause, and the command to type next. The
questions in `explain` are asked in turn, and the first that has an answer gives it. Pure.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from modelchain.api.reasons import EDIT, WATCH, Code, Reason, command_of, filled, known
from modelchain.api.status import AttemptStatus, State
from modelchain.decide.conditions import first_unmeasured, why_unmeasured
from modelchain.decide.refusals import REFUSALS
from modelchain.io.units import age, human
from modelchain.plan.prices import shown
from modelchain_operator.api import objects, refusals
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import condition, is_deleting, is_refused, is_true, label
from modelchain_operator.explain.clues import (
    Clues,
    Line,
    Operator,
    gpu_time,
    no_operator,
    one_line,
    phase,
)
from modelchain_operator.explain.read import Situation
from modelchain_operator.runners import kueue
from modelchain_operator.runners import pods as podread
from modelchain_operator.runners.evaluation_job import ROLE_OF_JOB as EVALUATE
from modelchain_operator.runners.index_job import ROLE_OF_JOB as INDEX
from modelchain_operator.runners.port import Runner
from modelchain_operator.runners.registry import RUNNERS, job_uid_of, pods_made_by, runner_for
from modelchain_operator.runners.template import CHAIN, ROLE, TRAINING, attempt_of

# After an edit, in seconds: how long a live operator may take to make a pass, before we say that it
# does not come to this chain.
SOON = 60.0
# And how long we wait before we say that no operator runs, if no Lease shows one.
UNSEEN = 30.0
# A pause between two steps that is longer than this is reported.
SLOW = 600.0
# The most lines of evidence.
MOST_LINES = 8
# What pods wait for, by the reason why they have not started.
WAITS_FOR = {
    Code.UNSCHEDULABLE: "for a node",
    Code.SCHEDULING_GATED: "behind a scheduling gate",
    Code.IMAGE: "for its image",
    Code.INIT: "for rank 0's pod",
    Code.STARTING: "for its pods to start",
}
# By what is seen of a claim that the pods mount.
MISSING = "missing"
OF_CLAIM = {
    MISSING: Code.CLAIM_MISSING,
    "Pending": Code.CLAIM_PENDING,
    "Lost": Code.CLAIM_LOST,
}


@dataclass(frozen=True)
class Explanation:
    """What is shown to the user."""

    # A code, for scripts.
    reason: str
    # A sentence each.
    state: str
    cause: str
    # The command to type next.
    next: str
    evidence: tuple[Line, ...] = ()


def explain(situation: Situation) -> Explanation:
    """The first question's answer that applies, with its evidence."""
    case = _Case(situation)
    # The order matters: a question may assume that all before it had no answer.
    questions = (
        case.deleting,
        case.unseen,
        case.unmeasured,
        case.complete,
        case.failed,
        case.suspended,
        case.stalled,
        case.refused,
        case.backing_off,
        case.shared,
        case.left_behind,
        case.loading,
        case.indexing,
        case.ungated,
        case.queued,
        case.without_pods,
        case.avoiding,
        case.waiting,
        case.verifying,
        case.unheard,
        case.running,
    )
    answers = (answer for ask in questions if (answer := ask()) is not None)
    found = next(answers, None) or case.other()
    other_math = list(filter(None, map(case.clues.other_math, case.status.stages)))
    if found.reason == Code.COMPLETE:
        return replace(found, evidence=(*found.evidence, *other_math))
    hidden = [
        Line(kind, "you may not read these, so this may not be all")
        for kind in situation.unreadable
    ]
    return replace(
        found, evidence=(*found.evidence[:MOST_LINES], *other_math, *case.silence(found), *hidden)
    )


def document(situation: Situation, found: Explanation) -> dict[str, Any]:
    """The explanation as the JSON document of `explain -o json`."""
    meta = situation.chain["metadata"]
    lines = [
        {"object": e.object, "message": e.message, "ageSeconds": e.age_seconds}
        for e in found.evidence
    ]
    return {
        "chain": meta["name"],
        "namespace": meta["namespace"],
        **asdict(found),
        "evidence": lines,
    }


class _Case:
    """One chain: the stage it is at, that stage's open attempt, and the attempt's job and pods."""

    def __init__(self, s: Situation):
        self.s = s
        self.clues = Clues(s)
        self.meta = s.chain["metadata"]
        self.status = s.status
        self.name = self.meta["name"]
        self.namespace = self.meta["namespace"]
        stages = self.status.stages
        self.stage = next((stage for stage in stages if not stage.done), None)
        self.subject = f"Chain {self.name}"
        self.attempt: AttemptStatus | None = None
        if self.stage is not None:
            number = stages.index(self.stage) + 1
            self.subject = (
                f"Stage {self.stage.name} ({number} of {len(stages)}) of chain {self.name}"
            )
            row = next((b for b in self.status.baselines if b.name == self.stage.name), None)
            if row is not None and self.stage.code is Code.WAITS_FOR_BASELINE:
                self.stage = row
                self.subject = f"The baseline of stage {row.name} of chain {self.name}"
            self.attempt = next(
                (a for a in reversed(self.stage.attempts) if a.finished_at is None), None
            )
        attempt = self.attempt.name if self.attempt else ""
        self.runner = self._runner()
        self.job = next((job for job in s.jobs if self._is_job_of(job, attempt)), None)
        self.training = [pod for pod in s.pods if label(pod, ROLE) in TRAINING and job_uid_of(pod)]
        self.pods = self._pods_of(self.attempt) if self.attempt else []
        self.live = [pod for pod in s.pods if podread.is_live(pod)]

    def _runner(self) -> Runner:
        """The runner of the open attempt; without one, that of the next launch."""
        if self.attempt is not None:
            return runner_for(self.attempt.runner)
        kind: str = (self.s.chain["spec"].get("runner") or {}).get("kind") or ""
        return RUNNERS.get(kind) or runner_for(None)

    def _pods_of(self, attempt: AttemptStatus) -> list[Object]:
        """The attempt's pods, as the operator counts them: those that its own job has made."""
        trainers = (pod for pod in self.s.pods if label(pod, ROLE) in TRAINING)
        named = (pod for pod in trainers if attempt_of(pod) == attempt.name)
        return pods_made_by(attempt.uid, attempt, named)

    def _is_job_of(self, job: Object, attempt: str) -> bool:
        return objects.name(job) == attempt and job["kind"] == self.runner.kind

    # -- the questions, in the order in which they are asked ---------------------------------------

    def deleting(self) -> Explanation | None:
        if not is_deleting(self.s.chain):
            return None
        finalizers = ", ".join(self.meta.get("finalizers") or [])
        cause = "its jobs and pods are deleted with it; artifacts stay"
        if finalizers:
            cause = f"it still has the finalizers {finalizers}"
        if self.live:
            cause = f"its pods are still ending ({len(self.live)}); artifacts stay"
        then = self._kubectl("get pods", f"-l {CHAIN}={self.name}")
        return self._say(
            Code.DELETING,
            f"Chain {self.name} is being deleted",
            cause,
            then,
            map(self.clues.pod, self.live),
        )

    def unseen(self) -> Explanation | None:
        """The chain was created or edited, and no operator has written its status since."""
        if self.status.observed_generation >= self.meta.get("generation", 0):
            return None
        change = "changed" if self.status.stages else "created"
        state = f"Chain {self.name} was {change}, and no operator has looked at it since"
        operator = self.clues.operator()
        since = self.clues.changed()
        if operator is None or not operator.live:
            if since >= UNSEEN:
                return self._no_operator(state, operator)
            # No operator shows itself, but an operator without a Lease may come yet.
            cause = f"an operator that works will come to it; the change is {age(since)} old"
            return self._say(Code.NOT_SEEN_YET, state, cause, self._follow())
        if since < SOON:
            cause = f"an operator is at work and will come to it; the change is {age(since)} old"
            return self._say(Code.NOT_SEEN_YET, state, cause, self._follow(), [operator.line])
        cause = (
            f"an operator is alive, and has not made a pass over this chain for {age(since)}: it"
            " serves other namespaces, or its passes fail"
        )
        then = f"kubectl logs {shlex.quote(operator.pod)} -n {operator.namespace} --tail=50"
        return self._say(Code.NOT_SEEN, state, cause, then, [operator.line])

    def unmeasured(self) -> Explanation | None:
        """Every stage has finished, and metrics are missing."""
        found = first_unmeasured(self.status.stages)
        if found is None or not is_true(self.s.chain, "Complete"):
            return None
        stage, one = found
        count = sum(len(stage.unmeasured) for stage in self.status.stages)
        metrics = "one metric is" if count == 1 else f"{count} metrics are"
        jobs = [job for job in self.s.cpu_jobs if label(job, ROLE) == EVALUATE]
        pods = [pod for pod in self.s.pods if label(pod, ROLE) == EVALUATE]
        lines = [self.clues.measuring(job, pods) for job in jobs]
        lines += [*map(self.clues.pod, pods), *self.clues.warnings(*jobs, *pods)]
        return self._say(
            one.reason_code,
            f"Chain {self.name} is complete, and {metrics} missing",
            why_unmeasured(stage, one),
            one.next or self._follow(),
            [*lines, *map(self.clues.results, self.status.stages)],
        )

    def complete(self) -> Explanation | None:
        if not is_true(self.s.chain, "Complete"):
            return None
        total = self.status.total
        stages = self.status.stages
        gpus = f", {gpu_time(total.gpu_seconds)}" if total.gpu_seconds else ""
        spent = f"{human(total.macs)} MACs{gpus}" + (
            f", cost {shown(total.cost)}" if total.cost else ""
        )
        reached = ", ".join(
            f"{name} {value} %" for name, value in stages[-1].results.items() if "/" not in name
        )
        cause = f"stage {stages[-1].name} reached {reached}; the chain" if reached else "it"
        done = self.status.condition("Complete")
        since = age(self.clues.ago(done.last_transition_time) or 0.0) if done else "some time"
        finished = (
            f"all {len(stages)} stages have finished, the last"
            if len(stages) > 1
            else "its one stage finished"
        )
        state = f"Chain {self.name} is complete: {finished} {since} ago"
        then = self._kubectl("get sart", f"-l {CHAIN}={self.name}")
        return self._say(
            Code.COMPLETE, state, f"{cause} took {spent}", then, map(self.clues.results, stages)
        )

    def failed(self) -> Explanation | None:
        stage = self.stage
        if stage is None or stage.state is not State.FAILED or is_refused(self.s.chain):
            return None
        code = stage.code or Code.FAILED
        cause = stage.cause
        if self.s.chain["spec"].get("suspend"):
            cause += "; besides, the chain is suspended"
        state = f"{self.subject} has failed ({code}) and is not tried again by itself"
        then = stage.next or self._command(code)
        return self._say(code, state, cause, then, self.clues.failures(stage))

    def suspended(self) -> Explanation | None:
        """The chain is suspended. If it is stalled as well, that comes first: see `stalled`."""
        if not self.s.chain["spec"].get("suspend") or self.status.is_true("Stalled"):
            return None
        if stopping := [pod for pod in self.training if podread.is_live(pod)]:
            cause = "spec.suspend is true, and its pods write a checkpoint before they end"
            pods = map(self.clues.pod, stopping)
            return self._say(
                Code.STOPPING, f"{self.subject} is stopping", cause, self._follow(), pods
            )
        step = self.stage.checkpoint_step if self.stage else 0
        cause = (
            "spec.suspend is true; when that ends, it resumes from"
            f" {f'step {step}' if step else 'where it stopped'}"
        )
        lines = self.clues.conditions("Suspended")
        return self._say(
            Code.SUSPENDED,
            f"{self.subject} is suspended",
            cause,
            self._command(Code.SUSPENDED),
            lines,
        )

    def stalled(self) -> Explanation | None:
        """A person has to act.

        The stage has the reason. If the whole spec was refused, only the condition has it: what the
        stages say is older then.
        """
        stalled = self.status.condition("Stalled")
        if stalled is None or stalled.status != "True":
            return None
        code = stalled.reason
        cause = stalled.message
        then = ""
        if self.stage is not None and self.stage.stalled and not is_refused(self.s.chain):
            code = self.stage.reason_code or code
            cause = self.stage.cause
            then = self.stage.next  # empty in a status that an older version wrote
        then = then or self._command(known(code))
        lines = [*self.clues.conditions("Stalled"), *self.clues.warnings(self.job, *self.pods)]
        state = f"{self.subject} is stalled: a person has to act"
        return self._say(code, state, cause, then, lines)

    def refused(self) -> Explanation | None:
        """The API server refuses a write. It may pass; if it lasts, the stage is stalled."""
        if self.stage is None or self.stage.code not in REFUSALS:
            return None
        doing = "waits: the API server refuses a request, which is tried again"
        return self._as_the_status_says(self.stage.code, doing)

    def backing_off(self) -> Explanation | None:
        stage = self.stage
        if stage is None or stage.not_before is None or stage.state is not State.PENDING:
            return None
        failed = stage.attempts[-1]
        wait = stage.not_before - self.s.now
        when = f"in {age(wait)}" if wait > 0 else "now"
        state = f"{self.subject} is tried again {when}: its last attempt failed ({failed.failure})"
        pod = next(iter(self._pods_of(failed)), None)
        if stage.code is not None and stage.code.command == EDIT:
            then = self._command(stage.code)
        elif pod is not None:
            then = self._kubectl("logs", objects.name(pod))
        else:
            then = self._kubectl("describe mchain", self.name)
        return self._say(Code.BACK_OFF, state, failed.message, then, self.clues.failures(stage))

    def shared(self) -> Explanation | None:
        return self._as_the_status_says(Code.SHARED_STAGE, "waits for another chain")

    def left_behind(self) -> Explanation | None:
        return self._as_the_status_says(Code.ORPHANED_JOB, "waits for a job of a deleted chain")

    def loading(self) -> Explanation | None:
        return self._as_the_status_says(Code.DATA_LOADING, "waits for its data")

    def indexing(self) -> Explanation | None:
        if self.stage is None or self.stage.state is not State.INDEXING:
            return None
        pods = [pod for pod in self.live if label(pod, ROLE) == INDEX]
        waiting = [pod for pod in pods if podread.started_at(pod) is None]
        if waiting and (claim := self._claim_not_bound(waiting)):
            return claim
        lines = [*map(self.clues.pod, pods), *self.clues.warnings(*pods)]
        code = self.stage.code or Code.INDEXING
        return self._as_the_status_says(code, "waits until its data is indexed", lines)

    def ungated(self) -> Explanation | None:
        return self._as_the_status_says(Code.GATE_UNMEASURED, "has finished and is to be measured")

    def avoiding(self) -> Explanation | None:
        waiting = self._not_started()
        lines = [*map(self.clues.pod, waiting[:3]), *self.clues.warnings(*waiting)]
        return self._as_the_status_says(Code.NODES_AVOIDED, "waits for a node", lines)

    def unheard(self) -> Explanation | None:
        doing = "runs, and the operator cannot ask it how far it is"
        lines = list(map(self.clues.pod, self.pods[:4]))
        return self._as_the_status_says(Code.PROGRESS_UNKNOWN, doing, lines)

    def _as_the_status_says(
        self, code: Code, doing: str, lines: Sequence[Line] = ()
    ) -> Explanation | None:
        """What the operator wrote in the status, if the stage is in its state for this reason."""
        if self.stage is None or self.stage.code is not code:
            return None
        then = self.stage.next or self._command(code)
        return self._say(code, f"{self.subject} {doing}", self.stage.cause, then, lines)

    def queued(self) -> Explanation | None:
        """The job waits in a queue of Kueue."""
        job = self.runner.state(self.job) if self.job is not None else None
        if self.job is None or job is None or self.s.queue is None or job.queue is None:
            return None
        if self.live or not job.suspended:
            return None
        found = kueue.why_queued(
            self.s.queue,
            self.job,
            self.runner.framework,
            self.namespace,
            hidden="workloads" in self.s.unreadable,
        )
        lines = [Line(thing, message, self.clues.ago(when)) for thing, message, when in found.lines]
        state = f"{self.subject} waits in queue {self.s.queue.name}"
        return self._say(
            found.reason, state, found.cause, found.next, [*lines, *self.clues.warnings(self.job)]
        )

    def without_pods(self) -> Explanation | None:
        """The job may run and has no pods: they are refused, or its controller made none."""
        if self.job is None or self.pods or self.runner.state(self.job).suspended:
            return None
        state = f"{self.subject} was launched and has no pods"
        name = self.job["metadata"]["name"]
        if refused := self.clues.warnings(self.job):
            cause = refused[0].message
            describe = self.runner.describe(name, self.namespace)
            then = refusals.next_command(cause, self.namespace) or describe
            return self._say(Code.PODS_FORBIDDEN, state, cause, then, refused)
        kind = self.runner.kind.lower()
        controller = self.runner.controller
        line = self.clues.thing(kind, self.job, "is there, with no pods and no events")
        cause = f"{controller} has made none yet; if that lasts, {controller} does not run"
        return self._say(Code.NO_PODS, state, cause, self.runner.controller_pods, [line])

    def waiting(self) -> Explanation | None:
        """Pods do not start. Their claims are checked first, since pods say little about them."""
        if not (waiting := self._not_started()):
            return None
        if claim := self._claim_not_bound(waiting):
            return claim
        warned = self.clues.warnings(*waiting)
        # The operator's own reading of the pods, so that both say the same.
        gang = podread.Gang(self._nodes(), self.runner)
        reason, _ = podread.why_waiting(self.pods, gang)
        if reason is None or reason.code not in WAITS_FOR:
            reason = Reason(Code.STARTING, message="its pods have not started yet")
        cause = reason.message
        if reason.code is Code.STARTING and warned:
            cause = f"{warned[0].object} waits: {warned[0].message}"
        then = self._kubectl("describe pod", objects.name(waiting[0]))
        state = f"{self.subject} waits {WAITS_FOR[reason.code]}"
        lines = [*map(self.clues.pod, waiting[:3]), *warned]
        return self._say(reason.code, state, cause, then, lines)

    def _not_started(self) -> list[Object]:
        return [
            pod for pod in self.pods if podread.is_live(pod) and podread.started_at(pod) is None
        ]

    def _claim_not_bound(self, waiting: list[Object]) -> Explanation | None:
        """A claim is missing or not bound, and that is why the pods wait."""
        scheduler = " ".join(
            str((condition(pod, "PodScheduled") or {}).get("message")) for pod in waiting
        )
        for name, claim in self.s.claims.items():
            now = MISSING if claim is None else phase(claim)
            warned = self.clues.warnings(claim)
            # With a storage class that waits for the first pod, a claim is Pending while all is
            # well. So there must be a sign that the claim is the cause.
            suspect = warned or claim is None or "PersistentVolumeClaim" in scheduler
            if now == "Bound" or not suspect:
                continue
            lines = [Line(f"persistentvolumeclaim/{name}", f"is {now}"), *warned]
            lines += map(self.clues.pod, waiting[:2])
            then = self._kubectl("describe pvc", name) if claim else self._kubectl("get pvc")
            why = f": {warned[0].message}" if warned else ", and no event says why"
            code = OF_CLAIM.get(now, Code.CLAIM_PENDING)
            state = f"{self.subject} waits for a volume"
            return self._say(code, state, f"claim {name} is {now}{why}", then, lines)
        return None

    def verifying(self) -> Explanation | None:
        if self.stage is None or self.attempt is None or self.stage.state is not State.VERIFYING:
            return None
        state = f"{self.subject} has trained and is being verified"
        verify = f"{self.attempt.name}-verify"
        jobs = [job for job in self.s.cpu_jobs if objects.name(job) == verify]
        pods = [pod for pod in self.live if pod not in self.training]
        lines = [self.clues.thing("job", job, "re-hashes the artifact") for job in jobs]
        lines += map(self.clues.pod, pods)
        return self._say(Code.VERIFIES, state, self.stage.cause, self._follow(), lines)

    def running(self) -> Explanation | None:
        running = filter(podread.is_running, self.pods)
        rank_0 = next((pod for pod in running if self.runner.node_rank(pod) == 0), None)
        if rank_0 is None or self.stage is None or self.attempt is None:
            return None
        at = self.stage.progress
        stepped = self.attempt.stepped_at
        cause = "it has not taken its first step yet"
        if at is not None:
            cause = f"it is at step {at.step} of {at.steps} ({100 * at.step // at.steps}%)"
            if at.samples_per_second:  # 0 until the attempt has taken a step
                left = timedelta(seconds=round(at.eta_seconds))
                cause += f", {left} left at {at.samples_per_second:.0f} samples/s"
        if stepped is not None and self.s.now - stepped > SLOW:
            limit = (self.s.chain["spec"].get("deadlines") or {}).get("stallSeconds", 1800)
            cause = (
                f"it has taken no step for {age(self.s.now - stepped)}; after {limit} s it is ended"
                " and tried again"
            )
        ran = self.s.now - (podread.started_at(rank_0) or self.s.now)
        state = f"{self.subject} has run for {age(ran)}"
        then = self._kubectl("logs -f", objects.name(rank_0))
        return self._say(Code.RUNNING, state, cause, then, map(self.clues.pod, self.pods[:4]))

    def other(self) -> Explanation:
        """No question has an answer: the state between two decisions."""
        message = self.stage.cause if self.stage else ""
        cause = message or "the operator is about to act"
        lines = [*self.clues.conditions("Reconciling", "Ready"), *map(self.clues.pod, self.live)]
        state = f"{self.subject} is {self._state_word()}"
        return self._say(Code.IN_PROGRESS, state, cause, self._follow(), lines)

    def silence(self, found: Explanation) -> list[Line]:
        """A line on a Lease that no operator renews, unless the explanation is about that already.

        It is only a hint: an operator may work without a Lease.
        """
        operator = self.clues.operator()
        reported = found.reason in (Code.NO_OPERATOR, Code.NOT_SEEN_YET)
        if operator is None or operator.live or reported:
            return []
        message = f"{operator.line.message}; if no operator runs, nothing goes on"
        return [replace(operator.line, message=message)]

    # -- words and commands ------------------------------------------------------------------------

    def _say(
        self, code: str, state: str, cause: str, then: str, lines: Iterable[Line] = ()
    ) -> Explanation:
        unique = {(line.object, line.message): line for line in lines}
        return Explanation(code, _sentence(state), _sentence(cause), then, tuple(unique.values()))

    def _command(self, code: Code | None) -> str:
        """A code's next command, filled in for this chain."""
        return filled(command_of(code), self.name, self.namespace)

    def _no_operator(self, state: str, found: Operator | None) -> Explanation:
        then = f"kubectl get pods -n {found.namespace}" if found else "kubectl get deployments -A"
        return self._say(
            Code.NO_OPERATOR, state, no_operator(found), then, [found.line] if found else []
        )

    def _state_word(self) -> str:
        return str(self.stage.state).lower() if self.stage else "unfinished"

    def _follow(self) -> str:
        return filled(WATCH, self.name, self.namespace)

    def _kubectl(self, verb: str, what: str = "") -> str:
        return " ".join(part for part in ("kubectl", verb, what, "-n", self.namespace) if part)

    def _nodes(self) -> int:
        name = self.stage.name if self.stage else ""
        asked = (
            stage.get("resources") or {}
            for stage in self.s.chain["spec"]["stages"]
            if stage["name"] == name
        )
        return int(next(asked, {}).get("nodes", 1))


def _sentence(text: str) -> str:
    """The text as a sentence: with a full stop, and a capital unless it begins with a name."""
    line = one_line(text).rstrip(".")
    return f"{line[:1].upper()}{line[1:]}." if line.partition(" ")[0].isalpha() else f"{line}."
