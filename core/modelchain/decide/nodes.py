"""Nodes whose own device has failed: a chain's attempts keep away from them for a day."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from modelchain.api.status import MOST_AVOIDED, AvoidedNode
from modelchain.decide.conditions import constant

AVOIDED_SECONDS = 86_400.0


def avoided(known: Iterable[AvoidedNode], bad: Mapping[str, str], now: float) -> list[AvoidedNode]:
    """The nodes to keep away from, with those that have just failed.

    Args:
        bad: by node, a short name of its fault.
        now: seconds since the epoch.
    """
    new = [
        AvoidedNode(node=node, until=now + AVOIDED_SECONDS, fault=fault)
        for node, fault in bad.items()
    ]
    return [*(one for one in known if one.node not in bad), *new][-MOST_AVOIDED:]


def still_avoided(known: Iterable[AvoidedNode], now: float) -> list[AvoidedNode]:
    """Those whose day is not over."""
    return [one for one in known if one.until > now]


def without_faults(known: Iterable[AvoidedNode]) -> list[AvoidedNode]:
    """The same nodes, but not what was wrong with them: work went on since, or the spec has
    changed.
    """
    return [one.model_copy(update={"fault": ""}) for one in known]


def same_everywhere(known: Iterable[AvoidedNode]) -> str:
    """Why nothing is to be launched: one fault on two nodes, with no progress in between, is no
    fault of the nodes.

    A driver older than torch's CUDA fails on every node; each attempt would take one more out of
    use.
    """
    faults = {one.node: one.fault for one in known if one.fault}
    for fault, count in Counter(faults.values()).items():
        if count > 1:
            nodes = ", ".join(node for node, found in faults.items() if found == fault)
            return (
                f"SameDeviceError: the devices of nodes {nodes} failed alike ({fault}), so it is"
                " hardly the nodes: compare the driver with the image's CUDA version, then retry"
            )
    return ""


def nodes_avoided(known: Iterable[AvoidedNode], waiting: str) -> str:
    """What is said of pods that no node takes, while some nodes are avoided."""
    nodes = ", ".join(one.node for one in known)
    if not nodes or constant(waiting) != "Unschedulable":
        return waiting
    said = waiting.removeprefix("Unschedulable: ")
    return (
        f"NodesAvoided: no node is left but {nodes}, where devices failed lately; retry allows them"
        f" again ({said})"
    )
