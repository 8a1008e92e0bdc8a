"""`decide` on a cluster: every fault at every request in small worlds, and random histories in
larger ones.

MODELCHAIN_EXPLORE=n plays n times as many random histories. From 10 on every pair of faults is
explored, which takes hours.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import exploration
import pytest
from cluster_simulation import Cluster, alone, attempts, together
from exploration import explore
from specs import DELETE
from sweeps import Dice

from modelchain.api.contracts import FailureClass as F
from modelchain.api.status import State
from modelchain.decide.observed import Launch, MakeIndex, RecordArtifact

EXPLORE = int(os.environ.get("MODELCHAIN_EXPLORE", "1"))
# Requests, events and waits after which a world without further faults must be at rest.
LONGEST_CALM = 600

Event = tuple[str, Callable[[Cluster], object]]


def settle(world: Cluster) -> Cluster:
    return exploration.settle(world, LONGEST_CALM)


def until(world: Cluster, condition: Callable[[Cluster], bool]) -> Cluster:
    for _ in range(LONGEST_CALM):
        if condition(world):
            return world
        assert world.calm_step(), "the world came to rest before the condition was true"
    raise AssertionError("the condition does not become true")


def running(world: Cluster) -> bool:
    return any(pod.phase == "Running" for pod in world.pods.values())


def changed(what: Callable[[Cluster], object]) -> Callable[[Cluster], None]:
    """A fault that watches report to the operators."""

    def happen(world: Cluster) -> None:
        what(world)
        world.touched()

    return happen


def faults(world: Cluster) -> Iterator[Event]:
    """Everything that may fail, be slow, or be requested at this moment."""
    current = world.operators[world.turn]
    if current.phase == "write":
        for how in ("unsent", "sent", "answered"):
            yield f"dies, {how}", lambda w, h=how: w.die(w.operators[w.turn], h)
        made = current.decision.action if current.decision is not None else None
        if isinstance(made, Launch | RecordArtifact | MakeIndex):
            yield "what it makes is refused twice", lambda w: setattr(w, "refusals", 2)
    elif current.memory.pods:
        yield "dies", lambda w: w.operators[w.turn].crash()
    for index, operator in enumerate(world.operators):
        if index != world.turn and (operator.phase != "idle" or current.phase != "idle"):
            yield (
                f"operator {index} goes on",
                lambda w, i=index: (setattr(w, "turn", i), w.advance(w.operators[i])),
            )
    for index in range(len(world.flying)):
        yield f"write {index} lands", lambda w, i=index: w.land(i)
    for name, happen in (
        list(world.natural()) if current.phase != "idle" else list(world.natural())[1:]
    ):
        yield name, changed(happen)
    yield from disasters(world)
    yield from user_requests(world)


def disasters(world: Cluster) -> Iterator[Event]:
    for pod in world.pods.values():
        if not pod.trains:
            continue
        if pod.phase == "Running" and not pod.trainer:
            for failure in (F.ERROR, F.PREEMPTED, F.USER_ERROR, None):
                yield (
                    f"{pod.uid} fails: {failure}",
                    changed(lambda w, u=pod.uid, f=failure: w.fail(u, f)),
                )
            yield (
                f"{pod.uid} succeeds, word lost",
                changed(lambda w, u=pod.uid: w.succeed(u, word=False)),
            )
        if pod.live:
            yield (
                f"{pod.uid} vanishes",
                changed(lambda w, u=pod.uid: w.end_gracefully(u, watched=False)),
            )
        else:
            yield f"{pod.uid} is cleaned up", changed(lambda w, u=pod.uid: w.pods.pop(u))
    for job in world.jobs.values():
        yield f"{job.uid} is deleted by hand", changed(lambda w, u=job.uid: w.delete_job(u))
        if not job.deleting:
            yield (
                f"{job.uid} is deleted by hand, pods first",
                changed(lambda w, u=job.uid: w.delete_job_and_pods(u)),
            )
        if job.queued and not job.suspended and not job.finished:
            yield (
                f"{job.uid} is evicted",
                changed(lambda w, u=job.uid: w.set_job(u, suspended=True)),
            )
    for verifier in world.verifiers.values():
        yield (
            f"{verifier.uid} is deleted by hand",
            changed(lambda w, u=verifier.uid: w.drop_verifier(u)),
        )
        if verifier.indexes and not verifier.finished and f"{verifier.uid}-0" in world.pods:
            for failure in (F.ERROR, F.USER_ERROR):
                yield (
                    f"{verifier.uid} fails: {failure}",
                    changed(lambda w, u=verifier.uid, f=failure: w.end_index(u, f)),
                )
    for record in world.records.values():
        yield (
            f"{record.uid} is deleted by hand",
            changed(lambda w, u=record.uid: w.forget_record(u)),
        )
    for name in world.chains:
        if world.chains[name].status.stages:
            yield f"the status of {name} is wiped", changed(lambda w, n=name: w.wipe(n))
        if (
            world.claims
            and not any(pod.live for pod in world.pods.values())
            and all(j.finished for j in world.jobs.values())
        ):
            yield (
                f"the claim of {name} is lost",
                changed(lambda w, n=name: w.lose_claim(n, again=False)),
            )
            yield (
                f"the claim of {name} is replaced",
                changed(lambda w, n=name: w.lose_claim(n, again=True)),
            )


def user_requests(world: Cluster) -> Iterator[Event]:
    for name, chain in world.chains.items():
        yield (
            f"{name} suspend: {not chain.suspend}",
            changed(lambda w, n=name, s=chain.suspend: w.edit(n, suspend=not s)),
        )
        retry = f"{len(chain.retry or '')}x"
        yield f"{name} retry", changed(lambda w, n=name, r=retry: w.edit(n, bump=False, retry=r))
        for stage in range(chain.stages):
            path = f"spec.stages[{stage}].rerun"
            yield f"{name} {path}", changed(lambda w, n=name, p=path: w.toggle(n, p, "x"))
        path = f"spec.stages[{chain.stages - 1}]"
        # Not where other edits are about that stage, such as those of a gate.
        if chain.stages > 1 and not any(edit.startswith(f"{path}.") for edit, _ in chain.edits):
            yield (
                f"{name} without its last stage",
                changed(lambda w, n=name, p=path: w.toggle(n, p, DELETE)),
            )
        yield f"{name} is made anew", changed(lambda w, n=name: w.recreate(n))


def every_fault(world: Cluster) -> Iterator[Callable[[Cluster], None]]:
    """The faults for `explore`. Each writes a trace and then checks that at most one attempt is
    live.
    """
    for name, happen in faults(world):

        def fault(
            other: Cluster, name: str = name, happen: Callable[[Cluster], object] = happen
        ) -> None:
            other.trace += (f"* {name}",)
            happen(other)
            other._check_live()

        yield fault


class traced:
    """Adds what happened before to the error of a failed check."""

    def __init__(self, world: Cluster):
        self.world = world

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        if error is not None:
            error.add_note("what happened: " + "; ".join(self.world.trace))


# Single situations. `decide` was wrong in each of them once.


def test_an_undisturbed_chain() -> None:
    world = settle(alone(3, operators=2))
    assert list(attempts(world)) == ["family-a-a1", "family-b-a1", "family-c-a1"]
    assert world.chains["family"].status.is_true("Complete")


def test_a_transition_is_measured_once() -> None:
    world = settle(alone(3))
    first, *successors = world.chains["family"].status.stages
    assert first.transition_seconds is None and all(
        s.inherits_at is None for s in (first, *successors)
    )
    assert all(
        s.transition_seconds is not None and 0 <= s.transition_seconds < 60 for s in successors
    )
    before = [s.transition_seconds for s in successors]
    world.now += 86_400
    changed(lambda w: w.toggle("family", "spec.stages[1].rerun", "x"))(world)
    settle(world)
    _, edited, after = world.chains["family"].status.stages
    assert edited.transition_seconds == before[0], "its predecessor had finished long before"
    assert after.transition_seconds is not None and after.transition_seconds < 60


def test_a_suspension_is_no_transition() -> None:
    world = until(alone(2), lambda w: any(pod.phase == "Succeeded" for pod in w.pods.values()))
    changed(lambda w: w.edit("family", suspend=True))(world)
    settle(world)
    assert world.chains["family"].status.is_true("Suspended")
    world.now += 86_400
    changed(lambda w: w.edit("family", suspend=False))(world)
    settle(world)
    assert world.chains["family"].status.is_true("Complete")
    assert world.chains["family"].status.stages[1].transition_seconds is None


def test_an_edit_that_is_reverted_charges_no_budget() -> None:
    world = until(alone(1), running)
    changed(lambda w: w.toggle("family", "spec.stages[0].rerun", "x"))(world)
    until(world, lambda w: all(job.deleting for job in w.jobs.values()))
    changed(lambda w: w.toggle("family", "spec.stages[0].rerun", "x"))(world)
    settle(world)
    stage = world.chains["family"].status.stages[0]
    assert (stage.retries, stage.disruptions) == (0, 0)
    assert [a.state for a in stage.attempts] == [State.SUSPENDED, State.SUCCEEDED]


def test_a_job_deleted_while_its_artifact_is_rehashed_is_not_trained_again() -> None:
    world = until(alone(1), running)
    changed(lambda w: w.succeed("family-a-a1#1-1", word=False))(world)
    until(world, lambda w: any(not v.indexes for v in w.verifiers.values()))
    changed(lambda w: w.delete_job("family-a-a1#1"))(world)
    settle(world)
    assert (
        list(attempts(world)) == ["family-a-a1"]
        and attempts(world)["family-a-a1"].state is State.SUCCEEDED
    )


@pytest.mark.parametrize("again", [True, False])
def test_a_claim_lost_before_its_artifact_is_recorded_is_reported(again: bool) -> None:
    world = until(alone(1), lambda w: any(pod.phase == "Succeeded" for pod in w.pods.values()))
    world.set_job("family-a-a1#1", finished="Succeeded")
    changed(lambda w: w.lose_claim("family", again=again))(world)
    settle(world)
    stage = world.chains["family"].status.stages[0]
    assert stage.stalled and stage.reason.startswith("ArtifactMissing") and not world.records
    changed(lambda w: w.toggle("family", "spec.stages[0].rerun", "x"))(world)
    settle(world)
    assert world.chains["family"].status.is_true("Complete")


@pytest.mark.parametrize("shared", [True, False])
def test_chains_on_one_claim_index_their_data_once(shared: bool) -> None:
    """Each chain waits for its data before its first attempt; see `ApiServer._check_intent`."""
    world = settle(together(2, shared=shared, slow_index=True))
    assert all(chain.status.is_true("Complete") for chain in world.chains.values())
    made = [job.owner for job in world.verifiers.values() if job.indexes]
    assert len(made) == (1 if shared else 2)


def test_a_chain_that_waits_for_anothers_index_makes_its_own_once_that_is_gone() -> None:
    world = together(1, slow_index=True)
    until(world, lambda w: bool(w.verifiers) and len(w.pods) == 1)
    (first,) = world.verifiers.values()
    owner, other = ("one", "two") if first.owner == "one-0" else ("two", "one")
    del world.chains[owner]
    world.operators = [o for o in world.operators if o.chain == other]
    world.turn = 0
    world.touched()
    settle(world)
    assert world.chains[other].status.is_true("Complete")
    assert [job.owner for job in world.verifiers.values()] == [f"{other}-0"]


def test_only_a_new_value_of_the_retry_annotation_starts_attempts() -> None:
    """A GitOps tool that does not know the annotation removes it, which must start nothing."""

    def fails(world: Cluster) -> Cluster:
        for _ in range(LONGEST_CALM):
            for pod in list(world.pods.values()):
                if pod.phase == "Running" and pod.trains:
                    changed(lambda w, u=pod.uid: w.fail(u, F.ERROR))(world)
            if not world.calm_step():
                return world
        raise AssertionError("the world does not come to rest")

    world = fails(alone(1))
    made = len(attempts(world))
    for retry, more in (("", 0), (None, 0), ("1", made), (None, 0), ("1", 0), ("", 0), ("2", made)):
        before = len(attempts(world))
        changed(lambda w, r=retry: w.edit("family", bump=False, retry=r))(world)
        assert fails(world).chains["family"].status.is_true("Failed")
        assert len(attempts(world)) == before + more, f"after the annotation became {retry!r}"


@pytest.mark.parametrize("then", ["retry", "a queue is named", "it is suspended"])
def test_a_job_that_another_client_suspends_stays_suspended(then: str) -> None:
    """The job is in no queue, so no controller will resume it. The operator reports this, and does
    and charges nothing until a user requests a retry or edits the chain.
    """
    world = until(alone(1), running)
    changed(lambda w: w.set_job("family-a-a1#1", suspended=True))(world)
    while world.calm_step():
        pass
    stage = world.chains["family"].status.stages[0]
    assert stage.stalled and stage.reason.startswith("SuspendedByAnother: ")
    assert (stage.retries, stage.disruptions, len(stage.attempts), len(world.jobs)) == (0, 0, 1, 1)
    spent = stage.gpu_seconds
    world.now += 86_400.0  # no pod exists, so no GPU time is spent
    match then:
        case "retry":
            changed(lambda w: w.edit("family", bump=False, retry="again"))(world)
        case "a queue is named":
            changed(lambda w: w.edit("family", queue=True))(world)
        case _:
            changed(lambda w: w.edit("family", suspend=True))(world)
            settle(world)
            changed(lambda w: w.edit("family", suspend=False))(world)
    settle(world)
    stage = world.chains["family"].status.stages[0]
    assert [a.name for a in stage.attempts] == ["family-a-a1", "family-a-a2"]
    assert (stage.retries, stage.disruptions) == (0, 0) and stage.gpu_seconds < spent + 10_000


def test_a_suspended_chain_does_not_block_a_shared_stage() -> None:
    world = until(together(1), lambda w: bool(attempts(w)))
    changed(lambda w: w.edit("one", suspend=True))(world)
    settle(world)
    assert all(chain.status.is_true("Complete") for chain in world.chains.values()), (
        "the other chain trains the stage, and both use it"
    )
    assert [a.state for a in attempts(world).values()] == [State.SUSPENDED, State.SUCCEEDED]


def test_after_a_lost_status_the_old_job_is_stopped_first_and_no_name_is_reused() -> None:
    world = until(alone(1), running)
    changed(lambda w: w.wipe("family"))(world)
    settle(world)
    assert list(attempts(world)) == ["family-a-a2"]


@pytest.mark.parametrize("moment", ["complete", "running"])
def test_an_operator_with_another_trainer_math_retrains_nothing(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete chain stays complete, and a running attempt goes on: TRAINER_MATH is recorded with
    an artifact, but is no part of the input digest.
    """
    world = settle(alone(2)) if moment == "complete" else until(alone(2), running)
    jobs, digests = set(world.jobs), [s.input_digest for s in world.chains["family"].status.stages]
    monkeypatch.setattr("modelchain.identity.digest.TRAINER_MATH", 99)
    world.operators[0].crash()
    settle(world)
    status = world.chains["family"].status
    assert status.is_true("Complete") and list(attempts(world)) == ["family-a-a1", "family-b-a1"]
    assert jobs <= set(world.jobs) or moment == "running"
    assert status.stages[0].input_digest == digests[0]
    assert [(s.retries, s.disruptions) for s in status.stages] == [(0, 0)] * 2


