"""How time was used. A trainer says it of its own time, and the ledger of GPU time."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from modelchain.api.spec import WrittenModel

# No time is longer, in milliseconds: 30 years of 4096 GPUs.
LONGEST = 2**52


Milliseconds = Annotated[int, Field(ge=0, le=LONGEST)]


def _as_map(schema: dict[str, Any]) -> None:
    """A short schema: a CRD has it in a dozen places, and must fit into an annotation."""
    first = next(iter(schema.pop("properties").values()))
    bounds = {key: first[key] for key in ("type", "minimum", "maximum")}
    schema["additionalProperties"] = bounds


class Uses(WrittenModel):
    """Time in milliseconds, by its use. Each moment has exactly one use."""

    # A trainer of another version may know more uses.
    model_config = ConfigDict(extra="ignore", json_schema_extra=_as_map)

    # Until the attempt's first step.
    startup: Milliseconds = 0
    # Steps that a checkpoint or the artifact has kept.
    productive: Milliseconds = 0
    # Evaluation, export, verification.
    evaluating: Milliseconds = 0
    # From the last step to the end of a stall.
    stalled: Milliseconds = 0
    # Work that no checkpoint has kept, and what was not told.
    lost: Milliseconds = 0
    # Since the newest checkpoint; not settled yet.
    unsaved: Milliseconds = 0

    @model_serializer(mode="wrap")
    def _short(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the uses that no time had: a status has many of these."""
        return {name: time for name, time in whole(self).items() if time}

    @property
    def total(self) -> int:
        return sum(dict(self).values())

    @property
    def settled(self) -> Uses:
        """With what is not settled yet as lost."""
        return self.model_copy(update={"lost": self.lost + self.unsaved, "unsaved": 0})

    @property
    def kept(self) -> Uses:
        """With what is not settled yet as productive."""
        productive = self.productive + self.unsaved
        return self.model_copy(update={"productive": productive, "unsaved": 0})

    def __add__(self, other: Uses) -> Uses:
        return Uses(**{name: time + getattr(other, name) for name, time in self})

    def __sub__(self, other: Uses) -> Uses:
        return Uses(**{name: time - getattr(other, name) for name, time in self})


NOT_USED = Uses()


class Resumed(WrittenModel):
    """The checkpoint that a trainer began from: who wrote it, and what that trainer had done.

    Both names are empty if the trainer began from the start.
    """

    model_config = ConfigDict(extra="ignore")

    attempt: str = Field("", max_length=63)
    pod: str = Field("", max_length=63, description="its UID; empty outside a pod")
    milliseconds: Uses = NOT_USED
    macs: int = Field(0, ge=0, description="spent by then")
    saved_macs: int = Field(0, ge=0, description="the part that the checkpoint has kept")
