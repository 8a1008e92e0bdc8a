"""Reading any object as the API server gives it: what it is called, its labels and conditions, the
times in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

Read = Mapping[str, Any]


def name(thing: Read) -> str:
    return str(thing["metadata"]["name"])


def uid(thing: Read) -> str:
    return str(thing["metadata"]["uid"])


def label(thing: Read, key: str) -> str:
    """Empty where there is none."""
    return str((thing["metadata"].get("labels") or {}).get(key) or "")


def annotation(thing: Read, key: str) -> str | None:
    found: str | None = (thing["metadata"].get("annotations") or {}).get(key)
    return found


def is_deleting(thing: Read) -> bool:
    """Its deletion was asked for; it is still there."""
    return "deletionTimestamp" in thing["metadata"]


def condition(thing: Read, kind: str) -> Read | None:
    """A condition that is there, whatever its status."""
    conditions = (thing.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind), None)


def true_condition(thing: Read, kind: str) -> Read | None:
    """A condition that is there and holds."""
    found = condition(thing, kind)
    return found if found is not None and found["status"] == "True" else None


def is_true(thing: Read, kind: str) -> bool:
    """Whether a condition holds for the spec as it is now."""
    seen = (thing.get("status") or {}).get("observedGeneration")
    return true_condition(thing, kind) is not None and seen == thing["metadata"].get("generation")


def seconds(timestamp: str | None) -> float | None:
    """RFC 3339 as seconds since the epoch."""
    return datetime.fromisoformat(timestamp).timestamp() if timestamp else None