def test_a_chain_beside_sidecars() -> None:
    """Every job is deleted a minute after its trainer has ended. Nothing is charged."""
    world = settle(alone(3, sidecars=True))
    assert list(attempts(world)) == ["family-a-a1", "family-b-a1", "family-c-a1"]
    assert {a.state for a in attempts(world).values()} == {State.SUCCEEDED} and not world.jobs
    stages = world.chains["family"].status.stages
    assert [(s.retries, s.disruptions) for s in stages] == [(0, 0)] * 3


def test_a_shared_stage_is_trained_once() -> None:
    world = settle(together(2))
    assert sorted(attempts(world)) == ["one-a-a1", "one-b-a1", "two-b-a1"]


def test_an_equal_stage_on_another_claim_is_trained_there_as_well() -> None:
    world = settle(together(1, shared=False))
    assert all(chain.status.is_true("Complete") for chain in world.chains.values())
    assert sorted(attempts(world)) == ["one-a-a1", "two-a-a1"] and len(world.records) == 2


# Everything that can happen, in small worlds.


@pytest.mark.parametrize(
    "start",
    [
        lambda: alone(1, operators=2),
        lambda: alone(1, operators=2, queue=True),
        lambda: alone(2),
        lambda: together(1),
        lambda: together(1, shared=False),
        lambda: alone(1, operators=2, queue=True, sidecars=True),
        lambda: alone(1, slow_index=True),
    ],
    ids=[
        "two operators",
        "two operators and a queue",
        "two stages",
        "two chains on one claim",
        "two chains on claims of their own",
        "a queue and sidecars",
        "an index Job that takes a while",
    ],
)
def test_one_fault_at_every_request(
    start: Callable[[], Cluster], request: pytest.FixtureRequest
) -> None:
    dice = Dice(request.node.name, 80)
    found, ends = explore(start(), every_fault, 2 if EXPLORE > 9 else 1, LONGEST_CALM, dice, traced)
    assert found > 3000 // dice.one_in and ends > 50 // dice.one_in


