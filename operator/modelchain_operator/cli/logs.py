"""`modelchain logs`: what the trainers of a chain have printed, as it is now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from modelchain.api.artifact import claim_of
from modelchain.api.contracts import METRICS
from modelchain.api.messages import one_line
from modelchain.api.status import AttemptStatus, ChainStatus, StageLedger
from modelchain.decide.conditions import current, sentence
from modelchain.errors import InputError, WorkError
from modelchain.io.load import status_of
from modelchain_operator.api.kube import PODS, ApiError, Kube, Object, Unavailable
from modelchain_operator.api.objects import name, uid
from modelchain_operator.cli.followed import of_chain, selector
from modelchain_operator.cli.tree import pod_state
from modelchain_operator.runners.pods import has_ended, main_container, state
from modelchain_operator.runners.registry import pods_made_by, runner_for

Say = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """Whose logs are asked for."""

    # None: of the stage that the chain is at.
    stage: str | None = None
    # The number of an attempt; None: the newest one.
    attempt: int | None = None
    # The pods of all nodes, and not only that of rank 0.
    all_ranks: bool = False


@dataclass(frozen=True)
class Source:
    """The log of one pod."""

    attempt: AttemptStatus
    pod: Object
    # The pod's number in its attempt: the first rank of the training runs in pod 0.
    number: int

    @property
    def has_started(self) -> bool:
        """Whether there is a log: the main container runs or has run."""
        return state(self.pod, "running") is not None or has_ended(self.pod)


def chosen(status: ChainStatus, choice: Choice) -> AttemptStatus | None:
    """The attempt that was asked for; None if there is none yet, or if it is no longer known."""
    attempts = _attempts(status, choice.stage)
    if choice.attempt is not None:
        numbered = [one for one in attempts if one.number == choice.attempt]
        return numbered[0] if numbered else None
    going = [one for one in attempts if one.finished_at is None]
    return next(iter([*going, *reversed(attempts)]), None)


def _attempts(status: ChainStatus, stage: str | None) -> list[AttemptStatus]:
    """The attempts of a stage and of its baseline, the oldest first; without a name, of the stage
    that the chain is at.
    """
    if stage is None:
        going = [one for one, attempt in status.attempts.values() if not attempt.finished_at]
        at = going[0] if going else current(status.stages)
        begun = [one for one in status.stages if one.attempts]
        stage = at.name if at is not None else begun[-1].name if begun else ""
    rows: Sequence[StageLedger] = [*status.removed, *status.baselines, *status.stages]
    return [attempt for row in rows if row.name == stage for attempt in row.attempts]


def check(chain: Object, status: ChainStatus, choice: Choice) -> None:
    """Raises InputError if the chain has no such stage, or the stage no such attempt."""
    stages = [stage["name"] for stage in chain["spec"]["stages"]]
    removed = [row.name for row in status.removed if row.name]
    if choice.stage is not None and choice.stage not in [*stages, *removed]:
        raise InputError(
            f"{name(chain)} has no stage {choice.stage}; its stages are {', '.join(stages)}"
        )
    numbers = [str(one.number) for one in _attempts(status, choice.stage)]
    if choice.attempt is not None and str(choice.attempt) not in numbers:
        has = f"it has {', '.join(numbers)}" if numbers else "it has none yet"
        raise InputError(f"the status knows no attempt {choice.attempt} of that stage; {has}")


def sources(attempt: AttemptStatus, pods: Sequence[Object], choice: Choice) -> list[Source]:
    """The logs of an attempt that there are, by rank."""
    runner = runner_for(attempt.runner)
    made = pods_made_by(attempt.uid, attempt, pods)
    found = [Source(attempt, pod, runner.node_rank(pod) or 0) for pod in made]
    ranked = sorted(found, key=lambda one: one.number)
    return [one for one in ranked if choice.all_ranks or one.number == 0]


def prefix(chain: str, source: Source) -> str:
    """What stands before each line of several logs: the stage's attempt and the pod's number."""
    return f"[{source.attempt.name.removeprefix(f'{chain}-')}/{source.number}] "


def gone(chain: Object, attempt: AttemptStatus) -> Iterator[str]:
    """What there is to say of an attempt whose pods are gone: its last word, and where its records
    lie.
    """
    word = str(attempt.failure or attempt.state)
    word += f": {attempt.message}" if attempt.message else ""
    yield f"the pods of {attempt.name} are gone; its last word: {word}"
    directory = f"{attempt.input_digest}/{uid(chain)[:8]}-a{attempt.number}"
    yield f"its records are on claim {claim_of(chain)}, in {directory}: {METRICS}"


def not_yet(chain: Object, status: ChainStatus, choice: Choice) -> str:
    """Why there is no attempt whose logs could be shown."""
    stage = next((s for s in status.stages if s.name == choice.stage), current(status.stages))
    because = f": {sentence(stage)}" if stage and stage.reason else ""
    return f"{name(chain)} has no attempt to show yet{because}"


async def print_logs(
    kube: Kube, namespace: str, chain: Object, choice: Choice, tail: int | None, say: Say
) -> None:
    """Print the logs that there are now.

    Args:
        tail: the most lines of each pod, its last ones; None for all.

    Raises:
        InputError: there is no such stage or attempt.
        WorkError: nothing has started yet, or a node did not answer.
    """
    status = status_of(chain)
    check(chain, status, choice)
    attempt = chosen(status, choice)
    if attempt is None:
        raise WorkError(not_yet(chain, status, choice))
    pods = of_chain(chain, await kube.list(PODS, namespace, selector(name(chain))))
    found = sources(attempt, pods, choice)
    if not found:
        if attempt.finished_at is None:
            raise WorkError(not_yet(chain, status, choice))
        for line in gone(chain, attempt):
            say(line)
    begun = [source for source in found if source.has_started]
    if found and not begun:
        raise WorkError(_not_started(found[0], namespace))
    for source in begun:
        before = prefix(name(chain), source) if choice.all_ranks else ""
        try:
            async for line in kube.log(*address(namespace, source), query(tail=tail)):
                say(before + line.partition(" ")[2])
        except Unavailable as error:
            if by_node(error):
                raise WorkError(node_away(source, error)) from error
            raise


def _not_started(source: Source, namespace: str) -> str:
    pod = name(source.pod)
    return (
        f"{pod} has not started: {pod_state(source.pod)}; next: kubectl describe pod {pod} -n"
        f" {namespace}"
    )


def by_node(error: ApiError) -> bool:
    """Whether the API server answered, and the node that has the log did not answer it.

    The server says so only in its sentence, by the address that it asked on the node.
    """
    return error.code >= 500 and "/containerLogs/" in str(error)


def node_away(source: Source, error: ApiError) -> str:
    """What there is to say of a node that did not answer, in one line."""
    node = source.pod["spec"].get("nodeName", "unknown")
    return (
        f"node {node} did not answer the API server, so the log of pod {name(source.pod)} cannot be"
        f" read; next: kubectl describe node {node} ({one_line(str(error))})"
    )


def address(namespace: str, source: Source) -> tuple[str, str, str]:
    """The namespace, the pod and its main container."""
    return namespace, name(source.pod), str(main_container(source.pod)["name"])


def query(*, follow: bool = False, tail: int | None = None, since: str = "") -> dict[str, str]:
    return {
        "follow": "true" if follow else "",
        "tailLines": "" if tail is None else str(tail),
        "sinceTime": since,
    }
