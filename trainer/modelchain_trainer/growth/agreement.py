"""How alike a grown student and its predecessor are, layer by layer: what growth has kept, before
the first step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from modelchain_trainer.growth.rules import layer_of


@torch.no_grad()
def agreement(
    student: nn.Module, predecessor: nn.Module, run: Callable[[nn.Module], object]
) -> dict[str, list[float]]:
    """For each stack the cosines, predecessor's layer by layer, of its stream with the student's
    leading channels.

    `run` shows one model the same pictures and captions as the other. A layer that the student has
    several times is compared after the last of them. Means over tokens; 1 is the same up to its
    length.
    """
    ours, theirs = _streams(student, run), _streams(predecessor, run)
    found = {}
    for stack, old in theirs.items():
        new = ours[stack]
        last = [(layer + 1) * len(new) // len(old) - 1 for layer in range(len(old))]
        pairs = zip((new[layer] for layer in last), old, strict=True)
        found[stack] = [
            round(float(cosine_similarity(a[:, : b.shape[1]], b).mean()), 3) for a, b in pairs
        ]
    return found


def _streams(model: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, list[Tensor]]:
    """What each layer of each stack gives out, [tokens, channels], while the model is run as for an
    evaluation.
    """
    seen: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    hooks, training = [], model.training
    for name, module in model.named_modules():
        if key := layer_of(name):
            hooks.append(
                module.register_forward_hook(
                    lambda _, __, out, key=key: seen[key].append(out.flatten(0, -2).float())
                )
            )
    try:
        run(model.eval())
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    stacks: dict[str, list[Tensor]] = defaultdict(list)
    for stack, layer in sorted(seen):
        stacks[stack].append(torch.cat(seen[stack, layer]))
    return dict(stacks)