def changes(world: Cluster) -> Iterator[Event]:
    """What a user or a GitOps tool may change, and revert, while an attempt is launched."""
    chain = world.chains["family"]
    yield "suspend or resume", changed(lambda w: w.edit("family", suspend=not chain.suspend))
    yield "edit", changed(lambda w: w.toggle("family", "spec.stages[0].rerun", "x"))
    yield (
        "retry",
        changed(lambda w: w.edit("family", bump=False, retry=f"{len(chain.retry or '')}x")),
    )
    yield "retry is taken away", changed(lambda w: w.edit("family", bump=False, retry=None))
    yield "another configuration", changed(lambda w: w.reconfigure())
    if world.jobs:
        yield "the job is labelled", changed(lambda w: relabel(w))
        yield "the job is started", changed(lambda w: start(w))


def relabel(world: Cluster) -> None:
    """Another client puts every unreleased job into a queue of its own."""
    for job in list(world.jobs.values()):
        if job.suspended and not job.released:
            world.set_job(job.uid, queue="foreign")


def start(world: Cluster) -> None:
    """Another client starts every unreleased job."""
    for job in list(world.jobs.values()):
        if job.suspended and not job.released:
            world.set_job(job.uid, suspended=False)


def launching(world: Cluster) -> bool:
    """An attempt is open, from its intent on, and has no pod yet."""
    return any(a.finished_at is None for a in attempts(world).values()) and not world.pods


