"""Why a chain is not running, or what it does: the state in a sentence, the cause in a sentence,
what to type next.

Pure. The questions below are asked in turn; the first that has an answer gives it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from modelchain.api.contracts import FailureClass
from modelchain.api.status import AttemptStatus, State
from modelchain.decide.conditions import constant
from modelchain.io.units import age, human
from modelchain_operator.api import objects
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import condition, is_deleting, is_true, label
from modelchain_operator.cli.listing import without_commands
from modelchain_operator.explain import next_steps as waits
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
from modelchain_operator.runners.port import Runner
from modelchain_operator.runners.registry import RUNNERS, runner_for
from modelchain_operator.runners.template import CHAIN, ROLE, attempt_of

SOON = 60.0  # seconds in which an operator that works has looked at a change
UNSEEN = 30.0  # seconds after which a change that nobody looked at shows that no operator works
SLOW = 600.0  # seconds without a step that are worth saying
MOST_LINES = 8
MEND_THE_SPEC = (FailureClass.USER_ERROR, FailureClass.IMAGE, FailureClass.STAGE_DEADLINE)


@dataclass(frozen=True)
class Explanation:
    """`reason` is a constant for scripts; `state` and `cause` are a sentence each, `next` a
    command.
    """

    reason: str
    state: str
    cause: str
    next: str
    evidence: tuple[Line, ...] = ()


def explain(situation: Situation) -> Explanation:
    """The first answer there is."""
    case = _Case(situation)
    questions = (
        case.deleting,
        case.unseen,
        case.complete,
        case.failed,
        case.suspended,
        case.stalled,
        case.backing_off,
        case.shared,
        case.loading,
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
    if found.reason == "Complete":
        return replace(found, evidence=(*found.evidence, *other_math))
    hidden = [
        Line(kind, "you may not read these, so this may not be all")
        for kind in situation.unreadable
    ]
    return replace(
        found, evidence=(*found.evidence[:MOST_LINES], *other_math, *case.silence(found), *hidden)
    )


def document(situation: Situation, found: Explanation) -> dict[str, Any]:
    """As JSON."""
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
        self.s, self.clues, self.meta, self.status = s, Clues(s), s.chain["metadata"], s.status
        self.name, self.namespace = self.meta["name"], self.meta["namespace"]
        stages = self.status.stages
        self.stage = next((stage for stage in stages if stage.state is not State.SUCCEEDED), None)
        self.subject = f"Chain {self.name}"
        self.attempt: AttemptStatus | None = None
        if self.stage is not None:
            number = stages.index(self.stage) + 1
            self.subject = (
                f"Stage {self.stage.name} ({number} of {len(stages)}) of chain {self.name}"
            )
            self.attempt = next(
                (a for a in reversed(self.stage.attempts) if a.finished_at is None), None
            )
        attempt = self.attempt.name if self.attempt else ""
        self.runner = self._runner()
        self.job = next((job for job in s.jobs if self._is_job_of(job, attempt)), None)
        self.training = [pod for pod in s.pods if label(pod, ROLE) == "train"]
        self.pods = [pod for pod in self.training if attempt_of(pod) == attempt]
        self.live = [pod for pod in s.pods if podread.is_live(pod)]

    def _runner(self) -> Runner:
        """The attempt's; else the one of the next launch, if the chain names one."""
        if self.attempt is not None:
            return runner_for(self.attempt.runner)
        kind: str = (self.s.chain["spec"].get("runner") or {}).get("kind") or ""
        return RUNNERS.get(kind) or runner_for(None)

    def _is_job_of(self, job: Object, attempt: str) -> bool:
        return objects.name(job) == attempt and job["kind"] == self.runner.kind

    # The questions, in the order in which they are asked.

    def deleting(self) -> Explanation | None:
        if not is_deleting(self.s.chain):
            return None
        held = ", ".join(self.meta.get("finalizers") or [])
        cause = f"it is held by {held}" if held else "what it made goes with it; artifacts stay"
        if self.live:
            cause = f"its pods are still ending ({len(self.live)}); artifacts stay"
        then = self._kubectl("get pods", f"-l {CHAIN}={self.name}")
        return self._say(
            "Deleting",
            f"Chain {self.name} is being deleted",
            cause,
            then,
            map(self.clues.pod, self.live),
        )

    def unseen(self) -> Explanation | None:
        """The status is not of the spec as it is now."""
        if self.status.observed_generation >= self.meta.get("generation", 0):
            return None
        change = "changed" if self.status.stages else "created"
        state = f"Chain {self.name} was {change}, and no operator has looked at it since"
        operator, since = self.clues.operator(), self.clues.changed()
        if operator is None or not operator.live:
            if since >= UNSEEN:
                return self._no_operator(state, operator)
            cause = f"an operator that works will come to it; the change is {age(since)} old"
            return self._say("NotSeenYet", state, cause, self._follow())
        if since < SOON:
            cause = f"an operator is at work and will come to it; the change is {age(since)} old"
            return self._say("NotSeenYet", state, cause, self._follow(), [operator.line])
        cause = (
            f"an operator is alive, and has not looked for {age(since)}: it serves other"
            " namespaces, or failed at it"
        )
        then = f"kubectl logs {shlex.quote(operator.pod)} -n {operator.namespace} --tail=50"
        return self._say("NotSeen", state, cause, then, [operator.line])

    def complete(self) -> Explanation | None:
        if not is_true(self.s.chain, "Complete"):
            return None
        total, stages = self.status.total, self.status.stages
        gpus = f", {gpu_time(total.gpu_seconds)}" if total.gpu_seconds else ""
        spent = f"{human(total.macs)} MACs{gpus}" + (f", cost {total.cost}" if total.cost else "")
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
            "Complete", state, f"{cause} took {spent}", then, map(self.clues.results, stages)
        )

    def failed(self) -> Explanation | None:
        stage = self.stage
        if stage is None or stage.state is not State.FAILED:
            return None
        failure, _, cause = stage.reason.partition(": ")
        if self.s.chain["spec"].get("suspend"):
            cause += "; besides, the chain is suspended"
        then = self._edit() if failure in MEND_THE_SPEC else f"modelchain retry {self._here()}"
        state = f"{self.subject} has failed ({failure}) and is not tried again by itself"
        return self._say(failure, state, cause, then, self.clues.failures(stage))

    def suspended(self) -> Explanation | None:
        if not self.s.chain["spec"].get("suspend") or self.status.is_true("Stalled"):
            return None
        if stopping := [pod for pod in self.training if podread.is_live(pod)]:
            cause = "spec.suspend is true, and its pods write a checkpoint before they end"
            pods = map(self.clues.pod, stopping)
            return self._say("Stopping", f"{self.subject} is stopping", cause, self._follow(), pods)
        step = self.stage.checkpoint_step if self.stage else 0
        cause = (
            "spec.suspend is true; resumed, it goes on from"
            f" {f'step {step}' if step else 'where it stopped'}"
        )
        lines = self.clues.conditions("Suspended")
        return self._say(
            "Suspended",
            f"{self.subject} is suspended",
            cause,
            f"modelchain resume {self._here()}",
            lines,
        )

    def stalled(self) -> Explanation | None:
        stalled = self.status.condition("Stalled")
        if stalled is None or stalled.status != "True":
            return None
        text = self.stage.reason if self.stage and self.stage.stalled else stalled.message
        reason = constant(text) or stalled.reason
        cause = text.removeprefix(f"{reason}: ")
        lines = [*self.clues.conditions("Stalled"), *self.clues.warnings(self.job, *self.pods)]
        attempt = self.attempt.name if self.attempt else ""
        then = waits.after_stall(reason, cause, self.name, self.namespace, attempt, self.runner)
        return self._say(
            reason, f"{self.subject} is stalled: somebody has to act", cause, then, lines
        )

    def backing_off(self) -> Explanation | None:
        stage = self.stage
        if stage is None or stage.not_before is None or stage.state is not State.PENDING:
            return None
        failure, _, cause = stage.reason.partition(": ")
        wait = stage.not_before - self.s.now
        when = f"in {age(wait)}" if wait > 0 else "now"
        state = f"{self.subject} is tried again {when}: its last attempt failed ({failure})"
        last = next(
            (pod for pod in self.training if attempt_of(pod) == stage.attempts[-1].name), None
        )
        then = (
            self._kubectl("logs", objects.name(last))
            if last
            else self._kubectl("describe mchain", self.name)
        )
        if failure in MEND_THE_SPEC:
            then = self._edit()
        return self._say(
            "BackOff", state, cause.removesuffix("; tries again"), then, self.clues.failures(stage)
        )

    def shared(self) -> Explanation | None:
        if self.stage is None or constant(self.stage.reason) != "SharedStage":
            return None
        cause = self.stage.reason.removeprefix("SharedStage: ")
        then = f"modelchain explain {cause.removeprefix('chain ').split()[0]} -n {self.namespace}"
        return self._say("SharedStage", f"{self.subject} waits for another chain", cause, then)

    def loading(self) -> Explanation | None:
        if self.stage is None or constant(self.stage.reason) != "DataLoading":
            return None
        cause = self.stage.reason.removeprefix("DataLoading: ")
        then = self._kubectl("logs -f", f"job/{cause.removeprefix('job ').split()[0]}")
        return self._say("DataLoading", f"{self.subject} waits for its data", cause, then)

    def queued(self) -> Explanation | None:
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
        if self.job is None or self.pods or self.runner.state(self.job).suspended:
            return None
        state, name = f"{self.subject} was launched and has no pods", self.job["metadata"]["name"]
        if refused := self.clues.warnings(self.job):
            cause = refused[0].message
            describe = self.runner.describe(name, self.namespace)
            then = waits.after_refusal(cause, self.namespace) or describe
            return self._say("PodsForbidden", state, cause, then, refused)
        kind, controller = self.runner.kind.lower(), self.runner.controller
        line = self.clues.thing(kind, self.job, "is there, with no pods and no events")
        cause = f"{controller} has made none yet; if that lasts, {controller} does not run"
        return self._say("NoPods", state, cause, self.runner.controller_pods, [line])

    def waiting(self) -> Explanation | None:
        """Pods that do not start: their claims first, of which a pod says little."""
        if not (held := self._not_started()):
            return None
        if claim := self._claim_that_holds(held):
            return claim
        warned = self.clues.warnings(*held)
        cause = (
            waits.of_pods(self.pods, self.job, self._nodes(), self.runner)
            or "its pods have not started yet"
        )
        reason, what = waits.kind_of(cause)
        if reason == "Starting" and warned:
            cause = f"{warned[0].object} waits: {warned[0].message}"
        then = self._kubectl("describe pod", objects.name(held[0]))
        return self._say(
            reason,
            f"{self.subject} waits {what}",
            cause,
            then,
            [*map(self.clues.pod, held[:3]), *warned],
        )

    def avoiding(self) -> Explanation | None:
        if self.stage is None or constant(self.stage.reason) != "NodesAvoided":
            return None
        held, cause = self._not_started(), self.stage.reason.removeprefix("NodesAvoided: ")
        lines = [*map(self.clues.pod, held[:3]), *self.clues.warnings(*held)]
        then = f"modelchain retry {self._here()}"
        return self._say("NodesAvoided", f"{self.subject} waits for a node", cause, then, lines)

    def _not_started(self) -> list[Object]:
        return [
            pod for pod in self.pods if podread.is_live(pod) and podread.started_at(pod) is None
        ]

    def unheard(self) -> Explanation | None:
        if self.stage is None or constant(self.stage.reason) != "ProgressUnknown":
            return None
        cause = self.stage.reason.removeprefix("ProgressUnknown: ")
        then = self._kubectl("get networkpolicies")
        state = f"{self.subject} runs, and the operator cannot ask it how far it is"
        return self._say("ProgressUnknown", state, cause, then, map(self.clues.pod, self.pods[:4]))

    def _claim_that_holds(self, held: list[Object]) -> Explanation | None:
        said = " ".join(str((condition(pod, "PodScheduled") or {}).get("message")) for pod in held)
        for name, claim in self.s.claims.items():
            now = "missing" if claim is None else phase(claim)
            warned = self.clues.warnings(claim)
            # one that waits for its first pod is Pending, too, and no cause
            if now == "Bound" or not (warned or claim is None or "PersistentVolumeClaim" in said):
                continue
            lines = [
                Line(f"persistentvolumeclaim/{name}", f"is {now}"),
                *warned,
                *map(self.clues.pod, held[:2]),
            ]
            then = self._kubectl("describe pvc", name) if claim else self._kubectl("get pvc")
            why = f": {warned[0].message}" if warned else ", and no event says why"
            return self._say(
                f"Claim{now.title()}",
                f"{self.subject} waits for a volume",
                f"claim {name} is {now}{why}",
                then,
                lines,
            )
        return None

    def verifying(self) -> Explanation | None:
        if self.stage is None or self.attempt is None or self.stage.state is not State.VERIFYING:
            return None
        state = f"{self.subject} has trained and is being verified"
        jobs = [
            job
            for job in self.s.verifies
            if job["metadata"]["name"] == f"{self.attempt.name}-verify"
        ]
        pods = [pod for pod in self.live if pod not in self.training]
        lines = [
            *(self.clues.thing("job", job, "re-hashes the artifact") for job in jobs),
            *map(self.clues.pod, pods),
        ]
        return self._say("Verifying", state, self.stage.reason, self._follow(), lines)

    def running(self) -> Explanation | None:
        first = next(
            (
                pod
                for pod in self.pods
                if podread.is_running(pod) and self.runner.node_rank(pod) == 0
            ),
            None,
        )
        if first is None or self.stage is None or self.attempt is None:
            return None
        at, stepped = self.stage.progress, self.attempt.stepped_at
        cause = "it has not taken its first step yet"
        if at is not None:
            cause = f"it is at step {at.step} of {at.steps} ({100 * at.step // at.steps}%)"
            if at.samples_per_second:  # not before it has taken a step
                left = timedelta(seconds=round(at.eta_seconds))
                cause += f", {left} left at {at.samples_per_second:.0f} samples/s"
        if stepped is not None and self.s.now - stepped > SLOW:
            limit = (self.s.chain["spec"].get("deadlines") or {}).get("stallSeconds", 1800)
            cause = (
                f"it has taken no step for {age(self.s.now - stepped)}; after {limit} s it is ended"
                " and tried again"
            )
        state = (
            f"{self.subject} has run for"
            f" {age(self.s.now - (podread.started_at(first) or self.s.now))}"
        )
        then = self._kubectl("logs -f", objects.name(first))
        return self._say("Running", state, cause, then, map(self.clues.pod, self.pods[:4]))

    def other(self) -> Explanation:
        cause = (
            self.stage.reason
            if self.stage and self.stage.reason
            else "the operator is about to act"
        )
        lines = [*self.clues.conditions("Reconciling", "Ready"), *map(self.clues.pod, self.live)]
        return self._say(
            "InProgress", f"{self.subject} is {self._word()}", cause, self._follow(), lines
        )

    def silence(self, found: Explanation) -> list[Line]:
        """A Lease that no operator renews, unless that is said. It proves nothing: an operator may
        work without one.
        """
        operator = self.clues.operator()
        if operator is None or operator.live or found.reason in ("NoOperator", "NotSeenYet"):
            return []
        return [
            replace(
                operator.line,
                message=f"{operator.line.message}; if no operator runs, nothing goes on",
            )
        ]

    # Words.

    def _say(
        self, reason: str, state: str, cause: str, then: str, lines: Iterable[Line] = ()
    ) -> Explanation:
        unique = {(line.object, line.message): line for line in lines}
        return Explanation(
            reason,
            _sentence(state),
            _sentence(without_commands(cause)),
            then,
            tuple(unique.values()),
        )

    def _no_operator(self, state: str, found: Operator | None) -> Explanation:
        then = f"kubectl get pods -n {found.namespace}" if found else "kubectl get deployments -A"
        return self._say(
            "NoOperator", state, no_operator(found), then, [found.line] if found else []
        )

    def _word(self) -> str:
        return str(self.stage.state).lower() if self.stage else "unfinished"

    def _here(self) -> str:
        return f"{self.name} -n {self.namespace}"

    def _follow(self) -> str:
        return f"modelchain get {self._here()} --watch"

    def _kubectl(self, verb: str, what: str = "") -> str:
        return " ".join(part for part in ("kubectl", verb, what, "-n", self.namespace) if part)

    def _edit(self) -> str:
        return self._kubectl("edit mchain", self.name)

    def _nodes(self) -> int:
        name = self.stage.name if self.stage else ""
        asked = (
            stage.get("resources") or {}
            for stage in self.s.chain["spec"]["stages"]
            if stage["name"] == name
        )
        return int(next(asked, {}).get("nodes", 1))


def _sentence(text: str) -> str:
    """With a full stop, and a capital where it does not begin with a name."""
    line = one_line(text).rstrip(".")
    return f"{line[:1].upper()}{line[1:]}." if line.partition(" ")[0].isalpha() else f"{line}."
