"""At most sixteen nodes whose devices failed are avoided, each for a day. The same fault on two
nodes is not blamed on the nodes.
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
    """A chain whose devices fail. `bad` has the failed nodes of the newest attempt, with their
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
        """The newest attempt's device fails on this node. Returns the stage after the back-off is
        over.
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
        self.reconcile()
        self.now += 1000.0
        self.reconcile()
        return self.status.stages[0]


@pytest.fixture
def machines() -> Machines:
    life = Machines(life_of("vit-cc3m").body)
    life.reconcile()
    return life


def test_later_attempts_avoid_the_node(machines: Machines) -> None:
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
    assert machines.launched[-1].avoid == ("n3",), "after a day the first two are free again"
    assert [known.node for known in machines.status.avoid] == ["n3"]


def test_after_a_day_a_node_is_no_longer_avoided_while_an_attempt_waits(
    machines: Machines,
) -> None:
    """The status must change by itself, because a job that still excludes the node is outdated."""
    machines.fails_on("n1", "EccError")
    assert [known.node for known in machines.status.avoid] == ["n1"]
    machines.now += AVOIDED_SECONDS
    machines.reconcile()
    assert machines.status.avoid == [] and len(machines.runs) == 2


def test_a_stage_waits_after_a_charged_retry(machines: Machines) -> None:
    name = machines.live
    assert name is not None
    machines.bad = {"n1": "NoDevice"}
    word = LastWord(
        result="Failed", failure=FailureClass.HARDWARE, message="bad", node="n1", fault="NoDevice"
    )
    machines.runs[name].word, machines.runs[name].over = word, True
    machines.reconcile()
    stage = machines.status.stages[0]
    assert (
        stage.state is State.PENDING
        and stage.not_before is not None
        and stage.not_before >= machines.now + 9.0
    )
    assert len(machines.runs) == 1


def test_the_same_fault_on_a_second_node_stalls_until_a_retry(machines: Machines) -> None:
    machines.fails_on("n1", "DriverTooOld")
    stage = machines.fails_on("n2", "DriverTooOld")
    assert (
        stage.stalled and stage.reason.startswith("SameDeviceError: ") and "n1, n2" in stage.reason
    )
    assert len(machines.runs) == 2 and machines.status.is_true("Stalled")
    machines.retry = "mended"
    machines.reconcile()
    assert (
        machines.status.avoid == []
        and len(machines.runs) == 3
        and machines.launched[-1].avoid == ()
    )


def test_an_edit_forgets_the_fault_and_not_the_node(machines: Machines) -> None:
    machines.fails_on("n1", "DriverTooOld")
    machines.fails_on("n2", "DriverTooOld")
    machines.edit(**{"spec.runner.image": "registry.example/older-cuda@sha256:" + "1" * 64})
    machines.reconcile()
    assert len(machines.runs) == 3 and machines.launched[-1].avoid == ("n1", "n2")


def test_the_same_fault_after_progress_does_not_stall(machines: Machines) -> None:
    machines.fails_on("n1", "EccError")
    stage = machines.fails_on("n2", "EccError", checkpoint=50)
    assert not stage.stalled and len(machines.runs) == 3


def test_at_most_sixteen_nodes_are_avoided(machines: Machines) -> None:
    for n in range(20):
        machines.fails_on(f"n{n}", f"Xid {n}")
    assert [known.node for known in machines.status.avoid] == [f"n{n}" for n in range(4, 20)]


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), st.sampled_from(["x", "y"])),
        max_size=60,
    )
)
def test_the_newest_nodes_are_kept_once_each(failures: list[tuple[str, str]]) -> None:
    known: list[AvoidedNode] = []
    for n, (node, fault) in enumerate(failures):
        known = avoided(known, {node: fault}, NOW + n)
    names = [one.node for one in known]
    assert len(set(names)) == len(names) <= MOST_AVOIDED
    expected = list(dict.fromkeys(node for node, _ in reversed(failures)))[:MOST_AVOIDED]
    assert names == expected[::-1]


def test_two_nodes_of_one_gang_with_the_same_fault() -> None:
    known = avoided([], {"n1": "NoDevice", "n2": "NoDevice"}, NOW)
    reason = same_everywhere(still_avoided(known, NOW + 1))
    assert reason is not None and reason.text.startswith("SameDeviceError: ")
    assert still_avoided(known, NOW + AVOIDED_SECONDS) == []
    assert same_everywhere(without_faults(known)) is None


def test_the_reason_if_only_avoided_nodes_are_left() -> None:
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
