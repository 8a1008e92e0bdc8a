"""NetExpand (Ding et al., CVPR 2023): new filters are orthogonal to the old ones.

In depth the paper takes new layers from a moving average of the weights over the training. An
artifact holds the last weights alone, so here the method in depth decides.
"""

from __future__ import annotations

import torch

from modelchain_trainer.growth.rules import Part, Role
from modelchain_trainer.growth.simple import corner, insert


def netexpand(part: Part) -> int:
    """As `insert`. If a matrix gets more outputs, the new ones read the old inputs along the
    directions that the old outputs read least (its last right singular vectors), with the average
    strength of the old outputs.
    """
    count = insert(part)
    if (
        part.old.ndim < 2
        or part.axes[0].role is not Role.WRITES
        or part.new.shape[0] == part.old.shape[0]
    ):
        return count
    rows = part.old.flatten(1)  # [outputs, inputs]
    _, strengths, directions = torch.linalg.svd(rows, full_matrices=True)
    more = part.new.shape[0] - rows.shape[0]
    weakest_first = directions.flip(0)
    least_read = weakest_first[torch.arange(more) % directions.shape[0]]
    strength = strengths.square().sum().div(rows.shape[0]).sqrt()  # root mean square of the rows
    old_inputs = (slice(rows.shape[0], None), *corner(part)[1:])
    part.new[old_inputs] = (least_read * strength).view(more, *part.old.shape[1:])
    return count + more * rows.shape[1]
