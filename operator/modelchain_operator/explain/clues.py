"""The evidence that `explain` quotes: what objects and events say, each with its age. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from modelchain.api import messages
from modelchain.api.status import StageStatus
from modelchain.identity.digest import TRAINER_MATH
from modelchain.io.units import age
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import condition, is_deleting, seconds, true_condition, uid
from modelchain_operator.explain.read import Situation
from modelchain_operator.runners import cpu_job
from modelchain_operator.runners import pods as podread

# An operator counts as dead after so many seconds without a renewal of its Lease. That is four
# times the Lease's duration, since the user's clock may differ from the operator's.
DEAD_AFTER = 60.0


@dataclass(frozen=True)
class Line:
    """One piece of evidence: an object, what it says, and how old that is."""

    object: str
    message: str
    age_seconds: float | None = None


@dataclass(frozen=True)
class Operator:
    """What a Lease tells of an operator."""

    namespace: str
    # Seconds since the Lease was last renewed.
    silent: float
    # The pod that holds the Lease; empty if the Lease was given back.
    pod: str

    @property
    def live(self) -> bool:
        return bool(self.pod) and self.silent < DEAD_AFTER

    @property
    def line(self) -> Line:
        by = f"last renewed by {self.pod}" if self.pod else "given back"
        return Line(f"lease/modelchain-operator in {self.namespace}", by, self.silent)


class Clues:
    """What there is to quote in a situation."""

    def __init__(self, situation: Situation):
        self.s = situation

    def ago(self, timestamp: str | None) -> float | None:
        """Seconds since an RFC 3339 time."""
        when = seconds(timestamp)
        return None if when is None else max(0.0, self.s.now - when)

    def operator(self) -> Operator | None:
        """The operator whose Lease was renewed last; None if the user can read no Lease."""
        found = [self._operator(lease) for lease in self.s.leases]
        return min(found, key=lambda operator: operator.silent, default=None)

    def _operator(self, lease: Object) -> Operator:
        spec = lease.get("spec") or {}
        # The holder is "<host>_<random>". In a cluster, the host's name is the pod's.
        holder = str(spec.get("holderIdentity") or "")
        pod = holder.rpartition("_")[0] or holder
        silent = self.ago(spec.get("renewTime"))
        if silent is None:  # never renewed
            silent = self.s.now
        return Operator(lease["metadata"]["namespace"], silent, pod)

    def changed(self) -> float:
        """Seconds since the spec was last edited, or the chain created.

        `managedFields` has the time of each writer's last change; those of the status do not count.
        """
        meta = self.s.chain["metadata"]
        edits = [
            e["time"]
            for e in meta.get("managedFields") or []
            if e.get("time") and not e.get("subresource")
        ]
        return self.ago(max([meta["creationTimestamp"], *edits])) or 0.0

    def conditions(self, *kinds: str) -> list[Line]:
        """The chain's conditions of these types, as far as it has them."""
        status, what = self.s.status, f"modelchain/{self.s.chain['metadata']['name']}"
        found = [c for kind in kinds if (c := status.condition(kind)) is not None]
        return [
            Line(what, f"{c.type} is {c.status} ({c.reason})", self.ago(c.last_transition_time))
            for c in found
        ]

    def failures(self, stage: StageStatus) -> list[Line]:
        """The last failed attempts of a stage, at most four, the newest first."""
        ended = [a for a in reversed(stage.attempts) if a.failure is not None]
        return [
            Line(f"attempt {a.name}", f"{a.failure}: {a.message}", self.ago(a.finished_at))
            for a in ended[:4]
        ]

    def results(self, stage: StageStatus) -> Line:
        """What a finished stage has reached and spent."""
        parts = [f"{name} {value} %" for name, value in stage.results.items() if "/" not in name]
        parts += [gpu_time(stage.gpu_seconds)] if stage.gpu_seconds else []
        parts += [f"cost {stage.cost}"] if stage.cost else []
        ended = next((a.finished_at for a in reversed(stage.attempts) if a.finished_at), None)
        return Line(f"stage {stage.name}", ", ".join(parts) or str(stage.state), self.ago(ended))

    def other_math(self, stage: StageStatus) -> Line | None:
        """Says so if a finished stage was trained with other arithmetic than this version's."""
        number = stage.artifact.trainer_math if stage.artifact else None
        if number in (None, TRAINER_MATH):
            return None
        text = (
            f"was trained by trainer math {number}, this version's is {TRAINER_MATH}; set its rerun"
            " to train it again"
        )
        return Line(f"stage {stage.name}", text)

    def warnings(self, *things: Object | None) -> list[Line]:
        """The last Warning events of these objects, the newest first."""
        uids = {uid(thing) for thing in things if thing is not None}
        warned = [
            e
            for e in self.s.events
            if e.get("type") == "Warning" and e["involvedObject"].get("uid") in uids
        ]
        lines = [Line(_of(e), one_line(e.get("message")), self.ago(_when(e))) for e in warned]
        return sorted(lines, key=lambda line: line.age_seconds or 0.0)[:3]

    def pod(self, pod: Object) -> Line:
        """What a pod does, or what it waits for."""
        scheduled = condition(pod, "PodScheduled") or {}
        waiting = podread.state(pod, "waiting") or {}
        if is_deleting(pod):
            text = "is ending"
        elif podread.is_running(pod):
            text = f"runs on {pod['spec'].get('nodeName')}"
        elif scheduled.get("status") == "False":
            text = f"{scheduled.get('reason')}: {scheduled.get('message')}"
        else:
            text = ": ".join(str(waiting[key]) for key in ("reason", "message") if waiting.get(key))
        return self.thing("pod", pod, text or f"is {phase(pod)}")

    def measuring(self, job: Object, pods: Iterable[Object]) -> Line:
        """What an evaluation Job does, or how it has ended."""
        failed = true_condition(job, "Failed") or true_condition(job, "FailureTarget")
        if failed is not None:
            return self.thing("job", job, f"has failed: {failed.get('reason')}")
        mine = [pod for pod in pods if cpu_job.made(job, pod)]
        if any(map(podread.is_running, mine)):
            return self.thing("job", job, "measures on the finished artifact")
        done = any(phase(pod) == "Succeeded" for pod in mine)
        return self.thing("job", job, "has measured" if done else "is to measure")

    def thing(self, kind: str, thing: Object, text: str) -> Line:
        """A line about an object, with the object's own age."""
        meta = thing["metadata"]
        return Line(
            f"{kind}/{meta['name']}", one_line(text), self.ago(meta.get("creationTimestamp"))
        )


def no_operator(found: Operator | None) -> str:
    """The sentence for an operator that is not live."""
    if found is None:
        return "no operator seems to run: there is no Lease modelchain-operator that you may read"
    given_back = f"was last renewed by {found.pod}" if found.pod else "was given back"
    return (
        f"no operator is running: its Lease in namespace {found.namespace} {given_back}"
        f" {age(found.silent)} ago"
    )


def gpu_time(seconds: float) -> str:
    """GPU time in hours, or in seconds if it is less than a tenth of an hour."""
    return f"{seconds / 3600:.1f} GPU hours" if seconds >= 360 else f"{seconds:.0f} GPU seconds"


def phase(thing: Object) -> str:
    """The phase of a pod or claim. A claim without a status counts as bound."""
    return str((thing.get("status") or {}).get("phase", "Bound"))


def one_line(text: Any) -> str:
    line = messages.one_line(str(text or ""))
    # Where a claim is missing, the scheduler writes "not found" twice.
    return line.replace("not found. not found", "not found")


def _of(event: Object) -> str:
    involved = event["involvedObject"]
    return one_line(f"{str(involved.get('kind', '')).lower()}/{involved.get('name')}")


def _when(event: Object) -> str:
    return str(
        event.get("lastTimestamp")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp")
    )
