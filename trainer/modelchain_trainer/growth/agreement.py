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
    """For each stack of layers a list of cosines, one for each layer of the predecessor: between
    its output and the student's leading channels, as means over tokens.

    `run` must show both models the same pictures and captions. A layer that the student has several
    times is compared after the last of them. 1 means equal but for the length.
    """
    ours = _layer_outputs(student, run)
    theirs = _layer_outputs(predecessor, run)
    cosines = {}
    for stack, old in theirs.items():
        new = ours[stack]
        last_copies = [(layer + 1) * len(new) // len(old) - 1 for layer in range(len(old))]
        pairs = zip((new[layer] for layer in last_copies), old, strict=True)
        cosines[stack] = [
            round(float(cosine_similarity(a[:, : b.shape[1]], b).mean()), 3) for a, b in pairs
        ]
    return cosines


def _layer_outputs(model: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, list[Tensor]]:
    """The output of each layer of each stack, [tokens, channels], in evaluation mode."""
    seen: dict[tuple[str, int], list[Tensor]] = defaultdict(list)

    def keep(key: tuple[str, int]) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            seen[key].append(output.flatten(0, -2).float())

        return hook

    hooks = [
        module.register_forward_hook(keep(key))
        for name, module in model.named_modules()
        if (key := layer_of(name))
    ]
    training = model.training
    try:
        run(model.eval())
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    stacks: dict[str, list[Tensor]] = defaultdict(list)
    for stack, layer in sorted(seen):
        # The text tower runs once for each chunk of captions.
        stacks[stack].append(torch.cat(seen[stack, layer]))
    return dict(stacks)
