"""What was read of one chain, and what a decision turned out to need besides: one read each, kept
for one look.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from modelchain.api.spec import ModelChain
from modelchain.api.status import ChainStatus
from modelchain_operator.api.kube import Object
from modelchain_operator.api.objects import annotation, label, name
from modelchain_operator.runners.registry import runner_for
from modelchain_operator.runners.template import ATTEMPT, CHAIN, INPUT_DIGEST, STAGE

RETRY = "modelchain.dev/retry"
TASK_VARIABLE = "MODELCHAIN_TASK"


What = Literal[
    "artifact",
    "claim",
    "lease",
    "rivals",
    "name",
    "verify",
    "refusal",
    "records",
    "shares",
    "loaders",
]


class Need(NamedTuple):
    """Something a decision turned out to depend on: one read, its answer kept for this look."""

    what: What
    which: str = ""


@dataclass
class Facts:
    """What was read of one chain. `jobs` are those of every kind, by name (see `by_name`); they and
    `pods` carry the chain's UID. `missing`: kinds of runner that are not installed.
    """

    chain: Object
    spec: ModelChain
    status: ChainStatus
    jobs: dict[str, Object]
    pods: list[Object]
    missing: set[str] = field(default_factory=set)
    fresh: bool = False  # read since the intent was written
    read: dict[Need, Any] = field(default_factory=dict)
    needs: set[Need] = field(default_factory=set)

    @property
    def uid(self) -> str:
        return str(self.chain["metadata"]["uid"])

    @property
    def namespace(self) -> str:
        return str(self.chain["metadata"]["namespace"])

    def want(self, what: What, which: str = "") -> Any:
        """The answer to a need; None, and noted as missing, if it was not read yet."""
        need = Need(what, which)
        if need not in self.read:
            self.needs.add(need)
            return None
        return self.read[need]


def by_name(jobs: Iterable[Object], status: ChainStatus) -> dict[str, Object]:
    """Jobs of all kinds by name. An attempt's name stands for the job of the attempt's own kind;
    a job of another kind that has the same name stands under `<kind>/<name>`.
    """
    kinds = {a.name: runner_for(a.runner).kind for s in status.stages for a in s.attempts}
    found = {}
    for job in jobs:
        job_name = name(job)
        own = kinds.get(job_name, job["kind"]) == job["kind"]
        found[job_name if own else f"{job['kind']}/{job_name}"] = job
    return found


class Inputs(Mapping[str, Mapping[str, Any]]):
    """By input digest, what earlier work was made from: in the task of a job that is left, or in a
    StageArtifact.
    """

    def __init__(self, facts: Facts):
        self.facts = facts

    def __getitem__(self, digest: str) -> Mapping[str, Any]:
        for job in self.facts.jobs.values():
            if annotation(job, INPUT_DIGEST) == digest:
                inputs: Mapping[str, Any] = task_of(job)["inputs"]
                return inputs
        record = self.facts.want("artifact", digest)
        if record is None:
            raise KeyError(digest)
        found: Mapping[str, Any] = record["spec"]["inputs"]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def task_of(job: Object) -> dict[str, Any]:
    """The task a job was made with. Dollars were doubled for Kubernetes."""
    value: str = _trainer(job)[1]
    return dict(json.loads(value.replace("$$", "$")))


def image_of(job: Object) -> str:
    """The image its trainers run."""
    return str(_trainer(job)[0]["image"])


def _trainer(job: Object) -> tuple[Object, str]:
    """The container that trains and the text of its task, wherever this kind of job keeps pod
    templates.
    """
    stack: list[Any] = [job["spec"]]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            for variable in value.get("env") or []:
                if variable["name"] == TASK_VARIABLE:
                    return value, variable["value"]
            stack += value.values()
        elif isinstance(value, list):
            stack += value
    raise KeyError(TASK_VARIABLE)


def attempt_of(thing: Object) -> str:
    """The name of the attempt that a pod or job was made for."""
    return f"{label(thing, CHAIN)}-{label(thing, STAGE)}-a{label(thing, ATTEMPT)}"
