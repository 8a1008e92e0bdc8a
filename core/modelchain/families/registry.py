"""The families, in the order in which messages and the CRD list them. A new one is a file beside
this one and its name here.
"""

from __future__ import annotations

from modelchain.families import swin, vit
from modelchain.families.tower import Family, VisionFields

FAMILIES: tuple[Family, ...] = (vit, swin)


def family_of(vision: VisionFields) -> Family:
    """The family of a tower."""
    return next(family for family in FAMILIES if family.is_of(vision))
