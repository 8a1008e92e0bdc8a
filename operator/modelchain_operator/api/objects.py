"""Reads what all objects of the API server have in common: name, labels, conditions, times."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from modelchain.api.reasons import Code

Read = Mapping[str, Any]


def name(thing: Read) -> str:
    return str(thing["metadata"]["name"])


def uid(thing: Read) -> str:
    return str(thing["metadata"]["uid"])


def label(thing: Read, key: str) -> str:
    """The label's value; empty if the object does not have the label."""
    return str((thing["metadata"].get("labels") or {}).get(key) or "")


def annotation(thing: Read, key: str) -> str | None:
    found: str | None = (thing["metadata"].get("annotations") or {}).get(key)
    return found


def is_deleting(thing: Read) -> bool:
    """Whether the object is marked as deleted. It still exists until its finalizers are removed."""
    return "deletionTimestamp" in thing["metadata"]


def maker(thing: Read, kind: str) -> Read | None:
    """The owner reference to the object of this kind that made this one and controls it."""
    owners = thing["metadata"].get("ownerReferences") or []
    return next((o for o in owners if o.get("controller") and o["kind"] == kind), None)


def condition(thing: Read, kind: str) -> Read | None:
    """The condition of this type, whatever its status; None if the object has none."""
    conditions = (thing.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind), None)


def true_condition(thing: Read, kind: str) -> Read | None:
    """The condition of this type if its status is True, else None."""
    found = condition(thing, kind)
    return found if found is not None and found["status"] == "True" else None


def is_true(thing: Read, kind: str) -> bool:
    """Whether a condition is True for the present spec, and not for one before an edit."""
    seen = (thing.get("status") or {}).get("observedGeneration")
    return true_condition(thing, kind) is not None and seen == thing["metadata"].get("generation")


def is_refused(chain: Read) -> bool:
    """Whether the chain's spec cannot be run, so that its stages tell of an earlier spec."""
    summary = (chain.get("status") or {}).get("summary") or {}
    return summary.get("state") == Code.INVALID_SPEC


def seconds(timestamp: str | None) -> float | None:
    """An RFC 3339 timestamp in seconds since the epoch; None without a timestamp."""
    return datetime.fromisoformat(timestamp).timestamp() if timestamp else None
