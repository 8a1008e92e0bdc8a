"""The same colour for the same thing on every panel."""

from __future__ import annotations

from modelchain.api.status import State
from modelchain.api.uses import Uses

STATES = {
    State.PENDING: "#6e6e6e",
    State.INDEXING: "#8ab8ff",
    State.QUEUED: "yellow",
    State.STARTING: "orange",
    State.RUNNING: "blue",
    State.VERIFYING: "purple",
    State.SUCCEEDED: "green",
    State.FAILED: "red",
    State.SUSPENDED: "#b877d9",
}
_USES = {
    "startup": "yellow",
    "productive": "green",
    "evaluating": "blue",
    "stalled": "orange",
    "lost": "red",
}
USES = {use: _USES[use] for use in Uses.model_fields if use != "unsaved"}
CONDITIONS = {"Reconciling": "blue", "Stalled": "orange", "Complete": "green", "Failed": "red"}
ACTIVITIES = {
    "startup": "yellow",
    "step": "green",
    "data": "orange",
    "checkpoint": "purple",
    "evaluation": "blue",
    "export": "#8ab8ff",
}
