"""Nodes whose devices failed are avoided for a day, at most sixteen; one fault on two of them is no
fault of theirs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_fixpoint import Life, life_of

from modelchain.api.contracts import FailureClass, LastWord
from modelchain.api.reasons import Code, Reason
from modelchain.api.status import MOST_AVOIDED, AvoidedNode, StageStatus, State
from modelchain.decide.nodes import (
    AVOIDED_SECONDS,
    avoided,
    nodes_avoided,
    same_everywhere,
    still_avoided,
    without_faults,
)
from modelchain.decide.observed import Launch, Seen

NOW = 1_700_000_000.0


class Machines(Life):
    """A chain whose trainers' devices fail: `bad` are nodes of the newest attempt, with their
    faults.
    """

    bad: dict[str, str]
    launched: list[Launch]

    def does(self, action: object) -> bool:
        if isinstance(action, Launch):
            self.launched = [*getattr(self, "launched", []), action]
        return super().does(action)

    def seen(self, name: str) -> Seen:
        found = super().seen(name)
        return (
            replace(found, bad_nodes=self.bad)
            if self.runs.get(name) and self.runs[name].over
            else found
        )

    def fails_on(self, node: str, fault: str, checkpoint: int = 0) -> StageStatus:
        """The newest attempt's device fails there; what has become of its stage, after every wait
        is over.
        """
        name = self.live
        assert name is not None
        self.end_pods(name)
        self.bad = {node: fault}
        word = LastWord(
            result="Failed", failure=FailureClass.HARDWARE, message="bad", node=node, fault=fault
        )
        self.runs[name].word = word.model_copy(update={"checkpoint_step": checkpoint})
        self.runs[name].over = True
        self.look()
        self.now += 1000.0
        self.look()
        return self.status.stages[0]


@pytest.fixture
def machines() -> Machines:
    life = Machines(life_of("vit-cc3m").body)
    life.look()
    return life


def test_the_next_attempts_keep_away(machines: Machines) -> None:
    stage = machines.fails_on("n1", "EccError")
    assert (stage.disruptions, stage.retries, stage.attempts[0].failure) == (
        1,
        1,
        FailureClass.HARDWARE,
    )
    assert (stage.attempts[0].node, stage.attempts[0].fault) == ("n1", "EccError")
    assert [launch.avoid for launch in machines.launched] == [(), ("n1",)]
    machines.fails_on("n2", "NoDevice")
    assert machines.launched[-1].avoid == ("n1", "n2")
    machines.now += AVOIDED_SECONDS
    machines.fails_on("n3", "SelfTest")
    assert machines.launched[-1].avoid == ("n3",), "a day is over"
    assert [known.node for known in machines.status.avoid] == ["n3"]


def test_after_a_day_a_node_is_free_again_for_an_attempt_that_waits_for_one(
    machines: Machines,
) -> None:
    """Its job names the nodes to keep away from; that they are no longer avoided outdates it."""
    machines.fails_on("n1", "EccError")
    assert [known.node for known in machines.status.avoid] == ["n1"]
    machines.now += AVOIDED_SECONDS
    machines.look()
    assert machines.status.avoid == [] and len(machines.runs) == 2


def test_who_pays_a_retry_waits(machines: Machines) -> None:
    name = machines.live
    assert name is not None
    machines.bad = {"n1": "NoDevice"}
    word = LastWord(
        result="Failed", failure=FailureClass.HARDWARE, message="bad", node="n1", fault="NoDevice"
    )
    machines.runs[name].word, machines.runs[name].over = word, True
    machines.look()
    stage = machines.status.stages[0]
    assert (
        stage.state is State.PENDING
        and stage.not_before is not None
        and stage.not_before >= machines.now + 9.0
    )
    assert len(machines.runs) == 1


def test_the_same_fault_on_a_second_node_waits_for_a_person(machines: Machines) -> None:
    machines.fails_on("n1", "DriverTooOld")
    stage = machines.fails_on("n2", "DriverTooOld")
    assert (
        stage.stalled and stage.reason.startswith("SameDeviceError: ") and "n1, n2" in stage.reason
    )
    assert len(machines.runs) == 2 and machines.status.is_true("Stalled")
    machines.retry = "mended"
    machines.look()
    assert (
        machines.status.avoid == []
        and len(machines.runs) == 3
        and machines.launched[-1].avoid == ()
    )


def test_an_edit_forgets_the_fault_and_not_the_node(machines: Machines) -> None:
    machines.fails_on("n1", "DriverTooOld")
    machines.fails_on("n2", "DriverTooOld")
    machines.edit(**{"spec.runner.image": "registry.example/older-cuda@sha256:" + "1" * 64})
    machines.look()
    assert len(machines.runs) == 3 and machines.launched[-1].avoid == ("n1", "n2")


def test_a_device_that_worked_for_a_while_is_another_matter(machines: Machines) -> None:
    machines.fails_on("n1", "EccError")
    stage = machines.fails_on("n2", "EccError", checkpoint=50)
    assert not stage.stalled and len(machines.runs) == 3


def test_at_most_sixteen(machines: Machines) -> None:
    for n in range(20):
        machines.fails_on(f"n{n}", f"Xid {n}")
    assert [known.node for known in machines.status.avoid] == [f"n{n}" for n in range(4, 20)]


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), st.sampled_from(["x", "y"])),
        max_size=60,
    )
)
def test_the_newest_stand_once(failures: list[tuple[str, str]]) -> None:
    known: list[AvoidedNode] = []
    for n, (node, fault) in enumerate(failures):
        known = avoided(known, {node: fault}, NOW + n)
    names = [one.node for one in known]
    assert len(set(names)) == len(names) <= MOST_AVOIDED
    expected = list(dict.fromkeys(node for node, _ in reversed(failures)))[:MOST_AVOIDED]
    assert names == expected[::-1]


def test_two_nodes_of_one_gang_that_fail_alike() -> None:
    known = avoided([], {"n1": "NoDevice", "n2": "NoDevice"}, NOW)
    reason = same_everywhere(still_avoided(known, NOW + 1))
    assert reason is not None and reason.text.startswith("SameDeviceError: ")
    assert still_avoided(known, NOW + AVOIDED_SECONDS) == []
    assert same_everywhere(without_faults(known)) is None


def test_nothing_else_fits() -> None:
    known = [AvoidedNode(node="n1", until=NOW)]
    unschedulable = Reason(Code.UNSCHEDULABLE, message="0/4 nodes are available")
    said = nodes_avoided(known, unschedulable).text
    assert (
        said.startswith("NodesAvoided: no node is left but n1, ")
        and "0/4 nodes are available" in said
    )
    queued = Reason(Code.QUEUED, message="waits for its turn")
    assert nodes_avoided(known, queued) == queued
    assert nodes_avoided([], unschedulable) == unschedulable
