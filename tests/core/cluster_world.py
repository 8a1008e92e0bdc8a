"""What surrounds the operators of `cluster_simulation`: other controllers, nodes, users and
faults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cluster_api import ApiServer
from cluster_objects import NAMESPACE, Chain, Pod, Thing, Verifier, shown
from cluster_operator import Kept, one_of_a_kind
from simulation import weights_of
from specs import DELETE

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.status import ChainStatus
from modelchain_operator.runners.pytorchjob import REPLICA_INDEX, REPLICA_TYPE
from modelchain_operator.runners.template import CHAIN, task_of


@dataclass
class World(ApiServer):
    """The objects, and everything that changes them except the operators."""

    # What happens by itself.

    def natural(self) -> Iterator[tuple[str, Callable[[World], object]]]:
        """Everything that other controllers, nodes and trainers may do next."""
        for job in self.jobs.values():
            mine = [p for p in self.pods.values() if p.job == job.uid]
            if self._owner(job.owner) is None:
                yield f"{job.uid} is collected", lambda w, u=job.uid: w.jobs.pop(u)
            elif job.deleting or (job.suspended and mine):
                for pod in mine:
                    yield f"{pod.uid} is ended", lambda w, u=pod.uid: w.end_gracefully(u)
                if not mine:
                    yield f"{job.uid} goes", lambda w, u=job.uid: w.jobs.pop(u)
            elif job.finished:
                continue
            elif job.suspended:
                if job.ran:
                    yield f"{job.uid} is reset", lambda w, u=job.uid: w.set_job(u, ran=False)
                elif job.queued:
                    yield (
                        f"{job.uid} is admitted",
                        lambda w, u=job.uid: w.set_job(u, suspended=False),
                    )
            elif not mine:
                if job.ran:
                    yield f"{job.uid} fails", lambda w, u=job.uid: w.set_job(u, finished="Failed")
                else:
                    yield f"{job.uid} gets a pod", lambda w, u=job.uid: w.make_pod(u)
            else:
                pod = mine[0]
                chain = self._owner(job.owner)
                if pod.phase == "Pending" and not self._claim(chain):
                    yield "a claim is made again", lambda w, c=chain: w.make_claim(c)
                elif pod.phase == "Pending":
                    yield f"{pod.uid} runs", lambda w, u=pod.uid, c=chain: w.run_pod(u, w._claim(c))
                elif pod.trainer:
                    continue  # its sidecar runs until the job is deleted
                elif pod.phase == "Running":
                    yield f"{pod.uid} succeeds", lambda w, u=pod.uid: w.succeed(u)
                else:
                    yield (
                        f"{job.uid} {pod.phase}",
                        lambda w, u=job.uid, p=pod.phase: w.set_job(u, finished=p),
                    )
        for pod in self.pods.values():
            if pod.trains and pod.job not in self.jobs:
                yield (
                    f"{pod.uid} is ended, its job is gone",
                    lambda w, u=pod.uid: w.end_gracefully(u),
                )
        for verifier in self.verifiers.values():
            if verifier.deleting or self._owner(verifier.owner) is None:
                yield f"{verifier.uid} goes", lambda w, u=verifier.uid: w.drop_verifier(u)
            elif verifier.indexes and not verifier.finished:
                yield from self._indexing(verifier)
            elif not verifier.finished:
                yield f"{verifier.uid} answers", lambda w, u=verifier.uid: w.verify(u)
        for lease in self.leases.values():
            if self._owner(lease.owner) is None:
                yield f"{lease.uid} is collected", lambda w, u=lease.uid: w.leases.pop(u)

    def _indexing(self, job: Verifier) -> Iterator[tuple[str, Callable[[World], object]]]:
        """An index Job gets a pod, which runs at once, and ends well."""
        if any(pod.job == job.uid for pod in self.pods.values()):
            yield f"{job.uid} has indexed", lambda w, u=job.uid: w.end_index(u)
        else:
            yield f"{job.uid} gets a pod", lambda w, u=job.uid: w.run_index(u)

    def run_index(self, uid: str) -> None:
        job = self.verifiers[uid]
        labels = tuple(sorted(job.body["spec"]["template"]["metadata"]["labels"].items()))
        pod = Pod(f"{uid}-0", uid, "", labels, self.now, "Running", started=self.now, gpus=0)
        self.pods[pod.uid] = pod

    def end_index(self, uid: str, failure: FailureClass | None = None) -> None:
        """The Job's pod ends, and with it the Job."""
        job, result = self.verifiers[uid], "Failed" if failure else "Succeeded"
        word = LastWord(result=result, failure=failure, message="as it was told")
        self.set_pod(f"{uid}-0", phase=result, word=said(word), ended=self.now)
        for operator in self.operators:
            operator.memory.remember(shown(self.pods[f"{uid}-0"]))
        self.verifiers[uid] = replace(job, finished=True, failed=failure is not None)
        self.indexed |= frozenset() if failure else {job.name}

    def run_pod(self, uid: str, claim: str) -> None:
        self.set_pod(uid, phase="Running", started=self.now, claim=claim)

    def make_claim(self, chain: Chain) -> None:
        """A user creates the claim again, with the labels it had."""
        name = "shared" if chain.shared else f"{chain.name}-artifacts"
        self.made[name] = self.made.get(name, 0) + 1
        uid = f"{name}#{self.made[name]}"
        meta = {"name": name, "namespace": NAMESPACE, "labels": {CHAIN: chain.name}}
        self.claims[uid] = Thing(name, uid, "", "", {"metadata": meta}, self.now)

    def set_job(self, uid: str, **update: Any) -> None:
        self.jobs[uid] = self.jobs[uid].changed(**update)

    def set_pod(self, uid: str, **update: Any) -> None:
        self.pods[uid] = replace(self.pods[uid], **update)

    def make_pod(self, job_uid: str) -> None:
        job = self.jobs[job_uid]
        self.inputs[job.digest] = task_of(job.body)["inputs"]
        n = self.made[f"pod of {job_uid}"] = self.made.get(f"pod of {job_uid}", 0) + 1
        labels = job.body["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["metadata"]["labels"]
        self.pods[f"{job_uid}-{n}"] = Pod(
            f"{job_uid}-{n}",
            job_uid,
            job.digest,
            tuple(sorted({**labels, REPLICA_TYPE: "master", REPLICA_INDEX: "0"}.items())),
            self.now,
        )
        self.set_job(job_uid, ran=True)

    def succeed(self, uid: str, *, word: bool = True) -> None:
        pod = self.pods[uid]
        self.disk |= {(pod.claim, pod.digest)}
        for operator in self.operators:
            operator.memory.claims = Kept()  # training took longer than claims are cached
        self.finish(uid, "Succeeded", self.success(pod.digest) if word else "")

    def success(self, digest: str) -> str:
        return success(digest, self.metrics_of(self.inputs[digest]))

    def fail(self, uid: str, failure: FailureClass | None) -> None:
        word = (
            LastWord(result="Failed", failure=failure, message="as it was told")
            if failure
            else None
        )
        self.finish(uid, "Failed", said(word) if word else "")

    def finish(self, uid: str, phase: str, word: str) -> None:
        how = {"trainer": phase} if self.sidecars else {"phase": phase}
        self.set_pod(uid, word=word, ended=self.now, **how)
        for operator in self.operators:
            operator.memory.remember(shown(self.pods[uid]))

    def end_gracefully(self, uid: str, *, watched: bool = True) -> None:
        """The pod gets SIGTERM, writes a checkpoint and its last word, and is deleted. Operators
        see the last word if they watch.
        """
        pod = self.pods.pop(uid)
        if pod.phase == "Running" and watched and not pod.trainer:
            self.checkpoints[pod.digest] = step = self.checkpoints.get(pod.digest, 0) + 1
            word = LastWord(
                result="Failed",
                failure=FailureClass.PREEMPTED,
                checkpoint_step=step,
                message="SIGTERM",
            )
            ended = replace(pod, phase="Failed", word=said(word), ended=self.now, deleting=True)
            for operator in self.operators:
                operator.memory.remember(shown(ended))

    def verify(self, uid: str) -> None:
        verifier = self.verifiers[uid]
        self.verifiers[uid] = replace(verifier, finished=True)
        if self.mute:
            return
        chain = self._owner(verifier.owner)
        assert chain is not None
        labels = tuple(sorted(verifier.body["spec"]["template"]["metadata"]["labels"].items()))
        absent = LastWord(
            result="Failed", failure=FailureClass.NO_ARTIFACT, message="there is none"
        )
        word = (
            self.success(verifier.digest)
            if (self._claim(chain), verifier.digest) in self.disk
            else said(absent)
        )
        self.pods[f"{uid}-0"] = Pod(
            f"{uid}-0",
            uid,
            verifier.digest,
            labels,
            self.now,
            "Succeeded",
            word,
            started=self.now,
            ended=self.now,
            gpus=0,
        )

    def drop_verifier(self, uid: str) -> None:
        del self.verifiers[uid]
        self.pods = {pod.uid: pod for pod in self.pods.values() if pod.job != uid}

    # What users and faults do.

    def edit(self, name: str, *, bump: bool = True, **update: Any) -> None:
        chain = self.chains[name]
        self.forgiven |= set(chain.status.attempts)
        generation = chain.generation + bump
        self.chains[name] = replace(
            chain, generation=generation, version=chain.version + 1, **update
        )

    def toggle(self, name: str, path: str, value: Any) -> None:
        edits = dict(self.chains[name].edits)
        if path in edits:
            del edits[path]
        else:
            edits[path] = value
        self.edit(name, edits=tuple(sorted(edits.items(), key=lambda e: (e[1] is DELETE, e[0]))))

    def wipe(self, name: str) -> None:
        chain = self.chains[name]
        self.wiped = True
        self.chains[name] = replace(
            chain, status=one_of_a_kind(ChainStatus()), version=chain.version + 1
        )

    def recreate(self, name: str) -> None:
        """The chain is deleted and applied again; what it owned is garbage-collected later."""
        chain = self.chains[name]
        self.made[name] = self.made.get(name, 0) + 1
        fresh = Chain(
            name, f"{name}-{self.made[name]}", chain.stages, queue=chain.queue, shared=chain.shared
        )
        self.chains[name] = fresh

    def lose_claim(self, name: str, *, again: bool) -> None:
        """The claim is deleted. Tests do this only while no pod uses it or will use it, because
        Kubernetes keeps a claim until then.
        """
        self.now += 1
        uid = self._claim(self.chains[name])
        if uid not in self.claims:
            return  # it was not made yet
        del self.claims[uid]
        if again:
            self.make_claim(self.chains[name])

    def forget_record(self, uid: str) -> None:
        record = self.records.pop(uid)
        self.permitted |= {record.says.split()[0]}
        for operator in self.operators:
            operator.memory.artifacts.drop((NAMESPACE, record.says.split()[0]))

    def delete_job(self, uid: str) -> None:
        """A user deletes the job in the background: its pods outlive it."""
        self.by_hand |= {uid}
        del self.jobs[uid]

    def delete_job_and_pods(self, uid: str) -> None:
        """A user deletes the job in the foreground: its pods end first."""
        self.by_hand |= {uid}
        self.set_job(uid, deleting=True)

    def reconfigure(self) -> None:
        """The operator gets its other configuration, or the first one again."""
        self.config = 1 - self.config

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for operator in self.operators:
            operator.rested = False
            operator.memory.artifacts, operator.memory.claims = Kept(), Kept()


def said(word: LastWord) -> str:
    """The termination message that a trainer writes for this last word."""
    return word.model_dump_json(by_alias=True, exclude_none=True)


def success(digest: str, metrics: dict[str, float]) -> str:
    weights = weights_of(digest)
    word = LastWord(
        result="Succeeded",
        manifest_digest=weights[::-1],
        artifact_digest=weights,
        step=100,
        steps=100,
        macs=1000,
        seconds=1.0,
        metrics=metrics,
    )
    return said(word)
