"""Nodes whose own device has failed: a chain's attempts keep away from them for a day."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from modelchain.api.reasons import Code, Reason
from modelchain.api.status import MOST_AVOIDED, AvoidedNode

AVOIDED_SECONDS = 86_400.0


def avoided(known: Iterable[AvoidedNode], bad: Mapping[str, str], now: float) -> list[AvoidedNode]:
    """The avoided nodes, with those added whose device has just failed.

    Args:
        known: the nodes that were avoided before.
        bad: by node, a short name of its fault.
        now: seconds since the epoch.
    """
    new = [
        AvoidedNode(node=node, until=now + AVOIDED_SECONDS, fault=fault)
        for node, fault in bad.items()
    ]
    return [*(one for one in known if one.node not in bad), *new][-MOST_AVOIDED:]


def still_avoided(known: Iterable[AvoidedNode], now: float) -> list[AvoidedNode]:
    """The avoided nodes, without those whose day is over."""
    return [one for one in known if one.until > now]


def without_faults(known: Iterable[AvoidedNode]) -> list[AvoidedNode]:
    """The same nodes without their faults.

    Once the stage has progressed or the spec has changed, an earlier fault must not count towards
    `same_everywhere`.
    """
    return [one.model_copy(update={"fault": ""}) for one in known]


def same_everywhere(known: Iterable[AvoidedNode]) -> Reason | None:
    """The reason not to launch: two nodes failed alike, with no progress in between.

    The nodes are then probably not the cause. For example, a driver that is too old for the image's
    CUDA fails on every node, and each further attempt would add one more avoided node.
    """
    faults = {one.node: one.fault for one in known if one.fault}
    for fault, count in Counter(faults.values()).items():
        if count > 1:
            nodes = ", ".join(node for node, found in faults.items() if found == fault)
            return Reason(
                Code.SAME_DEVICE_ERROR,
                nodes,
                f"the devices of nodes {nodes} failed alike ({fault}), so the nodes are probably"
                " not the cause: compare the driver with the image's CUDA version, then retry",
            )
    return None


def nodes_avoided(known: Iterable[AvoidedNode], waiting: Reason) -> Reason:
    """Why pods wait. If no node fits and some nodes are avoided, the reason names these."""
    nodes = ", ".join(one.node for one in known)
    if not nodes or waiting.code is not Code.UNSCHEDULABLE:
        return waiting
    return Reason(
        Code.NODES_AVOIDED,
        nodes,
        f"no node is left but {nodes}, where devices failed lately; retry allows them again"
        f" ({replace(waiting, bare=True).text})",
    )
