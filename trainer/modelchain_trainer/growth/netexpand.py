"""NetExpand (Ding et al., CVPR 2023): new filters are orthogonal to those there are.

In depth it takes new layers from a moving average of the weights over the training; an artifact
holds the last weights alone, so here they are what the method in depth says.
"""

from __future__ import annotations

import torch

from modelchain_trainer.growth.rules import Part, Role
from modelchain_trainer.growth.simple import corner, insert


def netexpand(part: Part) -> int:
    """As `insert`; of a matrix that gets more outputs, the new ones read the old inputs along the
    directions that the old outputs read least (its last right singular vectors), as strongly as
    those do on the average.
    """
    count = insert(part)
    if (
        part.old.ndim < 2
        or part.axes[0].role is not Role.WRITES
        or part.new.shape[0] == part.old.shape[0]
    ):
        return count
    rows = part.old.flatten(1)
    _, strengths, directions = torch.linalg.svd(rows, full_matrices=True)
    more = part.new.shape[0] - rows.shape[0]
    least = directions.flip(0)[torch.arange(more) % directions.shape[0]]
    strength = strengths.square().sum().div(rows.shape[0]).sqrt()
    old_inputs = (slice(rows.shape[0], None), *corner(part)[1:])
    part.new[old_inputs] = (least * strength).view(more, *part.old.shape[1:])
    return count + more * rows.shape[1]