def every_change(world: Cluster) -> Iterator[Callable[[Cluster], None]]:
    """The changes for `explore`: the first one happens during a launch, a second at any time."""
    if not (launching(world) or world.changed):
        return
    for name, happen in changes(world):

        def fault(
            other: Cluster, name: str = name, happen: Callable[[Cluster], object] = happen
        ) -> None:
            other.trace += (f"* {name}",)
            other.changed = True
            happen(other)

        yield fault


@pytest.mark.parametrize(
    ("queue", "changes"), [(False, 2), (True, 2 if EXPLORE > 9 else 1)], ids=["no queue", "a queue"]
)
def test_changes_while_an_attempt_is_launched(
    queue: bool, changes: int, request: pytest.FixtureRequest
) -> None:
    """The first change comes at any step of the launch, the second at any later step. The world
    always comes to rest, and no attempt is created twice.
    """
    world = until(alone(1, queue=queue), launching)
    changes = 1 if queue and EXPLORE < 10 else 2
    dice = Dice(request.node.name, 12)
    found, ends = explore(world, every_change, changes, LONGEST_CALM, dice, traced)
    part = dice.one_in**changes
    assert found > 700 // part and ends > 10 // part


def shape(world: Cluster) -> tuple[object, ...]:
    """The visible state of a chain and its jobs, without the numbers of its attempts."""
    chain = world.chains["family"]
    shown = [
        (
            s.state,
            s.reason,
            len(s.attempts),
            [(a.state, bool(a.uid), bool(a.finished_at)) for a in s.attempts],
        )
        for s in chain.status.stages
    ]
    jobs = sorted(
        (j.name, j.suspended, str(j.queue), j.released, str(j.finished), j.deleting)
        for j in world.jobs.values()
    )
    return (
        str(shown),
        chain.retry,
        chain.generation,
        tuple(jobs),
        tuple(sorted(p.phase for p in world.pods.values())),
    )


@pytest.mark.parametrize("first", ["suspend or resume", "edit", "another configuration", "retry"])
def test_no_pair_of_states_repeats(first: str) -> None:
    """At every step of a launch a change is made and, once it is carried out, reverted. `decide`
    never goes round in a circle.
    """
    before = until(alone(1), launching)
    while launching(before):
        world = before.copy()
        for name in (first, first):
            dict(changes(world))[name](world)
            seen, now = set(), shape(world)
            while world.calm_step():
                then = now
                now = shape(world)
                assert now == then or (then, now) not in seen, f"{then} -> {now}"
                seen |= {(then, now)}
            world.check_rest()
        if not before.calm_step():
            break


# Random histories in larger worlds.


@pytest.mark.parametrize("seed", range(40 * EXPLORE))
def test_random_histories(seed: int) -> None:
    chance = random.Random(seed)
    starts = [
        lambda: alone(2, operators=2),
        lambda: alone(3),
        lambda: alone(2, operators=2, queue=True),
        lambda: together(1),
        lambda: together(2),
        lambda: together(1, shared=False),
        lambda: alone(2, operators=2, sidecars=True),
        lambda: alone(2, queue=True, sidecars=True),
        lambda: alone(1, operators=2, slow_index=True),
        lambda: together(1, slow_index=True),
    ]
    world = chance.choice(starts)()
    with traced(world):
        for _ in range(chance.randrange(1, 12)):
            for _ in range(chance.randrange(40)):
                if not world.calm_step():
                    world.check_rest()
                    break
            happens = [*faults(world), ("time passes", lambda w: w.wait(2000.0))]
            name, happen = chance.choice(happens)
            world.trace += (f"* {name}",)
            happen(world)
            world._check_live()
        settle(world)
